"""A graph in which several paths of a model become one: nodes made once, and ``where`` where paths differ."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from nxfx.analysis import value_ops
from nxfx.capture.merging.decisions import Decisions, Test
from nxfx.capture.merging.explore import Unmergeable
from nxfx.capture.session import Site
from nxfx.graph import meta
from nxfx.graph.builder import NodeBuilder

aten = torch.ops.aten


def static(value: Any) -> Any:
    """A part of a node's arguments as a key: equal where the same operation is meant, nodes by identity."""
    if isinstance(value, (list, tuple)):
        return tuple(static(v) for v in value)
    if isinstance(value, dict):
        return tuple((k, static(v)) for k, v in sorted(value.items()))
    if isinstance(value, slice):
        return ("slice", static((value.start, value.stop, value.step)))
    if isinstance(value, float):
        return ("float", struct.pack("d", value))  # the sign of zero counts, and nan is nan
    return value if isinstance(value, fx.Node) else (type(value).__name__, value)


def is_random(node: fx.Node) -> bool:
    """Whether running ``node`` moves a random generator on."""
    return node.op == "call_function" and value_ops.kind_of(node.target).startswith("random") and value_ops.depends(
        value_ops.kind_of(node.target), node.target, node.args, node.kwargs, meta.dtype_of
    )


def layout(node: fx.Node) -> Any:
    """Dtype, shape, strides and device of a tensor node, as something to compare; None for anything else."""
    value = meta.val(node)
    if not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
        return None
    return value.dtype, tuple(map(str, value.shape)), tuple(map(str, value.stride())), value.device


def described(node: Any) -> str:
    """``float32[2, 3]``."""
    value = meta.val(node) if isinstance(node, fx.Node) else node
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)


