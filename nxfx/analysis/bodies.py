"""Integer intervals in the bodies of higher-order ops: operands go in, results come out, loops by widening.

A value that a loop carries is bounded by an interval that holds before the first round and that a round does not leave. It is found
by running the body's intervals from the initial ones and pushing an end that grows to the next landmark (the end of int32, then of
the dtype). What a ``while_loop`` compares in its condition bounds the value where the body runs, and one more round from the widened
interval takes back what was pushed too far: whatever is reachable is initial or comes from what is reachable.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx

from nxfx.analysis import dtype_rules
from nxfx.analysis.guarded import before_casts, constraint
from nxfx.analysis.intervals import INT32, Bounds, Interval, Ranges, fits, join, meet
from nxfx.analysis.provenance import Role, Source
from nxfx.graph import meta, walk
from nxfx.graph.higher_order import Call, Slot, outputs_of, take_apart

aten = torch.ops.aten
_ROUNDS = 6  # of widening, before a loop gives up
_TIGHTENING = 2
_DEPTH = 2  # of nested loops that are widened; each level multiplies the rounds
_CONJUNCTIONS = frozenset({aten.logical_and.default, aten.bitwise_and.Tensor, aten.__and__.Tensor})

Entry = dict[int, Interval]
"""Position of a slot → bounds of its placeholders."""


def enter(ranges: Ranges, node: fx.Node) -> Bounds:
    """Bounds of what the higher-order ``node`` returns; what its bodies are given is noted in ``ranges.operands``."""
    call = take_apart(node)
    return _Solver(ranges, call).solve() if call is not None else None


def operand_sources(
    gm: fx.GraphModule, sources: Mapping[str, Source], requirements: Mapping[str, Interval]
) -> dict[fx.GraphModule, dict[str, Source]]:
    """Body of a higher-order op (nested ones too) → what is known of its placeholders.

    Args:
        gm: the root.
        sources: of the root's placeholders and ``get_attr`` nodes.
        requirements: input name → bounds that the boundary enforces already.
    """
    from nxfx.analysis.ranges import analyse

    found: dict[fx.GraphModule, dict[str, Source]] = {}
    calls = [call for node in gm.graph.nodes if walk.is_higher_order(node) and (call := take_apart(node)) is not None]
    if not calls:
        return found
    ranges = analyse(gm, sources, requirements)
    for call in calls:
        blame = ranges.culprit_name(call.node)
        held = _held_tables(call, sources)
        for body in call.bodies:
            found[body] = {
                p.name: held.get(p)
                or Source(p.name, Role.OPAQUE, range=proved, assumed=assumed, culprit=blame if proved != assumed else None)
                for p in body.graph.find_nodes(op="placeholder")
                for assumed, proved in [ranges.operands.get(p, (None, None))]
            }
            found |= operand_sources(body, found[body], {})
    return found


def _held_tables(call: Call, sources: Mapping[str, Source]) -> dict[fx.Node, Source]:
    """Placeholders of the bodies that are a float parameter, buffer or constant, each time they are called: what a body closes over."""
    found: dict[fx.Node, Source] = {}
    for slot in call.slots:
        operand = slot.operands[0] if len(slot.operands) == 1 and not slot.carried else None
        source = sources.get(operand.name) if isinstance(operand, fx.Node) else None
        if not isinstance(operand, fx.Node) or source is None or source.mutated or not meta.val(operand).is_floating_point():
            continue
        if source.role in (Role.PARAMETER, Role.BUFFER, Role.CONSTANT):
            shape = tuple(meta.val(operand).shape)
            found |= {p: source for p in slot.placeholders if tuple(meta.val(p).shape) == shape}  # a scan gives its body a part
    return found


class _Solver:
    """The bounds of one call's slots, read in the way (assumed or proved) that ``ranges`` is in."""

    def __init__(self, ranges: Ranges, call: Call) -> None:
        self.ranges, self.call = ranges, call
        self.limits = {i: limits for i, slot in enumerate(call.slots) if (limits := _limits(slot)) is not None}
        self.start: Entry = {i: self._given(call.slots[i], limits) for i, limits in self.limits.items() if call.slots[i].placeholders}
        self.carried = [i for i in self.start if call.slots[i].carried]
        self.inner: dict[fx.GraphModule, Ranges] = {}

    def _given(self, slot: Slot, limits: Interval) -> Interval:
        known = [self.ranges.read(v) for v in slot.operands]
        bounds = [k if k is not None and fits(k, limits) else limits for k in known]
        return join(*bounds)

    def solve(self) -> list[Interval | None]:
        entry = self._fixed_point() if self.carried else dict(self.start)
        returned = self._round(entry)
        for _ in range(_TIGHTENING if self.carried else 0):
            tighter = {i: join(self.start[i], returned[i]) for i in self.carried}
            tighter |= {i: meet(bounds, tighter[i]) for i, bounds in self._counted(entry).items()}
            if tighter == {i: entry[i] for i in self.carried}:
                break
            entry |= tighter
            returned = self._round(entry)
        returned |= {i: entry[i] for i in self.carried}
        for i, bounds in entry.items():
            for placeholder in self.call.slots[i].placeholders:
                self._note(placeholder, self._entered(placeholder, bounds))
        results: list[Interval | None] = [None] * len(self.call.node.meta["val"])
        for i, slot in enumerate(self.call.slots):
            if slot.result is not None:
                results[slot.result] = returned.get(i)
        return results

    def _fixed_point(self) -> Entry:
        """Bounds that hold before the first round and after each."""
        entry = dict(self.start)
        for number in range(_ROUNDS if self.ranges.depth < _DEPTH else 0):
            returned = self._round(entry)
            grown = {i: join(self.start[i], returned[i]) for i in self.carried}
            if all(fits(grown[i], entry[i]) for i in self.carried):
                return entry
            for i, bounds in grown.items():
                entry[i] = join(entry[i], bounds) if number == 0 else _widened(entry[i], bounds, self.limits[i])
        return entry | {i: self.limits[i] for i in self.carried}

    def _round(self, entry: Entry) -> Entry:
        """What the bodies return for each slot when their placeholders are within ``entry``."""
        from nxfx.analysis.ranges import analyse

        self.inner = {}
        for body in self.call.bodies:  # a loop's condition comes first
            known = {
                p.name: Source(p.name, Role.OPAQUE, range=self._entered(p, bounds))
                for i, bounds in entry.items()
                for p in self.call.slots[i].placeholders
                if p.graph is body.graph
            }
            self.inner[body] = analyse(body, known, depth=self.ranges.depth + bool(self.carried))
            if dims := self.inner[body].dims:
                self.ranges.dims |= dims
                self.ranges.lean()
        found: Entry = {}
        for i, limits in self.limits.items():
            slot = self.call.slots[i]
            if slot.outputs:
                known_outputs = [self._read(b, outputs_of(b)[position]) for b, position in slot.outputs]
                found[i] = join(*[k if k is not None and fits(k, limits) else limits for k in known_outputs])
        return found

    def _read(self, body: fx.GraphModule, value: Any) -> Interval | None:
        inner = self.inner[body]
        if isinstance(value, fx.Node):
            return inner.proved(value) if self.ranges.strictly else inner.of(value)
        return inner.read(value)

    def _entered(self, placeholder: fx.Node, bounds: Interval) -> Interval:
        """``bounds`` as the body of a loop meets them: its condition holds."""
        condition = self.call.condition
        if condition is None or placeholder.graph is condition.graph or condition not in self.inner:
            return bounds
        slot = next(s for s in self.call.slots if placeholder in s.placeholders)
        for value, bound in _conjuncts(self.inner[condition], outputs_of(condition)[0]):
            if _source_of(self.inner[condition], value) in slot.placeholders and bound is not None:
                bounds = meet(bounds, bound)
        return bounds

    def _counted(self, entry: Entry) -> Entry:
        """What a loop adds to a value that it carries it adds once a round, so the number of rounds bounds the sum."""
        added = {i: found for i in self.carried if (found := self._added(self.call.slots[i])) is not None}
        # A counter that grows by at least a step each round and never reaches the end of its dtype counts the rounds.
        rounds = [
            (entry[i][1] - self.start[i][0]) // step[0]
            for i, (step, limits) in added.items()
            if step[0] > 0 and entry[i][1] < limits[1]
        ]
        if self.call.length is not None:
            rounds.append(self.ranges.symbolic(self.call.length)[1])
        if not rounds:
            return {}
        sums = {
            i: (self.start[i][0] + min(rounds) * min(low, 0), self.start[i][1] + min(rounds) * max(high, 0))
            for i, ((low, high), _) in added.items()
        }
        return {i: bounds for i, bounds in sums.items() if fits(bounds, added[i][1])}

    def _added(self, slot: Slot) -> tuple[Interval, Interval] | None:
        """Bounds of what a round adds to ``slot`` and of the dtype it adds in, None when it does something else."""
        ((body, position),) = slot.outputs
        total = _source_of(self.inner[body], outputs_of(body)[position])
        if not isinstance(total, fx.Node) or total.target is not aten.add.Tensor or total.kwargs:
            return None
        others = [a for a in total.args if _source_of(self.inner[body], a) not in slot.placeholders]
        bounds = self._read(body, others[0]) if len(others) == 1 else None
        dtype = meta.dtype_of(total)
        return None if bounds is None or dtype is None else (bounds, dtype_rules.integer_bounds(dtype))

    def _note(self, placeholder: fx.Node, bounds: Interval) -> None:
        assumed, _ = self.ranges.operands.get(placeholder, (bounds, bounds))
        self.ranges.operands[placeholder] = (assumed, bounds) if self.ranges.strictly else (bounds, bounds)


def _source_of(ranges: Ranges, value: Any) -> Any:
    """``value`` before casts that change no number of it."""
    return list(before_casts(value, ranges.proved))[-1] if isinstance(value, fx.Node) else value


def _limits(slot: Slot) -> Interval | None:
    dtype = meta.dtype_of(next(iter((*slot.placeholders, *slot.returned())), None))
    return dtype_rules.integer_bounds(dtype) if dtype is not None and dtype_rules.is_integral(dtype) else None


def _widened(before: Interval, now: Interval, limits: Interval) -> Interval:
    low = next(x for x in (before[0], INT32[0], limits[0]) if x <= now[0] or x == limits[0])
    high = next(x for x in (before[1], INT32[1], limits[1]) if x >= now[1] or x == limits[1])
    return max(low, limits[0]), min(high, limits[1])


def _conjuncts(ranges: Ranges, condition: Any) -> Iterator[tuple[fx.Node, Interval | None]]:
    """Every compared value with its bounds where ``condition`` holds."""
    if isinstance(condition, fx.Node) and condition.target in _CONJUNCTIONS:
        for part in condition.args[:2]:
            yield from _conjuncts(ranges, part)
    elif (found := constraint(ranges, condition, True)) is not None:
        yield found
