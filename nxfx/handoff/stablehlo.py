"""The graph as StableHLO, by torch-mlir: what TorchNeuron lowers with. Needs the extra ``stablehlo``, no Neuron hardware."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import fx

from nxfx.graph import meta
from nxfx.graph.attributes import CONSTANTS
from nxfx.graph.builder import NodeBuilder
from nxfx.handoff import mlir
from nxfx.handoff.decompose import Flat, decompose
from nxfx.handoff.decompositions import COMPOSITES, complete
from nxfx.handoff.legalise import legalise
from nxfx.handoff.lowered import WATCHED, WIDE, Lowered, Trace, admitted, graph_of, traces_of
from nxfx.pipeline import PassContext, Pipeline
from nxfx.prepared import PreparedModule

aten = torch.ops.aten
Weights = Literal["arguments", "inline"]


def lower(model: PreparedModule | fx.GraphModule, *, weights: Weights = "arguments", as_is: bool = False) -> Lowered:
    """Lower a cleaned graph to StableHLO.

    The program is flat like the graph: weights and inputs in; out come the model's outputs, then the mutated buffers, then the
    mutated inputs. ``prepared.example_inputs`` fit: 64-bit inputs are narrowed before the graph, not in it.

    Args:
        model: what :func:`nxfx.prepare` gives, or its ``graph_module``.
        weights: ``"arguments"``: parameters and buffers are the first arguments, in the order of ``Lowered.arguments``.
            ``"inline"``: they are constants of the program. Constants that capture lifted always are.
        as_is: what torch-mlir alone makes of the graph: neither nxfx's decompositions nor its rewrites and folds for it.

    Raises:
        MissingDependencyError: torch-mlir or ml_dtypes is not installed.
        LoweringError: torch-mlir refuses; names the op and the user's line.
        UsageError, PrepareError: there is no graph to lower, or several.
    """
    graph_module = graph_of(model)
    table = mlir.decompositions()
    flat = decompose(graph_module, table) if as_is else decompose(graph_module, complete(table), COMPOSITES)
    kept = _inline(flat, everything=weights == "inline")
    inputs = [str(n.target) for n in graph_module.graph.find_nodes(op="placeholder")]
    placeholders = [n.name for n in flat.graph_module.graph.find_nodes(op="placeholder")][len(kept) :]
    if not as_is:
        sources = dict(zip(placeholders, admitted(model, inputs), strict=True))
        Pipeline.parse("narrow-64bit").run(flat.graph_module, PassContext(sources=sources))  # what the decompositions widened
        legalise(flat.graph_module, sources)
        _inherit_origins(flat)
    module = mlir.lower(flat.graph_module, flat.origins, [*kept, *inputs], fold_casts=not as_is)
    ops, types = _counts(module)
    bytecode = io.BytesIO()
    module.operation.write_bytecode(bytecode)
    text = module.operation.get_asm(enable_debug_info=True)
    traces = _traces(module, flat)
    return Lowered("stablehlo", text, (*kept, *inputs), tuple(kept.values()), ops, types, traces, bytecode.getvalue())


def _inherit_origins(flat: Flat) -> None:
    """Nodes made since the graph was decomposed come from where the node that they stand for comes from."""
    for node in flat.graph_module.graph.nodes:
        made_for = node.meta.get("nxfx", {}).get("origin")
        if node.name not in flat.origins and made_for in flat.origins:
            flat.origins[node.name] = flat.origins[made_for]


def _inline(flat: Flat, *, everything: bool) -> dict[str, Any]:
    """Turn placeholders of weights into attributes, which the importer writes as literals. The weights that stay."""
    kept = {}
    graph = flat.graph_module.graph
    build = NodeBuilder(graph, "stablehlo")
    for i, (node, (name, tensor)) in enumerate(zip(graph.find_nodes(op="placeholder"), flat.weights.items(), strict=False)):
        if not everything and not name.startswith(f"{CONSTANTS}."):
            kept[name] = tensor
            continue
        setattr(flat.graph_module, f"_weight_{i}", tensor.detach())
        with build.before(node):  # the importer takes a literal once, hence the clone
            node.replace_all_uses_with(build.call(aten.clone.default, build.get_attr(f"_weight_{i}", meta.val(node))))
        graph.erase_node(node)
    return kept


# -- what stands in it ----------------------------------------------------------------------------------------------------------


def _types(operation: Any) -> set[str]:
    """Which 64-bit types the tensors of an operation have."""
    texts = [str(v.type) for v in (*operation.operands, *operation.results)]
    return {wide for wide in WIDE if any(t.endswith((f"x{wide}>", f"<{wide}>")) for t in texts)}


def _counts(module: Any) -> tuple[Counter[str], Counter[str]]:
    ops: Counter[str] = Counter()
    types: Counter[str] = Counter()
    for operation in mlir.operations(module):
        if not operation.name.endswith(".return"):
            ops[operation.name.removeprefix("stablehlo.")] += 1
            types.update(_types(operation))
    return ops, types


def _traces(module: Any, flat: Flat) -> tuple[Trace, ...]:
    def counted() -> Iterator[tuple[fx.Node, list[str]]]:
        for operation in mlir.operations(module):
            origin = next((flat.origins[n] for n in mlir.node_names(operation) if n in flat.origins), None)
            if origin is not None and not operation.name.endswith(".return"):
                kind = operation.name.removeprefix("stablehlo.").replace("_", "-")
                yield origin, [*_types(operation), *((kind,) if kind in WATCHED else ())]

    return traces_of(counted())
