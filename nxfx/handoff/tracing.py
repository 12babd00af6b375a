"""A cleaned graph for a compiler that runs it on a device of its own in order to trace it, as the legacy Neuron stack does."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from nxfx import device as devices
from nxfx.capture.unlift import STATE
from nxfx.captured_call import CapturedCall
from nxfx.errors import PrepareError
from nxfx.graph.attributes import own_buffer
from nxfx.handoff.legalise import legalise
from nxfx.handoff.lowered import admitted


def traceable(call: CapturedCall, root: torch.nn.Module | None = None) -> fx.GraphModule:
    """A copy of the capture's graph, legal for torch-xla, that makes its tensors where its inputs are.

    Args:
        root: an earlier result for the same model, whose tensors are used again under their names: then one ``.to(device)``
            moves them for both. State is shared between the two; a constant of another value gets another name.

    The copy has the very same parameter and buffer objects under the model's names, in registries of its own: moving it does not
    move the model.

    Raises:
        PrepareError: state of ``root`` has another shape or dtype here.
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(call.graph_module.graph, {}))
    holder = same_tensors(call.graph_module) if root is None else root
    if root is not None:
        _adopt(graph, call, root)
    result = fx.GraphModule(torch.nn.Module(), fx.Graph())
    for registry in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
        result.__dict__[registry] = holder.__dict__[registry]
    result.__dict__["training"] = call.graph_module.training
    result.graph = graph
    inputs = [n.name for n in graph.find_nodes(op="placeholder")]
    legalise(result, dict(zip(inputs, admitted(call, inputs), strict=True)))
    devices.follow_inputs(result)
    return result


def same_tensors(module: torch.nn.Module, seen: dict[int, torch.nn.Module] | None = None) -> torch.nn.Module:
    """Bare modules with the same tensor objects under the same names, in registries of their own; bodies of graphs are copied."""
    seen = {} if seen is None else seen
    if id(module) in seen:
        return seen[id(module)]
    bare = seen[id(module)] = torch.nn.Module()
    bare.__dict__["_parameters"], bare.__dict__["_buffers"] = dict(module._parameters), dict(module._buffers)
    bare.__dict__["_non_persistent_buffers_set"] = set(module._non_persistent_buffers_set)
    bare.__dict__["training"] = module.training
    for name, child in module._modules.items():
        bare._modules[name] = _body(child) if isinstance(child, fx.GraphModule) else child and same_tensors(child, seen)
    return bare


def _body(body: fx.GraphModule) -> fx.GraphModule:
    graph = fx.Graph()
    graph.output(graph.graph_copy(body.graph, {}))
    root = same_tensors(body)
    return fx.GraphModule(root, graph)


def _adopt(graph: fx.Graph, call: CapturedCall, root: torch.nn.Module) -> None:
    """Let ``root`` hold what the graph reads: under the same name where it is the same, or state; else under a new one."""
    written = set(call.mutated_buffers)
    for node in graph.find_nodes(op="get_attr"):
        name, value = str(node.target), _attribute(call.graph_module, str(node.target))
        held = _attribute(root, name)
        if held is value:
            continue
        if isinstance(value, torch.Tensor) and isinstance(held, torch.Tensor):
            alike = held.dtype == value.dtype and held.shape == value.shape
            state = name in written or name.startswith(f"{STATE}.")
            if state and not alike:
                raise PrepareError(f"state {name!r} is {list(held.shape)} in one bucket and {list(value.shape)} in another", call.report)
            if state or (alike and torch.equal(held, value)):
                continue
        node.target = _free_name(root, name)
        if isinstance(value, torch.Tensor):
            own_buffer(root, node.target, value)
        else:
            root._modules[node.target] = _body(value)


def _attribute(root: Any, name: str) -> Any:
    for step in name.split("."):
        root = getattr(root, step, None)
    return root


def _free_name(root: torch.nn.Module, name: str) -> str:
    if _attribute(root, name) is None:
        return name
    number = 1
    while _attribute(root, f"{name}_{number}") is not None:
        number += 1
    return f"{name}_{number}"
