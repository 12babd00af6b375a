"""Tighter assumptions about undeclared inputs that are summed: an attention mask, lengths, segment ids.

An undeclared int64 input is taken to fit int32, so its sum over a dimension may not, nor may anything computed from that sum. When the
example holds small values, and there is a bound far above them within which all of that fits, that bound is assumed instead and the
boundary enforces it. Values beyond it are refused by name; a declared range takes its place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import torch
from torch import fx

from nxfx.analysis.intervals import INT32, Interval, Ranges, fits
from nxfx.analysis.provenance import Role, Source
from nxfx.analysis.range_rules import PRESERVING_VIEWS, overloads
from nxfx.analysis.ranges import analyse
from nxfx.graph import meta

aten = torch.ops.aten

_SUMS = frozenset([*overloads("sum", "cumsum"), aten.mm.default, aten.bmm.default, aten.matmul.default])
_KEEPS = PRESERVING_VIEWS | frozenset([*overloads("slice", "select", "expand", "mul", "ne", "eq"), aten._to_copy.default])
_EXPONENTS = range(7, 31)  # a bound below 2^7 would be a guess about what the values mean
_MARGIN = 64  # how far above the example's values a bound has to be


def assume_small_sums(
    gm: fx.GraphModule, sources: dict[str, Source], requirements: Mapping[str, Interval], ranges: Ranges
) -> Ranges:
    """``ranges``, or those under tighter assumptions, which are noted in ``sources``.

    The largest power of two is taken that makes everything fit that depends on the inputs concerned; where none does, nothing is
    tightened. Costs five more sweeps, and only where an undeclared input is summed beyond int32.
    """
    inputs = [n for n in ranges.requirements if _may_be_tightened(ranges, n, sources)]
    if not inputs or all(fits(b, INT32) for b in _dependent(ranges, inputs)):
        return ranges
    largest = max(max(map(abs, sources[n.name].seen or (0, 0))) for n in inputs)
    fitting: Ranges | None = None
    low, high = max(_EXPONENTS.start, (_MARGIN * largest).bit_length()), _EXPONENTS.stop
    chosen: dict[str, Source] = {}
    while low < high:
        exponent = (low + high) // 2 if fitting is not None else low  # the tightest first: when that fails all do
        bound = (-(2**exponent), 2**exponent)
        tighter = {n.name: dataclasses.replace(sources[n.name], assumed=bound) for n in inputs}
        found = analyse(gm, {**sources, **tighter}, requirements)
        if all(fits(b, INT32) for b in _dependent(found, inputs)):
            fitting, chosen, low = found, tighter, exponent + 1
        elif fitting is None:
            return ranges
        else:
            high = exponent
    if fitting is None:
        return ranges
    sources |= chosen
    return fitting


def _may_be_tightened(ranges: Ranges, node: fx.Node, sources: Mapping[str, Source]) -> bool:
    source = sources[node.name]
    undeclared = source.role is Role.INPUT and source.assumed is None and ranges.requirements[node].basis == "assumed"
    return undeclared and source.seen is not None and _is_summed(node)


def _is_summed(node: fx.Node) -> bool:
    pending, seen = [node], {node}
    while pending:
        for user in pending.pop().users:
            if user.target in _SUMS:
                return True
            if user.target in _KEEPS and user not in seen and meta.dtype_of(user) is torch.int64:
                seen.add(user)
                pending.append(user)
    return False


def _dependent(ranges: Ranges, inputs: list[fx.Node]) -> Iterator[Interval]:
    """Bounds of every int64 value that is known to depend on one of the inputs."""
    for node, culprit in ranges.culprits():
        if culprit in inputs and node not in ranges.guarded:
            values = node.meta["val"] if isinstance(node.meta["val"], (list, tuple)) else [node.meta["val"]]
            for value, bounds in zip(values, ranges.outputs(node), strict=False):
                if bounds is not None and isinstance(value, torch.Tensor) and value.dtype is torch.int64:
                    yield bounds
