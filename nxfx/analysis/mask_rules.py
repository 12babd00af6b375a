"""What each op makes of the levels of a mask (:mod:`nxfx.analysis.mask_levels`)."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import fx

from nxfx.analysis.intervals import arg
from nxfx.analysis.range_rules import PRESERVING_VIEWS, SELECTIONS, overloads
from nxfx.graph import matrix_products

aten = torch.ops.aten

LOW = -1000.0
"""A number above it is an ordinary one: masks of such numbers overflow nowhere."""


class Level(NamedTuple):
    """What an element can be.

    Attributes:
        eager: the number in the model.
        now: the number when fills beyond the floor are brought within it.
        scored: a score is added to it.
    """

    eager: float
    now: float
    scored: bool = False


Levels: TypeAlias = frozenset[Level]
SCORE: Levels = frozenset([Level(0.0, 0.0, True)])
LOST: Levels = SCORE | {Level(-math.inf, -math.inf, True)}
"""A score, or a minus infinity that came through an op without a rule: no other fill takes it away."""
BOOL: Levels = frozenset([Level(0.0, 0.0), Level(1.0, 1.0)])
_Combine: TypeAlias = Callable[[fx.Node, list[Levels]], Iterable[Level] | None]


@dataclass(frozen=True)
class Rule:
    """How an op makes levels.

    Attributes:
        positions: of the arguments whose values its result is made of.
        combine: their levels → its levels before rounding; None where they cannot be told.
    """

    positions: tuple[int, ...]
    combine: _Combine


def operands(node: fx.Node) -> list[fx.Node]:
    """The nodes whose levels those of ``node`` are made of."""
    return [v for v in values(node) if isinstance(v, fx.Node)]


def values(node: fx.Node) -> list[Any]:
    """The nodes and numbers whose levels those of ``node`` are made of, in the order of :class:`Rule`'s positions."""
    rule = RULES.get(node.target) if node.op == "call_function" else None
    found: list[Any] = []
    for position in rule.positions if rule is not None else ():
        argument = node.args[position] if position < len(node.args) else node.kwargs.get(_NAMES.get((node.target, position), ""))
        found += argument if isinstance(argument, (list, tuple)) else [argument]
    return [v for v in found if v is not None]


def carriers(node: fx.Node) -> list[fx.Node]:
    """The nodes whose minus infinities may be found in ``node``, which has no rule."""
    op = node.target
    if node.op != "call_function" or not isinstance(op, torch._ops.OpOverload) or op in RULES or op in _ENDS:
        return []
    return node.all_input_nodes if op.namespace in ("aten", "prims") else []


def moved_from(node: fx.Node) -> fx.Node:
    """The value that ``node`` only shows, casts or moves."""
    while node.op == "call_function" and RULES.get(node.target) is SAME and node.target not in _EXTREMES and operands(node):
        node = operands(node)[0]
    return node


# --- the rules -------------------------------------------------------------------------------------------------------


def _union(node: fx.Node, parts: list[Levels]) -> Iterable[Level] | None:
    if node.target in _INDEX_PUTS and arg(node, 3, "accumulate", False):
        return None
    return frozenset().union(*parts)


def _or_zero(node: fx.Node, parts: list[Levels]) -> Iterable[Level] | None:
    return parts[0] | {Level(0.0, 0.0)}


def _padded(node: fx.Node, parts: list[Levels]) -> Iterable[Level] | None:
    constant = node.target is not aten.pad.default or arg(node, 2, "mode", "constant") == "constant"
    return _union(node, parts) if len(parts) > 1 or not constant else _or_zero(node, parts)


def _each(level: Level, change: Callable[[float], float]) -> Level:
    return Level(change(level.eager), change(level.now), level.scored)


def _times(levels: Levels, factor: float) -> Levels:
    return frozenset(_each(x, lambda v: v * factor) for x in levels)


def _added(a: Levels, b: Levels) -> Iterable[Level]:
    return {Level(x.eager + y.eager, x.now + y.now, x.scored or y.scored) for x, y in itertools.product(a, b)}


