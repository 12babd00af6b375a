"""Calling conventions: Python arguments and results as flat tensors plus a hashable description of everything else.

``torch.utils._pytree`` alone does not do here: cache objects of model libraries are mutated in place and returned, and are
not registered with it. A :class:`Spec` therefore opens any object that holds tensors through its attributes, and keeps
track of which result *is* which argument.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
import functools
import types
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic

import numpy
import torch
from torch.utils import _pytree as pytree

from nxfx.errors import CaptureError

Path = tuple[Any, ...]

# Values that can hold no tensor, or that are never opened.
_ATOMS = (
    type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size,
    torch.Generator, enum.Enum, type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.MethodType, range, slice,
    torch.nn.Module,
)  # fmt: skip
_LEAVES = (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)
_HIDING = (list, tuple, set, frozenset, functools.partial)  # what can hold tensors without being opened
_MUTABLE = frozenset({"list", "dict", "dictlike", "object"})
_MAX_DEPTH = 12
_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: a class made in Python, whose instances object.__new__ can make


@dataclass(frozen=True)
class Leaf:
    """The ``index``-th flat tensor."""

    index: int


class Static:
    """A Python value baked into a capture. Equal when type and value are; compared by identity when it cannot be hashed."""

    __slots__ = ("kept", "key", "value")  # kept: objects whose id stands in the key

    def __init__(self, value: Any) -> None:
        self.value = value
        self.key: Any
        if isinstance(value, numpy.ndarray):  # captures bake its content
            self.value = value.copy()
            self.key = (numpy.ndarray, value.dtype.str, value.shape, value.tobytes())
            return
        if isinstance(value, (list, tuple)):  # the context of a registered pytree node
            self.key = (type(value), tuple(Static(v) for v in value))
            return
        if isinstance(value, weakref.ref):  # compares its referents, which may be tensors
            self.key = (type(value), id(value()))
            return
        if isinstance(value, torch.nn.Module):  # its weights are baked
            self.kept = [*value.parameters(), *value.buffers()]
            self.key = (id(value), value.training, *map(id, self.kept))
            return
        if isinstance(value, (types.FunctionType, types.MethodType)) and getattr(value, "__closure__", None):
            self.kept = [_cell(c) for c in value.__closure__ or ()]
            self.key = (value, *map(id, self.kept))
            return
        if isinstance(value, (set, frozenset)):
            self.value, value = type(value)(value), frozenset(value)
        try:
            hash(value)
            self.key = (type(value), repr(value) if isinstance(value, (float, complex)) else value)
        except TypeError:
            self.key = (type(value), id(value))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Static) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def __repr__(self) -> str:
        return repr(self.value)


def _cell(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


@dataclass(frozen=True)
class Container:
    """A list, tuple, dict, registered pytree node or opened object.

    Attributes:
        kind: ``"list"``, ``"tuple"``, ``"dict"``, ``"namedtuple"``, ``"pytree"``, ``"dictlike"`` (a subclass of dict), ``"object"``.
        type: the Python class.
        keys: dict keys, attribute names or positions of the children.
        children: one description each.
        context: what a registered pytree node needs to be rebuilt.
    """

    kind: str
    type: type
    keys: tuple[Any, ...]
    children: tuple[Any, ...]
    context: Static = field(default_factory=lambda: Static(None))


@dataclass(frozen=True)
class Same:
    """In a result: the very object (or tensor) that stands at ``path`` of the arguments."""

    path: Path


Spec = Leaf | Static | Container | Same


def _attributes(value: Any) -> dict[str, Any] | None:
    """The instance attributes of an object that may be opened, else None."""
    found: dict[str, Any] = {}
    for cls in type(value).__mro__:
        slots = cls.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                found[name] = getattr(value, name)
    attributes = getattr(value, "__dict__", None)
    if isinstance(attributes, dict):
        found.update(attributes)
    return found or None


def _is_dataclass(cls: type) -> bool:
    return dataclasses.is_dataclass(cls)


def _is_namedtuple(value: Any) -> bool:
    return isinstance(value, tuple) and hasattr(type(value), "_fields")


def open_container(value: Any) -> tuple[str, tuple[Any, ...], tuple[Any, ...], Any] | None:
    """``(kind, keys, children, context)`` of anything that can hold tensors, None for an atom."""
    if isinstance(value, _ATOMS):
        return None
    cls = type(value)
    if cls is list or cls is collections.deque or isinstance(value, list) and _is_bare(value):
        return "list", tuple(range(len(value))), tuple(value), value.maxlen if cls is collections.deque else None
    if cls is tuple:
        return "tuple", tuple(range(len(value))), tuple(value), None
    if cls in (dict, collections.OrderedDict):
        return "dict", tuple(value), tuple(value.values()), None
    if _is_namedtuple(value):
        return "namedtuple", tuple(range(len(value))), tuple(value), None
    if isinstance(value, tuple) and cls not in pytree.SUPPORTED_NODES and _is_bare(value):
        return "tuple", tuple(range(len(value))), tuple(value), None
    if cls in pytree.SUPPORTED_NODES and isinstance(value, (dict, tuple)):
        children, context = pytree.SUPPORTED_NODES[cls].flatten_fn(value)
        return "pytree", tuple(range(len(children))), tuple(children), context
    if isinstance(value, dict):
        return "dictlike", tuple(value), tuple(value.values()), None
    if isinstance(value, (list, tuple, set, frozenset, numpy.ndarray)):
        return None
    if not all(base is object or base.__flags__ & _HEAP_TYPE for base in cls.__mro__):
        return None  # state we cannot see or rebuild
    attributes = _attributes(value)
    if attributes is None:
        return None
    own_equality = "__eq__" in {k for base in cls.__mro__[:-1] for k in vars(base)} and not _is_dataclass(cls)
    if own_equality and not any(holds_tensors(v) for v in attributes.values()):
        return None  # a value
    return "object", tuple(attributes), tuple(attributes.values()), None


def _is_bare(value: Any) -> bool:
    """Whether a list or tuple of a class made in Python has nothing but its items."""
    cls = type(value)
    made_in_python = all(base.__flags__ & _HEAP_TYPE for base in cls.__mro__ if base not in (list, tuple, object, Generic))
    return made_in_python and not getattr(value, "__dict__", None)


def holds_tensors(value: Any, depth: int = 4) -> bool:
    """Whether ``value`` is a tensor or, as far as can be seen, contains one."""
    if isinstance(value, torch.Tensor):
        return True
    if depth == 0 or isinstance(value, _ATOMS):
        return False
    if isinstance(value, dict):
        return any(holds_tensors(v, depth - 1) for v in value.values())
    if isinstance(value, (list, tuple, set, frozenset, collections.deque)):
        return any(holds_tensors(v, depth - 1) for v in value)
    if isinstance(value, functools.partial):
        return holds_tensors((*value.args, value.keywords), depth - 1)
    return any(holds_tensors(v, depth - 1) for v in (_attributes(value) or {}).values())


class _Flattener:
    def __init__(self, share: bool, same: dict[int, Path] | None = None) -> None:
        self.leaves: list[Any] = []
        self.paths: list[Path] = []
        self.share = share
        self.same = same or {}
        self.seen: dict[int, Leaf] = {}
        self.mutable: dict[int, Path] = {}

    def spec(self, value: Any, path: Path) -> Any:
        if isinstance(value, _LEAVES):
            return self._leaf(value, path)
        if isinstance(value, _ATOMS):
            return Static(value)
        if id(value) in self.same:
            return Same(self.same[id(value)])
        if id(value) in self.mutable:
            return Same(self.mutable[id(value)])
        opened = open_container(value) if len(path) <= _MAX_DEPTH else None
        if opened is None:
            if isinstance(value, _HIDING) and holds_tensors(value):
                raise _hidden(value, path)
            return Static(value)
        kind, keys, children, context = opened
        if kind in _MUTABLE:
            self.mutable[id(value)] = path
        specs = tuple(self.spec(c, (*path, k)) for k, c in zip(keys, children, strict=True))
        return Container(kind, type(value), keys, specs, Static(context))

    def _leaf(self, value: Any, path: Path) -> Leaf:
        if self.share and id(value) in self.seen:
            return self.seen[id(value)]
        leaf = Leaf(len(self.leaves))
        self.seen[id(value)] = leaf
        self.leaves.append(value)
        self.paths.append(path)
        return leaf


def _hidden(value: Any, path: Path) -> CaptureError:
    name = ".".join(str(p) for p in path[1:]) or "a value"
    return CaptureError(
        f"{name} holds tensors in a {type(value).__name__}, where they cannot be told apart: they would be baked into the graph. "
        "Pass them in a list, tuple, dict, dataclass or plain object.",
        construct=f"tensors in a {type(value).__name__}",
    )


@dataclass
class Flat:
    """A flattened value.

    Attributes:
        leaves: its tensors (and symbolic numbers) in order; a tensor that occurs twice among *arguments* is one leaf.
        paths: where each leaf stands.
        spec: hashable description of the rest.
        mutable: id of each list, dict or opened object → its path.
    """

    leaves: list[Any]
    paths: list[Path]
    spec: Any
    mutable: dict[int, Path]


def flatten(value: Any, *, share: bool = False, same: dict[int, Path] | None = None) -> Flat:
    """Flatten ``value``.

    Args:
        share: one leaf for a tensor that occurs several times (arguments), instead of one each (results).
        same: id → argument path of objects that, met in a result, are the argument itself.
    """
    flattener = _Flattener(share, same)
    spec = flattener.spec(value, ())
    return Flat(flattener.leaves, flattener.paths, spec, flattener.mutable)


def unflatten(spec: Any, leaves: Sequence[Any], resolve: Callable[[Path], Any] | None = None) -> Any:
    """The inverse of :func:`flatten`; ``resolve`` gives the argument object that a :class:`Same` stands for."""
    return _Builder(leaves, resolve).build(spec, ())


class _Builder:
    def __init__(self, leaves: Sequence[Any], resolve: Callable[[Path], Any] | None) -> None:
        self.leaves = leaves
        self.resolve = resolve
        self.made: dict[Path, Any] = {}

    def build(self, spec: Any, path: Path) -> Any:
        if isinstance(spec, Leaf):
            return self.leaves[spec.index]
        if isinstance(spec, Static):
            return spec.value
        if isinstance(spec, Same):
            if spec.path in self.made:
                return self.made[spec.path]
            if self.resolve is None:
                raise ValueError("the structure refers to an argument, but no arguments are at hand")
            return self.resolve(spec.path)
        return self._mutable(spec, path) if spec.kind in _MUTABLE else self._immutable(spec, path)

    def _mutable(self, spec: Container, path: Path) -> Any:
        # Registered before its children are built: they may refer back to it.
        make: Any = object.__new__ if spec.kind == "object" else spec.type.__new__
        instance = self.made[path] = make(spec.type)
        if spec.context.value is not None:
            instance = self.made[path] = spec.type(maxlen=spec.context.value)
        for key, child in zip(spec.keys, spec.children, strict=True):
            value = self.build(child, (*path, key))
            if spec.kind == "object":
                object.__setattr__(instance, key, value)
            elif spec.kind == "list":
                instance.append(value)
            else:
                instance[key] = value
        return instance

    def _immutable(self, spec: Container, path: Path) -> Any:
        children = [self.build(c, (*path, k)) for k, c in zip(spec.keys, spec.children, strict=True)]
        if spec.kind == "tuple":
            new: Any = tuple.__new__
            return new(spec.type, children)
        if spec.kind == "namedtuple":
            return spec.type(*children)
        return pytree.SUPPORTED_NODES[spec.type].unflatten_fn(children, spec.context.value)


def at(value: Any, path: Path) -> Any:
    """What stands at ``path`` of ``value``."""
    for key in path:
        kind, keys, children, _ = open_container(value) or ("", (), (), None)
        value = children[keys.index(key)] if kind in ("object", "pytree") else value[key]
    return value


def write(container: Any, kind: str, key: Any, new: Any) -> None:
    """Put ``new`` at ``key`` of a mutable container."""
    if kind == "object":
        object.__setattr__(container, key, new)
    elif kind == "list" and key == len(container):
        container.append(new)
    else:
        container[key] = new


def update(current: Any, spec: Any, leaves: Sequence[Any], resolve: Callable[[Path], Any] | None = None) -> Any:
    """Bring ``current`` in place to the state that ``spec`` and ``leaves`` describe; containers keep their identity where they can."""
    if isinstance(spec, Same) and resolve is not None:
        return resolve(spec.path)
    opened = open_container(current)
    if opened is None or not isinstance(spec, Container) or type(current) is not spec.type or spec.kind == "pytree":
        return unflatten(spec, leaves, resolve)
    kind, keys, children, _ = opened
    cls: Any = type(current)
    container: Any = current
    old = dict(zip(keys, children, strict=True))
    new = {
        k: update(old[k], c, leaves, resolve) if k in old else unflatten(c, leaves, resolve)
        for k, c in zip(spec.keys, spec.children, strict=True)
    }
    if kind in ("tuple", "namedtuple"):
        if len(new) == len(old) and all(new[k] is old[k] for k in old):
            return current
        return cls(*new.values()) if kind == "namedtuple" else tuple.__new__(cls, new.values())
    if kind == "list":
        container.clear()
        container.extend(new.values())
    elif kind in ("dict", "dictlike"):
        container.clear()
        container.update(new)
    else:
        for key in old:
            if key not in new:
                object.__delattr__(current, key)
        for key, child in new.items():
            if key not in old or old[key] is not child:
                object.__setattr__(current, key, child)
    return current


def leaf_names(paths: Sequence[Path], taken: Sequence[str] = ()) -> list[str]:
    """A Python identifier for each leaf: its path joined by underscores, unique."""
    names: list[str] = []
    used = set(taken)
    for path in paths:
        name = "_".join(str(p) for p in path)
        name = "".join(c if c.isalnum() or c == "_" else "_" for c in name) or "arg"
        if not name.isidentifier() or name[0].isdigit():
            name = f"arg_{name}"
        unique, n = name, 1
        while unique in used:
            unique, n = f"{name}_{n}", n + 1
        used.add(unique)
        names.append(unique)
    return names


def static_values(spec: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every baked Python value with its path."""
    if isinstance(spec, Static):
        yield path, spec.value
    elif isinstance(spec, Container):
        for key, child in zip(spec.keys, spec.children, strict=True):
            yield from static_values(child, (*path, key))
