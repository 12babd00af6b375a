"""``nxfx check``: the report of a preparation."""

from __future__ import annotations

from dataclasses import dataclass

from nxfx import api
from nxfx.cli import console, specs
from nxfx.cli.options import Preparation
from nxfx.errors import CaptureError
from nxfx.report import Report


@dataclass
class Result:
    """The report, and the error when there was no graph to report on."""

    report: Report
    error: CaptureError | None = None


def run(spec: str, how: Preparation, variations: int = 1) -> Result:
    """Prepare the model that ``spec`` names and return the report.

    Raises:
        UsageError: wrong SPEC, pass, option, target, SDK release or range name.
        NxfxError: the model or a pass failed.
    """
    how.chosen()  # before the model is loaded
    with console.progress() as progress:
        progress(f"loading {spec}")
        loaded = specs.load(spec)
        if loaded.prepared is not None:
            return Result(loaded.prepared.report)
        progress("capturing")
        report, error = api.examine(loaded.model, loaded.args, loaded.kwargs, variations=variations, **how.arguments(progress))
        return Result(report, error)
