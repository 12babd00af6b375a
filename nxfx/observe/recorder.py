"""The two modes that watch a model run, and the events they leave.

The torch-function mode sees what Python asks of a tensor; the dispatch mode sees the operators below it, hidden reads among them
(``torch.zeros(n)`` with a tensor ``n``), and keeps a copy of whatever storage of the model's is about to be written.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from nxfx.analysis import value_ops
from nxfx.capture.session import location_of, model_frames, rank_of
from nxfx.observe import aims, constructs
from nxfx.observe.constructs import Reading
from nxfx.report.locations import Location
from nxfx.report.syntax import place_of

_SHOWN = 48  # characters of a value
_MOST_EVENTS = 4096  # a place that runs more often is counted on, and its values are not kept


@dataclass
class Event:
    """Everything that happened at one place.

    Attributes:
        count: how often it ran.
        history: what was read each time, as text, in order.
    """

    reading: Reading
    location: Location
    innermost: Location
    chain: tuple[Location, ...]
    count: int = 0
    history: list[str] = field(default_factory=list)

    def happened(self, value: str) -> None:
        self.count += 1
        if len(self.history) < _MOST_EVENTS:
            self.history.append(value)


Key = tuple[Any, ...]


@dataclass
class Record:
    """One run: the events by place, in order of the first time, and the conditions on inputs that it met."""

    events: dict[Key, Event] = field(default_factory=dict)
    entry: FrameType | None = None
    call: tuple[Any, tuple[Any, ...]] = (None, ())
    told: set[str] = field(default_factory=set)
    aims: aims.Aims = field(default_factory=lambda: aims.Aims(()))

    def frames(self) -> list[FrameType]:
        """The model's own frames and its libraries', innermost first."""
        return model_frames(sys._getframe(1), self.entry)

    def add(self, reading: Reading, frames: list[FrameType], value: str) -> None:
        """``reading`` happened where ``frames`` are, and gave ``value``."""
        own = [f for f in frames if rank_of(f.f_code.co_filename) == 2]
        user, innermost = next(iter(own or frames), None), next(iter(frames), None)
        where, inner = _place(user), _place(innermost)
        # Columns, not the instruction: Python compiles the test of a loop twice, and moves on within a call as it warms up.
        columns = place_of(innermost).columns if innermost is not None else None
        key = (reading.kind, where, inner, columns)
        event = self.events.get(key)
        if event is None:
            chain = tuple(location_of(f) for f in reversed(own or frames))
            event = self.events[key] = Event(reading, location_of(user), location_of(innermost), chain)
        event.happened(value)


def _place(frame: FrameType | None) -> tuple[str, int]:
    return (frame.f_code.co_filename, frame.f_lineno) if frame is not None else ("", 0)


class FunctionMode(TorchFunctionMode):
    """What Python asks of a tensor."""

    def __init__(self, record: Record) -> None:
        super().__init__()
        self.record = record

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        record, kwargs = self.record, kwargs or {}
        before, told = record.call, record.told
        record.call, record.told = (function, args), set()
        try:
            if function not in constructs.LOOKED_AT:
                result = function(*args, **kwargs)
                if function in aims.WATCHED:
                    record.aims.computed(function, args, result)
                return result
            frames = record.frames()
            reading = constructs.of_function(function, args, kwargs, frames)
            if reading is None:
                return function(*args, **kwargs)
            record.call = (constructs.TOLD, ())
            result = function(*args, **kwargs)
            record.add(reading, frames, _read(function, args, result))
            if reading.role == "branch" and isinstance(result, bool):
                record.aims.asked(args[0] if args else None, result)
            return result
        finally:
            record.call, record.told = before, told


class DispatchMode(TorchDispatchMode):
    """The operators below: hidden reads, sizes that depend on data, random numbers, writes."""

    supports_higher_order_operators = True

    def __init__(self, record: Record, keep: Callable[[Iterable[torch.Tensor]], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's modes have no annotations
        self.record = record
        self.keep = keep

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        written = value_ops.written_by(function)
        if written:
            self.keep(value_ops.written_arguments(written, args, kwargs))
        kind = value_ops.kind_of(function)
        if not kind or kind == "body?" or not value_ops.depends(kind, function, args, kwargs, _dtype_of):
            return function(*args, **kwargs)
        result = function(*args, **kwargs)
        caller, call = self.record.call
        if caller is constructs.TOLD:
            return result
        reading = constructs.of_operator(function, kind.partition("?")[0], caller, call)
        # One call is one site, however many numbers it reads; each of a call's random operators draws for the same purpose.
        if reading is not None and reading.kind not in self.record.told:
            self.record.told.add(reading.kind)
            self.record.add(reading, self.record.frames(), "" if reading.role == "random" else _shown(result))
        return result


def _dtype_of(value: Any) -> torch.dtype | None:
    return value.dtype if isinstance(value, torch.Tensor) else None


def _read(function: Any, args: tuple[Any, ...], result: Any) -> str:
    if function in constructs.TEXT_OR_COPY and args and isinstance(args[0], torch.Tensor):
        return _shown(args[0])
    if function in constructs.LITERALS:
        return _shown(result)
    return "True" if function is torch._assert else _shown(result)


def _shown(value: Any) -> str:
    """A value as text: numbers in full, tensors of one element as their number, others by dtype and shape."""
    with torch._C.DisableTorchFunction(), torch.utils._python_dispatch._disable_current_modes():
        if isinstance(value, torch.Tensor):
            if value.numel() == 1 and value.layout is torch.strided:
                value = value.detach().item()
            else:
                return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
        elif isinstance(value, (tuple, list)) and value and isinstance(value[0], torch.Tensor):
            value = value[0]
            return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
        elif hasattr(value, "dtype") and hasattr(value, "shape") and value.ndim:
            return f"{value.dtype}{list(value.shape)}"
        text = repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"
