"""Tensors that ``forward`` replaces on the model (``self.last = y``): where nothing else holds the old one, a write to its buffer.

A graph cannot hand Python a new object, but it can update a buffer, and so can what is compiled from it. A prepared call puts the new
tensor where the model would (:meth:`~nxfx.capture.state.Slot.rebind`): who holds the old one keeps it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from nxfx.capture.state import Change, Slot
from nxfx.capture.structure import flatten


def rebound(changes: list[Change], lent: dict[Any, tuple[Slot, torch.Tensor]], kept: Iterable[Any], own: Iterable[Any]) -> list[Change]:
    """Take the changes that are such writes out of ``changes``, and make the writes.

    Args:
        changes: what ``forward`` did to Python state.
        lent: (container, key) → a plain tensor of the model, and the buffer that stood for it.
        kept: what the call leaves elsewhere: results, arguments.
        own: tensors that outlive the call: arguments, parameters and buffers.
    """
    found = [change for change in changes if _replaces(change, lent)]
    while True:  # one that stays is a holder of others
        staying = [leaf for change in changes if change not in found and not change.removed for leaf in flatten(change.after).leaves]
        held = {_memory(t) for t in (*kept, *staying)}
        lasting = {_memory(t) for t in own}
        fresh = [_memory(c.after) for c in found]
        fitting = [
            c for c, memory in zip(found, fresh, strict=True)
            if memory not in lasting and fresh.count(memory) == 1 and _memory(_of(c, lent)) not in held
        ]  # fmt: skip
        if len(fitting) == len(found):
            break
        found = fitting
    for change, value in [(c, c.after.clone()) for c in found]:
        _of(change, lent).copy_(value)
        changes.remove(change)
    return found


def views(changes: list[Change], own: Iterable[Any]) -> list[str]:
    """The paths of changes that leave a part of a tensor which outlives the call: a write to either shows in the other."""
    lasting: dict[Any, set[int]] = {}
    for tensor in own:
        lasting.setdefault(_memory(tensor), set()).add(id(tensor))
    leaves = [(change.path, leaf) for change in changes if not change.removed for leaf in flatten(change.after).leaves]
    return [path for path, leaf in leaves if id(leaf) not in lasting.get(_memory(leaf), {id(leaf)})]


def _of(change: Change, lent: dict[Any, tuple[Slot, torch.Tensor]]) -> torch.Tensor:
    return lent[id(change.holder.container), change.key][1]


def _replaces(change: Change, lent: dict[Any, tuple[Slot, torch.Tensor]]) -> bool:
    slot, old = lent.get((id(change.holder.container), change.key), (None, None))
    new = change.after
    if slot is None or old is None or change.removed or len(slot.aliases) != 1 or not isinstance(new, torch.Tensor):
        return False
    alike = new.dtype is old.dtype and new.shape == old.shape and new.device == old.device and new.layout is old.layout
    return alike and not new.requires_grad and not _written(old)


def _written(tensor: torch.Tensor) -> bool:
    return tensor.is_inference() or tensor._version > 0


def _memory(tensor: Any) -> Any:
    plain = isinstance(tensor, torch.Tensor) and tensor.layout is torch.strided
    return tensor.untyped_storage()._cdata if plain else id(tensor)
