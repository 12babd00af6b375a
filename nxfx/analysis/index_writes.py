"""What integer index tensors select: which index an axis in order, which hold one position, which never repeat.

A write through integer indices becomes a mask that knows the last writer of each element; where no index repeats that
is cheaper, and sums need it. :func:`read_index_write` brings ``index_put``, ``index_copy``, ``index_fill``, ``index_add``,
``scatter`` and ``diagonal_scatter`` to one form; :class:`Indices` holds the proofs.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from nxfx.analysis.finiteness import Finiteness
from nxfx.analysis.provenance import Role, Source
from nxfx.analysis.range_rules import PRESERVING_VIEWS
from nxfx.analysis.uniform import UniformValues, as_dtype
from nxfx.analysis.views import COPIES, RESHAPES, argument, slice_step, unit_dims
from nxfx.graph import meta
from nxfx.graph.index_masks import IndexWrite, Label, Ramp, Target, is_free
from nxfx.graph.masks import has_shape, is_one
from nxfx.graph.regions import Region
from nxfx.graph.slices import Extent, is_known, is_static

aten = torch.ops.aten
prims = torch.ops.prims
_INDEX_DTYPES = (torch.int64, torch.int32)


class Indices:
    """Proofs about the index tensors of one graph.

    Args:
        sources: placeholder or ``get_attr`` node name → origin.
        finiteness: where index values cannot be negative.
    """

    def __init__(self, sources: Mapping[str, Source], finiteness: Finiteness) -> None:
        self._sources = sources
        self._finiteness = finiteness
        self._ramps: dict[fx.Node, Ramp | None] = {}

    def never_negative(self, node: fx.Node) -> bool:
        """Whether no element counts from the end."""
        facts = self._finiteness.of(node)
        return facts.low >= 0 and not facts.premises

    def distinct(self, node: fx.Node, dim: int, size: Any = None) -> bool:
        """Whether no two elements along ``dim`` are one position (of ``size``, when negative ones count from its end)."""
        if size is not None and not is_static(size):
            return False
        ramp = self.ramp(node)
        if ramp is not None and ramp.dim == dim and is_static(ramp.count):
            return ramp.step != 0 and (size is None or abs(ramp.step) * (ramp.count - 1) < size)
        node = _past_copies(node)
        constant = self._constant(node)
        if constant is not None:
            ordered = (constant if size is None else constant % size).sort(dim).values
            return not bool((ordered.diff(dim=dim) == 0).any())
        ordered = _ordered(node)
        return ordered is not None and ordered[1] == dim

    def bounds(self, node: fx.Node) -> tuple[int, int, bool] | None:
        """What all elements provably lie in, and whether some are at either end."""
        ramp = self.ramp(node)
        if ramp is not None and ramp.offset is None and is_static(ramp.count):
            ends = (ramp.start, ramp.start + ramp.step * (ramp.count - 1))
            return min(ends), max(ends), True
        node = _past_copies(node)
        constant = self._constant(node)
        if constant is not None and constant.numel():
            return int(constant.min()), int(constant.max()), True
        while node.target in _PARTS:
            node = node.args[0]  # type: ignore[assignment]
        ordered = _ordered(node)
        if ordered is None:
            return None
        values: Any = ordered[0].args[0]
        size: Any = meta.val(values).shape[ordered[1]]
        return (0, size - 1, False) if is_static(size) else None

    def known_ramp(self, node: fx.Node) -> Ramp | None:
        """What :meth:`ramp` found before."""
        return self._ramps.get(node)

    def ramp(self, node: fx.Node) -> Ramp | None:
        """How ``node`` runs along one of its dims, where it provably does."""
        chain: list[fx.Node] = []
        while node not in self._ramps and len(chain) < 32:
            chain.append(node)
            operand = node.args[0] if node.op == "call_function" and node.args else None
            if not isinstance(operand, fx.Node) or node.target not in _RAMP_RULES:
                break
            node = operand
        for link in reversed(chain):
            if link not in self._ramps:
                self._ramps[link] = self._ramp_of(link)
        return self._ramps[chain[0]] if chain else self._ramps.get(node)

    def _ramp_of(self, node: fx.Node) -> Ramp | None:
        if meta.dtype_of(node) not in _INDEX_DTYPES:
            return None
        made = _iota(node)
        if made is None and node.target in _RAMP_RULES:
            made = _RAMP_RULES[node.target](self, node)
        constant = self._constant(node) if made is None else None
        return _progression(constant) if constant is not None else made

    def _constant(self, node: fx.Node) -> torch.Tensor | None:
        """The value of a constant that capture lifted (a list of indices in the model's source)."""
        source = self._sources.get(_past_copies(node).name)
        if source is None or source.role is not Role.CONSTANT or not source.is_known or source.value is None:
            return None
        value = source.value
        usable = value.numel() <= 1 << 20 and not isinstance(value, meta.FakeTensor) and not value.is_meta
        return value.detach().cpu() if usable and value.dtype in _INDEX_DTYPES else None


# Ops whose second output (or only output) orders a dim: its elements along that dim are distinct. Position of `dim`.
_ORDERING: dict[Any, int] = {aten.topk.default: 2, aten.sort.default: 1, aten.argsort.default: 1, aten.sort.stable: 2}
_PARTS = PRESERVING_VIEWS | {aten.slice.Tensor, aten.select.int, aten.expand.default}


def _ordered(node: fx.Node) -> tuple[fx.Node, int] | None:
    """The op that ``node`` holds the order of, and along which dim."""
    source: Any = node.args[0] if node.target is operator.getitem and node.args[1] == 1 else node
    if source.target not in _ORDERING or not meta.val(node).dim():
        return None
    along = argument(source, _ORDERING[source.target], "dim", -1)
    return (source, along % meta.val(node).dim()) if is_static(along) else None


def _past_copies(node: fx.Node) -> fx.Node:
    while node.target in COPIES or (
        node.target is aten._to_copy.default and _is_index(node) and _is_index(node.args[0])
    ):
        node = node.args[0]  # type: ignore[assignment]
    return node


def _is_index(node: Any) -> bool:
    return isinstance(node, fx.Node) and meta.dtype_of(node) in _INDEX_DTYPES


def _iota(node: fx.Node) -> Ramp | None:
    start: Any
    step: Any
    if node.target not in (aten.arange.default, aten.arange.start, aten.arange.start_step, prims.iota.default):
        return None
    if node.target is prims.iota.default:
        start, step = node.kwargs.get("start", 0), node.kwargs.get("step", 1)
    else:
        start = node.args[0] if len(node.args) > 1 else 0
        step = argument(node, 2, "step", 1)
    return Ramp(0, start, step, meta.val(node).shape[0]) if is_static(start, step) else None


def _progression(constant: torch.Tensor) -> Ramp | None:
    if constant.dim() != 1 or constant.numel() < 2:
        return None
    steps = constant.diff()
    step = int(steps[0])
    return Ramp(0, int(constant[0]), step, constant.numel()) if bool((steps == step).all()) else None


def _kept(indices: Indices, node: fx.Node) -> Ramp | None:
    operand: Any = node.args[0]
    return indices.known_ramp(operand) if _is_index(operand) else None


def _reshaped(indices: Indices, node: fx.Node) -> Ramp | None:
    ramp, dims = _kept(indices, node), unit_dims(node)
    if ramp is None or dims is None or ramp.dim not in dims or ramp.offset is not None:
        return None
    return Ramp(dims.index(ramp.dim), ramp.start, ramp.step, ramp.count)


def _expanded(indices: Indices, node: fx.Node) -> Ramp | None:
    ramp = _kept(indices, node)
    if ramp is None or ramp.offset is not None:
        return None
    args: Any = node.args
    dim = ramp.dim + meta.val(node).dim() - meta.val(args[0]).dim()
    return Ramp(dim, ramp.start, ramp.step, ramp.count)


def _shifted(indices: Indices, node: fx.Node) -> Ramp | None:
    """A ramp plus an integer, or plus a tensor that does not vary along the ramp."""
    args: Any = node.args
    ramped, other = args[:2]
    ramp = indices.ramp(ramped)
    if ramp is None and isinstance(other, fx.Node):
        ramped, other = other, ramped
        ramp = indices.ramp(ramped)
    if ramp is None or ramp.offset is not None or node.kwargs.get("alpha", 1) != 1:
        return None
    rank = meta.val(node).dim()
    dim = ramp.dim + rank - meta.val(ramped).dim()
    if is_static(other):
        return Ramp(dim, ramp.start + other, ramp.step, ramp.count)
    if not isinstance(other, fx.Node) or not _is_index(other):
        return None
    shape = meta.val(other).shape
    along = dim - (rank - len(shape))
    if along >= 0 and not (is_static(shape[along]) and shape[along] == 1):
        return None
    return Ramp(dim, ramp.start, ramp.step, ramp.count, other)


def _scaled(indices: Indices, node: fx.Node) -> Ramp | None:
    args: Any = node.args
    ramp, factor = _kept(indices, node), args[1]
    if ramp is None or ramp.offset is not None or not is_static(factor):
        return None
    return Ramp(ramp.dim, ramp.start * factor, ramp.step * factor, ramp.count)


def _sliced(indices: Indices, node: fx.Node) -> Ramp | None:
    args: Any = node.args
    ramp = _kept(indices, node)
    region = slice_step(node, Region.whole(meta.val(args[0]).shape))
    if ramp is None or region is None or ramp.offset is not None:
        return None
    extent = region.axes[ramp.dim]
    if isinstance(extent, Extent):
        return Ramp(ramp.dim, ramp.start + extent.start * ramp.step, ramp.step * extent.step, extent.count)
    return ramp if extent is None else None


_RAMP_RULES: dict[Any, Any] = {
    **dict.fromkeys((*COPIES, aten._to_copy.default), _kept),
    **dict.fromkeys(RESHAPES, _reshaped),
    aten.expand.default: _expanded,
    aten.slice.Tensor: _sliced,
    aten.add.Tensor: _shifted,
    aten.mul.Tensor: _scaled,
}

# --- the normal form --------------------------------------------------------------------------------------------------


def read_index_write(node: fx.Node, indices: Indices, uniform: UniformValues) -> IndexWrite | str:
    """The write that ``node`` makes, or which property of it could not be proved."""
    read, position = _READERS[node.target]
    base: Any = node.args[0]
    value: Any = node.args[position]
    write = IndexWrite(base, value if isinstance(value, fx.Node) else None)
    constant = uniform.value(value) if isinstance(value, fx.Node) else value
    if constant is not None:
        write.number = as_dtype(constant, meta.val(base).dtype)
        if write.number is None:
            return f"{constant} does not fit the dtype of what it is written to"
    reason = read(node, write, indices)
    if reason is None and write.number is not None:
        write.value, write.labels, write.cut = None, [], None
    return reason or _unproved(write, indices) or write


def _unproved(write: IndexWrite, indices: Indices) -> str | None:
    """Which property could not be proved of a write through integer indices; None when it can become a mask."""
    varying = [t for t in write.targets if t.varies]
    for target in write.targets:
        size = meta.val(write.base).shape[target.axis]
        low = -size if target.wraps else 0
        target.wraps = target.wraps and not indices.never_negative(target.index)
        held = indices.bounds(target.index)
        if write.is_empty or not is_static(size) or (held is not None and low <= held[0] and held[1] < size):
            continue
        if held is not None and held[2]:
            return f"an index of [{held[0]}, {held[1]}] lies outside the dimension of size {size}"
        target.bounds = (low if target.wraps else 0, size - 1)
    if not write.value_is_free:
        return (
            "several values may be added to one position" if write.accumulate and varying else _too_many(write, varying)
        )
    free = {label for t in varying for label in t.labels if is_free(label)} | {x for x in write.labels if is_free(x)}
    if len(free) != 1 or not varying:
        return "its index tensors choose positions along several dims together"
    write.choosers = varying
    if len(varying) > 1:
        return "several values may be added to one position" if write.accumulate else _too_many(write, varying)
    chooser = varying[0]
    dim = next(d for d, label in enumerate(chooser.labels) if is_free(label))
    distinct = indices.distinct(chooser.index, dim, meta.val(write.base).shape[chooser.axis] if chooser.wraps else None)
    if write.accumulate and not distinct:
        return "its indices are not provably different from each other, so several values may be added to one position"
    ramp = indices.ramp(chooser.index)
    if distinct and ramp is not None and ramp.dim == dim and ramp.step == 1 and is_static(ramp.count):
        chooser.window = ramp
        return None
    return _too_many(write, varying)


# Comparing every position with every index must not cost more than this many times the base, or this many elements.
_COMPARISONS_PER_ELEMENT = 64
_FEW_COMPARISONS = 1 << 16


def _too_many(write: IndexWrite, varying: list[Target]) -> str | None:
    if not varying:
        return None
    shape = meta.val(write.base).shape
    sizes: dict[int, Any] = {}
    for target in varying:
        sizes[target.axis] = shape[target.axis]
        own = meta.val(target.index).shape
        sizes.update(
            (len(shape) - x if x < 0 else x, s) for x, s in zip(target.labels, own, strict=True) if x is not None
        )
    if not is_static(*sizes.values(), *shape):
        return "the number of its indices is known at run time only"
    work = math.prod(sizes.values())
    if work > max(_FEW_COMPARISONS, _COMPARISONS_PER_ELEMENT * math.prod(shape)):
        return f"comparing its positions with its indices would take {work} comparisons"
    return None


def _index_put(node: fx.Node, write: IndexWrite, indices: Indices) -> str | None:
    args: Any = node.args
    shape = meta.val(write.base).shape
    write.accumulate = bool(argument(node, 3, "accumulate", False))
    by_axis = {axis: index for axis, index in enumerate(args[1]) if index is not None}
    dtypes = [meta.dtype_of(index) for index in by_axis.values()]
    if dtypes == [torch.bool]:
        return _bool_mask(node, write, *by_axis.popitem())
    if torch.bool in dtypes:
        return "it indexes with a mask and other tensors together"
    if not by_axis or not all(map(_is_index, by_axis.values())):
        return "its index tensors are not int32 or int64"
    labels = _free_labels([meta.val(index).shape for index in by_axis.values()])
    pending = dict(by_axis)
    for axis, index in by_axis.items():
        ordered = _in_order(indices, index, shape[axis])
        dim = None if ordered is None else ordered[0] + len(labels) - meta.val(index).dim()
        if ordered is not None and dim is not None and is_free(labels[dim]):
            labels[dim] = axis
            if ordered[1] is not None:
                write.axes[axis] = ordered[1]
            del pending[axis]
    for axis, index in pending.items():
        write.targets.append(Target(axis, index, _own_labels(index, labels), wraps=True))
    others = [axis for axis in range(len(shape)) if axis not in by_axis]
    first = min(by_axis)
    adjacent = max(by_axis) - first + 1 == len(by_axis)
    before = [axis for axis in others if axis < first] if adjacent else []
    return _label_value(write, [*before, *labels, *(axis for axis in others if axis not in before)])


def _free_labels(shapes: list[Any]) -> list[Label]:
    """A label for each dim of what ``shapes`` broadcast to."""
    rank = max(map(len, shapes))
    labels: list[Label] = [None] * rank
    for shape in shapes:
        for position, size in enumerate(reversed(shape)):
            if not is_one(size):
                labels[rank - 1 - position] = -1 - position
    return labels


def _bool_mask(node: fx.Node, write: IndexWrite, position: int, mask: fx.Node) -> str | None:
    """A mask of adjacent axes: what is written must be one value, or come from the very places it goes to."""
    shape, masked = meta.val(write.base).shape, meta.val(mask).shape
    write.mask, write.mask_axes = mask, list(range(position, position + len(masked)))
    if not has_shape(mask, shape[position : position + len(masked)]):
        return "its mask has another shape than what it masks"
    value: Any = write.value
    own = value is not None and value.target is aten.index.Tensor and value.args[1] == node.args[1]
    if own and has_shape(value.args[0], shape):  # x[mask] = y[mask]
        write.value = value.args[0]
        return _label_value(write, list(range(len(shape))))
    chosen = -1
    reason = _label_value(write, [*range(position), chosen, *range(position + len(masked), len(shape))])
    if reason is None and chosen in write.labels and write.number is None:
        return "which value goes to a masked element depends on how many come before it"
    return reason


def _in_order(indices: Indices, index: fx.Node, size: Any) -> tuple[int, Extent | None] | None:
    """``(dim, positions)`` of an index tensor that runs up an axis; positions None: the whole axis, in order."""
    ramp = indices.ramp(index)
    if ramp is None or ramp.offset is not None or ramp.step < 1:
        return None
    if any(not is_one(s) for d, s in enumerate(meta.val(index).shape) if d != ramp.dim):
        return None
    if ramp.start == 0 and ramp.step == 1 and is_known(ramp.count == size):
        return ramp.dim, None
    if not is_static(ramp.count, size):
        return None
    last = ramp.start + (ramp.count - 1) * ramp.step
    start = ramp.start + (size if last < 0 else 0)
    if start < 0 or ramp.start < 0 <= last or start + last - ramp.start >= size:
        return None
    extent = Extent.of(start, ramp.step, ramp.count, size)
    return ramp.dim, None if extent.is_whole else extent


def _along_axis(node: fx.Node, write: IndexWrite, indices: Indices) -> str | None:
    args: Any = node.args
    dim, index = args[1:3]
    shape = meta.val(write.base).shape
    if not shape or not _is_index(index):
        return "its index is not an int32 or int64 tensor over an axis"
    axis = dim % len(shape)
    if node.target is aten.index_add.default and argument(node, 4, "alpha", 1) != 1:
        return "it scales what it adds"
    wraps = node.target in (aten.index_fill.int_Scalar, aten.index_fill.int_Tensor)
    write.accumulate = node.target is aten.index_add.default
    sizes = meta.val(index).shape
    label: Label = -1 if len(sizes) and not is_one(sizes[0]) else None
    ordered = None if label is None else _in_order(indices, index, shape[axis])
    if ordered is not None:
        label = axis
        if ordered[1] is not None:
            write.axes[axis] = ordered[1]
    else:
        write.targets.append(Target(axis, index, [label] * len(sizes), wraps))
    return _label_value(write, [label if a == axis else a for a in range(len(shape))])


def _scatter(node: fx.Node, write: IndexWrite, indices: Indices) -> str | None:
    args: Any = node.args
    dim, index = args[1:3]
    shape = meta.val(write.base).shape
    if not shape or not _is_index(index):
        return "its index is not an int32 or int64 tensor over an axis"
    axis, sizes = dim % len(shape), meta.val(index).shape
    write.accumulate = node.target is aten.scatter_add.default
    if len(sizes) != len(shape):
        return "its index has another number of dims than the tensor it writes"
    labels: list[Label] = list(range(len(shape)))
    labels[axis] = None if is_one(sizes[axis]) else -1
    for other, size in enumerate(sizes):
        if other == axis or is_known(size == shape[other]):
            continue
        if not is_static(size, shape[other]):
            return "its index has another size than the tensor it writes, known at run time only"
        write.axes[other] = Extent.of(0, 1, size, shape[other])
    write.targets.append(Target(axis, index, _own_labels(index, labels)))
    if write.value is not None and write.number is None:
        write.cut = list(sizes)
    return _label_value(write, labels)


def _diagonal(node: fx.Node, write: IndexWrite, indices: Indices) -> str | None:
    shape = meta.val(write.base).shape
    offset, one, other = argument(node, 2, "offset", 0), argument(node, 3, "dim1", 0), argument(node, 4, "dim2", 1)
    row, column = one % len(shape), other % len(shape)
    if not is_static(offset, shape[row], shape[column]):
        return "the size of its diagonal is known at run time only"
    first = max(0, -offset)
    count = min(shape[row] - first, shape[column] - max(0, offset))
    extent = Extent.of(first, 1, count, shape[row])
    if not extent.is_whole or extent.is_empty:
        write.axes[row] = extent
    write.diagonal = (row, column, offset)
    return _label_value(write, [*(a for a in range(len(shape)) if a not in (row, column)), row])


def _own_labels(index: fx.Node, layout: list[Label]) -> list[Label]:
    """The labels of the dims of ``index``, which broadcasts to ``layout``."""
    sizes = meta.val(index).shape
    own = layout[len(layout) - len(sizes) :]
    return [None if is_one(size) else label for size, label in zip(sizes, own, strict=True)]


def _label_value(write: IndexWrite, layout: list[Label]) -> str | None:
    if write.value is None:
        return None
    sizes = meta.val(write.value).shape if write.cut is None else write.cut
    if len(sizes) > len(layout):
        return "what it writes has more dims than the place it is written to"
    own = layout[len(layout) - len(sizes) :]
    write.labels = [None if is_one(size) else label for size, label in zip(sizes, own, strict=True)]
    return None


# Op → how it is read, and where its value stands among its arguments.
_READERS: dict[Any, tuple[Callable[[fx.Node, IndexWrite, Indices], str | None], int]] = {
    aten.index_put.default: (_index_put, 2),
    aten.diagonal_scatter.default: (_diagonal, 1),
    **dict.fromkeys((aten.scatter.src, aten.scatter.value, aten.scatter_add.default), (_scatter, 3)),
    **dict.fromkeys(
        (aten.index_copy.default, aten.index_fill.int_Scalar, aten.index_fill.int_Tensor, aten.index_add.default),
        (_along_axis, 3),
    ),
}
INDEX_WRITES = frozenset(_READERS)
