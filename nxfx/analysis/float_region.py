"""Which members become float32: grown from where integers are rounded, trimmed to what gains by it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import fx

from nxfx.analysis.float_ops import METADATA, Family, dtype_of, promotes
from nxfx.analysis.integer_origin import IntegerOrigins
from nxfx.analysis.paired_roundings import paired

_ARITHMETIC = (Family.COMPUTE, Family.OUTER)


@dataclass
class Region:
    """Members to be computed in float32.

    Attributes:
        nodes: the members, in topological order.
        causes: the sensitive ops that are the reason where no rounded integer is.
        bound: members that who promotes them to float32 has to be given rounded.
    """

    nodes: dict[fx.Node, None] = field(default_factory=dict)
    causes: list[fx.Node] = field(default_factory=list)
    bound: set[fx.Node] = field(default_factory=set)


def grow(origins: IntegerOrigins) -> Region:
    """The region of a graph. Each member is entered at most once forwards and once backwards.

    Forwards: from a rounded integer, or from a sensitive op with a rounded operand, to every member made of it.
    Backwards: to the rounded operands of these. Then what merely carries a value to where it is rounded anyway is
    left out, and what is exact and feeds the region only is taken in, since that saves a cast.
    """
    growth = _Growth(origins)
    for node, entry in origins.entries.items():
        if not entry.mask:
            growth.forwards(node)
    causes = []
    for node in origins.sensitive:
        before = len(growth.nodes)
        growth.backwards(node)
        member = origins.members.get(node)
        if member is not None and member.low is not None:
            growth.forwards(node)
        if len(growth.nodes) > before:
            causes.append(node)
    held, growth.bound = paired(origins)
    growth.leave(held)
    kept = growth.trimmed()
    return Region({n: None for n in origins.members if n in kept}, causes, growth.bound)


class _Growth:
    def __init__(self, origins: IntegerOrigins) -> None:
        self.origins = origins
        self.members = origins.members
        self.nodes: set[fx.Node] = set()
        self.left: set[fx.Node] = set()
        self.bound: set[fx.Node] = set()
        self._forwards: set[fx.Node] = set()
        self._backwards: set[fx.Node] = set()

    def forwards(self, seed: fx.Node) -> None:
        pending = [seed]
        while pending:
            node = pending.pop()
            if node in self._forwards:
                continue
            self._forwards.add(node)
            self.nodes.add(node)
            self.backwards(node)
            for user in node.users:
                member = self.members.get(user)
                if member is None or member.family is Family.FACTORY:
                    continue
                if member.low is not None:
                    pending.append(user)
                else:
                    self.backwards(user)  # float32 already: what it is combined with should be as good

    def backwards(self, seed: fx.Node) -> None:
        pending = [seed]
        while pending:
            node = pending.pop()
            if node in self._backwards:
                continue
            self._backwards.add(node)
            member = self.members.get(node)
            for value in member.values if member is not None else node.all_input_nodes:
                operand = self.members.get(value) if isinstance(value, fx.Node) else None
                if operand is not None and operand.rounded:
                    if operand.low is not None:
                        self.nodes.add(value)
                    pending.append(value)

    def leave(self, rounded: set[fx.Node]) -> None:
        """Leave ``rounded`` and what is made of them as they are: the model's later roundings can make up for the first."""
        self.left = set(rounded)
        for node, member in self.members.items():
            if any(v in self.left for v in member.values):
                self.left.add(node)
        self.nodes -= self.left

    def trimmed(self) -> set[fx.Node]:
        kept: set[fx.Node] = set()
        refined = self._refined()
        for node in reversed(self.members):
            member = self.members[node]
            if node in self.nodes:
                gains = member.family in _ARITHMETIC or self._joins(node, refined) or self._gives_float32(node)
                if gains or any(self._gains(user, node, kept) for user in node.users):
                    kept.add(node)
            elif self._may_join(node):
                users = [u for u in node.users if u.target not in METADATA]
                if users and all(u in kept for u in users):
                    kept.add(node)
        for node in self.members:  # the outputs of a multi-output op change together
            if node in kept and isinstance(node.meta.get("val"), (list, tuple)):
                kept.update(node.users)
        return kept

    def _gains(self, user: fx.Node, node: fx.Node, kept: set[fx.Node]) -> bool:
        """Whether ``user`` makes something of ``node`` unrounded."""
        if user in self.left:
            return False
        if user in kept or user in self.origins.sinks:
            return True
        member = self.members.get(user)
        if member is None:
            return promotes(user) and self.members[node].low is not None and node not in self.bound
        return member.low is None and member.family is not Family.FACTORY

    def _refined(self) -> set[fx.Node]:
        """Members of the region whose value changes, not only its dtype."""
        refined: set[fx.Node] = set()
        for node, member in self.members.items():
            if node in self.nodes and (member.family in _ARITHMETIC or any(v in refined for v in member.values)):
                refined.add(node)
        return refined

    def _joins(self, node: fx.Node, refined: set[fx.Node]) -> bool:
        """Whether ``node`` puts refined values together, so that one cast back after it does for all of them."""
        member = self.members[node]
        return member.family is Family.SELECT and len({v for v in member.values if v in refined}) > 1

    def _gives_float32(self, node: fx.Node) -> bool:
        """Whether ``node`` gives activations and outputs in float32 what low precision has rounded."""
        member = self.members[node]
        is_wide = dtype_of(node) is torch.float32 and member.rounded and any(v in self.nodes for v in member.values)
        return is_wide and any(u.target not in METADATA and u not in self.members for u in node.users)

    def _may_join(self, node: fx.Node) -> bool:
        """Whether ``node`` is exact and made from integers and numbers alone: in float32 it costs no cast."""
        member = self.members[node]
        if member.low is None or member.rounded or member.tables or member.learned:
            return False
        return member.integer or member.family is Family.FACTORY
