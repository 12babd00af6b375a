"""What a lowering gives: the program as text, and what stands in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import fx

from nxfx.analysis.dtype_rules import is_wide
from nxfx.analysis.provenance import Role, Source
from nxfx.captured_call import CapturedCall
from nxfx.errors import PrepareError, UsageError
from nxfx.graph import meta
from nxfx.prepared import PreparedModule
from nxfx.report.locations import Location, locate

# What a reader of a lowered program looks for first: what Neuron refuses, slows down on, or gets wrong. HLO spellings.
WATCHED = ("scatter", "dynamic-update-slice", "gather", "sort", "custom-call", "while")
WIDE = ("i64", "f64")


@dataclass(frozen=True)
class Trace:
    """Watched or 64-bit operations that one line of the model leaves in the lowered program.

    Attributes:
        what: ``"scatter"`` ..., ``"i64"`` or ``"f64"``.
        count: how many operations.
        op: the node of the cleaned graph that they come from, e.g. ``"aten.index_put.default"``.
        demanded: whether that node itself is what is counted (a 64-bit value, a scatter); otherwise the lowering added it.
        location: the user's line.
    """

    what: str
    count: int
    op: str
    demanded: bool
    location: Location

    def __str__(self) -> str:
        by = "the graph" if self.demanded else "the lowering"
        source = f": {self.location.source}" if self.location.source else ""
        return f"{self.count} {self.what} by {by}: {self.op} at {self.location}{source}"


@dataclass(frozen=True)
class Lowered:
    """A lowered program.

    Attributes:
        dialect: ``"stablehlo"`` or ``"hlo"``.
        text: the program. Its arguments come in the order of ``arguments``.
        arguments: names of the weights first (none when they are inlined), then those of the inputs.
        weights: the tensors to pass for the leading arguments.
        ops: operation → count, in the dialect's own words.
        types: ``"i64"`` / ``"f64"`` → operations with a tensor of that type as operand or result.
        traces: where watched and 64-bit operations come from; empty where the lowering does not say.
        bytecode: the same program as MLIR bytecode, ``b""`` where there is none.
    """

    dialect: str
    text: str
    arguments: tuple[str, ...]
    weights: tuple[Any, ...] = field(repr=False)
    ops: Counter[str]
    types: Counter[str]
    traces: tuple[Trace, ...] = ()
    bytecode: bytes = field(default=b"", repr=False)

    def watched(self) -> dict[str, int]:
        """Counts of the watched operations and of 64-bit ones, zeros included."""
        return {name: self.ops[name.replace("-", "_") if self.dialect == "stablehlo" else name] for name in WATCHED} | {
            name: self.types[name] for name in WIDE
        }

    def write(self, path: str | Path) -> None:
        """Write the program: MLIR bytecode to a file that ends in ``.mlirbc``, text to any other.

        Raises:
            UsageError: there is no bytecode.
        """
        path = Path(path)
        if path.suffix != ".mlirbc":
            path.write_text(self.text, encoding="utf-8")
        elif self.bytecode:
            path.write_bytes(self.bytecode)
        else:
            raise UsageError(f"{self.dialect} has no bytecode: write {str(path.with_suffix('.txt'))!r} instead")

    def summary(self) -> str:
        """How many operations, the watched and 64-bit ones among them, and the lines that these come from."""
        lines = [f"{sum(self.ops.values())} {self.dialect} operations, {len(self.arguments)} arguments"]
        lines += [f"  {count:5} {name}{' operations' if name in WIDE else ''}" for name, count in self.watched().items()]
        if self.traces:
            lines += ["left by", *(f"  {trace}" for trace in self.traces)]
        return "\n".join(lines)


def graph_of(model: PreparedModule | fx.GraphModule) -> fx.GraphModule:
    """The graph to lower.

    Raises:
        PrepareError: the prepared module has no capture, or several.
        UsageError: a graph without values on its nodes, or something that is no graph.
    """
    graph_module = model.graph_module if isinstance(model, PreparedModule) else model
    if not isinstance(graph_module, fx.GraphModule):
        raise UsageError(f"only a prepared module or its graph can be lowered, not a {type(model).__name__}: call nxfx.prepare first")
    if any(n.users and meta.val(n) is None for n in graph_module.graph.nodes if n.op in ("placeholder", "call_function")):
        raise UsageError("a node of the graph has no value (meta['val']): lower what nxfx.prepare gives")
    return graph_module


def admitted(model: PreparedModule | CapturedCall | fx.GraphModule, inputs: Sequence[str]) -> list[Source]:
    """What the boundary lets into each of the graph's ``inputs``; of a bare graph only the dtypes are known."""
    if isinstance(model, fx.GraphModule):
        return [Source(name, Role.OPAQUE) for name in inputs]
    (call,) = (model,) if isinstance(model, CapturedCall) else model.captures.values()
    known = [(rule.low, rule.high) for rule in call.boundary.inputs]
    return [
        Source(name, Role.OPAQUE) if low is None or high is None else Source(name, Role.INPUT, range=(low, high))
        for name, (low, high) in zip(inputs, known, strict=True)
    ]


def example_of(model: PreparedModule | fx.GraphModule, example_inputs: Iterable[Any] | None) -> tuple[Any, ...]:
    """The inputs to lower for.

    Raises:
        PrepareError: neither given nor known.
    """
    if example_inputs is not None:
        return tuple(example_inputs)
    if isinstance(model, PreparedModule):
        return model.example_inputs
    raise PrepareError("a graph does not know its example inputs: pass them")


def traces_of(operations: Iterable[tuple[fx.Node, Iterable[str]]]) -> tuple[Trace, ...]:
    """Watched and 64-bit operations, by the line that they come from.

    Args:
        operations: node of the cleaned graph that an operation comes from, with the names that it is counted under.
    """
    found: Counter[tuple[str, str, bool, Location]] = Counter()
    for node, names in operations:
        location = replace(locate(node), module="")  # the same line of every layer
        found.update((name, str(node.target), _demands(node, name), location) for name in names)
    traces = [Trace(what, count, op, demanded, location) for (what, op, demanded, location), count in found.items()]
    return tuple(sorted(traces, key=lambda t: ((*WATCHED, *WIDE).index(t.what), not t.demanded, -t.count, t.op)))


def _demands(node: fx.Node, what: str) -> bool:
    """Whether the graph itself asks for it at ``node``: a value of that type, an op that is one."""
    if what not in WIDE:
        name = str(node.target).split(".")[1] if isinstance(node.target, torch._ops.OpOverload) else str(node.target)
        return name in _DEMANDS.get(what, ()) or what.replace("-", "_") in name
    values = [meta.val(n) for n in (node, *node.all_input_nodes)]
    leaves = [leaf for v in values for leaf in (v if isinstance(v, (list, tuple)) else (v,))]
    floating = what == "f64"
    return any(isinstance(v, torch.Tensor) and is_wide(v.dtype) and v.dtype.is_floating_point == floating for v in leaves)


# Ops that are by their meaning what the watched operation is.
_DEMANDS = {
    "gather": {"embedding", "index", "index_select", "_unsafe_index", "take", "take_along_dim"},
    "scatter": {"index_put", "_unsafe_index_put", "index_add", "index_copy", "masked_scatter", "put"},
    "sort": {"topk", "argsort", "msort"},
}
