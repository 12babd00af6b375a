"""How far a value can be off, given how far what it is made of can be: intervals with an absolute and a relative error."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Bound:
    """What is known of every element of a value. :func:`bound` makes it.

    Attributes:
        low: the smallest that it can be.
        high: the largest.
        error: how far it can be from what it should be.
        relative: the same as a share of it, or of what it should be.
    """

    low: float
    high: float
    error: float
    relative: float

    @property
    def largest(self) -> float:
        return max(abs(self.low), abs(self.high))

    @property
    def smallest(self) -> float:
        return 0.0 if self.low <= 0 <= self.high else min(abs(self.low), abs(self.high))

    def __neg__(self) -> Bound:
        return Bound(-self.high, -self.low, self.error, self.relative)

    def __abs__(self) -> Bound:
        return Bound(self.smallest, self.largest, self.error, self.relative)

    def __add__(self, other: Bound) -> Bound:
        cancels = min(self.low, other.low) < 0 < max(self.high, other.high)
        relative = math.inf if cancels else max(self.relative, other.relative)
        return bound(self.low + other.low, self.high + other.high, self.error + other.error, relative)

    def __mul__(self, other: Bound) -> Bound:
        corners = [_times(a, b) for a in (self.low, self.high) for b in (other.low, other.high)]
        error = _times(self.largest, other.error) + _times(other.largest, self.error) + _times(self.error, other.error)
        relative = self.relative + other.relative + _times(self.relative, other.relative)
        return bound(min(corners), max(corners), error, relative)

    def __or__(self, other: Bound) -> Bound:
        """One of the two."""
        low, high = min(self.low, other.low), max(self.high, other.high)
        return bound(low, high, max(self.error, other.error), max(self.relative, other.relative))

    def __pow__(self, exponent: float) -> Bound:
        """Of a positive value; a negative one has an inverse, and any a square."""
        if exponent == 2:
            return self * self
        if self.high < 0 and exponent == -1:
            return -((-self) ** -1)
        if self.low <= 0:
            return UNKNOWN
        ends = _power(self.low, exponent), _power(self.high, exponent)
        return bound(min(ends), max(ends), math.inf, _power(1 + self.relative, abs(exponent)) - 1)

    def exp(self) -> Bound:
        return bound(_power(math.e, self.low), _power(math.e, self.high), math.inf, _power(math.e, self.error) - 1)


def bound(low: float, high: float, error: float = 0.0, relative: float = math.inf) -> Bound:
    """Each of the two errors follows from the other: the smaller is taken."""
    found = Bound(low, high, error, relative)
    if found.smallest > error:
        relative = min(relative, error / (found.smallest - error))
    relative = 0.0 if error == 0 else relative
    return Bound(low, high, min(error, _times(found.largest, relative)), relative)


UNKNOWN = Bound(-math.inf, math.inf, math.inf, math.inf)


def _times(a: float, b: float) -> float:
    return 0.0 if a == 0 or b == 0 else a * b


def _power(base: float, exponent: float) -> float:
    try:
        return math.pow(base, exponent)
    except OverflowError:
        return math.inf
