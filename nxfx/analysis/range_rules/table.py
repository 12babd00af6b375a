"""What rules of the interval table are made of.

A rule is ``rule(node, ranges)`` and returns an interval that holds in exact integer arithmetic; the sweep compares it with the
dtype and gives up (the dtype's bounds) where it does not fit, because the result may have wrapped. None means unknown. A list
holds one entry per output. Semantics are those of the ATen operators as torch's documentation gives them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx

from nxfx.analysis import dtype_rules
from nxfx.analysis.intervals import INT64, Bounds, Interval, Ranges, fits, join
from nxfx.graph import meta

aten = torch.ops.aten
Rule = Callable[[fx.Node, Ranges], Bounds]
RULES: dict[Any, Rule] = {}


def rule(*targets: Any) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        for target in targets:
            assert target not in RULES, f"two rules for {target}"
            RULES[target] = function
        return function

    return register


def overloads(*names: str) -> list[Any]:
    """Every overload of the named aten ops that this torch has."""
    found = []
    for name in names:
        packet = getattr(aten, name, None)
        if packet is not None:
            found += [getattr(packet, o) for o in packet.overloads() if not o.endswith("out") and "dimname" not in o.lower()]
    return found


def operand(node: fx.Node, ranges: Ranges, value: Any) -> Interval:
    """Bounds of ``value`` once converted to ``node``'s dtype: a scalar or 0-d tensor beyond it wraps to anything."""
    result = node.meta["val"]
    limits = dtype_rules.integer_bounds(result.dtype) if isinstance(result, torch.Tensor) else INT64
    found: Interval | None = None if isinstance(value, float) else ranges.read(value)
    if isinstance(value, float) and math.isfinite(value):
        found = (math.floor(value), math.ceil(value))
    return found if found is not None and fits(found, limits) else limits


def count_of(ranges: Ranges, sizes: Iterable[Any]) -> Interval:
    """Bounds of the product of dimension sizes."""
    low = high = 1
    for size in sizes:
        a, b = ranges.symbolic(size)
        low, high = low * max(a, 0), high * max(b, 0)
    return low, high


def shape_of(value: Any) -> tuple[Any, ...] | None:
    tensor = meta.val(value) if isinstance(value, fx.Node) else None
    return tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else None


def reduced_count(ranges: Ranges, value: Any, dims: Any) -> Interval | None:
    shape = shape_of(value)
    if shape is None:
        return None
    if dims is None or dims == []:
        return count_of(ranges, shape)
    dims = [dims] if isinstance(dims, int) else dims
    return count_of(ranges, [shape[d] for d in dims]) if shape else (1, 1)


def products(a: Interval, b: Interval) -> Interval:
    corners = [x * y for x in a for y in b]
    return min(corners), max(corners)


def within(bounds: Bounds, limits: Interval) -> Interval:
    """``bounds``, or all that the dtype holds when arithmetic may have wrapped around its ends or nothing is known."""
    return bounds if isinstance(bounds, tuple) and fits(bounds, limits) else limits


def joined(node: fx.Node, ranges: Ranges, values: Iterable[Any]) -> Bounds:
    return join(*[operand(node, ranges, v) for v in values])


def index_into(ranges: Ranges, shapes: Iterable[Iterable[Any] | None]) -> Interval | None:
    """An index into one dimension of any of these shapes."""
    most = 1
    for shape in shapes:
        if shape is None:
            return None
        most = max([most, *(ranges.symbolic(s)[1] for s in shape)])
    return 0, most - 1
