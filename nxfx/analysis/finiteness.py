"""Which values are proved finite and non-negative: the condition under which ``x * 0`` is ``0``.

``inf * 0`` and ``nan * 0`` are nan, ``-1 * 0`` and ``-0.0 * 0`` are ``-0.0``: a zero fill may become a multiplication only
where none of them can occur (tt-metal #52038, tinygrad #11760). Facts are computed on demand, backwards from the value asked
about; an op without a rule proves nothing.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import fx

from nxfx.analysis import dtype_rules
from nxfx.analysis.provenance import Premise, Role, Source
from nxfx.analysis.uniform import UniformValues
from nxfx.graph import meta

aten = torch.ops.aten
_INF = math.inf

# A scan of a buffer costs time; masks and tables are far smaller.
_SCAN_LIMIT = 1 << 24


@dataclass(frozen=True)
class Facts:
    """What every element of a value can be.

    Attributes:
        low, high: inclusive bounds of the elements that are numbers; infinite when they may be infinite.
        nan: an element may be nan.
        negative_zero: an element may be ``-0.0``.
        premises: buffers whose present values this rests on.
    """

    low: float = -_INF
    high: float = _INF
    nan: bool = True
    negative_zero: bool = True
    premises: frozenset[str] = frozenset()

    @property
    def finite(self) -> bool:
        return not self.nan and self.low > -_INF and self.high < _INF

    @property
    def non_negative(self) -> bool:
        """No element has its sign bit set."""
        return self.low >= 0 and not self.negative_zero

    def join(self, other: Facts) -> Facts:
        """What holds when an element comes from either."""
        low, high = min(self.low, other.low), max(self.high, other.high)
        return Facts(
            low, high, self.nan or other.nan, self.negative_zero or other.negative_zero, self.premises | other.premises
        )


UNKNOWN = Facts()


def _number(value: Any) -> Facts:
    if isinstance(value, complex):
        return UNKNOWN
    value = float(value)
    if math.isnan(value):
        return UNKNOWN
    return Facts(value, value, nan=False, negative_zero=value == 0 and math.copysign(1, value) < 0)


def _of_tensor(tensor: torch.Tensor, premise: str | None) -> Facts:
    known = not isinstance(tensor, meta.FakeTensor) and not tensor.is_meta and tensor.layout is torch.strided
    if not known or tensor.is_complex() or tensor.numel() > _SCAN_LIMIT:
        return UNKNOWN
    if tensor.numel() == 0:
        return Facts(0, 0, nan=False, negative_zero=False)
    tensor = tensor.detach().to(torch.float64)
    if tensor.isnan().any():
        return UNKNOWN
    low, high = (float(x) for x in torch.aminmax(tensor))
    negative_zero = bool(((tensor == 0) & tensor.signbit()).any())
    return Facts(low, high, False, negative_zero, frozenset([premise] if premise else []))


Of: TypeAlias = Callable[[Any], Facts]
Rule: TypeAlias = Callable[[fx.Node, Of], Facts]
_RULES: dict[Any, Rule] = {}


def _rule(*names: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        for name in names:
            packet = getattr(aten, name)
            for overload in packet.overloads():
                _RULES[getattr(packet, overload)] = function
        return function

    return register


class Finiteness:
    """Facts about the values of one graph.

    Args:
        sources: placeholder or ``get_attr`` node name → origin. What is missing proves nothing beyond its dtype.
        uniform: values that are one constant everywhere.
    """

    def __init__(self, sources: Mapping[str, Source], uniform: UniformValues | None = None) -> None:
        self._sources = sources
        self._uniform = uniform or UniformValues(sources)
        self._facts: dict[fx.Node, Facts] = {}

    def of(self, node: fx.Node) -> Facts:
        """What is proved of ``node``'s elements."""
        stack = [node]
        while stack:
            top = stack[-1]
            missing = [n for n in self._operands(top) if n not in self._facts] if top not in self._facts else []
            if missing:
                stack += missing
                continue
            stack.pop()
            if top not in self._facts:
                self._facts[top] = self._clamped(top, self._compute(top))
        return self._facts[node]

    def zero_fill_may_multiply(self, node: fx.Node) -> bool:
        """Whether ``node * 0`` is ``+0`` and ``node * 1`` is ``node``, bit for bit, for every element.

        Integers beyond 2**24 are left out: vector engines that multiply integers do it in fp32.
        """
        facts = self.of(node)
        exact = facts.high <= 2**24 or not dtype_rules.is_integral(meta.dtype_of(node))
        return facts.finite and facts.non_negative and exact

    def premises(self, node: fx.Node) -> list[Premise]:
        """The buffers' present values that the proof for ``node`` rests on."""
        return [Premise(name, "finite-nonnegative") for name in sorted(self.of(node).premises)]

    @staticmethod
    def _operands(node: fx.Node) -> list[fx.Node]:
        return node.all_input_nodes if node.op == "call_function" and node.target in _RULES else []

    def _compute(self, node: fx.Node) -> Facts:
        constant = self._uniform.value(node)
        if constant is not None:
            return _of_tensor(constant, None)
        if node.op in ("placeholder", "get_attr"):
            source = self._sources.get(node.name)
            if source is None or not source.is_known or source.role not in (Role.BUFFER, Role.CONSTANT):
                return UNKNOWN
            assert source.value is not None
            facts = _of_tensor(source.value, source.name if source.role is Role.BUFFER else None)
            # A premise states one fact; what does not satisfy it proves nothing that could be re-checked.
            return facts if facts.finite and facts.non_negative else UNKNOWN
        rule = _RULES.get(node.target) if node.op == "call_function" else None
        return rule(node, self._read) if rule else UNKNOWN

    def _read(self, value: Any) -> Facts:
        if isinstance(value, fx.Node):
            return self._facts.get(value, UNKNOWN)
        return _number(value) if isinstance(value, (bool, int, float)) else UNKNOWN

    @staticmethod
    def _clamped(node: fx.Node, facts: Facts) -> Facts:
        """``facts`` after rounding to the node's dtype: floats overflow to infinity, integers wrap around."""
        dtype = meta.dtype_of(node)
        if dtype is None:
            return facts if isinstance(meta.val(node), (list, tuple)) else UNKNOWN
        if dtype_rules.is_integral(dtype):
            least, most = dtype_rules.integer_bounds(dtype)
            inside = not facts.nan and least <= facts.low and facts.high <= most
            return replace(facts, negative_zero=False) if inside else Facts(least, most, False, False)
        if not dtype.is_floating_point:
            return UNKNOWN
        low, high = _rounded(facts.low, -_INF, dtype), _rounded(facts.high, _INF, dtype)
        # Formats without infinities overflow to nan.
        overflows = dtype.itemsize == 1 and (math.isinf(low) or math.isinf(high))
        negative_zero = facts.negative_zero or facts.low < 0
        return replace(facts, low=low, high=high, nan=facts.nan or overflows, negative_zero=negative_zero)


