"""A model's Python state: what ``forward`` finds in plain attributes, changes there, and must find again.

``torch.export`` knows parameters and buffers. Tensors kept as plain attributes or in lists (static KV caches), counters and
caches built on the first call are invisible to it: it bakes them. :class:`ModuleState` takes stock of them before a capture,
says what the forward changed, and puts everything back.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from nxfx.capture.structure import Path, open_container, write
from nxfx.report.locations import Location

_INTERNAL = frozenset(torch.nn.Module().__dict__) | {"forward", "__wrapped__", "_hf_hook", "_old_forward"}
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
        opened = open_container(self.container)
        return dict(zip(opened[1], opened[2], strict=True)) if opened else {}

    def put(self, content: dict[Any, Any]) -> None:
        """Replace its content."""
        now = self.now()
        if self.kind == "list":
            self.container[:] = list(content.values())
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

    @property
    def tensor(self) -> torch.Tensor:
        value = self.holder.now()[self.key]
        assert isinstance(value, torch.Tensor)
        return value


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size, tuple)):
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
        self._registries = [(m, dict(m._parameters), dict(m._buffers)) for m in model.modules()]
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
        found, seen = [], set()
        for holder in self.holders:
            for key, value in holder.content.items():
                if isinstance(value, torch.Tensor) and id(value) not in seen:
                    seen.add(id(value))
                    found.append(Slot(holder, key, ".".join(str(p) for p in (*holder.path, key) if p != "")))
        return found

    def aliases(self, slot: Slot) -> Iterator[tuple[Holder, Any]]:
        """Every place that holds the slot's tensor object."""
        tensor = slot.holder.content[slot.key]
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
            for key in holder.content.keys() - now.keys():
                found.append(Change(holder, key, holder.content[key], None, removed=True))
            for key, value in now.items():
                before = holder.content.get(key)
                if key not in holder.content or not _same(before, value):
                    found.append(Change(holder, key, before, value))
        return found

    def restore(self) -> None:
        """Put everything back, registered parameters and buffers included."""
        for module, parameters, buffers in self._registries:
            for registry, was in ((module._parameters, parameters), (module._buffers, buffers)):
                if registry.keys() != was.keys() or any(registry[k] is not v for k, v in was.items()):
                    registry.clear()
                    registry.update(was)
        for holder in self.holders:
            now = holder.now()
            if now.keys() != holder.content.keys() or any(v is not holder.content[k] for k, v in now.items()):
                holder.put(holder.content)


def writing_line(model: torch.nn.Module, change: Change) -> Location:
    """The source line in ``forward`` (or another method of the class) that writes the attribute."""
    module_name = change.holder.path[0]
    attribute = str(change.holder.path[1] if len(change.holder.path) > 1 else change.key)
    try:
        module = model.get_submodule(module_name)
        lines, first = inspect.getsourcelines(type(module))
        file = inspect.getsourcefile(type(module)) or ""
    except (AttributeError, TypeError, OSError):
        return Location(module=str(module_name))
    assignment = re.compile(rf"\bself\.{re.escape(attribute)}\b.*?([-+*/|&]?=(?!=)|\.(append|extend|pop|insert|update|clear)\()")
    in_method = ""
    for offset, text in enumerate(lines):
        method = re.match(r"\s*def (\w+)", text)
        if method:
            in_method = method.group(1)
        if in_method != "__init__" and assignment.search(text):
            return Location(file, first + offset, text.strip(), str(module_name), in_method)
    return Location(file, first, lines[0].strip(), str(module_name))