def _sum(node: fx.Node, parts: list[Levels]) -> Iterable[Level] | None:
    return _weighted(parts, arg(node, 2, "alpha", 1))


def _difference(node: fx.Node, parts: list[Levels]) -> Iterable[Level] | None:
    if _subtracts_own_maximum(node):
        return parts[0]
    parts, alpha = (parts[::-1] if "rsub" in str(node.target) else parts), arg(node, 2, "alpha", 1)
    return _weighted(parts, -alpha) if isinstance(alpha, (int, float)) else None


def _weighted(parts: list[Levels], factor: Any) -> Iterable[Level] | None:
    if len(parts) != 2 or not isinstance(factor, (int, float)):
        return None
    if factor <= 0 and any(level.scored and level[:2] != (0, 0) for level in parts[1]):
        return None
    return _added(parts[0], _times(parts[1], factor))


def _subtracts_own_maximum(node: fx.Node) -> bool:
    """``y - y.amax(-1, True)``: nothing is taken from what keeps something, and what keeps nothing is nan."""
    if node.target is not aten.sub.Tensor or not all(isinstance(a, fx.Node) for a in node.args[:2]):
        return False
    largest = moved_from(node.args[1])  # type: ignore[arg-type]
    return largest.target in _EXTREMES and moved_from(operands(largest)[0]) is moved_from(node.args[0])  # type: ignore[arg-type]


def _product(node: fx.Node, parts: list[Levels]) -> Iterable[Level] | None:
    if any(level.scored for part in parts for level in part):
        return _scaled(parts, operator.mul)
    return {Level(x.eager * y.eager, x.now * y.now) for x, y in itertools.product(*parts)}


def _quotient(node: fx.Node, parts: list[Levels]) -> Iterable[Level] | None:
    return None if any(level.scored for level in parts[1]) else _scaled(parts, operator.truediv)


def _scaled(parts: list[Levels], scale: Callable[[float, float], float]) -> Iterable[Level] | None:
    levels, factors = parts if not any(level.scored for level in parts[1]) else parts[::-1]
    if any(factor.scored or not 0 <= factor.eager < math.inf for factor in factors):
        return None
    if scale is operator.truediv and any(factor.eager == 0 for factor in factors):
        return None
    return {Level(scale(x.eager, f.eager), scale(x.now, f.now), x.scored) for x, f in itertools.product(levels, factors)}


def _negative(node: fx.Node, parts: list[Levels]) -> Iterable[Level] | None:
    return None if any(level.scored for level in parts[0]) else _times(parts[0], -1.0)


def _product_added(node: fx.Node, parts: list[Levels]) -> Iterable[Level] | None:
    beta = node.kwargs.get("beta", 1)
    if not isinstance(beta, (int, float)) or beta < 0:
        return None
    return _added(_times(parts[0], beta), SCORE) if beta else SCORE


def _clamped(node: fx.Node, parts: list[Levels]) -> Iterable[Level] | None:
    name = str(node.target)
    low, high = (arg(node, 1, "min"), arg(node, 2, "max")) if ".clamp." in name else (arg(node, 1, "min"), None)
    low, high = (None, arg(node, 1, "max")) if "clamp_max" in name else (low, high)
    low, high = (-math.inf if low is None else low), (math.inf if high is None else high)
    if isinstance(low, fx.Node) or isinstance(high, fx.Node):
        return None
    return {x if x.scored and x.eager >= LOW else _each(x, lambda v: min(max(v, low), high)) for x in parts[0]}


def _extreme(node: fx.Node, parts: list[Levels]) -> Iterable[Level] | None:
    pick = max if "max" in str(node.target) else min
    found: set[Level] = set()
    for a, b in itertools.product(*parts):
        found |= {a, b} if a.scored or b.scored else {Level(pick(a.eager, b.eager), pick(a.now, b.now))}
    return found


def _leaky(node: fx.Node, parts: list[Levels]) -> Iterable[Level] | None:
    slope = arg(node, 1, "negative_slope", 0.01)
    if not isinstance(slope, (int, float)) or not slope > 0:
        return None
    return {_each(x, lambda v: v * slope if v < 0 else v) for x in parts[0]}


