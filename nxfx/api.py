"""The whole program on one page: capture, pipeline, boundary."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from typing import Any, get_args

import torch

from nxfx import reproducer
from nxfx.analysis.intervals import INT32
from nxfx.analysis.wide_edges import wide_edges
from nxfx.boundary import Boundary, Check, hoist
from nxfx.capture.export import Capture, capture, without_autocast
from nxfx.capture.merging.merge import MAX_TRACES
from nxfx.captured_call import CapturedCall, Recipe
from nxfx.errors import CaptureError, PassError, PrepareError, UsageError
from nxfx.graph.walk import reshape_views
from nxfx.lifting.tables import restore_tables
from nxfx.observe.run import observe
from nxfx.observe.settle import settle
from nxfx.pipeline import PassContext, Pipeline, PipelineResult
from nxfx.prepared import PreparedModule
from nxfx.report import Finding, Report, Severity
from nxfx.targets import Target, get_target
from nxfx.targets.flags import compiler_args

Observer = Callable[..., None]


def prepare(
    model: torch.nn.Module,
    args: tuple[Any, ...] | None = None,
    kwargs: dict[str, Any] | None = None,
    *,
    target: str | Target = "trn2",
    sdk: str | None = None,
    pipeline: Pipeline | str | None = None,
    ranges: dict[str, tuple[int, int]] | None = None,
    dynamic_shapes: Any = None,
    strict: bool = False,
    verify: bool = False,
    training: bool = False,
    check: Check = "always",
    restore_outputs: bool = True,
    state_inputs: Sequence[str] = (),
    share_state: bool = True,
    final_weights: bool = True,
    recompute_tables: bool = False,
    max_traces: int = MAX_TRACES,
    verify_each: bool = False,
    observer: Observer | None = None,
) -> PreparedModule:
    """Clean ``model`` for Neuron: the result is called like the model and computes what its author wrote.

    Args:
        model: any ``nn.Module``. It is left as it is; calling the result changes its state exactly as calling the model would.
        args, kwargs: example arguments. Tensors give dtypes and shapes; every other Python value is baked. Without both, the
            graph is captured on the first call, one capture per signature.
        target: ``"inf2"``, ``"trn1"``, ``"trn2"`` or ``"trn3"``, or a :class:`~nxfx.targets.Target`.
        sdk: the Neuron SDK release that compiles, ``"2.26"`` … ``"2.33"``; default: the target's, which is the latest known.
        pipeline: a :class:`~nxfx.pipeline.Pipeline` or its text; default: ``Pipeline.default(target)``.
        ranges: input name → inclusive ``(low, high)`` that an integer input can hold, e.g. ``{"input_ids": (0, 128255)}``;
            enforced on each call.
        dynamic_shapes: as for ``torch.export.export``, keyed by the parameter names of ``forward``.
        strict: turn error findings into :class:`~nxfx.errors.PrepareError`.
        verify: run model and result on the example and on inputs like it that hold what breaks rewrites (ends of ranges, nan and
            infinities, other sizes where they are dynamic), and the graph before and after each pass; ``report.certificate`` tells what was
            run. Needs example arguments.
        training: keep gradients; without it calls run under ``no_grad``.
        check: when the boundary checks integer ranges: ``"always"`` (host tensors), ``"first"`` or ``"never"``. With ``"never"`` a
            value outside its range wraps, as in every layer below.
        restore_outputs: give int64 and float64 outputs in the model's dtypes; False leaves them in 32 bits, for a caller that
            goes on on the device.
        state_inputs: inputs (KV caches) that become buffers of the graph, so that a compiler can update them in place.
        share_state: False works on a deep copy of the model.
        final_weights: False where what is in the ``state_dict`` gets its values after the compile (a checkpoint loaded by name): no
            proof rests on them then.
        recompute_tables: where ``model.bfloat16()`` has rounded a table of frequencies (NX102), use what its module computes in
            float32: its ``original_inv_freq``, its ``rope_init_fn``, or a module made like it; only where that, rounded, is the table.
        max_traces: how often the model may be traced to follow both sides of the branches that read a tensor's value; k branches
            that meet again take k + 1. With 1 every such branch is refused.
        verify_each: check the graph's invariants after every pass (slow).
        observer: called as ``observer(pass_, graph_module, run)`` after each pass.

    Raises:
        CaptureError: names the construct that cannot be captured and the user's line.
        PrepareError: strict mode found errors, or verification found a difference; names the pass, the node and a reproducer.
        PassError: a pass failed; names it, the node and the user's line.
        RangeError: an example value lies outside its range.
        UsageError: unknown target, SDK release, pass, option or range name.
    """
    if not isinstance(model, torch.nn.Module):
        raise UsageError(f"prepare wants an nn.Module, not {type(model).__name__}")
    if check not in get_args(Check):
        raise UsageError(f"check is one of {', '.join(get_args(Check))}, not {check!r}")
    target = get_target(target, sdk)
    pipeline = _pipeline(pipeline, target)
    model = model if share_state else copy.deepcopy(model)

    def captured(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CapturedCall:
        def take() -> Capture:
            return capture(
                model,
                args,
                kwargs,
                dynamic_shapes=dynamic_shapes,
                ranges=ranges,
                training=training,
                state_inputs=state_inputs,
                max_traces=max_traces,
            )

        found = take()
        if not final_weights:
            found.forget_values(model.state_dict().keys())
        if recompute_tables:
            rewrites, found.premises = restore_tables(found.graph_module, found.sources, model)
            found.rewrites = [*found.rewrites, *rewrites]
        with without_autocast():
            boundary, report = _clean(found, take, pipeline, target, training, verify_each, observer)
        if not restore_outputs:
            boundary.leave_narrow(found.convention.output_count)
        call = CapturedCall(model, found, boundary, report, check=check, training=training)
        call.recipe = Recipe(take, pipeline, target, training)
        if strict and call.report.errors:
            raise PrepareError(f"{len(call.report.errors)} error findings\n{call.report}", call.report)
        return call

    prepared = PreparedModule(model, captured, training=training)
    if args is not None or kwargs is not None:
        call = prepared.capture(*(args or ()), **(kwargs or {}))
        if verify:
            from nxfx.verification.certify import certify

            certify(model, prepared, (args or (), kwargs or {}), call, strict=restore_outputs)
    elif verify:
        raise UsageError("verify=True runs the model: give prepare() example arguments")
    return prepared


def check(
    model: torch.nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    target: str | Target = "trn2",
    sdk: str | None = None,
    ranges: dict[str, tuple[int, int]] | None = None,
    variations: int = 1,
) -> Report:
    """Everything :func:`prepare` would find and do, as a report. Changes nothing and raises for no hazard of the model.

    The model also runs eagerly, on the example and, where values decide something, on other inputs like it (within ``ranges``):
    ``report.sites`` lists every place where a value reaches Python, a shape or the host, whether or not the model can be captured.
    A model that cannot be captured gives the report of the capture error, with a finding for each such line.

    Args:
        variations: on how many other inputs the model runs. The first turns the conditions on inputs that the example met
            (``x[0] == 1``); 0 leaves open which sites change with the input.
    """
    return examine(model, args, kwargs, target=target, sdk=sdk, ranges=ranges, variations=variations)[0]


def examine(
    model: torch.nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    target: str | Target = "trn2",
    sdk: str | None = None,
    pipeline: Pipeline | str | None = None,
    ranges: dict[str, tuple[int, int]] | None = None,
    variations: int = 1,
    observer: Observer | None = None,
) -> tuple[Report, CaptureError | None]:
    """:func:`check`, and the error where there was nothing to capture."""
    refused = None
    try:
        report = prepare(model, args, kwargs or {}, target=target, sdk=sdk, pipeline=pipeline, ranges=ranges, observer=observer).report
    except CaptureError as error:
        refused, report = error, error.report or Report()
        chosen = get_target(target, sdk)
        report.target, report.sdk = chosen.name, chosen.sdk
        if not report.errors:
            report.add([], [Finding("NX409", Severity.ERROR, " ".join(str(error).split()))])
    started = time.perf_counter()
    settle(report, observe(model, args, kwargs or {}, ranges or {}, variations), captured=refused is None)
    report.timings["observe"] = time.perf_counter() - started
    return report, refused


def _pipeline(pipeline: Pipeline | str | None, target: Target) -> Pipeline:
    if pipeline is None:
        return Pipeline.default(target)
    return Pipeline.parse(pipeline) if isinstance(pipeline, str) else pipeline


def _clean(
    found: Capture,
    again: Callable[[], Capture],
    pipeline: Pipeline,
    target: Target,
    training: bool,
    verify_each: bool,
    observer: Observer | None,
) -> tuple[Boundary, Report]:
    """Run the pipeline on a capture, hoist its boundary, write the report."""
    gm = found.graph_module
    context = PassContext(target, found.sources, training, premises=list(found.premises))
    report = Report(target.name, str(pipeline), sdk=target.sdk, captured_by=found.captured_by, timings=dict(found.timings))
    report.nodes["before"], before = len(gm.graph.nodes), wide_edges(gm)
    boundaries = []

    def finish() -> None:
        reshape_views(gm)
        boundary = hoist(gm, found.sources, context.requirements)
        boundary.largest_size = INT32[1] if context.assumed_sizes else None
        boundaries.append(boundary)

    started = time.perf_counter()
    try:
        result = pipeline.run(gm, context, verify_each=verify_each, observer=observer, finish=finish)
    except PassError as error:
        _reproduce(error, again, pipeline, context)
        raise
    report.timings["pipeline"] = time.perf_counter() - started
    _fill(report, result, context, found)
    after = wide_edges(gm)
    report.wide_edges = {"before": before["edges"], "after": after["edges"], "forced": after["forced"]}
    report.compiler_args = compiler_args(gm, target, context.float32_products)
    report.nodes["after"] = len(gm.graph.nodes)
    return boundaries[0], report


def _fill(report: Report, result: PipelineResult, context: PassContext, found: Capture) -> None:
    report.add(found.rewrites + result.rewrites, found.findings + result.findings)
    report.premises = list(dict.fromkeys(context.premises))
    report.requirements = dict(context.requirements)
    report.float32_uses = dict(context.float32_uses)
    report.timings |= {run.name: run.seconds for run in result.runs}


def _reproduce(error: PassError, again: Callable[[], Capture], pipeline: Pipeline, context: PassContext) -> None:
    """Leave a stand-alone script that fails the same way; the graph before the failing pass is captured anew."""
    try:
        position = pipeline.names.index(error.pass_name)
        fresh = again()
        before = PassContext(context.target, fresh.sources, context.training)
        pipeline.part(0, position).run(fresh.graph_module, before)
        failing = pipeline.part(position, position + 1)
        error.reproducer = reproducer.write_reproducer(fresh.graph_module, failing, error, before)
        error.args = (f"{error.args[0]}\nreproducer: {error.reproducer}",)
    except Exception as second:  # the pass's own error is what the user must see
        error.args = (f"{error.args[0]}\n(no reproducer: {type(second).__name__}: {second})",)
