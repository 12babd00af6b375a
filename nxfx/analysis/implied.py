"""What an input's own unconditional uses say of its values: an index that is out of bounds raises in the model itself.

:func:`implied_range` reads it off the ops of the graph; :func:`require` keeps it for an op that a rewrite takes away.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import fx

from nxfx.analysis import dtype_rules
from nxfx.analysis.intervals import INT64, Interval, Ranges, arg, meet
from nxfx.analysis.provenance import Role, Source
from nxfx.analysis.range_rules import PRESERVING_VIEWS
from nxfx.graph import meta

aten = torch.ops.aten

# op → (position of the indexed tensor, position of the index, position of the dim or None for dim 0).
_FROM_ZERO = {
    aten.embedding.default: (0, 1, None),
    aten.index_select.default: (0, 2, 1),
    aten.gather.default: (0, 2, 1),
    aten.scatter.src: (0, 2, 1),
    aten.scatter.value: (0, 2, 1),
    aten.scatter_add.default: (0, 2, 1),
}
_EITHER_SIDE = frozenset({aten.index.Tensor, aten.index_put.default})


def implied_range(ranges: Ranges, source: fx.Node) -> tuple[Interval, str] | None:
    """The tightest range that an index op implies for the very values of ``source``, with its reason in words.

    Only through ops that keep every element and every value (views, copies, widening casts), and through ``select`` where every
    position of its dimension is used so (the columns of a bounding box): a slice or a wrapping cast says nothing of the rest. A use
    inside a branch is in another graph and is not seen here.
    """
    best: tuple[Interval, str] | None = None
    picked: dict[tuple[fx.Node, int], dict[int, tuple[Interval, str]]] = {}
    for user, value in _uses(source):
        bounds = _bounds_by(ranges, user, value)
        best = _tighter(best, None if bounds is None else (bounds, f"it indexes {user.target}"))
        for one, dim, position in _positions(user, value):
            found = implied_range(ranges, one)
            if found is not None:
                positions = picked.setdefault((value, dim), {})
                positions[position] = _tighter(positions.get(position), found) or found
    for (value, dim), positions in picked.items():
        if len(positions) == meta.val(value).shape[dim]:
            low, high = min(b[0] for b, _ in positions.values()), max(b[1] for b, _ in positions.values())
            best = _tighter(best, ((low, high), positions[0][1]))
    return best


def _tighter(one: tuple[Interval, str] | None, other: tuple[Interval, str] | None) -> tuple[Interval, str] | None:
    if one is None or other is None:
        return one or other
    return min(one, other, key=lambda found: found[0][1] - found[0][0])


def _positions(user: fx.Node, value: fx.Node) -> Iterator[tuple[fx.Node, int, int]]:
    """``(node, dim, position)`` for each node that ``user`` makes of one position of a dim of ``value``, whose size is known."""
    if user.target not in (aten.select.int, aten.unbind.int) or user.args[0] is not value:
        return
    shape = meta.val(value).shape
    dim: Any = arg(user, 1, "dim") or 0
    if type(dim) is not int or type(shape[dim]) is not int:
        return
    dim %= len(shape)
    if user.target is aten.select.int:
        position: Any = arg(user, 2, "index")
        if type(position) is int:
            yield user, dim, position % shape[dim]
    else:
        for item in user.users:
            if item.target is operator.getitem and type(item.args[1]) is int:
                yield item, dim, item.args[1] % shape[dim]


def require(
    index: fx.Node, bounds: Interval, sources: Mapping[str, Source], requirements: MutableMapping[str, Interval]
) -> bool:
    """Note that every value of ``index`` lies in ``bounds`` or the model raises. False when no input holds these very values.

    Args:
        index: an integer tensor, not empty, read unconditionally.
        sources: placeholder node name → origin.
        requirements: input name → what the boundary enforces; one is added or tightened.
    """
    low, high = bounds
    while index.op == "call_function" and index.args:
        operand: Any = index.args[0]
        if _shifts(index):
            by: Any = index.args[1]
            by = by if index.target in _SUMS else -by
            low, high = low - by, high - by
        elif not (index.target in PRESERVING_VIEWS or _keeps_values(index)):
            return False
        index = operand
    source = sources.get(index.name)
    if source is None or source.role is not Role.INPUT or not dtype_rules.is_integral(meta.dtype_of(index)):
        return False
    requirements[source.name] = meet(requirements.get(source.name, INT64), (low, high))
    return True


_SUMS = (aten.add.Tensor, aten.add.Scalar)


def _shifts(node: fx.Node) -> bool:
    """Whether ``node`` adds an integer to an integer tensor, or takes one away."""
    known = node.target in (*_SUMS, aten.sub.Tensor, aten.sub.Scalar) and not node.kwargs and type(node.args[1]) is int
    return known and meta.dtype_of(node) == meta.dtype_of(node.args[0])


def _uses(source: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Every use of ``source`` itself, seen through value-preserving views: (user, the view used)."""
    pending = [source]
    while pending:
        value = pending.pop()
        for user in value.users:
            if user.target in PRESERVING_VIEWS or _keeps_values(user):
                pending.append(user)
            else:
                yield user, value


def _keeps_values(node: fx.Node) -> bool:
    if node.target is aten.expand.default:
        return True  # an expansion to nothing is caught by the empty result below
    if node.target is not aten._to_copy.default:
        return False
    # A cast that nxfx made is checked by the boundary; the model's own int64 -> int32 wraps.
    return meta.dtype_of(node) is torch.int64 or node.meta.get("nxfx", {}).get("made_by") == "narrow-64bit"


def _bounds_by(ranges: Ranges, user: fx.Node, value: fx.Node) -> Interval | None:
    if user.op != "call_function":
        return None
    size: Any = None
    either_side = False
    if user.target in _FROM_ZERO:
        table, index, dim = _FROM_ZERO[user.target]
        if len(user.args) <= index or user.args[index] is not value:
            return None
        size = _size(user.args[table], 0 if dim is None else user.args[dim])
    elif user.target in _EITHER_SIDE:
        indices = arg(user, 1, "indices")
        position = next((i for i, one in enumerate(indices) if one is value), None)
        if position is None or any(meta.dtype_of(i) in (torch.bool, torch.uint8) for i in indices if i is not None):
            return None  # a mask index takes as many dims as it has
        size, either_side = _size(user.args[0], position), True
    if size is None or not _is_never_empty(ranges, user, value):
        return None
    high = ranges.symbolic(size)[1]
    return (-high if either_side else 0, high - 1) if high > 0 else None


def _size(table: Any, dim: Any) -> Any:
    tensor = meta.val(table) if isinstance(table, fx.Node) else None
    if not isinstance(tensor, torch.Tensor) or not isinstance(dim, int) or tensor.dim() == 0:
        return None
    return tensor.shape[dim]


def _is_never_empty(ranges: Ranges, user: fx.Node, value: fx.Node) -> bool:
    """Bounds are checked only where something is read: an empty result proves nothing."""
    shapes = [meta.val(value), meta.val(user) if user.target is not aten.scatter_add.default else meta.val(value)]
    return all(ranges.symbolic(s)[0] > 0 for t in shapes if isinstance(t, torch.Tensor) for s in t.shape)
