"""Model → flat functional graph, by non-strict ``torch.export`` of a shell (strict export is the one fallback)."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import logging
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from nxfx.analysis.dtype_rules import integer_bounds, is_integral
from nxfx.analysis.provenance import Premise, Role, Source
from nxfx.capture import branches, errors, normalise
from nxfx.capture.frames import whole_traces
from nxfx.capture.interception import Session, interception
from nxfx.capture.outside import OutsideState, foreign_tensors
from nxfx.capture.shell import Convention, RegisteredMisfit, Shell, bind, parameter_names
from nxfx.capture.state import ModuleState, writing_line
from nxfx.capture.strict import StrictShell, export_strict
from nxfx.capture.structure import Flat, Path, flatten, leaf_names
from nxfx.capture.unlift import inputs_to_buffers, unlift
from nxfx.capture.writes import check_writes
from nxfx.errors import CaptureError, UsageError
from nxfx.graph import meta
from nxfx.report import Finding, Report, Rewrite, Severity

Ranges = dict[str, tuple[int, int]]


@dataclass
class Capture:
    """A model's graph in normal form: flat tensors in, flat tensors out, weights as ``get_attr`` of the model's own tensors.

    Attributes:
        graph_module: outputs in this order: the user's (with values left in arguments and attributes), then mutated buffers, then
            mutated inputs.
        convention: how flat tensors become the model's call and results.
        sources: node name → origin, for placeholders and ``get_attr`` nodes.
        mutated_buffers: fully qualified name → output index.
        mutated_inputs: input name → output index.
        example_inputs: the flat example.
        rewrites, findings: what capture itself did and saw.
        timings: seconds of ``capture`` and ``normalise``.
        captured_by: ``"non-strict"`` or ``"strict"``.
        plain_tensors: name → where the model keeps a tensor that is not registered.
        state_inputs: input leaf that became a buffer → name of that buffer.
        premises: what the graph rests on before any pass.
    """

    graph_module: fx.GraphModule
    convention: Convention
    sources: dict[str, Source]
    mutated_buffers: dict[str, int]
    mutated_inputs: dict[str, int]
    example_inputs: tuple[torch.Tensor, ...]
    rewrites: list[Rewrite] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=dict)
    captured_by: str = "non-strict"
    plain_tensors: dict[str, Any] = field(default_factory=dict)
    state_inputs: dict[str, str] = field(default_factory=dict)
    premises: list[Premise] = field(default_factory=list)

    def forget_values(self, names: Iterable[str]) -> None:
        """The parameters and buffers called ``names`` will hold other values: nothing may be proved from the present ones."""
        unknown = set(names)
        for node, source in self.sources.items():
            if source.name in unknown and source.role in (Role.PARAMETER, Role.BUFFER):
                self.sources[node] = replace(source, value=None)


def input_names(flat: Flat, positional: list[str]) -> list[str]:
    """One name per input leaf, after the model's own parameters."""
    paths: list[Path] = []
    for path in flat.paths:
        where, key, *rest = path
        first = positional[key] if where == 0 and key < len(positional) else key
        paths.append((first, *rest))
    return leaf_names(paths)


