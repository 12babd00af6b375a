"""State of a model that a compiled graph keeps on the device: which arguments became it, and which output updates it."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from typing import Any

import torch

from nxfx.capture.shell import bind
from nxfx.capture.structure import flatten
from nxfx.captured_call import CapturedCall
from nxfx.errors import PrepareError, UsageError
from nxfx.graph import meta, walk
from nxfx.graph.attributes import own_buffer, share_registries
from nxfx.graph.builder import NodeBuilder
from nxfx.report import Finding, Severity
from nxfx.report.locations import locate

Aliases = dict[torch.Tensor, int]
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def refuse_python_state(call: CapturedCall) -> None:
    """A compiled graph computes the same on every call: Python state that ``forward`` changes has no place in it.

    Raises:
        PrepareError: names the attribute and the line that writes it.
    """
    after = call.convention.arguments_after
    if call.convention.state_writes:
        written = [f for f in call.report.findings if f.code == "NX406"]
        where = f"\n  {written[0].location}: {written[0].location.source}\n  Write instead: {written[0].fix}" if written else ""
        path = call.convention.state_writes[0].path
        raise PrepareError(f"forward changes the Python attribute {path!r}, which a compiled graph cannot{where}", call.report)
    if call.state_inputs and any(call.convention.counted_arguments()):  # calls leave the argument out: nobody would see it differ
        told = next(f for f in call.report.findings if f.code == "NX406")
        where = f"\n  {told.location}: {told.location.source}\n  Write instead: {told.fix}"
        raise PrepareError(f"an argument that becomes state counts in Python: {told.message}{where}", call.report)
    if after is not None and any(kind == "state" for kind, _ in after.leaves):
        message = "forward leaves a buffer of the model in one of its arguments: a compiled graph keeps it on the device"
        raise PrepareError(message, call.report)


def refuse_dynamic_shapes(call: CapturedCall) -> None:
    """
    Raises:
        PrepareError: an input has a dimension of no fixed size.
    """
    for rule, value in zip(call.boundary.inputs, call.placeholders, strict=True):
        for dim, size in enumerate(value.shape):
            if not isinstance(size, int):
                raise PrepareError(
                    f"input {rule.name!r} has a dynamic dimension {dim}: Neuron compiles fixed shapes. "
                    "Leave dynamic_shapes out and give a list of example inputs, one for each bucket.",
                    call.report,
                )


_CONTROL_FLOW = frozenset({"cond", "while_loop", "while_loop_stack_output"})


def refuse_control_flow(call: CapturedCall) -> None:
    """A tracing compiler *runs* the graph: ``torch.cond`` would ask for the predicate's value and keep one branch for ever.

    Raises:
        PrepareError: names the user's line.
    """
    for scope in walk.scopes(call.graph_module):
        for node in scope.graph_module.graph.nodes:
            if walk.is_higher_order(node) and node.target.name() in _CONTROL_FLOW:
                location = locate(node)
                raise PrepareError(
                    f"{node.target.name()} depends on a tensor's value, which a tracing compiler would freeze\n"
                    f"  {location}: {location.source}\n  Write instead: torch.where on the results of both sides, or use TorchNeuron",
                    call.report,
                )


class StateArguments:
    """The parameters of ``forward`` whose tensors live in the compiled graph: calls leave them out.

    Raises:
        UsageError: ``state_inputs`` names only a part of an argument, or one that a call cannot leave out.
    """

    def __init__(self, model: torch.nn.Module, call: CapturedCall, arguments: Arguments) -> None:
        args, kwargs, positional = bind(model, *arguments)
        self.model = model
        flat = flatten((args, kwargs))
        leaves: dict[str, list[str]] = {}
        for name, (where, key, *_) in zip(call.convention.input_names, flat.paths, strict=True):
            parameter = positional[key] if where == 0 and key < len(positional) else str(key)
            leaves.setdefault(parameter, []).append(name)
        self.values: dict[str, Any] = {}
        given = {**dict(zip(positional, args, strict=True)), **kwargs}
        for parameter, names in leaves.items():
            state = [n for n in names if n in call.state_inputs]
            if state and len(state) < len(names):
                passed = ", ".join(n for n in names if n not in state)
                parts = f"state in part ({', '.join(state)}) and passed in part ({passed})"
                raise UsageError(f"state_inputs: {parameter!r} is {parts}: name all of it")
            if state:
                self.values[parameter] = given[parameter]
        self._signature = self._without_state() if self.values else None

    def _without_state(self) -> inspect.Signature:
        signature = inspect.signature(self.model.forward)
        kept = []
        for parameter in signature.parameters.values():
            if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.VAR_POSITIONAL):
                raise UsageError(f"state_inputs: forward's parameter {parameter.name!r} cannot be passed by name; name every parameter")
            if parameter.name not in self.values:
                kept.append(parameter)
        first = next((i for i, p in enumerate(kept) if p.default is not p.empty), len(kept))
        for position, parameter in enumerate(kept):
            if position > first and parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
                kept[position] = parameter.replace(kind=parameter.KEYWORD_ONLY)
        return signature.replace(parameters=sorted(kept, key=lambda p: p.kind))

    def _told(self, names: Collection[str]) -> str:
        listed = ", ".join(map(repr, names))
        return f"{listed} became the compiled graph's own state: leave it out; the call is {self._signature}"

    def complete(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        """The model's own arguments, given a call without the state.

        Raises:
            UsageError: the call passes state.
            TypeError: it does not fit ``forward``.
        """
        if self._signature is None:
            args, kwargs, _ = bind(self.model, args, kwargs)
            return args, kwargs
        try:
            bound = self._signature.bind(*args, **kwargs)
        except TypeError as error:
            raise UsageError(f"{error}. {self._told(self.values)}") from None
        named = dict(bound.arguments)
        for parameter in self._signature.parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD:
                named |= named.pop(parameter.name, {})
        passed = set(named) & set(self.values)
        if passed:
            raise UsageError(self._told(passed))
        args, kwargs, _ = bind(self.model, (), {**named, **self.values})
        return args, kwargs


def merged_aliases(call: CapturedCall, arguments: Arguments, wanted: Mapping[torch.Tensor, int] | None) -> tuple[Aliases, list[Finding]]:
    """``{tensor of the graph: output index}`` for everything that the graph writes, and what the user adds.

    Args:
        arguments: the example's: a tensor among them that became state stands for the graph's buffer.
        wanted: the user's aliases; they win, and an NX550 finding says where they contradict the graph.

    Raises:
        UsageError: an alias of no tensor of the graph, or of an output with another shape or dtype.
    """
    aliases, findings = dict(call.input_output_aliases), []
    (output,) = call.graph_module.graph.find_nodes(op="output")
    results = output.args[0]
    for tensor, index in (wanted or {}).items():
        held, name = _held(call, arguments, tensor)
        if not isinstance(index, int) or not 0 <= index < len(results):
            raise UsageError(f"input_output_aliases: {name!r} is given output {index!r}, and the graph has {len(results)} outputs")
        value = meta.val(results[index])
        if (value.dtype, tuple(value.shape)) != (held.dtype, tuple(held.shape)):
            raise UsageError(
                f"input_output_aliases: {name!r} is {held.dtype} {list(held.shape)}, output {index} is {value.dtype} {list(value.shape)}"
            )
        needed = aliases.get(held)
        if needed is not None and results[needed] is not results[index]:
            message = f"input_output_aliases gives {name!r} output {index}, and the model writes it with output {needed}"
            findings.append(Finding("NX550", Severity.WARNING, message, fix="leave it out: nxfx aliases what forward writes"))
        aliases[held] = index
    return aliases, findings


def _held(call: CapturedCall, arguments: Arguments, tensor: torch.Tensor) -> tuple[torch.Tensor, str]:
    """The graph's own tensor for one of the model's or one of the example's."""
    graph_tensors = {**dict(call.graph_module.named_parameters()), **dict(call.graph_module.named_buffers())}
    leaves = flatten(bind(call.model, *arguments)[:2]).leaves
    stands_for = {call.state_inputs[n]: leaf for n, leaf in zip(call.convention.input_names, leaves, strict=True) if n in call.state_inputs}
    models = {**dict(call.model.named_parameters()), **dict(call.model.named_buffers()), **stands_for}
    for name, held in graph_tensors.items():
        if held is tensor or models.get(name) is tensor:
            return held, name
    raise UsageError(
        f"input_output_aliases: a {tensor.dtype} tensor {list(tensor.shape)} is neither a parameter or buffer of the model nor state: "
        "name inputs that are to be state with state_inputs=[...]"
    )


