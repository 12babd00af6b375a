"""Writes into what is made of constants: computed once, kept as one constant."""

from __future__ import annotations

import hashlib

import torch
from torch import fx

from nxfx.analysis.constants import written_constants
from nxfx.analysis.provenance import Role, Source
from nxfx.analysis.write_plan import WRITERS
from nxfx.graph import meta, storage
from nxfx.graph.attributes import new_constant
from nxfx.graph.builder import NodeBuilder
from nxfx.masking.base import erase_unused, op_name
from nxfx.pipeline import Pass, PassContext
from nxfx.report.rewrites import Kind, Rewrite

aten = torch.ops.aten


def fold_constants(step: Pass, graph_module: fx.GraphModule, context: PassContext) -> list[Rewrite]:
    """Compute them; equal results are one constant, which the graph module owns (Swin's window masks)."""
    graph = graph_module.graph
    build, known, rewrites = NodeBuilder(graph, step.name), {}, []
    for node, value in written_constants(graph, context.sources, WRITERS).items():
        fake = meta.val(node)
        key = (value.dtype, value.shape, value.stride(), fake.device, _digest(value))
        if key not in known:
            name = new_constant(graph_module, value.to(fake.device))
            with build.before(next(iter(graph.nodes)), node):
                known[key] = build.get_attr(name, fake)
            context.sources[known[key].name] = Source(name, Role.CONSTANT, value)
        rewrites.append(step.rewrite(node, "mask.constant", Kind.EXACT, op_name(node), f"a constant of {value.numel()} elements"))
        made = known[key]
        if storage.escapes(node):
            with build.before(node):
                made = build.call(aten.clone.default, made)
        node.replace_all_uses_with(made)
        erase_unused(graph, [node])
    return rewrites


def _digest(value: torch.Tensor) -> bytes:
    # Not contiguous(): a tensor of one element or none is that already, whatever its strides.
    flat = value.clone(memory_format=torch.contiguous_format).view(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().data).digest()
