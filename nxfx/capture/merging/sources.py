"""Inputs, weights and outputs of several paths of a model, brought together in the graph of one of them."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import fx

from nxfx.analysis.provenance import Role
from nxfx.capture.path import Traced
from nxfx.graph import meta
from nxfx.graph.attributes import CONSTANTS, own_buffer
from nxfx.graph.builder import NodeBuilder

# ("output", position), ("buffer", name) or ("input", name): what a path leaves behind.
Left = tuple[str, Any]


class Sources:
    """What the graph of ``host`` reads and returns, for all paths.

    Attributes:
        all: node name → origin, as ``Traced.sources``.
    """

    def __init__(self, host: Traced) -> None:
        self.host = host
        self.root = host.graph_module
        self.all = dict(host.sources)
        self._inputs: dict[str, fx.Node] = {}
        self._weights: dict[str, fx.Node] = {}
        self._values: dict[Any, fx.Node] = {}
        self._same: dict[fx.Node, fx.Node] = {}
        self._owned: dict[int, dict[fx.Node, fx.Node]] = {}
        for node in self.root.graph.nodes:
            if node.op == "placeholder":
                self._inputs[self.all[node.name].name] = node
            elif node.op == "get_attr":
                self._weights[str(node.target)] = node
                self._same[node] = self._values.setdefault(_content(host, node), node)

    def of(self, path: Traced) -> dict[fx.Node, fx.Node]:
        """Each input and weight of ``path`` → the node that stands for it here."""
        found = {}
        for node in path.graph_module.graph.nodes:
            if node.graph is self.root.graph and node.op in ("placeholder", "get_attr"):
                # A constant that forward makes twice is the same number twice, as it is for the other paths.
                found[node] = self._same.get(node, node)
            elif node.op == "placeholder":
                found[node] = self._inputs[path.sources[node.name].name]
            elif node.op == "get_attr":
                found[node] = self._weight(path, node)
        return found

    def _weight(self, path: Traced, node: fx.Node) -> fx.Node:
        source = path.sources.get(node.name)
        if source is not None and source.role is not Role.CONSTANT:
            return self._weights[str(node.target)]
        content = _content(path, node)
        if content not in self._values:
            self._values[content] = self._add(path, node)
        return self._values[content]

    def _add(self, path: Traced, node: fx.Node) -> fx.Node:
        """A constant, or the body of a higher-order op, that only this path has."""
        value = _attribute(path.graph_module, str(node.target))
        name = f"{CONSTANTS}.branch_{len(self._values)}"
        first = next(n for n in self.root.graph.nodes if n.op != "placeholder")
        if not isinstance(value, torch.Tensor):
            return node  # no graph takes it; the operator that runs it is refused
        own_buffer(self.root, name, value)
        build = NodeBuilder(self.root.graph, "capture")
        with build.before(first, node):
            fake = build.mode.from_tensor(value, static_shapes=True) if build.mode is not None else value
            made = build.get_attr(name, fake)
        self.all[made.name] = dataclasses.replace(path.sources[node.name], name=name)
        return made

    def names(self, paths: list[Traced]) -> list[Left]:
        """Everything that one of ``paths`` leaves behind: outputs, then buffers, then inputs."""
        (output,) = self.root.graph.find_nodes(op="output")
        count = len(output.args[0]) - len(self.host.mutated_buffers) - len(self.host.mutated_inputs)
        buffers = dict.fromkeys(name for p in paths for name in p.mutated_buffers)
        inputs = dict.fromkeys(name for p in paths for name in p.mutated_inputs)
        return [*(("output", i) for i in range(count)), *(("buffer", n) for n in buffers), *(("input", n) for n in inputs)]

    def left(self, path: Traced, name: Left, values: dict[fx.Node, fx.Node]) -> Any:
        """What ``path`` leaves under ``name``; what it does not write stays what it was."""
        (output,) = path.graph_module.graph.find_nodes(op="output")
        kind, key = name
        written = {"output": {key: key}, "buffer": path.mutated_buffers, "input": path.mutated_inputs}[kind]
        if key in written:
            value = output.args[0][written[key]]
            return values[value] if isinstance(value, fx.Node) else value
        stands = self._weights[key] if kind == "buffer" else self._inputs[key]
        return values.get(self._own(path).get(stands, stands), stands)

    def _own(self, path: Traced) -> dict[fx.Node, fx.Node]:
        """Each node of this graph that stands for an input or weight → the one in ``path``'s."""
        if id(path) not in self._owned:
            self._owned[id(path)] = {stands: node for node, stands in self.of(path).items()}
        return self._owned[id(path)]

    def finish(self, left: dict[Left, Any]) -> None:
        """Make ``left`` what the graph returns."""
        (output,) = self.root.graph.find_nodes(op="output")
        output.args = (tuple(left.values()),)
        indices: dict[str, dict[str, int]] = {"buffer": self.host.mutated_buffers, "input": self.host.mutated_inputs, "output": {}}
        for index, (kind, name) in enumerate(left):
            indices[kind][name] = index
        written = {*indices["buffer"], *indices["input"]}
        self.all = {n: dataclasses.replace(s, mutated=s.mutated or s.name in written) for n, s in self.all.items()}


def _attribute(module: Any, target: str) -> Any:
    for step in target.split("."):
        module = getattr(module, step)
    return module


def _content(path: Traced, node: fx.Node) -> Any:
    """Equal for constants that are the same number by number, and for bodies that are the same program."""
    source = path.sources.get(node.name)
    value = _attribute(path.graph_module, str(node.target))
    if isinstance(value, fx.GraphModule):
        return ("body", value.code)
    if source is not None and source.role is Role.CONSTANT and isinstance(value, torch.Tensor) and not isinstance(value, meta.FakeTensor):
        plain = value.detach().cpu().contiguous()
        content = plain.view(torch.uint8) if plain.ndim and plain.numel() else plain
        return ("constant", value.dtype, tuple(value.shape), value.device, str(content.tolist()))
    return ("named", str(node.target))
