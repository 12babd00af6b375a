"""Conditions on inputs that a run met (``x[0] == 1``, ``mask.any()``), and inputs that turn them.

A comparison of an input, or of a part of it, with a number can be solved: the other answer needs a value next to that number.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

Range = tuple[int, int] | None


def _functions(*names: str) -> dict[Any, str]:
    """torch's functions and methods of these names → the first of them."""
    found = {getattr(owner, name, None): names[0] for owner in (torch, torch.Tensor) for name in names}
    return {function: name for function, name in found.items() if function is not None}


_COMPARISONS: dict[Any, str] = {
    **_functions("eq", "__eq__"),
    **_functions("ne", "__ne__", "not_equal"),
    **_functions("lt", "__lt__", "less"),
    **_functions("le", "__le__", "less_equal"),
    **_functions("gt", "__gt__", "greater"),
    **_functions("ge", "__ge__", "greater_equal"),
}
_NEGATIONS = {**_functions("logical_not"), **_functions("bitwise_not", "__invert__")}
_GATHERED = {**_functions("any"), **_functions("all"), **_functions("squeeze"), **_functions("reshape"), **_functions("clone")}
WATCHED: frozenset[Any] = frozenset((*_COMPARISONS, *_NEGATIONS, *_GATHERED))
_MOST = 64  # conditions of one run; their results are kept until it ends


@dataclass(frozen=True)
class Aim:
    """The elements at ``place`` (sizes, strides, offset) of the input ``leaf`` are compared with ``number``; ``wanted`` is to come out."""

    leaf: int
    place: tuple[tuple[int, ...], tuple[int, ...], int]
    comparison: str
    number: float
    wanted: bool = True

    def value(self, dtype: torch.dtype, limits: Range) -> Any:
        """A number for which the comparison gives what is wanted, None where ``dtype`` or the declared range has none."""
        if dtype is torch.bool:
            candidates: list[Any] = [False, True]
        else:
            step = max(1, abs(self.number) / 8) if dtype.is_floating_point else 1
            near = [self.number, self.number - step, self.number + step]
            candidates = near if dtype.is_floating_point else [f(v) for v in near for f in (math.floor, math.ceil)]
        compare = getattr(operator, self.comparison)
        for value in candidates:
            inside = limits is None or dtype.is_floating_point or limits[0] <= value <= limits[1]
            if inside and bool(compare(value, self.number)) is self.wanted:
                return value
        return None


class Aims:
    """What a run compares, and what Python then asks of it.

    Attributes:
        met: the conditions that a branch asked for, each with the other answer wanted.
    """

    def __init__(self, leaves: Sequence[Any]) -> None:
        self._leaves = {_memory(leaf): i for i, leaf in reversed(list(enumerate(leaves))) if _is_plain(leaf)}
        self._known: dict[int, tuple[torch.Tensor, Aim, bool]] = {}
        self.met: list[Aim] = []

    def computed(self, function: Any, args: tuple[Any, ...], result: Any) -> None:
        """``function``, one of :data:`WATCHED`, has given ``result``."""
        if not isinstance(result, torch.Tensor) or len(self._known) >= _MOST or not args:
            return
        if function in _COMPARISONS:
            found = self._compared(_COMPARISONS[function], args)
        else:
            found = self._of(args[0])
            if found is not None and function in _NEGATIONS:
                found = found[0], not found[1]
        if found is not None:
            self._known[id(result)] = (result, *found)

    def asked(self, condition: Any, answer: bool) -> None:
        """A branch has asked ``condition`` and got ``answer``."""
        found = self._of(condition)
        if found is not None:
            aim, negated = found
            self.met.append(replace(aim, wanted=answer if negated else not answer))

    def close(self) -> None:
        """Let go of the run's tensors."""
        self._known.clear()

    def _of(self, tensor: Any) -> tuple[Aim, bool] | None:
        """The condition that ``tensor`` holds, and whether it is negated; an input itself holds ``input != 0``."""
        known = self._known.get(id(tensor))
        if known is not None:
            return known[1:]
        place = self._place(tensor)
        return None if place is None else (Aim(*place, "ne", 0), False)

    def _compared(self, name: str, args: tuple[Any, ...]) -> tuple[Aim, bool] | None:
        place, number = self._place(args[0]), args[1] if len(args) > 1 else None
        if place is None or not isinstance(number, (int, float)) or not math.isfinite(number):
            return None
        return Aim(*place, name, number), False

    def _place(self, tensor: Any) -> tuple[int, tuple[tuple[int, ...], tuple[int, ...], int]] | None:
        leaf = self._leaves.get(_memory(tensor)) if _is_plain(tensor) else None
        return None if leaf is None else (leaf, (tuple(tensor.shape), tuple(tensor.stride()), tensor.storage_offset()))


def _is_plain(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.layout is torch.strided and not value.is_meta


def _memory(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def rounds(met: Sequence[Aim]) -> list[list[Aim]]:
    """``met`` in as few groups as it takes that no group wants two things of one input."""
    groups: list[list[Aim]] = []
    for aim in dict.fromkeys(met):
        group = next((g for g in groups if all(a.leaf != aim.leaf or a.place != aim.place for a in g)), None)
        if group is None:
            groups.append([aim])
        else:
            group.append(aim)
    return groups


def turned(leaves: Sequence[Any], aims: Sequence[Aim], example: Sequence[Any], ranges: Sequence[Range]) -> list[Any]:
    """``leaves`` with the numbers that ``aims`` want; ``example`` has the layout that their places are told in."""
    changed = list(leaves)
    for aim in aims:
        value = aim.value(example[aim.leaf].dtype, ranges[aim.leaf])
        if value is None:
            continue
        fresh = torch.empty_strided(example[aim.leaf].shape, example[aim.leaf].stride(), dtype=example[aim.leaf].dtype)
        changed[aim.leaf] = fresh.to(example[aim.leaf].device).copy_(changed[aim.leaf])
        changed[aim.leaf].as_strided(*aim.place).fill_(value)
    return changed
