"""The graph on PyTorch/XLA: its HLO, and its results. What legacy torch-neuronx traces with; needs torch 2.9, no Neuron hardware.

torch-xla API used here and nowhere else: ``torch_xla.device``, ``torch_xla.sync`` and, of its private ``_XLAC``,
``_get_xla_tensors_hlo``, ``_get_tensors_xla_device_data_node``, ``_xla_get_tensor_id``, ``_set_allow_execution``, ``_set_ir_debug``
and ``profiler.scope_pusher``; run with 2.9.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import fx

from nxfx.errors import LoweringError, MissingDependencyError
from nxfx.handoff.decompose import WithWeights, weights_of
from nxfx.handoff.decompositions import TABLE
from nxfx.handoff.legalise import legalise
from nxfx.handoff.lowered import WATCHED, Lowered, admitted, example_of, graph_of, traces_of
from nxfx.prepared import PreparedModule
from nxfx.report.locations import locate

INSTALL = "pip install 'nxfx[xla]' (torch 2.9, the last with PyTorch/XLA)"

# An operation's metadata: the scope that it was traced in, which is the name of a node, and a line of torch's interpreter.
_METADATA = re.compile(r'op_name="(?:(\w+)\.\d+/)?([^"]*)"(?: source_file="[^"]*" source_line=\d+)?')
_OPERATION = re.compile(r"^\s*(?:ROOT )?%?\S+ = (?:\(.*?\)|\S+) ([a-z][a-z0-9-]*)\(", re.MULTILINE)
_WIDE = {"i64": re.compile(r"\b[su]64\["), "f64": re.compile(r"\b(?:f64|c128)\[")}


@functools.cache
def torch_xla() -> Any:
    """The package, on the CPU where no other device is named.

    Raises:
        MissingDependencyError: it is not installed, or fits another torch.
    """
    os.environ.setdefault("PJRT_DEVICE", "CPU")
    try:
        return importlib.import_module("torch_xla")
    except (ImportError, OSError) as error:  # OSError: built for another torch
        raise MissingDependencyError(f"lowering to HLO needs torch-xla: {INSTALL} ({error})") from error


def lower(model: PreparedModule | fx.GraphModule, example_inputs: Iterable[Any] | None = None, *, as_is: bool = False) -> Lowered:
    """Lower a cleaned graph to HLO text.

    torch-xla decides the order of the arguments; ``Lowered.arguments`` names them: weights, inputs, and the constants that it
    passes as arguments. The metadata of each operation name the node of the graph and the user's line.

    Args:
        model: what :func:`nxfx.prepare` gives, or its ``graph_module``.
        example_inputs: one tensor per placeholder; a prepared module knows its own.
        as_is: what torch-xla alone makes of the graph, without nxfx's rewrites for it.

    Raises:
        MissingDependencyError: torch-xla is not installed.
        LoweringError: torch-xla refuses, or runs something while it traces; names the op and the user's line.
        UsageError, PrepareError: there is no graph to lower, or several, or no example inputs.
    """
    xla = torch_xla()
    inputs = example_of(model, example_inputs)
    graph_module = graph_of(model) if as_is else _legal(model)
    with _named_nodes(xla):
        names, outputs = _trace(graph_module, inputs)
        tensors = [t for t in outputs if isinstance(t, torch.Tensor)]
        text = xla._XLAC._get_xla_tensors_hlo(tensors)
    ids, values = xla._XLAC._get_tensors_xla_device_data_node(tensors)
    arguments = tuple(names.get(i) or _constant(v) for i, v in zip(ids, values, strict=True))
    origins = _origins(graph_of(model), graph_module)
    ops: Counter[str] = Counter()
    types: Counter[str] = Counter()
    found = []
    for line in text.splitlines():
        operation = _OPERATION.match(line)
        if operation is None:
            continue
        wide, name = [w for w, pattern in _WIDE.items() if pattern.search(line)], operation[1]
        types.update(wide)
        ops.update([name] if name not in ("parameter", "tuple") else [])
        scope = _METADATA.search(line)
        if scope is not None and scope[1] in origins:
            found.append((origins[scope[1]], [*wide, *([name] if name in WATCHED else [])]))
    return Lowered("hlo", _with_lines(text, origins), arguments, (), ops, types, traces_of(found))


def _origins(original: fx.GraphModule, legal: fx.GraphModule) -> dict[str, fx.Node]:
    """Node name of the graph that is traced → node of the cleaned graph that it stands for."""
    known = {n.name: n for n in original.graph.nodes}
    made_for = {n.name: n.meta.get("nxfx", {}).get("origin", n.name) for n in legal.graph.nodes}
    return {name: known[name if name in known else origin] for name, origin in made_for.items() if name in known or origin in known}


def _with_lines(text: str, origins: dict[str, fx.Node]) -> str:
    """The program with the user's lines in the place of the interpreter's."""

    def metadata(found: re.Match[str]) -> str:
        node, op = found.groups()
        if node not in origins:
            return f'op_name="{op}"'
        location = locate(origins[node])
        line = f' source_file="{location.file}" source_line={location.line}' if location.file else ""
        return f'op_name="{node}/{op}"{line}'

    return _METADATA.sub(metadata, text)


def run(model: PreparedModule | fx.GraphModule, inputs: Sequence[torch.Tensor] | None = None) -> list[Any]:
    """What the cleaned graph gives on the XLA device: its flat outputs, on the host.

    Args:
        inputs: as the graph takes them, after the boundary; default: the prepared module's example.

    Raises:
        As :func:`lower`.
    """
    xla = torch_xla()
    _, outputs = _trace(_legal(model), example_of(model, inputs))
    xla.sync()
    return [t.cpu() if isinstance(t, torch.Tensor) else t for t in outputs]


def _legal(model: PreparedModule | fx.GraphModule) -> fx.GraphModule:
    """A copy of the graph as torch-xla wants it; the tensors are the same."""
    original, graph = graph_of(model), fx.Graph()
    graph.output(graph.graph_copy(original.graph, {}))
    legal = fx.GraphModule(original, graph)
    inputs = [n.name for n in graph.find_nodes(op="placeholder")]
    legalise(legal, dict(zip(inputs, admitted(model, inputs), strict=True)))
    return legal


def _constant(value: torch.Tensor) -> str:
    return f"constant {value.item()}" if value.numel() == 1 else f"constant {str(value.dtype).removeprefix('torch.')}{list(value.shape)}"


def _trace(graph_module: fx.GraphModule, inputs: tuple[Any, ...]) -> tuple[dict[int, str], list[Any]]:
    """Names by tensor id, and the graph's pending outputs; nothing has run.

    Raises:
        LoweringError: an op failed, or torch-xla ran what it had in order to go on.
    """
    xla = torch_xla()
    device = xla.device()
    weights = {name: tensor.detach().to(device) for name, tensor in weights_of(graph_module).items()}
    held = [t.to(device) if isinstance(t, torch.Tensor) else t for t in inputs]
    placeholders = [str(n.target) for n in graph_module.graph.find_nodes(op="placeholder")]
    runner = _OnDevice(graph_module, weights, device)
    with torch.no_grad(), _no_execution(xla):
        try:
            outputs = runner.run(*held)
        except Exception as error:
            raise _refusal(runner.current, error) from error
    named = [*weights.items(), *((n, t) for n, t in zip(placeholders, held, strict=True) if isinstance(t, torch.Tensor))]
    return {xla._XLAC._xla_get_tensor_id(t): name for name, t in named}, list(outputs)


def _refusal(node: fx.Node | None, error: Exception) -> LoweringError:
    if node is None:
        return LoweringError(f"torch-xla refuses the inputs: {error}")
    location = locate(node)
    source = f": {location.source}" if location.source else ""
    if "Unexpected execution" in str(error):
        why = "torch-xla has no lowering for it, or wants a value: it runs what it has so far and freezes the result"
    else:
        why = f"it says: {' '.join(str(error).split())[:300]}"
    return LoweringError(f"torch-xla cannot lower {node.target} at {location}{source}; {why}", op=str(node.target), location=location)


@contextlib.contextmanager
def _setting(xla: Any, name: str, value: bool) -> Iterator[None]:
    """One of torch-xla's switches, put back afterwards."""
    before = getattr(xla._XLAC, f"_get_{name}")()
    getattr(xla._XLAC, f"_set_{name}")(value)
    try:
        yield
    finally:
        getattr(xla._XLAC, f"_set_{name}")(before)


