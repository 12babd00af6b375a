"""``nxfx.verify``: is it still my model, and if not, which line."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import fx
from torch.utils import _pytree as pytree

from nxfx import api
from nxfx.capture.structure import flatten
from nxfx.captured_call import CapturedCall
from nxfx.errors import CaptureError, NxfxError, UsageError
from nxfx.observe.variations import duplicate
from nxfx.prepared import PreparedModule
from nxfx.storage import Skeleton, load
from nxfx.verification import captures as dumps
from nxfx.verification.autocast import AutoCast, CastType, Emulation
from nxfx.verification.bisect import bisect_passes
from nxfx.verification.judge import OutputReport, judge
from nxfx.verification.localise import localise
from nxfx.verification.precision import Precision, Reference
from nxfx.verification.report import VerifyReport
from nxfx.verification.sensitivity import matmul_losses
from nxfx.verification.structure import Pairing
from nxfx.verification.subjects import Call, Outcome, as_call, load_outputs, model_of, run, through

# Relative spacing of what each cast type holds.
_CAST_EPS = {"bf16": 2**-7, "fp16": 2**-10, "tf32": 2**-10, "fp8_e4m3": 2**-3}
_GRAPH_FILE = (".pt2",)
_OUTPUT_FILES = (".pt", ".pth", ".npz", ".npy")
Progress = Callable[[str], None]


def verify(
    model: Any,
    candidate: Any = None,
    inputs: Any = (),
    *,
    kwargs: dict[str, Any] | None = None,
    reference: Reference = "fp64",
    autocast: AutoCast | None = None,
    cast_type: CastType = "bf16",
    localise: bool | None = None,
    captures: str | Path | dict[str, torch.Tensor] | None = None,
    tokens: int = 0,
    bisect: bool = True,
    progress: Progress | None = None,
) -> VerifyReport:
    """Compare a candidate with a model, three-way: against the model's computation in a higher precision, and its own noise floor.

    Args:
        model: an ``nn.Module`` or a function: what the author wrote.
        candidate: what should compute the same: a prepared model, a module, any callable (a traced Neuron module, a remote function),
            a path to saved outputs (``.pt``, ``.npz``) or to a saved prepared model (``.pt2``), or the outputs themselves. None: the
            model itself under ``autocast``, else ``nxfx.prepare(model, ...)``.
        inputs: a tuple of positional arguments, a dict of keyword arguments, or one tensor; ``kwargs`` adds keyword arguments.
        reference: precision of the reference: ``"fp64"`` or ``"fp32"``. Every float is computed in it, explicit casts included.
        autocast: run the candidate as neuronx-cc documents ``--auto-cast=matmult|all`` (an emulation on the CPU), and list what
            each matmul loses.
        cast_type: of the auto-cast: ``"bf16"``, ``"fp16"``, ``"tf32"`` or ``"fp8_e4m3"``.
        localise: look for the op at fault: True, False, or None for "when the candidate fails". Needs graphs: of a candidate that has
            none, give ``captures``.
        captures: values of the candidate's nodes from a device, by node name or module path: a dict, a ``.pt`` or ``.npz`` file,
            or a directory of captured tensors (named as NxD Inference does).
        tokens: also generate this many tokens greedily and with teacher forcing; the model takes token ids first and gives logits.
        bisect: find the pass and the rewrite at fault when the candidate is a prepared model that fails.
        progress: called with what is going on, in words.

    Raises:
        UsageError: an unknown precision, auto-cast or file; inputs that are not arguments.
        NxfxError: the model cannot run on the inputs.
    """
    precision = Precision.of(reference)
    call = as_call(inputs, kwargs)
    if isinstance(model, PreparedModule) and isinstance(model_of(model), Skeleton):
        raise UsageError("a prepared model from a file has no model to be compared with: give the model it was made from")
    report = VerifyReport(reference=reference, autocast=autocast, cast_type=cast_type)
    work = _Verification(model_of(model), call, precision, report, progress)
    work.report.model = type(work.model).__name__ if not hasattr(model, "__name__") else model.__name__
    with work.stage("reference"):
        work.reference()
    with work.stage("candidate"):
        work.choose(model, candidate)
        outcome = work.run_candidate()
    if outcome is not None:
        work.judge(outcome)
    if localise or (localise is None and not work.report.ok):
        with work.stage("localise"):
            work.localise(captures)
    elif captures is not None:
        raise UsageError("captures are for localisation: leave localise at its default, or pass localise=True")
    if autocast not in (None, "none"):
        with work.stage("matmuls"):
            work.list_matmuls()
    if tokens:
        with work.stage("tokens"):
            work.match_tokens(tokens)
    if precision.kept:
        report.notes.append(f"no {reference} kernel, so part of the reference is the model's own: {', '.join(sorted(precision.kept))}")
    if bisect and not work.report.ok and autocast is None:
        with work.stage("bisect"):
            work.bisect()
    return work.report


@dataclass
class _Verification:
    """One verification while it is under way."""

    model: torch.nn.Module
    call: Call
    precision: Precision
    report: VerifyReport
    progress: Progress | None = None
    original: CapturedCall | None = None
    truth: Outcome | None = None
    eager: Outcome | None = None
    candidate: Any = None
    graph: CapturedCall | None = None
    strict: bool = True
    around: Callable[[], AbstractContextManager[Any]] = field(default=nullcontext)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        if self.progress is not None:
            self.progress(name)
        started = time.perf_counter()
        try:
            yield
        finally:
            self.report.seconds[name] = time.perf_counter() - started

    # -- the three runs -----------------------------------------------------------------------------------------------------

    def reference(self) -> None:
        """The model as it is, and in high precision: its captured graph, or eagerly where that cannot be had."""
        if any(t.is_meta for t in (*self.model.parameters(), *self.model.buffers())):
            raise UsageError("the model has no weights (they are on the meta device): there is nothing to run")
        self.eager = run(self.model, self.call)
        try:
            self.original = _captured(self.model, self.call)
        except CaptureError as error:
            self.report.notes.append(f"no localisation: the model cannot be captured ({_first_line(error)})")
        if self.original is not None:
            self.report.graphs["model"] = self.original.graph_module
            self.truth = through(self.original, self.call, self.precision.run, self.precision)
            return
        wide = duplicate(self.call, flatten(self.call, share=True))
        self.truth = run(self.model, wide, self.precision)

    def choose(self, model: Any, candidate: Any) -> None:
        """Settle what the candidate is."""
        report = self.report
        if candidate is None and report.autocast is not None:
            candidate = self.model
        elif candidate is None:
            candidate = model if isinstance(model, PreparedModule) else api.prepare(self.model, *self.call)
        if isinstance(candidate, (str, Path)):
            path = Path(candidate)
            if path.suffix not in (*_GRAPH_FILE, *_OUTPUT_FILES):
                raise UsageError(f"{str(path)!r} is no candidate: a .pt2 file is a prepared model, {', '.join(_OUTPUT_FILES)} are outputs")
            report.candidate = path.name
            candidate = load(path) if path.suffix in _GRAPH_FILE else load_outputs(path)
        elif isinstance(candidate, PreparedModule):
            report.candidate = f"prepared {type(model_of(candidate)).__name__}"
        elif isinstance(candidate, torch.nn.Module) or callable(candidate):
            report.candidate = getattr(candidate, "__name__", type(candidate).__name__)
        else:
            report.candidate = "saved outputs"
        self.candidate = candidate
        # Only what nxfx made promises the model's own dtypes and containers.
        self.strict = isinstance(candidate, PreparedModule) or candidate is self.model
        if isinstance(candidate, PreparedModule):
            self.graph = candidate.capture(*self.call[0], **self.call[1])
            report.prepared = self.graph.report
        elif candidate is self.model:
            self.graph = self.original
        if report.autocast is not None:
            if self.graph is None:
                self._capture_candidate()
            if self.graph is None:
                raise UsageError("autocast emulates what the compiler does to a graph: the candidate has none")
            self.around = functools.partial(Emulation, report.autocast, report.cast_type)

    def _capture_candidate(self) -> None:
        """The graph of a candidate that is a module, where it can be captured."""
        if self.graph is None and isinstance(self.candidate, torch.nn.Module):
            try:
                self.graph = _captured(self.candidate, self.call)
            except (NxfxError, TypeError) as error:
                self.report.notes.append(f"the candidate cannot be captured ({_first_line(error)})")

    def run_candidate(self) -> Outcome | None:
        """What the candidate gives; None, with a problem in the report, when it raises."""
        candidate = self.candidate
        if not callable(candidate):
            return Outcome(candidate)
        try:
            if self.report.autocast is not None and self.graph is not None:
                return through(self.graph, self.call, self._emulated)
            outcome = run(candidate, self.call)
            if not self.strict:  # what serves a model elsewhere often answers in arrays
                outcome.value = pytree.tree_map_only(numpy.ndarray, torch.from_numpy, outcome.value)
            return outcome
        except Exception as error:
            self.report.problems.append(f"the candidate raises {type(error).__name__}: {_first_line(error)}")
            return None

    def _emulated(self, graph_module: fx.GraphModule, inputs: Sequence[Any]) -> Sequence[Any]:
        with self.around():
            outputs: Sequence[Any] = fx.Interpreter(graph_module).run(*inputs)
            return outputs

    # -- the verdict --------------------------------------------------------------------------------------------------------

    def judge(self, outcome: Outcome) -> None:
        """One verdict per output and per tensor that the call changed."""
        assert self.eager is not None and self.truth is not None
        truths = {path: truth for path, _, truth in Pairing.of(self.eager.value, self.truth.value).leaves}
        pairing = Pairing.of(self.eager.value, outcome.value)
        leaves = pairing.leaves
        if pairing.mismatches:
            loose = None if self.strict else _by_order(self.eager.value, outcome.value)
            if loose is None:
                self.report.problems += pairing.mismatches
            else:
                leaves = loose
                self.report.notes.append(f"containers differ, tensors were compared in order: {pairing.mismatches[0]}")
        for path, ours, theirs in leaves:
            verdict = judge(path, truths.get(path), ours, theirs, strict=self.strict)
            if isinstance(ours, torch.Tensor) or not verdict.ok:  # an equal None is not worth a line
                self.report.outputs.append(verdict)
        if not callable(self.candidate):
            return
        for name in {**self.eager.left, **outcome.left}:
            mine, given = self.eager.left.get(name), outcome.left.get(name)
            if mine is None or given is None:
                if given is None and not self._shows(name):
                    self.report.notes.append(f"{name} is not compared: the model changes it, and the candidate does not show its own")
                    continue
                who = "the model" if given is None else "the candidate"
                self.report.outputs.append(OutputReport(name, problems=[f"only {who} changes it"]))
                continue
            self.report.outputs.append(judge(name, self.truth.left.get(name), mine, given, strict=self.strict))

    def _shows(self, name: str) -> bool:
        """Whether a change of ``name`` by the candidate would be seen: arguments always, state where it has a buffer of that name."""
        where, _, rest = name.partition(".")
        if where == "argument":
            return True
        return isinstance(self.candidate, torch.nn.Module) and rest in dict(model_of(self.candidate).named_buffers())

    # -- which line ---------------------------------------------------------------------------------------------------------

    def localise(self, captures: Any) -> None:
        """Where the candidate leaves the model."""
        report = self.report
        if self.original is None:
            return
        self._capture_candidate()
        graph_module = self.original.graph_module
        given = dumps.captured_values(graph_module, captures, report.notes) if captures is not None else {}
        if self.graph is None and not given:
            report.notes.append("no localisation: the candidate has no graph; give captures= of its tensors")
            return
        candidate = None if given and self.graph is None or captures is not None else self.graph
        if candidate is not None:
            report.graphs["candidate"] = candidate.graph_module
        inputs = _admitted(self.original, self.call)
        eps = _CAST_EPS[report.cast_type] if report.autocast not in (None, "none") else None
        with torch.random.fork_rng(devices=[]):
            report.localisation = localise(
                graph_module,
                inputs,
                candidate.graph_module if candidate is not None else None,
                _admitted(candidate, self.call) if candidate is not None else (),
                self.precision,
                captures=given,
                eps=eps,
                around=self.around,
                progress=None if self.progress is None else lambda done, of: self.progress(f"localise: node {done} of {of}"),  # type: ignore[misc]
            )
        if report.localisation.first is None and any(not o.ok for o in report.outputs):
            report.notes.append("the outputs fail, and every compared op is explained by its inputs: see the amplifiers along the graph")

    def list_matmuls(self) -> None:
        assert self.graph is not None and self.report.autocast is not None
        self.report.matmuls = matmul_losses(
            self.graph.graph_module, _admitted(self.graph, self.call), self.report.autocast, self.report.cast_type, self.precision
        )

    def match_tokens(self, count: int) -> None:
        from nxfx.verification.tokens import match_tokens

        if not callable(self.candidate):
            raise UsageError("tokens are generated: the candidate must be callable, not saved outputs")
        self.report.tokens = match_tokens(self.model, self.candidate, self.call, count, self.precision)

    def bisect(self) -> None:
        """The pass and the rewrite at fault."""
        recipe = self.graph.recipe if isinstance(self.candidate, PreparedModule) and self.graph is not None else None
        if recipe is None or self.original is None:
            return
        try:
            self.report.bisection = bisect_passes(recipe, _admitted(self.original, self.call), self.precision)
        except NxfxError as error:
            self.report.notes.append(f"no bisection: {_first_line(error)}")


def _captured(model: torch.nn.Module, call: Call) -> CapturedCall:
    """The graph of ``model`` as it is."""
    prepared = api.prepare(model, *call, pipeline="", check="never")
    return prepared.capture(*call[0], **call[1])


def _admitted(call: CapturedCall, arguments: Call) -> list[Any]:
    from nxfx.capture.shell import bind

    args, kwargs, _ = bind(call.model, *duplicate(arguments, flatten(arguments, share=True)))
    call._sync()
    return call.admit(flatten((args, kwargs), share=True))


def _by_order(ours: Any, theirs: Any) -> list[tuple[str, Any, Any]] | None:
    """The tensors of two results in order, when there are equally many; None otherwise."""
    mine, given = flatten(ours), flatten(theirs)
    if len(mine.leaves) != len(given.leaves) or not mine.leaves:
        return None
    paths = [f"output{''.join(f'.{p}' for p in path)}" for path in mine.paths]
    names = {path.rpartition(".")[2]: i for i, path in enumerate(paths)}
    keys = [str(path[-1]) if path else "" for path in given.paths]
    if set(keys) == set(names) and len(set(keys)) == len(keys):  # saved by name
        order = {key: i for i, key in enumerate(keys)}
        return [(paths[i], mine.leaves[i], given.leaves[order[name]]) for name, i in names.items()]
    return list(zip(paths, mine.leaves, given.leaves, strict=True))


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
