"""Tables that were rounded to low precision before capture, and what that costs where they are used.

``model.bfloat16()`` rounds a registered ``inv_freq`` for good; a later ``.float()`` cannot bring it back. The error
of an angle is bounded by half a unit in the last place of the table's entries times the largest position.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import fx

from nxfx.analysis import dtype_rules
from nxfx.analysis.error_bounds import UNKNOWN, Bound, bound
from nxfx.analysis.float_ops import PERIODIC, SENSITIVE, Family, dtype_of, fill_of, op_name
from nxfx.analysis.integer_origin import IntegerOrigins
from nxfx.analysis.intervals import arg
from nxfx.analysis.provenance import Source
from nxfx.analysis.range_rules import arange_arguments
from nxfx.graph import meta

# Explicit mantissa bits: what torch.finfo(...).eps is two to the minus of.
_BITS = {torch.bfloat16: 7, torch.float16: 10}
_SCAN_LIMIT = 1 << 22


def rounded_table_errors(origins: IntegerOrigins, sources: Mapping[str, Source]) -> Iterator[tuple[fx.Node, Source, torch.dtype, float]]:
    """``(node, table, its low precision, error)`` for each rounded table, at the worst sin, cos or tan it reaches.

    The error is that of the function's value over the known range of the integers, at most 2.
    """
    worst: dict[fx.Node, tuple[fx.Node, torch.dtype, float]] = {}
    low_of = functools.cache(lambda table: rounded_to(sources[table.name].value, dtype_of(table)))
    for node in (*origins.members, *origins.sinks):
        if node.target not in PERIODIC:
            continue
        angle = node.args[-1]  # of polar the second argument, of the others the only one
        member = origins.of(angle)
        for table in member.tables if member is not None else ():
            low = low_of(table)
            if low is None:
                continue
            error = _Error(origins, table, low).of(angle).error
            error = 2.0 if not math.isfinite(error) else min(error, 2.0)
            if error > 0 and (table not in worst or error > worst[table][2]):
                worst[table] = node, low, error
    for table, (node, low, error) in worst.items():
        yield node, sources[table.name], low, error


def magnified_tables(origins: IntegerOrigins) -> set[fx.Node]:
    """Tables whose rounding some op magnifies."""
    reading = (node for node in (*origins.members, *origins.sinks) if node.target in SENSITIVE)
    return {t for node in reading for v in node.all_input_nodes if (m := origins.of(v)) is not None for t in m.tables}


def rounded_to(value: torch.Tensor | None, dtype: torch.dtype | None) -> torch.dtype | None:
    """The low-precision dtype that ``value`` was rounded to, None when it seems to be exact.

    Entries that would do with two bits less (powers of two) tell nothing, and neither do multiples of one step that the
    dtype holds. A float32 table counts as rounded when several entries use all the bits of bf16 or fp16 and none more.
    """
    if value is None or isinstance(value, meta.FakeTensor) or value.is_meta or not 0 < value.numel() <= _SCAN_LIMIT:
        return dtype if dtype in _BITS else None
    wide = value.detach().double()
    for low in _BITS if dtype == torch.float32 else [d for d in (dtype,) if d in _BITS]:
        busy = _busy(wide, low)
        if not bool((wide.to(low).double() == wide).all()) or int(busy.sum()) < (4 if dtype == torch.float32 else 1):
            continue
        steps = wide[wide != 0].abs() / wide[wide != 0].abs().min()
        is_even = bool((steps == steps.round()).all())
        if not is_even or (dtype == low and float(steps.max()) > dtype_rules.exact_integer(low)):
            return low
    return None


def _busy(wide: torch.Tensor, low: torch.dtype) -> torch.Tensor:
    """Where an entry uses the last two bits of ``low``'s mantissa: those that do not were hardly rounded, nor were small integers."""
    mantissa = torch.frexp(wide)[0] * 2 ** (_BITS[low] - 1)
    is_exact = (wide == wide.floor()) & (wide.abs() <= dtype_rules.exact_integer(low))
    busy: torch.Tensor = (mantissa != mantissa.floor()) & ~is_exact
    return busy


