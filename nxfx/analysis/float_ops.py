"""What ops do to float values, as far as the precision of integer-derived ones depends on it."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator
from enum import Enum
from typing import Any

import torch
from torch import fx

from nxfx.analysis.intervals import arg
from nxfx.analysis.range_rules import PRESERVING_VIEWS, SELECTIONS, overloads
from nxfx.graph import matrix_products, meta, outer_products

aten = torch.ops.aten


class Family(Enum):
    """How an op treats the values it reads."""

    CAST = "converts one value"
    MOVE = "rearranges one value"
    SELECT = "picks among values or changes their sign: rounding before it is the same as rounding after it"
    COMPUTE = "arithmetic"
    OUTER = "a matrix product that sums over one element"
    FACTORY = "makes a constant"
    COMPARE = "a truth value, or a place among others"
    COMPLEX = "a complex number made of float32 parts"


# Sequences of numbers, sums, and constants filled with one number (and where that number stands).
SEQUENCES = frozenset(overloads("arange", "linspace", "logspace", "affine_grid_generator"))
SUMS = frozenset(overloads("sum", "cumsum"))
FILLS = {aten.full.default: 1, aten.full_like.default: 1, aten.new_full.default: 2, aten.scalar_tensor.default: 0}

# Ops that look values up: of a parameter (an embedding table) they make an activation.
LOOKUPS = frozenset(overloads("embedding", "index", "_unsafe_index", "index_select", "gather", "take", "take_along_dim"))

# Ops that turn a small error of their operand into a large one: angles (rotary and sinusoidal embeddings), exponents
# (frequencies, decays), prefix sums (positions), and steps (buckets, indices).
PERIODIC = frozenset(overloads("sin", "cos", "tan", "sinc", "polar"))
_STEPS = frozenset(overloads("floor", "ceil", "round", "trunc", "floor_divide", "remainder", "fmod", "frac"))
SENSITIVE = (
    PERIODIC
    | _STEPS
    | frozenset(overloads("exp", "exp2", "expm1", "cumsum", "cumprod"))
    | {aten.pow.Scalar, aten.pow.Tensor_Tensor, aten.div.Tensor_mode, aten.div.Scalar_mode}
)

# Those where that is so of activations too; a cast, to an integer.
MAGNIFIERS = PERIODIC | _STEPS | frozenset(overloads("grid_sampler", "grid_sampler_2d", "grid_sampler_3d")) | {aten._to_copy.default}

# What comes out of these is small whatever went in: rounding it costs what rounding any activation does.
BOUNDED = frozenset(overloads("sin", "cos", "sinc", "tanh", "sigmoid", "erf", "asin", "acos", "atan", "atan2", "sign"))

# Nodes that ask for a value's metadata only.
METADATA = frozenset([aten._assert_tensor_metadata.default, *overloads("sym_size", "sym_stride", "sym_numel", "sym_storage_offset")])

_CASTS = [aten._to_copy.default, aten.copy.default, aten.type_as.default, torch.ops.prims.convert_element_type.default]
_ARITHMETIC = overloads(
    "add", "sub", "rsub", "mul", "div", "true_divide", "floor_divide", "pow", "sqrt", "rsqrt", "square", "reciprocal",
    "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sin", "cos", "tan", "sinc", "asin", "acos", "atan",
    "atan2", "sinh", "cosh", "tanh", "sigmoid", "erf", "floor", "ceil", "trunc", "round", "frac", "sign", "fmod",
    "remainder", "hypot", "lerp", "addcmul", "addcdiv", "deg2rad", "rad2deg", "sum", "mean", "prod", "cumsum",
    "cumprod", "outer", "ger", "affine_grid_generator", "var", "std", "scatter_add", "index_add", "diff",
)  # fmt: skip
_FIRST_ONLY = frozenset(overloads("sum", "mean", "prod", "cumsum", "cumprod", "round", "affine_grid_generator", "var", "std"))
_CONSTANTS = overloads("zeros", "ones", "eye", "zeros_like", "ones_like", "new_zeros", "new_ones")
# Where the values stand that a SELECT op picks from; every argument when it is not listed.
_PICKED: dict[Any, tuple[int, ...]] = {
    **dict.fromkeys(overloads("where"), (1, 2)),
    **dict.fromkeys(overloads("masked_fill", "index_put", "constant_pad_nd"), (0, 2)),
    **dict.fromkeys(overloads("slice_scatter", "select_scatter", "diagonal_scatter", "fill"), (0, 1)),
    **dict.fromkeys(overloads("cat", "stack", "hstack", "vstack", "dstack", "column_stack", "meshgrid", "broadcast_tensors"), (0,)),
    **dict.fromkeys(overloads("neg", "abs", "relu", "tril", "triu", "diag", "diag_embed"), (0,)),
    **dict.fromkeys(overloads("sort", "topk", "cummax", "cummin", "median", "kthvalue", "mode", "max_pool1d", "max_pool2d"), (0,)),
    **dict.fromkeys(overloads("masked_scatter"), (0, 2)),
    **dict.fromkeys([aten.scatter.src, aten.scatter.value, *overloads("index_copy", "pad")], (0, 3)),
    **dict.fromkeys([aten.max.default, aten.min.default, aten.max.dim, aten.min.dim, *overloads("aminmax")], (0,)),
    **dict.fromkeys(overloads("index_fill"), (0, 3)),
    **dict.fromkeys(overloads("put"), (0, 2)),
}
# The same for arithmetic whose other operands are indices, and for what only tells where values stand.
_AMONG: dict[Any, tuple[int, ...]] = {
    **dict.fromkeys(overloads("scatter_add", "index_add"), (0, 3)),
    **dict.fromkeys(overloads("argmax", "argmin", "argsort"), (0,)),
    **dict.fromkeys(overloads("diff"), (0, 3, 4)),
}
_COMPARISONS = frozenset(overloads("eq", "ne", "lt", "le", "gt", "ge"))
_PROMOTED = frozenset(overloads("cat", "stack"))  # beside what is pointwise
# Places among others, which must have the same dtype.
SEARCHES = frozenset(overloads("bucketize", "searchsorted"))
_EXTREMA = [
    *overloads("minimum", "maximum", "fmin", "fmax", "clamp", "clip", "clamp_min", "clamp_max"),
    aten.max.other,
    aten.min.other,
]
# Not listed, and not to be taken for arithmetic: what they give depends on the dtype, on memory or on chance.
_OPAQUE = frozenset(
    overloads("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "nextafter", "frexp", "as_strided", "view")
) | frozenset(overloads("view_copy", "scaled_dot_product_attention", "copy", "set", "resize"))
# Sums over places that indices name.
_ACCUMULATING = frozenset(overloads("scatter_add", "index_add"))
_INDEX_PUTS = frozenset(overloads("index_put", "_unsafe_index_put"))

FAMILIES: dict[Any, Family] = {
    **dict.fromkeys(_CASTS, Family.CAST),
    **dict.fromkeys([*PRESERVING_VIEWS, *SELECTIONS, *overloads("repeat_interleave"), operator.getitem], Family.MOVE),
    **dict.fromkeys([*_PICKED, *_EXTREMA], Family.SELECT),
    **dict.fromkeys(_ARITHMETIC, Family.COMPUTE),
    **dict.fromkeys(outer_products.PRODUCTS, Family.OUTER),
    **dict.fromkeys([*(SEQUENCES - set(_ARITHMETIC)), *FILLS, *_CONSTANTS], Family.FACTORY),
    **dict.fromkeys([*_COMPARISONS, *overloads("argmax", "argmin", "argsort"), *SEARCHES], Family.COMPARE),
    **dict.fromkeys(overloads("polar", "complex", "view_as_complex"), Family.COMPLEX),
}


def family_of(node: fx.Node) -> Family | None:
    """How ``node`` treats the values it reads; None where nothing is known of that.

    An op that is not listed is arithmetic when it makes floats of its operands alone: it computes the same in a wider dtype.
    """
    family = FAMILIES.get(node.target)
    if node.target in _INDEX_PUTS and accumulates(node):
        return Family.COMPUTE
    if family is not None or node.op != "call_function" or not _computes(node.target) or any(isinstance(a, torch.dtype) for a in node.args):
        return family
    dtype = dtype_of(node)
    if dtype is torch.bool:
        return Family.COMPARE if is_pointwise(node) else None
    has_floats = any(d is not None and d.is_floating_point for d in map(dtype_of, node.all_input_nodes))
    return Family.COMPUTE if dtype is not None and dtype.is_floating_point and has_floats else None


@functools.cache
def _computes(target: Any) -> bool:
    """Whether an op that is not listed is a function of its operands' values."""
    if not isinstance(target, torch._ops.OpOverload) or target.namespace not in ("aten", "prims") or target in _OPAQUE:
        return False
    if matrix_products.factor_positions(target):
        return False
    chance = {torch.Tag.nondeterministic_seeded, torch.Tag.dynamic_output_shape}
    return not target._schema.is_mutable and not chance & set(target.tags) and bool(target._schema.returns)


