"""Writes through slices, selects and their kin: one mask, a concatenation, or a pad."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from nxfx.analysis.slice_writes import SliceWrite
from nxfx.analysis.write_plan import PlannedWrite
from nxfx.graph import meta
from nxfx.graph.masks import has_shape
from nxfx.graph.regions import Region, SymbolicSlice
from nxfx.graph.rows import GrowingTensor
from nxfx.graph.slices import Extent, is_known, is_static
from nxfx.masking.base import UNCHANGED, Made, Masker

aten = torch.ops.aten


@dataclass
class _Rows:
    """A loop of writes on its way: the axis that is filled, the result of the last write, and what is filled so far."""

    axis: int
    last: fx.Node
    tensor: GrowingTensor | None = None


class SliceMasks:
    """Replaces the writes through slices of one graph, in graph order."""

    def __init__(self, masker: Masker) -> None:
        self.masker, self.masks, self.build, self.plan = masker, masker.masks, masker.build, masker.plan
        self.done: set[fx.Node] = set()
        self.rows: dict[fx.Node, _Rows] = {}
        for chain in self.plan.chains:
            rows = _Rows(chain.axis, chain.writes[-1].node)
            self.rows.update((planned.node, rows) for planned in chain.writes)
        self.covers = {planned.node: cover for cover in self.plan.covers for planned in cover.writes}

    def make(self, write: SliceWrite, planned: PlannedWrite) -> Made:
        """What ``write`` becomes, before its node."""
        self.done.add(planned.node)
        if planned.node in self.rows:
            return self._row(write, planned)
        return self._part(write, planned) if planned.node in self.covers else self._slices(write, planned)

    def _slices(self, write: SliceWrite, planned: PlannedWrite) -> Made:
        base, value, regions = self.masker.now(write.base), write.value, write.regions
        if not regions:
            return Made(self.masker.own(base, planned), "nothing", UNCHANGED)
        if value.number is not None:
            return self._filled(base, regions, value.number, planned)
        assert value.node is not None
        node, region = self.masker.cast(self.masker.now(value.node), base, value.casts), regions[0]
        if value.placed:
            return self._selected(node, base, region, planned)
        constant = None if region.is_whole else self.plan.uniform.value(base)
        base, region = self._unfolded(base, region)
        rank, dims = meta.val(base).dim(), region.dims[len(region.dims) - meta.val(node).dim() :]
        axes = {axis: shown for axis, shown in enumerate(region.axes) if not _is_select(shown)}
        if constant is not None and _holds(node, dims, region):
            node = self.masks.align(node, dims, rank, full=True)
            node = self.masks.place(node, base, axes, rank=rank, filler=constant.item(), single=True)
            made = Made(node, "pad", "pad: its base is one constant")
        else:
            node = self.masks.place(self.masks.align(node, dims, rank), base, axes, rank=rank)
            made = self._selected(node, base, region, planned)
        if made.node is not None and meta.val(made.node).dim() != meta.val(planned.node).dim():
            made.node = self.masks.viewed(made.node, list(meta.val(planned.node).shape))
        return made

    def _selected(self, node: fx.Node, base: fx.Node, region: Region, planned: PlannedWrite) -> Made:
        """``node``, whose elements stand in their places, where ``region`` is, else ``base``."""
        mask = self.masks.region_mask(base, region)
        if mask is None:
            return self.masker.everything(node, base, planned)
        return Made(self.masks.select(mask, node, base), "slice")

    def _unfolded(self, base: fx.Node, region: Region) -> tuple[fx.Node, Region]:
        """``base`` and ``region`` with every step that divides its axis as an axis of its own: nothing to pad in between."""
        value = meta.val(base)
        if is_static(*value.shape) and value.is_contiguous():
            for axis in reversed(range(value.dim())):
                shown = region.axes[axis]
                if isinstance(shown, Extent) and shown.step > 1 and shown.count * shown.step == shown.size:
                    region = region.unfolded(axis)
        return (base if len(region.shape) == value.dim() else self.masks.viewed(base, list(region.shape))), region

    def _row(self, write: SliceWrite, planned: PlannedWrite) -> Made:
        """One write of a loop: a piece of the concatenation that its readers and the result are made from."""
        rows, value, region = self.rows[planned.node], write.value, write.regions[0]
        if rows.tensor is None:
            rows.tensor = GrowingTensor(self.masks, self.masker.now(write.base), rows.axis)
        tensor, base, extent = rows.tensor, rows.tensor.base, region.axes[rows.axis]
        assert value.node is not None and isinstance(extent, Extent)
        rank = meta.val(base).dim()
        node = self.masker.cast(self.masker.now(value.node), base, value.casts)
        dims = region.dims[len(region.dims) - meta.val(node).dim() :]
        others = {a: shown for a, shown in enumerate(region.axes) if a != rows.axis and shown is not None}
        mask = self.masks.axes_mask(base, others)
        if mask is None:
            node = self.masks.align(node, dims, rank, full=True)
            shape = [extent.count if a == rows.axis else size for a, size in enumerate(meta.val(base).shape)]
            piece = node if has_shape(node, shape) else self.build.call(aten.expand.default, node, shape)
        else:
            node = self.masks.place(self.masks.align(node, dims, rank), base, others, rank=rank)
            piece = self.masks.select(mask, node, tensor.base_part(extent.start, extent.stop))
        tensor.append(piece, extent.start, extent.stop)
        readers = [user for user in planned.node.users if self.plan.stays(user)]
        elsewhere = [user for user in readers if not tensor.serve(user, planned.node)]
        whole = elsewhere or planned.node is rows.last or self.plan.writes_on(planned.node) > 1
        return Made(tensor.whole() if whole else None, "row", "a row of a concatenation")

    def _part(self, write: SliceWrite, planned: PlannedWrite) -> Made:
        """One of several writes that leave nothing of the base: side by side they are the result."""
        cover, words = self.covers[planned.node], "a part of a concatenation"
        if any(other.node not in self.done for other in cover.writes if other is not planned):
            return Made(None, "part", words)
        shape = list(meta.val(write.base).shape)
        pieces = [self._piece(other, cover.axis, cover.step) for other in cover.writes]
        joined = self.build.call(aten.cat.default, pieces, cover.axis + (cover.step > 1))
        return Made(joined if has_shape(joined, shape) else self.masks.viewed(joined, shape), "part", words)

    def _piece(self, planned: PlannedWrite, axis: int, step: int) -> fx.Node:
        """What is written at each position of ``axis``; of a step, with the phases as an axis of their own behind it."""
        write = planned.write
        assert isinstance(write, SliceWrite) and write.value.node is not None
        region, base = write.regions[0], write.base
        node = self.masker.cast(self.masker.now(write.value.node), base, write.value.casts)
        if write.value.placed:
            extent = region.axes[axis]
            assert isinstance(extent, Extent)
            node = self.build.call(aten.slice.Tensor, node, axis, extent.start, extent.stop, extent.step)
            return node if step == 1 else self.build.call(aten.unsqueeze.default, node, axis + 1)
        shape = [region.count(a) if a == axis else size for a, size in enumerate(region.shape)]
        node = self.masks.align(node, region.dims[len(region.dims) - meta.val(node).dim() :], len(shape), full=True)
        node = node if has_shape(node, shape) else self.build.call(aten.expand.default, node, shape)
        return node if step == 1 else self.build.call(aten.unsqueeze.default, node, axis + 1)

    def _filled(self, base: fx.Node, regions: list[Region], number: torch.Tensor, planned: PlannedWrite) -> Made:
        mask: fx.Node | None = None
        for region in regions:
            part = self.masks.region_mask(base, region)
            if part is None:
                return self.masker.everything(self.masker.number(number, base), base, planned)
            mask = part if mask is None else self.masks.either(mask, part)
        assert mask is not None
        if self.masker.multiplies(base, number, planned):
            rest = self.masks.all_but(base, regions[0], mask) if len(regions) == 1 else self.masks.negated(mask)
            return self.masker.product(base, rest)
        return Made(self.masks.select(mask, self.masker.number(number, base), base), "slice")


def _holds(node: fx.Node, dims: tuple[int | None, ...], region: Region) -> bool:
    """Whether ``node`` holds every element of ``region``, none by broadcasting, at positions that are known now."""
    sizes = {axis: size for axis, size in zip(dims, meta.val(node).shape, strict=True) if axis is not None}
    return all(
        not isinstance(shown, SymbolicSlice) and is_known(sizes.get(axis, 1) == region.count(axis))
        for axis, shown in enumerate(region.axes)
    )


def _is_select(shown: Any) -> bool:
    return isinstance(shown, SymbolicSlice) and shown.is_select