def capture(
    model: torch.nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    ranges: dict[str, tuple[int, int]] | None = None,
    training: bool = False,
    state_inputs: Sequence[str] = (),
) -> Capture:
    """Capture ``model`` called with ``args`` and ``kwargs``. The model is left exactly as it was.

    Args:
        dynamic_shapes: as ``torch.export.export`` takes it, keyed by the names of ``forward``'s parameters.
        ranges: input name → declared inclusive integer range.
        training: keep autograd semantics (``no_grad`` regions become detaches) instead of capturing under ``no_grad``.
        state_inputs: inputs (by argument or leaf name) that become buffers of the graph.

    Raises:
        CaptureError: names the construct that cannot be captured and the user's line.
        TypeError: the arguments do not fit the model's signature.
    """
    args, kwargs, positional = bind(model, args, kwargs or {})
    flat = flatten((args, kwargs), share=True)
    scripted = [n or type(model).__name__ for n, m in model.named_modules() if isinstance(m, torch.jit.ScriptModule)]
    if scripted:
        raise CaptureError(f"{scripted[0]!r} is a TorchScript module: use the nn.Module that it was made from", construct="TorchScript")
    convention = Convention(flat.spec, input_names(flat, positional))
    dtypes = {n: leaf.dtype for n, leaf in zip(convention.input_names, flat.leaves, strict=True) if isinstance(leaf, torch.Tensor)}
    ranges = _check_ranges(ranges or {}, dtypes, positional + list(kwargs), model)
    state = ModuleState(model)
    session = Session()
    shell: Shell | StrictShell = Shell(model, convention, state, lambda: interception(session, training=training))
    state_example = _state_example(state_inputs, flat, convention.input_names)
    shapes = _flat_dynamic_shapes(dynamic_shapes, flat, positional, convention.input_names)

    outside = OutsideState(model)
    started = time.perf_counter()
    captured_by = "non-strict"
    try:
        with _quiet(training):
            program = torch.export.export(shell, tuple(flat.leaves), strict=False, dynamic_shapes=shapes)
    except Exception as error:
        state.restore()
        _refuse_shared_memory(error, model, flat, convention.input_names)
        hopeless = session.sites or shell.slots or training or isinstance(error, RegisteredMisfit)
        fallback = None if hopeless else _strictly(model, convention, flat, shapes, state)
        if fallback is None:
            raise _refusal(error, session, model) from error
        (program, shell), captured_by = fallback, "strict"
    finally:
        state.restore()
        session.findings += outside.findings()
    if session.sites:
        raise _refusal(None, session, model)
    captured = time.perf_counter()
    try:
        with _quiet(training):
            program = _normal_form(program)
    except CaptureError:
        raise
    except Exception as error:
        _refuse_shared_memory(error, model, flat, convention.input_names)
        raise errors.translate(error, model_name=type(model).__name__, model=model) from error
    invented = branches.invented_guards(program)
    if invented:
        raise CaptureError(
            f"{type(model).__name__}: torch.export added a condition on a data-dependent size that the model does not state: "
            f"{invented[0]}. State it with torch._check(...), or use a mask instead of a tensor-valued slice.",
            construct="a size that depends on data",
            report=Report(findings=[Finding("NX409", Severity.ERROR, invented[0])]),
        )
    session.findings += foreign_tensors(program)
    graph_module, sources, buffers, inputs = unlift(program, shell, model, convention, ranges)
    _note_examples(sources, dict(zip(convention.input_names, flat.leaves, strict=True)))
    done = time.perf_counter()
    if convention.output_count == 0:
        raise CaptureError(f"{type(model).__name__}.forward returns no tensor: there is nothing to compile", construct="no tensor output")
    return Capture(
        graph_module,
        convention,
        sources,
        buffers,
        inputs,
        tuple(flat.leaves),
        session.rewrites,
        session.findings + _state_findings(model, convention),
        {"capture": captured - started, "normalise": done - captured},
        captured_by,
        state_inputs=inputs_to_buffers(graph_module, sources, state_example, buffers, inputs),
        plain_tensors={slot.name: slot for slot in shell.slots.values()},
    )


def autocast_state() -> tuple[str, torch.dtype] | None:
    """``(device type, dtype)`` of the active autocast."""
    for device_type in ("cpu", "cuda", "xla"):
        try:
            if torch.is_autocast_enabled(device_type):
                return device_type, torch.get_autocast_dtype(device_type)
        except RuntimeError:  # this build of torch has no autocast for the device
            continue
    return None


