"""The interval table: op → what its integer result can be, given what its arguments can be.

A rule is ``rule(node, ranges)`` and returns an interval that holds in exact integer arithmetic; the sweep compares it with the
dtype and gives up (the dtype's bounds) where it does not fit, because the result may have wrapped. None means unknown. A list
holds one entry per output. Semantics are those of the ATen operators as torch's documentation gives them.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx

from nxfx.analysis import dtype_rules
from nxfx.analysis.intervals import INT64, Bounds, Interval, Ranges, arg, fits, join
from nxfx.graph import meta

aten = torch.ops.aten
Rule = Callable[[fx.Node, Ranges], Bounds]
RULES: dict[Any, Rule] = {}


def _rule(*targets: Any) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        for target in targets:
            RULES[target] = function
        return function

    return register


def overloads(*names: str) -> list[Any]:
    """Every overload of the named aten ops that this torch has."""
    found = []
    for name in names:
        packet = getattr(aten, name, None)
        if packet is not None:
            found += [getattr(packet, o) for o in packet.overloads() if not o.endswith("out") and "dimname" not in o.lower()]
    return found


def operand(node: fx.Node, ranges: Ranges, value: Any) -> Interval:
    """Bounds of ``value`` once converted to ``node``'s dtype: a scalar or 0-d tensor beyond it wraps to anything."""
    result = node.meta["val"]
    limits = dtype_rules.integer_bounds(result.dtype) if isinstance(result, torch.Tensor) else INT64
    found: Interval | None = None if isinstance(value, float) else ranges.read(value)
    if isinstance(value, float) and math.isfinite(value):
        found = (math.floor(value), math.ceil(value))
    return found if found is not None and fits(found, limits) else limits


def count_of(ranges: Ranges, sizes: Iterable[Any]) -> Interval:
    """Bounds of the product of dimension sizes."""
    low = high = 1
    for size in sizes:
        a, b = ranges.symbolic(size)
        low, high = low * max(a, 0), high * max(b, 0)
    return low, high


def _shape(value: Any) -> tuple[Any, ...] | None:
    tensor = meta.val(value) if isinstance(value, fx.Node) else None
    return tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else None


def _reduced_count(ranges: Ranges, value: Any, dims: Any) -> Interval | None:
    shape = _shape(value)
    if shape is None:
        return None
    if dims is None or dims == []:
        return count_of(ranges, shape)
    dims = [dims] if isinstance(dims, int) else dims
    return count_of(ranges, [shape[d] for d in dims]) if shape else (1, 1)


def products(a: Interval, b: Interval) -> Interval:
    corners = [x * y for x in a for y in b]
    return min(corners), max(corners)


def within(bounds: Bounds, limits: Interval) -> Interval:
    """``bounds``, or all that the dtype holds when arithmetic may have wrapped around its ends or nothing is known."""
    return bounds if isinstance(bounds, tuple) and fits(bounds, limits) else limits


# --- values kept as they are -----------------------------------------------------------------------------------------

# Ops whose result holds every element of their first argument, unchanged, and no other.
PRESERVING_VIEWS = frozenset(
    overloads("view", "_unsafe_view", "reshape", "_reshape_alias", "unsqueeze", "squeeze", "permute", "transpose", "t", "clone",
               "alias", "detach", "contiguous", "flatten", "lift_fresh", "lift_fresh_copy", "lift", "flip", "roll", "view_copy",
               "permute_copy", "transpose_copy", "unsqueeze_copy", "squeeze_copy", "alias_copy", "detach_copy",
               "numpy_T", "mT", "movedim", "unflatten", "swapaxes")
)  # fmt: skip
# ``aten.view.dtype`` reads other bits.
PRESERVING_VIEWS -= {aten.view.dtype, aten.view_copy.dtype}