def settle_state(call: CapturedCall, loaded_later: Collection[str] = ()) -> None:
    """Give each buffer that the graph writes one dtype, where it is read and where it is written: an alias has only one.

    A prepared module checks a 64-bit buffer on each call before it hands the graph a 32-bit twin. State on the device is out of its
    reach, so where the graph writes 64 bits the state has 64 bits, and what is still taken for granted of it is an NX303 warning.
    The same holds for the buffers ``loaded_later``: a checkpoint brings them in the model's own dtype.
    """
    (output,) = call.graph_module.graph.find_nodes(op="output")
    build = NodeBuilder(call.graph_module.graph, "handoff")
    for name, held in call.state_tensors.items():
        _tell_unchecked(call, name)
        position = call.mutated_buffers[name]
        written = output.args[0][position]
        if meta.val(written).dtype == held.dtype:
            continue
        if call.boundary.outputs[position] == held.dtype:
            with build.before(output, written):
                wide = build.cast(written, held.dtype)
            results = list(output.args[0])
            results[position] = wide
            output.args = (tuple(results),)
            call.boundary.outputs[position] = None
        else:
            _widen(call, build, name)
    for name in set(call.boundary.narrowed_buffers).intersection(loaded_later).difference(call.mutated_buffers):
        _tell_unchecked(call, name)
        _widen(call, build, name)
    call.graph_module.recompile()


