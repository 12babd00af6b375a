"""One trace of a model: the path that it takes when its branches are answered in a given way, as a graph in normal form."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from nxfx.analysis.provenance import Source
from nxfx.capture import branches, errors, memory, normalise
from nxfx.capture.counters import Count
from nxfx.capture.found_positions import drop_unused
from nxfx.capture.frames import lend_traces, traces_in_regions, whole_traces
from nxfx.capture.interception import Session, interception
from nxfx.capture.outside import OutsideState, foreign_tensors
from nxfx.capture.shell import Convention, RegisteredMisfit, Shell
from nxfx.capture.state import COUNTER_RANGE, Change, CounterSlot, ModuleState, Place, Slot, counted
from nxfx.capture.strict import StrictShell, export_strict
from nxfx.capture.structure import Flat
from nxfx.capture.unlift import unlift
from nxfx.capture.writes import check_writes
from nxfx.errors import CaptureError
from nxfx.report import Finding, Report, Severity
from nxfx.report.locations import locate
from nxfx.report.syntax import causes, site_of


@dataclass
class Traced:
    """What one trace gave.

    Attributes:
        graph_module: the graph; its outputs are the user's (with values left in arguments and attributes), ``marks``, mutated
            buffers, mutated inputs.
        session: what was learned on the way, with the sites in order and the answers that were given.
        marks: what each site read, and the tensors that were alive there, as they were at that moment: the graph's nodes.
        mutated_buffers, mutated_inputs: name → output index.
        raised: what the model itself raised; there is no graph then.
    """

    decisions: tuple[bool, ...]
    session: Session
    convention: Convention
    graph_module: fx.GraphModule = field(default_factory=lambda: fx.GraphModule({}, fx.Graph()))
    sources: dict[str, Source] = field(default_factory=dict)
    marks: list[list[fx.Node]] = field(default_factory=list)
    mutated_buffers: dict[str, int] = field(default_factory=dict)
    mutated_inputs: dict[str, int] = field(default_factory=dict)
    plain_tensors: dict[str, Slot] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=dict)
    captured_by: str = "non-strict"
    raised: Exception | None = None

    @property
    def answers(self) -> list[bool]:
        return [bool(site.answer) for site in self.session.sites]


@dataclass
class Tracer:
    """Traces ``model`` called with the leaves of ``flat``, as often as asked; the model is left as it was each time.

    Attributes:
        counters: where the model keeps integers that the graph is to have as buffers.
        counted: integers of the model that some trace has changed.
        inexact: names of counters that a trace took for numbers of Python's.
    """

    model: torch.nn.Module
    flat: Flat
    names: list[str]
    ranges: dict[str, tuple[int, int]]
    shapes: Any
    training: bool
    counters: frozenset[Place] = frozenset()
    counted: dict[Place, Change] = field(default_factory=dict)
    inexact: set[str] = field(default_factory=set)

    def trace(self, decisions: Sequence[bool] = ()) -> Traced:
        """The path on which the first, second ... branch is answered by ``decisions``, later ones by True.

        Raises:
            CaptureError: this path cannot be captured.
        """
        session = Session(decisions=tuple(decisions), counts=bool(self.counters), inexact=self.inexact)
        convention = Convention(self.flat.spec, self.names)
        state, outside = ModuleState(self.model), OutsideState(self.model)

        def around(leaves: Sequence[Any]) -> contextlib.AbstractContextManager[Any]:
            session.reachable = lambda: (_registered(state, leaves), [(c.path, c.removed, c.after) for c in state.changes()])
            return interception(session, training=self.training)

        def count(buffer: torch.Tensor, name: str) -> Count:
            return Count(session, buffer, frozenset({name}))

        shell: Shell | StrictShell = Shell(self.model, convention, state, around, session.marks, self.counters, count)
        path = Traced(tuple(decisions), session, convention)
        started = time.perf_counter()
        try:
            with _quiet(self.training):
                program = torch.export.export(shell, tuple(self.flat.leaves), strict=False, dynamic_shapes=self.shapes)
        except Exception as error:
            state.restore()
            if session.sites and _is_the_models_own(error):
                path.raised = error
                return path
            fallback = self._refused(error, session, shell, convention, state)
            (program, shell), path.captured_by = fallback, "strict"
        finally:
            state.restore()
            self.counted |= counted(convention.state_changes)
            path.findings += outside.findings()
        captured = time.perf_counter()
        program = self._in_normal_form(program)
        path.findings += foreign_tensors(program)
        path.graph_module, path.sources, path.mutated_buffers, path.mutated_inputs = unlift(
            program, shell, self.model, convention, self.ranges
        )
        drop_unused(path.graph_module.graph)
        path.plain_tensors = {slot.name: slot for slot in shell.slots.values()}
        counters = {slot.name for slot in shell.slots.values() if isinstance(slot, CounterSlot)}
        path.sources |= {n: replace(s, range=COUNTER_RANGE) for n, s in path.sources.items() if s.name in counters}
        path.marks = _take_marks(path)
        path.timings = {"capture": captured - started, "normalise": time.perf_counter() - captured}
        return path

    def _refused(
        self, error: Exception, session: Session, shell: Shell | StrictShell, convention: Convention, state: ModuleState
    ) -> tuple[torch.export.ExportedProgram, StrictShell]:
        """Strict export where that helps; the one error for what the session saw where it does not."""
        self._refuse_shared_memory(error)
        is_lost = isinstance(error, CaptureError) and error.construct == memory.DATA_ASSIGNED  # Dynamo takes it for a local change
        hopeless = session.sites or shell.slots or self.training or is_lost or isinstance(error, RegisteredMisfit)
        fallback = None if hopeless else _strictly(self.model, convention, self.flat, self.shapes, state)
        if fallback is not None:
            return fallback
        name = type(self.model).__name__
        if session.sites:
            raise branches.refusal([session], name, error) from error
        raise (error if isinstance(error, CaptureError) else errors.translate(error, model_name=name, model=self.model)) from error

    def _in_normal_form(self, program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
        name = type(self.model).__name__
        try:
            with _quiet(self.training):
                program = _normal_form(program, name)
        except CaptureError:
            raise
        except Exception as error:
            self._refuse_shared_memory(error)
            raise errors.translate(error, model_name=name, model=self.model) from error
        invented = branches.guards_by_node(program)
        if invented:
            condition, node = next(iter(invented.items()))
            location = locate(node)
            message = f"torch.export added a condition on a data-dependent size that the model does not state: {condition}"
            fix = "state it with torch._check(...), or use a mask instead of a size that depends on data"
            raise CaptureError(
                f"{name}: {message}\n  {location}: {location.source}\n  Write instead: {fix}",
                construct="a size that depends on data",
                report=Report(findings=[Finding("NX409", Severity.ERROR, message, location, node.name, fix)]),
            )
        return program

    def _refuse_shared_memory(self, error: Exception) -> None:
        """Tensors that share memory make torch.export fail in its own terms, when one of them is written."""
        if isinstance(error, CaptureError):
            return
        leaves = zip(self.names, self.flat.leaves, strict=True)
        owners: dict[int, str] = {}
        for name, tensor in (*leaves, *self.model.named_parameters(), *self.model.named_buffers()):
            if isinstance(tensor, torch.Tensor) and tensor.layout is torch.strided and not tensor.is_meta and tensor.numel():
                first = owners.setdefault(tensor.untyped_storage()._cdata, name)
                if first != name and first in self.names:
                    raise CaptureError(
                        f"{type(self.model).__name__} cannot be captured: {first!r} and {name!r} share memory, and a tensor is written. "
                        "Pass a clone() of one of them.",
                        construct="arguments that share memory",
                    ) from error


def _registered(state: ModuleState, leaves: Sequence[Any]) -> list[Any]:
    """The arguments, and the registered tensors that forward may write or has written."""
    held = [(c.path, c.after) for c in state.registered_now()]
    return [*leaves, *(pair for pair in held if not isinstance(pair[1], torch.nn.Parameter) or pair[1]._version)]


def _is_the_models_own(error: Exception) -> bool:
    """Whether a ``raise`` of the model ended the trace, not something that a tracer refuses."""
    if isinstance(error, CaptureError) or any(isinstance(cause, CaptureError) for cause in causes(error)):
        return False
    site = site_of(error)
    return site is not None and site.raised_there and errors.is_own(error)


def _take_marks(path: Traced) -> list[list[fx.Node]]:
    """Take the marks off the graph's outputs: for each site what it read, then what was alive."""
    (output,) = path.graph_module.graph.find_nodes(op="output")
    values, counts = list(output.args[0]), path.session.mark_counts()
    written = len(path.mutated_buffers) + len(path.mutated_inputs)
    first = len(values) - written - sum(counts)
    taken = iter(values[first : len(values) - written])
    marks = [[next(taken) for _ in range(count)] for count in counts]
    for indices in (path.mutated_buffers, path.mutated_inputs):
        for name in indices:
            indices[name] -= sum(counts)
    output.args = ((*values[:first], *values[len(values) - written :]),)
    return marks


