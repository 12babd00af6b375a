"""``x * t.item()``: a number that came out of a tensor, used as an operand as it is, is the 0-d tensor itself.

Cast to what the Python number would make of the result where the tensor would make something else; where a cast would round the
number before torch does (0-d tensors of low precision), and for more arithmetic in Python, the read stays and is reported.
"""

from __future__ import annotations

from typing import Any

import torch

from nxfx.capture import symbols
from nxfx.capture.counted_calls import BINARY, DIVIDING, ROOMY
from nxfx.capture.session import Session
from nxfx.report.rewrites import Kind

_FILLING = frozenset({"masked_fill", "masked_fill_"})


def resolved(session: Session, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of ``function`` with the tensor in the place of a number that came out of it."""
    named = dict(enumerate(args)) | kwargs
    places = [place for place, value in named.items() if isinstance(value, (torch.SymInt, torch.SymFloat))]
    if len(places) != 1 or not _takes(function, args, kwargs):
        return args, kwargs
    (place,) = places
    source = symbols.source_of(session, named[place])
    other = next((v for p, v in named.items() if p != place and isinstance(v, torch.Tensor)), None)
    number = None if source is None or other is None else _beside(source, other, function)
    if number is None:
        return args, kwargs
    name = function.__name__.strip("_")
    session.rewrote("read.operand", Kind.EXACT, f"{name}(x, t.item())", f"{name}(x, t)")
    if isinstance(place, int):
        return (*args[:place], number, *args[place + 1 :]), kwargs
    return args, {**kwargs, place: number}


def _takes(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    name, count = getattr(function, "__name__", ""), len(args) + len(kwargs)
    return name in BINARY and count == 2 or name in _FILLING and count == 3


def _beside(source: torch.Tensor, other: torch.Tensor, function: Any) -> torch.Tensor | None:
    """``source`` as a 0-d tensor that does what its number does beside ``other``."""
    source = source.detach() if source.requires_grad else source  # a number has no gradient
    source = source.reshape(()) if source.ndim else source
    is_float = source.dtype.is_floating_point
    if function.__name__ in _FILLING:
        held = other.dtype is source.dtype if is_float else other.dtype in ROOMY
        return source if held else None
    if not is_float and source.dtype is not torch.bool:
        source = source.to(torch.int64)
    if function.__name__ in DIVIDING and not is_float:
        return source
    wanted = torch.result_type(other, 1.0 if is_float else True if source.dtype is torch.bool else 1)
    if torch.result_type(other, source) is wanted:
        return source
    return source.to(wanted) if not is_float or not other.dtype.is_floating_point else None
