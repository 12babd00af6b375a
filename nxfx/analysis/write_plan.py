"""Which writes of a graph are replaced, what each rests on, and what falls away with them.

Writes are planned from the last to the first, so that the inner links of a chain of views are not planned by themselves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from nxfx.analysis import dtype_rules
from nxfx.analysis.finiteness import Finiteness
from nxfx.analysis.index_writes import INDEX_WRITES, read_index_write
from nxfx.analysis.indices import Indices
from nxfx.analysis.provenance import Source
from nxfx.analysis.slice_writes import SCATTERS, SliceWrite, read_slice_write, written_value
from nxfx.analysis.uniform import UniformValues
from nxfx.analysis.views import Views
from nxfx.graph import meta
from nxfx.graph.index_masks import IndexWrite, Ramp
from nxfx.graph.regions import Region, SymbolicSlice
from nxfx.graph.slices import Extent, is_static

aten = torch.ops.aten

_REDUCES = "it reduces what it writes"
# Writers that have no mask form, and why.
KEPT: Mapping[Any, str] = {
    aten.scatter.reduce: _REDUCES,
    aten.scatter.value_reduce: _REDUCES,
    aten.scatter_reduce.two: _REDUCES,
    aten.index_reduce.default: _REDUCES,
    aten.put.default: "it writes through flat indices",
}
WRITERS = frozenset({*SCATTERS, *INDEX_WRITES, *KEPT, aten.copy.default})
# Dtypes that have no `where` on some supported torch.
_NO_SELECT = frozenset({torch.uint16, torch.uint32, torch.uint64})


@dataclass
class PlannedWrite:
    """A write that will be replaced.

    Attributes:
        node: what the replacement stands for: the scatter, or the view that puts its result back in order.
        scatter: the node that writes.
        inputs: the nodes that the replacement rests on.
    """

    node: fx.Node
    scatter: fx.Node
    write: SliceWrite | IndexWrite
    inputs: Collection[fx.Node]


@dataclass
class Chain:
    """Writes each of whose base is the result of the one before, at positions of ``axis`` that follow each other."""

    writes: list[PlannedWrite]
    axis: int


@dataclass
class Cover:
    """Writes whose regions are apart and together all of one axis, and of nothing else of which a part is seen.

    Attributes:
        writes: in the order of their positions.
        axis: of the tensor that is written, all other axes of which are written whole.
        step: 1, or the step that all of them have: each writes one phase.
    """

    writes: list[PlannedWrite]
    axis: int
    step: int


class WritePlan:
    """The plan for one graph.

    Attributes:
        writes: what is replaced, in graph order.
        kept: writers that stay, each with the property that could not be proved.
        covers: halves, thirds ... of a tensor that are all that is left of it.
        chains: loops of writes that fill one axis from the front to the back.
        unused: nodes that nothing needs once the plan is carried out.
        uniform, finiteness: what is known of the graph's values.
    """

    def __init__(self, graph: fx.Graph, sources: Mapping[str, Source]) -> None:
        self.uniform = UniformValues(sources)
        self.finiteness = Finiteness(sources, self.uniform)
        self.kept: list[tuple[fx.Node, str]] = []
        self.unused: set[fx.Node] = set()
        self._views = Views()
        self._indices = Indices(sources, self.finiteness)
        self._planned: dict[fx.Node, PlannedWrite] = {}
        self._required: Counter[fx.Node] = Counter()  # by how many planned writes
        for node in reversed([n for n in graph.nodes if n.op == "call_function" and n.target in WRITERS]):
            if node in self.unused or not meta.is_tensor(node):
                continue
            try:
                self._plan(node)
            except Exception as error:
                error.nxfx_node = node  # type: ignore[attr-defined]  # the pipeline names it, and the user's line
                raise
        self.writes = list(reversed(self._planned.values()))
        self.covers = list(self._covers())
        covered = {id(planned) for cover in self.covers for planned in cover.writes}
        self.chains = _chains([planned for planned in self.writes if id(planned) not in covered])

    def stays(self, node: fx.Node) -> bool:
        """Whether ``node`` will still stand in the graph, and need its inputs."""
        return node not in self.unused and node not in self._planned

    def ramp(self, index: fx.Node) -> Ramp | None:
        """How an index tensor runs along one of its dims, where it provably does."""
        return self._indices.ramp(index)

    def is_shared(self, node: fx.Node) -> bool:
        """Whether more than one thing needs ``node``."""
        return self.writes_on(node) > 1 or any(self.stays(user) for user in node.users)

    def writes_on(self, node: fx.Node) -> int:
        """How many planned writes rest on ``node``."""
        return self._required[node]

    def _plan(self, scatter: fx.Node) -> None:
        write = self._read(scatter)
        if isinstance(write, str):
            self.kept.append((scatter, write))
            return
        node, inputs = scatter, set(scatter.all_input_nodes)
        if isinstance(write, SliceWrite):
            node, inputs = write.node, write.inputs
        planned = self._planned[node] = PlannedWrite(node, scatter, write, inputs)
        self._required.update(inputs)
        self._release(node.all_input_nodes)
        while isinstance(planned.write, SliceWrite) and self._unite(planned, planned.write):
            pass

    def _read(self, node: fx.Node) -> SliceWrite | IndexWrite | str:
        """The write that ``node`` makes, or why it stays."""
        args: Any = node.args
        dtype = meta.val(node).dtype
        if node.target in KEPT:
            return KEPT[node.target]
        if dtype in _NO_SELECT or dtype not in dtype_rules.TABLE:
            return f"torch.where has no kernel for {str(dtype).removeprefix('torch.')}"
        if node.target is aten.copy.default:
            value = written_value(args[1], dtype, self.uniform)
            return SliceWrite(node, args[0], [Region.whole(meta.val(node).shape)], value)
        if node.target in SCATTERS:
            write = read_slice_write(node, self._views, self.uniform, self._required)
            return "its bounds do not amount to slices of the tensor it writes" if write is None else write
        return read_index_write(node, self._indices, self.uniform)

    def _unite(self, planned: PlannedWrite, write: SliceWrite) -> bool:
        """Join a write with the one before it, when both write the same number and nothing else needs its base."""
        base, number = write.base, write.value.number
        if number is None or base.target not in SCATTERS or not write.regions or self.is_shared(base):
            return False
        earlier = read_slice_write(base, self._views, self.uniform, self._required)
        if earlier is None or earlier.node is not base or earlier.value.number is None:
            return False
        if not torch.equal(_bits(earlier.value.number), _bits(number)):
            return False
        planned.write = SliceWrite(write.node, earlier.base, earlier.regions + write.regions, write.value)
        self._required.subtract(planned.inputs)
        planned.inputs = planned.write.inputs
        self._required.update(planned.inputs)
        self._release([base])
        return True

    def _covers(self) -> Iterator[Cover]:
        """Runs of writes of which each rests on the one before, and nothing else does, up to where all is written."""
        open_runs: dict[fx.Node, tuple[int, list[tuple[Extent, PlannedWrite]]]] = {}
        for planned in self.writes:
            extents = _row_extents(planned.write, pieces=True)
            whole = [axis for axis, shown in extents.items() if _is_only(planned.write, axis)]
            base = planned.write.base
            axis, run = open_runs.pop(base, (-1, []))
            if not whole:
                continue
            if axis != whole[0] or self.is_shared(base) or run[0][0].step != extents[whole[0]].step:
                axis, run = whole[0], []
            run.append((extents[axis], planned))
            if _covers_all(run):
                yield Cover([p for _, p in sorted(run, key=lambda part: part[0].start)], axis, run[0][0].step)
            else:
                open_runs[planned.node] = axis, run

    def _release(self, candidates: Iterable[fx.Node]) -> None:
        """Note which of ``candidates``, and of what only they need, nothing will need."""
        stack = list(candidates)
        while stack:
            node = stack.pop()
            if node.op != "call_function" or node in self.unused or node.is_impure() or self._required[node] > 0:
                continue
            if not any(self.stays(user) for user in node.users):
                self.unused.add(node)
                stack += node.all_input_nodes


# A shorter loop gains nothing over selects.
_SHORTEST_CHAIN = 4


def _chains(writes: list[PlannedWrite]) -> list[Chain]:
    """Chains in which each write lies behind the one before along an axis that all share."""
    open_chains: dict[fx.Node, tuple[list[PlannedWrite], dict[int, int]]] = {}
    found: dict[int, Chain] = {}
    for planned in writes:
        extents = _row_extents(planned.write)
        if not extents:
            continue
        chain, reached = open_chains.pop(planned.write.base, ([], dict.fromkeys(extents, 0)))
        behind = {
            axis: extents[axis] for axis, stop in reached.items() if axis in extents and extents[axis].start >= stop
        }
        if not behind:
            chain, behind = [], extents
        chain.append(planned)
        open_chains[planned.node] = chain, {axis: extent.stop for axis, extent in behind.items()}
        if len(chain) >= _SHORTEST_CHAIN:
            found[id(chain[0])] = Chain(chain, min(behind))
    return list(found.values())


def _is_only(write: SliceWrite | IndexWrite, axis: int) -> bool:
    """Whether ``axis`` is the only one that is written in part."""
    return isinstance(write, SliceWrite) and all(a is None for i, a in enumerate(write.regions[0].axes) if i != axis)


def _covers_all(run: list[tuple[Extent, PlannedWrite]]) -> bool:
    """Whether the parts of one axis are apart and are all of it: neighbours, or one phase of a step each."""
    parts = sorted((extent for extent, _ in run), key=lambda extent: extent.start)
    step, size = parts[0].step, parts[0].size
    if step == 1:
        return parts[-1].stop == size and all(a == b for a, b in zip([0, *(p.stop for p in parts)], [p.start for p in parts], strict=False))
    return len(parts) == step and all(p.start == i and p.count * step == size for i, p in enumerate(parts))


def _row_extents(write: SliceWrite | IndexWrite, *, pieces: bool = False) -> dict[int, Extent]:
    """The axes along which ``write`` puts a tensor at known adjacent positions; none for a write that cannot be part of a chain.

    For ``pieces`` the positions may be some steps apart, and the value may have been cut from the same place of another tensor.
    """
    if not isinstance(write, SliceWrite) or len(write.regions) != 1 or write.value.node is None:
        return {}
    if write.value.placed and not pieces:
        return {}
    base, axes = meta.val(write.base), write.regions[0].axes
    if any(isinstance(a, SymbolicSlice) for a in axes) or not is_static(*base.shape) or not base.is_contiguous():
        return {}
    return {axis: a for axis, a in enumerate(axes) if isinstance(a, Extent) and a.count and (pieces or a.step == 1)}


def _bits(number: torch.Tensor) -> torch.Tensor:
    """The bytes of a 0-d tensor: nan equals itself, 0.0 and -0.0 differ."""
    return number.reshape(1).view(torch.uint8)