class _WithoutTorchsGraphs:
    """stderr, less the graph that torch.export prints when it fails; what the model prints goes through."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        from_export = sys._getframe(1).f_code.co_filename == torch.export.__file__.replace("__init__", "_trace")
        return len(text) if from_export else int(self._stream.write(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


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
            return None if state.changes() else (_normal_form(program, type(model).__name__), shell)
    except Exception:  # the first refusal is the one to be told
        return None
    finally:
        torchs_log.setLevel(level)


def _normal_form(program: torch.export.ExportedProgram, model_name: str) -> torch.export.ExportedProgram:
    refused = errors.lost_tensor(program, model_name=model_name) or errors.foreign_object(program, model_name=model_name)
    if refused is not None:
        raise refused
    check_writes(program)
    # Under autocast the captured ops stand as the model wrote them: only a retrace puts the casts into the graph.
    if autocast_state() is not None or normalise.needs_functionalisation(program.graph_module):
        normalise.spell_out_copies(program.graph_module)
        with traces_in_regions():
            retraced: torch.export.ExportedProgram = program.run_decompositions({})
        lend_traces(retraced.graph_module)
        return retraced
    normalise.normalise(program.graph_module)
    return program


def autocast_state() -> tuple[str, torch.dtype] | None:
    """``(device type, dtype)`` of the active autocast."""
    for device_type in ("cpu", "cuda", "xla"):
        try:
            if torch.is_autocast_enabled(device_type):
                return device_type, torch.get_autocast_dtype(device_type)
        except RuntimeError:  # this build of torch has no autocast for the device
            continue
    return None
