"""Which elements of which tensor a value shows, followed back through the view ops that made it."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import fx

from nxfx.graph import meta
from nxfx.graph.regions import Axis, Region
from nxfx.graph.slices import Extent, is_known, is_static

aten = torch.ops.aten

# A view op's node and what its operand shows of the root → what the node shows of it; None where that is no region.
Step: TypeAlias = Callable[[fx.Node, Region], "Region | None"]


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of ``node``, given by position or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _shape(node: Any) -> Any:
    return meta.val(node).shape


def slice_step(node: fx.Node, region: Region, first: int = 1) -> Region | None:
    """``slice`` (its arguments from position ``first`` on), or with ``first=2`` what a ``slice_scatter`` writes."""
    dim, step = argument(node, first, "dim", 0), argument(node, first + 3, "step", 1)
    if not is_static(step):
        return None
    size = _shape(node.args[0])[dim]
    count = _shape(node if first == 1 else node.args[1])[dim]
    start, end = argument(node, first + 1, "start"), argument(node, first + 2, "end")
    return region.with_slice(dim, start, end, step, size, count)


def select_step(node: fx.Node, region: Region, first: int = 1) -> Region | None:
    """``select`` (its arguments from position ``first`` on), or with ``first=2`` what a ``select_scatter`` writes."""
    dim = argument(node, first, "dim")
    return region.with_select(dim, argument(node, first + 1, "index"), _shape(node.args[0])[dim])


def as_strided_step(node: fx.Node, region: Region, first: int = 1) -> Region | None:
    """``as_strided`` of a contiguous operand, where its strides amount to slices of the operand's axes."""
    args: Any = node.args
    operand, sizes, steps = meta.val(args[0]), list(args[first]), list(args[first + 1])
    offset = argument(node, first + 2, "storage_offset") or 0
    if not is_static(offset, operand.storage_offset(), *operand.shape, *sizes, *steps) or not operand.is_contiguous():
        return None
    if operand.storage_offset() != 0 or 0 in (*operand.shape, *sizes):
        return None
    shape, strides = tuple(operand.shape), operand.stride()
    starts = [offset // stride % size for stride, size in zip(strides, shape, strict=True)]
    if sum(start * stride for start, stride in zip(starts, strides, strict=True)) != offset:
        return None
    axes: list[Axis] = [Extent.of(start, 1, 1, size) for start, size in zip(starts, shape, strict=True)]
    dims: list[int | None] = []
    for count, step in zip(sizes, steps, strict=True):
        axis = None
        if count != 1:
            fitting = (
                a for a in range(len(shape)) if a not in dims and _fits(count, step, strides[a], starts[a], shape[a])
            )
            axis = next(fitting, None)
            if axis is None:
                return None
            axes[axis] = Extent.of(starts[axis], step // strides[axis], count, shape[axis])
        dims.append(axis)
    return region.within(Region.of(axes, dims, shape))


def _fits(count: int, step: int, stride: int, start: int, size: int) -> bool:
    """Whether ``count`` steps stay on one axis."""
    return step > 0 and step % stride == 0 and start + (count - 1) * (step // stride) < size


def _same(node: fx.Node, region: Region) -> Region | None:
    return region


def permutation(node: fx.Node) -> list[int]:
    """Of a permute, transpose or t node: for each dim of the result the dim of the operand."""
    args: Any = node.args
    rank = len(_shape(node))
    if node.target is aten.permute.default:
        return [d % rank for d in args[1]]
    order = list(range(rank))
    if rank > 1:
        one, other = (0, 1) if node.target is aten.t.default else (args[1] % rank, args[2] % rank)
        order[one], order[other] = order[other], order[one]
    return order


def unit_dims(node: fx.Node) -> list[int | None] | None:
    """Of a node that only adds or removes dims of size 1: for each dim of the result the dim of the operand, None for
    a new one.

    None for a node that does something else.
    """
    args: Any = node.args
    before, after = list(_shape(args[0])), list(_shape(node))
    if node.target is aten.unsqueeze.default:
        new = args[1] % len(after)
        return [None if i == new else i - (i > new) for i in range(len(after))]
    old, new_dims = ([i for i, size in enumerate(s) if not (is_static(size) and size == 1)] for s in (before, after))
    if len(old) != len(new_dims) or not all(
        is_known(before[i] == after[j]) for i, j in zip(old, new_dims, strict=True)
    ):
        return None
    source = dict(zip(new_dims, old, strict=True))
    return [source.get(j) for j in range(len(after))]


def _permuted(node: fx.Node, region: Region) -> Region | None:
    return region.with_dims([region.dims[d] for d in permutation(node)])


def _unit(node: fx.Node, region: Region) -> Region | None:
    dims = unit_dims(node)
    return None if dims is None else region.with_dims([None if d is None else region.dims[d] for d in dims])


def _part(node: fx.Node, region: Region) -> Region | None:
    """An output of split or unbind: a slice or an element."""
    args: Any = node.args
    source, index = args
    shape, count = _shape(source.args[0]), len(meta.val(source))
    index %= count
    if source.target is aten.unbind.int:
        dim = argument(source, 1, "dim", 0)
        return region.with_select(dim, index, shape[dim])
    dim, sizes = argument(source, 2, "dim", 0), source.args[1]
    sizes = list(sizes) if isinstance(sizes, (list, tuple)) else [sizes] * count
    if not is_static(*sizes):
        return None
    start = sum(sizes[:index])
    return region.with_slice(dim, start, start + sizes[index], 1, shape[dim], _shape(node)[dim])


# Ops whose result shows elements of their operand. Graphs are functional, so a copy shows them too.
VIEWS: dict[Any, Step] = {
    aten.slice.Tensor: slice_step,
    aten.select.int: select_step,
    aten.as_strided.default: as_strided_step,
    aten.permute.default: _permuted,
    aten.transpose.int: _permuted,
    aten.t.default: _permuted,
    operator.getitem: _part,
}
COPIES = (aten.clone.default, aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default)
PERMUTATIONS = (aten.permute.default, aten.transpose.int, aten.t.default)
RESHAPES = (
    aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.view.default,
    aten._unsafe_view.default, aten.reshape.default,
)  # fmt: skip
VIEWS.update(dict.fromkeys(COPIES, _same))
VIEWS.update(dict.fromkeys(RESHAPES, _unit))
_SPLITS = (aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int)


def reorders(node: fx.Node) -> bool:
    """Whether ``node`` shows every element of its operand, under other dims."""
    return node.target in PERMUTATIONS or (node.target in RESHAPES and unit_dims(node) is not None)


class Views:
    """Roots and regions of the values of one graph, computed on demand and remembered."""

    def __init__(self) -> None:
        self._known: dict[fx.Node, tuple[fx.Node, Region]] = {}

    def origin(self, node: fx.Node) -> tuple[fx.Node, Region]:
        """The tensor that ``node`` shows elements of, as far back as views can be followed, and which elements."""
        chain = []
        while node not in self._known:
            operand = self.operand(node)
            if operand is None:
                self._known[node] = (node, Region.whole(_shape(node)))
                break
            chain.append(node)
            node = operand
        root, region = self._known[node]
        for view in reversed(chain):
            shown = VIEWS[view.target](view, region)
            root, region = (view, Region.whole(_shape(view))) if shown is None else (root, shown)
            self._known[view] = (root, region)
        return root, region

    @staticmethod
    def operand(node: fx.Node) -> fx.Node | None:
        """The tensor whose elements the view ``node`` shows; None when it is no view."""
        if node.op != "call_function" or node.target not in VIEWS or not meta.is_tensor(node):
            return None
        operand: Any = node.args[0]
        if node.target is operator.getitem:
            operand = operand.args[0] if isinstance(operand, fx.Node) and operand.target in _SPLITS else None
        return operand if meta.is_tensor(operand) else None
