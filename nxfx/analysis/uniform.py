"""Values that are one constant everywhere (fills, ``zeros_like``, lifted 0-d constants) and what survives of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from nxfx.analysis.provenance import Role, Source
from nxfx.graph import meta

aten = torch.ops.aten

_FILLS: dict[Any, int] = {
    aten.zeros.default: 0,
    aten.zeros_like.default: 0,
    aten.new_zeros.default: 0,
    aten.zero.default: 0,
    aten.ones.default: 1,
    aten.ones_like.default: 1,
    aten.new_ones.default: 1,
}
# Op → position of the argument, a number or a tensor, whose elements the result consists of.
_CONSISTS_OF: dict[Any, int] = dict.fromkeys(
    (
        aten._to_copy.default, aten.expand.default, aten.clone.default, aten.alias.default, aten.detach.default,
        aten.lift_fresh_copy.default, aten.view.default, aten._unsafe_view.default, aten.reshape.default,
        aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.permute.default,
        aten.transpose.int, aten.t.default, aten.slice.Tensor, aten.select.int, aten.repeat.default,
        aten.contiguous.default,
    ),
    0,
)  # fmt: skip
_CONSISTS_OF.update(
    {
        aten.scalar_tensor.default: 0,
        aten.copy.default: 1,
        aten.fill.Scalar: 1,
        aten.fill.Tensor: 1,
        aten.full.default: 1,
        aten.full_like.default: 1,
        aten.new_full.default: 2,
    }
)


class UniformValues:
    """The constant that every element of a node equals, where there is one.

    Args:
        sources: placeholder or ``get_attr`` node name → origin; only lifted constants count, nobody can change them.
    """

    def __init__(self, sources: Mapping[str, Source]) -> None:
        self._sources = sources
        self._values: dict[fx.Node, torch.Tensor | None] = {}

    def value(self, node: Any) -> torch.Tensor | None:
        """A real 0-d tensor of the node's dtype, or None when the elements are not known to be one constant."""
        chain = []
        while isinstance(node, fx.Node) and node not in self._values:
            chain.append(node)
            node = self._origin(node)
        known: Any = self._values[node] if isinstance(node, fx.Node) else node
        for link in reversed(chain):
            dtype = meta.dtype_of(link)
            known = as_dtype(known, dtype) if dtype is not None and known is not None else None
            self._values[link] = known
        return known if isinstance(known, torch.Tensor) else None

    def _origin(self, node: fx.Node) -> Any:
        """The node that ``node``'s elements come from, or the constant itself, or None."""
        if node.op in ("placeholder", "get_attr"):
            source = self._sources.get(node.name)
            value = source.value if source is not None and source.is_known and source.role is Role.CONSTANT else None
            if value is None or value.numel() != 1 or isinstance(value, meta.FakeTensor) or value.is_meta:
                return None
            return value.detach().reshape(()).cpu()
        if node.op != "call_function":
            return None
        if node.target in _FILLS:
            return _FILLS[node.target]
        position = _CONSISTS_OF.get(node.target)
        operand: Any = node.args[position] if position is not None and len(node.args) > position else None
        return operand if isinstance(operand, (bool, int, float, complex, fx.Node)) else None


def as_dtype(value: Any, dtype: torch.dtype) -> torch.Tensor | None:
    """``value`` as a real 0-d tensor of ``dtype``, converted as ``fill_`` and ``copy_`` do; None where that raises."""
    try:
        return value.to(dtype) if isinstance(value, torch.Tensor) else torch.full((), value, dtype=dtype)
    except (RuntimeError, TypeError, OverflowError):
        return None
