"""A model that counts in Python: captured with its counters as buffers where the graph can compute them, as it is where not."""

from __future__ import annotations

from dataclasses import dataclass, field

from nxfx.capture.merging.merge import merged
from nxfx.capture.path import Traced, Tracer
from nxfx.capture.state import Change, Place, writing_line
from nxfx.errors import CaptureError
from nxfx.report.rewrites import Kind, Rewrite

_MOST_TRIALS = 4  # captures that leave out the counters which the one before was refused for


@dataclass
class Counted:
    """The capture, and why integers that forward changes are not in it: by where they stand."""

    path: Traced
    stays: dict[Place, str] = field(default_factory=dict)


def captured(tracer: Tracer, max_traces: int) -> Counted:
    """The model as one graph. Integers that ``forward`` changes become 0-d buffers of it where nothing asks Python for them.

    Raises:
        CaptureError: the model cannot be captured.
    """
    plain, refusal = None, None
    try:
        plain = merged(tracer, max_traces)
    except CaptureError as error:
        refusal = error
    counters, stays = dict(tracer.counted), dict[Place, str]()
    for _ in range(_MOST_TRIALS):
        if not counters:
            break
        tracer.counters, tracer.inexact = frozenset(counters), set()
        path, reason = _tried(tracer, max_traces)
        if path is not None:
            path.session.rewrites += [_rewrite(tracer, change) for change in counters.values()]
            return Counted(path, stays)
        refused = [place for place, change in counters.items() if change.path in tracer.inexact] or list(counters)
        keys = {key for _, key in refused}  # the same attribute of another layer would be refused next
        for place in [p for p in counters if p[1] in keys]:
            stays[place] = reason
            del counters[place]
    if plain is None:
        assert refusal is not None
        raise refusal
    return Counted(plain, stays)


def _tried(tracer: Tracer, max_traces: int) -> tuple[Traced | None, str]:
    try:
        path = merged(tracer, max_traces)
    except CaptureError as error:
        findings = error.report.findings if error.report else []
        culprit = next((f for f in findings if f.code == "NX406"), next(iter(findings), None))
        message = culprit.message if culprit is not None else str(error).splitlines()[0]
        return None, message + (f" at {culprit.location}" if culprit is not None and culprit.location.file else "")
    if tracer.inexact:  # the model has caught the refusal
        return None, next(f.message for f in path.session.errors if f.code == "NX406")
    return path, ""


def _rewrite(tracer: Tracer, change: Change) -> Rewrite:
    location = writing_line(tracer.model, change)
    return Rewrite("capture", "state.counter-buffer", Kind.EXACT, location, f"self.{change.path}, a Python integer", "a 0-d int64 buffer")
