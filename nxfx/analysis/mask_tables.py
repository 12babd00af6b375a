"""Masks that are buffers, parameters or constants: the few numbers that they hold now."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx

from nxfx.analysis.mask_rules import LOW
from nxfx.analysis.provenance import Premise, Role, Source
from nxfx.graph import meta

_MANY = 12  # of numbers; more are no mask
_SCAN_LIMIT = 1 << 26
_SAMPLE = 4096


@dataclass(frozen=True)
class Table:
    """What a tensor holds.

    Attributes:
        low: its numbers below :data:`LOW`.
        rest: its other numbers; None when they are too many to be those of a mask.
        name: whose numbers may change; None of a constant.
    """

    low: tuple[float, ...]
    rest: tuple[float, ...] | None
    name: str | None

    def premise(self, *, repaired: bool) -> Premise | None:
        """What must stay so: each number where the graph was changed by them, otherwise that no others are a mask's."""
        if self.name is None:
            return None
        exact = repaired and self.rest is not None
        held = self.low + (self.rest or () if exact else ())
        return Premise(self.name, "among" if exact else "low-among", tuple(max(v, -sys.float_info.max) for v in held))


class MaskTables:
    """The tables of one graph, read once.

    Args:
        sources: placeholder or ``get_attr`` node name → origin.
    """

    def __init__(self, sources: Mapping[str, Source]) -> None:
        self._sources = sources
        self._known: dict[fx.Node, Table | None] = {}

    def of(self, node: fx.Node) -> Table | None:
        """What ``node`` holds; None where that is not known, or is no mask in any sense."""
        if node not in self._known:
            self._known[node] = self._read(self._sources.get(node.name))
        return self._known[node]

    def _read(self, source: Source | None) -> Table | None:
        held = source.value if source is not None and source.is_known else None
        if source is None or held is None or source.role not in (Role.BUFFER, Role.CONSTANT, Role.PARAMETER):
            return None
        if isinstance(held, meta.FakeTensor) or held.is_meta or held.is_complex() or not 0 < held.numel() <= _SCAN_LIMIT:
            return None
        held = held.detach().flatten()
        below = held < LOW if held.is_floating_point() else held < int(LOW)
        low, rest = _distinct(held[below]), _distinct(held[~below])
        if low is None or (source.role is Role.PARAMETER and not low):
            return None
        return Table(low, rest, source.name if source.role is not Role.CONSTANT else None)


def _distinct(held: torch.Tensor) -> tuple[float, ...] | None:
    """The numbers in ``held``, ascending; None when they are many, or not all numbers."""
    if torch.unique(held[:_SAMPLE]).numel() > _MANY:
        return None
    found: list[float] = []
    while held.numel():
        least = held.min()
        found.append(float(least))
        if len(found) > _MANY or found[-1] != found[-1]:
            return None
        held = held[held > least]
    return tuple(found)
