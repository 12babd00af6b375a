"""Masks of regions as ``arange`` comparisons, and values placed where a mask selects them.

Equal masks of one graph are one node: create one :class:`MaskBuilder` a graph and visit the writes in graph order, so that what
is shared stands before all of its users.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from nxfx.graph import meta
from nxfx.graph.builder import NodeBuilder
from nxfx.graph.regions import Axis, Region, SymbolicSlice
from nxfx.graph.slices import INT64_MAX, Extent, is_known, is_static, slice_bounds, wrap_bound

aten = torch.ops.aten


class NodeCalculus:
    """Bounds that are integers or SymInt nodes; arithmetic adds nodes."""

    def __init__(self, build: NodeBuilder) -> None:
        self._build = build

    def value(self, bound: Any) -> Any:
        return meta.val(bound) if isinstance(bound, fx.Node) else bound

    def add(self, left: Any, right: Any) -> Any:
        return left + right if is_static(left, right) else self._build.call(operator.add, left, right)

    def minimum(self, left: Any, right: Any) -> Any:
        return min(left, right) if is_static(left, right) else self._build.call(torch.sym_min, left, right)

    def maximum(self, left: Any, right: Any) -> Any:
        return max(left, right) if is_static(left, right) else self._build.call(torch.sym_max, left, right)

    def where_negative(self, bound: Any, then: Any, otherwise: Any) -> Any:
        negative = self._build.call(operator.lt, bound, 0)
        return self._build.call(torch.sym_ite, negative, then, otherwise)


def size_at(node: fx.Node, dim: int) -> Any:
    """The size of a dim as far as it is known now: an integer or a SymInt."""
    return meta.val(node).shape[dim]


def has_shape(node: fx.Node, shape: Sequence[Any]) -> bool:
    """Whether ``node`` certainly has this shape."""
    own = meta.val(node).shape
    return len(own) == len(shape) and all(is_known(a == b) for a, b in zip(own, shape, strict=True))


def is_one(size: Any) -> bool:
    """Whether a size is certainly 1, so that the dim broadcasts."""
    return is_static(size) and size == 1


class MaskBuilder:
    """Builds masks and placed values for one graph.

    Args:
        build: the pass's node builder; a place must be open (``with build.before(...)``) when a method is called.
    """

    def __init__(self, build: NodeBuilder) -> None:
        self.build = build
        self.calculus = NodeCalculus(build)
        self._shared: dict[Hashable, fx.Node] = {}

    def shared(self, key: Hashable, make: Callable[[], fx.Node]) -> fx.Node:
        """The node that ``make`` made for an equal ``key`` before, or a new one."""
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]

    # --- positions and comparisons ---

    def size(self, node: fx.Node, dim: int) -> Any:
        """The size of ``node`` along ``dim``: an integer, or a node where it is symbolic."""
        size = size_at(node, dim)
        if is_static(size):
            return size
        return self.shared(("size", size.node.expr), lambda: self.build.call(aten.sym_size.int, node, dim))

    def positions(self, base: fx.Node, axis: int, dtype: torch.dtype = torch.int32) -> fx.Node:
        """``arange`` over an axis of ``base``; int64 where the size may exceed int32. What it is compared with must fit ``dtype`` too."""
        size, device = self.size(base, axis), meta.val(base).device
        dtype = dtype if is_static(size) and size < 2**31 else torch.int64
        key = ("positions", size, dtype, device)
        return self.shared(key, lambda: self.build.call(aten.arange.default, size, dtype=dtype, device=device))

    def compare(self, op: Any, left: fx.Node, right: Any) -> fx.Node:
        """``op(left, right)`` with a scalar ``right``."""
        value = meta.retype(meta.val(left), torch.bool)
        return self.shared(("compare", op, left, right), lambda: self.build.known(value, op, left, right))

    def equal(self, left: fx.Node, right: fx.Node) -> fx.Node:
        """Where two integer tensors that broadcast are equal."""
        return self.shared(("equal", left, right), lambda: self.build.call(aten.eq.Tensor, left, right))

    def both(self, left: fx.Node, right: fx.Node) -> fx.Node:
        """Elementwise and."""
        return self.shared(("and", left, right), lambda: self.build.call(aten.bitwise_and.Tensor, left, right))

    def either(self, left: fx.Node, right: fx.Node) -> fx.Node:
        """Elementwise or."""
        return self.shared(("or", left, right), lambda: self.build.call(aten.bitwise_or.Tensor, left, right))

    def negated(self, mask: fx.Node) -> fx.Node:
        """Elementwise not."""
        return self.shared(("not", mask), lambda: self.build.known(meta.val(mask), aten.logical_not.default, mask))

    def all_of(self, masks: Sequence[fx.Node]) -> fx.Node | None:
        """The conjunction; None of none."""
        joined: fx.Node | None = None
        for mask in masks:
            joined = mask if joined is None else self.both(joined, mask)
        return joined

    # --- regions ---

    def region_mask(self, base: fx.Node, region: Region) -> fx.Node | None:
        """The mask of a region of ``base``; None when it turns out to be everything."""
        return self.axes_mask(base, dict(enumerate(region.axes)))

    def axes_mask(self, base: fx.Node, axes: Mapping[int, Axis]) -> fx.Node | None:
        """The mask of these positions of these axes of ``base``; None when it turns out to be everything."""
        rank = meta.val(base).dim()
        parts = []
        for axis, shown in axes.items():
            if shown is None:
                continue
            if isinstance(shown, Extent):
                mask = self._extent_mask(self.positions(base, axis), shown)
            else:
                mask = self._symbolic_mask(base, axis, shown)
            if mask is not None:
                parts.append(self.align(mask, [axis], rank))
        return self.all_of(parts)

    def all_but(self, base: fx.Node, region: Region, mask: fx.Node) -> fx.Node:
        """Everything but ``region``, whose mask is given: one comparison where it is the front or the rear of one axis."""
        partial = [(axis, shown) for axis, shown in enumerate(region.axes) if shown is not None]
        axis, shown = partial[0]
        if len(partial) > 1 or not isinstance(shown, Extent) or shown.step > 1:
            return self.negated(mask)
        if shown.start == 0:
            rest = self.compare(aten.ge.Scalar, self.positions(base, axis), shown.stop)
        elif shown.stop == shown.size:
            rest = self.compare(aten.lt.Scalar, self.positions(base, axis), shown.start)
        else:
            return self.negated(mask)
        return self.align(rest, [axis], meta.val(base).dim())

    def _extent_mask(self, positions: fx.Node, extent: Extent) -> fx.Node | None:
        if extent.count == 1 and extent.size > 1:
            return self.compare(aten.eq.Scalar, positions, extent.start)
        masks = []
        if extent.start >= extent.step:
            masks.append(self.compare(aten.ge.Scalar, positions, extent.start))
        if extent.start + extent.count * extent.step < extent.size:
            masks.append(self.compare(aten.lt.Scalar, positions, extent.stop))
        if extent.step > 1:
            masks.append(self._every(positions, extent.start % extent.step, extent.step))
        return self.all_of(masks)

    def _symbolic_mask(self, base: fx.Node, axis: int, shown: SymbolicSlice) -> fx.Node | None:
        size = self.size(base, axis)
        # A scalar beyond int32 would wrap in a comparison with an int32 tensor.
        positions = self.positions(base, axis, torch.int64)
        first = wrap_bound(shown.start, size, self.calculus)
        if shown.is_select:
            return self.compare(aten.eq.Scalar, positions, first)
        masks = []
        if not self._at_most(first, 0):
            masks.append(self.compare(aten.ge.Scalar, positions, first))
        last = size if is_static(shown.end) and shown.end == INT64_MAX else wrap_bound(shown.end, size, self.calculus)
        if not self._at_most(size, last):
            masks.append(self.compare(aten.lt.Scalar, positions, last))
        if shown.step > 1:
            first = first if self._at_most(0, first) else self.calculus.maximum(first, 0)
            phase = first % shown.step if is_static(first) else self.build.call(operator.mod, first, shown.step)
            masks.append(self._every(positions, phase, shown.step))
        return self.all_of(masks)

    def _every(self, positions: fx.Node, phase: Any, step: int) -> fx.Node:
        value = meta.val(positions)
        rest = self.shared(
            ("mod", positions, step), lambda: self.build.known(value, aten.remainder.Scalar, positions, step)
        )
        return self.compare(aten.eq.Scalar, rest, phase)

    def _at_most(self, low: Any, high: Any) -> bool:
        return is_known(self.calculus.value(low) <= self.calculus.value(high))

    # --- values ---

    def align(self, node: fx.Node, axes: Sequence[int | None], rank: int, *, full: bool = False) -> fx.Node:
        """``node`` with its dim i at axis ``axes[i]`` of ``rank`` axes (None: a dim of size 1 that goes away), size 1 at the others.

        Leading axes of size 1 are left out, the result broadcasts; not so when ``full``.
        """
        kept = sorted((axis, dim) for dim, axis in enumerate(axes) if axis is not None)
        sizes = {axis: self.size(node, dim) for axis, dim in kept}
        order = [dim for _, dim in kept]
        if order != sorted(order):
            order += [dim for dim, axis in enumerate(axes) if axis is None]
            node = self.build.call(aten.permute.default, node, order)
        first = 0 if full else min((axis for axis, size in sizes.items() if not is_one(size)), default=rank)
        target = [sizes.get(axis, 1) for axis in range(first, rank)]
        if has_shape(node, [self.calculus.value(size) for size in target]):
            return node
        return self.shared(("align", node, *target), lambda: self.build.call(aten.view.default, node, target))

    def place(
        self,
        node: fx.Node,
        base: fx.Node,
        axes: Mapping[int, Axis],
        *,
        rank: int,
        filler: Any = 0,
        single: bool = False,
    ) -> fx.Node:
        """``node``, aligned to ``rank`` axes and holding the positions ``axes[axis]`` of each axis, spread to all of ``base``.

        Where its size is 1 it broadcasts and is left so, unless ``single`` asks for it to be spread too. ``filler`` stands at the
        other positions. Pads and reshapes only: no gather.
        """
        padding: dict[int, tuple[Any, Any]] = {}
        for axis, shown in axes.items():
            dim = meta.val(node).dim() - (rank - axis)
            if shown is None or dim < 0 or (not single and is_one(size_at(node, dim))):
                continue
            if isinstance(shown, Extent):
                node = self._interleave(node, dim, shown, filler) if shown.step > 1 else node
                first: Any = shown.start
            else:
                first, _ = slice_bounds(shown.start, shown.end, self.size(base, axis), self.calculus)
            end, size = self.calculus.add(first, self.size(node, dim)), self.size(base, axis)
            padding[dim] = first, size - end if is_static(size, end) else self.build.call(operator.sub, size, end)
        return self.pad(node, padding, filler)

    def pad(self, node: fx.Node, padding: Mapping[int, tuple[Any, Any]], filler: Any = 0) -> fx.Node:
        """``node`` with so many positions of ``filler`` before and after each dim."""
        around = [bound for dim in reversed(range(meta.val(node).dim())) for bound in padding.get(dim, (0, 0))]
        while around and is_static(*around[-2:]) and around[-1] == around[-2] == 0:
            del around[-2:]
        return self.build.call(aten.constant_pad_nd.default, node, around, filler) if around else node

    def _interleave(self, node: fx.Node, dim: int, extent: Extent, filler: Any) -> fx.Node:
        """``step - 1`` fillers after each position, cut where the axis ends."""
        deep = self.build.call(aten.unsqueeze.default, node, dim + 1)
        deep = self.pad(deep, {dim + 1: (0, extent.step - 1)}, filler)
        if not meta.val(deep).is_contiguous():
            deep = self.build.call(aten.clone.default, deep, memory_format=torch.contiguous_format)
        length = extent.count * extent.step
        rank = meta.val(node).dim()
        shape = [length if d == dim else self.size(node, d) for d in range(rank)]
        flat = self.build.call(aten.view.default, deep, shape)
        room = extent.size - extent.start
        return flat if length <= room else self.build.call(aten.slice.Tensor, flat, dim, 0, room)
