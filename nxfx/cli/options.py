"""The options that several commands share, and how they prepare a model with them.

torch is imported when a model is prepared, not when the options are declared: help and usage errors do not wait.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from nxfx.cli.specs import Loaded
    from nxfx.pipeline import Pipeline
    from nxfx.prepared import PreparedModule
    from nxfx.targets import Target

REPORT_FORMATS = ("text", "json")

Spec = Annotated[
    str,
    typer.Argument(
        metavar="SPEC",
        show_default=False,
        help="package.module:factory, path/file.py:factory, or a .pt2 file. The factory takes nothing and "
        "returns model, (model, args) or (model, args, kwargs).",
    ),
]
TargetName = Annotated[str, typer.Option("--target", metavar="NAME", help="inf2, trn1, trn2 or trn3.")]
Sdk = Annotated[
    str | None,
    typer.Option(
        "--sdk",
        metavar="RELEASE",
        show_default=False,
        help="The Neuron SDK release that compiles, 2.26 to 2.33. Default: the latest known.",
    ),
]
PipelineText = Annotated[
    str | None,
    typer.Option(
        "--pipeline",
        metavar="TEXT",
        show_default=False,
        help="Passes to run, in order: name{option=value; ...}, name, ... 'default' stands for the default ones, "
        "'' for none.",
    ),
]
Ranges = Annotated[
    list[str] | None,
    typer.Option(
        "--range",
        metavar="INPUT=LOW:HIGH",
        show_default=False,
        help="What an integer input can hold, both ends included; may be repeated.",
    ),
]
Traceback = Annotated[bool, typer.Option("--traceback", help="Show the Python traceback of an error too.")]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="FILE", show_default=False, help="Write there instead of standard output."),
]

ReportFormat = Annotated[
    str, typer.Option("--format", "-f", metavar="|".join(REPORT_FORMATS), help="text for people, json for programs.")
]


@dataclass(frozen=True)
class Preparation:
    """How a command prepares the model: ``--pipeline``, ``--target``, ``--sdk`` and ``--range``.

    Raises:
        UsageError: :meth:`chosen` meets an unknown pass, option, target or SDK release; :meth:`prepare` an unknown range name.
    """

    pipeline: str | None
    target: str
    sdk: str | None
    ranges: dict[str, tuple[int, int]]

    def chosen(self) -> tuple[Target, Pipeline]:
        """The target and the passes."""
        from nxfx.pipeline import Pipeline
        from nxfx.targets import get_target

        target = get_target(self.target, self.sdk)
        return target, Pipeline.default(target) if self.pipeline is None else Pipeline.parse(self.pipeline)

    def arguments(self, progress: Callable[[str], None]) -> dict[str, Any]:
        """What ``api.prepare`` and ``api.examine`` are given."""
        target, pipeline = self.chosen()
        observer = lambda step, graph_module, run: progress(f"after {step.name}")  # noqa: E731
        return {"target": target, "pipeline": pipeline, "ranges": self.ranges or None, "observer": observer}

    def prepare(self, loaded: Loaded, progress: Callable[[str], None], **overrides: Any) -> PreparedModule:
        """The prepared model; ``overrides`` replace what :meth:`arguments` gives."""
        from nxfx import api

        progress("capturing")
        return api.prepare(loaded.model, loaded.args, loaded.kwargs, **{**self.arguments(progress), **overrides})
