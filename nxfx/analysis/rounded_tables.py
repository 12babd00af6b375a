"""Tables that were rounded to low precision before capture, and what that costs where they are used.

``model.bfloat16()`` rounds a registered ``inv_freq`` for good; a later ``.float()`` cannot bring it back. The error
of an angle is bounded by half a unit in the last place of the table's entries times the largest position.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx

from nxfx.analysis import dtype_rules
from nxfx.analysis.float_ops import PERIODIC, Family, dtype_of, op_name
from nxfx.analysis.integer_origin import IntegerOrigins
from nxfx.analysis.provenance import Source
from nxfx.graph import meta

# Explicit mantissa bits: what torch.finfo(...).eps is two to the minus of.
_BITS = {torch.bfloat16: 7, torch.float16: 10}
_SCAN_LIMIT = 1 << 22
_UNKNOWN = (math.inf, math.inf)


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
            error = _Error(origins, table, low).of(angle)[1]
            error = 2.0 if not math.isfinite(error) else min(error, 2.0)
            if error > 0 and (table not in worst or error > worst[table][2]):
                worst[table] = node, low, error
    for table, (node, low, error) in worst.items():
        yield node, sources[table.name], low, error


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
    """Where an entry uses the last two bits of ``low``'s mantissa: those that do not were hardly rounded."""
    mantissa = torch.frexp(wide)[0] * 2 ** (_BITS[low] - 1)
    busy: torch.Tensor = mantissa != mantissa.floor()
    return busy


class _Error:
    """Magnitude and error of a value, given that of one table; numbers and everything else are taken as exact."""

    def __init__(self, origins: IntegerOrigins, table: fx.Node, low: torch.dtype) -> None:
        self.origins = origins
        self.table = table
        self.low = low
        self._found: dict[fx.Node, tuple[float, float]] = {}

    def of(self, value: Any, depth: int = 48) -> tuple[float, float]:
        """Largest magnitude and largest error of ``value``."""
        if isinstance(value, (int, float)):
            return abs(float(value)), 0.0
        if not isinstance(value, fx.Node) or depth == 0:
            return _UNKNOWN
        if value not in self._found:
            self._found[value] = self._compute(value, depth)
        return self._found[value]

    def _compute(self, value: fx.Node, depth: int) -> tuple[float, float]:
        if dtype_rules.is_integral(dtype_of(value)):
            return float(max(map(abs, self.origins.exact.bounds(value)[0]))), 0.0
        member = self.origins.of(value)
        if member is None:
            return _UNKNOWN
        if member.family is None:
            return self._table(value)
        exact = self.origins.exact.of(value)
        if exact is not None:
            return float(max(map(abs, exact))), 0.0
        parts = [self.of(v, depth - 1) for v in member.values]
        magnitudes, errors = [m for m, _ in parts], [e for _, e in parts]
        name = op_name(value)
        if member.family in (Family.CAST, Family.MOVE, Family.SELECT):
            return max(magnitudes, default=math.inf), max(errors, default=math.inf)
        if name in ("add", "sub", "rsub"):
            return sum(magnitudes), sum(errors)
        if name in ("mul", "outer") or member.family is Family.OUTER:
            (a, da), (b, db), *added = parts  # to a product a bias
            return _times(a, b) + sum(m for m, _ in added), _times(a, db) + _times(b, da) + sum(e for _, e in added)
        if name == "div" and isinstance(member.values[1], (int, float)) and member.values[1]:
            return magnitudes[0] / magnitudes[1], errors[0] / magnitudes[1]
        return _UNKNOWN

    def _table(self, node: fx.Node) -> tuple[float, float]:
        held = self.origins.sources[node.name].value
        if held is None or isinstance(held, meta.FakeTensor) or held.is_meta or held.numel() == 0:
            return (1.0, 2.0 ** -(_BITS[self.low] + 1)) if node is self.table else (1.0, 0.0)
        magnitudes = held.detach().double().abs()
        if node is not self.table:
            return float(magnitudes.max()), 0.0
        half_ulp = torch.exp2((torch.frexp(magnitudes)[1] - _BITS[self.low] - 2).double())
        return float(magnitudes.max()), float(torch.where(_busy(magnitudes, self.low), half_ulp, 0.0).max())


def _times(a: float, b: float) -> float:
    return 0.0 if a == 0 or b == 0 else a * b
