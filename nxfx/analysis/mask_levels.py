"""The few numbers that an additive mask is made of, followed to the softmax they reach.

A mask holds one of a handful of constants at each place: 0 where a position is kept, minus infinity or a huge negative number where it is
not. Masks are added to one another, rounded by casts and added to scores. Each element of such a value is one :class:`Level`. Everything
else counts as a score: an ordinary number of unknown size, to which a level is an offset.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import fx

from nxfx.analysis import dtype_rules
from nxfx.analysis.float_ops import is_complement
from nxfx.analysis.intervals import arg
from nxfx.analysis.provenance import Role, Source
from nxfx.analysis.range_rules import PRESERVING_VIEWS, overloads
from nxfx.analysis.uniform import UniformValues
from nxfx.graph import meta

aten = torch.ops.aten

_LARGEST_SET = 12  # of levels; more is no mask
_SCAN_LIMIT = 1 << 22
_SMALL = -1000.0  # a buffer with nothing below is no mask that could overflow


class Level(NamedTuple):
    """What an element can be.

    Attributes:
        eager: the number in the model.
        now: the number when fills below the floor are raised to it.
        scored: a score is added to it.
    """

    eager: float
    now: float
    scored: bool = False


Levels: TypeAlias = frozenset[Level]
SCORE: Levels = frozenset([Level(0.0, 0.0, True)])
_BOOL: Levels = frozenset([Level(0.0, 0.0), Level(1.0, 1.0)])
_Combine: TypeAlias = Callable[[fx.Node, list[Levels]], Iterable[Level] | None]


@dataclass(frozen=True)
class Rule:
    """How an op makes levels.

    Attributes:
        positions: of the arguments whose values its result is made of.
        combine: their levels → its levels before rounding; None for a score.
    """

    positions: tuple[int, ...]
    combine: _Combine


class MaskLevels:
    """Levels of the values of one graph.

    Args:
        sources: placeholder or ``get_attr`` node name → origin.
        floor: what fills below it are raised to; ``-inf``: the model as it is.
        uniform: values that are one constant everywhere.
    """

    def __init__(self, sources: Mapping[str, Source], floor: float = -math.inf, uniform: UniformValues | None = None) -> None:
        self.floor = floor
        self.uniform = uniform or UniformValues(sources)
        self._sources = sources
        self._known: dict[fx.Node, Levels] = {}

    def of(self, value: Any) -> Levels:
        """The levels of a node or a number."""
        if not isinstance(value, fx.Node):
            return self._number(value)
        stack = [value]
        while stack:
            node = stack[-1]
            missing = [n for n in operands(node) if n not in self._known] if node not in self._known else []
            if missing:
                stack += missing
                continue
            stack.pop()
            if node not in self._known:
                self._known[node] = self._compute(node)
        return self._known[value]

    def reached(self, root: fx.Node) -> Iterator[fx.Node]:
        """``root`` and the nodes that its levels come from."""
        stack, seen = [root], {root}
        while stack:
            node = stack.pop()
            yield node
            if self.of(node) != SCORE and not self.is_fill(node):
                fresh = [n for n in operands(node) if n not in seen]
                seen.update(fresh)
                stack += fresh

    def is_fill(self, node: fx.Node) -> bool:
        """Whether ``node`` is one constant everywhere and not made of others, or a table of constants."""
        return node.op != "call_function" or (not operands(node) and self.uniform.value(node) is not None)

    def hazard(self, root: fx.Node, *, scored: bool = False) -> fx.Node | None:
        """A node on the way to ``root`` that can be minus infinity; ``scored``: scores are still to be added to ``root``."""
        for node in self.reached(root):
            dtype = meta.dtype_of(node)
            if dtype is not None and any(_overflows(level, dtype, scored and node is root) for level in self.of(node)):
                return node
        return None

    def _compute(self, node: fx.Node) -> Levels:
        dtype = meta.dtype_of(node)
        if dtype is torch.bool:
            return _BOOL
        if dtype is None or not dtype.is_floating_point:
            return SCORE
        constant = self.uniform.value(node)
        if constant is not None:
            return self._number(constant.item())
        if node.op != "call_function":
            return self._table(node)
        if is_complement(node) and _is_made_of_integers(node):
            return _BOOL  # nobody takes an arbitrary integer from one
        rule = RULES.get(node.target)
        found = rule.combine(node, [self.of(v) for v in values(node)]) if rule is not None else None
        if found is None:
            return SCORE
        if node.target in CLAMPED:  # (mask - 1) * max has no fill that could be raised: the product is
            raised = {x if x.scored or rounded(x.now, dtype) == -math.inf else x._replace(now=max(x.now, self.floor)) for x in found}
            return self._rounded(raised, dtype)
        return self._rounded(found, dtype)

    def _rounded(self, found: Iterable[Level], dtype: torch.dtype) -> Levels:
        levels = frozenset(Level(rounded(e, dtype), rounded(n, dtype), s) for e, n, s in found)
        if any(math.isnan(x) or x == math.inf for level in levels for x in level[:2]):
            return SCORE
        return levels if len(levels) <= _LARGEST_SET else frozenset(_extremes(levels))

    def _number(self, value: Any) -> Levels:
        if not isinstance(value, (bool, int, float)) or math.isnan(value) or value == math.inf:
            return SCORE
        return frozenset([Level(float(value), max(float(value), self.floor))])

    def _table(self, node: fx.Node) -> Levels:
        source = self._sources.get(node.name)
        held = source.value if source is not None and source.is_known else None
        if held is None or source is None or source.role not in (Role.BUFFER, Role.CONSTANT):
            return SCORE
        if isinstance(held, meta.FakeTensor) or held.is_meta or not 0 < held.numel() <= _SCAN_LIMIT or float(held.min()) > _SMALL:
            return SCORE
        distinct = torch.unique(held.detach().double())
        if distinct.numel() > _LARGEST_SET or not bool((distinct < math.inf).all()):
            return SCORE
        return frozenset(Level(v, max(v, self.floor)) for v in distinct.tolist())


def operands(node: fx.Node) -> list[fx.Node]:
    """The nodes whose levels those of ``node`` are made of."""
    return [v for v in values(node) if isinstance(v, fx.Node)]


def values(node: fx.Node) -> list[Any]:
    """The nodes and numbers whose levels those of ``node`` are made of, in the order of :class:`Rule`'s positions."""
    rule = RULES.get(node.target) if node.op == "call_function" else None
    found: list[Any] = []
    for position in rule.positions if rule is not None else ():
        argument = node.args[position] if position < len(node.args) else node.kwargs.get(_NAMES.get((node.target, position), ""))
        found += argument if isinstance(argument, (list, tuple)) else [argument]
    return [v for v in found if v is not None]


