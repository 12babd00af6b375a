"""Torch functions called with a :class:`~nxfx.capture.counters.Count`: its tensor in its place, where that gives what an integer gives.

Torch treats a Python integer and a 0-d int64 tensor alike beside a tensor with dimensions; beside a 0-d tensor the integer gives
way, and the tensor is cast here to what that gives (``torch.result_type``). ``tests/test_counters.py`` holds this to torch over
operations, dtypes and integers. ``pow`` differs, and ``clamp`` and ``where`` refuse integers that a narrow dtype does not hold:
those calls are refused, and the counter stays with Python.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree

from nxfx.analysis.intervals import INT32
from nxfx.capture.counters import Count


def _words(text: str) -> list[str]:
    return text.split()


_PLAIN_OPERATIONS = _words("add sub mul truediv floordiv mod and or xor lshift rshift")
BINARY = frozenset(
    {
        *(f"__{kind}{name}__" for name in _PLAIN_OPERATIONS for kind in ("", "r", "i")),
        *(f"__{name}__" for name in ("div", "rdiv", "idiv", "eq", "ne", "lt", "le", "gt", "ge")),
        *_words("add sub subtract rsub mul multiply div divide true_divide floor_divide remainder fmod eq ne lt le gt ge not_equal"),
        *_words("less less_equal greater greater_equal bitwise_and bitwise_or bitwise_xor"),
        *_words("add_ sub_ subtract_ mul_ multiply_ div_ divide_ true_divide_ floor_divide_ remainder_ fmod_"),
    }
)
_CHOOSING = frozenset({"where", "clamp", "clamp_min", "clamp_max", "clip", "masked_fill", "masked_fill_"})
# What divides in floating point: integers are not brought to each other's dtype first.
DIVIDING = frozenset(
    _words("__truediv__ __rtruediv__ __itruediv__ __div__ __rdiv__ __idiv__ div divide true_divide div_ divide_ true_divide_")
)
# Of these dtypes torch takes every integer that a counter may be.
ROOMY = (torch.float32, torch.float64, torch.bfloat16, torch.int64)


def resolved(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """A call of ``function`` with tensors in the places of counts.

    Raises:
        CaptureError: torch would want a Python integer there, or treat the two differently.
    """
    name = getattr(function, "__name__", str(function))
    if name in ("__getitem__", "__setitem__"):
        return function, (args[0], _index(args[1]), *(_written(args[0], v) for v in args[2:])), kwargs
    counts = [a for a in pytree.tree_leaves((args, kwargs)) if type(a) is Count]
    if not counts:
        return function, args, kwargs
    made = _MAKERS.get(name)
    if made is not None:
        return made, args, kwargs
    direct = [a for a in (*args, *kwargs.values()) if type(a) is Count]
    others = [a for a in (*args, *kwargs.values()) if type(a) is not Count]
    tensors = [a for a in others if isinstance(a, torch.Tensor) and not (name == "where" and a is args[0])]
    roomy = all(_takes(t.dtype, c) or t.dtype is torch.bool and name.startswith("masked_fill") for t in tensors for c in direct)
    alone = not any(isinstance(a, (int, float, complex)) for a in others)
    is_binary = name in BINARY and len(args) + len(kwargs) == 2
    if len(direct) != len(counts) or not (is_binary or name in _CHOOSING and roomy and (alone or name == "where")):
        counts[0]._refuse(f"torch.{name}")
    standing = [] if name in DIVIDING else [t for t in tensors if t.dtype is not torch.bool or is_binary]

    def tensor(value: Any) -> Any:
        return _beside(value, standing) if type(value) is Count else value

    return function, tuple(map(tensor, args)), {k: tensor(v) for k, v in kwargs.items()}


def _takes(dtype: torch.dtype, count: Count) -> bool:
    """Whether a tensor of ``dtype`` takes every integer that ``count`` may be."""
    return dtype in ROOMY or dtype is torch.int32 and count._limit <= INT32[1]


def _beside(count: Count, tensors: list[Any]) -> torch.Tensor:
    """``count`` as a tensor that promotes beside ``tensors`` as the integer would."""
    value = count._value
    for other in tensors:
        wanted = torch.result_type(other, True if value.dtype is torch.bool else 1)
        if torch.result_type(other, value) is not wanted:
            value = value.to(wanted)
    return value


def _index(index: Any) -> Any:
    """Counts among bounds and positions as tensors; what the interception makes of those is exact."""
    if type(index) is tuple:
        return tuple(map(_index, index))
    if type(index) is slice:
        return slice(*map(_position, (index.start, index.stop, index.step)))
    return _position(index)


def _position(value: Any) -> Any:
    if type(value) is not Count:
        if isinstance(value, list):
            for count in (v for v in pytree.tree_leaves(value) if type(v) is Count):
                count._refuse("a list of positions")
        return value
    if value._value.dtype is torch.bool:
        value._refuse("a truth value as a position")
    return value._value


def _written(base: torch.Tensor, value: Any) -> Any:
    if type(value) is not Count:
        return value
    if not _takes(base.dtype, value):
        value._refuse(f"a write to a tensor of {str(base.dtype).removeprefix('torch.')}")
    return value._value


def _full(size: Any, fill_value: Any, *, dtype: Any = None, device: Any = None, **options: Any) -> torch.Tensor:
    """``torch.full``."""
    misplaced = next((a for a in pytree.tree_leaves((size, options)) if type(a) is Count), None)
    if misplaced is not None or options.get("out") is not None or dtype is not None and not _takes(dtype, fill_value):
        (fill_value if misplaced is None else misplaced)._refuse("torch.full")
    value: torch.Tensor = fill_value._value
    return value.to(device=device or value.device, dtype=dtype or value.dtype).expand(size).clone()


def _tensor(data: Any, dtype: Any = None, device: Any = None, **options: Any) -> torch.Tensor:
    """``torch.tensor`` and ``torch.as_tensor``, of one count or of a list of integers."""
    items = list(data) if isinstance(data, (list, tuple)) else [data]
    counts = [item for item in items if type(item) is Count]
    integers = all(type(item) is int or type(item) is Count and item._value.dtype is torch.int64 for item in items)
    if not counts or not integers or dtype is not None and not all(_takes(dtype, count) for count in counts):
        next(a for a in pytree.tree_leaves(data) if type(a) is Count)._refuse("torch.tensor")
    first = counts[0]._value
    parts = [i._value if type(i) is Count else torch.full((), i, dtype=torch.int64, device=first.device) for i in items]
    made = torch.stack(parts) if isinstance(data, (list, tuple)) else first.clone()
    moved: torch.Tensor = made.to(device=device or first.device, dtype=dtype or torch.int64)
    return moved


def _arange(*bounds: Any, dtype: Any = None, device: Any = None, **options: Any) -> torch.Tensor:
    """``torch.arange(n, n + 4)``: as many numbers as the bounds lie apart."""
    count = next(b for b in (*bounds, *options.values()) if type(b) is Count)
    if len(bounds) != 2 or options or not all(type(b) is Count for b in bounds) or dtype not in (None, torch.int64):
        count._refuse("torch.arange")
    start, end = (count._session.trace.affine(b._value) for b in bounds)
    if start is None or end is None or start[0] != end[0]:
        count._refuse("the length of torch.arange")
    first = bounds[0]._value.to(device=device or bounds[0]._value.device)
    numbers: torch.Tensor = torch.arange(max(end[1] - start[1], 0), device=first.device) + first
    return numbers


_MAKERS: dict[str, Callable[..., Any]] = {"full": _full, "tensor": _tensor, "as_tensor": _tensor, "asarray": _tensor, "arange": _arange}
