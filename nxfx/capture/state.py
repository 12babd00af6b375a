"""A model's Python state: what ``forward`` finds in plain attributes, changes there, and must find again.

``torch.export`` knows parameters and buffers. Tensors kept as plain attributes or in lists (static KV caches), counters and
caches built on the first call are invisible to it: it bakes them. :class:`ModuleState` takes stock of them before a capture,
says what the forward changed, and puts everything back.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch

from nxfx.capture.structure import Path, open_container, write
from nxfx.errors import RangeError
from nxfx.report.locations import Location

# `_output_capturing_hooks_installed`: transformers installs hooks on a model's first call and notes it here; the two belong together,
# and hooks stay where a library put them.
_INTERNAL = frozenset(torch.nn.Module().__dict__) | {
    "forward", "__wrapped__", "_hf_hook", "_old_forward", "_output_capturing_hooks_installed",
}  # fmt: skip
# What nn.RNN and its kin keep beside the registry and bring up to date themselves.
_SECOND_REGISTRIES = frozenset({"_flat_weights", "_flat_weight_refs"})
# Values without entries of their own that forward can change in place: stock is taken of a copy.
_OPAQUE = (set, bytearray, numpy.ndarray)
_CONTENT = "content"
# What a counter may hold between two calls: far from the end of 32 bits, so that what it is added to in a call still fits.
COUNTER_RANGE = (-(2**30), 2**30)
# The path of a container and a key of it.
Place = tuple[Path, Any]
_MAX_DEPTH = 8
_MAX_ITEMS = 4096


@dataclass
class Holder:
    """One mutable container of Python state and its content when stock was taken."""

    path: Path
    container: Any
    kind: str
    content: dict[Any, Any]

    def now(self) -> dict[Any, Any]:
        """Its content at this moment."""
        if self.kind == "module":
            return {k: v for k, v in self.container.__dict__.items() if k not in _INTERNAL}
        if self.kind == "opaque":
            return {_CONTENT: _frozen(self.container)}
        opened = open_container(self.container)
        return dict(zip(opened[1], opened[2], strict=True)) if opened else {}

    def put(self, content: dict[Any, Any]) -> None:
        """Replace its content."""
        now = self.now()
        if self.kind == "list":
            self.container.clear()
            self.container.extend(content.values())
        elif self.kind in ("dict", "dictlike"):
            self.container.clear()
            self.container.update(content)
        else:
            for key in now.keys() - content.keys():
                self.delete(key)
            for key, value in content.items():
                if key not in now or now[key] is not value:
                    self.set(key, value)

    def set(self, key: Any, value: Any) -> None:
        if self.kind == "module":
            self.container.__dict__[key] = value  # past nn.Module.__setattr__, which refuses or registers tensors
        elif self.kind == "opaque":
            _thaw(self.container, value)
        else:
            write(self.container, self.kind, key, value)

    def delete(self, key: Any) -> None:
        if self.kind == "module":
            del self.container.__dict__[key]
        elif self.kind == "object":
            object.__delattr__(self.container, key)
        else:
            del self.container[key]


@dataclass(frozen=True)
class Change:
    """``forward`` changed ``holder``'s entry ``key``; ``removed`` when it is gone."""

    holder: Holder
    key: Any
    before: Any
    after: Any
    removed: bool = False

    @property
    def path(self) -> str:
        return ".".join(str(p) for p in (*self.holder.path, self.key) if p != "")


