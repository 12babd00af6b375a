"""Writes into what is made of constants: computed once, kept as one constant."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import fx

from nxfx.analysis import dtype_rules, ranges
from nxfx.analysis.constants import written_constants
from nxfx.analysis.integer_origin import IntegerOrigins
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
    found = written_constants(graph, context.sources, WRITERS)
    rounded = _rounded(found, graph_module, context)
    for node, value in found.items():
        if node in rounded:
            continue
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


def _rounded(found: Iterable[fx.Node], graph_module: fx.GraphModule, context: PassContext) -> set[fx.Node]:
    """What low precision rounds of integers on the way: lift-int-casts, which comes later, computes it unrounded."""
    low = {n for n in found if dtype_rules.is_low_precision(meta.dtype_of(n))}
    if not low:
        return set()
    origins = IntegerOrigins(graph_module, context.sources, lambda: ranges.analyse(graph_module, context.sources, context.requirements))
    return {n for n in low if (member := origins.of(n)) is not None and member.integer and member.rounded}


def _digest(value: torch.Tensor) -> bytes:
    # Not contiguous(): a tensor of one element or none is that already, whatever its strides.
    flat = value.clone(memory_format=torch.contiguous_format).view(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().data).digest()
