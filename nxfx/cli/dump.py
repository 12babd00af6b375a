"""``nxfx dump``: the cleaned graph, or how it came about."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx

from nxfx.cli import console, specs
from nxfx.cli.options import Preparation
from nxfx.errors import UsageError
from nxfx.graph import printing
from nxfx.pipeline import Pass, PassContext, PassResult, PassRun
from nxfx.report.locations import locate

CAPTURE = "capture"


@dataclass(frozen=True)
class Request:
    """What was asked for on the command line."""

    spec: str
    format: str
    diff: bool
    print_after: str | None


class AfterCapture(Pass):
    """Does nothing: it stands first so that the observer sees the captured graph."""

    name = CAPTURE

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> PassResult:
        return PassResult()


@dataclass
class Stage:
    """One rendering of the graph."""

    title: str
    graph: str


def where(node: fx.Node) -> str:
    """The user's line: path (short when it is below the current directory), number and source."""
    if "stack_trace" not in node.meta:
        return ""
    location = locate(node)
    if not location.file:
        return ""
    path = os.path.relpath(location.file) if location.file.startswith(os.getcwd() + os.sep) else location.file
    return f"{path}:{location.line}" + (f": {location.source}" if location.source else "")


_RENDERERS: dict[str, Callable[[fx.GraphModule], str]] = {
    "code": lambda gm: printing.code(gm, where),
    "text": printing.text,
    "table": lambda gm: printing.table(gm, where),
    "json": lambda gm: printing.to_json(gm, where),
    "dot": lambda gm: printing.dot(gm, where),
}


class Recorder:
    """The observer: renders the stages asked for, what their differences are taken from, and nothing else."""

    def __init__(self, request: Request, progress: Callable[[str], None]) -> None:
        self.request, self.progress = request, progress
        self.render = _RENDERERS[request.format]
        self.stages: list[Stage] = []
        self._latest: Stage | None = None

    def __call__(self, step: Pass, graph_module: fx.GraphModule, run: PassRun) -> None:
        self.progress(f"after {step.name}")
        wanted = self._wants(step, run)
        if not wanted and not self._keeps(step, run):
            return
        stale = run.changed or self._latest is None
        graph = self.render(graph_module) if stale else self._latest.graph  # type: ignore[union-attr]  # not None: not stale
        now = Stage(f"after {step.name}", graph)
        if wanted:
            self.add(now, _statistics(run))
        else:
            self._latest = now

    def _wants(self, step: Pass, run: PassRun) -> bool:
        asked = self.request.print_after
        return asked in ("all", step.name) or (asked == "changed" and run.changed)

    def _keeps(self, step: Pass, run: PassRun) -> bool:
        """Whether a later difference starts here: at the pass before when passes are shown, else at the capture."""
        if not self.request.diff:
            return False
        return step.name == CAPTURE or (run.changed and self.request.print_after is not None)

    def add(self, stage: Stage, note: str = "") -> None:
        """Show a stage: the graph itself, or its difference from the one kept last."""
        graph = stage.graph
        if self.request.diff and self._latest is not None:
            graph = printing.diff(self._latest.graph, graph, self._latest.title, stage.title)
        self.stages.append(Stage(f"{stage.title}{f' ({note})' if note else ''}", graph))
        self._latest = stage


def _statistics(run: PassRun) -> str:
    if run.name == CAPTURE:
        return f"{run.nodes_after} nodes"
    if not run.ran:
        return "nothing to do"
    made = f"{run.rewrites} rewrites, {run.findings} findings, {run.nodes_before} -> {run.nodes_after} nodes"
    return f"{'changed' if run.changed else 'unchanged'}: {made}, {run.seconds * 1e3:.1f} ms"


def run(request: Request, how: Preparation) -> str:
    """The text to print.

    Raises:
        UsageError: wrong SPEC, pass, option or target.
        NxfxError: the model or a pass failed.
    """
    _, pipeline = how.chosen()
    if request.print_after not in (None, "all", "changed", CAPTURE):
        pipeline.only(str(request.print_after))  # raises for a pass that is not in it, with the nearest name
    with console.progress() as progress:
        progress(f"loading {request.spec}")
        loaded = specs.load(request.spec)
        recorder = Recorder(request, progress)
        if loaded.prepared is not None:
            if request.diff or request.print_after:
                raise UsageError(
                    f"{request.spec!r} was prepared before it was saved: there is nothing to compare it with"
                )
            return recorder.render(loaded.prepared.graph_module)
        observed = pipeline.with_pass(AfterCapture, before=pipeline.names[0] if pipeline.names else None)
        stages = observed if request.diff or request.print_after else pipeline
        prepared = how.prepare(loaded, progress, pipeline=stages, observer=recorder)
        progress("printing")
        recorder.add(Stage("prepared", recorder.render(prepared.graph_module)))
        return _join(recorder.stages, request)


def _join(stages: list[Stage], request: Request) -> str:
    if request.print_after is None:
        return stages[-1].graph
    if request.format == "json":
        documents: list[dict[str, Any]] = [{"stage": s.title, "graph": json.loads(s.graph)} for s in stages]
        return json.dumps(documents, indent=2)
    comment = "//" if request.format == "dot" else "#"
    return "\n\n".join(f"{comment} {s.title}\n{s.graph or f'{comment} no difference'}" for s in stages)
