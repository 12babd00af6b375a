"""Moving a captured graph to another device: capture bakes the example's into factories, casts and assertions."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from nxfx.graph import meta, walk
from nxfx.graph.builder import NodeBuilder


def devices_of(graph_module: fx.GraphModule) -> set[torch.device]:
    """Every device that the graph names in an argument."""
    found: set[torch.device] = set()

    def note(value: Any) -> Any:
        if isinstance(value, torch.device):
            found.add(value)
        return value

    for scope in walk.scopes(graph_module):
        for node in scope.graph_module.graph.nodes:
            fx.node.map_aggregate((node.args, node.kwargs), note)
    return found


def _moved(value: object, device: torch.device) -> object:
    if isinstance(value, (list, tuple)):  # topk, split ...
        return type(value)([_moved(v, device) for v in value])
    return meta.move(value, device) if isinstance(value, meta.FakeTensor) and value.device != device else value


def retarget(graph_module: fx.GraphModule, device: torch.device) -> bool:
    """Rewrite every device that the graph names to ``device``; says whether anything changed."""
    changed = False

    def swap(value: Any) -> Any:
        return device if isinstance(value, torch.device) else value

    for scope in walk.scopes(graph_module):
        touched = False
        for node in scope.graph_module.graph.nodes:
            if any(isinstance(v, torch.device) and v != device for v in (*node.args, *node.kwargs.values())):
                node.args, node.kwargs = fx.node.map_aggregate(node.args, swap), fx.node.map_aggregate(dict(node.kwargs), swap)
                touched = True
            if "val" in node.meta:
                node.meta["val"] = _moved(node.meta["val"], device)
        if touched:
            scope.graph_module.recompile()
            changed = True
    return changed


def follow_inputs(graph_module: fx.GraphModule) -> None:
    """Rewrite ``graph_module`` in place: it makes its tensors where its inputs are when it runs.

    For compilers that move a module and its inputs to a device of their own and run it there to trace it.
    """
    for body in graph_module.children():
        if isinstance(body, fx.GraphModule):  # of a higher-order op
            follow_inputs(body)
    graph = graph_module.graph
    device = _device_node(graph)

    def swap(value: Any) -> Any:
        return device if isinstance(value, torch.device) else value

    for node in graph.nodes:
        if any(isinstance(v, torch.device) for v in (*node.args, *node.kwargs.values())):
            node.args, node.kwargs = fx.node.map_aggregate(node.args, swap), fx.node.map_aggregate(dict(node.kwargs), swap)
    if device is not None and not device.users:
        graph.erase_node(device)
    graph_module.recompile()


def _device_node(graph: fx.Graph) -> fx.Node | None:
    """The device of the first input, else of the first weight."""
    sources = [*graph.find_nodes(op="placeholder"), *graph.find_nodes(op="get_attr")]
    tensors = [n for n in sources if isinstance(n.meta.get("val"), torch.Tensor)]
    if not tensors:
        return None
    build = NodeBuilder(graph, "handoff")
    with build.after(tensors[0]):
        return build.known(meta.val(tensors[0]).device, device_of, tensors[0])


def device_of(tensor: torch.Tensor) -> torch.device:
    """Where ``tensor`` is, asked when the graph runs."""
    return tensor.device
