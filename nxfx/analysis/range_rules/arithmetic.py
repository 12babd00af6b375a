"""Arithmetic and bits, element by element."""

from __future__ import annotations

import math

import torch
from torch import fx

from nxfx.analysis.intervals import Bounds, Interval, Ranges, arg
from nxfx.analysis.range_rules.table import operand, overloads, products, rule

aten = torch.ops.aten


@rule(*overloads("add", "sub"))
def _add_or_sub(node: fx.Node, ranges: Ranges) -> Bounds:
    a, b = operand(node, ranges, node.args[0]), operand(node, ranges, node.args[1])
    alpha = operand(node, ranges, arg(node, 2, "alpha", 1))
    b = products(b, alpha)
    if "sub" in node.target.__name__.split(".")[0]:  # type: ignore[union-attr]
        b = (-b[1], -b[0])
    return a[0] + b[0], a[1] + b[1]


@rule(*overloads("rsub"))
def _rsub(node: fx.Node, ranges: Ranges) -> Bounds:
    a, b = operand(node, ranges, node.args[1]), operand(node, ranges, node.args[0])
    alpha = operand(node, ranges, arg(node, 2, "alpha", 1))
    b = products(b, alpha)
    return a[0] - b[1], a[1] - b[0]


@rule(*overloads("mul"))
def _mul(node: fx.Node, ranges: Ranges) -> Bounds:
    a, b = operand(node, ranges, node.args[0]), operand(node, ranges, node.args[1])
    if node.args[0] is node.args[1]:
        return _squares(a)
    return products(a, b)


def _squares(a: Interval) -> Interval:
    ends = (a[0] * a[0], a[1] * a[1])
    return (0 if a[0] <= 0 <= a[1] else min(ends), max(ends))


@rule(*overloads("square"))
def _square(node: fx.Node, ranges: Ranges) -> Bounds:
    a = ranges.read(node.args[0])
    return _squares(a) if a else None


@rule(*overloads("neg"))
def _neg(node: fx.Node, ranges: Ranges) -> Bounds:
    a = ranges.read(node.args[0])
    return (-a[1], -a[0]) if a else None


@rule(*overloads("abs"))
def _abs(node: fx.Node, ranges: Ranges) -> Bounds:
    a = ranges.read(node.args[0])
    if a is None:
        return None
    return (0 if a[0] <= 0 <= a[1] else min(abs(a[0]), abs(a[1])), max(abs(a[0]), abs(a[1])))


@rule(*overloads("sign", "sgn"))
def _sign(node: fx.Node, ranges: Ranges) -> Bounds:
    a = ranges.read(node.args[0])
    return ((a[0] > 0) - (a[0] < 0), (a[1] > 0) - (a[1] < 0)) if a else None


@rule(*overloads("relu"))
def _relu(node: fx.Node, ranges: Ranges) -> Bounds:
    a = ranges.read(node.args[0])
    return (max(a[0], 0), max(a[1], 0)) if a else None


@rule(*overloads("floor", "ceil", "round", "trunc"))
def _rounding(node: fx.Node, ranges: Ranges) -> Bounds:
    return ranges.read(node.args[0]) if "decimals" not in node.kwargs else None


@rule(*overloads("floor_divide"))
def _floor_divide(node: fx.Node, ranges: Ranges) -> Bounds:
    return _quotient(operand(node, ranges, node.args[0]), operand(node, ranges, node.args[1]), floor=True)


@rule(aten.div.Tensor_mode, aten.div.Scalar_mode)
def _div_mode(node: fx.Node, ranges: Ranges) -> Bounds:
    floor = node.kwargs.get("rounding_mode") == "floor"
    return _quotient(operand(node, ranges, node.args[0]), operand(node, ranges, node.args[1]), floor=floor)