def _tell_unchecked(call: CapturedCall, name: str) -> None:
    if name in call.report.requirements:
        low, high = call.report.requirements[name]
        message = f"`{name}` is on the device and taken to lie in [{low}, {high}]: nothing checks that there"
        call.report.add([], [Finding("NX303", Severity.WARNING, message, fix="bound it in the model, for instance with clamp")])


def _widen(call: CapturedCall, build: NodeBuilder, name: str) -> None:
    """Read the model's own 64-bit buffer, and narrow it in the graph."""
    dtype = call.boundary.narrowed_buffers.pop(name)
    for node in call.graph_module.graph.find_nodes(op="get_attr", target=name):
        narrow = meta.dtype_of(node)
        assert narrow is not None
        users = list(node.users)
        node.meta["val"] = meta.retype(meta.val(node), dtype)
        with build.after(node):
            cast = build.cast(node, narrow)
        for user in users:
            user.replace_input_with(node, cast)
    own_buffer(call.graph_module, name, call.model_buffer(name))
    if name in call.model.state_dict(keep_vars=True):
        path, _, leaf = name.rpartition(".")
        call.graph_module.get_submodule(path)._non_persistent_buffers_set.discard(leaf)


def is_meta(model: torch.nn.Module) -> bool:
    """Whether a parameter or buffer has no values: NxD makes a model so in order to read its names."""
    return any(t.is_meta for t in (*model.parameters(), *model.buffers()))


class NamesOnly(torch.nn.Module):
    """A model on the meta device: its names can be read, and it cannot run, so nothing unprepared is ever compiled."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        share_registries(self, model)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise PrepareError("this module was made on the meta device: it has names and no graph. Make it on the CPU to trace it")
