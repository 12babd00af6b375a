"""``meshgrid`` as the views that it is, so that what is known of its operands is known of its results."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from nxfx.analysis import dtype_rules
from nxfx.analysis.float_ops import dtype_of
from nxfx.analysis.integer_origin import IntegerOrigins
from nxfx.analysis.intervals import arg
from nxfx.graph import meta
from nxfx.graph.builder import NodeBuilder

aten = torch.ops.aten
_MESHGRIDS = (aten.meshgrid.default, aten.meshgrid.indexing)


def integer_grids(graph: fx.Graph, origins: IntegerOrigins) -> Iterator[fx.Node]:
    """Grids of low-precision values that are made of integers, each of whose results is read by itself."""
    for target in _MESHGRIDS:
        for node in graph.find_nodes(op="call_function", target=target):
            made_of = [origins.of(v) for v in node.args[0]]
            integer = any(m is not None and m.integer for m in made_of)
            low = all(dtype_rules.is_low_precision(dtype_of(v)) for v in node.all_input_nodes)
            static = all(type(s) is int for v in node.all_input_nodes for s in meta.val(v).shape)
            if integer and low and static and all(user.target is operator.getitem for user in node.users):
                yield node


def spread_grid(build: NodeBuilder, node: fx.Node) -> None:
    """Replace a grid by a view and an expansion for each of its results: equal bits."""
    sequences: Any = node.args[0]
    order = list(range(len(sequences)))
    if arg(node, 1, "indexing", "ij") == "xy" and len(order) > 1:
        order[:2] = [1, 0]
    for user in list(node.users):
        index = int(user.args[1])  # type: ignore[arg-type]
        value = meta.val(user)
        with build.before(user):
            ones = [1] * value.dim()
            ones[order[index]] = -1
            view = build.call(aten.view.default, sequences[index], ones)
            grid = build.call(aten.expand.default, view, list(value.shape))
        user.replace_all_uses_with(grid)
        build.graph.erase_node(user)
    build.graph.erase_node(node)
