"""Where a run of the model stands when a branch asks: everything in Python that what follows can depend on.

Two runs with equal standpoints go on alike, but for the values of their tensors: where one run is understood, the other is.
"""

from __future__ import annotations

import enum
import functools
import logging
import types
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch

from nxfx.capture.counters import Count
from nxfx.capture.merging import liveness, positions
from nxfx.capture.structure import open_container
from nxfx.graph.meta import FakeTensor
from nxfx.report.locations import frame_rank

_rank = functools.lru_cache(maxsize=4096)(frame_rank)
_PLAIN = (
    type(None), bool, int, str, bytes, torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size, enum.Enum, range, type,
    type(Ellipsis),
)  # fmt: skip
_LASTING = (types.ModuleType, types.BuiltinFunctionType, logging.Logger, torch._ops.OpOverload, torch._ops.OpOverloadPacket)
_MAX_DEPTH = 10
_MAX_ITEMS = 2048


@dataclass
class Standpoint:
    """A place in the program with what lives there.

    Attributes:
        state: frames with their instructions and live locals, arguments, Python state of the model; tensors by their layout. None
            where part of it cannot be seen.
        tensors: what stands at each place of a tensor in ``state``, in order.
        identity: for each of them the first place that holds the same object.
        memory: for each of them which memory it lies in.
        bases: the places of those that are no views of others.
        versions: how often each was written.
        written: the places of those whose memory is written later in this run.
    """

    state: Any
    tensors: list[torch.Tensor]
    identity: list[int] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    bases: set[int] = field(default_factory=set)
    versions: list[int] = field(default_factory=list)
    written: set[int] = field(default_factory=set)

    def keep(self) -> list[torch.Tensor]:
        """Copies of the tensors as they are now, each tensor once, for the trace to return."""
        return [self.tensors[place].clone() for place in self.distinct()]

    def distinct(self) -> list[int]:
        """The places at which a tensor stands for the first time."""
        return [place for place, first in enumerate(self.identity) if place == first]

    def copies(self) -> dict[int, int]:
        """Place → which of the copies is of the tensor there."""
        numbers = {place: number for number, place in enumerate(self.distinct())}
        return {place: numbers[first] for place, first in enumerate(self.identity)}

    def leave(self) -> None:
        """The run is over: note what was written since, and let go of the tensors."""
        for place, (tensor, version) in enumerate(zip(self.tensors, self.versions, strict=True)):
            if tensor.is_inference() or tensor._version != version:
                self.written.add(place)
        self.tensors = []


class _Unseen(Exception):
    """Something whose state cannot be looked at."""


def look(frames: list[FrameType], inputs: Any, state: Any) -> Standpoint:
    """Where the run is now.

    Args:
        frames: from the one that asks up to the model's own ``forward``, innermost first.
        inputs: what is reachable in any case: arguments and buffers.
        state: what ``forward`` changed in the model's Python state, as containers and values.
    """
    seer = _Seer()
    try:
        torchs = (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype(), torch.is_autocast_enabled("cpu"))
        seen = (torchs, tuple(seer.frame(f) for f in reversed(frames)), seer.value(inputs, 0), seer.value(state, 0))
    except _Unseen:
        return Standpoint(None, [])
    tensors = seer.tensors
    first: dict[int, int] = {}
    identity = [first.setdefault(id(t), place) for place, t in enumerate(tensors)]
    memory = [t.untyped_storage()._cdata for t in tensors]
    bases = {place for place, t in enumerate(tensors) if not t._is_view()}
    return Standpoint(seen, tensors, identity, memory, bases, [0 if t.is_inference() else t._version for t in tensors])


