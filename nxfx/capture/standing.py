"""What a capture takes for granted about the model: asked before each call, since nothing else would notice a change.

The graph names weights, so other values are seen by themselves. Baked are: which modules there are, their modes and hooks,
dtype, shape, layout and ties of their tensors, and the plain Python values among their attributes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from nxfx.capture.state import _INTERNAL

_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)


class Standing:
    """The model as it is now; ``changed`` contains attributes that forward itself writes, which are guarded elsewhere."""

    def __init__(self, model: torch.nn.Module, changed: Iterable[tuple[int, Any]] = ()) -> None:
        own = set(changed)
        self._modules = [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
        self._attributes = [
            (m.__dict__, key, value)
            for m in self._modules
            for key, value in m.__dict__.items()
            if key not in _INTERNAL and isinstance(value, _PLAIN) and (id(m), key) not in own
        ]
        self._structure, self._tensors = self._look()

    def _look(self) -> tuple[list[Any], list[Any]]:
        structure: list[Any] = []
        tensors: list[Any] = []
        numbers: dict[int, int] = {}
        for m in self._modules:
            structure.append((m.training, *map(id, m._modules.values()), *m._forward_pre_hooks, *m._forward_hooks))
            for registry in (m._parameters, m._buffers):
                for name, t in registry.items():
                    tie = numbers.setdefault(id(t), len(numbers))
                    tensors.append(None if t is None else (name, tie, t.dtype, t.shape, t.stride() if t.layout is torch.strided else None))
        return structure, tensors

    def holds(self) -> bool:
        """Whether the model still is what it was."""
        if not all(d.get(k, self) is v or _equal(d.get(k, self), v) for d, k, v in self._attributes):
            return False
        structure, tensors = self._look()
        return structure == self._structure and tensors == self._tensors


def _equal(a: Any, b: Any) -> bool:
    return type(a) is type(b) and bool(a == b)
