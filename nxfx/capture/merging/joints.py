"""Where two paths of a model meet: the rest is the same function for both, of tensors that may have other values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from nxfx.capture.merging.explore import Fork, Way
from nxfx.capture.merging.proof import Mismatch
from nxfx.capture.merging.standpoint import Standpoint
from nxfx.capture.path import Traced

aten = torch.ops.aten


class Apart(Mismatch):
    """Two paths that looked alike where they met write, further on, memory that is not alike; from now on they are told apart there."""


def never(path: Traced, index: int, other: Traced, number: int) -> bool:
    """Every path is followed to its end."""
    return False


def meets(path: Traced, index: int, other: Traced, number: int) -> bool:
    """Whether at site ``number`` of ``other`` the program stands where it stands at site ``index`` of ``path``."""
    here, there = path.session.sites[index].standpoint, other.session.sites[number].standpoint
    if here is None or there is None or here.state is None or here.state != there.state:
        return False
    # What is one tensor here must be one there: the nodes that follow were made for these.
    if any(there.identity[place] != there.identity[first] for place, first in enumerate(here.identity)):
        return False
    return _same_memory(here, there, here.written | there.written)


def _same_memory(here: Standpoint, there: Standpoint, written: set[int]) -> bool:
    """Whether a write to one of ``written`` changes the same tensors in both."""
    for place in written:
        sharing = [
            {other for other, memory in enumerate(view.memory) if memory == view.memory[place]} for view in (here, there)
        ]
        # Without the tensor that the others are views of, what a write leaves in them is not known.
        if sharing[0] != sharing[1] or not sharing[0] & here.bases & there.bases:
            return False
    return True


Choose = Callable[[list[tuple[Any, Any]]], Any]
Values = dict[fx.Node, fx.Node]


def joined(
    fork: Fork, arriving: list[tuple[Any, Way, Values]], own: Values, through: list[Traced], copied: Values, choose: Choose
) -> dict[fx.Node, fx.Node]:
    """What ``fork``'s own path has there → what there is whichever way the program came.

    Args:
        arriving: the ways that meet at the fork, each with when it is taken and with its nodes.
        own: the nodes of the fork's own path.
        through: the paths that go on from there.
        copied: what the marks were made of, as :func:`originals` says.

    Raises:
        Mismatch: it cannot be told which tensor is which.
    """
    here = _standpoint(fork.path, fork.index)
    written = {place for path in through for place in _standpoint(path, fork.index).written}
    for _, way, _ in arriving:
        there = _standpoint(way.path, way.stop)
        if not _same_memory(here, there, written):
            here.written |= written
            raise Apart(f"memory that is written after {fork.site.location}")
    found: dict[fx.Node, fx.Node] = {}

    def note(node: fx.Node, options: list[tuple[Any, fx.Node]]) -> None:
        chosen = choose(options)
        if found.setdefault(node, chosen) is not chosen:
            raise Mismatch(f"two tensors that are one at {fork.site.location}")

    # The first mark is what the branch reads. The others are clones that the model did not make.
    note(own[fork.path.marks[fork.index][0]], [(guard, values[way.path.marks[way.stop][0]]) for guard, way, values in arriving])
    views = [(guard, values, way.path.marks[way.stop][1:], _standpoint(way.path, way.stop).copies()) for guard, way, values in arriving]
    for place, mark in zip(here.distinct(), fork.path.marks[fork.index][1:], strict=True):
        options = [(guard, values[copied[marks[copies[place]]]]) for guard, values, marks, copies in views]
        note(own[copied[mark]], options)
    return {node: chosen for node, chosen in found.items() if node is not chosen}


def _standpoint(path: Traced, index: int) -> Standpoint:
    found = path.session.sites[index].standpoint
    if found is None:
        raise Mismatch("nothing is known of where a path stands")
    return found


def originals(paths: list[Traced]) -> Values:
    """What each mark, a clone made when a branch asked, is a copy of; to be asked before a graph is changed."""
    found: Values = {}
    for path in paths:
        for marks in path.marks:
            for mark in marks[1:]:
                source = mark.args[0] if mark.op == "call_function" and mark.target is aten.clone.default else mark
                found[mark] = source if isinstance(source, fx.Node) else mark
    return found
