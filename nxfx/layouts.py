"""Memory of inputs: strides are baked into a captured graph, and a functional graph knows nothing of shared memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from nxfx.graph import meta, walk

aten = torch.ops.aten
_READS_LAYOUT = frozenset({aten.as_strided.default, aten.as_strided_copy.default, aten.as_strided_scatter.default})
_MOST_ELEMENTS = 1 << 24


class InputLayouts:
    """The strides of the example: ``view`` stands where ``reshape`` needed no copy, and fails on other strides."""

    def __init__(self, graph_module: fx.GraphModule, examples: Sequence[torch.Tensor]) -> None:
        # A graph that names strides means the caller's memory.
        self._reads_layout = any(n.target in _READS_LAYOUT for s in walk.scopes(graph_module) for n in s.graph_module.graph.nodes)
        self._orders = [_order(t) for t in examples]

    def arrange(self, values: list[torch.Tensor]) -> list[torch.Tensor]:
        """Each value with its dimensions in memory as in the example, densely packed; as it is where it fits already."""
        if self._reads_layout:
            return values
        return [_arranged(v, order) for v, order in zip(values, self._orders, strict=True)]


def _order(tensor: torch.Tensor) -> tuple[int, ...]:
    """Dimensions from the outermost in memory to the innermost."""
    if tensor.is_contiguous():
        return tuple(range(tensor.ndim))
    strides = tensor.stride()
    return tuple(sorted(range(tensor.ndim), key=lambda d: (-strides[d], d)))


def _arranged(value: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    if not isinstance(value, torch.Tensor) or value.layout is not torch.strided or isinstance(value, meta.FakeTensor):
        return value
    straight = value if order == tuple(range(value.ndim)) else value.permute(order)
    if straight.is_contiguous():
        return value
    dense = straight.contiguous()
    back = [order.index(d) for d in range(value.ndim)]
    return dense.permute(back)


def overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of one storage share an element; True when that would take too long to find out."""
    (first, after), (second, end) = _span(a), _span(b)
    if after <= second or end <= first:
        return False
    low = min(first, second)
    if max(after, end) - low > _MOST_ELEMENTS:
        return True
    touched = torch.zeros(max(after, end) - low, dtype=torch.bool)
    for number, (tensor, start) in enumerate(((a, first), (b, second))):
        strides = tuple(s * tensor.element_size() for s in tensor.stride())
        for byte in range(tensor.element_size()):
            cells = touched.as_strided(tensor.shape, strides, start - low + byte)
            if number and bool(cells.any()):
                return True
            cells.fill_(True)
    return False


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """First byte in the storage, and the one after the last."""
    size = tensor.element_size()
    first = tensor.storage_offset() * size
    return int(first), int(first + size + size * sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)))
