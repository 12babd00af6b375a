"""Whether a row of masked scores can be left out whole."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from nxfx.analysis.constants import constant_value
from nxfx.analysis.float_ops import FAMILIES, Family, op_name
from nxfx.analysis.intervals import arg
from nxfx.analysis.mask_levels import MaskLevels
from nxfx.analysis.mask_rules import LOW, RULES, SAME, moved_from, operands
from nxfx.analysis.provenance import Source
from nxfx.analysis.range_rules import overloads
from nxfx.analysis.views import COPIES, RESHAPES
from nxfx.graph import meta

aten = torch.ops.aten

_ADDS = frozenset([aten.add.Tensor, aten.add.Scalar, aten.baddbmm.default, aten.addmm.default])
_SCALES = frozenset([aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar])
_SHOWS = frozenset([*COPIES, *RESHAPES, *overloads("expand", "contiguous")])
_LARGEST_OF = frozenset([*overloads("topk", "sort", "amax"), aten.max.dim])


def may_be_full(levels: MaskLevels, root: fx.Node, dim: int, sources: Mapping[str, Source]) -> bool:
    """False where each row of ``root`` over ``dim`` keeps something: all masks are constants that do so together, or the only
    one chooses by the scores themselves.
    """
    dim = dim % meta.val(root).dim() - meta.val(root).dim()
    if dim < -2:
        return True
    masks: list[fx.Node] = []
    choices, stack = 0, [root]
    while stack:
        node = stack.pop()
        if all(level.eager >= LOW for level in levels.of(node)):
            continue
        if not any(level.scored for level in levels.of(node)):
            masks.append(node)
        elif dim == -1 and _keeps_something(levels, node):
            choices += 1
        elif _keeps_rows(node):
            stack += operands(node)
        else:
            return True
    return choices + bool(masks) > 1 or (not choices and not _keep_together(masks, dim, sources))


def _keep_together(masks: list[fx.Node], dim: int, sources: Mapping[str, Source]) -> bool:
    left_out = torch.zeros(1, 1, dtype=torch.bool)
    for mask in masks:
        held = constant_value(mask, sources)
        if held is None or (len(masks) > 1 and any(size != 1 for size in held.shape[:-2])):
            return False
        left_out = left_out | ((held < LOW).reshape(held.shape[-2:]) if len(masks) > 1 else held < LOW)
    return not bool(left_out.all(dim).any())


def _keeps_rows(node: fx.Node) -> bool:
    """Whether its rows are those of its operands."""
    if node.target in _ADDS or node.target in _SCALES or FAMILIES.get(node.target) is Family.CAST:
        return True
    return node.target in _SHOWS and meta.val(node).shape[-2:] == meta.val(operands(node)[0]).shape[-2:]


def _keeps_something(levels: MaskLevels, node: fx.Node) -> bool:
    """A column of its own beside the masked ones (an attention sink), or a comparison that the largest score passes (top-k)."""
    if node.target is aten.cat.default:
        last = arg(node, 1, "dim", 0) % meta.val(node).dim() == meta.val(node).dim() - 1
        return last and any(all(level.eager >= LOW for level in levels.of(part)) for part in operands(node))
    picks = operands(node)
    kept = [n for n in picks if all(level.eager >= LOW for level in levels.of(n))]
    if len(kept) != 1 or op_name(node) not in ("where", "masked_fill"):
        return False
    takes_true = op_name(node) == "where" and node.args[1] is kept[0]
    condition = node.args[0] if op_name(node) == "where" else node.args[1]
    if not isinstance(condition, fx.Node) or condition.target is not (aten.ge.Tensor if takes_true else aten.lt.Tensor):
        return False
    return condition.args[0] is kept[0] and _is_of_its_largest(condition.args[1], kept[0])  # type: ignore[arg-type]


def _is_of_its_largest(value: fx.Node, scores: fx.Node) -> bool:
    """Whether ``value`` is, for each row of ``scores``, one of its elements."""
    if meta.val(value).shape[:-1] != meta.val(scores).shape[:-1]:
        return False
    while value.target not in _LARGEST_OF and RULES.get(value.target) is SAME and operands(value):
        value = operands(value)[0]
    if value.target not in _LARGEST_OF or moved_from(operands(value)[0]) is not moved_from(scores):
        return False
    dim = arg(value, 2 if op_name(value) == "topk" else 1, "dim", -1)
    dim = dim[0] if isinstance(dim, (list, tuple)) and len(dim) == 1 else dim
    return isinstance(dim, int) and dim % meta.val(scores).dim() == meta.val(scores).dim() - 1
