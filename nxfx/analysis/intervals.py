"""Intervals and their container: what :func:`nxfx.analysis.ranges.analyse` fills in, its rules read and passes ask.

Every value has two bounds: the one that holds for every input that the model accepts (*proved*: declared ranges, preconditions
implied by use and never-written buffers included) and the one that holds when undeclared 64-bit inputs fit int32, which the
boundary has to enforce (*assumed*).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import fx
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges, bound_sympy

from nxfx.analysis import dtype_rules
from nxfx.analysis.provenance import Premise, Source

Interval: TypeAlias = tuple[int, int]
"""Inclusive bounds."""
Bounds: TypeAlias = "Interval | list[Interval | None] | None"
"""Bounds of a node: one interval, one per output of a multi-output op, or None for a value that is no integer."""

INT32 = dtype_rules.integer_bounds(torch.int32)
INT64 = dtype_rules.integer_bounds(torch.int64)


def fits(bounds: Interval, limits: Interval) -> bool:
    """Whether every value of ``bounds`` lies in ``limits``."""
    return limits[0] <= bounds[0] and bounds[1] <= limits[1]


def join(first: Interval, *others: Interval) -> Interval:
    """The smallest interval that holds all of them."""
    low, high = first
    for a, b in others:
        low, high = min(low, a), max(high, b)
    return low, high


def meet(first: Interval, second: Interval) -> Interval:
    """What both hold; ``first`` when they have nothing in common (unreachable code, or a contradiction judged elsewhere)."""
    low, high = max(first[0], second[0]), min(first[1], second[1])
    return (low, high) if low <= high else first


def arg(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An op's argument, given by position or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


@dataclass(frozen=True)
class Requirement:
    """What the boundary must enforce for an input so that the proofs hold.

    Attributes:
        bounds: inclusive low and high.
        basis: ``"declared"``, ``"implied"`` (by an index op that refuses anything else) or ``"assumed"`` (fits int32).
        reason: in words, for the report.
    """

    bounds: Interval
    basis: str
    reason: str = ""


class Ranges:
    """Bounds of a graph's integer values. Made by :func:`nxfx.analysis.ranges.analyse`.

    Attributes:
        premises: present values of never-written buffers and parameters that the bounds rest on.
        requirements: input node → what the boundary has to enforce for it.
        dims: symbol of a dynamic dimension without an upper bound that is assumed to fit int32.
        guarded: nodes whose bounds hold only at the elements that the one ``where`` reading them selects.
        operands: placeholder of a higher-order op's body → its bounds, assumed and proved.
        depth: how many loops this graph is in.
    """

    def __init__(self, sources: Mapping[str, Source], depth: int = 0) -> None:
        self.sources = sources
        self.depth = depth
        self.operands: dict[fx.Node, tuple[Interval, Interval]] = {}
        self.premises: list[Premise] = []
        self.requirements: dict[fx.Node, Requirement] = {}
        self.dims: set[Any] = set()
        self.guarded: set[fx.Node] = set()
        self._assumed: dict[fx.Node, Bounds] = {}
        self._proved: dict[fx.Node, Bounds] = {}  # only where it differs from _assumed
        self._culprit: dict[fx.Node, fx.Node] = {}
        self._symbolic: dict[tuple[Any, bool], Interval] = {}
        self._floats: dict[tuple[fx.Node, bool], tuple[float, float] | None] = {}
        self._strictly = False  # rules now read proved bounds
        self._supposed: dict[fx.Node, Interval] = {}  # bounds that hold in one branch only, while it is looked at
        self._leaned = False  # a rule has read a dimension that is assumed to fit

    # --- what passes ask -------------------------------------------------------------------------------------------

    def __contains__(self, node: fx.Node) -> bool:
        return node in self._assumed

    def of(self, node: fx.Node) -> Interval | None:
        """Inclusive bounds of every element of an integer or bool tensor, SymInt or int node, undeclared inputs in int32.

        None for a value that is no integer, or that has several outputs (ask its ``getitem``).
        """
        bounds = self._assumed.get(node)
        return bounds if isinstance(bounds, tuple) else None

    def proved(self, node: fx.Node) -> Interval | None:
        """The same, without assuming anything of undeclared inputs."""
        bounds = self._proved.get(node, self._assumed.get(node))
        return bounds if isinstance(bounds, tuple) else None

    def assumed(self, node: fx.Node) -> bool:
        """Whether :meth:`of` rests on an undeclared input fitting int32, to be enforced at the boundary."""
        return node in self._proved

    def outputs(self, node: fx.Node, *, proved: bool = False) -> list[Interval | None]:
        """Bounds of each output of a multi-output node (one for a node with a single value)."""
        bounds = self._proved.get(node, self._assumed.get(node)) if proved else self._assumed.get(node)
        return bounds if isinstance(bounds, list) else [bounds]

    def culprit(self, node: fx.Node) -> fx.Node | None:
        """An undeclared input that ``node``'s bounds depend on: what declaring its range would help."""
        return self._culprit.get(node)

    def culprits(self) -> Iterable[tuple[fx.Node, fx.Node]]:
        """Every node whose bounds depend on an undeclared input, with (one such) input."""
        return self._culprit.items()

    def culprit_name(self, node: fx.Node) -> str | None:
        """The user's name for :meth:`culprit`."""
        found = self.culprit(node)
        source = self.sources.get(found.name) if found is not None else None
        return None if source is None else source.culprit or source.name

    def of_float(self, node: fx.Node) -> tuple[float, float] | None:
        """Inclusive bounds of every element of a float tensor that is never nan, None when unknown."""
        from nxfx.analysis import float_ranges

        return float_ranges.bound(self, node)

    # --- what rules ask --------------------------------------------------------------------------------------------

    @property
    def strictly(self) -> bool:
        """Whether bounds are now read without assumptions (rules run once each way)."""
        return self._strictly

    def read(self, value: Any) -> Interval | None:
        """Bounds of a rule's argument: a node, a Python number or a SymInt. None when it is no integer."""
        if isinstance(value, fx.Node):
            bounds: Bounds = self._supposed.get(value)
            if bounds is None and self._strictly:
                bounds = self._proved.get(value)
            if bounds is None:
                bounds = self._assumed.get(value)
            return bounds if isinstance(bounds, tuple) else None
        if isinstance(value, (bool, int)):
            return int(value), int(value)
        if isinstance(value, torch.SymInt):
            return self.symbolic(value)
        return None

    def read_output(self, node: fx.Node, index: int) -> Interval | None:
        """Bounds of one output of a multi-output node."""
        bounds = self._proved.get(node) if self._strictly else None
        bounds = bounds or self._assumed.get(node)
        return bounds[index] if isinstance(bounds, list) and -len(bounds) <= index < len(bounds) else None

    def lean(self) -> None:
        """The rule that runs may rest on an assumption that its operands do not show."""
        self._leaned = True

    @contextlib.contextmanager
    def strict(self) -> Iterator[None]:
        """Rules inside read proved bounds."""
        self._strictly = True
        try:
            yield
        finally:
            self._strictly = False

    @contextlib.contextmanager
    def supposing(self, bounds: dict[fx.Node, Interval]) -> Iterator[dict[fx.Node, Interval]]:
        """Rules inside read these bounds, which may be added to."""
        floats, self._floats, self._supposed = self._floats, {}, bounds
        try:
            yield bounds
        finally:
            self._floats, self._supposed = floats, {}

    def tighten(self, node: fx.Node, bounds: Interval, proved: Interval | None) -> None:
        """Replace the bounds of ``node``; its proved ones only where better ones are known."""
        before = self.proved(node)
        self._assumed[node] = bounds
        proved = proved or before
        if proved is not None and proved != bounds:
            self._proved[node] = proved
        else:
            self._proved.pop(node, None)

    def symbolic(self, size: Any) -> Interval:
        """Bounds of an int or SymInt, from its ShapeEnv; a dimension without an upper bound is assumed to fit int32."""
        if not isinstance(size, torch.SymInt):
            return int(size), int(size)
        expression = size.node.expr
        key = (expression, self._strictly)
        if key not in self._symbolic:
            self._symbolic[key] = self._bound_expression(size.node.shape_env, expression)
        self._leaned = self._leaned or not self.dims.isdisjoint(expression.free_symbols)
        return self._symbolic[key]

    def _bound_expression(self, shape_env: Any, expression: Any) -> Interval:
        ranges = {}
        for symbol in expression.free_symbols:
            known = shape_env.var_to_range.get(symbol, ValueRanges(-int_oo, int_oo))
            if not self._strictly and known.upper > INT32[1] and known.lower >= 0:
                self.dims.add(symbol)
                known = ValueRanges(known.lower, INT32[1])
            ranges[symbol] = known
        result = bound_sympy(expression, ranges)
        low = INT64[0] if result.lower < INT64[0] else int(result.lower)
        high = INT64[1] if result.upper > INT64[1] else int(result.upper)
        return low, high
