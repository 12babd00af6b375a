"""A second graph over the same tensors."""

from __future__ import annotations

import torch
from torch import fx

from nxfx.graph.attributes import share_registries


def copy_graph(graph_module: fx.GraphModule) -> fx.GraphModule:
    """A graph module with the same nodes (names, ``meta``) and the same tensor objects, whose graph can be edited on its own.

    The bodies of higher-order ops are copied too.
    """
    made = fx.GraphModule(torch.nn.Module(), fx.Graph())
    share_registries(made, graph_module)
    made.__dict__["_modules"] = dict(graph_module._modules)
    for name, child in graph_module.named_children():
        if isinstance(child, fx.GraphModule):
            made.__dict__["_modules"][name] = copy_graph(child)
    made.__dict__["training"] = graph_module.training
    graph = fx.Graph()
    output = graph.graph_copy(graph_module.graph, {}, return_output_node=True)
    assert isinstance(output, tuple)
    result, old = output
    graph.output(result).meta.update(old.meta)
    made.graph = graph
    return made