class Selects:
    """Makes the nodes of a graph for several paths.

    Attributes:
        conditions: what each branch reads, by its number.
        sites: the branches themselves.
        original: nodes that stand where they stood on the graph's own path.
        guards: for each node, when a path runs it.
        ranks: what a branch reads → its number, for what was chosen between such: the lowest of theirs.
        safe: each node that stands for another while a side runs that is not taken → that other.
        gates: operand and guard → the operand, without a gradient where the guard does not hold.
        chosen: each ``where`` that was made for a branch → what the branch reads, node if it is taken, node if not.
    """

    def __init__(self, graph: fx.Graph, decisions: Decisions) -> None:
        self.graph = graph
        self.decisions = decisions
        self.build = NodeBuilder(graph, "capture")
        self.conditions: dict[int, fx.Node] = {}
        self.sites: dict[int, Site] = {}
        self.guards: dict[fx.Node, Any] = {}
        self.chosen: dict[fx.Node, tuple[fx.Node, fx.Node, fx.Node]] = {}
        self.safe: dict[fx.Node, fx.Node] = {}
        self.ranks: dict[fx.Node, int] = {}
        self.gates: dict[tuple[fx.Node, int], fx.Node] = {}
        self._made: dict[Any, fx.Node] = {}
        self._predicates: dict[int, fx.Node] = {}
        self.original = set(graph.nodes)
        (self.output,) = graph.find_nodes(op="output")

    def key(self, node: fx.Node, args: Any, kwargs: Any, seen: Counter[Any]) -> Any:
        """What ``node`` computes from ``args``; a path that computes it twice has two nodes."""
        key: tuple[Any, ...] = (node.target, static(args), static(kwargs))
        if is_random(node):
            key = ("random", seen["random"], *key)  # the n-th draw is the n-th draw on each path
            seen["random"] += 1
        seen[key] += 1
        return (*key, seen[key])

    def place(self, node: fx.Node, value_of: Callable[[fx.Node], fx.Node], seen: Counter[Any], guard: Any) -> fx.Node:
        """The node of this graph that computes what ``node``, of this or another path's graph, computes."""
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), value_of)
        key = self.key(node, args, kwargs, seen)
        made = self._made.get(key)
        if made is None:
            made = self._made[key] = self._new(node, args, kwargs)
        self.guards[made] = self.decisions.either(self.guards.get(made, False), guard)
        return made

    def _new(self, node: fx.Node, args: Any, kwargs: Any) -> fx.Node:
        if node.graph is self.graph:
            moved = any(a is not b and layout(a) != layout(b) for a, b in zip(node.all_input_nodes, _nodes(args, kwargs), strict=True))
            node.args, node.kwargs = args, kwargs
            if moved:
                node.meta["val"] = meta.evaluate(self.build.mode, node.target, args, kwargs)
            return node
        if not isinstance(node.target, torch._ops.OpOverload) and node.target.__module__ != "_operator":
            raise Unmergeable(f"one side runs {value_ops.name_of(node.target)}, a higher-order op")
        if node.meta.get("unbacked_bindings"):
            raise Unmergeable(f"one side reads a number or a size from a tensor ({value_ops.name_of(node.target)})")
        return self.call(node.target, *args, origin=node, **kwargs)

    def call(self, op: Any, *args: Any, origin: fx.Node, **kwargs: Any) -> fx.Node:
        """A new node at the end of the graph; it is brought into order later."""
        with self.build.before(self.output, origin):
            return self.build.call(op, *args, **kwargs)

    def where(self, condition: fx.Node, yes: fx.Node, no: fx.Node) -> fx.Node:
        """``yes`` or ``no``, whichever ``condition`` says, bit by bit."""
        key = ("where", condition, yes, no)
        if key not in self._made or self._made[key]._erased:
            self._made[key] = self.call(aten.where.self, condition, yes, no, origin=yes if "stack_trace" in yes.meta else no)
        return self._made[key]

    def select(self, function: Any) -> fx.Node:
        """The node that has, for every input, the value which ``function`` says.

        Raises:
            Unmergeable: the values are not tensors of one dtype, shape and device.
        """
        if not isinstance(function, Test):
            assert isinstance(function, fx.Node)
            return function
        yes, no = self.select(function.yes), self.select(function.no)
        one, other = layout(yes), layout(no)
        if yes is not no and (one is None or other is None or (one[:2], one[3]) != (other[:2], other[3])):
            raise Unmergeable(f"its sides give {described(yes)} and {described(no)}", self.sites[function.branch])
        return self.choose(self.conditions[function.branch], yes, no)

    def choose(self, condition: fx.Node, yes: fx.Node, no: fx.Node) -> fx.Node:
        """``yes`` where the branch that reads ``condition`` is taken, else ``no``."""
        if yes is no:
            return yes
        made = self.where(condition, yes, no)
        self.chosen[made] = (condition, yes, no)
        return made

    def predicate(self, guard: Any, origin: fx.Node) -> fx.Node:
        """A 0-d bool node: whether ``guard`` (neither always nor never) holds."""
        if id(guard) not in self._predicates:
            self._predicates[id(guard)] = self._predicate(guard, origin)
        return self._predicates[id(guard)]

    def _predicate(self, guard: Test, origin: fx.Node) -> fx.Node:
        taken = self.conditions[guard.branch]
        if guard.yes is False or guard.no is True:
            inverted = self.call(aten.logical_not.default, taken, origin=origin)
            if guard.yes is False:
                return inverted if guard.no is True else self.call(
                    aten.logical_and.default, inverted, self.predicate(guard.no, origin), origin=origin
                )
            return self.call(aten.logical_or.default, inverted, self.predicate(guard.yes, origin), origin=origin)
        if guard.no is False:
            return taken if guard.yes is True else self.call(
                aten.logical_and.default, taken, self.predicate(guard.yes, origin), origin=origin
            )
        if guard.yes is True:
            return self.call(aten.logical_or.default, taken, self.predicate(guard.no, origin), origin=origin)
        return self.where(taken, self.predicate(guard.yes, origin), self.predicate(guard.no, origin))


def _nodes(args: Any, kwargs: Any) -> list[fx.Node]:
    found: dict[fx.Node, None] = {}
    fx.node.map_arg((args, kwargs), lambda n: found.setdefault(n))
    return list(found)
