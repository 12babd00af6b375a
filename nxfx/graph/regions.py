"""Regions: which elements of a tensor a chain of slices, selects and reorderings shows, composed exactly."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import fx

from nxfx.graph import meta
from nxfx.graph.slices import INT64_MAX, Extent, is_known, is_static, select_extent, slice_extent

aten = torch.ops.aten


@dataclass(frozen=True)
class SymbolicSlice:
    """``x[start:end:step]`` (or ``x[start]``) of a whole axis whose bounds or size are known at run time only.

    Attributes:
        start, end: integers or nodes; ``end`` is None for a select.
        key: the bounds by value: two nodes with equal SymInts are one bound.
        count: number of positions: an integer, a SymInt, or None for a select (one).
    """

    start: Any = field(compare=False)
    end: Any = field(compare=False)
    step: int
    key: tuple[Any, ...]
    count: Any = field(compare=False, default=None)

    @property
    def is_select(self) -> bool:
        return self.end is None


Axis: TypeAlias = "Extent | SymbolicSlice | None"  # None: the whole axis


@dataclass(frozen=True)
class Region:
    """The part of a tensor (the root) that a view shows.

    Attributes:
        axes: for each axis of the root, which of its positions; None: all.
        dims: for each dim of the view, the root axis it walks; None: a dim of size 1 that walks none.
        shape: the root's shape.
        nothing: a dim that walks no axis was sliced to nothing.
    """

    axes: tuple[Axis, ...]
    dims: tuple[int | None, ...]
    shape: tuple[Any, ...] = field(compare=False)
    nothing: bool = False

    @classmethod
    def of(cls, axes: list[Axis], dims: list[int | None], shape: tuple[Any, ...], nothing: bool = False) -> Region:
        """The canonical region: an axis shown whole is None, a dim of a single position walks no axis."""
        kept = [None if isinstance(a, Extent) and a.is_whole else a for a in axes]
        walked = tuple(None if d is not None and _is_single(kept[d], shape[d]) else d for d in dims)
        return cls(tuple(kept), walked, shape, nothing)

    @classmethod
    def whole(cls, shape: Any) -> Region:
        """All of a tensor of ``shape``."""
        return cls.of([None] * len(shape), list(range(len(shape))), tuple(shape))

    @property
    def is_whole(self) -> bool:
        """Every element is shown, in whatever order."""
        return not self.nothing and all(axis is None for axis in self.axes)

    @property
    def is_identity(self) -> bool:
        """The view is the root: every element, in its place."""
        return (
            self.is_whole and len(self.dims) == len(self.shape) and all(d in (None, i) for i, d in enumerate(self.dims))
        )

    @property
    def is_empty(self) -> bool:
        none = any(isinstance(axis, Extent) and axis.is_empty for axis in self.axes)
        return none or self.nothing or any(is_static(size) and size == 0 for size in self.shape)

    def count(self, axis: int) -> Any:
        """How many positions of the root's ``axis`` are shown."""
        shown = self.axes[axis]
        if shown is None:
            return self.shape[axis]
        return 1 if shown.count is None else shown.count

    def with_dims(self, dims: list[int | None]) -> Region:
        """The same elements under other dims."""
        return Region.of(list(self.axes), dims, self.shape, self.nothing)

    def unfolded(self, axis: int) -> Region:
        """The same elements of the root viewed with ``axis``, walked in steps that divide it, as two: steps and phases."""
        shown = self.axes[axis]
        assert isinstance(shown, Extent) and shown.count * shown.step == shown.size
        axes = [*self.axes[:axis], None, Extent.of(shown.start, 1, 1, shown.step), *self.axes[axis + 1 :]]
        dims = [d + 1 if d is not None and d > axis else d for d in self.dims]
        return Region.of(
            axes, dims, (*self.shape[:axis], shown.count, shown.step, *self.shape[axis + 1 :]), self.nothing
        )

    def with_slice(self, dim: int, start: Any, end: Any, step: int, size: Any, count: Any) -> Region | None:
        """This view sliced along ``dim``, of ``size`` positions of which ``count`` stay; None where that is no region."""
        dim %= len(self.dims)
        axis = self.dims[dim]
        start, end = 0 if start is None else start, INT64_MAX if end is None else end
        if is_static(start, end, size):
            inner = slice_extent(start, end, step, size)
            return self if inner.is_whole else self._narrowed(axis, inner)
        if step == 1 and is_static(start) and start == 0 and _reaches(end, size):
            return self
        if axis is None or self.axes[axis] is not None:
            return None
        return self._with_axis(axis, SymbolicSlice(start, end, step, (_key(start), _key(end)), count))

    def with_select(self, dim: int, index: Any, size: Any) -> Region | None:
        """This view with ``dim`` replaced by its element ``index``; None where that has no region."""
        dim %= len(self.dims)
        axis = self.dims[dim]
        chosen: Region | None = self
        if axis is not None and is_static(index, size):
            chosen = self._narrowed(axis, select_extent(index, size))
        elif axis is not None:
            bound = SymbolicSlice(index, None, 1, (_key(index), None))
            chosen = self._with_axis(axis, bound) if self.axes[axis] is None else None
        return chosen and chosen.with_dims([d for i, d in enumerate(chosen.dims) if i != dim])

    def within(self, inner: Region) -> Region | None:
        """``inner``, a region of what this view shows, as a region of the root; None where that has no region."""
        region: Region | None = self
        for dim, shown in enumerate(inner.axes):
            if shown is None or region is None:
                continue
            axis = self.dims[dim]
            if isinstance(shown, Extent):
                region = region._narrowed(axis, shown)
            elif axis is None or region.axes[axis] is not None:
                return None
            else:
                region = region._with_axis(axis, shown)
        if region is None:
            return None
        dims = [None if d is None else self.dims[d] for d in inner.dims]
        return Region.of(list(region.axes), dims, self.shape, region.nothing or inner.nothing)

    def _narrowed(self, axis: int | None, inner: Extent) -> Region | None:
        if axis is None:
            return Region.of(list(self.axes), list(self.dims), self.shape, inner.is_empty)
        outer = self.axes[axis]
        if isinstance(outer, SymbolicSlice):
            return None
        return self._with_axis(axis, inner if outer is None else outer.within(inner))

    def _with_axis(self, axis: int, shown: Axis) -> Region:
        axes = [shown if a == axis else old for a, old in enumerate(self.axes)]
        return Region.of(axes, list(self.dims), self.shape, self.nothing)


