"""Tighter assumptions about undeclared inputs whose values grow: an attention mask that is summed, positions less one, mask times mask.

An undeclared int64 input is taken to fit int32, so its sum over a dimension may not, nor its successor, nor anything computed from
these. When the example holds small values, and there is a bound far above them within which all of that fits, that bound is assumed
instead and the boundary enforces it. Values beyond it are refused by name; a declared range takes its place.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import fx

from nxfx.analysis.intervals import INT32, Interval, Ranges, fits
from nxfx.analysis.provenance import Role, Source
from nxfx.analysis.range_rules import PRESERVING_VIEWS, overloads
from nxfx.analysis.ranges import analyse
from nxfx.graph import meta

aten = torch.ops.aten

_SUMS = frozenset([*overloads("sum", "cumsum"), aten.mm.default, aten.bmm.default, aten.matmul.default])
_STEPS = frozenset(overloads("add", "sub", "rsub"))
_PRODUCTS = frozenset([aten.mul.Tensor, aten.einsum.default])
_KEEPS = PRESERVING_VIEWS | frozenset([*overloads("slice", "select", "expand", "unbind", "mul"), aten._to_copy.default, operator.getitem])
_HIGHEST = 30
_LOWEST_SUMMED = 7  # a bound below 2^7 would be a guess about what the values mean
_LOWEST = 15  # of what is added to or multiplied: an id may have more bits than the example shows
_MARGIN = 64  # how far above the example's values a bound has to be


def assume_small_sums(
    gm: fx.GraphModule, sources: dict[str, Source], requirements: Mapping[str, Interval], ranges: Ranges
) -> Ranges:
    """``ranges``, or those under tighter assumptions, which are noted in ``sources``.

    The largest power of two is taken that makes everything fit that depends on the inputs concerned; where none does, nothing is
    tightened. Costs five more sweeps, and only where an undeclared input is summed, shifted or multiplied beyond int32.
    """
    floors = {n: floor for n in ranges.requirements if (floor := _lowest_exponent(ranges, n, sources)) is not None}
    if not floors or all(fits(b, INT32) for b in _dependent(ranges, floors)):
        return ranges
    fitting: Ranges | None = None
    low, high = min(floors.values()), _HIGHEST + 1
    chosen: dict[str, Source] = {}
    while low < high:
        exponent = (low + high) // 2 if fitting is not None else low  # the tightest first: when that fails all do
        bounds = {n: 2 ** max(exponent, floor) for n, floor in floors.items()}
        tighter = {n.name: dataclasses.replace(sources[n.name], assumed=(-bound, bound)) for n, bound in bounds.items()}
        found = analyse(gm, {**sources, **tighter}, requirements)
        if all(fits(b, INT32) for b in _dependent(found, floors)):
            fitting, chosen, low = found, tighter, exponent + 1
        elif fitting is None:
            return ranges
        else:
            high = exponent
    if fitting is None:
        return ranges
    sources |= chosen
    return fitting


def _lowest_exponent(ranges: Ranges, node: fx.Node, sources: Mapping[str, Source]) -> int | None:
    """The tightest bound, as a power of two, that may be assumed of an input; None when it is left alone."""
    source = sources[node.name]
    undeclared = source.role is Role.INPUT and source.assumed is None and ranges.requirements[node].basis == "assumed"
    if not undeclared or source.seen is None:
        return None
    uses = set(_growing_uses(node))
    if not uses & (_SUMS | _STEPS) and not (uses and fits(source.seen, (0, 1))):
        return None  # a product of ids is one of ids until the example is a mask
    exponent = max(_LOWEST_SUMMED if uses & _SUMS else _LOWEST, (_MARGIN * max(map(abs, source.seen))).bit_length())
    return exponent if exponent <= _HIGHEST else None


def _growing_uses(node: fx.Node) -> Iterator[Any]:
    """Ops that read the values of ``node`` and may give larger ones."""
    pending, seen = [node], {node}
    while pending:
        for user in pending.pop().users:
            if user.target in _SUMS | _STEPS or (user.target in _PRODUCTS and not isinstance(user.args[1], int)):
                yield user.target
            if user.target in _KEEPS and user not in seen and meta.dtype_of(user) in (torch.int64, None):  # None: several outputs
                seen.add(user)
                pending.append(user)


def _dependent(ranges: Ranges, inputs: Iterable[fx.Node]) -> Iterator[Interval]:
    """Bounds of every int64 value that is known to depend on one of the inputs."""
    for node, culprit in ranges.culprits():
        if culprit in inputs and node not in ranges.guarded:
            values = node.meta["val"] if isinstance(node.meta["val"], (list, tuple)) else [node.meta["val"]]
            for value, bounds in zip(values, ranges.outputs(node), strict=False):
                if bounds is not None and isinstance(value, torch.Tensor) and value.dtype is torch.int64:
                    yield bounds
