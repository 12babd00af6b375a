"""Writes at positions that are data (index tensors, a bool mask, a diagonal) as masks and placed values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import fx

from nxfx.graph import meta
from nxfx.graph.masks import MaskBuilder, has_shape, is_one, size_at
from nxfx.graph.regions import Axis
from nxfx.graph.slices import Extent, is_known, is_static

aten = torch.ops.aten

# What a dim runs along: a base axis; None: nothing, it has size 1; a negative number (the same for the same dim of
# all index tensors): it is free, several positions are chosen along it.
Label: TypeAlias = "int | None"


def is_free(label: Label) -> bool:
    """Whether a dim with this label runs over several chosen positions."""
    return label is not None and label < 0


@dataclass(frozen=True)
class Ramp:
    """An index tensor that holds ``start + step * i (+ offset)`` along ``dim`` and varies along other dims by its
    offset only.

    Attributes:
        offset: an integer node that broadcasts to the index tensor and has size 1 along ``dim``, or None.
    """

    dim: int
    start: int
    step: int
    count: Any
    offset: fx.Node | None = None


@dataclass
class Target:
    """An index tensor that chooses positions of ``axis``.

    Attributes:
        labels: what each of its dims runs along.
        wraps: its elements may be negative and count from the end.
        bounds: what its elements must lie in, or eager raises; None where they provably do, or the size is not known.
        window: the ramp it is along its free dim, with step 1, when the write needs to know which element goes where.
    """

    axis: int
    index: fx.Node
    labels: list[Label]
    wraps: bool = False
    bounds: tuple[int, int] | None = None
    window: Ramp | None = None

    @property
    def varies(self) -> bool:
        """Whether it chooses several positions for each element of the other axes."""
        return any(map(is_free, self.labels))


@dataclass
class IndexWrite:
    """A write at positions that are not slices.

    Attributes:
        base: what is written into.
        value: what is written, None when every element is ``number``; ``labels[i]`` tells what the value's dim i runs
            along.
        number: a real 0-d tensor of the base's dtype.
        axes: base axis → the positions written, for axes indexed in order; an axis that is nowhere else is written
            whole.
        targets: axes whose positions are data.
        repeats: an element may have several writers; the last one stays.
        mask: a bool tensor over the base's axes ``mask_axes`` (None: a dim of size 1).
        turn_axes: the axes whose masked elements the value's free dim fills in order.
        is_full: ``value`` is made element by element from what ``mask`` selects, so it can be made of everything.
        reshape: a shape that the value is first brought to.
        diagonal: ``(row axis, column axis, offset)``: only elements with column = row + offset are written.
        accumulate: the value is added to what stands there.
        cut: sizes that the value is first narrowed to (a scatter source may be larger than its index).
    """

    base: fx.Node
    value: fx.Node | None
    number: torch.Tensor | None = None
    labels: list[Label] = field(default_factory=list)
    axes: dict[int, Axis] = field(default_factory=dict)
    targets: list[Target] = field(default_factory=list)
    repeats: bool = False
    mask: fx.Node | None = None
    mask_axes: list[int | None] = field(default_factory=list)
    turn_axes: list[int] = field(default_factory=list)
    is_full: bool = False
    reshape: list[int] | None = None
    diagonal: tuple[int, int, int] | None = None
    accumulate: bool = False
    cut: list[Any] | None = None

    @property
    def is_empty(self) -> bool:
        extents = (shown for shown in self.axes.values() if isinstance(shown, Extent))
        tensors = (self.base, *(target.index for target in self.targets))
        return any(e.is_empty for e in extents) or any(meta.is_empty(meta.val(tensor)) for tensor in tensors)

    @property
    def value_is_free(self) -> bool:
        """Whether the value differs between several positions of one axis."""
        return self.value is not None and any(map(is_free, self.labels))

    @property
    def window(self) -> Target | None:
        """The target whose indices are a run of adjacent positions."""
        return next((target for target in self.targets if target.window is not None), None)

    @property
    def kind(self) -> str:
        """How the positions are given, for the report."""
        if self.mask is not None:
            return "ranked" if self.value_is_free else "bool"
        if self.diagonal is not None:
            return "diagonal"
        if self.window is not None:
            return "window"
        if self.value_is_free:
            return "sum" if self.repeats and self.accumulate else "several"
        if any(t.varies for t in self.targets):
            return "member"
        return "position" if self.targets else "order"


class IndexMasks:
    """Builds the mask and the placed value of one :class:`IndexWrite`, whose nodes stand in the graph."""

    def __init__(self, masks: MaskBuilder, write: IndexWrite) -> None:
        self.masks, self.write, self.base = masks, write, write.base
        self.rank = meta.val(write.base).dim()
        self.free = sorted({x for t in write.targets for x in t.labels if x is not None and x < 0})
        # Which element of the value goes to a position.
        self.taken: fx.Node | None = None
        # For a sum: which positions, over the free dims, which come last, are meant.
        self.together: fx.Node | None = None
        # Positions compared with indices: what the mask costs.
        self.comparisons = 0

    def mask(self) -> fx.Node | None:
        """Where is written; None: everywhere."""
        masks, write, rank = self.masks, self.write, self.rank
        ordered = masks.axes_mask(self.base, write.axes)
        parts = [] if ordered is None else [ordered]
        if write.mask is not None:
            parts.append(masks.align(write.mask, write.mask_axes, rank))
        if write.diagonal is not None:
            parts.append(self._diagonal(*write.diagonal))
        depth = {x: rank + i for i, x in enumerate(self.free)}
        members = []
        for target in write.targets:
            axes = [x if x is None else depth.get(x, x) for x in target.labels]
            if target.window is not None:
                parts.append(self._window(target, target.window))
            elif target.varies:
                members.append(self._equal(target, axes, rank + len(self.free)))
            else:
                parts.append(self._equal(target, axes, rank))
        self.together = masks.all_of(members)
        if self.together is not None:
            last = write.value_is_free and not (write.accumulate and write.repeats)
            parts.append(self._last(self.together) if last else self._any(self.together, len(self.free)))
        return masks.all_of(parts)

    def value(self) -> fx.Node:
        """What is written, as it broadcasts to the base; call :meth:`mask` first."""
        write, masks = self.write, self.masks
        assert write.value is not None
        node = write.value
        for dim, size in enumerate(write.cut or ()):
            if not is_known(size == size_at(node, dim)):
                node = masks.build.call(aten.slice.Tensor, node, dim, 0, size)
        if write.reshape is not None and not has_shape(node, write.reshape):
            if not meta.val(node).is_contiguous():
                node = masks.build.call(aten.clone.default, node, memory_format=torch.contiguous_format)
            node = masks.viewed(node, write.reshape)
        if not write.value_is_free:
            return masks.place(masks.align(node, write.labels, self.rank), self.base, write.axes, rank=self.rank)
        if write.mask is not None:
            return self._in_turn(node, write.mask)
        if write.accumulate and write.repeats:
            return self._sum(node)
        axis = next(target.axis for target in write.targets if target.varies)
        axes = [axis if is_free(x) else x for x in write.labels]
        if len(self.free) > 1:
            node, axes = self._joined(node, axis), list(range(self.rank))
        node = masks.place(masks.align(node, axes, self.rank), self.base, write.axes, rank=self.rank)
        return self._take(node, axis)

    def _sizes(self) -> list[int]:
        """The sizes of the free dims."""
        sizes = {
            label: meta.val(target.index).shape[dim] for target in self.write.targets for dim, label in enumerate(target.labels)
        }
        return [sizes[label] for label in self.free]

    def _joined(self, node: fx.Node, axis: int) -> fx.Node:
        """``node`` over the base's axes, its free dims as one that stands at ``axis``."""
        masks, build, count = self.masks, self.masks.build, len(self.free)
        axes = [self.free.index(x) if x is not None and x < 0 else x if x is None else count + x for x in self.write.labels]
        node = masks.align(node, axes, count + self.rank, full=True)
        sizes = [*self._sizes(), *(masks.size(node, dim) for dim in range(count, count + self.rank))]
        node = self._expanded(node, sizes)
        before, after = range(count, count + axis), range(count + axis, count + self.rank)
        node = build.call(aten.permute.default, node, [*before, *range(count), *after])
        node = build.call(aten.clone.default, node, memory_format=torch.contiguous_format)
        return masks.viewed(node, [*sizes[count : count + axis], math.prod(sizes[:count]), *sizes[count + axis + 1 :]])

    def _sum(self, node: fx.Node) -> fx.Node:
        """For each position the sum of the elements that go there."""
        masks, build, depth = self.masks, self.masks.build, self.rank + len(self.free)
        assert self.together is not None
        axes = [self.rank + self.free.index(x) if x is not None and x < 0 else x for x in self.write.labels]
        node = masks.place(masks.align(node, axes, depth), self.base, self.write.axes, rank=depth)
        dtype = meta.val(node).dtype
        zero = build.scalar(0, dtype, meta.val(node).device)
        apart = masks.select(self.together, node, zero)
        return build.call(aten.sum.dim_IntList, apart, [-1 - d for d in range(len(self.free))], dtype=dtype)

    def count(self) -> fx.Node:
        """How many indices name a position, in the base's dtype."""
        assert self.together is not None
        dims = [-1 - d for d in range(len(self.free))]
        dtype = meta.val(self.base).dtype
        total = self.masks.build.call(aten.sum.dim_IntList, self.together, dims, dtype=torch.int64)
        return total if dtype == torch.int64 else self.masks.build.cast(total, dtype)

    def _in_turn(self, node: fx.Node, mask: fx.Node) -> fx.Node:
        """For each masked element, in order, the next of the value's."""
        masks, build, axes = self.masks, self.masks.build, self.write.turn_axes
        first, count = axes[0], len(axes)
        rank = self.rank - count + 1  # the masked axes are one
        own = [first if is_free(x) else x if x is None or x < first else x - count + 1 for x in self.write.labels]
        node = masks.align(node, own, rank)
        dim = meta.val(node).dim() - (rank - first)
        given = size_at(node, dim)
        sizes = [masks.size(self.base, axis) for axis in axes]

        def turn() -> fx.Node:
            flat = mask
            if meta.val(mask).dim() != 1 or count != 1:
                flat = masks.align(mask, [a if a in axes else None for a in self.write.mask_axes], self.rank, full=True)
                flat = self._expanded(flat, [sizes[axes.index(a)] if a in axes else 1 for a in range(self.rank)])
                flat = build.call(aten.clone.default, flat, memory_format=torch.contiguous_format)
                flat = build.call(aten.view.default, flat, [-1])
            counted = build.call(aten.cumsum.default, flat, 0, dtype=torch.int32)
            return build.call(aten.clamp.default, build.call(aten.sub.Tensor, counted, 1), 0, given - 1)

        taken = masks.shared(("turn", mask, given, *axes), turn)
        picked = build.call(aten.index_select.default, node, dim, taken)
        around = [masks.size(picked, d) for d in range(meta.val(picked).dim())]
        return masks.viewed(picked, [*around[:dim], *sizes, *around[dim + 1 :]])

    def _diagonal(self, row: int, column: int, offset: int) -> fx.Node:
        rows, columns = self.masks.positions(self.base, row), self.masks.positions(self.base, column)
        rows = self._shifted(rows, offset)
        return self.masks.equal(
            self.masks.align(rows, [row], self.rank), self.masks.align(columns, [column], self.rank)
        )

    def _shifted(self, positions: fx.Node, by: int) -> fx.Node:
        if by == 0:
            return positions
        value, build = meta.val(positions), self.masks.build
        return self.masks.shared(("shift", positions, by), lambda: build.known(value, aten.add.Tensor, positions, by))

    def _equal(self, target: Target, axes: Sequence[int | None], depth: int) -> fx.Node:
        """Where a position along the target's axis is an index, over ``depth`` axes (the free dims stand last)."""
        masks, index = self.masks, target.index
        if target.wraps:
            index = self._wrapped(index, masks.size(self.base, target.axis))
        index = masks.place(masks.align(index, axes, depth), self.base, self.write.axes, rank=depth)
        positions = masks.positions(self.base, target.axis, meta.val(index).dtype)
        equal = masks.equal(masks.align(positions, [target.axis], depth), index)
        shape = meta.val(equal).shape
        self.comparisons += math.prod(shape) if is_static(*shape) else 0
        return equal

    def _wrapped(self, index: fx.Node, size: Any) -> fx.Node:
        """An index tensor with its negative elements counted from the end."""

        def make() -> fx.Node:
            negative = self.masks.compare(aten.lt, index, 0)
            shifted = self.masks.build.call(aten.add.Tensor, index, size)
            return self.masks.build.call(aten.where.self, negative, shifted, index)

        return self.masks.shared(("wrap", index, size), make)

    def _any(self, mask: fx.Node, dims: int) -> fx.Node:
        """Whether ``mask`` holds anywhere in its last ``dims`` dims."""
        build = self.masks.build

        def fold() -> fx.Node:
            folded = mask
            for _ in range(dims):
                folded = build.call(aten.any.dim, folded, -1)
            return folded

        return self.masks.shared(("any", mask, dims), fold)

    def _last(self, together: fx.Node) -> fx.Node:
        """Where ``together`` holds anywhere along the free dims; the last such place is noted."""
        masks, build = self.masks, self.masks.build
        sizes = self._sizes()
        device = meta.val(together).device

        def last() -> fx.Node:
            order = build.call(aten.arange.default, math.prod(sizes), dtype=torch.int32, device=device)
            order = masks.viewed(order, sizes) if len(sizes) > 1 else order
            none = build.scalar(-1, torch.int32, device)
            places = masks.select(together, order, none)
            return build.call(aten.amax.default, places, [-1 - d for d in range(len(sizes))])

        number = masks.shared(("last", together), last)
        self.taken = masks.shared(("taken", number), lambda: build.call(aten.clamp.default, number, 0))
        return masks.compare(aten.ge, number, 0)

    def _window(self, target: Target, ramp: Ramp) -> fx.Node:
        """A run of positions from an offset on: an element's number in the run is its distance from the start."""
        masks, build, axis = self.masks, self.masks.build, target.axis
        positions = masks.align(masks.positions(self.base, axis, meta.val(target.index).dtype), [axis], self.rank)
        offset = ramp.offset
        if offset is not None:
            labels = target.labels[len(target.labels) - meta.val(offset).dim() :]
            axes = [None if is_one(size_at(offset, dim)) else label for dim, label in enumerate(labels)]
            offset = masks.place(masks.align(offset, axes, self.rank), self.base, self.write.axes, rank=self.rank)
        size = masks.size(self.base, axis) if target.wraps else None

        def distance() -> fx.Node:
            moved = self._shifted(positions, -ramp.start)
            moved = moved if offset is None else build.call(aten.sub.Tensor, moved, offset)
            if size is None:
                return moved
            # A run that starts below zero wraps: its positions count from the end.
            beyond = build.call(aten.ge.Scalar, moved, ramp.count)
            return build.call(aten.where.self, beyond, build.call(aten.sub.Tensor, moved, size), moved)

        number = masks.shared(("window", positions, offset, ramp.start, ramp.count, size), distance)
        clamped = masks.shared(
            ("clamp", number, ramp.count), lambda: build.call(aten.clamp.default, number, 0, ramp.count - 1)
        )
        self.taken = clamped
        return masks.both(masks.compare(aten.ge, number, 0), masks.compare(aten.lt, number, ramp.count))

    def _take(self, node: fx.Node, axis: int) -> fx.Node:
        """``node``'s elements at the noted places along ``axis``."""
        masks, build, index = self.masks, self.masks.build, self.taken
        assert index is not None
        back = self.rank - axis  # aligned tensors agree in their last dims
        at, shape = meta.val(index).dim() - back, meta.val(index).shape
        if all(is_one(size) for dim, size in enumerate(shape) if dim != at):
            size = masks.size(index, at)
            flat = (
                index
                if len(shape) == 1
                else masks.shared(("flat", index), lambda: build.call(aten.view.default, index, [size]))
            )
            return build.call(aten.index_select.default, node, meta.val(node).dim() - back, flat)
        depth = max(meta.val(node).dim(), len(shape))
        own, theirs = (
            [1] * (depth - meta.val(t).dim()) + [masks.size(t, d) for d in range(meta.val(t).dim())]
            for t in (node, index)
        )
        joint = [t if is_one(o) else o for o, t in zip(own, theirs, strict=True)]
        source, wanted = list(joint), list(joint)
        source[depth - back], wanted[depth - back] = own[depth - back], theirs[depth - back]
        return build.call(
            aten.gather.default, self._expanded(node, source), depth - back, self._expanded(index, wanted)
        )

    def _expanded(self, node: fx.Node, sizes: list[Any]) -> fx.Node:
        if has_shape(node, [self.masks.calculus.value(size) for size in sizes]):
            return node
        return self.masks.build.call(aten.expand.default, node, sizes)