def _rounded(bound: float, outwards: float, dtype: torch.dtype) -> float:
    """A bound after rounding to a float dtype, which is monotone; ``bound`` itself may be a double's rounding off."""
    if bound == 0 or math.isinf(bound):
        return bound
    rounded = torch.tensor(math.nextafter(bound, outwards), dtype=torch.float64).to(dtype).item()
    return outwards if math.isnan(rounded) else rounded


@_rule(
    "view", "_unsafe_view", "reshape", "unsqueeze", "squeeze", "permute", "transpose", "t", "clone", "alias", "detach",
    "expand", "slice", "select", "index_select", "gather", "index", "repeat", "flip", "roll", "lift_fresh_copy",
    "contiguous", "diagonal", "unfold", "amax", "amin", "split", "split_with_sizes", "unbind", "topk", "sort", "max",
    "min", "embedding",
)  # fmt: skip
def _kept(node: fx.Node, of: Of) -> Facts:
    if node.target is aten.view.dtype:
        return UNKNOWN
    if node.target in (aten.max.other, aten.min.other):
        return _of_two(node, of)
    return of(node.args[0])


def _getitem(node: fx.Node, of: Of) -> Facts:
    """Outputs after the first of topk, sort, max and min are indices: their dtype says that they are finite."""
    source = node.args[0]
    many = isinstance(source, fx.Node) and source.target in (
        aten.split.Tensor,
        aten.split_with_sizes.default,
        aten.unbind.int,
    )
    return of(source) if many or node.args[1] == 0 else UNKNOWN


