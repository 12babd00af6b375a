"""Bounds that hold only where a ``where`` looks: ``where(x < 8, x, log(x / 8).to(int64))`` never reads log(0).

Bucketed relative positions (T5 and everything after it) cast minus infinity to int64 in a branch that ``where`` then discards. On
the side of a comparison that selects a branch the compared value has tighter bounds, and so has every element-wise value computed
from it. Values that only this ``where`` reads need to be right only there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import fx

from nxfx.analysis import dtype_rules
from nxfx.analysis.intervals import INT32, Interval, Ranges, fits, join
from nxfx.analysis.range_rules import RULES, overloads, within
from nxfx.graph import meta

aten = torch.ops.aten

# Element-wise ops that raise for no operand, so that what they make of a discarded element does not matter.
_HARMLESS = frozenset(
    overloads("add", "sub", "mul", "neg", "abs", "minimum", "maximum", "clamp", "clamp_min", "clamp_max", "log", "log2", "sqrt",
              "floor", "ceil", "round", "trunc", "exp", "true_divide")
    + [aten._to_copy.default, aten.max.other, aten.min.other, aten.div.Tensor, aten.div.Scalar]
)  # fmt: skip
# Ops that read a tensor's shape and dtype, not its values.
_TEMPLATES = frozenset(
    [*overloads("full_like", "zeros_like", "ones_like", "empty_like"), aten._assert_tensor_metadata.default]
)
_LIMIT = 32
_BELOW = {aten.lt.Scalar: 1, aten.lt.Tensor: 1, aten.le.Scalar: 0, aten.le.Tensor: 0}
_ABOVE = {aten.gt.Scalar: 1, aten.gt.Tensor: 1, aten.ge.Scalar: 0, aten.ge.Tensor: 0}


def refine(ranges: Ranges, where: fx.Node) -> None:
    """Tighten the bounds of a ``where`` that does not fit int32, and of what only it reads, as far as its condition allows."""
    found = _refined(ranges, where)
    if found is None:
        return
    with ranges.strict():
        proved = _refined(ranges, where)
    ranges.guarded.update(n for n in found if n is not where)
    for node, bounds in found.items():
        ranges.tighten(node, bounds, None if proved is None else proved.get(node))


def _refined(ranges: Ranges, where: fx.Node) -> dict[fx.Node, Interval] | None:
    condition, *branches = where.args
    results: list[Interval] = []
    inside: dict[fx.Node, Interval] = {}
    for branch, holds in zip(branches, (True, False), strict=True):
        bounds = ranges.read(branch)
        if bounds is None:
            return None
        limit = constraint(ranges, condition, holds)
        compared = list(before_casts(limit[0], ranges.read)) if limit is not None else []
        if limit is not None and branch in compared:
            results += [limit[1]] if limit[1] is not None else []
        elif fits(bounds, INT32) or not isinstance(branch, fx.Node):
            results.append(bounds)
        else:
            chain = _chain(branch, compared)
            if limit is None or chain is None:
                return None
            found = _evaluate(ranges, chain, compared, limit[1])
            results += [found[branch]] if limit[1] is not None else []
            readers = {where}
            for node in reversed(chain):
                if all(u in readers or u.target in _TEMPLATES for u in node.users):
                    readers.add(node)
                    if node in found:
                        inside[node] = join(found[node], inside.get(node, found[node]))  # read on both sides: either holds
    return {where: join(*results), **inside} if results else None


def constraint(ranges: Ranges, condition: Any, holds: bool) -> tuple[fx.Node, Interval | None] | None:
    """The compared value and its bounds where ``condition`` is ``holds``; None for bounds where it never is."""
    if not isinstance(condition, fx.Node) or condition.target not in _BELOW | _ABOVE:
        return None
    value, limit = condition.args[0], ranges.read(condition.args[1])
    bounds = ranges.read(value)
    if not isinstance(value, fx.Node) or bounds is None or limit is None:
        return None
    below = (condition.target in _BELOW) == holds
    margin = _BELOW.get(condition.target, _ABOVE.get(condition.target, 0))
    margin = margin if holds else 1 - margin
    low, high = (bounds[0], min(bounds[1], limit[1] - margin)) if below else (max(bounds[0], limit[0] + margin), bounds[1])
    return value, (low, high) if low <= high else None


def before_casts(value: fx.Node, bounds_of: Callable[[fx.Node], Interval | None]) -> Iterator[fx.Node]:
    """``value``, and what it was before each cast that changes no number of it."""
    yield value
    while value.target is aten._to_copy.default:
        source, dtype = value.args[0], meta.dtype_of(value)
        bounds = bounds_of(source) if isinstance(source, fx.Node) else None
        if bounds is None or dtype is None or not dtype_rules.is_integral(dtype) or not fits(bounds, dtype_rules.integer_bounds(dtype)):
            break
        assert isinstance(source, fx.Node)
        value = source
        yield value


def _chain(branch: fx.Node, values: Iterable[fx.Node]) -> list[fx.Node] | None:
    """The element-wise values from one of ``values`` to ``branch``, in order; None when there is no such way."""
    order: list[fx.Node] = []
    seen = dict.fromkeys(values, True)

    def depends(node: fx.Node) -> bool:
        if node not in seen:
            seen[node] = False
            if len(seen) <= _LIMIT and node.target in _HARMLESS:
                ways = [n for n in node.all_input_nodes if depends(n)]  # all of them: each belongs to the chain
                seen[node] = bool(ways)
                if ways:
                    order.append(node)
        return seen[node]

    return order if depends(branch) else None


def _evaluate(
    ranges: Ranges, chain: list[fx.Node], values: list[fx.Node], bounds: Interval | None
) -> dict[fx.Node, Interval]:
    """Bounds of the integers in ``chain`` when ``values`` are in ``bounds``; where that never happens anything goes."""
    integers = [n for n in chain if dtype_rules.is_integral(meta.dtype_of(n))]
    if bounds is None:
        return dict.fromkeys(integers, (0, 0))
    found: dict[fx.Node, Interval] = {}
    with ranges.supposing(dict.fromkeys(values, bounds)) as supposed:
        for node in integers:
            dtype = meta.dtype_of(node)
            assert dtype is not None
            rule = RULES.get(node.target)
            found[node] = supposed[node] = within(rule(node, ranges) if rule else None, dtype_rules.integer_bounds(dtype))
    return found