class _Seer:
    def __init__(self) -> None:
        self.tensors: list[torch.Tensor] = []
        self.open: dict[int, int] = {}

    def frame(self, frame: FrameType) -> Any:
        code, offset = frame.f_code, frame.f_lasti
        hidden = positions.names_behind(code, offset)
        if hidden is None:
            raise _Unseen(code.co_qualname if hasattr(code, "co_qualname") else code.co_name)
        live = liveness.live_at(code, offset)
        found = frame.f_locals
        if any(isinstance(_named(found, name), torch.Tensor) for name in hidden):
            raise _Unseen("a loop over a tensor: the rows to come are hidden")
        names = [n for n in found if live is None or n in live or n in hidden]
        if _rank(code.co_filename):
            held: Any = tuple((name, self.value(found[name], 0)) for name in sorted(names))
            held += tuple(self._globals(frame))
        else:  # torch's own: what it keeps for itself while it traces is not the model's
            held = tuple((name, self.value(found[name], 0)) for name in sorted(names) if _is_plain(found[name]))
        return code, offset, held

    def _globals(self, frame: FrameType) -> list[Any]:
        """Plain values among the globals that the code names: forward may change them."""
        named = {n: frame.f_globals[n] for n in frame.f_code.co_names if n in frame.f_globals}
        return [(n, self.value(v, 0)) for n, v in sorted(named.items()) if isinstance(v, (bool, int, float, str, list, dict, torch.Tensor))]

    def value(self, value: Any, depth: int) -> Any:
        if isinstance(value, torch.Tensor):
            return self.tensor(value)
        if type(value) is Count:
            return Count, self.tensor(value._value)
        if isinstance(value, _PLAIN):
            return type(value), value
        if isinstance(value, (float, complex)):
            return type(value), repr(value)
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return type(value), str(value.node.expr)
        if isinstance(value, (torch.nn.Module, *_LASTING)):
            return type(value), id(value)
        if id(value) in self.open:
            return "again", self.open[id(value)]
        if depth > _MAX_DEPTH:
            raise _Unseen
        self.open[id(value)] = len(self.open)
        return self.inside(value, depth + 1)

    def inside(self, value: Any, depth: int) -> Any:
        if isinstance(value, types.FunctionType):
            cells = [c.cell_contents for c in value.__closure__ or () if c is not None]
            return "function", value.__code__, self.value([cells, value.__defaults__, value.__kwdefaults__], depth)
        if isinstance(value, types.MethodType):
            return "method", self.value([value.__func__, value.__self__], depth)
        if isinstance(value, functools.partial):
            return "partial", self.value([value.func, value.args, value.keywords], depth)
        if isinstance(value, slice):
            return "slice", self.value([value.start, value.stop, value.step], depth)
        if isinstance(value, (set, frozenset)) and all(isinstance(v, _PLAIN) for v in value):
            return type(value), frozenset(value)
        opened = open_container(value)
        if opened is None or len(opened[1]) > _MAX_ITEMS or not all(isinstance(k, _PLAIN) for k in opened[1]):
            raise _Unseen(type(value).__name__)
        kind, keys, children, _ = opened
        return kind, type(value), keys, tuple(self.value(child, depth) for child in children)

    def tensor(self, value: torch.Tensor) -> Any:
        if value.layout is not torch.strided:
            raise _Unseen("a tensor without strides")
        if not isinstance(value, FakeTensor):  # a tensor that is no part of the trace: a global, a closure's
            return "tensor", id(value), value._version
        self.tensors.append(value)
        sizes = tuple(map(str, (*value.shape, "|", *value.stride(), "|", value.storage_offset())))
        return "tensor", value.dtype, sizes, value.device, value.requires_grad


def _named(names: Any, dotted: str) -> Any:
    first, *rest = dotted.split(".")
    value = names.get(first)
    for attribute in rest:
        value = getattr(value, attribute, None)
    return value


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return type(value) in (list, tuple) and all(map(_is_plain, value))
    if type(value) is dict:
        return all(isinstance(k, str) for k in value) and all(map(_is_plain, value.values()))
    return isinstance(value, (torch.Tensor, torch.nn.Module, float, *_PLAIN)) and not isinstance(value, type)
