"""The one slice normaliser: Python's clamp semantics for every kind of bound.

A bound may be absent, negative, far beyond the end (``INT64_MAX`` stands for "to the end" in ATen), symbolic or a
tensor. Negative bounds count from the end, once; what is still out of range is clamped, never wrapped: on an axis of
size 4 the bound -99 is 0 and 99 is 4. The rule is written once, over a :class:`Calculus`, so that integers, SymInts,
graph nodes and tensors cannot disagree.

Private torch API used here: ``torch.fx.experimental.symbolic_shapes.statically_known_true``, tested on torch 2.9 and
2.13.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

INT64_MAX = 2**63 - 1


def is_static(*values: Any) -> bool:
    """Whether every value is a plain integer (a bool is not)."""
    return all(type(v) is int for v in values)


def is_known(condition: Any) -> bool:
    """Whether ``condition`` (bool or SymBool) is certain. Never adds a guard."""
    return condition if isinstance(condition, bool) else bool(statically_known_true(condition))


@dataclass(frozen=True)
class Extent:
    """The positions ``start, start + step, …`` (``count`` of them) on an axis of ``size``.

    Equal sets of positions are equal extents: a single position has step 1, an empty extent starts at 0.
    """

    start: int
    step: int
    count: int
    size: int

    @classmethod
    def of(cls, start: int, step: int, count: int, size: int) -> Extent:
        """The canonical extent of these positions."""
        if count <= 0:
            return cls(0, 1, 0, size)
        return cls(start, step if count > 1 else 1, count, size)

    @property
    def stop(self) -> int:
        """One past the last position."""
        return self.start + (self.count - 1) * self.step + 1 if self.count else self.start

    @property
    def is_whole(self) -> bool:
        return self.count == self.size

    @property
    def is_empty(self) -> bool:
        return self.count == 0

    @property
    def positions(self) -> range:
        return range(self.start, self.start + self.count * self.step, self.step)

    def within(self, inner: Extent) -> Extent:
        """``x[self][inner]``: ``inner``, an extent of the axis that this one makes, on the original axis."""
        if inner.size != self.count:
            raise ValueError(f"an extent of an axis of {inner.size} does not fit into {self.count} positions")
        return Extent.of(self.start + inner.start * self.step, self.step * inner.step, inner.count, self.size)


class Calculus(Protocol):
    """Arithmetic on bounds of one kind."""

    def value(self, bound: Any) -> Any:
        """``bound`` as an integer or SymInt to reason about; None when nothing is known of it."""

    def add(self, left: Any, right: Any) -> Any: ...

    def minimum(self, left: Any, right: Any) -> Any: ...

    def maximum(self, left: Any, right: Any) -> Any: ...

    def where_negative(self, bound: Any, then: Any, otherwise: Any) -> Any:
        """``then if bound < 0 else otherwise``."""


class IntegerCalculus:
    """Integers and SymInts. No guard is added."""

    def value(self, bound: Any) -> Any:
        return bound

    def add(self, left: Any, right: Any) -> Any:
        return left + right

    def minimum(self, left: Any, right: Any) -> Any:
        return torch.sym_min(left, right)

    def maximum(self, left: Any, right: Any) -> Any:
        return torch.sym_max(left, right)

    def where_negative(self, bound: Any, then: Any, otherwise: Any) -> Any:
        return torch.sym_ite(bound < 0, then, otherwise)


INTEGERS = IntegerCalculus()


def wrap_bound(bound: Any, size: Any, calculus: Calculus = INTEGERS) -> Any:
    """``bound`` counted from the front: a negative one counts from the end. Not clamped: comparisons need no clamp."""
    value = calculus.value(bound)
    if value is not None and is_known(value >= 0):
        return bound
    if value is not None and is_known(value < 0):
        return calculus.add(bound, size)
    return calculus.where_negative(bound, calculus.add(bound, size), bound)


def clamp_bound(bound: Any, size: Any, calculus: Calculus = INTEGERS) -> Any:
    """``bound`` (not None) as Python's slice sees it: counted from the front and clamped into ``[0, size]``."""
    bound = wrap_bound(bound, size, calculus)
    value, limit = calculus.value(bound), calculus.value(size)
    if value is None or not is_known(value >= 0):
        bound = calculus.maximum(bound, 0)
    if value is None or limit is None or not is_known(value <= limit):
        bound = calculus.minimum(bound, size)
    return bound


def slice_bounds(start: Any, end: Any, size: Any, calculus: Calculus = INTEGERS) -> tuple[Any, Any]:
    """``(start, stop)`` of ``x[start:end]``: both in ``[0, size]``; where nothing is meant ``stop`` may precede ``start``."""
    first = 0 if start is None else clamp_bound(start, size, calculus)
    last = size if end is None else clamp_bound(end, size, calculus)
    return first, last


def slice_extent(start: int | None, end: int | None, step: int | None, size: int) -> Extent:
    """The positions of ``x[start:end:step]`` on an axis of ``size``.

    Raises:
        ValueError: the step is not positive (torch has no negative steps).
    """
    step = 1 if step is None else step
    if step < 1:
        raise ValueError(f"slice step must be positive, not {step}")
    first, last = slice_bounds(start, end, size)
    return Extent.of(first, step, -(-(last - first) // step), size)


def select_extent(index: int, size: int) -> Extent:
    """The one position of ``x[index]``.

    Raises:
        IndexError: ``index`` is outside ``[-size, size)``: a select does not clamp.
    """
    if not -size <= index < size:
        raise IndexError(f"index {index} is out of range for an axis of size {size}")
    return Extent.of(wrap_bound(index, size), 1, 1, size)
