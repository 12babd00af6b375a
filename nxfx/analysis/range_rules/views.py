"""Ops that hand values on, some of them, or in another dtype."""

from __future__ import annotations

import math

import torch
from torch import fx

from nxfx.analysis.intervals import Bounds, Ranges, arg, join
from nxfx.analysis.range_rules.table import index_into, overloads, rule, shape_of

aten = torch.ops.aten


# Ops whose result holds every element of their first argument, unchanged, and no other.
PRESERVING_VIEWS = frozenset(
    overloads("view", "_unsafe_view", "reshape", "_reshape_alias", "unsqueeze", "squeeze", "permute", "transpose", "t", "clone",
               "alias", "detach", "contiguous", "flatten", "lift_fresh", "lift_fresh_copy", "lift", "flip", "roll", "view_copy",
               "permute_copy", "transpose_copy", "unsqueeze_copy", "squeeze_copy", "alias_copy", "detach_copy",
               "numpy_T", "mT", "adjoint", "movedim", "moveaxis", "unflatten", "swapaxes", "swapdims", "ravel", "fliplr", "flipud",
               "rot90", "atleast_1d", "atleast_2d", "atleast_3d", "pixel_unshuffle")
)  # fmt: skip
# ``aten.view.dtype`` reads other bits.
PRESERVING_VIEWS -= {aten.view.dtype, aten.view_copy.dtype, *(op for op in PRESERVING_VIEWS if op._overloadname == "Sequence")}

# Ops whose result holds some elements of their first argument, unchanged, and no other. Not ``as_strided``: it reads the memory
# around a view.
SELECTIONS = overloads(
    "expand", "expand_copy", "broadcast_to", "slice", "slice_copy", "select", "select_copy", "narrow", "narrow_copy", "diagonal",
    "diagonal_copy", "unfold", "unfold_copy", "repeat", "tile", "index_select", "gather", "index",
    "_unsafe_index", "take", "take_along_dim", "masked_select", "sort", "msort", "split", "split_with_sizes", "unbind", "chunk",
    "tensor_split", "split_copy", "split_with_sizes_copy", "unbind_copy", "amax", "amin", "cummax", "cummin", "expand_as", "view_as",
    "reshape_as", "unsafe_split", "unsafe_split_with_sizes", "unsafe_chunk", "embedding",
    "reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d", "pixel_shuffle", "channel_shuffle",
)  # fmt: skip


@rule(*PRESERVING_VIEWS, *(op for op in SELECTIONS if len(op._schema.returns) == 1))
def _first_argument(node: fx.Node, ranges: Ranges) -> Bounds:
    return ranges.read(arg(node, 0, "self"))


@rule(aten.repeat_interleave.self_Tensor, aten.repeat_interleave.self_int)
def _repeat_interleave(node: fx.Node, ranges: Ranges) -> Bounds:
    return ranges.read(node.args[0])


@rule(aten.repeat_interleave.Tensor)
def _repeat_positions(node: fx.Node, ranges: Ranges) -> Bounds:
    return index_into(ranges, [shape_of(node.args[0])])


@rule(aten.tril.default, aten.triu.default)
def _with_zero(node: fx.Node, ranges: Ranges) -> Bounds:
    bounds = ranges.read(node.args[0])
    return join((0, 0), bounds) if bounds else None


@rule(aten._to_copy.default, *overloads("to", "type_as"))
def _cast(node: fx.Node, ranges: Ranges) -> Bounds:
    source = node.args[0]
    bounds = ranges.read(source)
    if bounds is not None or not isinstance(source, fx.Node):
        return bounds
    from nxfx.analysis.float_ranges import bound

    floats = bound(ranges, source)
    ranges.lean()
    return (math.trunc(floats[0]), math.trunc(floats[1])) if floats and all(map(math.isfinite, floats)) else None


@rule(aten.item.default, aten._local_scalar_dense.default)
def _item(node: fx.Node, ranges: Ranges) -> Bounds:
    return ranges.read(node.args[0])
