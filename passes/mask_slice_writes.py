"""mask-slice-writes: writes into parts of a tensor become masks and one element-wise op."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from nxfx.analysis.constants import written_constants
from nxfx.analysis.elementwise import EXACT, drop_checks, selected
from nxfx.analysis.implied import require
from nxfx.analysis.index_writes import INDEX_WRITES
from nxfx.analysis.provenance import Role, Source
from nxfx.analysis.slice_writes import SliceWrite
from nxfx.analysis.write_plan import WRITERS, PlannedWrite, WritePlan
from nxfx.graph import meta, storage
from nxfx.graph.attributes import new_constant
from nxfx.graph.builder import NodeBuilder
from nxfx.graph.index_masks import IndexMasks, IndexWrite
from nxfx.graph.masks import MaskBuilder, has_shape
from nxfx.graph.regions import Region, SymbolicSlice
from nxfx.graph.rows import GrowingTensor
from nxfx.graph.slices import Extent, is_known, is_static
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
_UNCHANGED = "its base: the write changes nothing"


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
        folded = [] if context.is_body else self._fold(graph_module, context)
        result = _Rewriter(self, graph_module.graph, context).run()
        return PassResult(bool(folded) or result.changed, folded + result.rewrites, result.findings)

    def _fold(self, graph_module: fx.GraphModule, context: PassContext) -> list[Rewrite]:
        """Writes into what is made of constants (Swin's window masks) are computed now; equal results are one constant."""
        graph = graph_module.graph
        build, known, rewrites = NodeBuilder(graph, self.name), {}, []
        for node, value in written_constants(graph, context.sources, WRITERS).items():
            fake = meta.val(node)
            key = (value.dtype, value.shape, value.stride(), fake.device, _digest(value))
            if key not in known:
                name = new_constant(graph_module, value.to(fake.device))
                with build.before(next(iter(graph.nodes)), node):
                    known[key] = build.get_attr(name, fake)
                context.sources[known[key].name] = Source(name, Role.CONSTANT, value)
            rewrites.append(self.rewrite(node, "mask.constant", Kind.EXACT, _name(node), f"a constant of {value.numel()} elements"))
            made = known[key]
            if storage.escapes(node):
                with build.before(node):
                    made = build.call(aten.clone.default, made)
            node.replace_all_uses_with(made)
            _erase_unused(graph, [node])
        return rewrites


@dataclass
class _Made:
    """What a write became: the node (None when nothing needs it whole), the countable rule and a few words."""

    node: fx.Node | None
    rule: str
    words: str = "where"


@dataclass
class _Rows:
    """A loop of writes on its way: the axis that is filled, the result of the last write, and what is filled so far."""

    axis: int
    last: fx.Node
    tensor: GrowingTensor | None = None


class _Rewriter:
    """Carries out the plan for one graph, from the first write to the last: shared masks stand before their users."""

    def __init__(self, step: MaskSliceWrites, graph: fx.Graph, context: PassContext) -> None:
        self.step, self.graph, self.context = step, graph, context
        self.plan = WritePlan(graph, context.sources)
        self.build = NodeBuilder(graph, step.name)
        self.masks = MaskBuilder(self.build)
        self.result = PassResult(changed=bool(self.plan.writes))
        self.replaced: dict[fx.Node, fx.Node] = {}
        self.done: set[fx.Node] = set()
        self.rows: dict[fx.Node, _Rows] = {}
        for chain in self.plan.chains:
            rows = _Rows(chain.axis, chain.writes[-1].node)
            self.rows.update((planned.node, rows) for planned in chain.writes)
        self.covers = {planned.node: cover for cover in self.plan.covers for planned in cover.writes}

    def run(self) -> PassResult:
        for planned in self.plan.writes:
            with self.build.before(planned.scatter, _with_trace(planned.scatter)):
                self._replace(planned)
        self._erase()
        self.result.findings += [self._kept(node, reason) for node, reason in self.plan.kept]
        return self.result

    def _kept(self, node: fx.Node, reason: str) -> Finding:
        sums = node.target in _SUMS or "reduces" in reason or "added" in reason
        code = "NX202" if sums or (node.target in INDEX_WRITES - _MASKED and "mask" not in reason) else "NX201"
        severity = Severity.INFO if sums else Severity.WARNING
        message = f"{_name(node)} is not turned into a mask: {reason}"
        return self.step.finding(node, code, severity, message, "" if sums else _FIXES[code])

    def _replace(self, planned: PlannedWrite) -> None:
        write, node = planned.write, planned.node
        if isinstance(write, IndexWrite):
            made = self._indexed(write, planned)
        else:
            make = self._row if node in self.rows else self._part if node in self.covers else self._slices
            made = make(write, planned)
        self.done.add(node)
        if made.node is not None:
            result = storage.with_strides_of(self.build, made.node, meta.val(node))
            node.replace_all_uses_with(result)
            self.replaced[node] = result
        before = _name(planned.scatter)
        self.result.rewrites.append(
            self.step.rewrite(planned.scatter, f"mask.{made.rule}", Kind.EXACT, before, made.words)
        )

    def _now(self, node: fx.Node) -> fx.Node:
        """What stands for ``node`` in the graph by now."""
        return self.replaced.get(node, node)

    def _slices(self, write: SliceWrite, planned: PlannedWrite) -> _Made:
        base, value, regions = self._now(write.base), write.value, write.regions
        if not regions:
            return _Made(self._own(base, planned), "nothing", _UNCHANGED)
        if value.number is not None:
            return self._filled(base, regions, value.number, planned)
        assert value.node is not None
        node, region = self._cast(self._now(value.node), base, value.casts), regions[0]
        if value.placed:
            return self._selected(node, base, region, planned)
        constant = None if region.is_whole else self.plan.uniform.value(base)
        base, region = self._unfolded(base, region)
        rank, dims = meta.val(base).dim(), region.dims[len(region.dims) - meta.val(node).dim() :]
        axes = {axis: shown for axis, shown in enumerate(region.axes) if not _is_select(shown)}
        if constant is not None and _holds(node, dims, region):
            node = self.masks.align(node, dims, rank, full=True)
            node = self.masks.place(node, base, axes, rank=rank, filler=constant.item(), single=True)
            made = _Made(node, "pad", "pad: its base is one constant")
        else:
            node = self.masks.place(self.masks.align(node, dims, rank), base, axes, rank=rank)
            made = self._selected(node, base, region, planned)
        if made.node is not None and meta.val(made.node).dim() != meta.val(planned.node).dim():
            made.node = self.masks.viewed(made.node, list(meta.val(planned.node).shape))
        return made

    def _selected(self, node: fx.Node, base: fx.Node, region: Region, planned: PlannedWrite) -> _Made:
        """``node``, whose elements stand in their places, where ``region`` is, else ``base``."""
        mask = self.masks.region_mask(base, region)
        if mask is None:
            return self._everything(node, base, planned)
        return _Made(self.masks.select(mask, node, base), "slice")

    def _unfolded(self, base: fx.Node, region: Region) -> tuple[fx.Node, Region]:
        """``base`` and ``region`` with every step that divides its axis as an axis of its own: nothing to pad in between."""
        value = meta.val(base)
        if is_static(*value.shape) and value.is_contiguous():
            for axis in reversed(range(value.dim())):
                shown = region.axes[axis]
                if isinstance(shown, Extent) and shown.step > 1 and shown.count * shown.step == shown.size:
                    region = region.unfolded(axis)
        return (base if len(region.shape) == value.dim() else self.masks.viewed(base, list(region.shape))), region

    def _row(self, write: SliceWrite, planned: PlannedWrite) -> _Made:
        """One write of a loop: a piece of the concatenation that its readers and the result are made from."""
        rows, value, region = self.rows[planned.node], write.value, write.regions[0]
        if rows.tensor is None:
            rows.tensor = GrowingTensor(self.masks, self._now(write.base), rows.axis)
        tensor, base, extent = rows.tensor, rows.tensor.base, region.axes[rows.axis]
        assert value.node is not None and isinstance(extent, Extent)
        rank = meta.val(base).dim()
        node = self._cast(self._now(value.node), base, value.casts)
        dims = region.dims[len(region.dims) - meta.val(node).dim() :]
        others = {a: shown for a, shown in enumerate(region.axes) if a != rows.axis and shown is not None}
        mask = self.masks.axes_mask(base, others)
        if mask is None:
            node = self.masks.align(node, dims, rank, full=True)
            shape = [extent.count if a == rows.axis else size for a, size in enumerate(meta.val(base).shape)]
            piece = node if has_shape(node, shape) else self.build.call(aten.expand.default, node, shape)
        else:
            node = self.masks.place(self.masks.align(node, dims, rank), base, others, rank=rank)
            piece = self.masks.select(mask, node, tensor.base_part(extent.start, extent.stop))
        tensor.append(piece, extent.start, extent.stop)
        readers = [user for user in planned.node.users if self.plan.stays(user)]
        elsewhere = [user for user in readers if not tensor.serve(user, planned.node)]
        whole = elsewhere or planned.node is rows.last or self.plan.writes_on(planned.node) > 1
        return _Made(tensor.whole() if whole else None, "row", "a row of a concatenation")

    def _part(self, write: SliceWrite, planned: PlannedWrite) -> _Made:
        """One of several writes that leave nothing of the base: side by side they are the result."""
        cover, words = self.covers[planned.node], "a part of a concatenation"
        if any(other.node not in self.done for other in cover.writes if other is not planned):
            return _Made(None, "part", words)
        shape = list(meta.val(write.base).shape)
        pieces = [self._piece(other, cover.axis, cover.step) for other in cover.writes]
        joined = self.build.call(aten.cat.default, pieces, cover.axis + (cover.step > 1))
        return _Made(joined if has_shape(joined, shape) else self.masks.viewed(joined, shape), "part", words)

    def _piece(self, planned: PlannedWrite, axis: int, step: int) -> fx.Node:
        """What is written at each position of ``axis``; of a step, with the phases as an axis of their own behind it."""
        write = planned.write
        assert isinstance(write, SliceWrite) and write.value.node is not None
        region, base = write.regions[0], write.base
        node = self._cast(self._now(write.value.node), base, write.value.casts)
        if write.value.placed:
            extent = region.axes[axis]
            assert isinstance(extent, Extent)
            node = self.build.call(aten.slice.Tensor, node, axis, extent.start, extent.stop, extent.step)
            return node if step == 1 else self.build.call(aten.unsqueeze.default, node, axis + 1)
        shape = [region.count(a) if a == axis else size for a, size in enumerate(region.shape)]
        node = self.masks.align(node, region.dims[len(region.dims) - meta.val(node).dim() :], len(shape), full=True)
        node = node if has_shape(node, shape) else self.build.call(aten.expand.default, node, shape)
        return node if step == 1 else self.build.call(aten.unsqueeze.default, node, axis + 1)

    def _filled(self, base: fx.Node, regions: list[Region], number: torch.Tensor, planned: PlannedWrite) -> _Made:
        mask: fx.Node | None = None
        for region in regions:
            part = self.masks.region_mask(base, region)
            if part is None:
                return self._everything(self._number(number, base), base, planned)
            mask = part if mask is None else self.masks.either(mask, part)
        assert mask is not None
        if self._multiplies(base, number, planned):
            rest = self.masks.all_but(base, regions[0], mask) if len(regions) == 1 else self.masks.negated(mask)
            return self._product(base, rest)
        return _Made(self.masks.select(mask, self._number(number, base), base), "slice")

    def _indexed(self, write: IndexWrite, planned: PlannedWrite) -> _Made:
        base = self._now(write.base)
        if write.is_empty:
            return _Made(self._own(base, planned), "nothing", _UNCHANGED)
        self._require(write, planned)
        value = None
        if write.value is not None:
            whole = self._made_whole(write, planned) if write.is_full else self._now(write.value)
            value = self._cast(whole, base, ())
        current = IndexMasks(self.masks, self._current(write, base, value))
        mask = current.mask()
        self._note(write, planned)
        if write.number is not None:
            if mask is not None and not write.accumulate and self._multiplies(base, write.number, planned):
                return self._product(base, self.masks.negated(mask))
            value = self._number(write.number, base)
            if current.together is not None and write.accumulate:
                value = self.build.call(aten.mul.Tensor, current.count(), value)
        else:
            value = current.value()
        if write.accumulate:
            value = self.build.call(aten.add.Tensor, base, value)
        if mask is None:
            return self._everything(value, base, planned)
        cost = f", {current.comparisons} comparisons of positions" if current.comparisons else ""
        taken = ", the value gathered" if current.taken is not None or write.kind == "ranked" else ""
        return _Made(self.masks.select(mask, value, base), f"index-{write.kind}", f"where{taken}{cost}")

    def _require(self, write: IndexWrite, planned: PlannedWrite) -> None:
        """Have the boundary refuse what eager refuses: indices outside the dimension."""
        for target in write.targets:
            index, bounds, ramp = target.index, target.bounds, self.plan.ramp(target.index)
            if bounds is None:
                continue
            if ramp is not None and ramp.offset is not None and is_static(ramp.count):
                ends = (ramp.start, ramp.start + ramp.step * (ramp.count - 1))
                index, bounds = ramp.offset, (bounds[0] - min(ends), bounds[1] - max(ends))
            if not require(index, bounds, self.context.sources, self.context.requirements):
                low, high = target.bounds or bounds
                message = f"eager raises for an index outside [{low}, {high}]; the cleaned graph writes nothing there"
                fix = "pass the position as an input, so that the boundary checks it, or clamp it"
                self.result.findings.append(self.step.finding(planned.scatter, "NX404", Severity.INFO, message, fix))

    def _current(self, write: IndexWrite, base: fx.Node, value: fx.Node | None) -> IndexWrite:
        """``write`` in terms of the nodes that the graph holds by now."""
        targets = []
        for target in write.targets:
            window = target.window
            if window is not None and window.offset is not None:
                window = dataclasses.replace(window, offset=self._now(window.offset))
            targets.append(dataclasses.replace(target, index=self._now(target.index), window=window))
        mask = None if write.mask is None else self._now(write.mask)
        return dataclasses.replace(write, base=base, value=value, targets=targets, mask=mask)

    def _made_whole(self, write: IndexWrite, planned: PlannedWrite) -> fx.Node:
        """What ``write`` writes, computed of everything, not of the masked elements alone."""
        args: Any = planned.scatter.args
        shape = meta.val(write.base).shape
        masked = meta.val(write.mask).numel() if write.mask is not None else 0
        made: dict[fx.Node, fx.Node] = {}

        def whole(node: fx.Node) -> fx.Node:
            part_of = selected(node, args[1], shape)
            if part_of is not None:
                drop_checks(node, masked)
                return self._now(part_of)
            if node.target not in EXACT or meta.val(node).dim() < meta.val(args[2]).dim():
                return self._now(node)
            if node not in made:
                drop_checks(node, masked)
                operands, named = fx.node.map_arg((node.args, dict(node.kwargs)), whole)
                made[node] = self.build.call(node.target, *operands, **named)
            return made[node]

        assert write.value is not None
        return whole(write.value)

    def _note(self, write: IndexWrite, planned: PlannedWrite) -> None:
        """In what respect eager is stricter."""
        if write.kind == "ranked":
            name = f"{_name(planned.scatter)}: eager raises when the values do not fill the mask; the graph writes as many as fit"
            self.result.findings.append(self.step.finding(planned.scatter, "NX201", Severity.INFO, name))

    def _multiplies(self, base: fx.Node, number: torch.Tensor, planned: PlannedWrite) -> bool:
        """Whether a fill with ``number`` becomes a multiplication; its premises and its risk are noted."""
        dtype, mode = meta.val(base).dtype, self.step.options.multiply
        if mode == "never" or dtype.is_complex or (dtype.is_floating_point and dtype.itemsize == 1):
            return False
        if bool(number != 0) or bool(torch.signbit(number)):
            return False
        if self.plan.finiteness.zero_fill_may_multiply(base):
            self.context.premises += [p for p in self.plan.finiteness.premises(base) if p not in self.context.premises]
            return True
        if mode == "always":
            message = (
                "a zero fill multiplies (multiply=always): where its base holds inf or nan the result is nan, not 0"
            )
            fix = "leave the option multiply at 'proved'"
            self.result.findings.append(self.step.finding(planned.scatter, "NX204", Severity.WARNING, message, fix))
        return bool(mode == "always")

    def _product(self, base: fx.Node, rest: fx.Node) -> _Made:
        op = aten.bitwise_and.Tensor if meta.dtype_of(base) is torch.bool else aten.mul.Tensor
        return _Made(
            self.masks.elementwise(op, base, rest, dtype=meta.val(base).dtype),
            "multiply",
            "multiplication by the mask of the rest",
        )

    def _number(self, number: torch.Tensor, base: fx.Node) -> fx.Node:
        value = meta.val(base)
        key = ("number", repr(number.item()), value.dtype, value.device)
        return self.masks.shared(key, lambda: self.build.scalar(number.item(), value.dtype, value.device))

    def _cast(self, node: fx.Node, base: fx.Node, casts: Iterable[torch.dtype]) -> fx.Node:
        """``node`` as ``copy_`` writes it: in the base's dtype, on the base's device."""
        for dtype in (*casts, meta.val(base).dtype):
            if meta.dtype_of(node) != dtype:
                node = self.build.call(aten._to_copy.default, node, dtype=dtype)
        device = meta.val(base).device
        return node if meta.val(node).device == device else self.build.call(aten._to_copy.default, node, device=device)

    def _everything(self, node: fx.Node, base: fx.Node, planned: PlannedWrite) -> _Made:
        """A write of every element is what it writes."""
        if has_shape(node, meta.val(base).shape):
            return _Made(self._own(node, planned), "whole", "what it writes")
        sizes = [self.masks.size(base, dim) for dim in range(meta.val(base).dim())]
        expanded = self.build.call(aten.expand.default, node, sizes)
        return _Made(
            self.build.call(aten.clone.default, expanded, memory_format=torch.contiguous_format),
            "whole",
            "what it writes",
        )

    def _own(self, node: fx.Node, planned: PlannedWrite) -> fx.Node:
        """``node`` as the result of a write: a copy where the caller could see that the memory is shared."""
        if not storage.escapes(planned.node):
            return node
        seen = storage.may_alias(node) or any(self.plan.is_shared(n) for n in planned.inputs if self._now(n) is node)
        return self.build.call(aten.clone.default, node) if seen else node

    def _erase(self) -> None:
        """Remove the replaced nodes and the inner links that only they needed."""
        parts = {part for planned in self.plan.writes for part in _parts(planned.write)}
        _erase_unused(self.graph, [planned.node for planned in self.plan.writes], self.plan.unused | parts)


def _erase_unused(graph: fx.Graph, stack: list[fx.Node], candidates: Collection[fx.Node] | None = None) -> None:
    """Remove the nodes of ``stack`` that nothing uses, and then those of ``candidates`` that only they used."""
    erased = set()
    while stack:
        node = stack.pop()
        if node not in erased and not node.users and node.op == "call_function":
            erased.add(node)
            stack += [n for n in node.all_input_nodes if candidates is None or n in candidates]
            graph.erase_node(node)


def _digest(value: torch.Tensor) -> bytes:
    # Not contiguous(): a tensor of one element or none is that already, whatever its strides.
    flat = value.clone(memory_format=torch.contiguous_format).view(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().data).digest()


def _holds(node: fx.Node, dims: tuple[int | None, ...], region: Region) -> bool:
    """Whether ``node`` holds every element of ``region``, none by broadcasting, at positions that are known now."""
    sizes = {axis: size for axis, size in zip(dims, meta.val(node).shape, strict=True) if axis is not None}
    return all(
        not isinstance(shown, SymbolicSlice) and is_known(sizes.get(axis, 1) == region.count(axis))
        for axis, shown in enumerate(region.axes)
    )


def _parts(write: SliceWrite | IndexWrite) -> set[fx.Node]:
    """The nodes that compute what is written, of the masked elements alone; not those that something else computes."""
    found: set[fx.Node] = set()
    stack = [write.value] if isinstance(write, IndexWrite) and write.is_full else []
    while stack:
        node = stack.pop()
        if node is not None and node not in found and (node.target in EXACT or node.target is aten.index.Tensor):
            found.add(node)
            stack += node.all_input_nodes
    return found


def _is_select(shown: Any) -> bool:
    return isinstance(shown, SymbolicSlice) and shown.is_select


def _with_trace(node: fx.Node) -> fx.Node:
    """``node``, or for a node that knows no user line (in a backward graph) one nearby that does."""
    near = [node]
    for candidate in near:
        if "stack_trace" in candidate.meta:
            return candidate
        if len(near) < 64:
            near += [n for n in (*candidate.all_input_nodes, *candidate.users) if n not in near]
    return node


def _name(node: fx.Node) -> str:
    return str(node.target).removeprefix("aten.").removesuffix(".default")
