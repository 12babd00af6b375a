"""Matrix products that sum over one element, and the broadcast products they are.

``inv_freq[:, None] @ positions[None, :]`` is the usual one. A compiler that runs float32 matrix products in bf16
(neuronx-cc's ``--auto-cast=matmult``) rounds its operands; the broadcast product computes the same and is left alone.
"""

from __future__ import annotations

import torch
from torch import fx

from nxfx.graph import meta
from nxfx.graph.builder import NodeBuilder

aten = torch.ops.aten

PRODUCTS = frozenset({aten.matmul.default, aten.mm.default, aten.bmm.default, aten.einsum.default})


def operands(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two factors of a matrix product with one term a sum; None for any other."""
    if node.target is aten.einsum.default:
        return tuple(node.args[1]) if _labels(node) is not None else None  # type: ignore[arg-type]
    a, b = node.args[:2]
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
        return None
    left, right = meta.val(a), meta.val(b)
    if left.dim() < 2 or right.dim() < 2 or not _is_one(left.shape[-1]) or not _is_one(right.shape[-2]):
        return None
    # A region that torch.autocast governs gives another dtype than the operands' own.
    return (a, b) if left.dtype == right.dtype == meta.dtype_of(node) else None


def spread(build: NodeBuilder, node: fx.Node) -> fx.Node:
    """Replace the product ``node`` by a broadcast ``mul`` of the same shape and strides."""
    factors = operands(node)
    assert factors is not None
    a, b = factors
    with build.before(node):
        labels = _labels(node)
        if labels is not None:
            a, b = _aligned(build, a, labels[0], labels[2]), _aligned(build, b, labels[1], labels[2])
        product = build.call(aten.mul.Tensor, a, b)
        if str(meta.val(product).stride()) != str(meta.val(node).stride()):
            product = build.call(aten.clone.default, product, memory_format=torch.contiguous_format)
    node.replace_all_uses_with(product)
    build.graph.erase_node(node)
    return product


def terms(node: fx.Node) -> int | None:
    """How many terms each sum of a matrix product adds; None where that is dynamic, or for an einsum or a vector."""
    if node.target not in PRODUCTS or node.target is aten.einsum.default:
        return None
    a, b = (meta.val(n) if isinstance(n, fx.Node) else None for n in node.args[:2])
    if a is None or b is None or a.dim() < 2 or b.dim() < 2 or not a.dtype == b.dtype == meta.dtype_of(node):
        return None
    return a.shape[-1] if type(a.shape[-1]) is int else None


def spread_terms(build: NodeBuilder, node: fx.Node) -> fx.Node:
    """Replace a matrix product with few terms a sum by the sum of as many broadcast products, in order."""
    a, b = node.args[:2]
    total: fx.Node | None = None
    with build.before(node):
        for k in range(terms(node) or 0):
            column = build.call(aten.slice.Tensor, a, -1, k, k + 1)
            row = build.call(aten.slice.Tensor, b, -2, k, k + 1)
            total = build.call(aten.mul.Tensor, column, row) if total is None else build.call(aten.addcmul.default, total, column, row)
        assert total is not None
        if str(meta.val(total).stride()) != str(meta.val(node).stride()):
            total = build.call(aten.clone.default, total, memory_format=torch.contiguous_format)
    node.replace_all_uses_with(total)
    build.graph.erase_node(node)
    return total


def _is_one(size: object) -> bool:
    return type(size) is int and size == 1


def _labels(node: fx.Node) -> tuple[str, str, str] | None:
    """``("i", "j", "ij")`` for an einsum of two operands that sums over nothing."""
    if node.target is not aten.einsum.default:
        return None
    equation, factors = node.args[0], node.args[1]
    if not isinstance(equation, str) or "->" not in equation or "." in equation:
        return None
    inputs, output = equation.replace(" ", "").split("->")
    parts = inputs.split(",")
    if len(parts) != 2 or len(factors) != 2 or any(len(set(p)) != len(p) for p in (*parts, output)):  # type: ignore[arg-type]
        return None
    return (parts[0], parts[1], output) if set(parts[0]) | set(parts[1]) == set(output) else None


def _aligned(build: NodeBuilder, node: fx.Node, labels: str, output: str) -> fx.Node:
    order = sorted(range(len(labels)), key=lambda i: output.index(labels[i]))
    if order != sorted(order):
        node = build.call(aten.permute.default, node, order)
    for position, label in enumerate(output):
        if label not in labels:
            node = build.call(aten.unsqueeze.default, node, position)
    return node
