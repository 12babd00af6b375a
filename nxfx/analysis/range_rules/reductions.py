"""Reductions, scans, positions in a dimension, products of matrices."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import fx

from nxfx.analysis.intervals import Bounds, Interval, Ranges, arg, join
from nxfx.analysis.range_rules.table import count_of, index_into, joined, operand, overloads, products, reduced_count, rule, shape_of

aten = torch.ops.aten


@rule(aten.sum.default, aten.sum.dim_IntList)
def _sum(node: fx.Node, ranges: Ranges) -> Bounds:
    a = ranges.read(node.args[0])
    count = reduced_count(ranges, node.args[0], arg(node, 1, "dim") if node.target is aten.sum.dim_IntList else None)
    if a is None or count is None:
        return None
    return _repeated(a, count)


@rule(*overloads("prod"))
def _prod(node: fx.Node, ranges: Ranges) -> Bounds:
    a = ranges.read(node.args[0])
    dim = None if node.target is aten.prod.default else arg(node, 1, "dim")
    count = reduced_count(ranges, node.args[0], dim)
    return powers_of_any(a, count) if a and count else None


def powers_of_any(a: Interval, count: Interval) -> Interval | None:
    """Bounds of a product of ``count`` values, each anywhere in ``a``."""
    most = max(abs(a[0]), abs(a[1]))
    if most > 1 and count[1] * math.log2(most) > 70:
        return None
    high = most ** count[1] if most > 1 else most
    high = max(high, 1) if count[0] == 0 else high
    if a[0] < 0:
        return -high, high
    return (a[0] ** min(count[0], 64) if a[0] > 0 and count[0] else min(a[0], 1)), high


@rule(aten.cumsum.default)
def _cumsum(node: fx.Node, ranges: Ranges) -> Bounds:
    a = ranges.read(node.args[0])
    count = reduced_count(ranges, node.args[0], arg(node, 1, "dim"))
    return (min(a[0], count[1] * a[0]), max(a[1], count[1] * a[1])) if a and count else None


@rule(aten.cumprod.default)
def _cumprod(node: fx.Node, ranges: Ranges) -> Bounds:
    a = ranges.read(node.args[0])
    count = reduced_count(ranges, node.args[0], arg(node, 1, "dim"))
    return powers_of_any(a, (min(1, count[0]), count[1])) if a and count else None


@rule(aten.max.default, aten.min.default, aten.median.default, aten.nanmedian.default)
def _one_of_all(node: fx.Node, ranges: Ranges) -> Bounds:
    return ranges.read(node.args[0])


def _dim_index(node: fx.Node, ranges: Ranges, position: int, default: int | None) -> Interval | None:
    count = reduced_count(ranges, node.args[0], arg(node, position, "dim", default))
    return (0, max(count[1] - 1, 0)) if count else None


@rule(*overloads("argmax", "argmin"))
def _arg_extremum(node: fx.Node, ranges: Ranges) -> Bounds:
    return _dim_index(node, ranges, 1, None)


@rule(aten.argsort.default)
def _argsort(node: fx.Node, ranges: Ranges) -> Bounds:
    return _dim_index(node, ranges, 1, -1)


@rule(aten.argsort.stable)
def _argsort_stable(node: fx.Node, ranges: Ranges) -> Bounds:
    return _dim_index(node, ranges, 9, -1)


@rule(aten.max.dim, aten.min.dim, aten.cummax.default, aten.cummin.default, aten.sort.default, aten.median.dim, aten.mode.default,
       aten.nanmedian.dim)  # fmt: skip
def _value_and_index(node: fx.Node, ranges: Ranges) -> Bounds:
    return [ranges.read(node.args[0]), _dim_index(node, ranges, 1, -1)]


@rule(aten.sort.stable)
def _sort_stable(node: fx.Node, ranges: Ranges) -> Bounds:
    dim = node.kwargs.get("dim", node.args[2] if len(node.args) > 2 else -1)
    count = reduced_count(ranges, node.args[0], dim)
    return [ranges.read(node.args[0]), (0, max(count[1] - 1, 0)) if count else None]


@rule(aten.topk.default, aten.kthvalue.default)
def _topk(node: fx.Node, ranges: Ranges) -> Bounds:
    return [ranges.read(node.args[0]), _dim_index(node, ranges, 2, -1)]


@rule(*overloads("nonzero", "nonzero_numpy", "nonzero_static", "argwhere"))
def _nonzero(node: fx.Node, ranges: Ranges) -> Bounds:
    found = index_into(ranges, [shape_of(node.args[0])])
    if node.target is getattr(aten.nonzero_static, "default", None):
        return join(found, operand(node, ranges, node.kwargs.get("fill_value", -1))) if found else None
    return found


@rule(*overloads("count_nonzero"))
def _count_nonzero(node: fx.Node, ranges: Ranges) -> Bounds:
    count = reduced_count(ranges, node.args[0], arg(node, 1, "dim"))
    return (0, count[1]) if count else None


@rule(aten.bucketize.Tensor, aten.bucketize.Scalar)
def _bucketize(node: fx.Node, ranges: Ranges) -> Bounds:
    shape = shape_of(node.args[1])
    return (0, count_of(ranges, shape)[1]) if shape is not None else None


@rule(aten.searchsorted.Tensor, aten.searchsorted.Scalar)
def _searchsorted(node: fx.Node, ranges: Ranges) -> Bounds:
    shape = shape_of(node.args[0])
    return (0, ranges.symbolic(shape[-1])[1]) if shape else None


@rule(aten.bincount.default)
def _bincount(node: fx.Node, ranges: Ranges) -> Bounds:
    shape = shape_of(node.args[0])
    if shape is None or arg(node, 1, "weights") is not None:
        return None
    return 0, count_of(ranges, shape)[1]


@rule(aten.multinomial.default)
def _multinomial(node: fx.Node, ranges: Ranges) -> Bounds:
    shape = shape_of(node.args[0])
    return (0, max(ranges.symbolic(shape[-1])[1] - 1, 0)) if shape else None


@rule(*overloads("max_pool2d_with_indices", "max_pool3d_with_indices", "adaptive_max_pool2d", "adaptive_max_pool3d"))
def _pool_indices(node: fx.Node, ranges: Ranges) -> Bounds:
    shape = shape_of(node.args[0])
    if shape is None:
        return None
    spatial = 3 if "3d" in node.target.__name__ else 2  # type: ignore[union-attr]
    return [ranges.read(node.args[0]), (0, max(count_of(ranges, shape[-spatial:])[1] - 1, 0))]


@rule(aten.mm.default, aten.bmm.default, aten.matmul.default, aten.dot.default, aten.mv.default)
def _matmul(node: fx.Node, ranges: Ranges) -> Bounds:
    a, b = ranges.read(node.args[0]), ranges.read(node.args[1])
    shape = shape_of(node.args[0])
    if a is None or b is None or not shape:
        return None
    return _repeated(products(a, b), ranges.symbolic(shape[-1]))


@rule(aten.outer.default)
def _outer(node: fx.Node, ranges: Ranges) -> Bounds:
    a, b = ranges.read(node.args[0]), ranges.read(node.args[1])
    return products(a, b) if a and b else None


@rule(aten.einsum.default)
def _einsum(node: fx.Node, ranges: Ranges) -> Bounds:
    """Each element is a sum, over the labels that the result has not, of products of one element of each operand."""
    equation, operands = node.args[0], node.args[1]
    if not isinstance(equation, str) or "." in equation or not isinstance(operands, (list, tuple)):
        return None
    inputs, _, result = equation.replace(" ", "").partition("->")
    labels = inputs.split(",")
    if not _ or len(labels) != len(operands):
        return None
    sizes: dict[str, Any] = {}
    each: Interval = (1, 1)
    for names, value in zip(labels, operands, strict=True):
        shape, bounds = shape_of(value), ranges.read(value)
        if shape is None or bounds is None or len(shape) != len(names):
            return None
        sizes.update(zip(names, shape, strict=True))
        each = products(each, bounds)
    return _repeated(each, count_of(ranges, [size for name, size in sizes.items() if name not in result]))


def _repeated(each: Interval, count: Interval) -> Interval:
    """The sum of ``count`` values, each anywhere in ``each``. A sum of some of them lies between 0 and these bounds."""
    return min(each[0] * count[0], each[0] * count[1]), max(each[1] * count[0], each[1] * count[1])


@rule(aten.diff.default)
def _diff(node: fx.Node, ranges: Ranges) -> Bounds:
    values = [v for v in (node.args[0], arg(node, 3, "prepend"), arg(node, 4, "append")) if v is not None]
    found = joined(node, ranges, values)
    if not isinstance(found, tuple) or arg(node, 1, "n", 1) != 1:
        return None
    return found[0] - found[1], found[1] - found[0]


@rule(*overloads("meshgrid"))
def _meshgrid(node: fx.Node, ranges: Ranges) -> Bounds:
    tensors = node.args[0]
    return [ranges.read(t) for t in tensors] if isinstance(tensors, (list, tuple)) else None


@rule(operator.getitem)
def _getitem(node: fx.Node, ranges: Ranges) -> Bounds:
    source, index = node.args
    return ranges.read_output(source, index) if isinstance(source, fx.Node) and isinstance(index, int) else None