@dataclass(frozen=True)
class Slot:
    """A plain tensor: ``holder``'s entry ``key``; ``name`` is its dotted path from the model."""

    holder: Holder
    key: Any
    name: str
    aliases: tuple[tuple[Holder, Any], ...] = ()

    @property
    def tensor(self) -> torch.Tensor:
        value = self.holder.now()[self.key]
        assert isinstance(value, torch.Tensor)
        return value

    def fits(self) -> bool:
        """Whether what stands there now can take the place of what stood there when stock was taken."""
        value, was = self.holder.now().get(self.key), self.holder.content[self.key]
        same = isinstance(value, torch.Tensor) and value.dtype == was.dtype and value.shape == was.shape
        return same and all(holder.now().get(key) is value for holder, key in self.aliases)

    def put(self, value: torch.Tensor) -> None:
        """A call has left ``value`` there."""
        self.tensor.copy_(value)

    def rebind(self, value: torch.Tensor) -> None:
        """A call has put ``value`` in its place; whoever holds the old tensor keeps it."""
        self.holder.set(self.key, value.to(self.tensor.dtype))

    def move(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """The model went to another device: its plain tensors are its owner's to move."""


@dataclass(frozen=True)
class CounterSlot(Slot):
    """A plain integer. The graph has it as a 0-d int64 buffer; the model goes on with its integer."""

    _held: list[torch.Tensor] = field(default_factory=list)

    @property
    def tensor(self) -> torch.Tensor:
        """A tensor of its own that holds what the integer is now.

        Raises:
            RangeError: it is outside of what arithmetic with it is proved for.
        """
        value = self.holder.now()[self.key]
        low, high = COUNTER_RANGE
        if not low <= value <= high:
            message = f"the counter {self.name!r} is {value}, outside [{low}, {high}], within which a prepared graph counts"
            raise RangeError(message, argument=self.name, value=value, position=(), flat_position=0, range=COUNTER_RANGE)
        if not self._held:
            self._held.append(torch.full((), value, dtype=torch.int64))
        elif int(self._held[0]) != value:
            with torch.no_grad():
                self._held[0].fill_(value)
        return self._held[0]

    def fits(self) -> bool:
        return type(self.holder.now().get(self.key)) is int

    def put(self, value: torch.Tensor) -> None:
        self.holder.set(self.key, int(value))
        self.tensor.copy_(value)

    def move(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._held[:] = map(fn, self._held)


def _frozen(value: Any) -> Any:
    if isinstance(value, numpy.ndarray):
        return value.copy()
    return bytes(value) if isinstance(value, bytearray) else frozenset(value)


def _thaw(container: Any, value: Any) -> None:
    if isinstance(container, set):
        container.clear()
        container.update(value)
    elif isinstance(container, bytearray):
        container[:] = value
    else:
        container[...] = value


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, numpy.ndarray):
        return isinstance(b, numpy.ndarray) and a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size, tuple, frozenset)):
        try:
            return type(a) is type(b) and bool(a == b)
        except Exception:
            return False
    return False


