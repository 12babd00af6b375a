"""Double of TorchNeuron: the Dynamo backend ``neuron``, with its documented refusals; it runs the graph op by op on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._dynamo.backends.common import aot_autograd

__version__ = "2.13.3.double"
graphs: list[fx.GraphModule] = []
options_seen: list[dict[str, Any]] = []
# Ops that a test wants refused, as a compile failure is since SDK 2.33.
refused: set[Any] = set()


class NeuronCompilationError(RuntimeError):
    pass


def neuron(gm: fx.GraphModule, example_inputs: Any, *, options: Any = None, mode: Any = None) -> Callable[..., Any]:
    if mode not in (None, "default"):
        raise ValueError("only mode 'default' is supported")
    if any(isinstance(x, torch.SymInt) or any(isinstance(n, torch.SymInt) for n in getattr(x, "shape", ())) for x in example_inputs):
        raise ValueError("dynamic=True is not supported")
    options_seen.append(dict(options or {}))

    def lower(functional: fx.GraphModule, inputs: Any) -> Any:
        graphs.append(functional)
        for node in functional.graph.nodes:
            if node.target in refused:
                raise NeuronCompilationError(f"[NCC_EVRF001] unsupported op at %{node.name}")
        functional.graph.lint()
        return _boxed(functional)

    compiled: Callable[..., Any] = aot_autograd(fw_compiler=lower, inference_compiler=lower)(gm, example_inputs)
    return compiled


def _boxed(functional: fx.GraphModule) -> Any:
    def run(args: list[Any]) -> Any:
        values = list(args)
        args.clear()
        return functional(*values)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def register() -> None:
    """What importing the package does."""
    if "neuron" not in torch._dynamo.list_backends(None):
        torch._dynamo.register_backend(neuron, name="neuron")
