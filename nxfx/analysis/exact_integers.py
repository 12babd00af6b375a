"""Float values that hold integers only, each exactly: masks, one-hots, small positions. Nothing is lost on them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from nxfx.analysis import dtype_rules
from nxfx.analysis.float_ops import FILLS, SUMS, Family, accumulates, dtype_of, family_of, fill_of, is_complement, op_name, values_of
from nxfx.analysis.intervals import Interval, Ranges, arg, fits, join
from nxfx.analysis.provenance import Role, Source
from nxfx.analysis.range_rules import arange_arguments, products
from nxfx.graph import meta

_DEPTH = 64  # of a chain of float ops between an integer and the value asked about
_ARITHMETIC = frozenset(["add", "sub", "rsub", "mul", "sum", "cumsum", "outer"])
_SIGNS: dict[str, Callable[[int, int], Interval]] = {
    "neg": lambda low, high: (-high, -low),
    "abs": lambda low, high: (max(low, -high, 0), max(-low, high)),
    "relu": lambda low, high: (max(low, 0), max(high, 0)),
    "tril": lambda low, high: (min(low, 0), max(high, 0)),
    "triu": lambda low, high: (min(low, 0), max(high, 0)),
}
_PADS = frozenset(["pad", "constant_pad_nd", "diag", "diag_embed"])
_CONSTANTS: dict[str, Interval] = {
    "zeros": (0, 0), "zeros_like": (0, 0), "new_zeros": (0, 0),
    "ones": (1, 1), "ones_like": (1, 1), "new_ones": (1, 1), "eye": (0, 1),
}  # fmt: skip


class ExactIntegers:
    """Intervals of integer-valued floats, computed on demand.

    Args:
        sources: placeholder or ``get_attr`` node name → origin.
        ranges: gives the integer intervals; called at the first question about an integer.

    Attributes:
        masks: nodes taken for 0/1 masks.
    """

    def __init__(self, sources: Mapping[str, Source], ranges: Callable[[], Ranges]) -> None:
        self.masks: set[fx.Node] = set()
        self._sources = sources
        self._ranges = ranges
        self._known: dict[fx.Node, Interval | None] = {}

    def bounds(self, node: fx.Node) -> tuple[Interval, bool]:
        """Bounds of an integer node, and whether they say more than its dtype or an undeclared input does."""
        dtype = dtype_of(node)
        limits = dtype_rules.integer_bounds(dtype if dtype is not None else torch.int64)
        if dtype is torch.bool:
            return limits, True
        found = self._ranges().of(node) or limits
        return found, found != limits and not self._ranges().assumed(node)

    def culprit(self, node: fx.Node) -> str | None:
        """The user's name of an undeclared input that an integer node's bounds depend on."""
        return self._ranges().culprit_name(node)

    def of(self, value: Any, depth: int = _DEPTH) -> Interval | None:
        """Bounds of ``value`` (a node or a number) when every element is an exact integer, None when unknown."""
        if isinstance(value, (bool, int, float)):
            return (int(value), int(value)) if math.isfinite(value) and value == int(value) else None
        if not isinstance(value, fx.Node) or depth == 0:
            return None
        dtype = dtype_of(value)
        if dtype is None:
            return self._ranges().of(value)  # a SymInt
        if not dtype.is_floating_point:
            return self.bounds(value)[0] if dtype_rules.is_integral(dtype) else None
        if value not in self._known:
            found = self._result(value, depth - 1) if value.op == "call_function" else self._held(value)
            limit = dtype_rules.exact_integer(dtype) if dtype in dtype_rules.TABLE else 0
            self._known[value] = found if found is not None and fits(found, (-limit, limit)) else None
        return self._known[value]

    def made(self, node: fx.Node) -> Interval | None:
        """Bounds of the integers that ``node`` adds or multiplies from exact ones, as long as float32 holds them; None for anything else.

        Of a mask times its fill nothing can be told apart: a factor with two values is no position.
        """
        values = values_of(node, Family.COMPUTE)
        known = [self.of(v) for v in values if isinstance(v, fx.Node)]
        if op_name(node) not in ("add", "sub", "rsub", "mul") or any(k is None or k[1] - k[0] < 2 for k in known):
            return None
        found = self._result(node, _DEPTH)
        limit = dtype_rules.exact_integer(torch.float32)
        return found if found is not None and fits(found, (-limit, limit)) else None

    def _result(self, node: fx.Node, depth: int) -> Interval | None:
        family, name = family_of(node), op_name(node)
        if node in self.masks:
            return 0, 1
        if family is None or family is Family.COMPARE or (family is Family.COMPUTE and name not in _ARITHMETIC and not accumulates(node)):
            return None
        if family is Family.FACTORY:
            return self._constant(node, name)
        values = values_of(node, family)
        if is_complement(node) and self._is_undeclared(values):
            return 0, 1  # nobody takes an arbitrary integer from one
        known = []
        for value in values:
            found = self.of(value, depth)
            if found is None:
                return None
            known.append(found)
        if not known:
            return None
        if name in _PADS:
            known.append((0, 0))
        if name in _SIGNS:
            return _SIGNS[name](*known[0])
        if family in (Family.CAST, Family.MOVE, Family.SELECT):
            return join(known[0], *known[1:])
        if node.target in SUMS:
            return times(known[0], summed(node))
        if accumulates(node):
            added = times(known[1], accumulated(node)) if len(known) == 2 and arg(node, 4, "alpha", 1) == 1 else None
            return None if added is None else (known[0][0] + added[0], known[0][1] + added[1])
        if len(known) != 2 or arg(node, 2, "alpha", 1) != 1:
            return None
        a, b = known if name != "rsub" else known[::-1]
        if name == "add":
            return a[0] + b[0], a[1] + b[1]
        return (a[0] - b[1], a[1] - b[0]) if name in ("sub", "rsub") else products(a, b)

    def _is_undeclared(self, values: tuple[Any, ...]) -> bool:
        integers = [v for v in values if isinstance(v, fx.Node) and dtype_rules.is_integral(dtype_of(v))]
        return bool(integers) and not self.bounds(integers[0])[1]

    def _constant(self, node: fx.Node, name: str) -> Interval | None:
        if node.target in FILLS:
            return self.of(fill_of(node))
        if name != "arange":
            return _CONSTANTS.get(name)
        start, end, step = arange_arguments(node)
        first, last = self.of(start), self.of(end)
        if not isinstance(step, (int, float)) or step != int(step) or first is None or last is None:
            return None
        if first[0] == first[1] and last[0] == last[1] and step:  # the end itself is not among them
            last = (at := first[0] + max(math.ceil((last[0] - first[0]) / step) - 1, 0) * int(step), at)
        return join(first, last)

    def _held(self, node: fx.Node) -> Interval | None:
        source = self._sources.get(node.name)
        held = source.value if source is not None and source.role is Role.CONSTANT and source.is_known else None
        if held is None or isinstance(held, meta.FakeTensor) or held.is_meta or not 0 < held.numel() <= 64:
            return None
        numbers = held.double()
        if not bool((numbers.isfinite() & (numbers == numbers.floor())).all()):
            return None
        return int(numbers.min()), int(numbers.max())


def summed(node: fx.Node) -> int | None:
    """How many elements one element of a sum or prefix sum adds at most, None when that is dynamic."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    shape = meta.val(source).shape
    dims = arg(node, 1, "dim")
    dims = range(len(shape)) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    sizes = [shape[d] for d in dims] if len(shape) else []
    return math.prod(sizes) if all(type(s) is int for s in sizes) else None


def accumulated(node: fx.Node) -> int | None:
    """How many elements are added to one place at most by an op that accumulates, None when that is dynamic."""
    if isinstance(node.args[1], int):  # a dimension
        index: Any = meta.val(node.args[2])  # type: ignore[arg-type]
        counts = [index.shape[node.args[1]] if index.dim() else 1]
    else:
        counts = [meta.val(i).numel() for i in node.args[1] if isinstance(i, fx.Node)]  # type: ignore[union-attr]
    return max(counts, default=None) if all(type(c) is int for c in counts) else None


def times(bounds: Interval, count: int | None) -> Interval | None:
    """Bounds of a sum of at most ``count`` elements within ``bounds``."""
    return None if count is None else (min(0, bounds[0] * count), max(0, bounds[1] * count))
