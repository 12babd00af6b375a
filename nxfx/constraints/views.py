"""Several views of one tensor, as PyTorch/XLA traces them: slices instead."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from nxfx.analysis.intervals import arg
from nxfx.analysis.range_rules import overloads
from nxfx.constraints.base import Checker, Rule, items
from nxfx.constraints.operators import op_name
from nxfx.graph import meta
from nxfx.graph.slices import is_static

aten = torch.ops.aten


def _split(check: Checker, node: fx.Node) -> None:
    """``split``, ``chunk`` and ``unbind``. Without functionalisation, as legacy Neuron runs, what their views hold can be wrong data.

    Sources: aws-neuron-sdk #1140, pytorch/xla #8640.
    """
    value = node.args[0].meta["val"] if meta.is_tensor(node.args[0]) else None  # type: ignore[union-attr]
    if check.target.legacy and value is not None and is_static(*value.shape) and items(node) is not None:
        check.later(lambda: _as_slices(check, node))


def _as_slices(check: Checker, node: fx.Node) -> None:
    source, parts = node.args[0], node.meta["val"]
    assert isinstance(source, fx.Node)
    unbind = node.target is aten.unbind.int
    dim = arg(node, 1, "dim", 0) if unbind else arg(node, 2, "dim", 0)
    dim %= source.meta["val"].dim()
    starts = [0]
    for part in parts:
        starts.append(starts[-1] + (1 if unbind else part.shape[dim]))
    for index, reader in items(node) or []:
        index %= len(parts)
        start, stop = starts[index], starts[index + 1]
        value = meta.part(source.meta["val"], dim, range(start, stop), keep=not unbind)
        with check.build.before(reader):
            made = (
                check.build.known(value, aten.select.int, source, dim, start)
                if unbind
                else check.build.known(value, aten.slice.Tensor, source, dim, start, stop)
            )
        reader.replace_all_uses_with(made)
        reader.graph.erase_node(reader)
    check.rewritten(node, "split-views", op_name(node), "select" if unbind else "slice")


RULES: dict[Any, Rule] = dict.fromkeys(
    [aten.unbind.int, *overloads("split", "split_with_sizes", "chunk", "unsafe_split", "unsafe_split_with_sizes", "unsafe_chunk")], _split
)
