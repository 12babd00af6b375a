"""How ATen ops treat integer dtypes: which take int32 where the model has int64, and what dtype comes out.

Measured on torch 2.9 and 2.13 (CPU); ``tests/test_narrow_64bit.py`` runs every row. An op that is not in the table is taken to demand
int64, which is always right: it gets a local cast.
"""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import fx

from nxfx.analysis.intervals import INT32, Interval, fits
from nxfx.analysis.range_rules import PRESERVING_VIEWS, SELECTIONS, overloads

aten = torch.ops.aten


class Result(Enum):
    """Where the dtype of an integer result comes from."""

    FOLLOWS = "the value operands"
    FACTORY = "the dtype keyword, else the first operand or int64"
    CAST = "the dtype keyword, else the operand"
    ACCUMULATES = "the dtype keyword, else int64"
    FORCED = "the schema: int64"


@dataclass(frozen=True)
class IntegerRule:
    """One row of the table.

    Attributes:
        result: see :class:`Result`.
        index: positions of arguments that are indices: int32 or int64, whatever the values are.
        forced: for a multi-output op, the outputs that are int64 whatever comes in; the others follow the values.
        composite: made of other ops, some of which may accumulate in int64: only evaluation tells.
    """

    result: Result = Result.FOLLOWS
    index: tuple[int, ...] = ()
    forced: frozenset[int] = frozenset()
    composite: bool = False


RULES: dict[Any, IntegerRule] = {}


def _add(rule: IntegerRule, *targets: Any) -> None:
    RULES.update(dict.fromkeys(targets, rule))


# Ops whose tensor operands promote together and whose result, when it is an integer, has the promoted dtype.
POINTWISE = frozenset(
    overloads(
        "add", "sub", "rsub", "mul", "floor_divide", "div", "remainder", "fmod", "maximum", "minimum", "pow", "clamp", "clip",
        "clamp_min", "clamp_max", "abs", "neg", "sign", "sgn", "relu", "square", "bitwise_and", "bitwise_or", "bitwise_xor",
        "bitwise_not", "bitwise_left_shift", "bitwise_right_shift", "__and__", "__or__", "__xor__", "__lshift__", "__rshift__",
        "eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or", "logical_xor", "logical_not", "where", "isnan", "isinf",
        "isfinite", "signbit", "true_divide", "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sqrt", "rsqrt", "reciprocal",
        "sin", "cos", "tan", "tanh", "sigmoid", "erf", "atan2", "atan", "floor", "ceil", "round", "trunc",
    )
    + [aten.max.other, aten.min.other]
)  # fmt: skip

SHIFTS = frozenset(overloads("bitwise_left_shift", "bitwise_right_shift", "__lshift__", "__rshift__"))
RIGHT_SHIFTS = frozenset(overloads("bitwise_right_shift", "__rshift__"))
BITWISE = frozenset(overloads("bitwise_and", "bitwise_or", "bitwise_xor", "__and__", "__or__", "__xor__"))
SUBTRACTIONS = frozenset(overloads("sub", "rsub"))
CLAMPS = frozenset(overloads("clamp", "clip", "clamp_min", "clamp_max"))
COMPARISONS = frozenset(overloads("eq", "ne", "lt", "le", "gt", "ge"))
CHOICES = frozenset(overloads("where"))
# On CPU, an index that is expanded along dims other than the first (strides 0) is read as int64: gather gives other rows without
# a word, scatter_add and scatter_reduce raise (torch 2.9 and 2.13).
EXPANDED_INDEX = frozenset({aten.gather.default, aten.scatter_add.default, aten.scatter_reduce.two})
READS_MEMORY = (aten.as_strided.default, aten.as_strided_copy.default, aten.as_strided_scatter.default)
# They ask how a view lies in memory, which a cast of it forgets; in which dtype is all the same.
READS_LAYOUT = (aten.sym_stride.int, aten.sym_stride.default, aten.sym_storage_offset.default)
METADATA_ASSERT = aten._assert_tensor_metadata.default

_add(IntegerRule(), *POINTWISE, *PRESERVING_VIEWS, *SELECTIONS)
_add(
    IntegerRule(),
    *overloads("tril", "triu", "cat", "concat", "stack", "hstack", "vstack", "masked_fill", "masked_scatter", "copy", "fill", "pad",
               "constant_pad_nd", "slice_scatter", "select_scatter", "diagonal_scatter", "mm", "bmm", "mv", "dot",
               "mean", "any", "all", "repeat_interleave", "isin", "type_as", "meshgrid", "diff", "matmul", "outer", "item",
               "_local_scalar_dense", "_assert_async", "_assert_scalar"),
    aten.max.default, aten.min.default, aten.median.default, aten.sym_size.int, aten.sym_size.default, aten.sym_numel.default,
    operator.getitem,
)  # fmt: skip
# No value operand at all, or one that wraps into another dtype when reread.
for _target in (*overloads("take", "take_along_dim"), aten.view.dtype):
    RULES.pop(_target, None)