def _extremes(levels: Levels) -> Iterator[Level]:
    """What decides whether sums overflow, and what parts those that were minus infinity from the others."""
    for key in itertools.product((True, False), (True, False)):
        alike = [level for level in levels if (level.scored, level.eager == -math.inf) == key]
        if alike:
            yield min(alike, key=lambda level: level.now)
            yield max(alike, key=lambda level: level.now)


def _overflows(level: Level, dtype: torch.dtype, scored: bool) -> bool:
    """Whether adding scores may still take it to minus infinity: fp16's largest numbers are no larger than scores can be."""
    return level.now == -math.inf or ((scored or level.scored) and dtype is torch.float16 and level.now < torch.finfo(dtype).min / 2)


@functools.lru_cache(maxsize=4096)
def rounded(number: float, dtype: torch.dtype) -> float:
    """``number`` as the float ``dtype`` holds it."""
    return float(torch.tensor(number, dtype=torch.float64).to(dtype))


def _is_made_of_integers(complement: fx.Node) -> bool:
    node = next(iter(complement.all_input_nodes))
    while RULES.get(node.target) is _SAME and node.op == "call_function":
        node = node.args[0]  # type: ignore[assignment]
    return dtype_rules.is_integral(meta.dtype_of(node))


# --- the rules -------------------------------------------------------------------------------------------------------


def _union(node: fx.Node, parts: list[Levels]) -> Iterable[Level] | None:
    if node.target in _INDEX_PUTS and arg(node, 3, "accumulate", False):
        return None
    return frozenset().union(*parts)


def _or_zero(node: fx.Node, parts: list[Levels]) -> Iterable[Level] | None:
    return parts[0] | {Level(0.0, 0.0)}