class ModuleState:
    """The Python state of ``model`` and all its submodules, as it is now."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.holders: list[Holder] = []
        self._seen: set[int] = set()
        scripted = torch.jit.ScriptModule  # keeps its tensors in C++, out of forward's reach
        self._registries = [
            (name, m, dict(m._parameters), dict(m._buffers)) for name, m in model.named_modules() if not isinstance(m, scripted)
        ]
        for name, module in model.named_modules():
            if id(module) in self._seen:
                continue
            self._seen.add(id(module))
            content = {k: v for k, v in module.__dict__.items() if k not in _INTERNAL}
            self.holders.append(Holder((name,), module, "module", content))
            for key, value in content.items():
                self._open(value, (name, key))

    def _open(self, value: Any, path: Path) -> None:
        if len(path) > _MAX_DEPTH or isinstance(value, torch.Tensor) or id(value) in self._seen:
            return
        if isinstance(value, _OPAQUE):
            self._seen.add(id(value))
            self.holders.append(Holder(path, value, "opaque", {_CONTENT: _frozen(value)}))
            return
        opened = open_container(value)
        if opened is None or len(opened[1]) > _MAX_ITEMS:
            return
        kind, keys, children, _ = opened
        self._seen.add(id(value))
        if kind in ("list", "dict", "dictlike", "object"):
            self.holders.append(Holder(path, value, kind, dict(zip(keys, children, strict=True))))
        for key, child in zip(keys, children, strict=True):
            self._open(child, (*path, key))

    def slots(self) -> list[Slot]:
        """Every plain tensor, each tensor object once."""
        found, seen = [], set(self._registered())
        for holder in self.holders:
            for key, value in holder.content.items():
                if isinstance(value, torch.Tensor) and id(value) not in seen:
                    seen.add(id(value))
                    name = ".".join(str(p) for p in (*holder.path, key) if p != "")
                    found.append(Slot(holder, key, name, tuple(self.aliases(value))))
        return found

    def counters(self, places: Collection[Place]) -> list[CounterSlot]:
        """The plain integers at ``places``."""
        return [
            CounterSlot(holder, key, ".".join(str(p) for p in (*holder.path, key) if p != ""))
            for holder in self.holders
            for key in holder.content
            if (holder.path, key) in places
        ]

    def _registered(self) -> dict[int, tuple[dict[str, Any], str, str]]:
        """id of each parameter and buffer, as it was → the registry that holds it, its name there, its dotted name."""
        found: dict[int, tuple[dict[str, Any], str, str]] = {}
        for path, module, *before in self._registries:
            for registry, was in zip((module._parameters, module._buffers), before, strict=True):
                for name, tensor in was.items():
                    if tensor is not None:
                        found.setdefault(id(tensor), (registry, name, f"{path}.{name}".lstrip(".")))
        return found

    def registered_now(self) -> list[Change]:
        """What each registry holds at this moment, in order."""
        return [
            Change(Holder((path,), module, "module", {}), name, None, tensor)
            for path, module, *_ in self._registries
            for registry in (module._parameters, module._buffers)
            for name, tensor in registry.items()
        ]

    def registered_aliases(self) -> Iterator[tuple[Holder, Any, torch.Tensor, str]]:
        """Entries of Python containers that hold a registered tensor, with what the registry holds there now, and its name."""
        registered = self._registered()
        for holder in self.holders:
            for key, value in holder.content.items():
                if isinstance(value, torch.Tensor) and id(value) in registered:
                    registry, leaf, name = registered[id(value)]
                    yield holder, key, registry[leaf], name

    def aliases(self, tensor: torch.Tensor) -> Iterator[tuple[Holder, Any]]:
        """Every place that holds this tensor object."""
        for holder in self.holders:
            for key, value in holder.content.items():
                if value is tensor:
                    yield holder, key

    def changes(self) -> list[Change]:
        """What is different now, entry by entry."""
        found = []
        for holder in self.holders:
            now = holder.now()
            if now.keys() == holder.content.keys() and all(v is holder.content[k] for k, v in now.items()):
                continue
            if _SECOND_REGISTRIES.intersection(holder.path):
                continue
            for key in reversed([k for k in holder.content if k not in now]):  # from a list's end
                found.append(Change(holder, key, holder.content[key], None, removed=True))
            for key, value in now.items():
                before = holder.content.get(key)
                if key not in _SECOND_REGISTRIES and (key not in holder.content or not _same(before, value)):
                    found.append(Change(holder, key, before, value))
        return found

    def restore(self) -> None:
        """Put everything back, registered parameters and buffers included."""
        for _, module, parameters, buffers in self._registries:
            for registry, was in ((module._parameters, parameters), (module._buffers, buffers)):
                if registry.keys() != was.keys() or any(registry[k] is not v for k, v in was.items()):
                    registry.clear()
                    registry.update(was)
        for holder in self.holders:
            now = holder.now()
            if now.keys() != holder.content.keys() or any(v is not holder.content[k] for k, v in now.items()):
                holder.put(holder.content)


def counted(changes: Iterable[Change]) -> dict[Place, Change]:
    """Those of ``changes`` that make another integer of an integer, by where it stands."""
    return {(c.holder.path, c.key): c for c in changes if not c.removed and type(c.before) is int and type(c.after) is int}


_NOT_THE_USERS = ("builtins", "torch.nn.modules.module")


def writing_line(model: torch.nn.Module, change: Change) -> Location:
    """The source line in ``forward`` (or another method of the class) that writes the attribute."""
    module_name = str(change.holder.path[0])
    attribute = str(change.holder.path[1] if len(change.holder.path) > 1 else change.key)
    try:
        return line_that_writes(type(model.get_submodule(module_name)), attribute, module_name)
    except AttributeError:
        return Location(module=module_name)


def line_that_writes(cls: type, attribute: str, module: str = "") -> Location:
    """The line of ``cls``, or of a class that it is made from, that assigns ``self.<attribute>`` outside ``__init__``; else the class."""
    name = rf"\bself\.{re.escape(attribute)}\b"
    target = rf"^[^(=]*{name}(\[.*?\]|\.\w+)*\s*(,[^=(]*|:[^=]*)?(//|\*\*|<<|>>|[-+*/%|&^@])?=(?!=)"
    assignment = re.compile(rf"{target}|{name}.*?\.(append|extend|pop|insert|update|clear)\(")
    declared = Location(module=module)
    for base in (c for c in cls.__mro__ if c.__module__ not in _NOT_THE_USERS):
        try:
            lines, first = inspect.getsourcelines(base)
            file = inspect.getsourcefile(base) or ""
        except (TypeError, OSError):
            continue
        if not declared.file:
            declared = Location(file, first, lines[0].strip(), module)
        in_method = ""
        for offset, text in enumerate(lines):
            method = re.match(r"\s*def (\w+)", text)
            if method:
                in_method = method.group(1)
            if in_method != "__init__" and assignment.search(text):
                return Location(file, first + offset, text.strip(), module, in_method)
    return declared
