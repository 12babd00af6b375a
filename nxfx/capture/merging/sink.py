"""What both sides of a branch do at their ends is done once: ``where(c, f(a), f(b))`` becomes ``f(where(c, a, b))``.

That is exact for every operator that is a function of its arguments, and what keeps a graph with k branches from holding 2^k
copies of what follows them: the parts of two paths after a branch are the same operators on different values.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from nxfx.capture.merging.selects import Selects, is_random, layout, static
from nxfx.graph import meta


def sink(selects: Selects) -> None:
    """Move every ``where`` towards the branch as far as both sides agree. Each step takes a node away, or moves it."""
    pending = list(selects.chosen)
    while pending:
        node = pending.pop()
        if node not in selects.chosen:
            continue
        _, yes, no = selects.chosen[node]
        new = _through(selects, node, yes, no)
        if new is not None:
            replaced = [yes, no] if yes.target is not operator.getitem else [yes, no, yes.args[0], no.args[0]]
            pending += _erase_dead(selects, replaced)
            pending += new


def _through(selects: Selects, node: fx.Node, yes: fx.Node, no: fx.Node) -> list[fx.Node] | None:
    """Replace ``node``, that chooses between ``yes`` and ``no``, by their operator on chosen operands; the new selects."""
    if not _alike(yes, no) or not _only(yes, node) or not _only(no, node):
        return None
    if yes in selects.chosen and no in selects.chosen and not _is_inside(selects, node, yes, no):
        return None
    if yes.target is operator.getitem:
        return _through_several(selects, node, yes, no)
    made = _merge(selects, selects.chosen[node][0], yes, no)
    if made is None:
        return None
    merged, new = made
    _replace(selects, node, merged)
    return new


def _is_inside(selects: Selects, node: fx.Node, yes: fx.Node, no: fx.Node) -> bool:
    """Whether the branches of ``yes`` and ``no`` come after ``node``'s: two choices change places once, and never back."""
    outer, *inner = (selects.ranks[selects.chosen[n][0]] for n in (node, yes, no))
    return outer < min(inner)


def _through_several(selects: Selects, node: fx.Node, yes: fx.Node, no: fx.Node) -> list[fx.Node] | None:
    """The same for an operator with several results: all that is used of it is chosen between the same two."""
    condition = selects.chosen[node][0]
    first, second = yes.args[0], no.args[0]
    assert isinstance(first, fx.Node) and isinstance(second, fx.Node)
    others = {user.args[1]: user for user in second.users}
    pairs = []
    for user in first.users:
        other = others.pop(user.args[1], None) if user.target is operator.getitem else None
        choosing = next(iter(user.users), None)
        if other is None or choosing is None or selects.chosen.get(choosing) != (condition, user, other):
            return None
        if not _only(user, choosing) or not _only(other, choosing):
            return None
        pairs.append((user, choosing))
    made = _merge(selects, condition, first, second) if not others and _alike(first, second) else None
    if made is None:
        return None
    merged, new = made
    for user, choosing in pairs:
        part = selects.call(operator.getitem, merged, user.args[1], origin=user)
        selects.guards[part] = selects.guards[merged]
        _replace(selects, choosing, part)
    return new


def _merge(selects: Selects, condition: fx.Node, yes: fx.Node, no: fx.Node) -> tuple[fx.Node, list[fx.Node]] | None:
    new: list[fx.Node] = []
    chosen: list[Any] = []
    for a, b in zip(_operands(yes), _operands(no), strict=True):
        if a is not b and (layout(a) is None or layout(a) != layout(b)):
            return None
    for a, b in zip(_operands(yes), _operands(no), strict=True):
        made = selects.choose(condition, a, b)
        if made is not a:
            new.append(made)
        chosen.append(made)
    operands = iter(chosen)
    args, kwargs = fx.node.map_arg((yes.args, yes.kwargs), lambda _: next(operands))
    try:
        merged = selects.call(yes.target, *args, origin=yes, **kwargs)
    except Exception:  # the chosen operands have strides that the operator does not take
        return None
    if layout(merged) != layout(yes) and isinstance(meta.val(yes), torch.Tensor):
        selects.graph.erase_node(merged)
        return None
    # Random numbers are drawn in the order of the first path.
    stands = no if no in selects.original else yes
    if stands in selects.original:
        stands.append(merged)
        selects.original.add(merged)
    if yes in selects.chosen and no in selects.chosen:
        selects.chosen[merged] = (chosen[0], chosen[1], chosen[2])
        selects.ranks.setdefault(chosen[0], min(selects.ranks[selects.chosen[n][0]] for n in (yes, no)))
        new.append(merged)
    else:
        selects.guards[merged] = selects.decisions.either(selects.guards[yes], selects.guards[no])
    return merged, new


def _operands(node: fx.Node) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), found.append)
    return found


def _alike(one: fx.Node, other: fx.Node) -> bool:
    """Whether both are the same operator with the same arguments, tensors apart."""
    if one.op != "call_function" or one.target is not other.target or is_random(one) != is_random(other):
        return False
    blank = [static(fx.node.map_arg((n.args, n.kwargs), lambda _: "node")) for n in (one, other)]
    return bool(blank[0] == blank[1])


def _only(node: fx.Node, user: fx.Node) -> bool:
    return len(node.users) == 1 and user in node.users


def _replace(selects: Selects, old: fx.Node, new: fx.Node) -> None:
    """``new`` for ``old``, among what other selects choose between as well."""
    for user in list(old.users):
        if user in selects.chosen:
            condition, yes, no = (new if part is old else part for part in selects.chosen[user])
            selects.chosen[user] = (condition, yes, no)
    for branch, condition in selects.conditions.items():
        if condition is old:
            selects.conditions[branch] = new
    if old in selects.ranks:
        selects.ranks.setdefault(new, selects.ranks[old])
    old.replace_all_uses_with(new)
    del selects.chosen[old]
    selects.graph.erase_node(old)


def _erase_dead(selects: Selects, replaced: list[Any]) -> list[fx.Node]:
    """Erase ``replaced`` and what nobody uses any more; the selects that may move on for it.

    A random op that nobody uses draws all the same, unless it is ``replaced``: then another draws for it.
    """
    nodes = list(reversed(replaced))
    freed: dict[fx.Node, None] = {}
    conditions = set(selects.conditions.values())
    while nodes:
        node = nodes.pop()
        if node.users or node.op != "call_function" or node._erased or node in conditions or is_random(node) and node not in replaced:
            continue
        operands = node.all_input_nodes
        selects.guards.pop(node, None)
        selects.chosen.pop(node, None)
        selects.graph.erase_node(node)
        for operand in operands:
            freed.update(dict.fromkeys(user for user in operand.users if user in selects.chosen))
            nodes.append(operand)
    return list(freed)
