"""Ops that make values from their arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from nxfx.analysis.intervals import Bounds, Ranges, arg
from nxfx.analysis.range_rules.table import operand, overloads, rule
from nxfx.graph import meta

aten = torch.ops.aten


def arange_arguments(node: fx.Node) -> tuple[Any, Any, Any]:
    """start, end and step of any ``arange``."""
    if len(node.args) == 1:
        return 0, node.args[0], 1
    return node.args[0], node.args[1], arg(node, 2, "step", 1)


@rule(aten.arange.default, aten.arange.start, aten.arange.start_step)
def _arange(node: fx.Node, ranges: Ranges) -> Bounds:
    start, end, step = (int(v) if isinstance(v, float) and v.is_integer() else v for v in arange_arguments(node))
    if any(isinstance(v, float) for v in (start, end, step)):
        return None
    if all(isinstance(v, int) for v in (start, end, step)):
        values = range(start, end, step)
        return (min(values[0], values[-1]), max(values[0], values[-1])) if values else (0, 0)
    first, last, by = (ranges.read(v) for v in (start, end, step))
    if first is None or last is None or by is None or by[0] <= 0 <= by[1]:
        return None
    if by[0] > 0:
        return (first[0], max(first[0], last[1] - 1))
    return (min(first[1], last[0] + 1), first[1])


@rule(aten.full.default, aten.full_like.default, aten.new_full.default)
def _full(node: fx.Node, ranges: Ranges) -> Bounds:
    return operand(node, ranges, arg(node, 2 if node.target is aten.new_full.default else 1, "fill_value"))


@rule(aten.scalar_tensor.default)
def _scalar_tensor(node: fx.Node, ranges: Ranges) -> Bounds:
    return operand(node, ranges, node.args[0])


# Uninitialised memory may hold anything, so nothing is lost by taking it to hold zeros.
@rule(*overloads("zeros", "zeros_like", "new_zeros", "zero", "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided",
                   "empty_permuted"))  # fmt: skip
def _zeros(node: fx.Node, ranges: Ranges) -> Bounds:
    return (0, 0)


@rule(*overloads("ones", "ones_like", "new_ones"))
def _ones(node: fx.Node, ranges: Ranges) -> Bounds:
    return (1, 1)


@rule(*overloads("eye", "one_hot"))
def _zero_or_one(node: fx.Node, ranges: Ranges) -> Bounds:
    return (0, 1)


@rule(aten.randint.default, aten.randint.low, aten.randint_like.default, aten.randint_like.low_dtype)
def _randint(node: fx.Node, ranges: Ranges) -> Bounds:
    ends = [a for a in node.args if isinstance(a, (int, fx.Node)) and not meta.is_tensor(a)]
    low, high = (0, ends[0]) if len(ends) == 1 else (ends[0], ends[1]) if len(ends) == 2 else (None, None)
    first, last = ranges.read(low), ranges.read(high)
    return (first[0], last[1] - 1) if first and last else None


@rule(aten.randperm.default)
def _randperm(node: fx.Node, ranges: Ranges) -> Bounds:
    count = ranges.read(node.args[0])
    return (0, max(count[1] - 1, 0)) if count else None


@rule(*overloads("tril_indices", "triu_indices"))
def _triangle_indices(node: fx.Node, ranges: Ranges) -> Bounds:
    rows, columns = ranges.read(node.args[0]), ranges.read(node.args[1])
    return (0, max(rows[1], columns[1], 1) - 1) if rows and columns else None
