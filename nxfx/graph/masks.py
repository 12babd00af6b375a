"""Masks of regions as ``arange`` comparisons, and values placed where a mask selects them.

Equal masks of one graph are one node: create one :class:`MaskBuilder` a graph and visit the writes in graph order, so
that what is shared stands before all of its users.
"""

from __future__ import annotations

import itertools
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
    """Bounds that are integers, SymInt nodes or nodes of 0-d integer tensors; arithmetic adds nodes."""

    def __init__(self, build: NodeBuilder) -> None:
        self._call = build.call

    def value(self, bound: Any) -> Any:
        if meta.is_tensor(bound):
            return None
        return meta.val(bound) if isinstance(bound, fx.Node) else bound

    def add(self, left: Any, right: Any) -> Any:
        if is_static(left, right):
            return left + right
        return self._call(aten.add.Tensor if meta.is_tensor(left) else operator.add, left, right)

    def minimum(self, left: Any, right: Any) -> Any:
        if is_static(left, right):
            return min(left, right)
        return self._call(torch.sym_min, left, right)

    def maximum(self, left: Any, right: Any) -> Any:
        if is_static(left, right):
            return max(left, right)
        return (
            self._call(aten.clamp.default, left, right)
            if meta.is_tensor(left)
            else self._call(torch.sym_max, left, right)
        )

    def where_negative(self, bound: Any, then: Any, otherwise: Any) -> Any:
        if meta.is_tensor(bound):
            return self._call(aten.where.self, self._call(aten.lt.Scalar, bound, 0), then, otherwise)
        return self._call(torch.sym_ite, self._call(operator.lt, bound, 0), then, otherwise)


# Arithmetic on SymInts that is the same on int64 tensors.
_ARITHMETIC: dict[Any, Any] = {
    operator.add: aten.add.Tensor,
    operator.sub: aten.sub.Tensor,
    operator.mul: aten.mul.Tensor,
}


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


