"""``nxfx.compile``: nxfx's own capture and passes, then an inner compiler on the cleaned graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch._dynamo.exc import TorchDynamoException

from nxfx.api import prepare
from nxfx.capture.dynamo import Inner, inner_compiler
from nxfx.captured_call import CapturedCall
from nxfx.errors import CompilerError, NxfxError, UsageError
from nxfx.prepared import PreparedModule
from nxfx.report.failures import explain
from nxfx.targets import Target, get_target


def compile(
    model: torch.nn.Module,
    *,
    inner: str | Inner | None = None,
    inner_options: Mapping[str, Any] | None = None,
    target: str | Target = "trn2",
    **prepare_options: Any,
) -> PreparedModule:
    """``model`` captured and cleaned by nxfx and compiled by ``inner``; called like the model.

    Unlike ``torch.compile(model, backend="nxfx")``, where Dynamo captures, this has what nxfx's own capture can do:
    tensor bounds become masks, and the graph is one.

    Args:
        model: any ``nn.Module``.
        inner: the name of a ``torch.compile`` backend, or ``compiler(graph_module, example_inputs)``. Default:
            ``"neuron"`` where it is registered; else the cleaned graph runs as it is.
        inner_options: handed to the inner compiler as its ``options``.
        target: ``"inf2"``, ``"trn1"``, ``"trn2"`` or ``"trn3"``.
        prepare_options: everything else that :func:`nxfx.prepare` takes, ``sdk`` for one.

    Raises:
        NeuronNotFound: ``inner="neuron"`` without TorchNeuron; tells what to install.
        UsageError: no such inner compiler, or anything that :func:`nxfx.prepare` refuses.
    """
    target = get_target(target)
    name, backend = inner_compiler(inner, target, inner_options)
    if backend is None:
        return prepare(model, target=target, **prepare_options)
    if name == "neuron" and prepare_options.get("dynamic_shapes") is not None:
        raise UsageError("'neuron' compiles fixed shapes: leave dynamic_shapes out; each new shape is captured and compiled once")
    prepared = prepare(model, target=target, **prepare_options)
    capturer = prepared.__dict__["_capturer"]

    def capture_and_compile(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CapturedCall:
        call: CapturedCall = capturer(model, args, kwargs)
        call.compiled = _compiled(call, name, backend)
        return call

    prepared.__dict__["_capturer"] = capture_and_compile
    for call in prepared.captures.values():
        call.compiled = _compiled(call, name, backend)
    return prepared


def _compiled(call: CapturedCall, name: str, backend: Inner) -> Any:
    # By way of Dynamo, not by calling the backend: its guards see a weight that is replaced, and dynamic sizes.
    dynamic = any(not isinstance(size, int) for value in call.placeholders for size in value.shape)
    compiled = torch.compile(call.graph_module, backend=backend, dynamic=None if dynamic else False, fullgraph=True)

    def run(*values: Any) -> Any:
        try:
            return compiled(*values)
        except NxfxError:
            raise
        except TorchDynamoException as error:
            cause = getattr(error, "inner_exception", error)
            told = explain(error, call.graph_module, call.report.findings)
            raise CompilerError(f"the inner compiler {name!r} failed: {type(cause).__name__}: {cause}{told}") from error

    return run
