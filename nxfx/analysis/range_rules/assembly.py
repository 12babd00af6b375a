"""Ops that put values together: where, cat, masked and indexed writes."""

from __future__ import annotations

import torch
from torch import fx

from nxfx.analysis import dtype_rules
from nxfx.analysis.intervals import Bounds, Interval, Ranges, arg
from nxfx.analysis.range_rules.table import count_of, index_into, joined, operand, overloads, products, rule, shape_of
from nxfx.graph import meta

aten = torch.ops.aten


@rule(*overloads("where"))
def _where(node: fx.Node, ranges: Ranges) -> Bounds:
    return joined(node, ranges, node.args[1:3]) if len(node.args) == 3 else index_into(ranges, [shape_of(node.args[0])])


@rule(*overloads("cat", "concat", "stack", "hstack", "vstack"))
def _cat(node: fx.Node, ranges: Ranges) -> Bounds:
    tensors = arg(node, 0, "tensors")
    return joined(node, ranges, tensors)


@rule(*overloads("masked_fill"))
def _masked_fill(node: fx.Node, ranges: Ranges) -> Bounds:
    return joined(node, ranges, (node.args[0], arg(node, 2, "value")))


@rule(*overloads("masked_scatter", "masked_scatter_backward"))
def _masked_scatter(node: fx.Node, ranges: Ranges) -> Bounds:
    return joined(node, ranges, (node.args[0], node.args[2])) if node.target is aten.masked_scatter.default else None


@rule(aten.fill.Scalar, aten.fill.Tensor)
def _fill(node: fx.Node, ranges: Ranges) -> Bounds:
    return operand(node, ranges, arg(node, 1, "value"))


@rule(aten.copy.default)
def _copy(node: fx.Node, ranges: Ranges) -> Bounds:
    source = node.args[1]
    if meta.dtype_of(source) is not None and not dtype_rules.is_integral(meta.dtype_of(source)):
        return None
    return operand(node, ranges, source)


@rule(*overloads("constant_pad_nd", "pad"))
def _pad(node: fx.Node, ranges: Ranges) -> Bounds:
    if node.target is aten.constant_pad_nd.default:
        return joined(node, ranges, (node.args[0], arg(node, 2, "value", 0)))
    if arg(node, 2, "mode", "constant") == "constant":
        return joined(node, ranges, (node.args[0], arg(node, 3, "value", 0) or 0))
    return ranges.read(node.args[0])


@rule(*overloads("slice_scatter", "select_scatter", "diagonal_scatter", "as_strided_scatter"))
def _view_scatter(node: fx.Node, ranges: Ranges) -> Bounds:
    return joined(node, ranges, node.args[:2])


@rule(aten.scatter.src, aten.scatter.value, aten.index_fill.int_Scalar, aten.index_fill.int_Tensor, aten.index_copy.default)
def _scatter(node: fx.Node, ranges: Ranges) -> Bounds:
    return joined(node, ranges, (node.args[0], node.args[3]))


@rule(aten.index_put.default, aten._unsafe_index_put.default)
def _index_put(node: fx.Node, ranges: Ranges) -> Bounds:
    base, values = node.args[0], node.args[2]
    if not arg(node, 3, "accumulate", False):
        return joined(node, ranges, (base, values))
    a, b = operand(node, ranges, base), operand(node, ranges, values)
    shapes = [shape_of(i) for i in (*arg(node, 1, "indices"), values) if i is not None]
    if any(s is None for s in shapes):
        return None
    # Each element of the broadcast values lands somewhere, at worst all on one place: the product bounds their number.
    writes = 1
    for shape in shapes:
        writes *= max(count_of(ranges, shape or ())[1], 1)
    return _accumulated(a, b, writes)


@rule(aten.scatter_add.default, aten.index_add.default)
def _scatter_add(node: fx.Node, ranges: Ranges) -> Bounds:
    a, b = operand(node, ranges, node.args[0]), operand(node, ranges, node.args[3])
    index = shape_of(node.args[2])
    if index is None:
        return None
    alpha = operand(node, ranges, node.kwargs.get("alpha", 1))
    return _accumulated(a, products(b, alpha), count_of(ranges, index)[1])


def _accumulated(base: Interval, added: Interval, times: int) -> Interval:
    return base[0] + times * min(added[0], 0), base[1] + times * max(added[1], 0)
