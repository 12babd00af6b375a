"""Counting 64-bit edges: what is left of int64, float64 and complex128 between the ops of a graph."""

from __future__ import annotations

import torch
from torch import fx

from nxfx.analysis import dtype_rules, integer_ops
from nxfx.graph import meta, walk

aten = torch.ops.aten


def wide_edges(gm: fx.GraphModule) -> dict[str, int]:
    """64-bit tensor edges of ``gm`` and the bodies of its higher-order ops.

    Returns:
        ``edges``: from one op (or input) to another in 64 bits; ``forced``: between an op whose schema makes or takes int64 and the
        cast right next to it; ``kept``: how many values ``edges`` start from. Casts right behind inputs and right before outputs are
        the boundary's and are no edges, and neither is an input that is an output.
    """
    edges = forced = kept = 0
    for scope in walk.scopes(gm):
        for node in scope.graph_module.graph.nodes:
            if not dtype_rules.is_wide(meta.dtype_of(node)):
                continue
            kinds = [_kind(node, user) for user in node.users]
            edges += kinds.count("edge")
            forced += kinds.count("forced")
            kept += "edge" in kinds
    return {"edges": edges, "forced": forced, "kept": kept}


def wide_int64(gm: fx.GraphModule) -> int:
    """How many int64 values of ``gm`` and its bodies are computed with as int64 because they may not fit int32.

    What is made of 32 bits or fewer by a cast, or is cast down by every reader, fits.
    """
    return sum(
        meta.dtype_of(node) is torch.int64 and not _casts_up(node) and "edge" in (_kind(node, user) for user in node.users)
        for scope in walk.scopes(gm)
        for node in scope.graph_module.graph.nodes
    )


def _kind(node: fx.Node, user: fx.Node) -> str:
    source = node.op in ("placeholder", "get_attr")
    if user.op == "output":
        return "boundary" if source or _casts_up(node) else "edge"
    if user.target is integer_ops.METADATA_ASSERT:
        return "assertion"
    if source:
        return "boundary" if _casts_down(user) else "edge"
    made = integer_ops.is_forced(node) or integer_ops.demands_int64(node)
    taken = integer_ops.demands_int64(user)
    return "forced" if (made and (taken or _casts_down(user))) or (_casts_up(node) and taken) else "edge"


def _casts_down(node: fx.Node) -> bool:
    return node.target is aten._to_copy.default and not dtype_rules.is_wide(meta.dtype_of(node))


def _casts_up(node: fx.Node) -> bool:
    return node.target is aten._to_copy.default and not dtype_rules.is_wide(meta.dtype_of(node.args[0]))
