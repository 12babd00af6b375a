"""Why an integer stays 64 bits wide, and what is assumed of inputs: in words."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from nxfx.analysis.intervals import INT32, INT64, Interval, Ranges
from nxfx.analysis.provenance import Role
from nxfx.graph import meta
from nxfx.pipeline import PassContext
from nxfx.report.findings import Finding, Severity

_BOUND_IT = "bound it in the model, e.g. with clamp or remainder"


def op_name(node: fx.Node) -> str:
    """The op's name as the user knows it: ``add`` for ``aten.add.Tensor``, ``topk`` for one of its outputs."""
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        return op_name(node.args[0])
    return str(getattr(node.target, "__name__", node.target)).split(".")[0]


def why_kept(
    node: fx.Node, bounds: Interval | None, ranges: Ranges, context: PassContext
) -> tuple[str, str, str]:
    """Code, reason and fix for a value that may not fit int32."""
    culprit = ranges.culprit_name(node)
    fix = f'declare ranges={{"{culprit}": (low, high)}}' if culprit is not None else _BOUND_IT
    if node.op == "call_function":
        return "NX301", f"`{op_name(node)}` {_reach(bounds)}", fix
    source = context.sources.get(node.name)
    if source is None or context.is_body:
        return "NX301", f"`{node.name}`, an operand of a higher-order op, {_reach(bounds)}", fix
    if source.role in (Role.BUFFER, Role.PARAMETER, Role.CONSTANT) and source.is_known:
        return "NX306", f"`{source.name}` holds values beyond int32", "store it in 32 bits, or split it"
    return "NX301", f"`{source.name}` may hold values beyond int32", fix


def _reach(bounds: Interval | None) -> str:
    if bounds is None or bounds == INT64:
        return "has no known bound, or may pass the end of int64"
    return f"may reach {_in_words(bounds[1] if bounds[1] > INT32[1] else bounds[0])}"


def _in_words(value: int) -> str:
    size, sign = abs(value), "-" if value < 0 else ""
    if size & (size - 1) == 0:
        return f"{sign}2^{size.bit_length() - 1}"
    return str(value) if size < 2**40 else f"{sign}2^{size.bit_length() - 1} and more"


def assumptions(gm: fx.GraphModule, ranges: Ranges, context: PassContext) -> Iterator[Finding]:
    """One finding for each undeclared input, and each unbounded dynamic dimension, that is taken to fit int32."""
    for node, requirement in ranges.requirements.items():
        name = context.sources[node.name].name
        if requirement.basis == "assumed" and name in context.requirements:
            tighter = requirement.bounds != INT32
            low, high = requirement.bounds
            what = f"stay within [{low}, {high}], where what is computed from it fits int32" if tighter else "fit int32"
            message = f"`{name}` is taken to {what}; the boundary refuses anything else"
            yield Finding.at(node, "NX303", Severity.INFO, message, f'declare ranges={{"{name}": (low, high)}}, what it can really hold')
    for symbol in sorted(ranges.dims, key=str):
        node_with = next((n for n in gm.graph.nodes if _has_dimension(n, symbol)), None)
        if node_with is not None:
            message = f"the dynamic dimension {symbol} of `{node_with.name}` is taken to stay below 2^31; the boundary refuses more"
            yield Finding.at(node_with, "NX303", Severity.INFO, message, "give it a maximum in dynamic_shapes")


def _has_dimension(node: fx.Node, symbol: Any) -> bool:
    sizes = getattr(meta.val(node), "shape", ())
    return any(isinstance(s, torch.SymInt) and s.node.expr == symbol for s in sizes)
