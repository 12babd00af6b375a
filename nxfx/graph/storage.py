"""Memory of values in a functional graph: who shares it, and which strides views rest on."""

from __future__ import annotations

import torch
from torch import fx

from nxfx.graph import meta
from nxfx.graph.builder import NodeBuilder
from nxfx.graph.slices import is_static

aten = torch.ops.aten


def may_alias(node: fx.Node) -> bool:
    """Whether the result of ``node`` may share memory with an operand, or with the caller."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return True
    return any(result.alias_info is not None for result in node.target._schema.returns)


def escapes(node: fx.Node) -> bool:
    """Whether the memory of ``node`` may reach an output of the graph."""
    stack, seen = [node], {node}
    while stack:
        for user in stack.pop().users:
            if user.op == "output":
                return True
            if user not in seen and may_alias(user):
                seen.add(user)
                stack.append(user)
    return False


def with_strides_of(build: NodeBuilder, node: fx.Node, value: torch.Tensor) -> fx.Node:
    """``node`` with the strides of the dense ``value`` of its shape: views further down may rest on them."""
    own = meta.val(node)
    if not is_static(*value.shape, *value.stride(), *own.stride()) or value.numel() < 2:
        return node
    wide = [d for d in range(value.dim()) if value.shape[d] > 1]
    if all(own.stride(d) == value.stride(d) for d in wide):
        return node
    strides: tuple[int, ...] = value.stride()
    order = sorted(wide, key=lambda d: (-strides[d], d)) + [d for d in range(value.dim()) if value.shape[d] == 1]
    back = [order.index(d) for d in range(value.dim())]
    if back == list(range(value.dim())):
        return build.call(aten.clone.default, node, memory_format=torch.contiguous_format)
    inner = build.call(aten.permute.default, node, order)
    inner = build.call(aten.clone.default, inner, memory_format=torch.contiguous_format)
    return build.call(aten.permute.default, inner, back)