def _no_execution(xla: Any) -> contextlib.AbstractContextManager[None]:
    """Any execution while tracing is an error: its result would be baked in."""
    xla.sync()
    return _setting(xla, "allow_execution", False)


def _named_nodes(xla: Any) -> contextlib.AbstractContextManager[None]:
    """Operations say in which scope they were traced."""
    return _setting(xla, "ir_debug", True)


class _OnDevice(WithWeights):
    """Runs a graph on another device than the one it names, with copies of its tensors there."""

    def __init__(self, graph_module: fx.GraphModule, weights: dict[str, torch.Tensor], device: torch.device) -> None:
        super().__init__(graph_module, weights, _OWN)
        self.device = device

    def run_node(self, n: fx.Node) -> Any:
        scope = torch_xla()._XLAC.profiler.scope_pusher(n.name)
        try:
            return super().run_node(n)
        finally:
            del scope

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = (fx.node.map_aggregate(v, self._moved) for v in (args, kwargs))
        return super().call_function(target, args, kwargs)

    def _moved(self, value: Any) -> Any:
        return self.device if isinstance(value, torch.device) else value


_OWN: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.view.default: torch.ops.aten.reshape.default,  # XLA has no strides: what a CPU kernel leaves may not be what comes there
    **{op: TABLE[op] for op in (torch.ops.aten.argmax.default, torch.ops.aten.argmin.default)},  # torch-xla's pass over nan
}