@contextlib.contextmanager
def without_autocast() -> Iterator[None]:
    """No autocast in the block: the captured graph holds its casts already, and another round would add some."""
    with contextlib.ExitStack() as stack:
        while (active := autocast_state()) is not None:
            stack.enter_context(torch.autocast(active[0], enabled=False))
        yield


class _WithoutTorchsGraphs:
    """stderr, less the graph that torch.export prints when it fails; what the model prints goes through."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        from_export = sys._getframe(1).f_code.co_filename == torch.export.__file__.replace("__init__", "_trace")
        return len(text) if from_export else int(self._stream.write(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _refuse_shared_memory(error: Exception, model: torch.nn.Module, flat: Flat, names: list[str]) -> None:
    """Tensors that share memory make torch.export fail in its own terms, when one of them is written."""
    if isinstance(error, CaptureError):
        return
    tensors = [*zip(names, flat.leaves, strict=True), *model.named_parameters(), *model.named_buffers()]
    owners: dict[int, str] = {}
    for name, tensor in tensors:
        if isinstance(tensor, torch.Tensor) and tensor.layout is torch.strided and not tensor.is_meta and tensor.numel():
            first = owners.setdefault(tensor.untyped_storage()._cdata, name)
            if first != name and first in names:
                raise CaptureError(
                    f"{type(model).__name__} cannot be captured: {first!r} and {name!r} share memory, and a tensor is written. "
                    "Pass a clone() of one of them.",
                    construct="arguments that share memory",
                ) from error


@contextlib.contextmanager
def _quiet(training: bool) -> Iterator[None]:
    muted = contextlib.redirect_stderr(_WithoutTorchsGraphs(sys.stderr))
    with muted, whole_traces(), warnings.catch_warnings(), contextlib.nullcontext() if training else torch.no_grad():
        warnings.simplefilter("ignore")
        yield


def _strictly(
    model: torch.nn.Module, convention: Convention, flat: Flat, shapes: Any, state: ModuleState
) -> tuple[torch.export.ExportedProgram, StrictShell] | None:
    """Strict export where it takes what non-strict refuses, and leaves the model's Python state alone; else None."""
    torchs_log = logging.getLogger("torch._dynamo")
    level = torchs_log.level
    try:
        torchs_log.setLevel(logging.CRITICAL)
        with _quiet(False):
            program, shell = export_strict(model, convention, tuple(flat.leaves), shapes)
            return None if state.changes() else (_normal_form(program), shell)
    except Exception:  # the first refusal is the one to be told
        return None
    finally:
        torchs_log.setLevel(level)


def _refusal(error: Exception | None, session: Session, model: torch.nn.Module) -> CaptureError:
    """One error for everything the session saw before torch gave up."""
    name = type(model).__name__
    if not session.sites:
        assert error is not None
        return error if isinstance(error, CaptureError) else errors.translate(error, model_name=name, model=model)
    return branches.refusal(session, name)