def _is_single(shown: Axis, size: Any) -> bool:
    if shown is None:
        return is_static(size) and size == 1
    return shown.count == 1 if isinstance(shown, Extent) else shown.is_select


# Ops that give equal results on equal operands, which a bound is usually made of.
_PURE = frozenset(
    {
        aten._local_scalar_dense.default, aten.item.default, aten.select.int, aten.view.default, aten.mul.Tensor,
        aten.add.Tensor, aten.sub.Tensor, operator.add, operator.sub, operator.mul,
    }
)  # fmt: skip


def _key(bound: Any, depth: int = 8) -> Any:
    """Equal for bounds that are certainly equal: one value, one symbol, or one arithmetic on the same tensors."""
    if not isinstance(bound, fx.Node):
        return tuple(_key(b, depth) for b in bound) if isinstance(bound, (list, tuple)) else bound
    if bound.op == "call_function" and bound.target in _PURE and depth > 0:
        return bound.target, *(_key(a, depth - 1) for a in bound.args), *sorted(bound.kwargs)
    value = meta.val(bound)
    return value.node.expr if isinstance(value, torch.SymInt) else bound


def _reaches(end: Any, size: Any) -> bool:
    value = meta.val(end) if isinstance(end, fx.Node) else end
    return value == INT64_MAX if is_static(value) else isinstance(value, torch.SymInt) and is_known(value >= size)
