"""What capture learns while the model runs under interception, outside the module: export forbids to write that."""

from __future__ import annotations

import contextlib
import functools
import linecache
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import fx

from nxfx.capture.merging.standpoint import Standpoint, look
from nxfx.capture.trace import Trace, module_path, node_of
from nxfx.errors import CaptureError
from nxfx.report.findings import Finding, Severity
from nxfx.report.locations import Location, frame_rank
from nxfx.report.report import Report
from nxfx.report.rewrites import Kind, Rewrite

_MOST_STANDPOINTS = 128  # a loop that asks more often is not followed anyway

rank_of = functools.lru_cache(maxsize=4096)(frame_rank)


@dataclass
class Site:
    """A place where Python reads a tensor's value.

    Attributes:
        kind: ``"if"``, ``"while"``, ``"assert"``, ``"bool"`` ..., or the method: ``"item"``, ``"tolist"``.
        location: the user's line; an installed library's where no line is the user's own.
        innermost: the line that reads the value, be it the user's or a library's.
        condition: what was read, as a 0-d bool tensor of its own (the model may write the original later); None for
            reads that are not conditions, and where a number from ``.item()`` went through more than simple arithmetic.
        answer: what Python was told.
        exhausted: the cap on repetitions was reached here.
        alive: tensors that the rest of the model may use, as they are at this moment.
    """

    kind: str
    location: Location
    innermost: Location
    condition: torch.Tensor | None = None
    answer: bool | None = None
    exhausted: bool = False
    alive: list[torch.Tensor] = field(default_factory=list)
    standpoint: Standpoint | None = None

    @property
    def marks(self) -> list[torch.Tensor]:
        """What the trace must keep of this moment, so that paths can be joined here."""
        return ([] if self.condition is None else [self.condition]) + self.alive


@dataclass
class Copied:
    """``copy`` stands for a view of ``base``, ``base[i]`` with a tensor ``i``: right while neither is written.

    Attributes:
        copy, base: nodes.
        since: nothing was lost up to this node: the copy was made, or put back, there.
        result, place: the object that was returned, and for which base and index.
        versions: the positions among the index and their versions.
    """

    copy: fx.Node
    base: fx.Node
    since: fx.Node
    result: Any
    place: tuple[Any, Any]
    versions: list[tuple[torch.Tensor, object]]
    location: Location