def _normal_form(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    lost = errors.lost_tensor(program)
    if lost is not None:
        raise lost
    check_writes(program)
    # Under autocast the captured ops stand as the model wrote them: only a retrace puts the casts into the graph.
    if autocast_state() is not None or normalise.needs_functionalisation(program.graph_module):
        retraced: torch.export.ExportedProgram = program.run_decompositions({})
        return retraced
    normalise.normalise(program.graph_module)
    return program


def _flat_dynamic_shapes(dynamic_shapes: Any, flat: Flat, positional: list[str], names: list[str]) -> Any:
    if dynamic_shapes is None:
        return None
    if isinstance(dynamic_shapes, (tuple, list)):
        dynamic_shapes = dict(zip(positional, dynamic_shapes, strict=False))
    result: dict[str, Any] = {}
    for name, path in zip(names, flat.paths, strict=True):
        where, key, *rest = path
        spec: Any = dynamic_shapes
        for step in ((positional[key] if where == 0 and key < len(positional) else key), *rest):
            if spec is None:
                break
            if isinstance(spec, dict):
                spec = spec.get(step)
            elif isinstance(spec, (list, tuple)) and isinstance(step, int) and step < len(spec):
                spec = spec[step]
            else:
                spec = None
        result[name] = spec
    return result


def _note_examples(sources: dict[str, Source], leaves: dict[str, Any]) -> None:
    """The extremes of the example's int64 inputs."""
    for node, source in sources.items():
        value = leaves.get(source.name) if source.role is Role.INPUT else None
        if not isinstance(value, torch.Tensor) or value.is_meta or isinstance(value, meta.FakeTensor):
            continue
        if value.dtype is torch.int64 and value.numel():
            low, high = torch.aminmax(value.detach())
            sources[node] = dataclasses.replace(source, seen=(int(low), int(high)))


def _check_ranges(ranges: Ranges, leaves: dict[str, torch.dtype], arguments: list[str], model: torch.nn.Module) -> Ranges:
    """Ranges by leaf name; an argument's name stands for all its integer leaves, and gives way to the name of a leaf."""
    found: Ranges = {}
    for name, bounds in sorted(ranges.items(), key=lambda item: item[0] in leaves):
        if not (isinstance(bounds, (tuple, list)) and len(bounds) == 2 and all(isinstance(b, int) for b in bounds)):
            raise UsageError(f"ranges: {name!r} wants two integers (low, high), not {bounds!r}")
        low, high = bounds
        if low > high:
            raise UsageError(f"ranges: {name!r} has low {low} above high {high}")
        matching = [n for n in leaves if n == name] or [n for n in leaves if name in arguments and n.startswith(f"{name}_")]
        if not matching and name not in parameter_names(model):
            near = difflib.get_close_matches(name, leaves, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else f" The inputs are: {', '.join(leaves)}."
            raise UsageError(f"ranges: no input {name!r}.{hint}")
        integers = [n for n in matching if is_integral(leaves[n])]
        if matching and not integers:
            dtype = str(leaves[matching[0]]).removeprefix("torch.")
            raise UsageError(f"ranges: {name!r} is {dtype}, and ranges are of integers")
        for leaf in integers:
            first, last = integer_bounds(leaves[leaf])
            if high < first or low > last:
                raise UsageError(f"ranges: no {str(leaves[leaf]).removeprefix('torch.')} is in [{low}, {high}], declared for {leaf!r}")
        found |= dict.fromkeys(integers, (int(low), int(high)))
    return found


def _state_example(state_inputs: Sequence[str], flat: Flat, names: list[str]) -> dict[str, torch.Tensor]:
    """The leaves that ``state_inputs`` mean: a leaf by its name, or all leaves of an argument."""
    chosen = {}
    for wanted in state_inputs:
        matching = [n for n in names if n == wanted or n.startswith(f"{wanted}_")]
        if not matching:
            near = difflib.get_close_matches(wanted, names, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else f" The inputs are: {', '.join(names)}."
            raise UsageError(f"state_inputs: no input {wanted!r}.{hint}")
        chosen.update({n: flat.leaves[names.index(n)] for n in matching})
    return chosen


def _state_findings(model: torch.nn.Module, convention: Convention) -> list[Finding]:
    findings = []
    for change in convention.state_changes:
        tensors = flatten(change.after).leaves
        if tensors and not change.removed:
            message = f"forward rebinds the attribute {change.path!r} to a tensor: prepared calls do too, a compiled graph does not"
            severity = Severity.WARNING
        else:
            message = (
                f"forward changes the Python attribute {change.path!r} from {change.before!r} to {change.after!r}: the value at capture is "
                "baked into the graph; prepared calls capture again when it differs, a compiled graph cannot"
            )
            severity = Severity.ERROR
        location = writing_line(model, change)
        fix = "register it as a buffer and update it in place with tensor operations"
        findings.append(Finding("NX406", severity, message, location, "", fix))
    return findings