def is_listed(node: fx.Node) -> bool:
    """Whether what ``node`` does is stated here, or follows from its being pointwise."""
    return node.target in FAMILIES or is_pointwise(node)


def is_pointwise(node: fx.Node) -> bool:
    """Whether ``node`` makes each element of its result of the same elements of its operands."""
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags


def accumulates(node: fx.Node) -> bool:
    """Whether ``node`` adds to places that indices name."""
    return node.target in _ACCUMULATING or (node.target in _INDEX_PUTS and bool(arg(node, 3, "accumulate", False)))


def has_several_results(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (list, tuple))


def dtype_of(node: fx.Node) -> torch.dtype | None:
    """The dtype of a tensor node, or of the first output of a multi-output one."""
    value = node.meta.get("val")
    if type(value) is not meta.FakeTensor:
        if isinstance(value, (list, tuple)) and value:
            value = value[0]
        if not isinstance(value, torch.Tensor):
            return None
    dtype: torch.dtype = value.dtype
    return dtype


def op_name(node: fx.Node) -> str:
    """The op's name without its overload, e.g. ``"mul"``."""
    return str(getattr(node.target, "__name__", node.target)).split(".")[0]


def values_of(node: fx.Node, family: Family) -> tuple[Any, ...]:
    """The operands whose values ``node`` is made of: nodes and numbers. Masks, indices, sizes and dims are none."""
    args = node.args
    if family is Family.FACTORY:
        fill = fill_of(node)
        return (fill,) if isinstance(fill, fx.Node) else ()
    if family is Family.MOVE or node.target in _FIRST_ONLY:
        return args[:1]
    if family is Family.CAST:
        return args[1:2] if node.target is aten.copy.default else args[:1]
    if family is Family.OUTER:
        return outer_products.operands(node) or ()
    if (positions := _PICKED.get(node.target) or _AMONG.get(node.target)) is not None:
        return tuple(_flat(args[p] for p in positions if p < len(args)))
    if not is_listed(node):  # of its numbers and integers nothing is known
        return tuple(v for v in node.all_input_nodes if (d := dtype_of(v)) is not None and d.is_floating_point)
    named = (v for k, v in node.kwargs.items() if k in ("min", "max", "other", "value", "weight"))
    return tuple(_flat((*args, *named)))