def _logarithm(node: fx.Node, parts: list[Levels]) -> Iterable[Level] | None:
    if any(level.scored or level.eager != level.now for level in parts[0]):
        return None
    logs = (float(node.target(torch.tensor(level.eager, dtype=torch.float64))) for level in parts[0])  # type: ignore[operator]
    return {Level(log, log) for log in logs}


SAME = Rule((0,), _union)
_INDEX_PUTS = frozenset(overloads("index_put"))
_EXTREMES = frozenset([*overloads("amax", "logsumexp"), aten.max.dim])
_PRODUCTS = (aten.mul.Tensor, aten.mul.Scalar)
CLAMPED = frozenset(overloads("log", "log2", "log10", "log1p"))
"""The ops that make minus infinity of an ordinary number."""
RULES: dict[Any, Rule] = {
    **dict.fromkeys([*PRESERVING_VIEWS, *SELECTIONS, *overloads("_to_copy", "type_as", "topk")], SAME),
    **dict.fromkeys([*_EXTREMES, aten.min.dim, aten.repeat_interleave.self_int, operator.getitem], SAME),
    **dict.fromkeys(overloads("where"), Rule((1, 2), _union)),
    **dict.fromkeys([*overloads("masked_fill", "masked_scatter"), *_INDEX_PUTS], Rule((0, 2), _union)),
    **dict.fromkeys([aten.scatter.src, aten.scatter.value, *overloads("index_copy", "index_fill")], Rule((0, 3), _union)),
    **dict.fromkeys(overloads("slice_scatter", "select_scatter", "diagonal_scatter"), Rule((0, 1), _union)),
    **dict.fromkeys(overloads("copy", "fill"), Rule((1,), _union)),
    **dict.fromkeys(overloads("cat", "stack"), Rule((0,), _union)),
    **dict.fromkeys(overloads("tril", "triu"), Rule((0,), _or_zero)),
    aten.constant_pad_nd.default: Rule((0, 2), _padded),
    aten.pad.default: Rule((0, 3), _padded),
    **dict.fromkeys([aten.add.Tensor, aten.add.Scalar], Rule((0, 1), _sum)),
    **dict.fromkeys([aten.sub.Tensor, aten.sub.Scalar, *overloads("rsub")], Rule((0, 1), _difference)),
    **dict.fromkeys(_PRODUCTS, Rule((0, 1), _product)),
    **dict.fromkeys([aten.div.Tensor, aten.div.Scalar], Rule((0, 1), _quotient)),
    **dict.fromkeys([aten.baddbmm.default, aten.addmm.default], Rule((0,), _product_added)),
    **dict.fromkeys([aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default], Rule((0,), _clamped)),
    **dict.fromkeys([*overloads("maximum", "minimum"), aten.max.other, aten.min.other], Rule((0, 1), _extreme)),
    aten.leaky_relu.default: Rule((0,), _leaky),
    **dict.fromkeys(CLAMPED, Rule((0,), _logarithm)),
    aten.neg.default: Rule((0,), _negative),
}
_NAMES: dict[tuple[Any, int], str] = {(aten.constant_pad_nd.default, 2): "value", (aten.pad.default, 3): "value"}
# What is bounded, or nan, where an operand is minus infinity.
_ENDS = (frozenset(overloads(*matrix_products.NAMES)) - RULES.keys()) | frozenset(
    overloads(
        *(name for name in dir(aten) if "scaled_dot_product" in name),
        "softmax", "_softmax", "_safe_softmax", "exp", "exp2", "expm1", "sigmoid", "tanh", "relu", "relu6",
        "hardtanh", "hardsigmoid", "elu", "selu", "celu", "softplus", "gelu", "silu", "mish", "erf", "atan", "sign", "nan_to_num",
        "square", "pow", "sqrt", "rsqrt", "reciprocal", "sin", "cos", "layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm",
        "group_norm", "native_group_norm", "batch_norm", "native_batch_norm", "bernoulli", "multinomial",
    )
) | {aten.clamp.Tensor, aten.clamp_min.Tensor}  # fmt: skip