_add(IntegerRule(index=(1,)), *overloads("index", "_unsafe_index", "index_put", "_unsafe_index_put", "embedding"),
     aten.embedding_dense_backward.default, aten.repeat_interleave.self_Tensor)  # fmt: skip
_add(IntegerRule(index=(2,)), *overloads("gather", "index_select", "scatter", "scatter_add", "scatter_reduce", "index_add"))
_add(IntegerRule(index=(1, 2)), *overloads("_embedding_bag", "_embedding_bag_forward_only"))

_add(IntegerRule(composite=True), *overloads("einsum"))
_add(IntegerRule(Result.CAST), aten._to_copy.default)
_add(
    IntegerRule(Result.FACTORY),
    *overloads("zeros", "zeros_like", "new_zeros", "ones", "ones_like", "new_ones", "empty", "empty_like", "new_empty", "empty_strided",
               "new_empty_strided", "empty_permuted", "eye", "tril_indices", "triu_indices"),
    aten.arange.default, aten.arange.start, aten.arange.start_step, aten.full.default, aten.full_like.default, aten.new_full.default,
    aten.scalar_tensor.default,
)  # fmt: skip
_add(IntegerRule(Result.ACCUMULATES), aten.sum.default, aten.sum.dim_IntList, aten.prod.default, aten.prod.dim_int,
     aten.cumsum.default, aten.cumprod.default)  # fmt: skip
_add(IntegerRule(Result.FORCED), *overloads("argmax", "argmin", "argsort", "nonzero", "count_nonzero", "bucketize", "searchsorted",
                                            "bincount", "multinomial", "randperm", "randint"), aten.where.Scalar)  # fmt: skip
_add(IntegerRule(forced=frozenset({1})), aten.max.dim, aten.min.dim, aten.cummax.default, aten.cummin.default, aten.sort.default,
     aten.sort.stable, aten.topk.default, aten.kthvalue.default, aten.median.dim, aten.mode.default,
     *overloads("max_pool2d_with_indices", "max_pool3d_with_indices", "adaptive_max_pool2d", "adaptive_max_pool3d"))  # fmt: skip


@functools.lru_cache(maxsize=4096)
def _number_arguments(target: Any) -> tuple[tuple[int, str], ...]:
    """Position and name of the arguments of an op that may be a Python number taking part in the arithmetic."""
    schema = getattr(target, "_schema", None)
    if schema is None:
        return ()
    return tuple(
        (i, a.name) for i, a in enumerate(schema.arguments) if str(a.type) in ("number", "Optional[number]", "Tensor", "Optional[Tensor]")
    )  # fmt: skip


def python_numbers(node: fx.Node) -> dict[int | str, int | float]:
    """Python numbers that take part in ``node``'s arithmetic, by position or keyword; sizes, dims and slice ends are none."""
    found: dict[int | str, int | float] = {}
    for position, name in _number_arguments(node.target):
        key: int | str = position if position < len(node.args) else name
        value = node.args[position] if position < len(node.args) else node.kwargs.get(name)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            found[key] = value
    return found


def in_int32(node: fx.Node, number: int, bounds: Interval) -> int | None:
    """What ``number`` becomes when ``node`` is computed in int32, its operand within ``bounds`` and its result in int32.

    The ends of int32 stand for what is beyond them in a clamp, and in a comparison when the operand cannot reach them. The low 32
    bits decide a bitwise op. A shift to the right by more than 31 leaves the sign. None: it has to be computed in int64.
    """
    if node.target in RIGHT_SHIFTS and number > 31:
        return 31
    if number == INT32[0] and node.target in SUBTRACTIONS:
        return None  # torch negates its alpha, and refuses to
    if fits((number, number), INT32):
        return number
    if node.target in BITWISE:
        return (number + 2**31) % 2**32 - 2**31
    end_is_free = bounds[1] < INT32[1] if number > 0 else bounds[0] > INT32[0]
    if node.target in CLAMPS or (node.target in COMPARISONS and end_is_free):
        return max(INT32[0], min(INT32[1], number))
    return None


def set_argument(node: fx.Node, key: int | str, value: Any) -> None:
    """Replace one argument, by position or keyword."""
    if isinstance(key, int):
        node.update_arg(key, value)
    else:
        node.update_kwarg(key, value)


def demands_int64(node: fx.Node) -> bool:
    """Whether ``node`` takes its integers as int64 only, as far as is known."""
    known = node.target in RULES or node.target in READS_LAYOUT
    return not known or isinstance(node.kwargs.get("sorter"), fx.Node)


def is_forced(node: fx.Node) -> bool:
    """Whether ``node``'s schema makes it int64: an index producer, or the index output of one."""
    rule = RULES.get(node.target)
    if node.target is operator.getitem:
        source = node.args[0]
        rule = RULES.get(source.target) if isinstance(source, fx.Node) else None
        return rule is not None and node.args[1] in rule.forced
    return rule is not None and (rule.result is Result.FORCED or rule.composite)