@dataclass
class Session:
    """One run of a model under interception. Use it once.

    Attributes:
        decisions: what to answer at the first, second ... branch that reads a tensor; ``True`` beyond the end.
        training: the graph will be differentiated.
        loop_cap: how often one ``while`` may be answered in a row before it is told to end.
        findings: what the user should know; an error among them means that the capture cannot be used.
        rewrites: changes made while the model ran.
        sites: branches on a tensor's value, in order of execution. The trace followed ``answer`` at each of them: it is
            one path through the model, not the model.
        assertions: tensor assertions that the trace took to hold, each reported as NX407.
        reachable: gives the arguments and buffers, and what ``forward`` has changed in Python state so far.
        reads: ``.item()`` and ``.tolist()`` whose number became a symbol.
        found: id of a tensor of positions → the condition that gave them.
        counts: integers of the model are lent to this run as counters.
        inexact: names of those that were asked for a number of Python's.
    """

    decisions: Sequence[bool] = ()
    loop_cap: int = 64
    training: bool = False
    findings: list[Finding] = field(default_factory=list)
    rewrites: list[Rewrite] = field(default_factory=list)
    sites: list[Site] = field(default_factory=list)
    assertions: list[Site] = field(default_factory=list)
    reads: list[Site] = field(default_factory=list)
    found: dict[int, Any] = field(default_factory=dict)
    counts: bool = False
    inexact: set[str] = field(default_factory=set)
    trace: Trace = field(default_factory=Trace)
    item_sources: dict[str, tuple[torch.Tensor, object]] = field(default_factory=dict)
    copies: list[Copied] = field(default_factory=list)
    entry: FrameType | None = None
    is_paused: bool = False
    watched: Any = None
    reachable: Callable[[], tuple[Any, Any]] | None = None
    repetitions: dict[tuple[str, int], tuple[FrameType, int]] = field(default_factory=dict)

    def watch_copy(
        self,
        copy: torch.Tensor,
        base: torch.Tensor,
        result: Any,
        place: tuple[Any, Any],
        versions: list[tuple[torch.Tensor, object]],
    ) -> None:
        """``copy`` was taken where eager takes a view of ``base``; :class:`Copied` has the rest."""
        node, source = node_of(copy), node_of(base)
        if node is not None and source is not None:
            self.copies.append(Copied(node, source, node, result, place, versions, self.location()))

    def marks(self) -> list[torch.Tensor]:
        """The marks of all sites, in order."""
        return [mark for site in self.sites for mark in site.marks]

    def mark_counts(self) -> list[int]:
        return [len(site.marks) for site in self.sites]

    @property
    def errors(self) -> list[Finding]:
        return [f for f in self.findings if f.severity is Severity.ERROR]

    def close(self) -> None:
        """Let go of everything that belonged to the trace; the record stays."""
        for site in self.sites:
            if site.standpoint is not None:
                site.standpoint.leave()
        self.reachable = None
        if self.watched is not None:
            del self.watched.evaluate_sym_node  # the method of the class shows again
        self.entry = self.watched = None
        self.repetitions.clear()
        self.copies.clear()
        self.item_sources.clear()
        self.found.clear()
        self.trace = Trace()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing is intercepted inside: torch's own behaviour."""
        before, self.is_paused = self.is_paused, True
        try:
            yield
        finally:
            self.is_paused = before

    def frames(self) -> list[FrameType]:
        """The model's own frames and its libraries', innermost first."""
        return model_frames(sys._getframe(1), self.entry)

    def stand(self) -> Standpoint | None:
        """Where the run is, None where nobody asked to know."""
        if self.reachable is None or len(self.sites) > _MOST_STANDPOINTS:
            return None
        frames: list[FrameType] = []
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame is not self.entry:
            file = frame.f_code.co_filename
            if frames or rank_of(file) or file.startswith("<"):  # code without a file may be the model's
                frames.append(frame)
            frame = frame.f_back
        with self.paused():
            return look(frames, *self.reachable()) if frames else None

    def location(self) -> Location:
        """The user's line that is running; an installed library's where no line is the user's own."""
        frames = self.frames()
        return location_of(
            next((f for f in frames if rank_of(f.f_code.co_filename) == 2), frames[0] if frames else None)
        )

    def site(self, kind: str, condition: torch.Tensor | None = None, answer: bool | None = None) -> Site:
        """The line that is running, as a site."""
        frames = self.frames()
        return Site(kind, self.location(), location_of(frames[0] if frames else None), condition, answer)

    def note(
        self, code: str, severity: Severity, message: str, fix: str = "", location: Location | None = None
    ) -> Finding:
        """Record a finding at the user's line."""
        finding = Finding(code, severity, message, location or self.location(), "", fix)
        self.findings.append(finding)
        return finding

    def refuse(
        self, code: str, construct: str, message: str, fix: str = "", location: Location | None = None
    ) -> CaptureError:
        """Record an error and return the exception that ends the capture. It stands even if the model catches it."""
        finding = self.note(code, Severity.ERROR, message, fix, location)
        where = f"{finding.location}: {finding.location.source}" if finding.location.file else str(finding.location)
        text = f"{where}\n  {message}" + (f"\n  Write instead: {fix}" if fix else "")
        return CaptureError(text, construct=construct, report=Report(findings=[finding]))

    def rewrote(self, rule: str, kind: Kind, before: str, after: str, bound: str = "") -> None:
        """Record a rewrite at the user's line."""
        self.rewrites.append(Rewrite("capture", rule, kind, self.location(), before, after, 1, bound))


def model_frames(frame: FrameType | None, entry: FrameType | None) -> list[FrameType]:
    """From ``frame`` out to ``entry``: the model's own frames and its libraries', innermost first."""
    frames: list[FrameType] = []
    while frame is not None and frame is not entry:
        if rank_of(frame.f_code.co_filename):
            frames.append(frame)
        frame = frame.f_back
    return frames


def location_of(frame: FrameType | None) -> Location:
    """The line that ``frame`` is at."""
    if frame is None:
        return Location(module=module_path())
    code = frame.f_code
    source = linecache.getline(code.co_filename, frame.f_lineno).strip()
    return Location(code.co_filename, frame.f_lineno, source, module_path(), code.co_name)
