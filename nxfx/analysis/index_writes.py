"""Writes through integer indices, bool masks and diagonals, brought to one form.

A write through integer indices becomes a mask when every written element has one writer, or when all its writers write the
same value; of several that may write different ones the last one stays, as in eager on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from nxfx.analysis.elementwise import is_elementwise
from nxfx.analysis.indices import Indices, is_index
from nxfx.analysis.uniform import UniformValues, as_dtype
from nxfx.analysis.views import argument
from nxfx.graph import meta
from nxfx.graph.index_masks import IndexWrite, Label, Target, is_free
from nxfx.graph.masks import has_shape, is_one
from nxfx.graph.slices import Extent, is_known, is_static

aten = torch.ops.aten


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
        write.value, write.labels, write.cut, write.reshape, write.is_full = None, [], None, None, False
    return reason or _unproved(write, indices, uniform) or write


def _unproved(write: IndexWrite, indices: Indices, uniform: UniformValues) -> str | None:
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
        if write.accumulate and varying and not _counts_exactly(write, varying, uniform):
            return "several values may be added to one position"
        return _too_many(write, varying)
    if write.mask is not None:
        return None
    write.repeats = not _has_one_writer(write, varying, indices)
    if write.accumulate and write.repeats and (meta.val(write.base).dtype.is_floating_point or meta.val(write.base).is_complex()):
        return "its indices are not provably different from each other, so several values may be added to one position"
    return None if write.window is not None else _too_many(write, varying)


def _counts_exactly(write: IndexWrite, varying: list[Target], uniform: UniformValues) -> bool:
    """Whether a number added again and again is that number times how often: integers, and floats that stay integers."""
    dtype, number = meta.val(write.base).dtype, write.number
    if number is None or dtype is torch.bool or dtype.is_complex:
        return False
    if not dtype.is_floating_point:
        return True
    first = uniform.value(write.base)
    if first is None or dtype.itemsize == 1:
        return False
    sizes = [size for t in varying for size, label in zip(meta.val(t.index).shape, t.labels, strict=True) if is_free(label)]
    parts = float(first), float(number)
    if not is_static(*sizes) or not all(part.is_integer() for part in parts):
        return False
    return bool(abs(parts[0]) + math.prod(sizes) * abs(parts[1]) <= 2 / torch.finfo(dtype).eps)


def _has_one_writer(write: IndexWrite, varying: list[Target], indices: Indices) -> bool:
    """Whether no two indices name one element. A run of adjacent positions is noted."""
    shape = meta.val(write.base).shape
    free = {label for target in varying for label in target.labels if is_free(label)}
    if len(varying) > 1 or len(free) > 1:
        return indices.distinct_together([(target.index, shape[target.axis]) for target in varying])
    chooser = varying[0]
    dim = next(d for d, label in enumerate(chooser.labels) if is_free(label))
    if not indices.distinct(chooser.index, dim, shape[chooser.axis] if chooser.wraps else None):
        return False
    ramp = indices.ramp(chooser.index)
    if ramp is not None and ramp.dim == dim and ramp.step == 1 and is_static(ramp.count):
        chooser.window = ramp
    return True


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
    if write.accumulate and write.repeats:
        work = math.prod(s for axis, s in sizes.items() if axis >= len(shape)) * math.prod(shape)
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
    if not by_axis or not all(map(is_index, by_axis.values())):
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
    write.turn_axes = list(range(position, position + len(masked)))
    if not has_shape(mask, shape[position : position + len(masked)]):
        return "its mask has another shape than what it masks"
    value: Any = write.value
    if value is not None and not write.accumulate and is_elementwise(value, node.args[1], shape, len(shape) - position - len(masked)):
        write.is_full, write.labels = True, list(range(len(shape)))
        return None
    return _label_value(write, [*range(position), -1, *range(position + len(masked), len(shape))]) or _in_turn(write)


def _in_turn(write: IndexWrite) -> str | None:
    """The value's elements go to the masked ones in order: how many there are must be known, and none may be added."""
    if write.value is None or write.number is not None or not write.value_is_free:
        return None
    if not is_static(*(write.reshape or meta.val(write.value).shape)):
        return "which value goes to a masked element depends on how many come before it, and their number on data"
    return "values are added to masked elements" if write.accumulate else None


def _masked_scatter(node: fx.Node, write: IndexWrite, indices: Indices) -> str | None:
    """``source``'s elements in order, or its rows where the mask was expanded along the last axes."""
    shape = meta.val(write.base).shape
    mask: Any = node.args[1]
    if not is_static(*shape, *meta.val(mask).shape, *meta.val(write.value).shape):  # type: ignore[arg-type]
        return "its sizes are known at run time only"
    if mask.target is aten.expand.default:
        mask = mask.args[0]
    sizes = [1] * (len(shape) - meta.val(mask).dim()) + list(meta.val(mask).shape)
    masked = max((axis + 1 for axis, size in enumerate(sizes) if size > 1), default=0)
    row, count = math.prod(shape[masked:]), meta.val(write.value).numel()  # type: ignore[arg-type]
    if masked == 0 or sizes[:masked] != list(shape[:masked]) or count % row:
        mask, masked, row = node.args[1], len(shape), 1
        if not shape or list(meta.val(node).shape) != list(shape):
            return "its mask has another shape than what it masks"
    own = meta.val(mask).shape
    axes = range(len(shape) - len(own), len(shape))
    write.mask, write.turn_axes = mask, list(range(masked))
    write.mask_axes = [None if is_one(size) else axis for axis, size in zip(axes, own, strict=True)]
    write.reshape = [count // row, *shape[masked:]]
    write.labels = [-1, *(None if is_one(shape[axis]) else axis for axis in range(masked, len(shape)))]
    return _in_turn(write)


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


def _single(write: IndexWrite, index: fx.Node) -> str | None:
    """A write to a tensor without dims, which takes an index of one element."""
    if not is_static(*meta.val(index).shape) or meta.val(index).numel() != 1:
        return "the number of its indices is not one"
    write.reshape = []
    return None


def _along_axis(node: fx.Node, write: IndexWrite, indices: Indices) -> str | None:
    args: Any = node.args
    dim, index = args[1:3]
    shape = meta.val(write.base).shape
    if not shape and is_index(index) and argument(node, 4, "alpha", 1) == 1:
        write.accumulate = node.target is aten.index_add.default
        return _single(write, index)
    if not shape or not is_index(index):
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
    if not shape and is_index(index):
        write.accumulate = node.target is aten.scatter_add.default
        return _single(write, index)
    if not shape or not is_index(index):
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
    aten.masked_scatter.default: (_masked_scatter, 2),
    **dict.fromkeys((aten.scatter.src, aten.scatter.value, aten.scatter_add.default), (_scatter, 3)),
    **dict.fromkeys(
        (aten.index_copy.default, aten.index_fill.int_Scalar, aten.index_fill.int_Tensor, aten.index_add.default),
        (_along_axis, 3),
    ),
}
INDEX_WRITES = frozenset(_READERS)
