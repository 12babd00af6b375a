"""Running two graphs in step, node by node, each value kept only while something still needs it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import fx

from nxfx.verification.precision import Precision, as_captured, draws, relaxed

MISSING = object()
Around = Callable[[], AbstractContextManager[Any]]


def attribute(graph_module: fx.GraphModule, node: fx.Node) -> Any:
    """What a ``get_attr`` node refers to."""
    value: Any = graph_module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value


def is_random(node: fx.Node) -> bool:
    """Whether the node draws random numbers."""
    return draws(node.target, node.args, node.kwargs)


def evaluate(node: fx.Node, value_of: Callable[[fx.Node], Any], precision: Precision | None) -> Any:
    """The op of ``node`` on the values of its inputs: in the precision of its graph, or in a higher one."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), value_of)
    if precision is not None:
        return precision.call(node.target, tuple(args), dict(kwargs), node)
    args, kwargs = as_captured(node, tuple(args), dict(kwargs))
    return relaxed(node.target)(*args, **kwargs)


class Values:
    """Values of nodes, dropped after their last use."""

    def __init__(self, graph: fx.Graph) -> None:
        self._of: dict[fx.Node, Any] = {}
        self._last: dict[fx.Node, list[fx.Node]] = {}
        seen: set[fx.Node] = set()
        for node in reversed(graph.nodes):
            for used in (*node.all_input_nodes, node):
                if used not in seen:
                    seen.add(used)
                    self._last.setdefault(node, []).append(used)

    def __getitem__(self, node: fx.Node) -> Any:
        return self._of[node]

    def __setitem__(self, node: fx.Node, value: Any) -> None:
        self._of[node] = value

    def drop_after(self, node: fx.Node) -> list[fx.Node]:
        """Forget what nothing after ``node`` uses; the nodes that were forgotten."""
        dead = self._last.get(node, [])
        for used in dead:
            self._of.pop(used, None)
        return dead


class Stepper:
    """Runs a graph as far as it is asked to.

    Args:
        pinned: nodes whose values are kept until :meth:`release`.
        around: a context that every op runs in: an emulation.
    """

    def __init__(
        self, graph_module: fx.GraphModule, inputs: Sequence[Any], pinned: Iterable[fx.Node], around: Around = nullcontext
    ) -> None:
        self.graph_module, self.around = graph_module, around
        self.pinned = set(pinned)
        self._inputs = iter(inputs)
        self._values = Values(graph_module.graph)
        self._kept: dict[fx.Node, Any] = {}
        self._nodes = iter(graph_module.graph.nodes)
        self._done: set[fx.Node] = set()

    def value(self, node: fx.Node) -> Any:
        """The value of a pinned node; runs the graph up to it."""
        while node not in self._done:
            self._step(next(self._nodes))
        return self._kept[node]

    def release(self, node: fx.Node) -> None:
        self._kept.pop(node, None)

    def _step(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            value = next(self._inputs)
        elif node.op == "get_attr":
            value = attribute(self.graph_module, node)
        elif node.op == "output":
            value = None
        else:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._values.__getitem__)
            with self.around():
                value = node.target(*args, **kwargs)  # type: ignore[operator]
        self._values[node] = value
        self._done.add(node)
        if node in self.pinned:
            self._kept[node] = value
        self._values.drop_after(node)
