"""mask-slice-writes: writes into parts of a tensor become masks and one element-wise op."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from nxfx.analysis.index_writes import INDEX_WRITES
from nxfx.analysis.write_plan import WRITERS, PlannedWrite
from nxfx.graph import meta, storage
from nxfx.graph.index_masks import IndexWrite
from nxfx.masking.base import Made, Masker, erase_unused, op_name, with_trace
from nxfx.masking.folding import fold_constants
from nxfx.masking.indices import PositionMasks, parts_of
from nxfx.masking.slices import SliceMasks
from nxfx.pipeline import Pass, PassContext, PassResult
from nxfx.report.findings import Finding, Severity
from nxfx.report.rewrites import Kind, Rewrite

aten = torch.ops.aten

_FIXES = {
    "NX201": "write torch.where(mask, value, tensor) with a mask of torch.arange comparisons and a value of its shape",
    "NX202": "index with one 1-d tensor, with torch.arange plus one position, or with the indices of topk or sort",
}
_SUMS = frozenset({aten.index_add.default, aten.scatter_add.default})
_MASKED = frozenset({aten.masked_scatter.default})


@dataclass(frozen=True)
class Options:
    """Options of mask-slice-writes.

    Attributes:
        multiply: when a zero fill becomes ``base * mask``: ``"proved"`` (the base is proved finite and non-negative),
            ``"never"`` (or ``"off"``), or ``"always"`` (nan where the base holds inf or nan: each one is reported,
            NX204).
    """

    multiply: str = "proved"

    def __post_init__(self) -> None:
        if self.multiply == "off":
            object.__setattr__(self, "multiply", "never")
        if self.multiply not in ("proved", "never", "always"):
            raise ValueError(f"option 'multiply' is proved, never or always, not {self.multiply!r}")


class MaskSliceWrites(Pass):
    """A write into part of a tensor becomes one mask and one element-wise op; no scatter is left.

    Given (``x[:2, 1:3] = 0`` with ``x`` of shape [4, 6])::

        %rows : float32[2, 6] = slice(x, 0, 0, 2)
        %part : float32[2, 2] = slice(rows, 1, 1, 3)
        %zero : float32[2, 2] = fill(part, 0)
        %into : float32[2, 6] = slice_scatter(rows, zero, 1, 1, 3)
        %all : float32[4, 6] = slice_scatter(x, into, 0, 0, 2)

    Result::

        %rows : int32[4] = arange(4)
        %in_rows : bool[4, 1] = view(lt(rows, 2), [4, 1])
        %columns : int32[6] = arange(6)
        %in_columns : bool[6] = bitwise_and(ge(columns, 1), lt(columns, 3))
        %mask : bool[4, 6] = bitwise_and(in_rows, in_columns)
        %all : float32[4, 6] = where(mask, 0, x)

    - The value is cast to the base's dtype before the select, as ``copy_`` does: ``where(m, 0.5, int64_base)`` rounds
      2**40 + 1.
    - A zero fill of a base that is proved finite and non-negative multiplies by the negated mask instead (an
      attention mask of ones); anywhere else ``inf * 0`` and ``nan * 0`` would be nan and ``-1 * 0`` would be
      ``-0.0``.
    - A tensor value is padded to the base's shape; a step that divides its axis becomes an axis. No gather. Into a
      constant base (the backward of a slice) the pad is all.
    - Writes through nested views are one mask; writes of one number into one base are one mask too. A write of
      everything is its value, a write of nothing is its base.
    - Writes that together leave nothing of their base (both halves, even and odd positions) are a concatenation.
    - A loop that fills an axis from front to back is a concatenation of its rows: a select of everything at each step
      would cost the whole tensor each time.
    - A write through integer indices becomes ``positions == index``: a KV cache at a tensor position, ``arange``
      indices, indices of top-k. Of several values for one element the last is written (eager on the CPU does so, and
      leaves it open elsewhere). Float sums over indices that may repeat stay (NX202); integer sums do not.
    - Eager raises for an index outside its dimension, a mask is just empty there: the boundary refuses such inputs.
    - ``x[mask] *= 2`` is computed of everything and selected. Values for a mask's elements in turn (``masked_scatter``,
      ``x[mask] = values``) are taken by rank, ``cumsum(mask) - 1``.
    """

    name = "mask-slice-writes"
    Options = Options
    targets = WRITERS

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> PassResult:
        rewrites = [] if context.is_body else fold_constants(self, graph_module, context)
        masker = Masker(self, self.options.multiply, graph_module.graph, context)
        plan, slices, positions = masker.plan, SliceMasks(masker), PositionMasks(masker)
        for planned in plan.writes:  # from the first to the last: shared masks stand before their users
            with masker.build.before(planned.scatter, with_trace(planned.scatter)):
                write = planned.write
                made = positions.make(write, planned) if isinstance(write, IndexWrite) else slices.make(write, planned)
                rewrites.append(self._put(masker, planned, made))
        parts = {part for planned in plan.writes for part in parts_of(planned.write)}
        erase_unused(graph_module.graph, [planned.node for planned in plan.writes], plan.unused | parts)
        kept = [self._kept(node, reason) for node, reason in plan.kept]
        return PassResult(bool(rewrites), rewrites, masker.findings + kept)

    def _put(self, masker: Masker, planned: PlannedWrite, made: Made) -> Rewrite:
        """Have ``made`` stand for the write."""
        if made.node is not None:
            result = storage.with_strides_of(masker.build, made.node, meta.val(planned.node))
            planned.node.replace_all_uses_with(result)
            masker.replaced[planned.node] = result
        return self.rewrite(planned.scatter, f"mask.{made.rule}", Kind.EXACT, op_name(planned.scatter), made.words)

    def _kept(self, node: fx.Node, reason: str) -> Finding:
        sums = node.target in _SUMS or "reduces" in reason or "added" in reason
        code = "NX202" if sums or (node.target in INDEX_WRITES - _MASKED and "mask" not in reason) else "NX201"
        severity = Severity.INFO if sums else Severity.WARNING
        message = f"{op_name(node)} is not turned into a mask: {reason}"
        return self.finding(node, code, severity, message, "" if sums else _FIXES[code])
