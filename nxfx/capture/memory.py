"""Views and fills that torch cannot make functional, written as ones that it can.

A write through ``expand`` comes back as ``base + (written - base)``, which is not the written value for ``inf`` or a large
base; one through ``unfold`` clears what lies between the windows; ``fill_diagonal_`` writes through ``as_strided``, which is
refused on a view. But ``mask.expand(1, -1, -1)`` of a batch of one repeats nothing, windows that do not overlap are a dim
split in two, and a diagonal is a view of its own. What cannot be followed at all is refused.
"""

from __future__ import annotations

from typing import Any

import torch

from nxfx.capture import trace
from nxfx.capture.session import Session

DATA_ASSIGNED = "an assignment to .data"


def on_expand(session: Session, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``Tensor.expand`` and its kin: a view, where no element is repeated."""
    result = function(*args, **kwargs)
    source = args[0] if args else None
    if not isinstance(source, torch.Tensor) or not isinstance(result, torch.Tensor) or not trace.is_tracing(source):
        return result
    sizes = (*source.shape, *result.shape)
    if not all(type(size) is int for size in sizes) or source.numel() != result.numel() or not result.numel():
        return result
    return source.view(result.shape)


def on_unfold(session: Session, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``Tensor.unfold``: a dim split in two, where windows do not overlap."""
    result = function(*args, **kwargs)
    source: torch.Tensor = args[0]
    if len(args) != 4 or not trace.is_tracing(source) or not all(type(n) is int for n in (*source.shape, *args[1:])):
        return result
    dim, size, step = args[1] % max(source.dim(), 1), args[2], args[3]
    if not source.dim() or not 0 < size <= step or result.shape[dim] * step > source.shape[dim]:
        return result
    count = result.shape[dim]
    return source.narrow(dim, 0, count * step).unflatten(dim, (count, step)).narrow(dim + 1, 0, size).movedim(dim + 1, -1)


def on_fill_diagonal(session: Session, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``Tensor.fill_diagonal_``."""
    base = args[0]
    value = args[1] if len(args) > 1 else kwargs["fill_value"]
    wrap = args[2] if len(args) > 2 else kwargs.get("wrap", False)
    tall = base.dim() == 2 and type(base.shape[0]) is int and base.shape[0] > base.shape[1] + 1
    if not trace.is_tracing(base) or base.dim() < 2 or wrap and tall:
        return function(*args, **kwargs)
    if base.dim() > 2 and len(set(base.shape)) > 1:
        raise RuntimeError("all dimensions of input must be of equal length")  # as eager does
    diagonal = base
    for _ in range(base.dim() - 1):
        diagonal = diagonal.diagonal(0, 0, -1)
    diagonal.fill_(value)
    return base


def on_data_assigned(session: Session, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``tensor.data = value``: the tracer goes on with what the tensor was."""
    raise session.refuse(
        "NX409",
        DATA_ASSIGNED,
        "`.data` of a tensor is assigned: tracing cannot follow it, and goes on with what the tensor held before",
        "with torch.no_grad(): tensor.copy_(value), or assign the tensor itself",
    )


HANDLERS = {
    torch.Tensor.data.__set__: on_data_assigned,  # type: ignore[attr-defined]
    torch.Tensor.expand: on_expand,
    torch.Tensor.expand_as: on_expand,
    torch.Tensor.broadcast_to: on_expand,
    torch.broadcast_to: on_expand,
    torch.Tensor.unfold: on_unfold,
    torch.Tensor.fill_diagonal_: on_fill_diagonal,
}
