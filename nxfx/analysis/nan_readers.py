"""Who looks for the nan of a row that is masked whole: ``softmax(scores + mask).nan_to_num()``."""

from __future__ import annotations

import torch
from torch import fx

from nxfx.analysis.float_ops import FAMILIES, Family
from nxfx.analysis.intervals import arg
from nxfx.analysis.range_rules import overloads

aten = torch.ops.aten

_READERS = frozenset(overloads("nan_to_num", "isnan", "isfinite"))
# What makes nan of a nan, and zero of a zero row beside finite numbers.
_PASSES = frozenset(overloads("dropout", "mul", "matmul", "bmm", "mm"))
_FAR = 32


def nan_readers(node: fx.Node) -> list[fx.Node]:
    """The nodes that tell a nan of ``node`` from a number, as it is, moved, or after a product."""
    pending, seen, found = [node], {node}, []
    for reached in pending:
        for user in reached.users:
            compares = user.target in (aten.ne.Tensor, aten.eq.Tensor) and user.args[0] is user.args[1]
            if user.target in _READERS or compares:
                found.append(user)
            elif (_moves(user) or user.target in _PASSES) and user not in seen and len(seen) < _FAR:
                seen.add(user)
                pending.append(user)
    return found


def make_zero(readers: list[fx.Node]) -> bool:
    """Whether each of them makes zero of a nan."""
    return all(r.target is aten.nan_to_num.default and not arg(r, 1, "nan") for r in readers)


def _moves(node: fx.Node) -> bool:
    return FAMILIES.get(node.target) in (Family.MOVE, Family.CAST)