# Ops whose result holds some elements of their first argument, unchanged, and no other. Not ``as_strided``: it reads the memory
# around a view.
SELECTIONS = overloads(
    "expand", "expand_copy", "broadcast_to", "slice", "slice_copy", "select", "select_copy", "narrow", "narrow_copy", "diagonal",
    "diagonal_copy", "unfold", "unfold_copy", "repeat", "tile", "index_select", "gather", "index",
    "_unsafe_index", "take", "take_along_dim", "masked_select", "sort", "msort", "split", "split_with_sizes", "unbind", "chunk",
    "tensor_split", "split_copy", "split_with_sizes_copy", "unbind_copy", "amax", "amin", "cummax", "cummin", "expand_as", "view_as",
    "reshape_as", "unsafe_split", "unsafe_split_with_sizes", "unsafe_chunk", "embedding",
    "reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d", "pixel_shuffle", "channel_shuffle",
)  # fmt: skip


@_rule(*PRESERVING_VIEWS, *SELECTIONS)
def _first_argument(node: fx.Node, ranges: Ranges) -> Bounds:
    return ranges.read(arg(node, 0, "self"))


@_rule(aten.repeat_interleave.self_Tensor, aten.repeat_interleave.self_int)
def _repeat_interleave(node: fx.Node, ranges: Ranges) -> Bounds:
    return ranges.read(node.args[0])


@_rule(aten.repeat_interleave.Tensor)
def _repeat_positions(node: fx.Node, ranges: Ranges) -> Bounds:
    return _index_into(ranges, [_shape(node.args[0])])


@_rule(aten.tril.default, aten.triu.default)
def _with_zero(node: fx.Node, ranges: Ranges) -> Bounds:
    bounds = ranges.read(node.args[0])
    return join((0, 0), bounds) if bounds else None


@_rule(aten._to_copy.default, *overloads("to", "type_as"))
def _cast(node: fx.Node, ranges: Ranges) -> Bounds:
    source = node.args[0]
    bounds = ranges.read(source)
    if bounds is not None or not isinstance(source, fx.Node):
        return bounds
    from nxfx.analysis.float_ranges import bound

    floats = bound(ranges, source)
    ranges.lean()
    return (math.trunc(floats[0]), math.trunc(floats[1])) if floats and all(map(math.isfinite, floats)) else None


@_rule(aten.item.default, aten._local_scalar_dense.default)
def _item(node: fx.Node, ranges: Ranges) -> Bounds:
    return ranges.read(node.args[0])


# --- factories -------------------------------------------------------------------------------------------------------


def arange_arguments(node: fx.Node) -> tuple[Any, Any, Any]:
    """start, end and step of any ``arange``."""
    if len(node.args) == 1:
        return 0, node.args[0], 1
    return node.args[0], node.args[1], arg(node, 2, "step", 1)


@_rule(aten.arange.default, aten.arange.start, aten.arange.start_step)
def _arange(node: fx.Node, ranges: Ranges) -> Bounds:
    start, end, step = (int(v) if isinstance(v, float) and v.is_integer() else v for v in arange_arguments(node))
    if any(isinstance(v, float) for v in (start, end, step)):
        return None
    if all(isinstance(v, int) for v in (start, end, step)):
        values = range(start, end, step)
        return (min(values[0], values[-1]), max(values[0], values[-1])) if values else (0, 0)
    first, last, by = (ranges.read(v) for v in (start, end, step))
    if first is None or last is None or by is None or by[0] <= 0 <= by[1]:
        return None
    if by[0] > 0:
        return (first[0], max(first[0], last[1] - 1))
    return (min(first[1], last[0] + 1), first[1])


@_rule(aten.full.default, aten.full_like.default, aten.new_full.default)
def _full(node: fx.Node, ranges: Ranges) -> Bounds:
    return operand(node, ranges, arg(node, 2 if node.target is aten.new_full.default else 1, "fill_value"))


@_rule(aten.scalar_tensor.default)
def _scalar_tensor(node: fx.Node, ranges: Ranges) -> Bounds:
    return operand(node, ranges, node.args[0])


# Uninitialised memory may hold anything, so nothing is lost by taking it to hold zeros.
@_rule(*overloads("zeros", "zeros_like", "new_zeros", "zero", "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided",
                   "empty_permuted"))  # fmt: skip
def _zeros(node: fx.Node, ranges: Ranges) -> Bounds:
    return (0, 0)


