"""``nxfx lower``: the cleaned graph as StableHLO or HLO, and what stands in it."""

from __future__ import annotations

from dataclasses import dataclass

from nxfx import api
from nxfx.cli import console, specs
from nxfx.errors import MissingDependencyError, UsageError
from nxfx.handoff import mlir, stablehlo, xla
from nxfx.handoff.lowered import Lowered
from nxfx.pipeline import Pipeline
from nxfx.targets import get_target


@dataclass(frozen=True)
class Request:
    """What was asked for on the command line."""

    spec: str
    dialect: str
    weights: str
    pipeline: str | None
    target: str
    sdk: str | None
    ranges: dict[str, tuple[int, int]]


def run(request: Request) -> Lowered:
    """Prepare the model and lower its graph.

    Raises:
        UsageError: wrong SPEC, pass, option, target, SDK release or range name, or the lowering is not installed.
        LoweringError: the lowering refuses; names the op and the user's line.
        NxfxError: the model or a pass failed.
    """
    target = get_target(request.target, request.sdk)
    pipeline = Pipeline.default(target) if request.pipeline is None else Pipeline.parse(request.pipeline)
    if request.dialect == "hlo" and request.weights == "inline":
        raise UsageError("--weights inline goes with --to stablehlo: torch-xla passes weights as arguments")
    try:  # before the model is loaded
        if request.dialect == "stablehlo":
            mlir.torch_mlir()
        else:
            xla.torch_xla()
    except MissingDependencyError as error:
        raise UsageError(str(error)) from None
    with console.progress() as progress:
        progress(f"loading {request.spec}")
        loaded = specs.load(request.spec)
        prepared = loaded.prepared
        if prepared is None:
            progress("capturing")
            prepared = api.prepare(
                loaded.model,
                loaded.args,
                loaded.kwargs,
                target=target,
                pipeline=pipeline,
                ranges=request.ranges or None,
                observer=lambda step, graph_module, run: progress(f"after {step.name}"),
            )
        progress(f"lowering to {request.dialect}")
        if request.dialect == "hlo":
            return xla.lower(prepared)
        return stablehlo.lower(prepared, weights="inline" if request.weights == "inline" else "arguments")
