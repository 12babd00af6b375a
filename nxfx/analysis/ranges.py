"""Integer intervals: what every element of an integer or bool value can be, without running the graph.

One forward sweep with a transfer function per op (:mod:`nxfx.analysis.range_rules`). An op without a rule gets its dtype's
bounds, never less. Float values are bounded lazily, only where a cast to an integer asks (:mod:`nxfx.analysis.float_ranges`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import fx

from nxfx.analysis import bodies, dtype_rules
from nxfx.analysis.guarded import refine
from nxfx.analysis.implied import implied_range
from nxfx.analysis.intervals import INT32, INT64, Bounds, Interval, Ranges, Requirement, fits, meet
from nxfx.analysis.provenance import Premise, Role, Source
from nxfx.analysis.range_rules import RULES, Rule, within
from nxfx.graph import meta, walk

__all__ = ["INT32", "INT64", "Interval", "Ranges", "Requirement", "analyse", "fits"]

_INTEGRAL = {d: dtype_rules.integer_bounds(d) for d in dtype_rules.TABLE if dtype_rules.is_integral(d)}

_WHERE = torch.ops.aten.where.self

# A scan of a buffer costs time; small dtypes gain nothing from it.
_SCAN_LIMIT = 1 << 24


def analyse(
    gm: fx.GraphModule, sources: Mapping[str, Source], requirements: Mapping[str, Interval] | None = None, *, depth: int = 0
) -> Ranges:
    """Bounds of every integer and bool value of ``gm``, and of what it hands to the bodies of its higher-order ops.

    Args:
        gm: a functional ATen graph with ``val`` on every node.
        sources: placeholder or ``get_attr`` node name → origin. One that is missing (an operand of a higher-order op's body)
            is known by its dtype alone.
        requirements: input name → bounds that the boundary enforces already.
        depth: how many loops ``gm`` is in.
    """
    ranges = Ranges(sources, depth)
    requirements = requirements or {}
    assumed = ranges._assumed
    fake = meta.FakeTensor
    for node in gm.graph.nodes:
        value = node.meta.get("val")
        kind = type(value)
        if kind is fake or isinstance(value, torch.Tensor):
            limits = _INTEGRAL.get(value.dtype)
            if limits is None:
                continue
            if node.op != "call_function":
                _enter_source(ranges, node, value, limits, requirements)
                continue
            if limits == (0, 1):
                assumed[node] = limits
                continue
        elif kind is torch.SymInt or kind is int or kind is bool:
            _apply(ranges, node, partial(ranges.symbolic, value))
            continue
        elif kind is tuple or kind is list:
            if walk.is_higher_order(node):
                _apply(ranges, node, partial(bodies.enter, ranges, node))
                continue
            _enter_many(ranges, node, value, RULES.get(node.target))
            continue
        else:
            continue
        rule = RULES.get(node.target)
        if rule is None:
            assumed[node] = limits
        else:
            _apply(ranges, node, partial(_by_rule, rule, node, ranges, limits))
            if node.target is _WHERE and not fits(ranges.proved(node) or limits, INT32):
                refine(ranges, node)
    return ranges


def _apply(ranges: Ranges, node: fx.Node, compute: Callable[[], Bounds]) -> None:
    """Both bounds of ``node``. They can differ only where an input or a dimension is assumed, so one run is the usual case."""
    ranges._leaned = False
    ranges._assumed[node] = bounds = compute()
    resting = next((n for n in node.all_input_nodes if n in ranges._proved), None) if ranges._proved else None
    if resting is None and not ranges._leaned:
        return
    with ranges.strict():
        proved = compute()
    if proved != bounds:
        ranges._proved[node] = proved
    if resting is not None and resting in ranges._culprit:
        ranges._culprit[node] = ranges._culprit[resting]


def _by_rule(rule: Rule, node: fx.Node, ranges: Ranges, limits: Interval) -> Interval:
    return within(rule(node, ranges), limits)


def _enter_many(ranges: Ranges, node: fx.Node, values: Sequence[Any], rule: Rule | None) -> None:
    limits = [_INTEGRAL.get(v.dtype) if isinstance(v, torch.Tensor) else None for v in values]
    if not any(limits):
        return

    def each() -> list[Interval | None]:
        found = rule(node, ranges) if rule is not None else None
        per_output = found if isinstance(found, list) else [found] * len(values)
        return [None if b is None else within(f, b) for f, b in zip(per_output, limits, strict=False)]

    _apply(ranges, node, each)


def _enter_source(
    ranges: Ranges, node: fx.Node, value: torch.Tensor, limits: Interval, requirements: Mapping[str, Interval]
) -> None:
    source = ranges.sources.get(node.name)
    if source is None or source.role is Role.OPAQUE:
        _enter_operand(ranges, node, source, limits)
        return
    if source.is_known and source.role is not Role.INPUT:
        ranges._assumed[node] = _known_value(ranges, source, limits)
        return
    if limits == (0, 1):
        ranges._assumed[node] = limits
        return
    if source.range is not None:
        bounds = meet(limits, source.range)
        ranges._assumed[node] = bounds
        ranges.requirements[node] = Requirement(bounds, "declared", "declared")
        return
    enforced = requirements.get(source.name) if source.role is Role.INPUT else None
    if fits(limits, INT32):
        ranges._assumed[node] = limits if enforced is None else meet(limits, enforced)
        return
    implied = implied_range(ranges, node) if source.role is Role.INPUT else None
    if enforced is not None and (implied is None or enforced[1] - enforced[0] < implied[0][1] - implied[0][0]):
        implied = enforced, "it is a position of a write"
    if implied is not None:
        ranges._assumed[node] = meet(limits, implied[0])
        ranges.requirements[node] = Requirement(meet(limits, implied[0]), "implied", implied[1])
    else:
        assumed = meet(limits, source.assumed or INT32)
        ranges._assumed[node], ranges._proved[node] = assumed, limits
        ranges._culprit[node] = node
        ranges.requirements[node] = Requirement(assumed, "assumed", "an undeclared input is taken to fit int32")


def _enter_operand(ranges: Ranges, node: fx.Node, source: Source | None, limits: Interval) -> None:
    """The operand of a body: what the graph around it knows."""
    proved = meet(limits, source.range) if source is not None and source.range is not None else limits
    ranges._assumed[node] = meet(limits, source.assumed) if source is not None and source.assumed is not None else proved
    if ranges._assumed[node] != proved:
        ranges._proved[node], ranges._culprit[node] = proved, node


def _known_value(ranges: Ranges, source: Source, limits: Interval) -> Interval:
    tensor = source.value
    assert tensor is not None
    if isinstance(tensor, meta.FakeTensor) or tensor.is_meta or limits[1] <= 2**16 or not 0 < tensor.numel() <= _SCAN_LIMIT:
        return limits
    with torch.no_grad():
        low, high = (int(v) for v in torch.aminmax(tensor))
    if source.role is not Role.CONSTANT:
        ranges.premises.append(Premise(source.name, "range", (low, high)))
    return low, high
