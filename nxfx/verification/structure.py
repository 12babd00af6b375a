"""The leaves of two outputs of any structure, paired by path: nothing is dropped."""

from __future__ import annotations

import dataclasses
import enum
import inspect
import types
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from nxfx.verification.measures import dtype_name, shape_text


@dataclass
class Pairing:
    """The leaves of two outputs, paired by path, and where the structures part."""

    leaves: list[tuple[str, Any, Any]] = field(default_factory=list)
    mismatches: list[str] = field(default_factory=list)
    # Values, not ids alone: an id is only unique while its object lives.
    _seen: dict[tuple[int, int], tuple[object, object]] = field(default_factory=dict)

    @classmethod
    def of(cls, expected: object, actual: object) -> Pairing:
        pairing = cls()
        pairing._walk("output", expected, actual)
        return pairing

    def _walk(self, path: str, expected: object, actual: object) -> None:
        if is_plain_tensor(expected) and is_plain_tensor(actual):  # a Parameter and a Tensor are the same output
            self.leaves.append((path, expected, actual))
            return
        if type(expected) is not type(actual):
            types = f"expected {_describe(expected)}, actual {_describe(actual)}"
            self.mismatches.append(f"{path}: structure differs: {types}")
            return
        expected_children, actual_children = _children(expected), _children(actual)
        if expected_children is None or actual_children is None:
            self.leaves.append((path, expected, actual))
            return
        if (id(expected), id(actual)) in self._seen:
            return
        self._seen[id(expected), id(actual)] = (expected, actual)
        self._match_names(path, [name for name, _ in expected_children], [name for name, _ in actual_children])
        for name, expected_child, actual_child in _pair_children(expected_children, actual_children):
            self._walk(path + name, expected_child, actual_child)

    def _match_names(self, path: str, expected: list[str], actual: list[str]) -> None:
        if expected == actual:
            return
        missing = [name for name in expected if name not in actual]
        unexpected = [name for name in actual if name not in expected]
        details = [f"missing {', '.join(missing)}"] if missing else []
        details += [f"unexpected {', '.join(unexpected)}"] if unexpected else []
        details = details or [f"expected order {', '.join(expected)}, actual order {', '.join(actual)}"]
        counts = f"expected {len(expected)} item(s), actual {len(actual)}"
        self.mismatches.append(f"{path}: structure differs: {counts}: {'; '.join(details)}")


_Children = list[tuple[str, Any]]
_VALUES = (str, bytes, bytearray, int, float, complex, range, slice, set, frozenset, type(None), np.ndarray, np.generic)
_NAMED = (type, types.ModuleType, enum.Enum, torch.dtype, torch.device, torch.Generator)


def _pair_children(expected: _Children, actual: _Children) -> Iterator[tuple[str, Any, Any]]:
    if [name for name, _ in expected] == [name for name, _ in actual]:
        for (name, expected_child), (_, actual_child) in zip(expected, actual, strict=True):
            yield name, expected_child, actual_child
        return
    by_name = dict(actual)
    for name, expected_child in expected:
        if name in by_name:
            yield name, expected_child, by_name[name]


def _children(value: Any) -> _Children | None:
    """The named parts of ``value``, one level deep; ``None`` for a leaf."""
    if isinstance(value, torch.Tensor):
        return _inner_tensors(value) if is_traceable_wrapper_subclass(value) else None
    if isinstance(value, _VALUES + _NAMED) or inspect.isroutine(value):
        return None
    if isinstance(value, Mapping):
        items = [(f"[{key!r}]", item) for key, item in value.items()]
        return items + [(f".{name}", part) for name, part in _attributes(value) if name not in value]
    if isinstance(value, tuple | list | deque):
        names = getattr(value, "_fields", None)
        items = [(f".{names[i]}" if names else f"[{i}]", item) for i, item in enumerate(value)]
        return items + [(f".{name}", part) for name, part in _attributes(value)]
    if not pytree.tree_is_leaf(value):
        items, spec = pytree.tree_flatten(value, is_leaf=lambda inner: inner is not value)
        return [(f"[{i}]", item) for i, item in enumerate(items)] + [(".<context>", spec.context)]
    return [(f".{name}", part) for name, part in _attributes(value)] or None


def _inner_tensors(value: Any) -> _Children:
    names, context = value.__tensor_flatten__()
    return [(f".{name}", getattr(value, name)) for name in names] + [(".<context>", context)]


def _attributes(value: Any) -> _Children:
    names = set(getattr(value, "__dict__", ()))
    if dataclasses.is_dataclass(value):
        names |= {f.name for f in dataclasses.fields(value)}
    for cls in type(value).__mro__:
        slots = cls.__dict__.get("__slots__", ())
        slots = (slots,) if isinstance(slots, str) else slots
        private = f"_{cls.__name__.lstrip('_')}"
        names |= {f"{private}{s}" if s.startswith("__") and not s.endswith("__") else s for s in slots}
    names -= {"__dict__", "__weakref__"}
    return [(name, getattr(value, name)) for name in sorted(names) if hasattr(value, name)]


def is_plain_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor) and not is_traceable_wrapper_subclass(value)


def _describe(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"{type(value).__name__} {dtype_name(value.dtype)} {shape_text(value)}"
    children = _children(value)
    if children is None:
        return f"{type(value).__name__} {value!r}"
    return f"{type(value).__name__} of {len(children)} item(s)"


def as_tensor(value: Any) -> torch.Tensor | None:
    """Tensors, numpy data, Python floats and complex numbers as a tensor; ``None`` for other values."""
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, np.ndarray | np.generic):
        try:
            return torch.from_numpy(np.array(value))
        except TypeError:  # strings, objects, structured or byte-swapped data
            return None
    if isinstance(value, float):
        return torch.tensor(value, dtype=torch.float64)
    return torch.tensor(value, dtype=torch.complex128) if isinstance(value, complex) else None
