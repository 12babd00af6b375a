"""The few numbers that an additive mask is made of, followed to the softmax they reach.

A mask holds one of a handful of constants at each place: 0 where a position is kept, minus infinity or a huge negative number where it is
not. Masks are added to one another, rounded by casts and added to scores. Each element of such a value is one :class:`Level`. Everything
else counts as a score: an ordinary number of unknown size, to which a level is an offset. A minus infinity that meets an op without a rule
is followed too, as one that stays: it is never taken for a score.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import fx

from nxfx.analysis import dtype_rules
from nxfx.analysis.float_ops import FAMILIES, Family, dtype_of, is_complement
from nxfx.analysis.mask_rules import BOOL, CLAMPED, LOST, RULES, SCORE, Level, Levels, carriers, moved_from, operands, values
from nxfx.analysis.mask_tables import MaskTables, Table
from nxfx.analysis.provenance import Source
from nxfx.analysis.uniform import UniformValues
from nxfx.graph import meta, walk

_LARGEST_SET = 12  # of levels; more is no mask


class MaskLevels:
    """Levels of the values of one graph, as the model has it.

    Args:
        sources: placeholder or ``get_attr`` node name → origin.
    """

    floor = -math.inf

    def __init__(self, sources: Mapping[str, Source]) -> None:
        self.uniform = UniformValues(sources)
        self.tables = MaskTables(sources)
        self._known: dict[fx.Node, Levels] = {}
        self._followed: set[fx.Node] = set()

    def raised(self, floor: float) -> MaskLevels:
        """The levels when infinite fills become ``floor``, and huge finite ones half of it: which of them is the lower stays so."""
        other = MaskLevels({})
        other.floor, other.uniform, other.tables = floor, self.uniform, self.tables
        return other

    def raise_fill(self, number: float) -> float:
        """What a fill becomes."""
        if math.isinf(number):
            return max(number, self.floor) if number < 0 else min(number, -self.floor)
        return min(max(number, self.floor / 2), -self.floor / 2)

    def of(self, value: Any) -> Levels:
        """The levels of a node or a number."""
        if not isinstance(value, fx.Node):
            return self._number(value)
        stack = [value]
        while stack:
            node = stack[-1]
            missing = [n for n in operands(node) + carriers(node) if n not in self._known] if node not in self._known else []
            if missing:
                stack += missing
                continue
            stack.pop()
            if node not in self._known:
                self._known[node] = self._compute(node)
        return self._known[value]

    def follows(self, node: fx.Node) -> bool:
        """Whether ``node`` can be made again of operands with other fills."""
        self.of(node)
        return node in self._followed

    def reached(self, root: fx.Node) -> Iterator[fx.Node]:
        """``root`` and the nodes that its levels come from."""
        stack, seen = [root], {root}
        while stack:
            node = stack.pop()
            yield node
            if self.of(node) != SCORE and self.follows(node):
                fresh = [n for n in operands(node) if n not in seen]
                seen.update(fresh)
                stack += fresh

    def held(self, root: fx.Node) -> Iterator[Table]:
        """The tables that ``root`` is made of, masks now or not."""
        stack, seen = [root], {root}
        while stack:
            node = stack.pop()
            table = self.tables.of(node) if node.op in ("placeholder", "get_attr") else None
            if table is not None:
                yield table
            fresh = [n for n in operands(node) if n not in seen and dtype_of(n) is not torch.bool]
            seen.update(fresh)
            stack += fresh

    def is_fill(self, node: fx.Node) -> bool:
        """Whether ``node`` is one constant everywhere and not made of others, or a table of constants."""
        return node.op != "call_function" or (not operands(node) and self.uniform.value(node) is not None)

    def hazard(self, root: fx.Node, *, scored: bool = False) -> fx.Node | None:
        """A node by which ``root`` can be minus infinity; ``scored``: scores are still to be added to ``root``."""
        infinite = any(level.now == -math.inf for level in self.of(root))
        for node in self.reached(root):
            levels = self.of(node)
            crowded = dtype_of(node) is torch.float16 and any(_crowds(level, scored and node is root) for level in levels)
            if crowded or (infinite and any(level.now == -math.inf for level in levels)):
                return node
        return None

    def lost(self, root: fx.Node) -> fx.Node | None:
        """The op without a rule through which a minus infinity may come to ``root``."""
        unknown = (n for n in self.reached(root) if not self.follows(n) and not self.is_fill(n))
        return next((n for n in unknown if any(level.now == -math.inf for level in self.of(n))), None)

    def _compute(self, node: fx.Node) -> Levels:
        dtype = dtype_of(node)
        if dtype is torch.bool:
            return BOOL
        if dtype is None or dtype.is_complex:
            return SCORE
        if node.op != "call_function":
            return self._table(node)
        if is_complement(node) and _is_made_of_integers(node):
            return BOOL  # nobody takes an arbitrary integer from one
        if self.is_fill(node) and (constant := self.uniform.value(node)) is not None:
            return self._number(constant.item())
        if node.target is operator.getitem and walk.is_higher_order(node.args[0]):  # type: ignore[arg-type]
            return LOST if _leaves_a_body(*node.args) else SCORE  # type: ignore[arg-type]
        if node.target not in RULES:
            return self._unknown(node, carriers(node), dtype)
        found = RULES[node.target].combine(node, [self.of(v) for v in values(node)])
        if found is not None and node.target in CLAMPED:
            found = [x._replace(now=max(x.now, self.floor)) for x in found]
        levels = _rounded(found, dtype) if found is not None else None
        if levels is None:
            return self._unknown(node, operands(node), dtype)
        if not dtype.is_floating_point:
            return _of_integers(levels)
        self._followed.add(node)
        return levels

    def _unknown(self, node: fx.Node, operands: list[fx.Node], dtype: torch.dtype) -> Levels:
        """What an op makes of infinities, and arithmetic of numbers that are almost infinite, may be one."""
        computes = FAMILIES.get(node.target) is Family.COMPUTE and dtype.is_floating_point
        most = torch.finfo(dtype).max / 2 if computes else math.inf
        return LOST if any(abs(level.eager) >= most for n in operands for level in self.of(n)) else SCORE

    def _number(self, value: Any) -> Levels:
        if not isinstance(value, (bool, int, float)) or math.isnan(value):
            return SCORE
        return frozenset([Level(float(value), self.raise_fill(float(value)))])

    def _table(self, node: fx.Node) -> Levels:
        table = self.tables.of(node)
        if table is None:
            return SCORE
        if table.rest is None:
            return SCORE | {Level(v, self.raise_fill(v), True) for v in table.low}
        levels = frozenset(Level(v, self.raise_fill(v)) for v in table.low + table.rest)
        return _of_integers(levels) if dtype_rules.is_integral(meta.dtype_of(node)) else levels


def _rounded(found: Iterable[Level], dtype: torch.dtype) -> Levels | None:
    levels = frozenset(Level(rounded(e, dtype), rounded(n, dtype), s) for e, n, s in found)
    if any(math.isnan(x) or (x == math.inf and level.scored) for level in levels for x in level[:2]):
        return None
    return levels if len(levels) <= _LARGEST_SET else frozenset(_extremes(levels))


def _of_integers(levels: Levels) -> Levels:
    """Integers are no fills: nothing of them is built again."""
    small = all(abs(level.eager) < 2**53 and not level.scored for level in levels)
    return frozenset(level._replace(now=level.eager) for level in levels) if small else SCORE


def _extremes(levels: Levels) -> Iterator[Level]:
    """What decides whether sums overflow, and what parts those that were minus infinity from the others."""
    for key in itertools.product((True, False), (True, False), (True, False)):
        alike = [level for level in levels if (level.scored, level.eager == -math.inf, level.eager == level.now) == key]
        if alike:
            yield min(alike, key=lambda level: level.now)
            yield max(alike, key=lambda level: level.now)


def _crowds(level: Level, scored: bool) -> bool:
    """Whether scores may still take it to minus infinity: fp16's largest numbers are no larger than scores can be."""
    return (scored or level.scored) and level.now < torch.finfo(torch.float16).min / 2


@functools.lru_cache(maxsize=4096)
def rounded(number: float, dtype: torch.dtype) -> float:
    """``number`` as ``dtype`` holds it; an integer dtype is left to hold anything."""
    return float(torch.tensor(number, dtype=torch.float64).to(dtype)) if dtype.is_floating_point else number


def _leaves_a_body(call: fx.Node, index: int) -> bool:
    """Whether a body of the higher-order op may return a minus infinity of its own there."""
    module = call.graph.owning_module
    for _, body in walk.bodies(module, call) if module is not None else ():
        returned: Any = next(iter(body.graph.find_nodes(op="output"))).args[0]
        if any(level.eager == -math.inf for level in MaskLevels({}).of(returned[index])):
            return True
    return False


def _is_made_of_integers(complement: fx.Node) -> bool:
    return dtype_rules.is_integral(meta.dtype_of(moved_from(next(iter(complement.all_input_nodes)))))