_RULES[operator.getitem] = _getitem


@_rule("_to_copy", "to")
def _cast(node: fx.Node, of: Of) -> Facts:
    source, dtype = of(node.args[0]), meta.dtype_of(node)
    if not dtype_rules.is_integral(dtype):
        return source
    if dtype is torch.bool or not source.finite:
        return UNKNOWN
    return Facts(math.trunc(source.low), math.trunc(source.high), False, False, source.premises)


@_rule("where")
def _where(node: fx.Node, of: Of) -> Facts:
    return of(node.args[1]).join(of(node.args[2])) if len(node.args) == 3 else UNKNOWN


@_rule("masked_fill")
def _masked_fill(node: fx.Node, of: Of) -> Facts:
    return of(node.args[0]).join(of(node.args[2]))


@_rule("slice_scatter", "select_scatter", "diagonal_scatter", "as_strided_scatter", "maximum", "minimum")
def _of_two(node: fx.Node, of: Of) -> Facts:
    return of(node.args[0]).join(of(node.args[1]))


@_rule("copy", "fill")
def _second(node: fx.Node, of: Of) -> Facts:
    return of(node.args[1])


@_rule("index_put")
def _index_put(node: fx.Node, of: Of) -> Facts:
    accumulate = node.args[3] if len(node.args) > 3 else node.kwargs.get("accumulate", False)
    return UNKNOWN if accumulate else of(node.args[0]).join(of(node.args[2]))


@_rule("index_copy", "index_fill")
def _index_copy(node: fx.Node, of: Of) -> Facts:
    return of(node.args[0]).join(of(node.args[3]))


@_rule("cat", "stack")
def _cat(node: fx.Node, of: Of) -> Facts:
    parts: Any = node.args[0]
    joined = of(parts[0])
    for part in parts[1:]:
        joined = joined.join(of(part))
    return joined


@_rule("tril", "triu")
def _triangle(node: fx.Node, of: Of) -> Facts:
    return of(node.args[0]).join(_number(0))


@_rule("constant_pad_nd")
def _pad(node: fx.Node, of: Of) -> Facts:
    value = node.args[2] if len(node.args) > 2 else node.kwargs.get("value", 0)
    return of(node.args[0]).join(of(value))


@_rule("arange")
def _arange(node: fx.Node, of: Of) -> Facts:
    """From the start towards the end; only an ascending one is bounded here."""
    bounds = node.args[:2] if len(node.args) > 1 else (0, node.args[0])
    step = node.args[2] if len(node.args) > 2 else node.kwargs.get("step", 1)
    if not all(isinstance(b, (int, float)) for b in (*bounds, step)) or step <= 0:  # type: ignore[operator]
        return UNKNOWN
    low, high = (float(b) for b in bounds)  # type: ignore[arg-type]
    return Facts(low, max(low, high), nan=False, negative_zero=False)


@_rule("relu", "clamp", "clamp_min", "clamp_max")
def _clamp(node: fx.Node, of: Of) -> Facts:
    """A nan stays nan and ``-0.0`` may stay ``-0.0``; a bound that is a tensor proves nothing."""
    facts = of(node.args[0])
    name = node.target.__name__.split(".")[0]  # type: ignore[union-attr]
    given = [*node.args[1:], None, None]
    low = {"relu": 0, "clamp_max": None}.get(name, node.kwargs.get("min", given[0]))
    high = {"relu": None, "clamp_min": None}.get(name, node.kwargs.get("max", given[0 if name == "clamp_max" else 1]))
    for bound in (low, high):
        if bound is not None and not isinstance(bound, (int, float)):
            return UNKNOWN
    limits = (-_INF if low is None else float(low)), (_INF if high is None else float(high))  # type: ignore[arg-type]
    if any(map(math.isnan, limits)):
        return UNKNOWN
    negative_zero = facts.negative_zero or any(_number(b).negative_zero for b in limits)
    # torch gives the maximum where the bounds cross.
    return replace(
        facts,
        low=min(max(facts.low, limits[0]), limits[1]),
        high=min(max(facts.high, limits[0]), limits[1]),
        negative_zero=negative_zero,
    )


