"""A tensor that is written along one axis from the front to the back, as a concatenation that grows.

A loop of row writes as selects costs the whole tensor at every step, and compilers that fuse the selects into each of their
readers compute the chain again and again (63 chained writes: 13 times slower on XLA's CPU). The rows themselves are enough.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from nxfx.graph import meta
from nxfx.graph.builder import refresh
from nxfx.graph.masks import MaskBuilder, is_row_major
from nxfx.graph.slices import Extent, is_static, select_extent, slice_extent
from nxfx.graph.storage import may_alias

aten = torch.ops.aten


def _read(node: fx.Node) -> tuple[int, Extent] | None:
    """The dim and the positions that a slice or select of static bounds reads; None for any other node."""
    args: Any = node.args
    if node.target not in (aten.slice.Tensor, aten.select.int) or node.kwargs or not is_static(*args[1:]):
        return None
    value = meta.val(args[0])
    dim = args[1] % value.dim() if len(args) > 1 else 0
    if not is_static(*value.shape, *value.stride()):
        return None
    if node.target is aten.select.int:
        return dim, select_extent(args[2], value.shape[dim])
    bounds: list[Any] = list(args[2:])
    start, end, step = bounds + [None, None, 1][len(bounds) :]
    return dim, slice_extent(start, end, step, value.shape[dim])


def _is_view(node: fx.Node) -> bool:
    """Whether ``node`` is an op that may show its operand's memory (a higher-order op's body is not entered)."""
    known = isinstance(node.target, torch._ops.OpOverload) or node.target is operator.getitem
    return node.op == "call_function" and known and may_alias(node)


class GrowingTensor:
    """``base`` with the pieces that were put into it along ``axis`` so far.

    Args:
        masks: a place must be open in its builder when a method is called.
        base: static in size and contiguous.
    """

    def __init__(self, masks: MaskBuilder, base: fx.Node, axis: int) -> None:
        self.masks, self.base, self.axis = masks, base, axis
        self.reached = 0  # everything before it is settled
        self._pieces: list[fx.Node] = []

    def append(self, piece: fx.Node, start: int, stop: int) -> None:
        """Put ``piece`` at the positions ``start`` to ``stop``, which follow what was put before."""
        if start > self.reached:
            self._pieces.append(self.base_part(self.reached, start))
        self._pieces.append(piece)
        self.reached = stop

    def prefix(self) -> fx.Node:
        """The positions that are settled."""
        self._pieces = [self._joined(self._pieces)]
        return self._pieces[0]

    def serve(self, reader: fx.Node, written: fx.Node) -> bool:
        """Make ``reader``, a slice or select along the axis of what is ``written`` by now, read the part that it needs.

        False when it needs more than what is settled and more than what is not.
        """
        read = _read(reader)
        if read is None or reader.args[0] is not written or read[0] != self.axis:
            return False
        extent = read[1]
        if extent.start >= self.reached:
            reader.args = (self.base, *reader.args[1:])  # of the shape and the strides of what is written
            return True
        if extent.stop > self.reached:
            return False
        bounds = (extent.start, extent.stop, extent.step) if reader.target is aten.slice.Tensor else (extent.start,)
        reader.args = (self.prefix(), self.axis, *bounds)
        self._revalue(reader)
        return True

    def _revalue(self, reader: fx.Node) -> None:
        """The values of a reader and of the views of it: their strides are not those of the whole any more."""
        stack = [reader]
        while stack:
            view = stack.pop()
            read = _read(view)
            if read is None:
                refresh(view, self.masks.build.mode)
            else:
                operand: Any = view.args[0]
                keep = view.target is aten.slice.Tensor
                view.meta["val"] = meta.part(meta.val(operand), read[0], read[1].positions, keep=keep)
                view.meta.pop("tensor_meta", None)
            stack += [user for user in view.users if _is_view(user)]

    def whole(self) -> fx.Node:
        """Every position: what has not been written comes from the base."""
        size = meta.val(self.base).shape[self.axis]
        rest = [self.base_part(self.reached, size)] if self.reached < size else []
        return self._joined(self._pieces + rest)

    def base_part(self, start: int, stop: int) -> fx.Node:
        """The base between two positions."""
        key = ("part", self.base, self.axis, start, stop)
        value = meta.part(meta.val(self.base), self.axis, range(start, stop))
        build = self.masks.build
        return self.masks.shared(key, lambda: build.known(value, aten.slice.Tensor, self.base, self.axis, start, stop))

    def _joined(self, pieces: list[fx.Node]) -> fx.Node:
        if len(pieces) == 1:
            return pieces[0]
        values = [meta.val(piece) for piece in pieces]
        if not all(map(is_row_major, values)):
            return self.masks.build.call(aten.cat.default, pieces, self.axis)
        shape = list(values[0].shape)
        shape[self.axis] = sum(value.shape[self.axis] for value in values)
        return self.masks.build.known(
            meta.contiguous(values[0], shape, values[0].dtype), aten.cat.default, pieces, self.axis
        )
