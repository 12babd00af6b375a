"""Matrix products that sum over one element, and the broadcast products they are.

``inv_freq[:, None] @ positions[None, :]`` is the usual one. A compiler that runs float32 matrix products in bf16
(neuronx-cc's ``--auto-cast=matmult``) rounds its operands; the broadcast product computes the same and is left alone.
"""

from __future__ import annotations

import math
import string
from typing import Any

import torch
from torch import fx

from nxfx.graph import matrix_products, meta
from nxfx.graph.builder import NodeBuilder

aten = torch.ops.aten

# The products of two matrices that are known here, and where the addend is, in those that have one.
_PAIRS = frozenset([aten.matmul.default, aten.mm.default, aten.bmm.default, aten.linear.default, aten.addmm.default, aten.baddbmm.default])
_ADDEND: dict[Any, int] = {aten.linear.default: 2, aten.addmm.default: 0, aten.baddbmm.default: 0}
PRODUCTS = frozenset({*_PAIRS, aten.einsum.default})


# A sum of so many terms is small enough for element-wise arithmetic, as long as there are no more multiplications than that: a small
# part of any model. Beyond, a matrix engine is what they are for.
FEW = 4
_MOST_MULTIPLICATIONS = 1 << 24


def operands(node: fx.Node) -> tuple[fx.Node, ...] | None:
    """The two factors of a matrix product with one term a sum, or a few, and what is added to it; None for any other."""
    if node.target is aten.einsum.default:
        return tuple(node.args[1]) if labels_of(node) is not None else None  # type: ignore[arg-type]
    count = terms(node)
    sizes = [s for s in meta.val(node).shape if type(s) is int] if count is not None else []  # of a dynamic one nothing is known
    if count is None or not 1 <= count <= FEW or (count > 1 and count * math.prod(sizes) > _MOST_MULTIPLICATIONS):
        return None
    added = _addend(node)
    return factors(node) if added is None else (*factors(node), added)


def factors(node: fx.Node) -> tuple[Any, Any]:
    """The factors of a matrix product other than an einsum."""
    left, right = matrix_products.factor_positions(node.target)
    return node.args[left], node.args[right]


def spread(build: NodeBuilder, node: fx.Node) -> fx.Node:
    """Replace the product ``node``, which has one term a sum, by a broadcast ``mul`` of the same shape and strides."""
    labels, pair = labels_of(node), operands(node)
    if labels is None or pair is None:
        return spread_terms(build, node)
    a, b = pair
    with build.before(node):
        product = build.call(aten.mul.Tensor, aligned(build, a, labels[0], labels[2]), aligned(build, b, labels[1], labels[2]))
    return _replaced(build, node, product)


def terms(node: fx.Node) -> int | None:
    """How many terms each sum of a matrix product adds; None where that is dynamic, or for an einsum or a vector."""
    if node.target not in _PAIRS or node.kwargs:  # of kwargs there are alpha and beta
        return None
    a, b = (meta.val(n) if isinstance(n, fx.Node) else None for n in factors(node))
    if a is None or b is None or b.dim() < 2 or (a.dim() < 2 and node.target is not aten.linear.default):
        return None
    # A region that torch.autocast governs gives another dtype than the operands' own.
    if not a.dtype == b.dtype == meta.dtype_of(node) or ((added := _addend(node)) is not None and meta.dtype_of(added) != a.dtype):
        return None
    return a.shape[-1] if type(a.shape[-1]) is int else None


def spread_terms(build: NodeBuilder, node: fx.Node) -> fx.Node:
    """Replace a matrix product with few terms a sum by the sum of as many broadcast products, in order."""
    a, b = factors(node)
    total, count = _addend(node), terms(node)
    with build.before(node):
        for k in range(count or 0):
            column = a if count == 1 else build.call(aten.slice.Tensor, a, -1, k, k + 1)
            if node.target is aten.linear.default:
                row = build.call(aten.select.int, b, 1, k)
            else:
                row = b if count == 1 else build.call(aten.slice.Tensor, b, -2, k, k + 1)
            total = build.call(aten.mul.Tensor, column, row) if total is None else build.call(aten.addcmul.default, total, column, row)
    assert total is not None
    return _replaced(build, node, total)


def _replaced(build: NodeBuilder, node: fx.Node, product: fx.Node) -> fx.Node:
    if str(meta.val(product).stride()) != str(meta.val(node).stride()):
        with build.before(node):
            product = build.call(aten.clone.default, product, memory_format=torch.contiguous_format)
    node.replace_all_uses_with(product)
    build.graph.erase_node(node)
    return product


def _addend(node: fx.Node) -> fx.Node | None:
    position = _ADDEND.get(node.target, len(node.args))
    added = node.args[position] if position < len(node.args) else None
    return added if isinstance(added, fx.Node) else None


def labels_of(node: fx.Node) -> tuple[str, str, str] | None:
    """``("i", "j", "ij")`` for an einsum of two operands that sums over nothing; an ellipsis gets letters of its own."""
    if node.target is not aten.einsum.default:
        return None
    equation, factors = str(node.args[0]).replace(" ", ""), node.args[1]
    inputs, arrow, output = equation.partition("->")
    parts = inputs.split(",")
    if len(parts) != 2 or len(factors) != 2:  # type: ignore[arg-type]
        return None
    unnamed = [meta.val(f).dim() - len(p.replace("...", "")) for p, f in zip(parts, factors, strict=True)]  # type: ignore[arg-type]
    letters = "".join(c for c in string.ascii_letters if c not in equation)[: max(unnamed)]
    if not arrow:
        output = "..." * ("..." in inputs) + "".join(sorted(c for c in set(inputs) - {",", "."} if inputs.count(c) == 1))
    left, right = (p.replace("...", letters[len(letters) - n :]) for p, n in zip(parts, unnamed, strict=True))
    output = output.replace("...", letters)
    if any(len(set(p)) != len(p) for p in (left, right, output)):
        return None
    return (left, right, output) if set(left) | set(right) == set(output) else None


def aligned(build: NodeBuilder, node: fx.Node, labels: str, output: str) -> fx.Node:
    order = sorted(range(len(labels)), key=lambda i: output.index(labels[i]))
    if order != sorted(order):
        node = build.call(aten.permute.default, node, order)
    for position, label in enumerate(output):
        if label not in labels:
            node = build.call(aten.unsqueeze.default, node, position)
    return node
