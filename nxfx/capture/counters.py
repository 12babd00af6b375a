"""Counters: integers that ``forward`` finds on the model and changes (``self.calls += 1``), lent to a capture as 0-d int64 tensors."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch.utils import _pytree as pytree

from nxfx.analysis.intervals import INT64
from nxfx.capture.state import COUNTER_RANGE

if TYPE_CHECKING:
    from nxfx.capture.session import Session

_FIX = "keep it in a 0-d int64 buffer and update that in place (self.count.add_(1)), or pass it in and return it"


class Count:
    """An integer (or truth value) that Python works with and the graph computes.

    With other integers it stays a :class:`Count`; beside a tensor it becomes one (:mod:`~nxfx.capture.counted_calls`). Where Python or
    torch wants a number it refuses, so that nothing is baked: the capture is made again with that counter as it was.

    Not a subclass of int: C code would take one for the number it holds, silently. ``isinstance(count, int)`` is true, as in eager.
    """

    __slots__ = ("_limit", "_names", "_session", "_value")

    def __init__(self, session: Session, value: torch.Tensor, names: frozenset[str], limit: int = COUNTER_RANGE[1]) -> None:
        self._session = session
        self._value = value
        self._names = names
        self._limit = limit
        if limit > INT64[1]:
            self._refuse("arithmetic that may leave 64 bits")

    @property  # type: ignore[misc]  # of `object`, where it can be assigned
    def __class__(self) -> type:
        return bool if self._value.dtype is torch.bool else int

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Reached only where nothing intercepts, inside a pause: for what the interception itself computes.
        count = next(a for a in pytree.tree_leaves((args, kwargs)) if type(a) is Count)
        count._refuse(f"torch.{getattr(func, '__name__', func)}")

    def _refuse(self, use: str) -> NoReturn:
        session = self._session
        session.inexact |= self._names
        what = " and ".join(map(repr, sorted(self._names)))
        raise session.refuse("NX406", "a counter", f"{use} needs {what} in Python", _FIX)

    def left(self, value: Any) -> torch.Tensor | None:
        """What to put into this counter's buffer when forward has left ``value`` there; None for nothing."""
        if value is self:
            return None
        if type(value) is Count and value._value.dtype is torch.int64:
            return value._value.clone()  # it may be another counter's buffer
        if type(value) is not int:
            self._refuse("forward leaves no integer there, which")
        return torch.full((), value, dtype=torch.int64, device=self._value.device)

    def _integer(self) -> torch.Tensor:
        return self._value.to(torch.int64) if self._value.dtype is torch.bool else self._value

    def _made(self, value: torch.Tensor, limit: int, *others: Any) -> Count:
        names = self._names.union(*(other._names for other in others if type(other) is Count))
        return Count(self._session, value, names, limit)

    def __bool__(self) -> bool:
        return bool(self._value != 0 if self._value.dtype is not torch.bool else self._value)

    def __neg__(self) -> Count:
        return self._made(-self._integer(), self._limit)

    def __pos__(self) -> Count:
        return self._made(self._integer(), self._limit)

    def __abs__(self) -> Count:
        return self._made(self._integer().abs(), self._limit)

    def __ne__(self, other: object) -> Any:
        return _compare(operator.ne)(self, other)

    def __eq__(self, other: object) -> Any:
        return _compare(operator.eq)(self, other)

    def __hash__(self) -> int:
        self._refuse("a result of forward (or hash())")

    def __getattr__(self, name: str) -> Any:
        if hasattr(int, name) and not name.startswith("__"):
            self._refuse(f".{name}")
        raise AttributeError(f"'int' object has no attribute {name!r}")


def _operands(count: Count, other: Any) -> tuple[Any, int] | None:
    """``other`` beside a count, and its magnitude; None where Python must ask ``other``."""
    if type(other) is Count:
        return other._integer(), other._limit
    if type(other) in (int, bool):
        return int(other), abs(other)
    if isinstance(other, (float, complex)):
        count._refuse("arithmetic with a float")
    return None


def _arithmetic(compute: Callable[[Any, Any], Any], limit: Callable[[int, int], int], swapped: bool) -> Callable[[Count, Any], Any]:
    def method(self: Count, other: Any) -> Any:
        operands = _operands(self, other)
        if operands is None:
            return NotImplemented
        value, magnitude = operands
        pair = (value, self._integer()) if swapped else (self._integer(), value)
        return self._made(compute(*pair), limit(self._limit, magnitude), other)

    return method


def _division(compute: Callable[[Any, Any], Any], limit: Callable[[int, int], int]) -> Callable[[Count, Any], Any]:
    def method(self: Count, other: Any) -> Any:
        if isinstance(other, torch.Tensor):
            return NotImplemented
        if type(other) is not int or not other:
            self._refuse("division by what may be zero, or no integer,")
        return self._made(compute(self._integer(), other), limit(self._limit, abs(other)))

    return method


def _compare(compute: Callable[[Any, Any], Any]) -> Callable[[Count, Any], Any]:
    def method(self: Count, other: Any) -> Any:
        operands = _operands(self, other)
        return NotImplemented if operands is None else self._made(compute(self._integer(), operands[0]), 1, other)

    return method


def _bits(compute: Callable[[Any, Any], Any]) -> Callable[[Count, Any], Any]:
    def method(self: Count, other: Any) -> Any:
        if isinstance(self, bool) and isinstance(other, bool):  # the truth values of Python's & and |
            return self._made(compute(self._value, other._value if type(other) is Count else other), 1, other)
        operands = _operands(self, other)
        if operands is None:
            return NotImplemented
        return self._made(compute(self._integer(), operands[0]), self._limit + operands[1] + 1, other)

    return method


def _refusing(use: str) -> Callable[..., Any]:
    def method(self: Count, *others: Any) -> Any:
        return NotImplemented if others and isinstance(others[0], torch.Tensor) else self._refuse(use)

    return method


def _sum(a: int, b: int) -> int:
    return a + b


for _name, _compute, _grows in (("add", operator.add, _sum), ("sub", operator.sub, _sum), ("mul", operator.mul, operator.mul)):
    setattr(Count, f"__{_name}__", _arithmetic(_compute, _grows, swapped=False))
    setattr(Count, f"__r{_name}__", _arithmetic(_compute, _grows, swapped=True))
for _name in ("lt", "le", "gt", "ge"):
    setattr(Count, f"__{_name}__", _compare(getattr(operator, _name)))
for _name in ("and", "or", "xor"):
    setattr(Count, f"__{_name}__", _bits(getattr(operator, f"__{_name}__")))
    setattr(Count, f"__r{_name}__", _bits(getattr(operator, f"__{_name}__")))
setattr(Count, "__floordiv__", _division(operator.floordiv, lambda a, b: a))  # noqa: B010
setattr(Count, "__mod__", _division(operator.mod, lambda a, b: b))  # noqa: B010
_REFUSED = {
    "use as a Python integer (range(), list index, size)": ("index",),
    "int() or a rounding": ("int", "trunc", "floor", "ceil", "round"),
    "float()": ("float", "complex"),
    "text": ("str", "repr", "format"),
    "division": ("truediv", "rtruediv", "rfloordiv", "rmod", "divmod", "rdivmod"),
    "a power or a shift": ("pow", "rpow", "lshift", "rlshift", "rshift", "rrshift"),
    "~": ("invert",),
}  # fmt: skip
for _use, _methods in _REFUSED.items():
    for _name in _methods:
        setattr(Count, f"__{_name}__", _refusing(_use))

