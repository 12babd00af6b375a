"""Other inputs like the example: same structure, dtypes and shapes, within declared ranges."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from nxfx.capture.structure import Flat
from nxfx.observe.aims import Aim, Range, rounds, turned

Call = tuple[tuple[Any, ...], dict[str, Any]]
_Rule = Callable[[torch.Tensor, Range, torch.Generator], torch.Tensor]


def clones(flat: Flat) -> list[Any]:
    """The leaves, each tensor as one of its own."""
    return [leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in flat.leaves]


def duplicate(call: Call, flat: Flat, leaves: list[Any] | None = None) -> Call:
    """``call`` with copies of its tensors, or with ``leaves`` in their places, and with its own Python containers."""
    leaves = clones(flat) if leaves is None else leaves
    memo = {id(old): new for old, new in zip(flat.leaves, leaves, strict=True) if isinstance(old, torch.Tensor)}
    args, kwargs = copy.deepcopy(call, memo)
    return args, kwargs


def variations(call: Call, flat: Flat, ranges: list[Range], met: Sequence[Aim] = ()) -> Iterator[tuple[str, Call]]:
    """Some calls that differ from ``call`` in every tensor, each with a name; the most telling first.

    Args:
        ranges: for each leaf of ``flat``, what is declared. Integers without a declaration may leave what the example holds: a
            model that refuses such a value raises, and says so.
        met: conditions on inputs that the example met, to be turned.
    """
    generator = torch.Generator().manual_seed(0)
    example = [leaf.detach() if isinstance(leaf, torch.Tensor) else leaf for leaf in flat.leaves]

    def varied(rule: _Rule) -> list[Any]:
        pairs = zip(example, ranges, strict=True)
        return [rule(x, limits, generator) if isinstance(x, torch.Tensor) and x.numel() else x for x, limits in pairs]

    for group in rounds(met):
        yield "negated conditions", duplicate(call, flat, turned(varied(_mirrored), group, clones(flat), ranges))
    for name, rule in _RULES.items():
        yield name, duplicate(call, flat, varied(rule))


def _is_integer(x: torch.Tensor) -> bool:
    return not (x.is_floating_point() or x.is_complex() or x.dtype is torch.bool)


def _within(x: torch.Tensor, limits: Range) -> torch.Tensor:
    return x if limits is None else x.clamp(*limits)


def _span(x: torch.Tensor, limits: Range) -> tuple[int, int]:
    """What is declared; else what the example holds, and zero: a position below the largest one, a mask of ones turned off."""
    return limits or (min(0, int(x.min())), max(0, int(x.max())))


def _random(x: torch.Tensor, limits: Range, generator: torch.Generator) -> torch.Tensor:
    if x.dtype is torch.bool:
        return torch.rand(x.shape, generator=generator).to(x.device) < 0.5
    if _is_integer(x):
        low, high = _span(x, limits)
        span = min(high - low, 2**31) + 1  # as good as any for what a model does with it
        return (torch.randint(span, x.shape, generator=generator).to(x.device) + low).to(x.dtype)
    return torch.randn(x.shape, generator=generator).to(x.device, x.dtype)


def _mirrored(x: torch.Tensor, limits: Range, generator: torch.Generator) -> torch.Tensor:
    if x.dtype is torch.bool:
        return ~x
    if _is_integer(x):
        low, high = _span(x, limits)
        return (low + high - x).to(x.dtype)
    return -x


def _zeros(x: torch.Tensor, limits: Range, generator: torch.Generator) -> torch.Tensor:
    return _within(torch.zeros_like(x), limits if _is_integer(x) else None)


def _more(x: torch.Tensor, limits: Range, generator: torch.Generator) -> torch.Tensor:
    if x.dtype is torch.bool:
        return torch.ones_like(x)
    return _within(x + 1, limits) if _is_integer(x) else x * 10 + 1


# The most telling one first: by default there is no other.
_RULES: dict[str, _Rule] = {"mirrored values": _mirrored, "random values": _random, "zeros": _zeros, "larger values": _more}

