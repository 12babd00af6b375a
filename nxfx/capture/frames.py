"""Each captured node's stack trace holds every frame of the model's own code, whatever the function is called.

``torch.export`` keeps only frames of functions named ``forward`` (measured on 2.9 and 2.13), so that a line in a helper is
reported as the line that calls it. A retrace (``run_decompositions``) runs the body of a region (autocast, grad mode) as generated code,
whose lines are nobody's. Private torch API used here, and nowhere else in nxfx: ``TracerBase._filter_traceback_frames``, the classes of
the two region ops, ``fx.traceback.preserve_node_meta``.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch.fx import traceback as node_meta
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


_REGIONS = (torch.ops.higher_order.wrap_with_autocast, torch.ops.higher_order.wrap_with_set_grad_enabled)


@contextlib.contextmanager
def traces_in_regions() -> Iterator[None]:
    """While the block runs, a retraced region gives each node the meta of the node in its body, as torch does for ``cond``."""
    originals = [(type(region), type(region).__call__) for region in _REGIONS]
    for kind, original in originals:
        kind.__call__ = _node_by_node(original)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for kind, original in originals:
            kind.__call__ = original  # type: ignore[method-assign]


def lend_traces(gm: fx.GraphModule) -> None:
    """A retrace makes views of written memory anew once all ops have run: without a line of their own they take their operand's."""
    for node in gm.graph.nodes:
        traced = [n for n in node.all_input_nodes if "stack_trace" in n.meta]
        if node.op == "call_function" and "stack_trace" not in node.meta and traced:
            node.meta |= {key: traced[0].meta[key] for key in ("stack_trace", "nn_module_stack") if key in traced[0].meta}


def _node_by_node(call: Any) -> Any:
    def interpreted(region: Any, *args: Any, **kwargs: Any) -> Any:
        with node_meta.preserve_node_meta():
            return call(region, *(fx.Interpreter(a).run if isinstance(a, fx.GraphModule) else a for a in args), **kwargs)

    return interpreted
