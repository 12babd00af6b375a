"""Expressions of ``x[mask]`` that mean the same of all of ``x``: ``x[mask] * 2 + 1`` is ``(x * 2 + 1)[mask]``."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from nxfx.graph import meta
from nxfx.graph.masks import has_shape
from nxfx.graph.slices import is_static

aten = torch.ops.aten

# Each element from the same element of the operands, correctly rounded, so equal wherever it stands in memory; defined for
# every element (no division of integers). `exp` and its kin round differently at the end of a vector.
EXACT = frozenset(
    {
        aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar, aten.rsub.Scalar, aten.rsub.Tensor,
        aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar, aten.neg.default, aten.abs.default,
        aten.sign.default, aten.relu.default, aten.floor.default, aten.ceil.default, aten.round.default,
        aten.trunc.default, aten.clamp.default, aten.clamp.Tensor, aten.clamp_min.default, aten.clamp_max.default,
        aten.maximum.default, aten.minimum.default, aten.where.self, aten.isnan.default, aten.isinf.default,
        aten.logical_not.default, aten.logical_and.default, aten.logical_or.default, aten.logical_xor.default,
        aten.bitwise_not.default, aten.bitwise_and.Tensor, aten.bitwise_or.Tensor, aten.bitwise_xor.Tensor,
        aten.bitwise_and.Scalar, aten.bitwise_or.Scalar, aten.bitwise_xor.Scalar,
        aten.eq.Tensor, aten.eq.Scalar, aten.ne.Tensor, aten.ne.Scalar, aten.lt.Tensor, aten.lt.Scalar,
        aten.le.Tensor, aten.le.Scalar, aten.gt.Tensor, aten.gt.Scalar, aten.ge.Tensor, aten.ge.Scalar,
        aten._to_copy.default, aten.clone.default, aten.alias.default, aten.detach.default, aten.masked_fill.Scalar,
    }
)  # fmt: skip
_LARGEST = 64  # nodes of an expression


def selected(node: Any, indices: Any, shape: Any) -> fx.Node | None:
    """The tensor of ``shape`` of which ``node`` is the part at ``indices``."""
    if not isinstance(node, fx.Node) or node.target is not aten.index.Tensor or not _is_same(node.args[1], indices):
        return None
    whole: Any = node.args[0]
    return whole if has_shape(whole, shape) else None


def _is_same(one: Any, other: Any, depth: int = 8) -> bool:
    """Whether both are certainly equal: one node, or one op of equal operands (``x[m[:, 0]]`` takes the column twice)."""
    if isinstance(one, (list, tuple)):
        equal = isinstance(other, (list, tuple)) and len(one) == len(other)
        return equal and all(_is_same(a, b, depth) for a, b in zip(one, other, strict=True))
    if not isinstance(one, fx.Node) or not isinstance(other, fx.Node) or one is other:
        return one is other or type(one) is type(other) and not isinstance(one, fx.Node) and bool(one == other)
    if depth == 0 or one.op != "call_function" or one.target is not other.target or one.kwargs.keys() != other.kwargs.keys():
        return False
    op = one.target
    if not isinstance(op, torch._ops.OpOverload) or op._schema.is_mutable or torch.Tag.nondeterministic_seeded in op.tags:
        return False
    return _is_same(one.args, other.args, depth - 1) and _is_same(list(one.kwargs.values()), list(other.kwargs.values()), depth - 1)


def drop_checks(part: fx.Node, limit: Any) -> None:
    """Erase the checks, always true, that capture adds on the dtype and the size of masked elements: they keep them alive.

    Args:
        limit: how many elements the mask has.
    """
    graph = part.graph
    for check in [user for user in part.users if user.target is aten._assert_tensor_metadata.default]:
        graph.erase_node(check)
    for size in [user for user in part.users if user.target is aten.sym_size.int]:
        for comparison in list(size.users):
            if comparison.target is aten.sym_constrain_range_for_size.default and len(comparison.args) == 1 and not comparison.kwargs:
                graph.erase_node(comparison)  # torch 2.9 says so of each size that depends on data
                continue
            op, bound = comparison.target, comparison.args[1] if len(comparison.args) > 1 else None
            certain = is_static(bound, limit) and (op is operator.ge and bound <= 0 or op is operator.le and bound >= limit)  # type: ignore[operator]
            if certain and all(user.target is aten._assert_scalar.default for user in comparison.users):
                for check in [*comparison.users, comparison]:
                    graph.erase_node(check)
        if not size.users:
            graph.erase_node(size)


def is_elementwise(root: fx.Node, indices: Any, shape: Any, trailing: int) -> bool:
    """Whether ``root`` can be made of whole tensors of ``shape``, and then be taken at ``indices``.

    Args:
        trailing: how many dims after the masked ones an operand of another origin may have.
    """
    stack, seen = [root], set()
    while stack:
        node = stack.pop()
        if node in seen or selected(node, indices, shape) is not None:
            continue
        seen.add(node)
        if node.op != "call_function" or node.target not in EXACT or len(seen) > _LARGEST or "alpha" in node.kwargs:
            return False
        if node.kwargs.get("memory_format") not in (None, torch.preserve_format):
            return False
        of_parts = False
        for operand in node.all_input_nodes:
            if not meta.is_tensor(operand):
                return False
            if is_static(*meta.val(operand).shape) and meta.val(operand).dim() <= trailing:
                continue
            stack.append(operand)
            of_parts = True
        if not of_parts:
            return False
    return True