@_rule(*overloads("ones", "ones_like", "new_ones"))
def _ones(node: fx.Node, ranges: Ranges) -> Bounds:
    return (1, 1)


@_rule(*overloads("eye", "one_hot"))
def _zero_or_one(node: fx.Node, ranges: Ranges) -> Bounds:
    return (0, 1)


@_rule(aten.randint.default, aten.randint.low, aten.randint_like.default, aten.randint_like.low_dtype)
def _randint(node: fx.Node, ranges: Ranges) -> Bounds:
    ends = [a for a in node.args if isinstance(a, (int, fx.Node)) and not meta.is_tensor(a)]
    low, high = (0, ends[0]) if len(ends) == 1 else (ends[0], ends[1]) if len(ends) == 2 else (None, None)
    first, last = ranges.read(low), ranges.read(high)
    return (first[0], last[1] - 1) if first and last else None


@_rule(aten.randperm.default)
def _randperm(node: fx.Node, ranges: Ranges) -> Bounds:
    count = ranges.read(node.args[0])
    return (0, max(count[1] - 1, 0)) if count else None


@_rule(*overloads("tril_indices", "triu_indices"))
def _triangle_indices(node: fx.Node, ranges: Ranges) -> Bounds:
    rows, columns = ranges.read(node.args[0]), ranges.read(node.args[1])
    return (0, max(rows[1], columns[1], 1) - 1) if rows and columns else None


# --- arithmetic ------------------------------------------------------------------------------------------------------


@_rule(*overloads("add", "sub"))
def _add_or_sub(node: fx.Node, ranges: Ranges) -> Bounds:
    a, b = operand(node, ranges, node.args[0]), operand(node, ranges, node.args[1])
    alpha = operand(node, ranges, arg(node, 2, "alpha", 1))
    b = products(b, alpha)
    if "sub" in node.target.__name__.split(".")[0]:  # type: ignore[union-attr]
        b = (-b[1], -b[0])
    return a[0] + b[0], a[1] + b[1]


@_rule(*overloads("rsub"))
def _rsub(node: fx.Node, ranges: Ranges) -> Bounds:
    a, b = operand(node, ranges, node.args[1]), operand(node, ranges, node.args[0])
    alpha = operand(node, ranges, arg(node, 2, "alpha", 1))
    b = products(b, alpha)
    return a[0] - b[1], a[1] - b[0]


@_rule(*overloads("mul"))
def _mul(node: fx.Node, ranges: Ranges) -> Bounds:
    a, b = operand(node, ranges, node.args[0]), operand(node, ranges, node.args[1])
    if node.args[0] is node.args[1]:
        return _squares(a)
    return products(a, b)


def _squares(a: Interval) -> Interval:
    ends = (a[0] * a[0], a[1] * a[1])
    return (0 if a[0] <= 0 <= a[1] else min(ends), max(ends))


@_rule(*overloads("square"))
def _square(node: fx.Node, ranges: Ranges) -> Bounds:
    a = ranges.read(node.args[0])
    return _squares(a) if a else None


@_rule(*overloads("neg"))
def _neg(node: fx.Node, ranges: Ranges) -> Bounds:
    a = ranges.read(node.args[0])
    return (-a[1], -a[0]) if a else None


@_rule(*overloads("abs"))
def _abs(node: fx.Node, ranges: Ranges) -> Bounds:
    a = ranges.read(node.args[0])
    if a is None:
        return None
    return (0 if a[0] <= 0 <= a[1] else min(abs(a[0]), abs(a[1])), max(abs(a[0]), abs(a[1])))


@_rule(*overloads("sign", "sgn"))
def _sign(node: fx.Node, ranges: Ranges) -> Bounds:
    a = ranges.read(node.args[0])
    return ((a[0] > 0) - (a[0] < 0), (a[1] > 0) - (a[1] < 0)) if a else None


@_rule(*overloads("relu"))
def _relu(node: fx.Node, ranges: Ranges) -> Bounds:
    a = ranges.read(node.args[0])
    return (max(a[0], 0), max(a[1], 0)) if a else None


