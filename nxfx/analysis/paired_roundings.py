"""Roundings of one integer that cancel: ``(hidden - low(p)) + (low(p) + table)``.

What meets an activation at once stays rounded. Where the same integer comes back to that activation by sums alone, its rounding takes
itself away there, and an unrounded one would not: eager is off by nothing, half of a lift by the whole rounding.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from torch import fx

from nxfx.analysis import dtype_rules
from nxfx.analysis.float_ops import FAMILIES, METADATA, Family, dtype_of, op_name
from nxfx.analysis.integer_origin import IntegerOrigins

_SUMS = frozenset(["add", "sub", "rsub"])
_LINEAR = _SUMS | {"mul", "div", "sum", "mean", "cumsum", "lerp", "diff"}
_FAR = 256  # nodes after which an activation is taken for another one


def paired(origins: IntegerOrigins, region: Collection[fx.Node]) -> set[fx.Node]:
    """The nodes of ``region`` that have to stay rounded, since what they are made of cancels with what is rounded outside."""
    entries: dict[fx.Node, list[fx.Node]] = {}
    rounded: dict[fx.Node, list[fx.Node]] = {}
    for node, integer in origins.met:
        rounded.setdefault(_root(integer), []).append(node)
    for node, entry in origins.entries.items():
        root = _root(entry.integer or node)
        entries.setdefault(root, []).append(node)
        rounded.setdefault(root, []).extend(_takers(node, origins))
    found: set[fx.Node] = set()
    for root, starts in entries.items():
        if rounded[root]:
            found |= _cancelling(starts, rounded[root], origins, region)
    return found


def _root(node: fx.Node) -> fx.Node:
    """The integer that ``node`` is a view or a part of."""
    while FAMILIES.get(node.target) is Family.MOVE and node.all_input_nodes and dtype_rules.is_integral(dtype_of(node)):
        node = node.all_input_nodes[0]
    return node


def _takers(entry: fx.Node, origins: IntegerOrigins) -> list[fx.Node]:
    """The activations that are given the rounded ``entry``, as it is or a view of it."""
    found, pending, seen = [], [entry], {entry}
    for node in pending:
        for user in node.users:
            member = origins.members.get(user)
            if member is None and user not in origins.sinks and user.target not in METADATA and user.op == "call_function":
                found.append(user)
            elif member is not None and member.family in (Family.CAST, Family.MOVE) and user not in seen:
                seen.add(user)
                pending.append(user)
    return found


def _is_linear(node: fx.Node) -> bool:
    family = FAMILIES.get(node.target)
    return family in (Family.CAST, Family.MOVE, Family.SELECT) or (family is Family.COMPUTE and op_name(node) in _LINEAR)


def _reached(starts: Iterable[fx.Node], origins: IntegerOrigins) -> set[fx.Node]:
    """Activations that are linear in what the roundings were given to."""
    pending = [n for n in starts if _is_linear(n)]
    reached = set(pending)
    for node in pending:
        for user in node.users if len(reached) < _FAR else ():
            if user not in reached and user not in origins.members and _is_linear(user):
                reached.add(user)
                pending.append(user)
    return reached


def _cancelling(starts: list[fx.Node], takers: list[fx.Node], origins: IntegerOrigins, region: Collection[fx.Node]) -> set[fx.Node]:
    """What is linear in the entries and in one sum with what is given to ``takers``, and all that leads there.

    Where the entry itself becomes low precision nothing has to stay: it is rounded for one and not for the other.
    """
    reached, sums = _reached(takers, origins), {t for t in takers if op_name(t) in _SUMS}
    pending, seen, last = list(starts), set(starts), set()
    for node in pending:
        for user in node.users:
            if user in region:
                if user not in seen and _is_linear(user):
                    seen.add(user)
                    pending.append(user)
            elif user not in origins.members and user not in takers:
                joins = op_name(user) in _SUMS and any(v in reached for v in user.all_input_nodes)
                if joins or not sums.isdisjoint(_reached([user], origins)):
                    last.add(node)
    found: set[fx.Node] = set()
    for node in reversed(pending):
        if node in last or any(u in found for u in node.users):
            found.add(node)
    return {n for n in found if not _is_entry(n, origins)}


def _is_entry(node: fx.Node, origins: IntegerOrigins) -> bool:
    return origins.members[node].family in (Family.CAST, Family.FACTORY) and dtype_rules.is_low_precision(dtype_of(node))