def _padded(node: fx.Node, parts: list[Levels]) -> Iterable[Level] | None:
    constant = node.target is not aten.pad.default or arg(node, 2, "mode", "constant") == "constant"
    return _union(node, parts) if len(parts) > 1 or not constant else _or_zero(node, parts)


def _sum(node: fx.Node, parts: list[Levels]) -> Iterable[Level] | None:
    if len(parts) != 2 or arg(node, 2, "alpha", 1) != 1:
        return None
    return {Level(a.eager + b.eager, a.now + b.now, a.scored or b.scored) for a, b in itertools.product(*parts)}


def _difference(node: fx.Node, parts: list[Levels]) -> Iterable[Level] | None:
    a, b = parts if "rsub" not in str(node.target) else parts[::-1]
    if arg(node, 2, "alpha", 1) != 1:
        return None
    if any(level.scored and level[:2] != (0, 0) for level in b):
        return None
    return {Level(x.eager - y.eager, x.now - y.now, x.scored or y.scored) for x, y in itertools.product(a, b)}


def _product(node: fx.Node, parts: list[Levels]) -> Iterable[Level] | None:
    a, b = parts
    if any(level.scored for level in a | b):
        scored, factor = (a, b) if any(level.scored for level in a) else (b, a)
        (scale,) = factor if len(factor) == 1 else (None,)
        if scale is None or scale.scored or not scale.eager > 0:
            return None
        return {Level(x.eager * scale.eager, x.now * scale.eager, x.scored) for x in scored}
    return {Level(x.eager * y.eager, x.now * y.now) for x, y in itertools.product(a, b)}


def _quotient(node: fx.Node, parts: list[Levels]) -> Iterable[Level] | None:
    (divisor,) = parts[1] if len(parts[1]) == 1 else (None,)
    if divisor is None or divisor.scored or not divisor.eager > 0:
        return None
    return {Level(x.eager / divisor.eager, x.now / divisor.eager, x.scored) for x in parts[0]}


def _negative(node: fx.Node, parts: list[Levels]) -> Iterable[Level] | None:
    return None if any(level.scored for level in parts[0]) else {Level(-x.eager, -x.now) for x in parts[0]}


_SAME = Rule((0,), _union)
_INDEX_PUTS = frozenset(overloads("index_put"))
_PICKS = overloads(
    "expand", "slice", "select", "narrow", "diagonal", "repeat", "index_select", "gather", "index", "tile", "_to_copy", "type_as"
)  # fmt: skip
_PRODUCTS = (aten.mul.Tensor, aten.mul.Scalar)
CLAMPED = frozenset([*_PRODUCTS, aten.neg.default])
"""The ops that make something below the floor of what is not."""
RULES: dict[Any, Rule] = {
    **dict.fromkeys([*PRESERVING_VIEWS, *_PICKS], _SAME),
    **dict.fromkeys(overloads("where"), Rule((1, 2), _union)),
    **dict.fromkeys([*overloads("masked_fill"), *_INDEX_PUTS], Rule((0, 2), _union)),
    **dict.fromkeys(overloads("slice_scatter", "select_scatter", "diagonal_scatter"), Rule((0, 1), _union)),
    **dict.fromkeys(overloads("copy", "fill"), Rule((1,), _union)),
    **dict.fromkeys(overloads("cat", "stack"), Rule((0,), _union)),
    **dict.fromkeys(overloads("tril", "triu"), Rule((0,), _or_zero)),
    aten.constant_pad_nd.default: Rule((0, 2), _padded),
    aten.pad.default: Rule((0, 3), _padded),
    **dict.fromkeys([aten.add.Tensor, aten.add.Scalar], Rule((0, 1), _sum)),
    **dict.fromkeys([aten.sub.Tensor, aten.sub.Scalar, *overloads("rsub")], Rule((0, 1), _difference)),
    **dict.fromkeys(_PRODUCTS, Rule((0, 1), _product)),
    **dict.fromkeys([aten.div.Tensor, aten.div.Scalar], Rule((0, 1), _quotient)),
    aten.neg.default: Rule((0,), _negative),
}
_NAMES: dict[tuple[Any, int], str] = {(aten.constant_pad_nd.default, 2): "value", (aten.pad.default, 3): "value"}
