"""Who looks for the nan of a row that is masked whole: ``softmax(scores + mask).nan_to_num()``."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import fx

from nxfx.analysis.float_ops import FAMILIES, METADATA, Family, dtype_of
from nxfx.analysis.intervals import arg
from nxfx.analysis.range_rules import overloads
from nxfx.analysis.views import COPIES, RESHAPES
from nxfx.graph import meta, walk

aten = torch.ops.aten

_ANSWERS = frozenset(overloads("nan_to_num", "nansum", "nanmean", "nanmedian", "fmax", "fmin"))
_BLIND = METADATA | frozenset(overloads("isinf", "isposinf", "isneginf"))  # they say of a nan what they say of a number
_PRODUCTS = frozenset(overloads("matmul", "bmm", "mm"))
_ELEMENTWISE = frozenset(overloads("dropout", "mul"))
_SHOWS = frozenset([*COPIES, *RESHAPES, *overloads("expand", "contiguous", "flatten")])
_FAR = 32


class _Path(IntEnum):
    """What a value has to do with the softmax: where that is nan it is nan, and where that were zero it would be zero, ..."""

    ROWS = 0  # in the same rows
    ELEMENTS = 1  # in the same elements, wherever they are now
    MIXED = 2  # not so: others are added to it


@dataclass(frozen=True)
class NanReader:
    """A node that tells a nan from a number.

    Attributes:
        zeroed: it makes of a nan what it makes of a zero in the softmax.
    """

    node: fx.Node
    zeroed: bool


def nan_readers(node: fx.Node, dim: int) -> list[NanReader]:
    """The nodes that tell a nan of the softmax ``node`` over ``dim`` from a number.

    Every op hands a nan on, except those whose result is no float any more (a comparison, ``argmax``) or that exist for it.
    Not followed without end: a nan that went through a whole layer is nobody's mark.
    """
    start = _Path.ROWS if dim % meta.val(node).dim() == meta.val(node).dim() - 1 else _Path.ELEMENTS
    pending, seen, found = [(node, start)], {(node, start)}, []
    for reached, path in pending:
        for user in reached.users:
            if user.op != "call_function" or user.target in _BLIND or walk.is_higher_order(user):
                continue
            if user.target in _ANSWERS or not _is_float(user):
                found.append(NanReader(user, path is not _Path.MIXED and _takes_for_zero(user)))
                continue
            step = user, _after(reached, user, path)
            if step not in seen and len(seen) < _FAR:
                seen.add(step)
                pending.append(step)
    return found


def _after(reached: fx.Node, user: fx.Node, path: _Path) -> _Path:
    family = FAMILIES.get(user.target)
    if family is Family.CAST or user.target in _ELEMENTWISE:
        return path
    if user.target in _SHOWS and meta.val(user).shape[-1:] == meta.val(reached).shape[-1:]:
        return path
    if user.target in _PRODUCTS and path is _Path.ROWS and user.args[0] is reached is not user.args[1]:
        return _Path.ELEMENTS
    return max(path, _Path.ELEMENTS) if family is Family.MOVE else _Path.MIXED


def _takes_for_zero(reader: fx.Node) -> bool:
    return reader.target is aten.nansum.default or (reader.target is aten.nan_to_num.default and not arg(reader, 1, "nan"))


def _is_float(node: fx.Node) -> bool:
    dtype = dtype_of(node)
    return dtype is None or dtype.is_floating_point or dtype.is_complex
