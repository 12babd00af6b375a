"""A cheap way to a functional ATen graph: traced on fakes without `torch.export`, for tables of one-line models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from harness import Captured
from torch.fx.experimental.proxy_tensor import make_fx

from nxfx.analysis.provenance import Role, Source
from nxfx.pipeline import PassContext


def trace(model: Any, args: Sequence[torch.Tensor], *, ranges: dict[str, tuple[int, int]] | None = None) -> Captured:
    """The graph of a function without mutation that returns a tuple; its inputs are called ``args_0``, ``args_1`` ... as in export.

    Composite ops are taken apart, there are no stack traces, and lifted constants are ``get_attr`` nodes.
    """
    gm = make_fx(lambda *inputs: model(*inputs), tracing_mode="fake", _allow_non_fake_inputs=True)(*args)
    sources: dict[str, Source] = {}
    for position, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        name = f"args_{position}"
        sources[node.name] = Source(name, Role.INPUT, range=(ranges or {}).get(name))
    for node in gm.graph.find_nodes(op="get_attr"):
        sources[node.name] = Source(str(node.target), Role.CONSTANT, getattr(gm, str(node.target)))
    return Captured(gm, PassContext(sources=sources), [])
