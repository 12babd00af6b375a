"""Which float values are made of integers and constants alone, and where low precision has rounded them.

A *member* is a float value computed by a listed op from integers, Python numbers, tables (parameters, buffers and constants that
nobody writes) and other members. Everything else is an *activation*. Two sweeps: membership over the graph, rounding over the
members only, which are a few dozen in a real model.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import fx

from nxfx.analysis import dtype_rules
from nxfx.analysis.intervals import Interval, Ranges, arg, fits, join
from nxfx.analysis.provenance import Role, Source
from nxfx.analysis.range_rules import PRESERVING_VIEWS, SELECTIONS, arange_arguments, overloads, products
from nxfx.graph import meta, outer_products

aten = torch.ops.aten


class Family(Enum):
    """How an op treats the values it reads."""

    CAST = "converts one value"
    MOVE = "rearranges one value"
    SELECT = "picks among values, or flips their sign: rounding before or after it is the same"
    COMPUTE = "arithmetic"
    OUTER = "a matrix product that sums over one element"
    FACTORY = "makes a constant"
    COMPARE = "a truth value"


# Ops that turn a small error of their operand into a large one. Each is followed by what the literature calls it:
# angles (rotary, sinusoidal), exponents (frequencies, decays), prefix sums, and steps (buckets, indices).
PERIODIC = frozenset(overloads("sin", "cos", "tan", "sinc"))
SENSITIVE = PERIODIC | frozenset(
    overloads("exp", "exp2", "expm1", "cumsum", "cumprod", "remainder", "fmod", "frac", "floor", "ceil", "round", "trunc", "floor_divide")
    + [aten.pow.Scalar, aten.pow.Tensor_Tensor, aten.div.Tensor_mode, aten.div.Scalar_mode]
)  # fmt: skip

_MULTIPLE = frozenset(overloads("sort", "cummax", "cummin"))
_LOOKUPS = frozenset(overloads("embedding", "index", "_unsafe_index", "index_select", "gather", "take", "take_along_dim"))
_LIKE = frozenset(overloads("full_like", "zeros_like", "ones_like", "new_zeros", "new_ones", "new_full"))
_FILL = {aten.full.default: 1, aten.full_like.default: 1, aten.new_full.default: 2, aten.scalar_tensor.default: 0}
# Positions of the arguments whose values a SELECT op picks from; all of them when it is not listed.
_PICKED: dict[Any, tuple[int, ...]] = {
    **dict.fromkeys(overloads("where"), (1, 2)),
    **dict.fromkeys(overloads("masked_fill", "index_put", "constant_pad_nd"), (0, 2)),
    **dict.fromkeys(overloads("slice_scatter", "select_scatter", "diagonal_scatter", "fill"), (0, 1)),
    **dict.fromkeys(overloads("cat", "stack", "neg", "abs", "relu", "tril", "triu"), (0,)),
    **dict.fromkeys([aten.scatter.src, aten.scatter.value], (0, 3)),
}


def _families() -> dict[Any, Family]:
    table: dict[Any, Family] = {}
    for family, targets in (
        (Family.CAST, [aten._to_copy.default, aten.copy.default, aten.type_as.default, torch.ops.prims.convert_element_type.default]),
        (Family.MOVE, [*PRESERVING_VIEWS, *SELECTIONS, *overloads("repeat_interleave"), operator.getitem]),
        (Family.SELECT, [*_PICKED, *overloads("minimum", "maximum", "clamp", "clamp_min", "clamp_max"), aten.max.other, aten.min.other]),
        (Family.COMPUTE, overloads(
            "add", "sub", "rsub", "mul", "div", "true_divide", "floor_divide", "pow", "sqrt", "rsqrt", "square", "reciprocal", "exp",
            "exp2", "expm1", "log", "log2", "log10", "log1p", "sin", "cos", "tan", "sinc", "asin", "acos", "atan", "atan2", "sinh",
            "cosh", "tanh", "sigmoid", "erf", "floor", "ceil", "trunc", "round", "frac", "sign", "fmod", "remainder", "hypot", "lerp",
            "addcmul", "addcdiv", "deg2rad", "rad2deg", "sum", "mean", "prod", "cumsum", "cumprod", "outer", "ger")),
        (Family.OUTER, list(outer_products.PRODUCTS)),
        (Family.FACTORY, [aten.arange.default, aten.arange.start, aten.arange.start_step, *_FILL, *_LIKE,
                          *overloads("zeros", "ones", "eye", "linspace", "logspace")]),
        (Family.COMPARE, overloads("eq", "ne", "lt", "le", "gt", "ge")),
    ):  # fmt: skip
        table.update(dict.fromkeys(targets, family))
    for target in _MULTIPLE:
        table.pop(target, None)
    return table


FAMILIES = _families()
METADATA = frozenset(
    [aten._assert_tensor_metadata.default, *overloads("sym_size", "sym_stride", "sym_numel", "sym_storage_offset")]
)  # fmt: skip


@dataclass(slots=True)
class Member:
    """What is known of a member (or of a table that one is made of).

    Attributes:
        family: the op's family; None for a table.
        values: the operands whose values it is made of: nodes and Python numbers.
        integer: an integer, a sequence or a size is among its ancestors.
        learned: it is a parameter, or one looked up: indexing it gives an activation (an embedding), not a table.
        tables: buffers and constants among its ancestors.
        low: the low-precision dtype that holds the model's value exactly; None for a value of higher precision.
        rounded: low precision has rounded it, here or in an ancestor.
    """

    family: Family | None
    values: tuple[Any, ...] = ()
    integer: bool = False
    learned: bool = False
    tables: tuple[fx.Node, ...] = ()
    low: torch.dtype | None = None
    rounded: bool = False


@dataclass(slots=True)
class Entry:
    """Where integers beyond a low-precision dtype's exact range enter it.

    Attributes:
        integer: the integer operand, None for a sequence or constant made in low precision.
        bounds: what the integers can be.
        proved: the bounds are known, not merely all that the dtype or an undeclared input allows.
        mask: undeclared, and used only as ``1 - x`` or compared with a small number: taken for a 0/1 mask.
    """

    integer: fx.Node | None
    bounds: Interval
    proved: bool
    mask: bool = False


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


@functools.lru_cache(maxsize=1024)
def representable(number: float, dtype: torch.dtype) -> bool:
    """Whether ``dtype`` holds ``number`` exactly."""
    return number != number or float(torch.tensor(number, dtype=torch.float64).to(dtype)) == number


_RSUB = frozenset(overloads("rsub"))


def is_complement(node: fx.Node) -> bool:
    """``1 - x``."""
    if node.target not in _RSUB and node.target is not aten.sub.Tensor:
        return False
    one, other = (node.args[1], node.args[0]) if node.target in _RSUB else (node.args[0], node.args[1])
    return isinstance(one, (int, float)) and one == 1 and isinstance(other, fx.Node) and arg(node, 2, "alpha", 1) == 1


class IntegerOrigins:
    """Members of a graph, in topological order.

    Args:
        gm: a functional ATen graph with ``val`` on every node.
        sources: placeholder or ``get_attr`` node name → origin.
        ranges: gives the integer intervals; called only when an integer meets low precision.

    Attributes:
        members: node → :class:`Member`.
        entries: node → :class:`Entry`: the casts, promotions and factories that round integers.
        sinks: comparisons and integer casts of members, which read float32 as well as low precision.
        sensitive: members and sinks that magnify the rounding of an integer-derived operand.
        met: ``(node, integer operand)`` where integers are promoted to an activation's low precision.
    """

    def __init__(self, gm: fx.GraphModule, sources: Mapping[str, Source], ranges: Callable[[], Ranges]) -> None:
        self.sources = sources
        self.members: dict[fx.Node, Member] = {}
        self.entries: dict[fx.Node, Entry] = {}
        self.sinks: dict[fx.Node, None] = {}
        self.sensitive: list[fx.Node] = []
        self.met: list[tuple[fx.Node, fx.Node]] = []
        self._ranges = functools.cache(ranges)
        self._tables: dict[fx.Node, Member | None] = {}
        self._exact: dict[fx.Node, Interval | None] = {}
        for node in gm.graph.nodes:
            if node.op == "call_function":
                family = FAMILIES.get(node.target)
                if family is not None:
                    self._admit(node, family)
        for node, member in self.members.items():
            self._follow_rounding(node, member)
        for node in self.sinks:
            self._watch(node, values_of(node, FAMILIES[node.target]))

    def of(self, value: Any) -> Member | None:
        """The member or table that ``value`` is; None for an activation, an integer or a number."""
        if not isinstance(value, fx.Node):
            return None
        found = self.members.get(value)
        return found if found is not None or value.op == "call_function" else self._table(value)

    # --- membership --------------------------------------------------------------------------------------------------

    def _table(self, node: fx.Node) -> Member | None:
        if node not in self._tables:
            source, dtype = self.sources.get(node.name), dtype_of(node)
            known = source is not None and source.role in (Role.PARAMETER, Role.BUFFER, Role.CONSTANT) and not source.mutated
            learned = known and source is not None and source.role is Role.PARAMETER
            low = dtype if dtype_rules.is_low_precision(dtype) else None
            member = Member(None, learned=learned, tables=() if learned else (node,), low=low)
            self._tables[node] = member if known and dtype is not None and dtype.is_floating_point else None
        return self._tables[node]

    def _admit(self, node: fx.Node, family: Family) -> None:
        dtype = dtype_of(node)
        if dtype is None or dtype.is_complex or (family is Family.OUTER and outer_products.operands(node) is None):
            return
        values = values_of(node, family)
        made_of: list[Member] = []
        integers = False
        for value in values:
            if not isinstance(value, fx.Node):
                continue
            kind = dtype_of(value)
            if kind is None or not kind.is_floating_point:
                integers = integers or kind is not None or isinstance(value.meta.get("val"), torch.SymInt)
                continue
            member = self.of(value)
            if member is None or (member.learned and not member.integer and node.target in _LOOKUPS):
                self._meet(node, family, dtype, values)
                return
            made_of.append(member)
        if not dtype.is_floating_point:
            if made_of and family in (Family.COMPARE, Family.CAST):
                self.sinks[node] = None
            return
        integers = integers or node.target in _SEQUENCES or _is_integer_fill(node, dtype)
        tables = dict.fromkeys(t for m in made_of for t in m.tables)
        self.members[node] = Member(
            family, values, integers or any(m.integer for m in made_of), any(m.learned for m in made_of), tuple(tables)[:4]
        )

    def _meet(self, node: fx.Node, family: Family, dtype: torch.dtype, values: tuple[Any, ...]) -> None:
        if family in (Family.COMPUTE, Family.SELECT, Family.COMPARE):
            for value in values:
                kind = dtype_of(value) if isinstance(value, fx.Node) else None
                if dtype_rules.is_integral(kind) and kind is not torch.bool:
                    self.met.append((node, value))

    # --- rounding ----------------------------------------------------------------------------------------------------

    def _follow_rounding(self, node: fx.Node, member: Member) -> None:
        dtype = dtype_of(node)
        assert dtype is not None
        made_of = [m for m in map(self.of, member.values) if m is not None]
        member.rounded = any(m.rounded for m in made_of)
        if member.family in (Family.CAST, Family.MOVE) and made_of:
            member.low = made_of[0].low
        same = member.low
        if dtype_rules.is_low_precision(dtype):
            member.low = dtype
            entry = self._entry(node, member, dtype)
            if entry is not None:
                self.entries[node] = entry
                entry.mask = not entry.proved and member.family in (Family.CAST, Family.SELECT) and self._is_mask(node)
            member.rounded |= self._rounds(node, member, dtype, same, entry)
        self._watch(node, member.values)

    def _entry(self, node: fx.Node, member: Member, dtype: torch.dtype) -> Entry | None:
        limit = dtype_rules.exact_integer(dtype)
        if member.family is Family.FACTORY:
            return Entry(None, (-limit - 1, limit + 1), True) if member.integer and self.exact(node) is None else None
        if member.family is Family.MOVE:
            return None
        for value in member.values:
            if not isinstance(value, fx.Node):
                continue
            is_integer = dtype_rules.is_integral(dtype_of(value))
            if node.target in _SUMS:  # the sum is rounded, not only what it adds
                bounds, proved = self.bounds(value) if is_integer else (self.exact(value), True)
                if bounds is None:
                    continue
                bounds = _times(bounds, _summed(node)) or dtype_rules.integer_bounds(torch.int64)
            elif is_integer:
                bounds, proved = self.bounds(value)
            else:
                continue
            if not fits(bounds, (-limit, limit)):
                return Entry(value if is_integer else None, bounds, proved)
        return None

    def _rounds(self, node: fx.Node, member: Member, dtype: torch.dtype, same: torch.dtype | None, entry: Entry | None) -> bool:
        if entry is not None:
            return not entry.mask
        if member.family is Family.MOVE or (member.family is Family.CAST and same == dtype):
            return False
        if member.family is Family.SELECT:
            numbers = [v for v in member.values if isinstance(v, (int, float))]
            return not all(representable(float(v), dtype) for v in numbers)
        if node.target in _FILL and isinstance(fill := arg(node, _FILL[node.target], "fill_value"), (int, float)):
            return not representable(float(fill), dtype)
        return self.exact(node) is None

    def _watch(self, node: fx.Node, values: tuple[Any, ...]) -> None:
        """Note ``node`` when it magnifies the rounding of an integer-derived operand."""
        steps = node in self.sinks and dtype_of(node) is not torch.bool or FAMILIES.get(node.target) is Family.COMPARE
        if steps or node.target in SENSITIVE:
            made_of = [m for m in map(self.of, values) if m is not None]
            if any(m.rounded for m in made_of) and any(m.integer for m in made_of):
                self.sensitive.append(node)

    def _is_mask(self, entry: fx.Node) -> bool:
        """Whether ``entry`` is used as a number only in ``1 - x`` and comparisons that integers beyond 256 cannot change."""
        pending, seen, found = [entry], {entry}, False
        while pending:
            for user in pending.pop().users:
                member = self.members.get(user)
                if is_complement(user) or _compares_with_small(user):
                    found = True
                elif member is None:
                    if user in self.sinks and dtype_of(user) is not torch.bool:
                        return False
                elif member.family in (Family.CAST, Family.MOVE, Family.SELECT):
                    if user not in seen:
                        seen.add(user)
                        pending.append(user)
                elif member.family is not Family.FACTORY:
                    return False
        return found

    # --- exact integers ----------------------------------------------------------------------------------------------

    def bounds(self, node: fx.Node) -> tuple[Interval, bool]:
        """Bounds of an integer node, and whether they are more than what its dtype or an undeclared input allows."""
        dtype = dtype_of(node)
        limits = dtype_rules.integer_bounds(dtype if dtype is not None else torch.int64)
        if dtype is torch.bool:
            return limits, True
        found = self._ranges().of(node) or limits
        return found, found != limits and not self._ranges().assumed(node)

    def exact(self, value: Any, depth: int = 64) -> Interval | None:
        """Bounds of a value that is known to hold integers only, each exactly; None when that is not known."""
        if isinstance(value, (bool, int, float)):
            return (int(value), int(value)) if math.isfinite(value) and value == int(value) else None
        if not isinstance(value, fx.Node) or depth == 0:
            return None
        dtype = dtype_of(value)
        if dtype is None:
            return self._ranges().of(value)
        if not dtype.is_floating_point:
            return self.bounds(value)[0] if dtype_rules.is_integral(dtype) else None
        if value not in self._exact:
            found = self._integer_result(value, depth - 1) if value in self.members else self._integer_table(value)
            limit = dtype_rules.exact_integer(dtype) if dtype in dtype_rules.TABLE else 0
            self._exact[value] = found if found is not None and fits(found, (-limit, limit)) else None
        return self._exact[value]

    def _integer_result(self, node: fx.Node, depth: int) -> Interval | None:
        member = self.members[node]
        if node in self.entries and self.entries[node].mask:
            return 0, 1
        if member.family is Family.FACTORY:
            return self._integer_constant(node)
        if is_complement(node):
            (operand,) = (v for v in member.values if isinstance(v, fx.Node))
            if dtype_rules.is_integral(dtype_of(operand)) and not self.bounds(operand)[1]:
                return 0, 1  # undeclared integers in `1 - x`: a mask
        name = node.target.__name__.split(".")[0]
        if member.family is Family.COMPUTE and name not in _INTEGER_ARITHMETIC:
            return None
        found = [self.exact(v, depth) for v in member.values]
        known = [f for f in found if f is not None]
        if len(known) != len(found) or not known:
            return None
        low, high = join(known[0], *known[1:])
        if name in _SIGNS:
            return _SIGNS[name](low, high)
        if member.family in (Family.CAST, Family.MOVE, Family.SELECT):
            return low, high
        if node.target in _SUMS:
            return _times(known[0], _summed(node))
        if name in ("add", "sub", "rsub") and len(known) == 2 and arg(node, 2, "alpha", 1) == 1:
            a, b = known if name != "rsub" else known[::-1]
            return (a[0] + b[0], a[1] + b[1]) if name == "add" else (a[0] - b[1], a[1] - b[0])
        if (name in ("mul", "outer") or member.family is Family.OUTER) and len(known) == 2:
            return products(known[0], known[1])
        return None

    def _integer_table(self, node: fx.Node) -> Interval | None:
        source = self.sources.get(node.name) if node.op != "call_function" else None
        held = source.value if source is not None and source.role is Role.CONSTANT and source.is_known else None
        if held is None or isinstance(held, meta.FakeTensor) or held.is_meta or not 0 < held.numel() <= 64:
            return None
        numbers = [self.exact(float(v)) for v in held.flatten()]
        known = [n for n in numbers if n is not None]
        return join(known[0], *known[1:]) if len(known) == len(numbers) else None

    def _integer_constant(self, node: fx.Node) -> Interval | None:
        name = node.target.__name__.split(".")[0]
        if name == "arange":
            start, end, step = arange_arguments(node)
            ends = [self.exact(v) for v in (start, end)]
            known = [e for e in ends if e is not None]
            return join(*known) if len(known) == 2 and isinstance(step, (int, float)) and step == int(step) else None
        if node.target in _FILL:
            return self.exact(arg(node, _FILL[node.target], "fill_value"))
        return {"zeros": (0, 0), "new_zeros": (0, 0), "zeros_like": (0, 0), "eye": (0, 1)}.get(
            name, (1, 1) if name in ("ones", "ones_like", "new_ones") else None
        )


_INTEGER_ARITHMETIC = frozenset(["add", "sub", "rsub", "mul", "sum", "cumsum", "outer"])
_SIGNS: dict[str, Callable[[int, int], Interval]] = {
    "neg": lambda low, high: (-high, -low),
    "abs": lambda low, high: (max(low, -high, 0), max(-low, high)),
    "relu": lambda low, high: (max(low, 0), max(high, 0)),
    "tril": lambda low, high: (min(low, 0), max(high, 0)),
    "triu": lambda low, high: (min(low, 0), max(high, 0)),
}
_SEQUENCES = frozenset(overloads("arange", "linspace", "logspace"))
_SUMS = frozenset(overloads("sum", "cumsum"))


def _is_integer_fill(node: fx.Node, dtype: torch.dtype) -> bool:
    """A constant integer that ``dtype`` rounds; limits such as ``finfo.min`` are integers only by accident."""
    fill = arg(node, _FILL[node.target], "fill_value") if node.target in _FILL else None
    return isinstance(fill, (int, float)) and abs(fill) < 2**31 and fill == int(fill) and not representable(float(fill), dtype)


def _summed(node: fx.Node) -> int | None:
    """How many elements one element of a sum adds, None when it is dynamic."""
    shape = meta.val(node.args[0]).shape
    dims = arg(node, 1, "dim")
    dims = range(len(shape)) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    sizes = [shape[d] for d in dims] if len(shape) else []
    return math.prod(sizes) if all(type(s) is int for s in sizes) else None


def _times(bounds: Interval, count: int | None) -> Interval | None:
    return None if count is None else (min(0, bounds[0] * count), max(0, bounds[1] * count))


def _compares_with_small(node: fx.Node) -> bool:
    other = node.args[1] if len(node.args) > 1 else None
    return FAMILIES.get(node.target) is Family.COMPARE and isinstance(other, (int, float)) and abs(other) <= 8


def _flat(arguments: Any) -> Iterator[Any]:
    for argument in arguments:
        if isinstance(argument, (list, tuple)):
            yield from _flat(argument)
        elif argument is not None:
            yield argument


def values_of(node: fx.Node, family: Family) -> tuple[Any, ...]:
    """The operands whose values ``node`` is made of; masks, indices, sizes and dims are none."""
    args = node.args
    if family is Family.FACTORY:
        fill = arg(node, _FILL[node.target], "fill_value") if node.target in _FILL else None
        return (fill,) if isinstance(fill, fx.Node) else ()
    if family is Family.MOVE:
        return args[:1]
    if family is Family.CAST:
        return args[1:2] if node.target is aten.copy.default else args[:1]
    if family is Family.SELECT and node.target in _PICKED:
        return tuple(_flat(args[p] for p in _PICKED[node.target] if p < len(args)))
    if family is Family.OUTER:
        return outer_products.operands(node) or ()
    if node.target in _REDUCTIONS:
        return args[:1]
    return tuple(_flat((*args, *(v for k, v in node.kwargs.items() if k in ("min", "max", "other", "value", "weight")))))


_REDUCTIONS = frozenset(overloads("sum", "mean", "prod", "cumsum", "cumprod", "round"))
