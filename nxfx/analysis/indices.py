"""What integer index tensors select: which index an axis in order, which hold one position, which never repeat.

Proofs for writes through integer indices; constants are looked into, ``arange`` is followed through arithmetic and views.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from nxfx.analysis.finiteness import Finiteness
from nxfx.analysis.provenance import Role, Source
from nxfx.analysis.range_rules import PRESERVING_VIEWS
from nxfx.analysis.views import COPIES, RESHAPES, argument, slice_step, unit_dims
from nxfx.graph import meta
from nxfx.graph.index_masks import Ramp
from nxfx.graph.regions import Region
from nxfx.graph.slices import Extent, is_static

aten = torch.ops.aten
prims = torch.ops.prims
INDEX_DTYPES = (torch.int64, torch.int32)


class Indices:
    """Proofs about the index tensors of one graph.

    Args:
        sources: placeholder or ``get_attr`` node name → origin.
        finiteness: where index values cannot be negative.
    """

    def __init__(self, sources: Mapping[str, Source], finiteness: Finiteness) -> None:
        self._sources = sources
        self._finiteness = finiteness
        self._ramps: dict[fx.Node, Ramp | None] = {}

    def never_negative(self, node: fx.Node) -> bool:
        """Whether no element counts from the end."""
        facts = self._finiteness.of(node)
        return facts.low >= 0 and not facts.premises

    def distinct(self, node: fx.Node, dim: int, size: Any = None) -> bool:
        """Whether no two elements along ``dim`` are one position (of ``size``, when negative ones count from its end)."""
        if size is not None and not is_static(size):
            return False
        ramp = self.ramp(node)
        if ramp is not None and ramp.dim == dim and is_static(ramp.count):
            return ramp.step != 0 and (size is None or abs(ramp.step) * (ramp.count - 1) < size)
        node = _past_copies(node)
        constant = self._constant(node)
        if constant is not None:
            ordered = (constant if size is None else constant % size).sort(dim).values
            return not bool((ordered.diff(dim=dim) == 0).any())
        order = _ordered(node)
        return order is not None and order[1] == dim

    def bounds(self, node: fx.Node) -> tuple[int, int, bool] | None:
        """What all elements provably lie in, and whether some are at either end."""
        ramp = self.ramp(node)
        if ramp is not None and ramp.offset is None and is_static(ramp.count):
            ends = (ramp.start, ramp.start + ramp.step * (ramp.count - 1))
            return min(ends), max(ends), True
        node = _past_copies(node)
        constant = self._constant(node)
        if constant is not None and constant.numel():
            return int(constant.min()), int(constant.max()), True
        while node.target in _PARTS:
            node = node.args[0]  # type: ignore[assignment]
        ordered = _ordered(node)
        if ordered is None:
            return None
        values: Any = ordered[0].args[0]
        size: Any = meta.val(values).shape[ordered[1]]
        return (0, size - 1, False) if is_static(size) else None

    def distinct_together(self, chosen: Sequence[tuple[fx.Node, Any]]) -> bool:
        """Whether no two of the tuples that constant index tensors make (of axes of these sizes) are equal."""
        constants = [self._constant(_past_copies(node)) for node, _ in chosen]
        if not all(isinstance(c, torch.Tensor) for c in constants) or not is_static(*(size for _, size in chosen)):
            return False
        wrapped = [c % size for c, (_, size) in zip(constants, chosen, strict=True) if c is not None]
        tuples = torch.stack([t.flatten() for t in torch.broadcast_tensors(*wrapped)], 1)
        return len(tuples.unique(dim=0)) == len(tuples)

    def known_ramp(self, node: fx.Node) -> Ramp | None:
        """What :meth:`ramp` found before."""
        return self._ramps.get(node)

    def ramp(self, node: fx.Node) -> Ramp | None:
        """How ``node`` runs along one of its dims, where it provably does."""
        chain: list[fx.Node] = []
        while node not in self._ramps and len(chain) < 32:
            chain.append(node)
            operand = node.args[0] if node.op == "call_function" and node.args else None
            if not isinstance(operand, fx.Node) or node.target not in _RAMP_RULES:
                break
            node = operand
        for link in reversed(chain):
            if link not in self._ramps:
                self._ramps[link] = self._ramp_of(link)
        return self._ramps[chain[0]] if chain else self._ramps.get(node)

    def _ramp_of(self, node: fx.Node) -> Ramp | None:
        if meta.dtype_of(node) not in INDEX_DTYPES:
            return None
        made = _iota(node)
        if made is None and node.target in _RAMP_RULES:
            made = _RAMP_RULES[node.target](self, node)
        constant = self._constant(node) if made is None else None
        return _progression(constant) if constant is not None else made

    def _constant(self, node: fx.Node) -> torch.Tensor | None:
        """The value of a constant that capture lifted (a list of indices in the model's source)."""
        source = self._sources.get(_past_copies(node).name)
        if source is None or source.role is not Role.CONSTANT or not source.is_known or source.value is None:
            return None
        value = source.value
        usable = value.numel() <= 1 << 20 and not isinstance(value, meta.FakeTensor) and not value.is_meta
        return value.detach().cpu() if usable and value.dtype in INDEX_DTYPES else None


# Ops whose second output (or only output) orders a dim: its elements along that dim are distinct. Position of `dim`.
_ORDERING: dict[Any, int] = {aten.topk.default: 2, aten.sort.default: 1, aten.argsort.default: 1, aten.sort.stable: 2}
_PARTS = PRESERVING_VIEWS | {aten.slice.Tensor, aten.select.int, aten.expand.default}


def _ordered(node: fx.Node) -> tuple[fx.Node, int] | None:
    """The op that ``node`` holds the order of, and along which dim."""
    source: Any = node.args[0] if node.target is operator.getitem and node.args[1] == 1 else node
    if source.target not in _ORDERING or not meta.val(node).dim():
        return None
    along = argument(source, _ORDERING[source.target], "dim", -1)
    return (source, along % meta.val(node).dim()) if is_static(along) else None


def _past_copies(node: fx.Node) -> fx.Node:
    while node.target in COPIES or (
        node.target is aten._to_copy.default and is_index(node) and is_index(node.args[0])
    ):
        node = node.args[0]  # type: ignore[assignment]
    return node


def is_index(node: Any) -> bool:
    return isinstance(node, fx.Node) and meta.dtype_of(node) in INDEX_DTYPES


def _iota(node: fx.Node) -> Ramp | None:
    start: Any
    step: Any
    if node.target not in (aten.arange.default, aten.arange.start, aten.arange.start_step, prims.iota.default):
        return None
    if node.target is prims.iota.default:
        start, step = node.kwargs.get("start", 0), node.kwargs.get("step", 1)
    else:
        start = node.args[0] if len(node.args) > 1 else 0
        step = argument(node, 2, "step", 1)
    return Ramp(0, start, step, meta.val(node).shape[0]) if is_static(start, step) else None


def _progression(constant: torch.Tensor) -> Ramp | None:
    if constant.dim() != 1 or constant.numel() < 2:
        return None
    steps = constant.diff()
    step = int(steps[0])
    return Ramp(0, int(constant[0]), step, constant.numel()) if bool((steps == step).all()) else None


def _kept(indices: Indices, node: fx.Node) -> Ramp | None:
    operand: Any = node.args[0]
    return indices.known_ramp(operand) if is_index(operand) else None


def _reshaped(indices: Indices, node: fx.Node) -> Ramp | None:
    ramp, dims = _kept(indices, node), unit_dims(node)
    if ramp is None or dims is None or ramp.dim not in dims or ramp.offset is not None:
        return None
    return Ramp(dims.index(ramp.dim), ramp.start, ramp.step, ramp.count)


def _expanded(indices: Indices, node: fx.Node) -> Ramp | None:
    ramp = _kept(indices, node)
    if ramp is None or ramp.offset is not None:
        return None
    args: Any = node.args
    dim = ramp.dim + meta.val(node).dim() - meta.val(args[0]).dim()
    return Ramp(dim, ramp.start, ramp.step, ramp.count)


def _shifted(indices: Indices, node: fx.Node) -> Ramp | None:
    """A ramp plus an integer, or plus a tensor that does not vary along the ramp."""
    args: Any = node.args
    ramped, other = args[:2]
    ramp = indices.ramp(ramped)
    if ramp is None and isinstance(other, fx.Node):
        ramped, other = other, ramped
        ramp = indices.ramp(ramped)
    if ramp is None or ramp.offset is not None or node.kwargs.get("alpha", 1) != 1:
        return None
    rank = meta.val(node).dim()
    dim = ramp.dim + rank - meta.val(ramped).dim()
    if is_static(other):
        return Ramp(dim, ramp.start + other, ramp.step, ramp.count)
    if not isinstance(other, fx.Node) or not is_index(other):
        return None
    shape = meta.val(other).shape
    along = dim - (rank - len(shape))
    if along >= 0 and not (is_static(shape[along]) and shape[along] == 1):
        return None
    return Ramp(dim, ramp.start, ramp.step, ramp.count, other)


def _scaled(indices: Indices, node: fx.Node) -> Ramp | None:
    args: Any = node.args
    ramp, factor = _kept(indices, node), args[1]
    if ramp is None or ramp.offset is not None or not is_static(factor):
        return None
    return Ramp(ramp.dim, ramp.start * factor, ramp.step * factor, ramp.count)


def _sliced(indices: Indices, node: fx.Node) -> Ramp | None:
    args: Any = node.args
    ramp = _kept(indices, node)
    region = slice_step(node, Region.whole(meta.val(args[0]).shape))
    if ramp is None or region is None or ramp.offset is not None:
        return None
    extent = region.axes[ramp.dim]
    if isinstance(extent, Extent):
        return Ramp(ramp.dim, ramp.start + extent.start * ramp.step, ramp.step * extent.step, extent.count)
    return ramp if extent is None else None


_RAMP_RULES: dict[Any, Any] = {
    **dict.fromkeys((*COPIES, aten._to_copy.default), _kept),
    **dict.fromkeys(RESHAPES, _reshaped),
    aten.expand.default: _expanded,
    aten.slice.Tensor: _sliced,
    aten.add.Tensor: _shifted,
    aten.mul.Tensor: _scaled,
}
