"""``nxfx check``: the report of a preparation."""

from __future__ import annotations

from dataclasses import dataclass

from nxfx import api
from nxfx.cli import console, specs
from nxfx.errors import CaptureError
from nxfx.pipeline import Pipeline
from nxfx.report import Report
from nxfx.targets import get_target


@dataclass
class Result:
    """The report, and the error when there was no graph to report on."""

    report: Report
    error: CaptureError | None = None


def run(spec: str, pipeline: str | None, target: str, sdk: str | None, ranges: dict[str, tuple[int, int]]) -> Result:
    """Prepare the model that ``spec`` names and return the report.

    Raises:
        UsageError: wrong SPEC, pass, option, target, SDK release or range name.
        NxfxError: the model or a pass failed.
    """
    chosen = get_target(target, sdk)
    steps = Pipeline.default(chosen) if pipeline is None else Pipeline.parse(pipeline)
    with console.progress() as progress:
        progress(f"loading {spec}")
        loaded = specs.load(spec)
        if loaded.prepared is not None:
            return Result(loaded.prepared.report)
        progress("capturing")
        report, error = api.examine(
            loaded.model,
            loaded.args,
            loaded.kwargs,
            target=chosen,
            pipeline=steps,
            ranges=ranges or None,
            observer=lambda step, graph_module, run: progress(f"after {step.name}"),
        )
        return Result(report, error)
