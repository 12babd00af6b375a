"""Chains of view writes read as one write: ``x[a][b] = v`` is one region of ``x`` and one value.

In a functional graph a write through nested views is a chain of scatters, each into the matching view of the same base:
``slice_scatter(x, select_scatter(slice(x), fill(select(slice(x)))))``. The chain is followed inwards only where the
inner base provably shows the region that the outer scatter writes; anything else is a value like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from nxfx.analysis.uniform import UniformValues, as_dtype
from nxfx.analysis.views import (
    COPIES,
    PERMUTATIONS,
    VIEWS,
    Views,
    as_strided_step,
    permutation,
    reorders,
    select_step,
    slice_step,
    unit_dims,
)  # fmt: skip
from nxfx.graph import meta
from nxfx.graph.masks import has_shape
from nxfx.graph.regions import Region
from nxfx.graph.slices import is_static

aten = torch.ops.aten

# Scatter op → the region of its base that it writes.
SCATTERS: dict[Any, Callable[[fx.Node, Region, int], Region | None]] = {
    aten.slice_scatter.default: slice_step,
    aten.select_scatter.default: select_step,
    aten.as_strided_scatter.default: as_strided_step,
}


@dataclass
class Value:
    """What a write writes.

    Attributes:
        node: a tensor that broadcasts to the region; None when every element is ``number``.
        number: a real 0-d tensor of the written dtype.
        casts: dtypes that ``node`` takes on one after the other before it is written.
        placed: ``node`` has the shape of the base, its elements already stand where they are written.
    """

    node: fx.Node | None = None
    number: torch.Tensor | None = None
    casts: list[torch.dtype] = field(default_factory=list)
    placed: bool = False


@dataclass
class SliceWrite:
    """A write of ``value`` into regions of ``base``, the result of which is ``node``. No region: nothing is changed."""

    node: fx.Node
    base: fx.Node
    regions: list[Region]
    value: Value

    @property
    def inputs(self) -> set[fx.Node]:
        """The nodes that the write depends on."""
        bounds = {
            b
            for region in self.regions
            for axis in region.axes
            for b in (getattr(axis, "start", None), getattr(axis, "end", None))
            if isinstance(b, fx.Node)
        }
        whole = any(region.is_whole for region in self.regions) and is_static(*meta.val(self.base).shape)
        parts = (None if whole else self.base, self.value.node)
        return bounds | {part for part in parts if part is not None}


def read_slice_write(
    node: fx.Node, views: Views, uniform: UniformValues, needed: Mapping[fx.Node, int]
) -> SliceWrite | None:
    """The write that ends in the scatter ``node``; None when its region cannot be expressed.

    ``needed`` counts what other writes rest on: the chain is not followed past it.
    """
    args: Any = node.args
    base, value = args[:2]
    region = _written(node)
    if region is None:
        return None
    node, base, region = _outwards(node, base, region, needed)
    origin = views.origin(base)
    region, value = _inwards(base, region, value, views, origin)
    if region.is_empty:
        return SliceWrite(node, base, [], Value())
    written = written_value(value, meta.val(base).dtype, uniform)
    if written.node is not None and not written.casts and meta.dtype_of(written.node) == meta.dtype_of(base):
        root, shown = views.origin(written.node)
        if meta.val(written.node).dim() == len(region.dims):
            if (root, shown) == (origin[0], origin[1].within(region)):  # it is what stands there
                return SliceWrite(node, base, [], Value())
            if shown == region and has_shape(root, meta.val(base).shape):
                return SliceWrite(node, base, [region], Value(root, placed=True))
    return SliceWrite(node, base, [region], written)


def _written(scatter: fx.Node) -> Region | None:
    return SCATTERS[scatter.target](scatter, Region.whole(meta.val(scatter).shape), 2)


def _outwards(node: fx.Node, base: Any, region: Region, needed: Mapping[fx.Node, int]) -> tuple[fx.Node, Any, Region]:
    """A write into a reordered view that is put back in order at once is a write into the original."""
    while len(node.users) == 1 and not needed.get(node):
        outer, original = next(iter(node.users)), Views.operand(base)
        if original is None or Views.operand(outer) is not node or not reorders(base) or not reorders(outer):
            break
        if original.target in SCATTERS:
            break  # the base is itself a write that was put back in order
        shown = VIEWS[base.target](base, Region.whole(meta.val(original).shape))
        back = shown and VIEWS[outer.target](outer, shown)
        joined = shown and shown.within(region)
        if back is None or joined is None or not back.is_identity:
            break
        node, base, region = outer, original, joined
    return node, base, region


def _inwards(
    base: fx.Node, region: Region, value: Any, views: Views, origin: tuple[fx.Node, Region]
) -> tuple[Region, Any]:
    """The region and the value of the innermost write of a chain."""
    root, seen = origin
    while True:
        candidate, shown = _behind_views(value, region)
        if candidate.target not in SCATTERS or meta.dtype_of(candidate) != meta.dtype_of(base):
            return region, value
        inner = _written(candidate)
        joined = inner and shown.within(inner)
        if joined is None or views.origin(candidate.args[0]) != (root, seen.within(shown)):
            return region, value
        region, value = joined, candidate.args[1]


def _behind_views(value: Any, region: Region) -> tuple[Any, Region]:
    """What ``value`` is a copy or a reordering of, and ``region`` under its dims."""
    while value.op == "call_function":
        if value.target in COPIES:
            value = value.args[0]
        elif value.target is aten.copy.default and _is_plain_copy(value):
            value = value.args[1]
        elif reorders(value):
            value, region = value.args[0], _undone(value, region)
        else:
            break
    return value, region


def _undone(view: fx.Node, region: Region) -> Region:
    """The same elements under the dims of ``view``'s operand."""
    args: Any = view.args
    dims: list[int | None] = [None] * meta.val(args[0]).dim()
    sources = permutation(view) if view.target in PERMUTATIONS else unit_dims(view)
    for dim, source in enumerate(sources or ()):
        if source is not None:
            dims[source] = region.dims[dim]
    return region.with_dims(dims)


def _is_plain_copy(node: fx.Node) -> bool:
    source = node.args[1]
    same = isinstance(source, fx.Node) and meta.dtype_of(source) == meta.dtype_of(node)
    return same and has_shape(source, meta.val(node).shape)  # type: ignore[arg-type]


def written_value(node: fx.Node, dtype: torch.dtype, uniform: UniformValues) -> Value:
    """What ``node``, broadcast and cast to ``dtype``, writes: without the copies, fills and expands around it."""
    number = as_dtype(uniform.value(node), dtype)
    if number is not None:
        return Value(number=number)
    casts: list[torch.dtype] = []
    while True:
        args: Any = node.args
        if node.target in (aten.copy.default, aten.fill.Tensor) and meta.is_tensor(args[1]):
            if meta.dtype_of(args[1]) != meta.dtype_of(node):
                casts.insert(0, meta.val(node).dtype)
            node = args[1]
        elif node.target in COPIES or node.target is aten.expand.default:
            node = args[0]
        else:
            return Value(node, casts=casts)
