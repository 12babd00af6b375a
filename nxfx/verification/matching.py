"""Which node of a candidate's graph computes what a node of the model's graph computes.

A pass keeps the names of the nodes it leaves alone and writes the name of the node it replaces into what it makes, so two
captures of one model are matched by name, op and user line. Graphs of two different modules are aligned: the longest run of
nodes with the same module path, op and shape. What stays unmatched lies between matched nodes, and is judged with them.
"""

from __future__ import annotations

import difflib
from typing import Any

import torch
from torch import fx

from nxfx.graph.meta import val

Matching = dict[fx.Node, fx.Node]


def match(original: fx.GraphModule, candidate: fx.GraphModule) -> Matching:
    """Original node → the candidate's node for the same value."""
    found: Matching = {}
    theirs = {n.name: n for n in candidate.graph.nodes}
    attributes = {str(n.target): n for n in candidate.graph.find_nodes(op="get_attr")}
    inputs = candidate.graph.find_nodes(op="placeholder")
    by_name = {str(n.target): n for n in inputs}
    for position, node in enumerate(original.graph.find_nodes(op="placeholder")):
        other = by_name.get(str(node.target)) or (inputs[position] if position < len(inputs) else None)
        if other is not None:
            found[node] = other
    for node in original.graph.find_nodes(op="get_attr"):
        if str(node.target) in attributes and isinstance(val(node), torch.Tensor):
            found[node] = attributes[str(node.target)]
    computed = [n for n in original.graph.nodes if n.op == "call_function"]
    named = {n: theirs[n.name] for n in computed if n.name in theirs and _same_node(n, theirs[n.name])}
    found |= _results(original, candidate, set(named) | set(found), set(named.values()) | set(found.values()))
    if 2 * len(named) >= len(computed):
        return found | named
    return found | _aligned(computed, [n for n in candidate.graph.nodes if n.op == "call_function"])


def _results(original: fx.GraphModule, candidate: fx.GraphModule, ours_known: set[fx.Node], theirs_known: set[fx.Node]) -> Matching:
    """The nodes that stand for the same result, where nothing else tells."""
    ours, theirs = _returned(original), _returned(candidate)
    pairs = zip(ours, theirs, strict=True) if len(ours) == len(theirs) else ()
    return {
        one: other
        for one, other in pairs
        if isinstance(one, fx.Node) and isinstance(other, fx.Node) and one not in ours_known and other not in theirs_known
    }


def _returned(graph_module: fx.GraphModule) -> list[Any]:
    (output,) = graph_module.graph.find_nodes(op="output")
    return list(output.args[0]) if isinstance(output.args[0], (list, tuple)) else [output.args[0]]


def _same_node(one: fx.Node, other: fx.Node) -> bool:
    return (
        one.op == other.op
        and one.target == other.target
        and one.meta.get("stack_trace") == other.meta.get("stack_trace")
        and _shape(one) == _shape(other)
    )


def _aligned(ours: list[fx.Node], theirs: list[fx.Node]) -> Matching:
    found: Matching = {}
    left, right = [_token(n) for n in ours], [_token(n) for n in theirs]
    # What is equal at both ends needs no search.
    start = 0
    while start < min(len(left), len(right)) and left[start] == right[start]:
        found[ours[start]] = theirs[start]
        start += 1
    end = 0
    while end < min(len(left), len(right)) - start and left[-1 - end] == right[-1 - end]:
        found[ours[-1 - end]] = theirs[-1 - end]
        end += 1
    inner_left, inner_right = left[start : len(left) - end], right[start : len(right) - end]
    for block in difflib.SequenceMatcher(None, inner_left, inner_right).get_matching_blocks():
        for offset in range(block.size):
            found[ours[start + block.a + offset]] = theirs[start + block.b + offset]
    return found


def _token(node: fx.Node) -> tuple[Any, ...]:
    stack = node.meta.get("nn_module_stack")
    path = str(next(reversed(stack.values()))[0]) if stack else ""
    return path, node.target, _shape(node)


def _shape(node: fx.Node) -> Any:
    value = val(node)
    if isinstance(value, torch.Tensor):
        return tuple(str(size) for size in value.shape)
    if isinstance(value, (list, tuple)):
        return tuple(tuple(str(size) for size in v.shape) if isinstance(v, torch.Tensor) else None for v in value)
    return type(value).__name__