@_rule("sigmoid")
def _sigmoid(node: fx.Node, of: Of) -> Facts:
    source = of(node.args[0])
    return Facts(0, 1.001, source.nan, False, source.premises)


@_rule("softmax", "_softmax")
def _softmax(node: fx.Node, of: Of) -> Facts:
    """A row of ``-inf``, or an ``inf``, makes nan."""
    source = of(node.args[0])
    return Facts(0, 1.001, not source.finite, False, source.premises)


@_rule("exp")
def _exp(node: fx.Node, of: Of) -> Facts:
    source = of(node.args[0])
    return Facts(
        0, math.exp(min(source.high, 700)) * 1.001 if source.high < 700 else _INF, source.nan, False, source.premises
    )


@_rule("abs")
def _abs(node: fx.Node, of: Of) -> Facts:
    source = of(node.args[0])
    low = 0 if source.low <= 0 <= source.high else min(abs(source.low), abs(source.high))
    return Facts(low, max(abs(source.low), abs(source.high)), source.nan, False, source.premises)


@_rule("cos", "sin", "tanh")
def _within_one(node: fx.Node, of: Of) -> Facts:
    source = of(node.args[0])
    return Facts(-1.001, 1.001, not source.finite, True, source.premises)


@_rule("mul")
def _mul(node: fx.Node, of: Of) -> Facts:
    left, right = of(node.args[0]), of(node.args[1])
    if not (left.finite and right.finite):
        return UNKNOWN
    corners = [a * b for a in (left.low, left.high) for b in (right.low, right.high)]
    return Facts(
        min(corners),
        max(corners),
        False,
        not (left.non_negative and right.non_negative),
        left.premises | right.premises,
    )


@_rule("add")
def _add(node: fx.Node, of: Of) -> Facts:
    left, right = of(node.args[0]), of(node.args[1])
    if node.kwargs.get("alpha", 1) != 1 or not (left.finite and right.finite):
        return UNKNOWN
    # Only -0.0 + -0.0 is -0.0.
    negative_zero = left.negative_zero and right.negative_zero
    return Facts(left.low + right.low, left.high + right.high, False, negative_zero, left.premises | right.premises)


@_rule("sub", "rsub")
def _sub(node: fx.Node, of: Of) -> Facts:
    left, right = of(node.args[0]), of(node.args[1])
    if node.target in (aten.rsub.Scalar, aten.rsub.Tensor):
        left, right = right, left
    if len(node.args) > 2 or node.kwargs.get("alpha", 1) != 1 or not (left.finite and right.finite):
        return UNKNOWN
    # -0.0 - 0.0 is -0.0; x - x is +0.0.
    return Facts(
        left.low - right.high, left.high - right.low, False, left.negative_zero, left.premises | right.premises
    )


@_rule("div")
def _div(node: fx.Node, of: Of) -> Facts:
    """By something certainly positive; rounding modes floor and truncate may leave the bounds."""
    left, right = of(node.args[0]), of(node.args[1])
    if node.kwargs.get("rounding_mode") is not None or not left.finite or not right.finite or right.low <= 0:
        return UNKNOWN
    corners = [a / b for a in (left.low, left.high) for b in (right.low, right.high)]
    return Facts(min(corners), max(corners), False, left.negative_zero, left.premises | right.premises)


@_rule(
    "eq",
    "ne",
    "lt",
    "le",
    "gt",
    "ge",
    "logical_not",
    "logical_and",
    "logical_or",
    "logical_xor",
    "isnan",
    "isinf",
    "any",
    "all",
)
def _truth(node: fx.Node, of: Of) -> Facts:
    return Facts(0, 1, False, False)