def _flat(arguments: Any) -> Iterator[Any]:
    for argument in arguments:
        if isinstance(argument, (list, tuple)):
            yield from _flat(argument)
        elif argument is not None:
            yield argument


def promotes(user: fx.Node) -> bool:
    """Whether ``user`` itself converts a low-precision operand to float32, since another one is wider."""
    if dtype_of(user) is not torch.float32:
        return False
    return user.target in _PROMOTED or is_pointwise(user)


def fill_of(node: fx.Node) -> Any:
    """The number (or node) that a constant is filled with, None for anything else."""
    return arg(node, FILLS[node.target], "fill_value") if node.target in FILLS else None


def is_complement(node: fx.Node) -> bool:
    """``1 - x``."""
    name = op_name(node)
    if name not in ("sub", "rsub"):
        return False
    a, b = arg(node, 0, "self"), arg(node, 1, "other")
    one, other = (b, a) if name == "rsub" else (a, b)
    return isinstance(one, (int, float)) and one == 1 and isinstance(other, fx.Node) and arg(node, 2, "alpha", 1) == 1


def compares_with_small(node: fx.Node) -> bool:
    """A comparison with a number so small that the rounding of large integers cannot change it."""
    other = arg(node, 1, "other")
    return node.target in _COMPARISONS and isinstance(other, (int, float)) and abs(other) <= 4


@functools.lru_cache(maxsize=1024)
def representable(number: float, dtype: torch.dtype) -> bool:
    """Whether ``dtype`` holds ``number`` exactly (nan counts)."""
    return number != number or float(torch.tensor(number, dtype=torch.float64).to(dtype)) == number
