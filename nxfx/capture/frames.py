"""Each captured node's stack trace holds every frame of the model's own code, whatever the function is called.

``torch.export`` keeps only frames of functions named ``forward`` (measured on 2.9 and 2.13), so that a line in a helper is
reported as the line that calls it. Private torch API used here, and nowhere else in nxfx: ``TracerBase._filter_traceback_frames``.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator

from torch.fx.proxy import TracerBase

from nxfx.capture import shell
from nxfx.report.locations import frame_rank


@contextlib.contextmanager
def whole_traces() -> Iterator[None]:
    """While the block runs, nodes traced under nxfx's shell remember all frames of the model's code; other traces are as ever."""
    original = TracerBase._filter_traceback_frames

    def keep(tracer: TracerBase, stack: traceback.StackSummary) -> traceback.StackSummary:
        inside = [i for i, frame in enumerate(stack) if frame.filename == shell.__file__]
        if not inside:
            return original(tracer, stack)
        return traceback.StackSummary.from_list([f for f in stack[inside[-1] + 1 :] if frame_rank(f.filename)])

    TracerBase._filter_traceback_frames = keep  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        TracerBase._filter_traceback_frames = original  # type: ignore[method-assign]
