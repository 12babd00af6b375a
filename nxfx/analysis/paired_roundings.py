"""Roundings of one integer that cancel: ``(hidden - low(p)) + (low(p) + table)``.

What meets an activation at once stays rounded. Where the same integer comes back to that activation by sums alone, its rounding takes
itself away there, and an unrounded one would not: eager is off by nothing, half of a lift by the whole rounding.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import fx

from nxfx.analysis import dtype_rules
from nxfx.analysis.float_ops import METADATA, Family, dtype_of, family_of, is_pointwise, op_name, promotes
from nxfx.analysis.integer_origin import IntegerOrigins
from nxfx.graph import walk

_SUMS = frozenset(["add", "sub", "rsub"])
_LINEAR = _SUMS | {"mul", "div", "sum", "mean", "cumsum", "lerp", "diff"}
# Of these a large operand leaves nothing that could cancel.
_ENDS = frozenset(["sin", "cos", "tan", "sinc", "tanh", "sigmoid", "erf", "exp", "exp2", "expm1", "log", "reciprocal", "rsqrt", "sign"])
_FAR = 256  # nodes after which an activation is taken for another one


@dataclass
class _Forms:
    """What is linear in one integer, and who is given it.

    Attributes:
        of: member → the member whose value it is: the last that computes or widens. None is the integer as its entry rounds it.
        given: activation → the forms it is given, and whether it takes them in low precision.
        stored: the graph returns one of them in low precision: perhaps to a buffer that it reads at the next call.
        handed: a higher-order op is given one of them in low precision, and does with it whatever is done outside.
    """

    of: dict[fx.Node, fx.Node | None] = field(default_factory=dict)
    given: dict[fx.Node, set[tuple[fx.Node | None, bool]]] = field(default_factory=dict)
    stored: bool = False
    handed: bool = False


def paired(origins: IntegerOrigins) -> tuple[set[fx.Node], set[fx.Node]]:
    """What has to stay rounded, since it cancels with what is rounded outside: members, and integers as their entries round them.

    The second are members too, which others are made of unrounded: only who promotes them is given them rounded.
    """
    found: set[fx.Node] = set()
    bound: set[fx.Node] = set()
    for root in dict.fromkeys(_root(entry.root or node) for node, entry in origins.entries.items()):
        forms = _forms(root, origins)
        if len(set().union(*forms.given.values())) < (1 if forms.stored or forms.handed else 2):
            continue
        apart = set(forms.of.values()) if forms.handed else _cancelling(forms, origins)
        if None in apart:
            bound |= {node for node, form in forms.of.items() if form is None}
        held = {form for form in apart if form is not None}
        for node in reversed(forms.of):
            if node in held or any(user in held for user in node.users):
                held.add(node)
        found |= {n for n in held if n in origins.members and not _is_entry(n, origins)}
    return found, bound


def _root(node: fx.Node) -> fx.Node:
    """The integer that ``node`` is a view or a part of."""
    while _is_view(node) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def _is_view(node: fx.Node) -> bool:
    return family_of(node) is Family.MOVE and dtype_rules.is_integral(dtype_of(node))


def _forms(root: fx.Node, origins: IntegerOrigins) -> _Forms:
    forms = _Forms({root: None})
    pending = [root]
    for node in pending:
        for user in node.users:
            forms.handed |= walk.is_higher_order(user) and _is_low(node)
            forms.stored |= user.op == "output" and _is_low(node)
            if user.op != "call_function" or user.target in METADATA or user in origins.sinks:
                continue
            if user not in origins.members and not _is_view(user):
                if not dtype_rules.is_integral(dtype_of(node)):
                    forms.given.setdefault(user, set()).add((forms.of[node], _is_low(node) and not promotes(user)))
                elif dtype_rules.is_low_precision(dtype_of(user)):
                    forms.given.setdefault(user, set()).add((None, True))  # promoted there
            elif user not in forms.of and _is_linear(user):
                forms.of[user] = _form(user, node, forms)
                pending.append(user)
    return forms


def _form(user: fx.Node, node: fx.Node, forms: _Forms) -> fx.Node | None:
    if family_of(user) not in (Family.CAST, Family.MOVE):
        return user
    widens = dtype_of(user) is torch.float32 and dtype_of(node) is not torch.float32
    return user if widens and forms.of[node] is None else forms.of[node]


def _is_low(node: fx.Node) -> bool:
    return dtype_rules.is_low_precision(dtype_of(node))


def _is_linear(node: fx.Node) -> bool:
    family = family_of(node)
    return family in (Family.CAST, Family.MOVE, Family.SELECT) or (family is Family.COMPUTE and op_name(node) in _LINEAR)


def _cancelling(forms: _Forms, origins: IntegerOrigins) -> set[fx.Node | None]:
    """The forms that come together in one sum with another, or with themselves, where one of the two is rounded and the other may not be.

    A form that two activations take rounded is the same for both, and two that they take in float32 are both unrounded.
    """
    carried: dict[fx.Node, set[tuple[fx.Node | None, bool]]] = {a: set(g) for a, g in forms.given.items() if _carries(a)}
    if forms.stored:
        carried |= {state: {(None, True)} for state in _states(origins)}
    found: set[fx.Node | None] = set()
    pending = list(carried)
    for node in pending:
        if op_name(node) in _SUMS:
            found |= _apart(carried[node])
        for user in node.users:
            if user in origins.members or not _carries(user) or carried[node] <= carried.get(user, set()):
                continue
            if user not in carried and len(carried) >= _FAR:
                continue
            carried.setdefault(user, set()).update(carried[node])
            pending.append(user)
    return found


def _carries(activation: fx.Node) -> bool:
    """Whether what goes into ``activation`` may come out of it again, more or less."""
    if op_name(activation) in _ENDS:
        return False
    return is_pointwise(activation) or family_of(activation) in (Family.CAST, Family.MOVE, Family.SELECT) or _is_linear(activation)


def _states(origins: IntegerOrigins) -> list[fx.Node]:
    """The low-precision buffers that the graph writes."""
    written = {name for name, source in origins.sources.items() if source.mutated}
    return [n for n in origins.inputs if n.name in written and _is_low(n)]


def _apart(met: set[tuple[fx.Node | None, bool]]) -> set[fx.Node | None]:
    return {form for form, _ in met} if len(met) > 1 and any(low for _, low in met) else set()


def _is_entry(node: fx.Node, origins: IntegerOrigins) -> bool:
    return origins.members[node].family in (Family.CAST, Family.FACTORY) and _is_low(node)
