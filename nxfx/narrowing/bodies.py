"""Narrow values across the edge of a higher-order op: operand, placeholder, output and result change together."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from nxfx.graph import meta
from nxfx.graph.builder import NodeBuilder
from nxfx.graph.higher_order import Slot, outputs_of

aten = torch.ops.aten


def agreeing(slots: list[Slot], wanted: list[Slot]) -> list[Slot]:
    """``wanted`` less those that share an operand with a slot that is not: a node is read in one dtype by one op."""
    while True:
        others = {v for s in slots if s not in wanted for v in s.operands if isinstance(v, fx.Node)}
        kept = [s for s in wanted if others.isdisjoint(v for v in s.operands if isinstance(v, fx.Node))]
        if len(kept) == len(wanted):
            return kept
        wanted = kept


def retype(slot: Slot, dtype: torch.dtype, made_by: str) -> None:
    """The bodies take and return ``slot`` in ``dtype``; casts there that this makes superfluous go, others appear."""
    for placeholder in slot.placeholders:
        _retype_placeholder(placeholder, dtype, NodeBuilder(placeholder.graph, made_by))
    for body, position in slot.outputs:
        _retype_output(body, position, dtype, NodeBuilder(body.graph, made_by))


def _retype_placeholder(placeholder: fx.Node, dtype: torch.dtype, build: NodeBuilder) -> None:
    wide = meta.val(placeholder).dtype
    users = list(placeholder.users)
    placeholder.meta["val"] = meta.retype(meta.val(placeholder), dtype)
    placeholder.meta.pop("tensor_meta", None)
    rest = []
    for user in users:
        if not _casts(user, dtype):
            rest.append(user)
        elif all(reader.op != "output" for reader in user.users):  # a body's output must not alias its input
            user.replace_all_uses_with(placeholder)
            placeholder.graph.erase_node(user)
    if rest:
        with build.after(placeholder, rest[0]):
            up = build.cast(placeholder, wide)
        for user in rest:
            user.replace_input_with(placeholder, up)


def _retype_output(body: fx.GraphModule, position: int, dtype: torch.dtype, build: NodeBuilder) -> None:
    (output,) = body.graph.find_nodes(op="output")
    results: Any = list(outputs_of(body))
    returned = results[position]
    inner = returned.args[0] if returned.target is aten._to_copy.default and set(returned.kwargs) == {"dtype"} else None
    with build.before(output, returned):
        if inner is None or meta.dtype_of(inner) != dtype:
            narrow = build.cast(returned, dtype)
        elif inner.op == "placeholder":
            narrow = build.call(aten.clone.default, inner)
        else:
            narrow = inner
    results[position] = narrow
    returns = output.args[0]
    output.args = (tuple(results) if isinstance(returns, tuple) else results if isinstance(returns, list) else results[0],)
    if not returned.users and returned.op == "call_function":
        body.graph.erase_node(returned)


def _casts(node: fx.Node, dtype: torch.dtype) -> bool:
    return node.target is aten._to_copy.default and dict(node.kwargs) == {"dtype": dtype}
