"""Positions that a condition gave (``torch.where(c)``, ``c.nonzero()``), used to index back: the condition itself is the index.

``x[torch.where(c)] = v`` and ``i = torch.where(c)[0]; x[i] = v`` write where ``c`` holds, in the same order: that is ``x[c] = v``, which
has a data-flow form. The positions stay what they are for every other use.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from nxfx.capture import trace
from nxfx.capture.session import Session
from nxfx.graph import meta
from nxfx.report.rewrites import Kind


@dataclass(frozen=True)
class Found:
    """``positions`` are those of ``mask`` along its dimension ``dim``; None for all of them, a row each.

    Attributes:
        mask: a copy of the condition, as it was.
        version: of ``positions``: they may be written.
    """

    positions: torch.Tensor
    mask: torch.Tensor
    dim: int | None
    version: object


def on_where(session: Session, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``torch.where(condition)``; with three arguments it is an ordinary operation."""
    result = function(*args, **kwargs)
    return _noted(session, args[0], result) if len(args) == 1 and not kwargs and isinstance(result, tuple) else result


def on_nonzero(session: Session, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``nonzero`` and ``argwhere``."""
    result = function(*args, **kwargs)
    return _noted(session, args[0], result) if len(args) == 1 and kwargs.get("out") is None else result


def on_column(session: Session, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``squeeze``, ``flatten``, ``view``, ``reshape`` of the positions of a vector: one column, without its dimension of one."""
    result = function(*args, **kwargs)
    known = found(session, args[0])
    if known is not None and known.dim is None and known.mask.ndim == 1 and isinstance(result, torch.Tensor) and result.ndim == 1:
        _note(session, result, known.mask, 0)
    return result


def on_unbind(session: Session, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``unbind(1)``: a column for each dimension."""
    result = function(*args, **kwargs)
    known, dim = found(session, args[0]), (*args[1:], *kwargs.values(), 0)[0]
    if known is not None and known.dim is None and dim in (1, -1):
        for number, column in enumerate(result):
            _note(session, column, known.mask, number)
    return result


def column(session: Session, base: Any, index: Any, result: Any) -> None:
    """``result`` is ``base[index]``: ``positions[:, 1]`` is a column."""
    known = found(session, base)
    if known is not None and known.dim is None and type(index) is tuple and len(index) == 2:
        rows, number = index
        if rows == slice(None) and type(number) is int and isinstance(result, torch.Tensor):
            _note(session, result, known.mask, number % known.mask.ndim)


def _noted(session: Session, condition: Any, result: Any) -> Any:
    if isinstance(condition, torch.Tensor) and trace.is_unknown(condition) and condition.ndim:
        mask = condition.clone() if condition.dtype is torch.bool else condition != 0
        columns = [(None, result)] if isinstance(result, torch.Tensor) else list(enumerate(result))
        for dim, positions in columns:
            _note(session, positions, mask, dim)
    return result


def _note(session: Session, positions: torch.Tensor, mask: torch.Tensor, dim: int | None) -> None:
    session.found[id(positions)] = Found(positions, mask, dim, session.trace.version(positions))


def found(session: Session, value: Any) -> Found | None:
    """What is known of ``value``, unless it was written since."""
    known = session.found.get(id(value)) if isinstance(value, torch.Tensor) else None
    return known if known is not None and session.trace.version(known.positions) == known.version else None


def as_masks(session: Session, index: Any) -> Any:
    """``index`` with conditions in the places of the positions they gave, where these are all of them, in order."""
    items = list(index) if type(index) is tuple else [index]
    known = [found(session, item) for item in items]
    first = next((place for place, k in enumerate(known) if k is not None), None)
    if first is None:
        return index
    mask = known[first].mask  # type: ignore[union-attr]  # the first that is one
    here = known[first : first + mask.ndim]
    in_order = all(k is not None and k.mask is mask and k.dim == rank for rank, k in enumerate(here))
    complete = in_order and len(here) == mask.ndim
    rest = [*items[:first], *items[first + mask.ndim :]]
    # Beside another index tensor the two would be broadcast together.
    if not complete or not all(isinstance(item, slice) or item is Ellipsis or type(item) is int for item in rest):
        return index
    session.rewrote("index.found-positions", Kind.EXACT, "x[torch.where(c)]", "x[c]")
    return (*items[:first], mask, *items[first + mask.ndim :])


_COLUMNS = ("squeeze", "flatten", "view", "reshape", "ravel")
HANDLERS: dict[Any, Any] = {
    torch.where: on_where,
    **dict.fromkeys((torch.nonzero, torch.Tensor.nonzero, torch.argwhere, torch.Tensor.argwhere), on_nonzero),
    **{getattr(owner, n): on_column for owner in (torch, torch.Tensor) for n in _COLUMNS if hasattr(owner, n)},
    torch.Tensor.unbind: on_unbind,
    torch.unbind: on_unbind,
}


# --- what is left of positions that nothing uses ---------------------------------------------------------------------

aten = torch.ops.aten
_FINDS = (aten.where.default, aten.nonzero.default, aten.nonzero_numpy.default, aten.argwhere.default)
_PARTS = frozenset(
    {operator.getitem, aten.unbind.int, aten.select.int, aten.squeeze.dim, aten.squeeze.default, aten.view.default, aten.reshape.default}
)
_SIZES = frozenset({aten.sym_size.int, operator.ge, operator.le})
_LIMITS = (aten.sym_constrain_range_for_size.default, aten.sym_constrain_range.default)


def drop_unused(graph: fx.Graph) -> None:
    """Erase positions that only assertions on their number still look at: there are never fewer than none, nor more than elements."""
    for target in _FINDS:
        for node in graph.find_nodes(op="call_function", target=target):
            condition = meta.val(node.args[0])
            users = _users(node)
            if users is not None and all(_holds(user, condition.numel()) for user in users):
                for user in reversed(users):
                    graph.erase_node(user)
                graph.erase_node(node)


def _users(node: fx.Node) -> list[fx.Node] | None:
    """Everything made of ``node``, in order; None where that is more than parts, sizes and assertions on them."""
    found: dict[fx.Node, None] = {}
    pending = [node]
    while pending:
        for user in pending.pop().users:
            if user.target not in _PARTS | _SIZES and user.target is not aten._assert_scalar.default and user.target not in _LIMITS:
                return None
            if user not in found:
                found[user] = None
                pending.append(user)
    return sorted(found)


def _holds(user: fx.Node, elements: Any) -> bool:
    """Whether ``user``, where it is an assertion, holds of every number of positions among ``elements``."""
    if user.target in _LIMITS:
        return not user.kwargs.get("min") and user.kwargs.get("max") in (None, elements)
    if user.target is not aten._assert_scalar.default:
        return True
    stated = user.args[0]
    if not isinstance(stated, fx.Node) or len(stated.args) != 2 or type(stated.args[1]) is not int:
        return False
    limit = stated.args[1]
    return limit <= 0 if stated.target is operator.ge else stated.target is operator.le and type(elements) is int and limit >= elements
