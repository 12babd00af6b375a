"""``nxfx.trace``: a prepared graph through the legacy ``torch_neuronx.trace``, called like the model it was made from."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from nxfx.api import prepare
from nxfx.capture.export import without_autocast
from nxfx.capture.shell import bind
from nxfx.capture.structure import Flat, flatten, unflatten
from nxfx.captured_call import CapturedCall
from nxfx.environment import legacy_torch_neuronx
from nxfx.errors import CompilerError, PrepareError, UsageError
from nxfx.handoff.flags import merge_flags
from nxfx.handoff.script import scripted
from nxfx.handoff.state import (
    Arguments,
    StateArguments,
    merged_aliases,
    refuse_control_flow,
    refuse_dynamic_shapes,
    refuse_python_state,
    settle_state,
)
from nxfx.handoff.tracing import traceable
from nxfx.latency import WarmUp, warmup
from nxfx.report import Report
from nxfx.report.failures import explain
from nxfx.targets import Target, get_target


def trace(
    model: torch.nn.Module,
    args: torch.Tensor | tuple[Any, ...] | list[Any] | None = None,
    kwargs: dict[str, Any] | list[dict[str, Any]] | None = None,
    *,
    target: str | Target,
    compiler_args: str | Sequence[str] | None = None,
    compiler_workdir: str | os.PathLike[str] | None = None,
    inline_weights_to_neff: bool = True,
    input_output_aliases: Mapping[torch.Tensor, int] | None = None,
    cpu_backend: bool = False,
    **prepare_options: Any,
) -> TracedModule:
    """Prepare ``model`` and compile it ahead of time with the legacy ``torch_neuronx.trace``.

    Args:
        model: any ``nn.Module``.
        args, kwargs: example arguments. A *list* of argument tuples (or of keyword dicts) gives one compiled graph for each: buckets.
        target: ``"inf2"``, ``"trn1"`` or ``"trn2"``.
        compiler_args: neuronx-cc flags; they win over those that the graph needs, and a contradiction is an NX550 finding.
        compiler_workdir, inline_weights_to_neff, cpu_backend: as for ``torch_neuronx.trace``. With ``cpu_backend`` a ``--target``
            flag is added.
        input_output_aliases: parameter or buffer → output index, beside what ``forward`` itself writes, which is found.
        prepare_options: everything else that :func:`nxfx.prepare` takes. ``state_inputs=["cache"]`` makes an argument the compiled
            graph's own state, updated in place; calls then leave it out.

    Raises:
        NeuronNotFound: no ``torch_neuronx`` with ``trace``; tells what to install and what can be done without.
        CompilerError: the compile failed; names the user's lines where they are known.
        PrepareError: the model cannot be compiled as asked: Python state, dynamic shapes, ``torch.cond`` (tracing would freeze one
            branch), state in several buckets.
        UsageError: an alias that fits nothing, two buckets of the same shapes.
    """
    target = get_target(target)
    torch_neuronx = legacy_torch_neuronx(target.name)
    examples = examples_of(args, kwargs)
    prepare_options.setdefault("final_weights", inline_weights_to_neff)
    compiled: list[CompiledCall] = []
    for number, arguments in enumerate(examples):
        call = prepared_call(model, arguments, target, prepare_options)
        if len(examples) > 1 and call.mutated_buffers:
            raise PrepareError(
                f"the model writes {', '.join(call.mutated_buffers)}: each bucket would keep a state of its own. Trace one bucket, or "
                "share the state between buckets with NxD's ModelBuilder (nxfx.handoff.modelbuilder)",
                call.report,
            )
        aliases, conflicts = merged_aliases(call, arguments, input_output_aliases)
        flags, overridden = merge_flags(call.report.compiler_args, compiler_args, call.report.float32_uses)
        if cpu_backend and not any(flag.split("=")[0] == "--target" for flag in flags):
            flags.append(f"--target={target.name}")
        call.report.add([], conflicts + overridden)
        options: dict[str, Any] = {"compiler_args": flags, "inline_weights_to_neff": inline_weights_to_neff}
        if aliases:
            options["input_output_aliases"] = aliases
        if compiler_workdir is not None:
            folder = os.fspath(compiler_workdir)
            options["compiler_workdir"] = folder if len(examples) == 1 else os.path.join(folder, f"bucket_{number}")
        if cpu_backend:
            options["cpu_backend"] = True
        script = _compile(torch_neuronx.trace, call, options)
        compiled.append(CompiledCall(call, script, frozenset(aliases.values()), flags))
    return TracedModule(model, compiled, StateArguments(model, compiled[0].call, examples[0]), examples)


def examples_of(args: Any, kwargs: Any) -> list[Arguments]:
    """One ``(args, kwargs)`` per bucket."""
    if not isinstance(args, list) and not isinstance(kwargs, list):
        return [_unshared((_tuple(args), kwargs or {}))]
    count = len(args) if isinstance(args, list) else len(kwargs)
    positional = args if isinstance(args, list) else [args] * count
    named = kwargs if isinstance(kwargs, list) else [kwargs] * count
    if len(positional) != len(named) or not count:
        raise UsageError(f"buckets: {len(positional)} argument tuples and {len(named)} keyword dicts")
    return [_unshared((_tuple(a), k or {})) for a, k in zip(positional, named, strict=True)]


def _unshared(arguments: Arguments) -> Arguments:
    """The same arguments with a tensor of its own at each place: a compiled graph takes one for each."""
    flat = flatten(arguments)
    if len({id(leaf) for leaf in flat.leaves}) == len(flat.leaves):
        return arguments
    seen: set[int] = set()
    leaves = []
    for leaf in flat.leaves:
        leaves.append(leaf.detach().clone() if id(leaf) in seen else leaf)
        seen.add(id(leaf))
    args, kwargs = unflatten(flat.spec, leaves)
    return args, kwargs


def _tuple(args: Any) -> tuple[Any, ...]:
    if args is None or isinstance(args, torch.Tensor):
        return () if args is None else (args,)
    if not isinstance(args, tuple):
        raise UsageError(f"example arguments are a tuple, or a list of tuples for buckets; not {type(args).__name__}")
    return args


def prepared_call(model: torch.nn.Module, arguments: Arguments, target: Target, options: dict[str, Any]) -> CapturedCall:
    """One capture, fit for a compiler that keeps nothing of Python.

    Raises:
        PrepareError: Python state, dynamic shapes, control flow on values, or no inputs.
    """
    prepared = prepare(model, *arguments, target=target, **options)
    ((_, call),) = prepared.captures.items()
    refuse_python_state(call)
    refuse_dynamic_shapes(call)
    refuse_control_flow(call)
    if not call.example_inputs:
        raise PrepareError("the graph has no inputs: there is nothing to trace", call.report)
    settle_state(call, () if options.get("final_weights", True) else model.state_dict().keys())
    return call


def _compile(compiler: Any, call: CapturedCall, options: dict[str, Any]) -> Any:
    graph_module = traceable(call)
    try:
        with torch.no_grad(), without_autocast():
            return compiler(graph_module, call.example_inputs, **options)
    except Exception as error:
        told = explain(error, graph_module, call.report.findings)
        raise CompilerError(f"torch_neuronx.trace failed: {type(error).__name__}: {error}{told}") from error


class CompiledCall:
    """One compiled graph, and how a call of the model reaches it and comes back.

    Attributes:
        call: the capture it was made from.
        compiled: takes and gives flat tensors.
        aliased: outputs that update state in place; the compiled graph may leave them out of what it returns.
        compiler_args: the flags it was compiled with.
    """

    def __init__(self, call: CapturedCall, compiled: Any, aliased: frozenset[int], compiler_args: list[str]) -> None:
        self.call, self.compiled, self.aliased, self.compiler_args = call, compiled, aliased, compiler_args

    def __call__(self, flat: Flat, arguments: Arguments) -> Any:
        values = self.call.admit(flat)
        with torch.no_grad():
            returned = self.compiled(*values)
        outputs = self.call.boundary.restore(placed(returned, len(self.call.boundary.outputs), self.aliased))
        return self.call.rebuilt(self.call.conclude(outputs, flat.leaves, arguments), arguments)


def placed(returned: Any, count: int, aliased: frozenset[int]) -> list[Any]:
    """Each output at its place, None where it stays on the device.

    Raises:
        PrepareError: the compiled graph returns another number of outputs.
    """
    values = [returned] if isinstance(returned, torch.Tensor) else list(returned)
    if len(values) == count:
        return values
    if len(values) != count - len(aliased):
        raise PrepareError(f"the compiled graph returned {len(values)} outputs, the graph has {count}, {len(aliased)} of them aliased")
    remaining = iter(values)
    return [None if position in aliased else next(remaining) for position in range(count)]


class TracedModule(torch.nn.Module):
    """A compiled model, called like the model: same arguments, same result structure and dtypes. Made by :func:`nxfx.trace`.

    Attributes:
        buckets: one :class:`CompiledCall` for each example.

    State that ``forward`` writes lives in the compiled graph from the trace on, with the values it had then; the model's own
    buffers are not touched by calls.
    """

    _state: StateArguments
    _examples: list[Arguments]
    _by_key: dict[Any, CompiledCall]
    buckets: tuple[CompiledCall, ...]

    def __init__(self, model: torch.nn.Module, buckets: Sequence[CompiledCall], state: StateArguments, examples: list[Arguments]) -> None:
        super().__init__()
        self.compiled = torch.nn.ModuleList([b.compiled for b in buckets if isinstance(b.compiled, torch.nn.Module)])
        self.__dict__["_state"], self.__dict__["_examples"] = state, examples
        self.buckets = tuple(buckets)
        self.__dict__["_by_key"] = {}
        for number, bucket in enumerate(buckets):
            flat = flatten(bind(model, *examples[number])[:2])
            first = self._by_key.setdefault(_key(flat), bucket)
            if first is not bucket:
                raise UsageError(f"bucket {number} has the shapes of bucket {self.buckets.index(first)}: {_told(flat)}")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """
        Raises:
            UsageError: no bucket has these shapes, dtypes and static values.
            RangeError: an input does not fit the range that the graph rests on; nothing has run.
        """
        arguments = self._state.complete(args, kwargs)
        flat = flatten(arguments)
        bucket = self._by_key.get(_key(flat))
        if bucket is None:
            there = "; ".join(_told(flatten(bind(self._state.model, *e)[:2])) for e in self._examples)
            other = f"this call has {_told(flat)}, or another structure or Python value"
            raise UsageError(f"compiled for {there}; {other}: trace a bucket for it")
        if bucket.call.mutated_inputs and len({id(leaf) for leaf in flat.leaves}) < len(flat.leaves):
            raise UsageError("one tensor is passed twice, and the model writes to its arguments: pass a clone() of it")
        return bucket(flat, arguments)

    @property
    def reports(self) -> tuple[Report, ...]:
        """One report for each bucket."""
        return tuple(bucket.call.report for bucket in self.buckets)

    @property
    def report(self) -> Report:
        """The report, where there is one bucket.

        Raises:
            PrepareError: there are several; see :attr:`reports`.
        """
        if len(self.buckets) != 1:
            raise PrepareError(f"{len(self.buckets)} buckets have a report each: choose one from .reports")
        return self.reports[0]

    @property
    def compiler_args(self) -> list[str]:
        """The neuronx-cc flags of the (first) compile: the user's and those that the graph needs."""
        return list(self.buckets[0].compiler_args)

    def warmup(self, iterations: int = 3, *, changes_state: bool = False) -> WarmUp:
        """Send the examples until latencies settle: :func:`nxfx.warmup`.

        Args:
            changes_state: confirms that the state which dummy requests write on the device may be overwritten.

        Raises:
            PrepareError: the module keeps state on the device and ``changes_state`` is not given.
        """
        written = sorted(set().union(*(b.call.mutated_buffers for b in self.buckets)))
        if written and not changes_state:
            raise PrepareError(
                f"each call updates {', '.join(written)} on the device, dummy requests too: pass changes_state=True where real requests "
                "overwrite it before they read it, as a cache filled from its start does"
            )
        state = self._state.values
        requests = []
        for example in self._examples:
            args, kwargs, names = bind(self._state.model, *example)
            named = {**dict(zip(names, args, strict=True)), **kwargs} if state else {}
            requests.append(((), {k: v for k, v in named.items() if k not in state}) if state else (args, kwargs))
        return warmup(self, requests, iterations)

    # -- saving: torch.jit.save(traced, path) calls these --------------------------------------------------------------------

    def script(self) -> torch.jit.ScriptModule:
        """The compiled graphs in their boundary as one TorchScript module: flat tensors by name, in the model's own dtypes."""
        return scripted(self.buckets)

    def save(self, path: str | os.PathLike[str], _extra_files: dict[str, Any] | None = None) -> None:
        """Write :meth:`script` to a file that ``torch.jit.load`` reads without nxfx.

        Raises:
            PrepareError: a call does what TorchScript cannot: see :func:`nxfx.handoff.script.scripted`.
        """
        self.script().save(os.fspath(path), _extra_files=_extra_files or {})

    def save_to_buffer(self, _extra_files: dict[str, Any] | None = None) -> bytes:
        """The same file as bytes."""
        return bytes(self.script().save_to_buffer(_extra_files=_extra_files or {}))


def _key(flat: Flat) -> tuple[Any, ...]:
    return flat.spec, tuple((leaf.dtype, tuple(leaf.shape)) for leaf in flat.leaves)


def _told(flat: Flat) -> str:
    return "(" + ", ".join(f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}" for t in flat.leaves) + ")"
