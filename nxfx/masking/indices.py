"""Writes at positions that are data: index tensors, bool masks, diagonals."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import fx

from nxfx.analysis.elementwise import EXACT, drop_checks, selected
from nxfx.analysis.implied import require
from nxfx.analysis.write_plan import PlannedWrite
from nxfx.graph import meta
from nxfx.graph.index_masks import IndexMasks, IndexWrite
from nxfx.graph.slices import is_static
from nxfx.masking.base import UNCHANGED, Made, Masker, op_name
from nxfx.report.findings import Severity

aten = torch.ops.aten


class PositionMasks:
    """Replaces the writes at positions of one graph, in graph order."""

    def __init__(self, masker: Masker) -> None:
        self.masker, self.masks, self.build, self.plan = masker, masker.masks, masker.build, masker.plan

    def make(self, write: IndexWrite, planned: PlannedWrite) -> Made:
        base = self.masker.now(write.base)
        if write.is_empty:
            return Made(self.masker.own(base, planned), "nothing", UNCHANGED)
        self._require(write, planned)
        value = None
        if write.value is not None:
            whole = self._made_whole(write, planned) if write.is_full else self.masker.now(write.value)
            value = self.masker.cast(whole, base, ())
        current = IndexMasks(self.masks, self._current(write, base, value))
        mask = current.mask()
        self._note(write, planned)
        if write.number is not None:
            if mask is not None and not write.accumulate and self.masker.multiplies(base, write.number, planned):
                return self.masker.product(base, self.masks.negated(mask))
            value = self.masker.number(write.number, base)
            if current.together is not None and write.accumulate:
                value = self.build.call(aten.mul.Tensor, current.count(), value)
        else:
            value = current.value()
        if write.accumulate:
            value = self.build.call(aten.add.Tensor, base, value)
        if mask is None:
            return self.masker.everything(value, base, planned)
        cost = f", {current.comparisons} comparisons of positions" if current.comparisons else ""
        taken = ", the value gathered" if current.taken is not None or write.kind == "ranked" else ""
        return Made(self.masks.select(mask, value, base), f"index-{write.kind}", f"where{taken}{cost}")

    def _require(self, write: IndexWrite, planned: PlannedWrite) -> None:
        """Have the boundary refuse what eager refuses: indices outside the dimension."""
        for target in write.targets:
            index, bounds, ramp = target.index, target.bounds, self.plan.ramp(target.index)
            if bounds is None:
                continue
            if ramp is not None and ramp.offset is not None and is_static(ramp.count):
                ends = (ramp.start, ramp.start + ramp.step * (ramp.count - 1))
                index, bounds = ramp.offset, (bounds[0] - min(ends), bounds[1] - max(ends))
            if not require(index, bounds, self.masker.context.sources, self.masker.context.requirements):
                low, high = target.bounds or bounds
                message = f"eager raises for an index outside [{low}, {high}]; the cleaned graph writes nothing there"
                fix = "pass the position as an input, so that the boundary checks it, or clamp it"
                self.masker.find(planned, "NX404", Severity.INFO, message, fix)

    def _current(self, write: IndexWrite, base: fx.Node, value: fx.Node | None) -> IndexWrite:
        """``write`` in terms of the nodes that the graph holds by now."""
        targets = []
        for target in write.targets:
            window = target.window
            if window is not None and window.offset is not None:
                window = dataclasses.replace(window, offset=self.masker.now(window.offset))
            targets.append(dataclasses.replace(target, index=self.masker.now(target.index), window=window))
        mask = None if write.mask is None else self.masker.now(write.mask)
        return dataclasses.replace(write, base=base, value=value, targets=targets, mask=mask)

    def _made_whole(self, write: IndexWrite, planned: PlannedWrite) -> fx.Node:
        """What ``write`` writes, computed of everything, not of the masked elements alone."""
        args: Any = planned.scatter.args
        shape = meta.val(write.base).shape
        masked = meta.val(write.mask).numel() if write.mask is not None else 0
        made: dict[fx.Node, fx.Node] = {}

        def whole(node: fx.Node) -> fx.Node:
            part_of = selected(node, args[1], shape)
            if part_of is not None:
                drop_checks(node, masked)
                return self.masker.now(part_of)
            if node.target not in EXACT or meta.val(node).dim() < meta.val(args[2]).dim():
                return self.masker.now(node)
            if node not in made:
                drop_checks(node, masked)
                operands, named = fx.node.map_arg((node.args, dict(node.kwargs)), whole)
                made[node] = self.build.call(node.target, *operands, **named)
            return made[node]

        assert write.value is not None
        return whole(write.value)

    def _note(self, write: IndexWrite, planned: PlannedWrite) -> None:
        """In what respect eager is stricter."""
        if write.kind == "ranked":
            name = f"{op_name(planned.scatter)}: eager raises when the values do not fill the mask; the graph writes as many as fit"
            self.masker.find(planned, "NX201", Severity.INFO, name)


def parts_of(write: Any) -> set[fx.Node]:
    """The nodes that compute what is written, of the masked elements alone; not those that something else computes."""
    found: set[fx.Node] = set()
    stack = [write.value] if isinstance(write, IndexWrite) and write.is_full else []
    while stack:
        node = stack.pop()
        if node is not None and node not in found and (node.target in EXACT or node.target is aten.index.Tensor):
            found.add(node)
            stack += node.all_input_nodes
    return found
