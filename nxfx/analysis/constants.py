"""Values that are made of constants only: what they are, computed once by the ops themselves."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import _disable_current_modes

from nxfx.analysis.provenance import Role, Source
from nxfx.analysis.views import VIEWS
from nxfx.graph import meta
from nxfx.graph.slices import is_static

aten = torch.ops.aten

# A larger constant costs more memory than it saves time.
_LARGEST = 1 << 20
_UNDEFINED = frozenset(
    {aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default, aten.empty_strided.default,
     aten.new_empty_strided.default}
)  # fmt: skip
_SHOWS = frozenset(
    {*VIEWS, aten.expand.default, aten.view.default, aten._unsafe_view.default, aten.unsqueeze.default, aten.squeeze.dim}
)


def written_constants(
    graph: fx.Graph, sources: Mapping[str, Source], writers: Collection[Any]
) -> dict[fx.Node, torch.Tensor]:
    """Nodes that other values need, made of constants by way of a write, and what they hold.

    Args:
        sources: ``get_attr`` node name → origin; constants that capture lifted count, buffers do not.
        writers: the ops that write.

    Returns:
        Node → a real tensor on the CPU, of the node's dtype, shape and strides. Nothing larger than 2**20 elements, no random
        ops, nothing uninitialised.
    """
    made = _Made(sources)
    through: set[fx.Node] = set()
    for node in graph.nodes:
        if made.of_constants(node) and (node.target in writers or any(n in through for n in node.all_input_nodes)):
            through.add(node)
    found: dict[fx.Node, torch.Tensor] = {}
    for node in through:
        if all(user in through for user in node.users):
            continue
        while node.target in _SHOWS and node.args[0] in through:  # a view costs nothing, what it shows may be smaller
            node = node.args[0]
        value = made.value(node) if node not in found else None
        if value is not None:
            found[node] = value
    return found


def constant_value(node: fx.Node, sources: Mapping[str, Source]) -> torch.Tensor | None:
    """What ``node`` holds when it is made of constants only, by way of anything; None otherwise. On the CPU, at most 2**20 elements."""
    made, order, seen, stack = _Made(sources), [], {node}, [node]
    while stack:
        current = stack.pop()
        order.append(current)
        fresh = [n for n in current.all_input_nodes if n not in seen]
        seen.update(fresh)
        stack += fresh
        if current.op == "placeholder":
            return None
    return made.value(node) if all(made.of_constants(n) for n in sorted(order)) else None


class _Made:
    def __init__(self, sources: Mapping[str, Source]) -> None:
        self._sources = sources
        self._constant: set[fx.Node] = set()
        self._values: dict[fx.Node, Any] = {}

    def of_constants(self, node: fx.Node) -> bool:
        """Whether ``node`` is; to be asked in graph order."""
        if self._is(node):
            self._constant.add(node)
            return True
        return False

    def _is(self, node: fx.Node) -> bool:
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or not is_static(*value.shape, *value.stride()) or value.numel() > _LARGEST:
            return False
        if node.op == "get_attr":
            source = self._sources.get(node.name)
            known = source is not None and source.role is Role.CONSTANT and source.is_known
            held = source.value if source is not None and known else None
            return held is not None and not isinstance(held, meta.FakeTensor) and not held.is_meta
        op = node.target
        if node.op != "call_function" or not isinstance(op, torch._ops.OpOverload) or op in _UNDEFINED:
            return False
        if op._schema.is_mutable or torch.Tag.nondeterministic_seeded in op.tags or op.namespace not in ("aten", "prims"):
            return False
        return all(n in self._constant for n in node.all_input_nodes)

    def value(self, node: fx.Node) -> torch.Tensor | None:
        """What ``node`` holds; None where the op cannot tell, or tells something of another dtype, shape or layout."""
        pending = [node]
        with torch.no_grad(), _disable_current_modes():
            while pending:
                current = pending[-1]
                missing = [n for n in current.all_input_nodes if n not in self._values]
                if missing:
                    pending += missing
                else:
                    self._values[pending.pop()] = self._computed(current)
        result, wanted = self._values[node], meta.val(node)
        if not isinstance(result, torch.Tensor) or result.dtype != wanted.dtype or result.shape != wanted.shape:
            return None
        return result if result.stride() == wanted.stride() or result.numel() < 2 else None

    def _computed(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            held = self._sources[node.name].value
            return None if held is None else held.detach().cpu()
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._values.__getitem__)
        kwargs = {**kwargs, "device": torch.device("cpu")} if "device" in kwargs else kwargs
        try:
            return node.target(*args, **kwargs)  # type: ignore[operator]
        except Exception:  # what has no kernel on the CPU stays as it is
            return None