@_rule(*overloads("floor", "ceil", "round", "trunc"))
def _rounding(node: fx.Node, ranges: Ranges) -> Bounds:
    return ranges.read(node.args[0]) if "decimals" not in node.kwargs else None


@_rule(*overloads("floor_divide"))
def _floor_divide(node: fx.Node, ranges: Ranges) -> Bounds:
    return _quotient(operand(node, ranges, node.args[0]), operand(node, ranges, node.args[1]), floor=True)


@_rule(aten.div.Tensor_mode, aten.div.Scalar_mode)
def _div_mode(node: fx.Node, ranges: Ranges) -> Bounds:
    floor = node.kwargs.get("rounding_mode") == "floor"
    return _quotient(operand(node, ranges, node.args[0]), operand(node, ranges, node.args[1]), floor=floor)


def _quotient(a: Interval, b: Interval, *, floor: bool) -> Interval | None:
    # Division by zero raises, so only the other divisors count.
    divisors = {d for d in (*b, *(s for s in (-1, 1) if b[0] <= s <= b[1])) if d}
    if not divisors:
        return None
    quotients = [x // d if floor else (abs(x) // abs(d)) * (1 if (x < 0) == (d < 0) else -1) for x in a for d in divisors]
    if a[0] <= 0 <= a[1]:
        quotients.append(0)
    return min(quotients), max(quotients)


@_rule(*overloads("remainder"))
def _remainder(node: fx.Node, ranges: Ranges) -> Bounds:
    a, m = operand(node, ranges, node.args[0]), operand(node, ranges, node.args[1])
    if m[0] > 0 and a[0] >= 0 and a[1] < m[0]:
        return a
    low, high = min(m[0] + 1, 0), max(m[1] - 1, 0)
    return (low, min(high, a[1])) if m[0] >= 0 and a[0] >= 0 else (low, high)


@_rule(*overloads("fmod"))
def _fmod(node: fx.Node, ranges: Ranges) -> Bounds:
    a, m = operand(node, ranges, node.args[0]), operand(node, ranges, node.args[1])
    most = max(abs(m[0]), abs(m[1]), 1) - 1
    return (-min(most, max(-a[0], 0)), min(most, max(a[1], 0)))


@_rule(*overloads("pow"))
def _pow(node: fx.Node, ranges: Ranges) -> Bounds:
    base, exponent = operand(node, ranges, node.args[0]), operand(node, ranges, node.args[1])
    if exponent[0] < 0:
        return None
    return powers(base, exponent)


def powers(base: Interval, exponent: Interval) -> Interval | None:
    """Bounds of ``base ** exponent`` for non-negative exponents, None when certainly beyond 64 bits."""
    most = max(abs(base[0]), abs(base[1]))
    if most > 1 and exponent[1] * math.log2(most) > 70:
        return None
    exponents = {exponent[0], exponent[1], max(exponent[0], exponent[1] - 1)}
    if most <= 1:  # powers of -1, 0 and 1 repeat
        exponents = {exponent[0], min(exponent[0] + 1, exponent[1]), min(exponent[0] + 2, exponent[1])}
    values = [b**e for b in {*base, *(s for s in (-1, 0, 1) if base[0] <= s <= base[1])} for e in exponents]
    return min(values), max(values)


@_rule(*overloads("maximum", "minimum"), aten.max.other, aten.min.other)
def _extremum(node: fx.Node, ranges: Ranges) -> Bounds:
    a, b = operand(node, ranges, node.args[0]), operand(node, ranges, node.args[1])
    pick = max if "max" in node.target.__name__ else min  # type: ignore[union-attr]
    return pick(a[0], b[0]), pick(a[1], b[1])


@_rule(*overloads("clamp", "clip", "clamp_min", "clamp_max"))
def _clamp(node: fx.Node, ranges: Ranges) -> Bounds:
    bounds = ranges.read(node.args[0])
    name = node.target.__name__  # type: ignore[union-attr]
    low = arg(node, 1, "max" if name.startswith("clamp_max") else "min")
    high = arg(node, 2, "max")
    if name.startswith("clamp_max"):
        low, high = None, low
    elif name.startswith("clamp_min"):
        high = None
    if bounds is None:
        return None
    if low is not None:
        floor = operand(node, ranges, low)
        bounds = max(bounds[0], floor[0]), max(bounds[1], floor[1])
    if high is not None:
        ceiling = operand(node, ranges, high)
        bounds = min(bounds[0], ceiling[0]), min(bounds[1], ceiling[1])
    return bounds


# --- bits ------------------------------------------------------------------------------------------------------------


def _all_bits(*bounds: Interval) -> int:
    """The smallest 2**k - 1 such that everything lies in [-2**k, 2**k - 1]."""
    return (1 << max((v if v >= 0 else ~v).bit_length() for pair in bounds for v in pair)) - 1


@_rule(*overloads("bitwise_and", "__and__"))
def _and(node: fx.Node, ranges: Ranges) -> Bounds:
    a, b = operand(node, ranges, node.args[0]), operand(node, ranges, node.args[1])
    if a[0] < 0 and b[0] < 0:
        return -_all_bits(a, b) - 1, max(a[1], b[1])
    ends = [end[1] for end in (a, b) if end[0] >= 0]
    for mask, value in ((a, b), (b, a)):
        if mask[0] == mask[1] and value[0] >= 0:
            ends.append(mask[0] & _all_bits(value))  # a constant leaves no bits but its own
    return 0, min(ends)


@_rule(*overloads("bitwise_or", "bitwise_xor", "__or__", "__xor__"))
def _or_or_xor(node: fx.Node, ranges: Ranges) -> Bounds:
    a, b = operand(node, ranges, node.args[0]), operand(node, ranges, node.args[1])
    most = _all_bits(a, b)
    return (0 if a[0] >= 0 and b[0] >= 0 else -most - 1), most


@_rule(*overloads("bitwise_not"))
def _not(node: fx.Node, ranges: Ranges) -> Bounds:
    a = ranges.read(node.args[0])
    return (-a[1] - 1, -a[0] - 1) if a else None


@_rule(*overloads("bitwise_left_shift", "__lshift__"))
def _left_shift(node: fx.Node, ranges: Ranges) -> Bounds:
    a, s = operand(node, ranges, node.args[0]), operand(node, ranges, node.args[1])
    if s[0] < 0 or s[1] > 62:
        return None
    return products(a, (1 << s[0], 1 << s[1]))


@_rule(*overloads("bitwise_right_shift", "__rshift__"))
def _right_shift(node: fx.Node, ranges: Ranges) -> Bounds:
    a, s = operand(node, ranges, node.args[0]), operand(node, ranges, node.args[1])
    if s[0] < 0:
        return None
    corners = [x >> y for x in a for y in s]
    return min(corners), max(corners)


# --- choice and assembly ---------------------------------------------------------------------------------------------


def _joined(node: fx.Node, ranges: Ranges, values: Iterable[Any]) -> Bounds:
    return join(*[operand(node, ranges, v) for v in values])


@_rule(*overloads("where"))
def _where(node: fx.Node, ranges: Ranges) -> Bounds:
    return _joined(node, ranges, node.args[1:3]) if len(node.args) == 3 else _index_into(ranges, [_shape(node.args[0])])


@_rule(*overloads("cat", "concat", "stack", "hstack", "vstack"))
def _cat(node: fx.Node, ranges: Ranges) -> Bounds:
    tensors = arg(node, 0, "tensors")
    return _joined(node, ranges, tensors)


@_rule(*overloads("masked_fill"))
def _masked_fill(node: fx.Node, ranges: Ranges) -> Bounds:
    return _joined(node, ranges, (node.args[0], arg(node, 2, "value")))


@_rule(*overloads("masked_scatter", "masked_scatter_backward"))
def _masked_scatter(node: fx.Node, ranges: Ranges) -> Bounds:
    return _joined(node, ranges, (node.args[0], node.args[2])) if node.target is aten.masked_scatter.default else None


@_rule(aten.fill.Scalar, aten.fill.Tensor)
def _fill(node: fx.Node, ranges: Ranges) -> Bounds:
    return operand(node, ranges, arg(node, 1, "value"))


@_rule(aten.copy.default)
def _copy(node: fx.Node, ranges: Ranges) -> Bounds:
    source = node.args[1]
    if meta.dtype_of(source) is not None and not dtype_rules.is_integral(meta.dtype_of(source)):
        return None
    return operand(node, ranges, source)


@_rule(*overloads("constant_pad_nd", "pad"))
def _pad(node: fx.Node, ranges: Ranges) -> Bounds:
    if node.target is aten.constant_pad_nd.default:
        return _joined(node, ranges, (node.args[0], arg(node, 2, "value", 0)))
    if arg(node, 2, "mode", "constant") == "constant":
        return _joined(node, ranges, (node.args[0], arg(node, 3, "value", 0) or 0))
    return ranges.read(node.args[0])


@_rule(*overloads("slice_scatter", "select_scatter", "diagonal_scatter", "as_strided_scatter"))
def _view_scatter(node: fx.Node, ranges: Ranges) -> Bounds:
    return _joined(node, ranges, node.args[:2])


@_rule(aten.scatter.src, aten.scatter.value, aten.index_fill.int_Scalar, aten.index_fill.int_Tensor, aten.index_copy.default)
def _scatter(node: fx.Node, ranges: Ranges) -> Bounds:
    return _joined(node, ranges, (node.args[0], node.args[3]))


@_rule(aten.index_put.default, aten._unsafe_index_put.default)
def _index_put(node: fx.Node, ranges: Ranges) -> Bounds:
    base, values = node.args[0], node.args[2]
    if not arg(node, 3, "accumulate", False):
        return _joined(node, ranges, (base, values))
    a, b = operand(node, ranges, base), operand(node, ranges, values)
    shapes = [_shape(i) for i in (*arg(node, 1, "indices"), values) if i is not None]
    if any(s is None for s in shapes):
        return None
    # Each element of the broadcast values lands somewhere, at worst all on one place: the product bounds their number.
    writes = 1
    for shape in shapes:
        writes *= max(count_of(ranges, shape or ())[1], 1)
    return _accumulated(a, b, writes)


@_rule(aten.scatter_add.default, aten.index_add.default)
def _scatter_add(node: fx.Node, ranges: Ranges) -> Bounds:
    a, b = operand(node, ranges, node.args[0]), operand(node, ranges, node.args[3])
    index = _shape(node.args[2])
    if index is None:
        return None
    alpha = operand(node, ranges, node.kwargs.get("alpha", 1))
    return _accumulated(a, products(b, alpha), count_of(ranges, index)[1])


def _accumulated(base: Interval, added: Interval, times: int) -> Interval:
    return base[0] + times * min(added[0], 0), base[1] + times * max(added[1], 0)


# --- reductions and scans --------------------------------------------------------------------------------------------


@_rule(aten.sum.default, aten.sum.dim_IntList)
def _sum(node: fx.Node, ranges: Ranges) -> Bounds:
    a = ranges.read(node.args[0])
    count = _reduced_count(ranges, node.args[0], arg(node, 1, "dim") if node.target is aten.sum.dim_IntList else None)
    if a is None or count is None:
        return None
    return _repeated(a, count)


@_rule(*overloads("prod"))
def _prod(node: fx.Node, ranges: Ranges) -> Bounds:
    a = ranges.read(node.args[0])
    dim = None if node.target is aten.prod.default else arg(node, 1, "dim")
    count = _reduced_count(ranges, node.args[0], dim)
    return powers_of_any(a, count) if a and count else None


def powers_of_any(a: Interval, count: Interval) -> Interval | None:
    """Bounds of a product of ``count`` values, each anywhere in ``a``."""
    most = max(abs(a[0]), abs(a[1]))
    if most > 1 and count[1] * math.log2(most) > 70:
        return None
    high = most ** count[1] if most > 1 else most
    high = max(high, 1) if count[0] == 0 else high
    if a[0] < 0:
        return -high, high
    return (a[0] ** min(count[0], 64) if a[0] > 0 and count[0] else min(a[0], 1)), high


@_rule(aten.cumsum.default)
def _cumsum(node: fx.Node, ranges: Ranges) -> Bounds:
    a = ranges.read(node.args[0])
    count = _reduced_count(ranges, node.args[0], arg(node, 1, "dim"))
    return (min(a[0], count[1] * a[0]), max(a[1], count[1] * a[1])) if a and count else None


@_rule(aten.cumprod.default)
def _cumprod(node: fx.Node, ranges: Ranges) -> Bounds:
    a = ranges.read(node.args[0])
    count = _reduced_count(ranges, node.args[0], arg(node, 1, "dim"))
    return powers_of_any(a, (min(1, count[0]), count[1])) if a and count else None


@_rule(aten.max.default, aten.min.default, aten.median.default, aten.nanmedian.default)
def _one_of_all(node: fx.Node, ranges: Ranges) -> Bounds:
    return ranges.read(node.args[0])


def _index_into(ranges: Ranges, shapes: Iterable[Iterable[Any] | None]) -> Interval | None:
    """An index into one dimension of any of these shapes."""
    most = 1
    for shape in shapes:
        if shape is None:
            return None
        most = max([most, *(ranges.symbolic(s)[1] for s in shape)])
    return 0, most - 1


def _dim_index(node: fx.Node, ranges: Ranges, position: int, default: int | None) -> Interval | None:
    count = _reduced_count(ranges, node.args[0], arg(node, position, "dim", default))
    return (0, max(count[1] - 1, 0)) if count else None


@_rule(*overloads("argmax", "argmin"))
def _arg_extremum(node: fx.Node, ranges: Ranges) -> Bounds:
    return _dim_index(node, ranges, 1, None)


@_rule(aten.argsort.default)
def _argsort(node: fx.Node, ranges: Ranges) -> Bounds:
    return _dim_index(node, ranges, 1, -1)


@_rule(aten.argsort.stable)
def _argsort_stable(node: fx.Node, ranges: Ranges) -> Bounds:
    return _dim_index(node, ranges, 9, -1)


@_rule(aten.max.dim, aten.min.dim, aten.cummax.default, aten.cummin.default, aten.sort.default, aten.median.dim, aten.mode.default,
       aten.nanmedian.dim)  # fmt: skip
def _value_and_index(node: fx.Node, ranges: Ranges) -> Bounds:
    return [ranges.read(node.args[0]), _dim_index(node, ranges, 1, -1)]


@_rule(aten.sort.stable)
def _sort_stable(node: fx.Node, ranges: Ranges) -> Bounds:
    dim = node.kwargs.get("dim", node.args[2] if len(node.args) > 2 else -1)
    count = _reduced_count(ranges, node.args[0], dim)
    return [ranges.read(node.args[0]), (0, max(count[1] - 1, 0)) if count else None]


@_rule(aten.topk.default, aten.kthvalue.default)
def _topk(node: fx.Node, ranges: Ranges) -> Bounds:
    return [ranges.read(node.args[0]), _dim_index(node, ranges, 2, -1)]


@_rule(*overloads("nonzero", "nonzero_numpy", "nonzero_static", "argwhere"))
def _nonzero(node: fx.Node, ranges: Ranges) -> Bounds:
    found = _index_into(ranges, [_shape(node.args[0])])
    if node.target is getattr(aten.nonzero_static, "default", None):
        return join(found, operand(node, ranges, node.kwargs.get("fill_value", -1))) if found else None
    return found


@_rule(*overloads("count_nonzero"))
def _count_nonzero(node: fx.Node, ranges: Ranges) -> Bounds:
    count = _reduced_count(ranges, node.args[0], arg(node, 1, "dim"))
    return (0, count[1]) if count else None


@_rule(aten.bucketize.Tensor, aten.bucketize.Scalar)
def _bucketize(node: fx.Node, ranges: Ranges) -> Bounds:
    shape = _shape(node.args[1])
    return (0, count_of(ranges, shape)[1]) if shape is not None else None


@_rule(aten.searchsorted.Tensor, aten.searchsorted.Scalar)
def _searchsorted(node: fx.Node, ranges: Ranges) -> Bounds:
    shape = _shape(node.args[0])
    return (0, ranges.symbolic(shape[-1])[1]) if shape else None


@_rule(aten.bincount.default)
def _bincount(node: fx.Node, ranges: Ranges) -> Bounds:
    shape = _shape(node.args[0])
    if shape is None or arg(node, 1, "weights") is not None:
        return None
    return 0, count_of(ranges, shape)[1]


@_rule(aten.multinomial.default)
def _multinomial(node: fx.Node, ranges: Ranges) -> Bounds:
    shape = _shape(node.args[0])
    return (0, max(ranges.symbolic(shape[-1])[1] - 1, 0)) if shape else None


@_rule(*overloads("max_pool2d_with_indices", "max_pool3d_with_indices", "adaptive_max_pool2d", "adaptive_max_pool3d"))
def _pool_indices(node: fx.Node, ranges: Ranges) -> Bounds:
    shape = _shape(node.args[0])
    if shape is None:
        return None
    spatial = 3 if "3d" in node.target.__name__ else 2  # type: ignore[union-attr]
    return [ranges.read(node.args[0]), (0, max(count_of(ranges, shape[-spatial:])[1] - 1, 0))]


@_rule(aten.mm.default, aten.bmm.default, aten.matmul.default, aten.dot.default, aten.mv.default)
def _matmul(node: fx.Node, ranges: Ranges) -> Bounds:
    a, b = ranges.read(node.args[0]), ranges.read(node.args[1])
    shape = _shape(node.args[0])
    if a is None or b is None or not shape:
        return None
    return _repeated(products(a, b), ranges.symbolic(shape[-1]))


@_rule(aten.outer.default)
def _outer(node: fx.Node, ranges: Ranges) -> Bounds:
    a, b = ranges.read(node.args[0]), ranges.read(node.args[1])
    return products(a, b) if a and b else None


@_rule(aten.einsum.default)
def _einsum(node: fx.Node, ranges: Ranges) -> Bounds:
    """Each element is a sum, over the labels that the result has not, of products of one element of each operand."""
    equation, operands = node.args[0], node.args[1]
    if not isinstance(equation, str) or "." in equation or not isinstance(operands, (list, tuple)):
        return None
    inputs, _, result = equation.replace(" ", "").partition("->")
    labels = inputs.split(",")
    if not _ or len(labels) != len(operands):
        return None
    sizes: dict[str, Any] = {}
    each: Interval = (1, 1)
    for names, value in zip(labels, operands, strict=True):
        shape, bounds = _shape(value), ranges.read(value)
        if shape is None or bounds is None or len(shape) != len(names):
            return None
        sizes.update(zip(names, shape, strict=True))
        each = products(each, bounds)
    return _repeated(each, count_of(ranges, [size for name, size in sizes.items() if name not in result]))


def _repeated(each: Interval, count: Interval) -> Interval:
    """The sum of ``count`` values, each anywhere in ``each``. A sum of some of them lies between 0 and these bounds."""
    return min(each[0] * count[0], each[0] * count[1]), max(each[1] * count[0], each[1] * count[1])


@_rule(aten.diff.default)
def _diff(node: fx.Node, ranges: Ranges) -> Bounds:
    values = [v for v in (node.args[0], arg(node, 3, "prepend"), arg(node, 4, "append")) if v is not None]
    found = _joined(node, ranges, values)
    if not isinstance(found, tuple) or arg(node, 1, "n", 1) != 1:
        return None
    return found[0] - found[1], found[1] - found[0]


@_rule(*overloads("meshgrid"))
def _meshgrid(node: fx.Node, ranges: Ranges) -> Bounds:
    tensors = node.args[0]
    return [ranges.read(t) for t in tensors] if isinstance(tensors, (list, tuple)) else None


@_rule(operator.getitem)
def _getitem(node: fx.Node, ranges: Ranges) -> Bounds:
    source, index = node.args
    return ranges.read_output(source, index) if isinstance(source, fx.Node) and isinstance(index, int) else None