class _Error:
    """Bounds of values, given the rounding of one table; numbers and everything else are taken as exact."""

    def __init__(self, origins: IntegerOrigins, table: fx.Node, low: torch.dtype) -> None:
        self.origins = origins
        self.table = table
        self.low = low
        self._found: dict[fx.Node, Bound] = {}

    def of(self, value: Any, depth: int = 48) -> Bound:
        if isinstance(value, (int, float)):
            return bound(float(value), float(value))
        if not isinstance(value, fx.Node) or depth == 0:
            return UNKNOWN
        if value not in self._found:
            self._found[value] = self._compute(value, depth)
        return self._found[value]

    def _compute(self, value: fx.Node, depth: int) -> Bound:
        member = self.origins.of(value)
        if member is not None and member.family is None:
            return self._table(value)
        exact = self.origins.exact.of(value)
        if exact is not None:
            return bound(*map(float, exact))
        if member is None:
            return UNKNOWN
        name = op_name(value)
        if member.family is Family.FACTORY:
            ends = {"arange": arange_arguments(value)[:2], "linspace": value.args[:2]}.get(name, (fill_of(value),))
            return _either(self.of(v, depth - 1) for v in ends)
        parts = [self.of(v, depth - 1) for v in member.values]
        if name in _SUMMANDS:
            scaled, sign = _SUMMANDS[name]
            parts[scaled] *= self.of(arg(value, 2, "alpha", 1)) * self.of(sign)
            return parts[0] + parts[1]
        if member.family is Family.OUTER:
            a, b, *added = parts  # to a product a bias
            return sum(added, a * b)
        if name in _RULES and not value.kwargs.get("rounding_mode"):
            return _RULES[name](*parts)
        if member.family in (Family.CAST, Family.MOVE, Family.SELECT):
            return _either([*parts, self.of(0)] if name in _ZEROING else parts)
        return UNKNOWN

    def _table(self, node: fx.Node) -> Bound:
        held = self.origins.sources[node.name].value
        is_rounded, bits = node is self.table, _BITS[self.low]
        if held is None or isinstance(held, meta.FakeTensor) or held.is_meta or held.numel() == 0:
            return bound(-1.0, 1.0, 2.0 ** -(bits + 1) if is_rounded else 0.0)
        wide = held.detach().double()
        ends = float(wide.min()), float(wide.max())
        if not is_rounded:
            return bound(*ends)
        magnitudes, tiny = wide.abs(), torch.finfo(self.low).tiny
        half_ulp = torch.exp2((torch.frexp(magnitudes.clamp(min=tiny))[1] - bits - 2).double())
        off = torch.where(_busy(wide, self.low) | (magnitudes < tiny) & (wide != 0), half_ulp, 0.0)
        return bound(*ends, float(off.max()), float((off / (magnitudes - off).where(off > 0, 1.0)).max()))


def _either(parts: Iterable[Bound]) -> Bound:
    return functools.reduce(operator.or_, parts)


def _raised(base: Bound, exponent: Bound) -> Bound:
    if exponent.error == 0 and exponent.low == exponent.high:
        return base**exponent.low
    if base.error == 0 and base.low == base.high > 0:
        return (exponent * bound(*[math.log(base.low)] * 2)).exp()
    return UNKNOWN


# Which of two summands ``alpha`` scales, and the sign it is added with.
_SUMMANDS = {"add": (1, 1), "sub": (1, -1), "rsub": (0, -1)}
_ZEROING = frozenset(["pad", "constant_pad_nd", "relu", "tril", "triu"])
_RULES: dict[str, Callable[..., Bound]] = {
    "neg": operator.neg,
    "abs": abs,
    "mul": operator.mul,
    "outer": operator.mul,
    "ger": operator.mul,
    "div": lambda a, b: a * b**-1,
    "true_divide": lambda a, b: a * b**-1,
    "reciprocal": lambda a: a**-1,
    "square": lambda a: a**2,
    "sqrt": lambda a: a**0.5,
    "rsqrt": lambda a: a**-0.5,
    "exp": Bound.exp,
    "pow": _raised,
}
