"""The TorchFunctionMode that stands between the model and torch while the model is captured.

It must be entered *inside* what is exported: a mode around ``torch.export.export`` comes too late, because export's own
mode refuses first. It sees tensor methods and functions before Python takes a value: slice bounds and positions
(:mod:`~nxfx.capture.tensor_bounds`), branches and reads (:mod:`~nxfx.capture.branches`), the grad mode, and where
``torch.vmap`` puts its rows.

Private torch API used here: ``torch._functorch.predispatch._remove_batch_dim``, tested on torch 2.9 and 2.13.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch._functorch.predispatch import _remove_batch_dim
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from nxfx.capture import branches, counted_calls, found_positions, memory, read_operands, tensor_bounds
from nxfx.capture.session import Session, Site
from nxfx.capture.windows import check_outputs
from nxfx.report.findings import Severity

Handler = Callable[[Session, Any, tuple[Any, ...], dict[str, Any]], Any]


def _on_remove_batch_dim(session: Session, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The end of a ``torch.vmap``: the tracer loses a result whose rows do not stand first, so they are moved afterwards."""
    rows, level, count, dim = args
    return function(rows, level, count, 0).movedim(0, dim)


_HANDLERS: dict[Any, Handler] = {
    _remove_batch_dim: _on_remove_batch_dim,
    torch.Tensor.__getitem__: tensor_bounds.on_getitem,
    torch.Tensor.__setitem__: tensor_bounds.on_setitem,
    **branches.HANDLERS,
    **memory.HANDLERS,
    **found_positions.HANDLERS,
}


class _Interception(TorchFunctionMode):
    def __init__(self, session: Session, training: bool) -> None:
        super().__init__()
        self.session = session
        session.training = training
        self.grad_at_entry = False

    def __enter__(self) -> Any:
        self.session.entry = sys._getframe(1)
        self.grad_at_entry = torch.is_grad_enabled()
        return super().__enter__()  # type: ignore[no-untyped-call]  # torch's modes have no annotations

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)  # type: ignore[no-untyped-call]
        try:
            if torch.is_grad_enabled() != self.grad_at_entry:
                _set_grad_enabled(self.grad_at_entry)  # left changed: the tracer does not know of it
            if raised[0] is None:
                tensor_bounds.check_copies(self.session)
            branches.note_stated_guards()
        finally:
            self.session.close()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # torch.cond and its kin run Dynamo on their bodies, which would trace into this mode.
        if torch.compiler.is_dynamo_compiling() or self.session.is_paused:
            return function(*args, **kwargs)
        if function is torch._C._set_grad_enabled:
            return _set_grad_enabled(*args)
        if self.session.counts:
            function, args, kwargs = counted_calls.resolved(function, args, kwargs)
        if self.session.item_sources:
            args, kwargs = read_operands.resolved(self.session, function, args, kwargs)
        handler = _HANDLERS.get(function)
        if self.grad_at_entry and self.session.training and not torch.is_grad_enabled():
            return _without_gradient(self.session, handler, function, args, kwargs)
        return handler(self.session, function, args, kwargs) if handler else function(*args, **kwargs)


def interception(session: Session, *, training: bool = False) -> _Interception:
    """Intercept what the model does inside the ``with`` block; what is learned goes to ``session``.

    Args:
        training: keep the meaning of ``no_grad`` regions by detaching what they compute.

    Raises (from inside the block, out of the model's own line):
        CaptureError: a construct that cannot be captured; also an error among ``session.findings``.
    """
    return _Interception(session, training)


def _set_grad_enabled(mode: bool) -> None:
    # Hidden from the tracer, which would cut the graph there and make the region a higher-order op.
    with torch._C.DisableTorchFunction():
        torch._C._set_grad_enabled(mode)


def _without_gradient(
    session: Session, handler: Handler | None, function: Any, args: Any, kwargs: dict[str, Any]
) -> Any:
    """One call inside a ``no_grad`` region of a graph that will be differentiated."""
    written = args[0] if args and _writes(function) else None
    if written is not None or kwargs.get("out") is not None:
        args, kwargs = pytree.tree_map(lambda a: a if a is written else _detached(a), (args, kwargs))
        if isinstance(written, torch.Tensor) and written.requires_grad:
            session.note(
                "NX409",
                Severity.ERROR,
                "a tensor that requires a gradient is written in place under no_grad: the graph would record it",
                "write it outside forward, or compute the new value and use that",
            )
    result = handler(session, function, args, kwargs) if handler else function(*args, **kwargs)
    return result if written is not None else pytree.tree_map(_detached, result)


def _writes(function: Any) -> bool:
    name = getattr(function, "__name__", "")
    if name.startswith("__"):
        return (
            name == "__setitem__"
            or name.startswith("__i")
            and name not in ("__invert__", "__index__", "__int__", "__iter__")
        )
    return bool(name.endswith("_")) and name not in ("requires_grad_", "detach_", "share_memory_")


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


__all__ = ["Session", "Site", "check_outputs", "interception"]
