"""A cleaned graph in the small vocabulary of a lowering: composites decomposed, weights lifted to leading placeholders.

Unlike a pass this retraces the whole graph, once, as ``ExportedProgram.run_decompositions`` does. Each node keeps the user's line
and, in ``from_node``, the node of the cleaned graph that it comes from.

Private torch API used here: ``torch.fx.experimental.proxy_tensor.make_fx``, tested on torch 2.9 and 2.13.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from nxfx.errors import LoweringError
from nxfx.graph import meta
from nxfx.report.locations import locate

aten = torch.ops.aten
Table = Mapping[Any, Callable[..., Any]]


@dataclass(frozen=True)
class Flat:
    """A decomposed graph.

    Attributes:
        graph_module: functional ATen; its placeholders are the weights, then the inputs.
        weights: name → tensor, in the order of the leading placeholders.
        origins: node name of this graph → node of the cleaned graph.
    """

    graph_module: fx.GraphModule
    weights: dict[str, torch.Tensor]
    origins: dict[str, fx.Node]


class WithWeights(fx.Interpreter):
    """Runs a graph with other tensors in the place of its own, and other code in the place of some ops.

    Attributes:
        current: the node that runs.
    """

    def __init__(self, graph_module: fx.GraphModule, weights: Mapping[str, torch.Tensor], own: Mapping[Any, Any]) -> None:
        super().__init__(graph_module)
        self.extra_traceback = False
        self.weights, self.own = weights, own
        self.current: fx.Node | None = None

    def run_node(self, n: fx.Node) -> Any:
        self.current = n
        return super().run_node(n)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self.weights[target] if target in self.weights else super().get_attr(target, args, kwargs)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        own = self.own.get(target)
        if own is not None and (result := own(*args, **kwargs)) is not NotImplemented:
            return result
        return super().call_function(target, args, kwargs)


class _Decomposing(WithWeights):
    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        # The decomposition before it may leave other strides than the kernel that it stands for.
        return super().call_function(aten.reshape.default if target is aten.view.default else target, args, kwargs)


def weights_of(graph_module: fx.GraphModule) -> dict[str, torch.Tensor]:
    """Name → tensor of everything the graph reads from its module, bodies of higher-order ops aside."""
    names = dict.fromkeys(str(n.target) for n in graph_module.graph.find_nodes(op="get_attr"))
    found = {name: _attribute(graph_module, name) for name in names}
    return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}


def _attribute(root: Any, name: str) -> Any:
    for part in name.split("."):
        root = getattr(root, part)
    return root


def decompose(graph_module: fx.GraphModule, table: Table, composites: Table | None = None) -> Flat:
    """``graph_module`` in the ops that ``table`` leaves.

    Args:
        table: op → decomposition, for ops that reach the tracer.
        composites: the same for composite ops, which are taken apart before; ``NotImplemented`` leaves one to torch.

    Raises:
        LoweringError: a decomposition failed or writes its input; names the op and the user's line.
    """
    weights = weights_of(graph_module)
    values = {str(n.target): meta.val(n) for n in graph_module.graph.find_nodes(op="get_attr")}
    inputs = [meta.val(n) for n in graph_module.graph.find_nodes(op="placeholder")]
    mode = meta.fake_mode_of(graph_module.graph)

    def run(*leaves: Any) -> Any:
        runner = _Decomposing(graph_module, dict(zip(weights, leaves, strict=False)), composites or {})
        try:
            return runner.run(*leaves[len(weights) :])
        except Exception as error:
            raise _refusal(runner.current, error) from error

    # MATH: the fused attention kernels are a CPU's own. Under a graph's fake mode symbolic sizes stay what they are.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), fx.traceback.preserve_node_meta(), mode or meta.FakeTensorMode():
        traced = make_fx(run, decomposition_table=dict(table), _allow_non_fake_inputs=True)(*(values[n] for n in weights), *inputs)
    by_name = {n.name: n for n in graph_module.graph.nodes}
    origins = {}
    for node in traced.graph.nodes:
        sources = node.meta.get("from_node") or ()
        if sources and sources[-1].name in by_name:
            origins[node.name] = by_name[sources[-1].name]
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
            raise _refusal(origins.get(node.name, node), f"its decomposition writes in place ({node.target})")
    return Flat(traced, weights, origins)


def _refusal(node: fx.Node | None, error: Exception | str) -> LoweringError:
    assert node is not None
    location = locate(node)
    return LoweringError(f"{node.target} at {location} cannot be decomposed: {error}", op=str(node.target), location=location)
