"""Bounds of float values, as far as casts to integers need them: computed on demand, backwards from the cast.

A bound also says that no element is nan. Every rounding is covered by widening the exact result outwards by a few units in the
last place of the result's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import fx

from nxfx.analysis.intervals import Ranges, arg
from nxfx.graph import meta

aten = torch.ops.aten
FloatInterval: TypeAlias = tuple[float, float]

# Deep float chains end in something unbounded anyway; this also bounds the recursion.
_DEPTH = 24
_WIDENING = 8  # units in the last place; torch's own tolerance for sin, exp and friends is below that


def bound(ranges: Ranges, value: Any, depth: int = _DEPTH) -> FloatInterval | None:
    """Inclusive bounds of every element of ``value`` (a node or a number), which is then never nan; None when unknown."""
    if isinstance(value, (bool, int, float)):
        return (float(value), float(value)) if math.isfinite(value) else None
    if not isinstance(value, fx.Node):
        return None
    integer = ranges.read(value)
    if integer is not None:
        return float(integer[0]), float(integer[1])
    key = (value, ranges.strictly)
    if key not in ranges._floats:
        ranges._floats[key] = None  # while it is being computed, and when it is too deep
        rule = _RULES.get(value.target) if value.op == "call_function" and depth > 0 else None
        exact = rule(value, lambda v: bound(ranges, v, depth - 1)) if rule else None
        ranges._floats[key] = _rounded(exact, meta.dtype_of(value))
    return ranges._floats[key]


def _rounded(exact: FloatInterval | None, dtype: torch.dtype | None) -> FloatInterval | None:
    if exact is None or dtype is None or not dtype.is_floating_point or not all(map(math.isfinite, exact)):
        return None
    info = torch.finfo(dtype)
    low, high = (end + sign * (abs(end) * info.eps * _WIDENING + info.tiny) for end, sign in zip(exact, (-1, 1), strict=True))
    return (low, high) if -info.max <= low and high <= info.max else None


Ask: TypeAlias = Callable[[Any], "FloatInterval | None"]
FloatRule: TypeAlias = Callable[[fx.Node, Ask], "FloatInterval | None"]
_RULES: dict[Any, FloatRule] = {}


def _rule(*names: str) -> Callable[[FloatRule], FloatRule]:
    def register(function: FloatRule) -> FloatRule:
        for name in names:
            packet = getattr(aten, name)
            for overload in packet.overloads():
                if not overload.endswith("out"):
                    _RULES[getattr(packet, overload)] = function
        return function

    return register


@_rule("view", "_unsafe_view", "reshape", "unsqueeze", "squeeze", "permute", "transpose", "t", "clone", "alias", "detach", "expand",
       "slice", "select", "index_select", "gather", "index", "repeat", "flip", "lift_fresh_copy", "amax", "amin", "_to_copy", "to",
       "max_pool1d",
       "relu", "floor", "ceil", "trunc")  # fmt: skip
def _kept_or_nearly(node: fx.Node, of: Ask) -> FloatInterval | None:
    if node.target is aten.view.dtype:
        return None
    source = of(node.args[0])
    if source is None:
        return None
    name = node.target.__name__.split(".")[0]  # type: ignore[union-attr]
    if name == "relu":
        return max(source[0], 0.0), max(source[1], 0.0)
    if name in ("floor", "ceil", "trunc"):
        return float(math.floor(source[0])), float(math.ceil(source[1]))
    return source


@_rule("round")
def _round(node: fx.Node, of: Ask) -> FloatInterval | None:
    source = of(node.args[0])
    return (math.floor(source[0]), math.ceil(source[1])) if source and node.target is aten.round.default else None


@_rule("add", "sub", "mul", "div", "minimum", "maximum")
def _binary(node: fx.Node, of: Ask) -> FloatInterval | None:
    a, b = of(node.args[0]), of(node.args[1])
    if a is None or b is None or arg(node, 2, "alpha", 1) != 1 or node.kwargs.get("rounding_mode"):
        return None
    name = node.target.__name__.split(".")[0]  # type: ignore[union-attr]
    if name == "minimum":
        return min(a[0], b[0]), min(a[1], b[1])
    if name == "maximum":
        return max(a[0], b[0]), max(a[1], b[1])
    if name == "add":
        return a[0] + b[0], a[1] + b[1]
    if name == "sub":
        return a[0] - b[1], a[1] - b[0]
    if name == "div":
        if b[0] <= 0 <= b[1]:
            return None
        b = (1 / b[1], 1 / b[0])
    corners = [x * y for x in a for y in b]
    return min(corners), max(corners)


@_rule("neg", "abs", "sqrt", "log", "log2", "exp")
def _unary(node: fx.Node, of: Ask) -> FloatInterval | None:
    source = of(node.args[0])
    if source is None:
        return None
    low, high = source
    name = node.target.__name__.split(".")[0]  # type: ignore[union-attr]
    if name == "neg":
        return -high, -low
    if name == "abs":
        return (0.0 if low <= 0 <= high else min(abs(low), abs(high))), max(abs(low), abs(high))
    if name == "sqrt":
        return (math.sqrt(low), math.sqrt(high)) if low >= 0 else None
    if name == "exp":
        return (math.exp(low), math.exp(high)) if high < 700 else None
    function = math.log if name == "log" else math.log2
    return (function(low), function(high)) if low > 0 else None


@_rule("clamp", "clamp_min", "clamp_max")
def _clamp(node: fx.Node, of: Ask) -> FloatInterval | None:
    source = of(node.args[0])  # nan stays nan, so an unknown input is an unknown result
    if source is None:
        return None
    first = node.target.__name__.startswith("clamp_max")  # type: ignore[union-attr]
    low = None if first else arg(node, 1, "min")
    high = arg(node, 1, "max") if first else arg(node, 2, "max") if node.target in (aten.clamp.default, aten.clamp.Tensor) else None
    for limit, pick in ((low, max), (high, min)):
        if limit is not None:
            ends = of(limit)
            if ends is None:
                return None
            source = pick(source[0], ends[0]), pick(source[1], ends[1])
    return source


@_rule("where", "cat", "stack", "masked_fill")
def _choice(node: fx.Node, of: Ask) -> FloatInterval | None:
    name = node.target.__name__.split(".")[0]  # type: ignore[union-attr]
    values: Any = {"where": node.args[1:], "masked_fill": (node.args[0], node.args[-1])}.get(name) or node.args[0]
    found = [of(v) for v in values]
    known = [f for f in found if f is not None]
    if not known or len(known) != len(found):
        return None
    return min(f[0] for f in known), max(f[1] for f in known)


@_rule("full", "full_like", "scalar_tensor", "zeros", "zeros_like", "ones", "ones_like", "rand", "rand_like")
def _factory(node: fx.Node, of: Ask) -> FloatInterval | None:
    name = node.target.__name__.split(".")[0]  # type: ignore[union-attr]
    if name in ("full", "full_like"):
        return of(arg(node, 1, "fill_value"))
    if name == "scalar_tensor":
        return of(node.args[0])
    return (0.0, 1.0) if name.startswith("rand") else (1.0, 1.0) if name.startswith("ones") else (0.0, 0.0)


@_rule("arange", "linspace")
def _sequence(node: fx.Node, of: Ask) -> FloatInterval | None:
    ends = [of(v) for v in (node.args[:2] if len(node.args) > 1 else (0, node.args[0]))]
    known = [e for e in ends if e is not None]
    return (min(e[0] for e in known), max(e[1] for e in known)) if len(known) == 2 else None


@_rule("scatter")
def _scatter(node: fx.Node, of: Ask) -> FloatInterval | None:
    if node.target not in (aten.scatter.value, aten.scatter.src):
        return None
    base, written = of(node.args[0]), of(node.args[3])
    return (min(base[0], written[0]), max(base[1], written[1])) if base and written else None


@_rule("sigmoid", "tanh", "sin", "cos")
def _unit(node: fx.Node, of: Ask) -> FloatInterval | None:
    return (-1.0, 1.0) if of(node.args[0]) is not None else None