def _quotient(a: Interval, b: Interval, *, floor: bool) -> Interval | None:
    # Division by zero raises, so only the other divisors count.
    divisors = {d for d in (*b, *(s for s in (-1, 1) if b[0] <= s <= b[1])) if d}
    if not divisors:
        return None
    quotients = [x // d if floor else (abs(x) // abs(d)) * (1 if (x < 0) == (d < 0) else -1) for x in a for d in divisors]
    if a[0] <= 0 <= a[1]:
        quotients.append(0)
    return min(quotients), max(quotients)


@rule(*overloads("remainder"))
def _remainder(node: fx.Node, ranges: Ranges) -> Bounds:
    a, m = operand(node, ranges, node.args[0]), operand(node, ranges, node.args[1])
    if m[0] > 0 and a[0] >= 0 and a[1] < m[0]:
        return a
    low, high = min(m[0] + 1, 0), max(m[1] - 1, 0)
    return (low, min(high, a[1])) if m[0] >= 0 and a[0] >= 0 else (low, high)


@rule(*overloads("fmod"))
def _fmod(node: fx.Node, ranges: Ranges) -> Bounds:
    a, m = operand(node, ranges, node.args[0]), operand(node, ranges, node.args[1])
    most = max(abs(m[0]), abs(m[1]), 1) - 1
    return (-min(most, max(-a[0], 0)), min(most, max(a[1], 0)))


@rule(*overloads("pow"))
def _pow(node: fx.Node, ranges: Ranges) -> Bounds:
    base, exponent = operand(node, ranges, node.args[0]), operand(node, ranges, node.args[1])
    if exponent[0] < 0:
        return None
    return powers(base, exponent)


def powers(base: Interval, exponent: Interval) -> Interval | None:
    """Bounds of ``base ** exponent`` for non-negative exponents, None when certainly beyond 64 bits."""
    most = max(abs(base[0]), abs(base[1]))
    if most > 1 and exponent[1] * math.log2(most) > 70:
        return None
    exponents = {exponent[0], exponent[1], max(exponent[0], exponent[1] - 1)}
    if most <= 1:  # powers of -1, 0 and 1 repeat
        exponents = {exponent[0], min(exponent[0] + 1, exponent[1]), min(exponent[0] + 2, exponent[1])}
    values = [b**e for b in {*base, *(s for s in (-1, 0, 1) if base[0] <= s <= base[1])} for e in exponents]
    return min(values), max(values)


@rule(*overloads("maximum", "minimum"), aten.max.other, aten.min.other)
def _extremum(node: fx.Node, ranges: Ranges) -> Bounds:
    a, b = operand(node, ranges, node.args[0]), operand(node, ranges, node.args[1])
    pick = max if "max" in node.target.__name__ else min  # type: ignore[union-attr]
    return pick(a[0], b[0]), pick(a[1], b[1])


@rule(*overloads("clamp", "clip", "clamp_min", "clamp_max"))
def _clamp(node: fx.Node, ranges: Ranges) -> Bounds:
    bounds = ranges.read(node.args[0])
    name = node.target.__name__  # type: ignore[union-attr]
    low = arg(node, 1, "max" if name.startswith("clamp_max") else "min")
    high = arg(node, 2, "max")
    if name.startswith("clamp_max"):
        low, high = None, low
    elif name.startswith("clamp_min"):
        high = None
    if bounds is None:
        return None
    if low is not None:
        floor = operand(node, ranges, low)
        bounds = max(bounds[0], floor[0]), max(bounds[1], floor[1])
    if high is not None:
        ceiling = operand(node, ranges, high)
        bounds = min(bounds[0], ceiling[0]), min(bounds[1], ceiling[1])
    return bounds


# --- bits ------------------------------------------------------------------------------------------------------------


def _all_bits(*bounds: Interval) -> int:
    """The smallest 2**k - 1 such that everything lies in [-2**k, 2**k - 1]."""
    return (1 << max((v if v >= 0 else ~v).bit_length() for pair in bounds for v in pair)) - 1


@rule(*overloads("bitwise_and", "__and__"))
def _and(node: fx.Node, ranges: Ranges) -> Bounds:
    a, b = operand(node, ranges, node.args[0]), operand(node, ranges, node.args[1])
    if a[0] < 0 and b[0] < 0:
        return -_all_bits(a, b) - 1, max(a[1], b[1])
    ends = [end[1] for end in (a, b) if end[0] >= 0]
    for mask, value in ((a, b), (b, a)):
        if mask[0] == mask[1] and value[0] >= 0:
            ends.append(mask[0] & _all_bits(value))  # a constant leaves no bits but its own
    return 0, min(ends)


@rule(*overloads("bitwise_or", "bitwise_xor", "__or__", "__xor__"))
def _or_or_xor(node: fx.Node, ranges: Ranges) -> Bounds:
    a, b = operand(node, ranges, node.args[0]), operand(node, ranges, node.args[1])
    most = _all_bits(a, b)
    return (0 if a[0] >= 0 and b[0] >= 0 else -most - 1), most


@rule(*overloads("bitwise_not"))
def _not(node: fx.Node, ranges: Ranges) -> Bounds:
    a = ranges.read(node.args[0])
    return (-a[1] - 1, -a[0] - 1) if a else None


@rule(*overloads("bitwise_left_shift", "__lshift__"))
def _left_shift(node: fx.Node, ranges: Ranges) -> Bounds:
    a, s = operand(node, ranges, node.args[0]), operand(node, ranges, node.args[1])
    if s[0] < 0 or s[1] > 62:
        return None
    return products(a, (1 << s[0], 1 << s[1]))


@rule(*overloads("bitwise_right_shift", "__rshift__"))
def _right_shift(node: fx.Node, ranges: Ranges) -> Bounds:
    a, s = operand(node, ranges, node.args[0]), operand(node, ranges, node.args[1])
    if s[0] < 0:
        return None
    corners = [x >> y for x in a for y in s]
    return min(corners), max(corners)
