"""``nxfx.compile``: nxfx's own capture and passes, then an inner compiler on the cleaned graph."""

from __future__ import annotations

from typing import Any

import torch

from nxfx.api import prepare
from nxfx.capture.dynamo import Inner, inner_compiler
from nxfx.prepared import CapturedCall, PreparedModule
from nxfx.targets import Target


def compile(
    model: torch.nn.Module, *, inner: str | Inner | None = None, target: str | Target = "trn2", **prepare_options: Any
) -> PreparedModule:
    """``model`` captured and cleaned by nxfx and compiled by ``inner``; called like the model.

    Unlike ``torch.compile(model, backend="nxfx")``, where Dynamo captures, this has what nxfx's own capture can do:
    tensor bounds become masks, and the graph is one.

    Args:
        model: any ``nn.Module``.
        inner: the name of a ``torch.compile`` backend, or ``compiler(graph_module, example_inputs)``. Default:
            ``"neuron"`` where it is registered; else the cleaned graph runs as it is.
        target: ``"inf2"``, ``"trn1"``, ``"trn2"`` or ``"trn3"``.
        prepare_options: everything else that :func:`nxfx.prepare` takes, ``sdk`` for one.

    Raises:
        UsageError: no such inner compiler, or anything that :func:`nxfx.prepare` refuses.
    """
    _, backend = inner_compiler(inner)
    prepared = prepare(model, target=target, **prepare_options)
    if backend is None:
        return prepared
    capturer = prepared.__dict__["_capturer"]

    def capture_and_compile(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CapturedCall:
        call: CapturedCall = capturer(model, args, kwargs)
        call.compiled = _compiled(call, backend)
        return call

    prepared.__dict__["_capturer"] = capture_and_compile
    for call in prepared.captures.values():
        call.compiled = _compiled(call, backend)
    return prepared


def _compiled(call: CapturedCall, backend: Inner) -> Any:
    # By way of Dynamo, not by calling the backend: its guards see a weight that is replaced, and dynamic sizes.
    dynamic = any(not isinstance(size, int) for value in call.placeholders for size in value.shape)
    return torch.compile(call.graph_module, backend=backend, dynamic=None if dynamic else False)
