"""Walking a graph together with the bodies of its higher-order ops (``cond``, ``while_loop``, ``scan``, ``map`` ...)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

# Higher-order ops whose bodies are ordinary functional graphs called with the node's own operands.
KNOWN_HIGHER_ORDER_OPS = frozenset(
    {"cond", "while_loop", "scan", "map_impl", "map", "associative_scan", "wrap_with_set_grad_enabled", "wrap_with_autocast",
     "invoke_subgraph", "tag_activation_checkpoint", "while_loop_stack_output"}
)


@dataclass(frozen=True)
class Scope:
    """One graph to be rewritten: the root, or a body that ``owner`` (a higher-order op node) runs."""

    graph_module: fx.GraphModule
    path: str = ""
    owner: fx.Node | None = None

    @property
    def is_body(self) -> bool:
        return self.owner is not None


def is_higher_order(node: fx.Node) -> bool:
    """Whether ``node`` calls a higher-order op."""
    return node.op == "call_function" and isinstance(node.target, torch._ops.HigherOrderOperator)


def bodies(gm: fx.GraphModule, node: fx.Node) -> Iterator[tuple[str, fx.GraphModule]]:
    """The ``(attribute name, GraphModule)`` bodies that the higher-order node runs."""
    for arg in node.all_input_nodes:
        if arg.op == "get_attr":
            body = getattr(gm, str(arg.target), None)
            if isinstance(body, fx.GraphModule):
                yield str(arg.target), body


def scopes(gm: fx.GraphModule, path: str = "", owner: fx.Node | None = None) -> Iterator[Scope]:
    """Bodies first, then ``gm`` itself; an unknown higher-order op's body is not entered (see :func:`unknown_bodies`)."""
    seen: set[fx.GraphModule] = set()
    for node in gm.graph.nodes:
        if is_higher_order(node) and node.target.name() in KNOWN_HIGHER_ORDER_OPS:
            for name, body in bodies(gm, node):
                if body not in seen:  # invoke_subgraph runs one body from many nodes
                    seen.add(body)
                    yield from scopes(body, f"{path}{name}.", node)
    yield Scope(gm, path, owner)


def unknown_bodies(gm: fx.GraphModule) -> Iterator[fx.Node]:
    """Higher-order nodes with a body that nxfx does not know how to rewrite: to be reported, never skipped silently."""
    for node in gm.graph.nodes:
        if is_higher_order(node) and node.target.name() not in KNOWN_HIGHER_ORDER_OPS and any(bodies(gm, node)):
            yield node


def reshape_views(gm: fx.GraphModule) -> None:
    """Let every ``view`` of ``gm`` and its bodies be a ``reshape``: the same values whatever strides its input has when it runs.

    torch's fakes are wrong on the strides of some results (size-1 and empty dims, ``native_batch_norm_backward``), other devices have
    kernels of their own, and a write that became a mask leaves other strides than the write. The caller recompiles.
    """
    for scope in scopes(gm):
        for node in scope.graph_module.graph.find_nodes(op="call_function", target=torch.ops.aten.view.default):
            node.target = torch.ops.aten.reshape.default
