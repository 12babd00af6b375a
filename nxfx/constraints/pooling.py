"""Dilated max-pooling: a maximum of strided slices, where the compiler has no dilated window."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from nxfx.analysis.intervals import arg
from nxfx.constraints.base import Checker, Constraint, Rule, items
from nxfx.constraints.operators import op_name
from nxfx.graph import meta
from nxfx.graph.slices import is_static

aten = torch.ops.aten

WINDOW = Constraint(
    "NX505",
    "NCC_EVRF018",
    "the compiler has no pooling with dilated windows",
    "use dilation=1, or take the maximum of strided slices: x[..., i * dilation :: stride] for each i of the kernel",
)

_MOST_TAPS = 64  # slices along all axes together


def _max_pool(spatial: int) -> Rule:
    def rule(check: Checker, node: fx.Node) -> None:
        """``max_pool*d(self, kernel_size, stride, padding, dilation, ceil_mode)``, with or without indices."""
        if all(d == 1 for d in _per_axis(arg(node, 4, "dilation", 1), spatial)):
            return
        if _is_rewritable(node, spatial):
            check.later(lambda: _as_slices(check, node, spatial))
        else:
            check.report(node, WINDOW, f"`{op_name(node)}` with a dilation")

    return rule


def _is_rewritable(node: fx.Node, spatial: int) -> bool:
    """A float input of static size, few enough taps, and no reader of the indices."""
    operand = node.args[0]
    value = operand.meta["val"] if meta.is_tensor(operand) else None  # type: ignore[union-attr]
    if value is None or not value.is_floating_point() or not is_static(*value.shape):
        return False
    several = isinstance(node.meta["val"], (list, tuple))
    readers = items(node) if several else []
    return readers is not None and all(i == 0 for i, _ in readers) and sum(_per_axis(node.args[1], spatial)) <= _MOST_TAPS


def _per_axis(sizes: Any, spatial: int) -> list[int]:
    listed: list[int] = list(sizes) if isinstance(sizes, (list, tuple)) else [sizes]
    return listed * spatial if len(listed) == 1 else listed


def _as_slices(check: Checker, node: fx.Node, spatial: int) -> None:
    """One axis after the other, from the last: the first of equal maxima in row-major order wins either way, and nan spreads."""
    x, kernel = node.args[0], _per_axis(node.args[1], spatial)
    assert isinstance(x, fx.Node)
    stride = _per_axis(arg(node, 2, "stride") or kernel, spatial)
    padding, dilation = (_per_axis(arg(node, i, n, d), spatial) for i, n, d in ((3, "padding", 0), (4, "dilation", 1)))
    readers = items(node) if isinstance(node.meta["val"], (list, tuple)) else None
    shape = (node.meta["val"][0] if readers is not None else node.meta["val"]).shape
    rank = x.meta["val"].dim()
    with check.build.before(node):
        for axis in reversed(range(spatial)):
            dim = rank - spatial + axis
            x = _along(check, x, dim, kernel[axis], stride[axis], padding[axis], dilation[axis], shape[dim])
    for read in [reader for _, reader in readers] if readers is not None else [node]:
        read.replace_all_uses_with(x)
        if read is not node:
            read.graph.erase_node(read)
    check.rewritten(node, "dilated-max-pool", f"{op_name(node)} with a dilation", "maximum of strided slices")


def _along(check: Checker, x: fx.Node, dim: int, kernel: int, stride: int, padding: int, dilation: int, count: int) -> fx.Node:
    """The maximum over the windows of one axis; padding is −inf, as in the operator's definition."""
    build, size, rank = check.build, x.meta["val"].shape[dim], x.meta["val"].dim()
    reach = (count - 1) * stride + 1
    after = max(0, (kernel - 1) * dilation + reach - size - padding)
    if padding or after:
        x = build.call(aten.constant_pad_nd.default, x, [0, 0] * (rank - 1 - dim) + [padding, after], -math.inf)
    best: fx.Node | None = None
    for tap in range(kernel):
        start = tap * dilation
        part = build.call(aten.slice.Tensor, x, dim, start, start + reach, stride)
        best = part if best is None else _larger(check, best, part)
    assert best is not None
    return best


def _larger(check: Checker, best: fx.Node, part: fx.Node) -> fx.Node:
    """``part`` where it is larger or nan: `maximum` does not say which of 0.0 and -0.0 it takes."""
    build = check.build
    larger = build.call(aten.gt.Tensor, part, best)
    taken = build.call(aten.logical_or.default, larger, build.call(aten.ne.Tensor, part, part))
    return build.call(aten.where.self, taken, part, best)


RULES: dict[Any, Rule] = {
    aten.max_pool1d.default: _max_pool(1),
    aten.max_pool2d.default: _max_pool(2),
    aten.max_pool3d.default: _max_pool(3),
    aten.max_pool1d_with_indices.default: _max_pool(1),
    aten.max_pool2d_with_indices.default: _max_pool(2),
    aten.max_pool3d_with_indices.default: _max_pool(3),
}
