"""The merged graph against the traces that it was made from: under a trace's own answers it must compute what the trace computes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import fx

from nxfx.capture.merging.explore import Exploration, Fork
from nxfx.capture.merging.selects import Selects, is_random, static
from nxfx.capture.merging.sources import Left, Sources
from nxfx.capture.path import Traced

aten = torch.ops.aten


class Mismatch(Exception):
    """The merged graph is not what a trace says."""


def order(selects: Selects, asks: Callable[[fx.Node], bool] = lambda node: False) -> None:
    """Bring the nodes into an order in which operands come first, that of the first path where it has one; drop dead nodes.

    Args:
        asks: whether a node will ask when it runs: what its guard reads is alive as long as the node is.
    """
    graph = selects.graph
    placed: set[fx.Node] = {n for n in graph.nodes if n.op in ("placeholder", "get_attr")}
    (output,) = graph.find_nodes(op="output")
    for node in [n for n in graph.nodes if n.op == "call_function"]:
        stack = [node]
        while stack:
            current = stack[-1]
            waiting = [a for a in current.all_input_nodes if a not in placed]
            if waiting:
                stack += waiting
                continue
            stack.pop()
            if current not in placed:
                placed.add(current)
                output.prepend(current)
    alive = _alive(selects, asks)
    for node in reversed(graph.nodes):
        if node.op == "call_function" and node not in alive:
            graph.erase_node(node)


def _alive(selects: Selects, asks: Callable[[fx.Node], bool]) -> set[fx.Node]:
    placed = [n for n in selects.graph.nodes if n.op != "call_function" or n in selects.guards]  # for the others, one like them was
    pending = [n for n in placed if n.op == "output" or n.is_impure() or is_random(n)]
    alive = set(pending)
    while pending:
        node = pending.pop()
        guard = selects.guards.get(node, True)
        read = [selects.conditions[branch] for branch in selects.decisions.support(guard)] if guard is not True and asks(node) else []
        for needed in (*node.all_input_nodes, *read):
            if needed not in alive:
                alive.add(needed)
                pending.append(needed)
    return alive


class Proof:
    """Numbers for what nodes compute: the same number for the same function of inputs and weights.

    The traces are numbered at once, before one of their graphs becomes the merged one.
    """

    def __init__(self, sources: Sources, paths: list[Traced], names: list[Left]) -> None:
        self._numbers: dict[Any, int] = {}
        self._names = names
        self._read: dict[int, list[int]] = {}
        self._left: dict[int, list[Any]] = {}
        for path in paths:
            values = sources.of(path)
            own = {node: self._number(("source", stands)) for node, stands in values.items()}
            drawn: Counter[str] = Counter()
            for node in path.graph_module.graph.nodes:
                if node.op == "call_function":
                    own[node] = self._of(node, own, drawn)
            for stands in values.values():
                own.setdefault(stands, self._number(("source", stands)))
            self._read[id(path)] = [own[marks[0]] for marks in path.marks]
            same = {node: node for node in own}
            self._left[id(path)] = [self._leaf(sources.left(path, name, {**same, **values}), own) for name in names]

    def _number(self, key: Any) -> int:
        return self._numbers.setdefault(key, len(self._numbers))

    def _leaf(self, value: Any, own: dict[fx.Node, int]) -> Any:
        return ("node", own[value]) if isinstance(value, fx.Node) else value

    def _of(self, node: fx.Node, own: dict[fx.Node, int], drawn: Counter[str]) -> int:
        missing = [n for n in node.all_input_nodes if n not in own]
        if missing:
            raise Mismatch(f"{missing[0]} is not there yet for {node}")
        args = static(fx.node.map_arg((node.args, node.kwargs), lambda n: f"#{own[n]}"))
        ordinal = 0
        if is_random(node):
            drawn["random"] += 1
            ordinal = drawn["random"]
        return self._number((node.target, args, ordinal))

    def check(self, selects: Selects, exploration: Exploration) -> None:
        """Compare the merged graph with every trace, condition by condition, output by output.

        Raises:
            Mismatch: they differ: paths that were joined do not go on alike.
        """
        (output,) = selects.graph.find_nodes(op="output")
        for path in exploration.paths:
            if path.raised is not None:
                continue
            forks = _met(exploration, path)
            read = self._read[id(path)]
            answers = dict(zip(read, path.answers, strict=True))
            if any(answers[number] != answer for number, answer in zip(read, path.answers, strict=True)):
                continue  # two branches on the same value go two ways: no input takes this path
            merged = self._merged(selects, answers)
            for fork, number in zip(forks, read, strict=True):
                condition = selects.conditions[fork.number]
                if condition in merged and number != merged[condition]:
                    raise Mismatch(f"what is read at {fork.site.location}")
            for name, node, traced in zip(self._names, output.args[0], self._left[id(path)], strict=True):
                if self._leaf(node, merged) != traced:
                    raise Mismatch(f"{name[0]} {name[1]}")

    def _merged(self, selects: Selects, answers: dict[int, bool]) -> dict[fx.Node, int]:
        """The numbers of the merged graph for the inputs on which a branch that reads number ``n`` is answered ``answers[n]``.

        A choice whose condition these answers do not decide is a number of its own, that no trace has: which of the two it
        gives depends on what the input happens to hold.
        """
        own: dict[fx.Node, int] = {}
        truths: dict[fx.Node, bool | None] = {}
        drawn: Counter[str] = Counter()
        for node in selects.graph.nodes:
            if node.op in ("placeholder", "get_attr"):
                own[node] = self._number(("source", node))
            elif node in selects.chosen or node in selects.safe:
                condition, yes, no = node.args
                if truths[condition] is not None:
                    own[node] = own[yes if truths[condition] else no]
                else:
                    own[node] = own[yes] if own[yes] == own[no] else self._number(("undecided", own[condition], own[yes], own[no]))
            elif node.op == "call_function":
                own[node] = self._of(node, own, drawn)
            else:
                continue
            truths[node] = answers.get(own[node], _by_logic(node, truths))
        return own


def _by_logic(node: fx.Node, truths: dict[fx.Node, bool | None]) -> bool | None:
    """What a predicate gives where its operands give ``truths``, None where they do not say."""
    if node.target is aten.where.self:
        picked, yes, no = map(truths.__getitem__, cast("list[fx.Node]", node.args))
        return None if picked is None else yes if picked else no
    if node.target not in _DECIDES and node.target is not aten.logical_not.default:
        return None
    operands = [truths[operand] for operand in node.all_input_nodes]
    if node.target is aten.logical_not.default:
        return None if operands[0] is None else not operands[0]
    decides = _DECIDES[node.target]
    return decides if decides in operands else None if None in operands else not decides


# Operator → the operand that decides alone.
_DECIDES = {aten.logical_and.default: False, aten.logical_or.default: True}


def _met(exploration: Exploration, path: Traced) -> list[Fork]:
    """The fork at each site of ``path``, also behind the place where it met another path."""
    forks, way = [], exploration.start
    for answer in path.answers:
        if way.fork is None:
            raise Mismatch("a path goes on where another ends")
        forks.append(way.fork)
        way = way.fork.ways[answer]
    if way.fork is not None:
        raise Mismatch("a path ends where another goes on")
    return forks
