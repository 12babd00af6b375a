"""Which line of the model changes Python state, or draws from a random generator of the host: found by looking after every line.

A run under a line trace is slow, so it is made only where a run without one showed that something changed.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

import numpy

from nxfx.capture.session import location_of, rank_of
from nxfx.report.locations import Location


@dataclass
class Probe:
    """Something to look at after every line: ``read`` gives what stands there now, in a form that compares."""

    name: str
    read: Callable[[], Hashable]


def generators() -> list[Probe]:
    """The host's global random generators."""
    return [
        Probe("Python's random", random.getstate),
        Probe("numpy.random", lambda: repr(numpy.random.get_state(legacy=False))),
    ]


@dataclass
class Write:
    """``frame``'s line changed what ``probe`` looks at, ``count`` times."""

    location: Location
    count: int = 1


Found = dict[str, dict[tuple[str, int], Write]]


def written_lines(run: Callable[[], Any], probes: list[Probe]) -> Found:
    """Run ``run``; probe name → place → the line that changed it.

    A line that calls the model's own code is not blamed for what a line in there did.
    """
    tracer = _Tracer(probes)
    before = sys.gettrace()
    sys.settrace(tracer.called)
    try:
        run()
    except Exception:  # what ran until then was watched; the run without a trace has told of the error
        pass
    finally:
        sys.settrace(before)
        tracer.look()
    return tracer.found


class _Tracer:
    def __init__(self, probes: list[Probe]) -> None:
        self.probes = probes
        self.seen = [p.read() for p in probes]
        self.found: Found = {p.name: {} for p in probes}
        self.last: Location | None = None

    def called(self, frame: FrameType, event: str, argument: Any) -> Any:
        if not rank_of(frame.f_code.co_filename):
            return None  # a frame of torch: what it calls is asked about anew
        self.look()
        self.last = location_of(frame)
        return self.stepped

    def stepped(self, frame: FrameType, event: str, argument: Any) -> Any:
        self.look()
        if event == "return":
            back = next(_model_frames(frame.f_back), None)
            self.last = location_of(back) if back is not None else None
        else:
            self.last = location_of(frame)
        return self.stepped

    def look(self) -> None:
        """Blame the line that ran last for what is different now."""
        for position, probe in enumerate(self.probes):
            now = probe.read()
            if now == self.seen[position]:
                continue
            self.seen[position] = now
            if self.last is not None:
                writes = self.found[probe.name]
                place = (self.last.file, self.last.line)
                if place in writes:
                    writes[place].count += 1
                else:
                    writes[place] = Write(self.last)


def _model_frames(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        if rank_of(frame.f_code.co_filename):
            yield frame
        frame = frame.f_back