def is_row_major(value: torch.Tensor) -> bool:
    """Whether strides certainly fall from dim to dim, so that element-wise ops give a contiguous result."""
    strides = [stride for size, stride in zip(value.shape, value.stride(), strict=True) if not is_one(size)]
    falling = is_static(*value.shape, *strides) and 0 not in strides
    return falling and all(one > other for one, other in itertools.pairwise(strides))


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

    def elementwise(self, op: Any, *operands: Any, dtype: torch.dtype) -> fx.Node:
        """``op`` of operands that broadcast. Where all are in row-major order the result is contiguous: nothing to evaluate."""
        values = [meta.val(o) for o in operands if isinstance(o, fx.Node)]
        if not all(map(is_row_major, values)):
            return self.build.call(op, *operands)
        shape = [1] * max(v.dim() for v in values)
        for value in values:
            for position, size in enumerate(reversed(value.shape)):
                if shape[-1 - position] == 1:
                    shape[-1 - position] = size
        return self.build.known(meta.contiguous(values[0], shape, dtype), op, *operands)

    def select(self, mask: fx.Node, value: fx.Node, base: fx.Node) -> fx.Node:
        """``value`` where ``mask`` holds, else ``base``; all of one dtype."""
        return self.elementwise(aten.where.self, mask, value, base, dtype=meta.val(base).dtype)

    # --- positions and comparisons ---

    def size(self, node: fx.Node, dim: int) -> Any:
        """The size of ``node`` along ``dim``: an integer, or a node where it is symbolic."""
        size = size_at(node, dim)
        if is_static(size):
            return size
        return self.shared(("size", size.node.expr), lambda: self.build.call(aten.sym_size.int, node, dim))

    def positions(self, base: fx.Node, axis: int, dtype: torch.dtype = torch.int32) -> fx.Node:
        """``arange`` over an axis of ``base``, int64 where the size may exceed int32.

        What it is compared with must fit ``dtype`` too.
        """
        size, device = self.size(base, axis % meta.val(base).dim()), meta.val(base).device
        dtype = dtype if is_static(size) and size < 2**31 else torch.int64

        def make() -> fx.Node:
            if not is_static(size):
                return self.build.call(aten.arange.default, size, dtype=dtype, device=device)
            value = meta.contiguous(meta.val(base), [size], dtype)
            return self.build.known(value, aten.arange.default, size, dtype=dtype, device=device)

        return self.shared(("positions", size, dtype, device), make)

    def compare(self, op: Any, left: fx.Node, right: Any) -> fx.Node:
        """``op(left, right)``, one of aten's comparisons, with a number or a 0-d tensor on the right."""
        exact = op.Tensor if meta.is_tensor(right) else op.Scalar

        def make() -> fx.Node:
            return self.build.known(meta.retype(meta.val(left), torch.bool), exact, left, right)

        return self.shared(("compare", exact, left, right), make)

    def equal(self, left: fx.Node, right: fx.Node) -> fx.Node:
        """Where two integer tensors that broadcast are equal."""
        return self.shared(
            ("equal", left, right), lambda: self.elementwise(aten.eq.Tensor, left, right, dtype=torch.bool)
        )

    def both(self, left: fx.Node, right: fx.Node) -> fx.Node:
        """Elementwise and."""
        return self.shared(
            ("and", left, right), lambda: self.elementwise(aten.bitwise_and.Tensor, left, right, dtype=torch.bool)
        )

    def either(self, left: fx.Node, right: fx.Node) -> fx.Node:
        """Elementwise or."""
        return self.shared(
            ("or", left, right), lambda: self.elementwise(aten.bitwise_or.Tensor, left, right, dtype=torch.bool)
        )

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
        """Everything but ``region``, whose ``mask`` is given: one comparison for the front or rear of an axis."""
        partial = [(axis, shown) for axis, shown in enumerate(region.axes) if shown is not None]
        axis, shown = partial[0]
        if len(partial) > 1 or not isinstance(shown, Extent) or shown.step > 1:
            return self.negated(mask)
        if shown.start == 0:
            rest = self.compare(aten.ge, self.positions(base, axis), shown.stop)
        elif shown.stop == shown.size:
            rest = self.compare(aten.lt, self.positions(base, axis), shown.start)
        else:
            return self.negated(mask)
        return self.align(rest, [axis], meta.val(base).dim())

    def _extent_mask(self, positions: fx.Node, extent: Extent) -> fx.Node | None:
        if extent.count == 1 and extent.size > 1:
            return self.compare(aten.eq, positions, extent.start)
        masks = []
        if extent.start >= extent.step:
            masks.append(self.compare(aten.ge, positions, extent.start))
        if extent.start + extent.count * extent.step < extent.size:
            masks.append(self.compare(aten.lt, positions, extent.stop))
        if extent.step > 1:
            masks.append(self._every(positions, extent.start % extent.step, extent.step))
        return self.all_of(masks)

    def _symbolic_mask(self, base: fx.Node, axis: int, shown: SymbolicSlice) -> fx.Node | None:
        size = self.size(base, axis)
        # A scalar beyond int32 would wrap in a comparison with an int32 tensor.
        positions = self.positions(base, axis, torch.int64)
        first = self._from_the_front(shown.start, size)
        if shown.is_select:
            return self.compare(aten.eq, positions, first)
        masks = []
        if not self._at_most(first, 0):
            masks.append(self.compare(aten.ge, positions, first))
        last = size if is_static(shown.end) and shown.end == INT64_MAX else self._from_the_front(shown.end, size)
        if not self._at_most(size, last):
            masks.append(self.compare(aten.lt, positions, last))
        if shown.step > 1:
            first = first if self._at_most(0, first) else self.calculus.maximum(first, 0)
            if is_static(first):
                phase: Any = first % shown.step
            else:
                modulo = aten.remainder.Scalar if meta.is_tensor(first) else operator.mod
                phase = self.build.call(modulo, first, shown.step)
            masks.append(self._every(positions, phase, shown.step))
        return self.all_of(masks)

    def _every(self, positions: fx.Node, phase: Any, step: int) -> fx.Node:
        value = meta.val(positions)
        rest = self.shared(
            ("mod", positions, step), lambda: self.build.known(value, aten.remainder.Scalar, positions, step)
        )
        return self.compare(aten.eq, rest, phase)

    def _at_most(self, low: Any, high: Any) -> bool:
        low, high = self.calculus.value(low), self.calculus.value(high)
        return low is not None and high is not None and is_known(low <= high)

    def _from_the_front(self, bound: Any, size: Any) -> Any:
        """A bound counted from the front. One that came from ``.item()`` becomes the tensor that it was taken from."""
        tensor = self._as_tensor(bound)
        if tensor is not None and is_known(meta.val(bound) >= 0):
            return tensor
        return wrap_bound(bound if tensor is None else tensor, size, self.calculus)

    def _as_tensor(self, bound: Any) -> fx.Node | None:
        """The 0-d int64 tensor behind a SymInt node of ``.item()`` calls and arithmetic; None for other bounds."""
        if not isinstance(bound, fx.Node) or bound.op != "call_function":
            return None
        args: Any = bound.args
        if bound.target in (aten._local_scalar_dense.default, aten.item.default):
            dims = [None] * meta.val(args[0]).dim()
            return self.shared(("item", args[0]), lambda: self.align(self.build.cast(args[0], torch.int64), dims, 0))
        if bound.target not in _ARITHMETIC:
            return None
        parts = [a if is_static(a) else self._as_tensor(a) for a in args]
        if not meta.is_tensor(parts[0]) or None in parts:
            return None
        return self.shared(("item", bound), lambda: self.build.call(_ARITHMETIC[bound.target], *parts))

    # --- values ---

    def align(self, node: fx.Node, axes: Sequence[int | None], rank: int, *, full: bool = False) -> fx.Node:
        """``node`` with its dim i at axis ``axes[i]`` of ``rank`` axes (None: a dim of size 1 that goes away), size 1
        at the others.

        Leading axes of size 1 are left out, the result broadcasts; not so when ``full``.
        """
        if len(axes) == rank and all(axis in (None, dim) for dim, axis in enumerate(axes)):
            return node
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
        return self.shared(("align", node, *target), lambda: self.viewed(node, target))

    def viewed(self, node: fx.Node, shape: list[Any]) -> fx.Node:
        """``node`` under another shape."""
        value = meta.val(node)
        if is_static(*value.shape, *shape) and value.is_contiguous():
            return self.build.known(meta.contiguous(value, shape, value.dtype), aten.view.default, node, shape)
        return self.build.call(aten.reshape.default, node, shape)  # its strides may not allow a view

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
        """``node``, aligned to ``rank`` axes and holding the positions ``axes[axis]`` of each axis, spread to all of
        ``base``.

        Where its size is 1 it broadcasts and is left so, unless ``single`` asks for it to be spread too. ``filler``
        stands at the other positions. Pads and reshapes only: no gather.
        """
        padding: dict[int, tuple[Any, Any]] = {}
        for axis, shown in axes.items():
            dim = meta.val(node).dim() - (rank - axis)
            if shown is None or dim < 0 or (not single and is_one(size_at(node, dim))):
                continue
            if shown.step > 1:
                node = self._interleave(node, dim, shown.step, filler)
            size = self.size(base, axis)
            if isinstance(shown, Extent):
                first: Any = shown.start
            else:
                first, _ = slice_bounds(shown.start, shown.end, size, self.calculus)
            end = self.calculus.add(first, self.size(node, dim))
            if is_static(size, end) and end > size:  # the fillers after the last position
                node, end = self.build.call(aten.slice.Tensor, node, dim, 0, size - first), size
            padding[dim] = first, size - end if is_static(size, end) else self.build.call(operator.sub, size, end)
        return self.pad(node, padding, filler)

    def pad(self, node: fx.Node, padding: Mapping[int, tuple[Any, Any]], filler: Any = 0) -> fx.Node:
        """``node`` with so many positions of ``filler`` before and after each dim."""
        around = [bound for dim in reversed(range(meta.val(node).dim())) for bound in padding.get(dim, (0, 0))]
        while around and is_static(*around[-2:]) and around[-1] == around[-2] == 0:
            del around[-2:]
        if not around:
            return node
        value = meta.val(node)
        if not is_static(*around, *value.shape) or not value.is_contiguous():
            return self.build.call(aten.constant_pad_nd.default, node, around, filler)
        shape = list(value.shape)
        for position in range(len(around) // 2):
            shape[-1 - position] += around[2 * position] + around[2 * position + 1]
        padded = meta.contiguous(value, shape, value.dtype)
        return self.build.known(padded, aten.constant_pad_nd.default, node, around, filler)

    def _interleave(self, node: fx.Node, dim: int, step: int, filler: Any) -> fx.Node:
        """``node`` with ``step - 1`` fillers after each position of ``dim``."""
        deep = self.build.call(aten.unsqueeze.default, node, dim + 1)
        deep = self.pad(deep, {dim + 1: (0, step - 1)}, filler)
        value = meta.val(deep)
        if not is_static(*value.shape) or not value.is_contiguous():
            deep = self.build.call(aten.clone.default, deep, memory_format=torch.contiguous_format)
        shape = [self.size(node, d) for d in range(meta.val(node).dim())]
        shape[dim] = shape[dim] * step if is_static(shape[dim]) else self.build.call(operator.mul, shape[dim], step)
        return self.viewed(deep, shape)
