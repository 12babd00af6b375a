"""Which op is to blame: node by node, the error that an op introduces, apart from the error that it is handed.

Two graphs run in step. At every node that both have, the model's own op is run on the *candidate's* inputs, in the model's
precision and in high precision. A value that these inputs explain is innocent however wrong it is: a layer with large weights
amplifies the error it is given and introduces none. The first node whose value they do not explain is to blame. Where a pass
replaced several nodes, the run between matched nodes is judged as a whole, and then searched for the node at fault.

Values live as long as something needs them: memory is that of the live values of both graphs. The inside of a replaced run is
computed again when it is needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from nxfx.graph import printing
from nxfx.graph.meta import dtype_of, is_tensor, val
from nxfx.report.locations import Location, locate
from nxfx.verification.causes import cause_of
from nxfx.verification.deviation import Deviation, bits_equal, deviation, other_bits, relative_error, tensors
from nxfx.verification.lanes import MISSING, Around, Stepper, Values, attribute, evaluate, is_random
from nxfx.verification.matching import Matching, match
from nxfx.verification.precision import Precision

aten = torch.ops.aten
_SHOWN = 20
# The result holds the operand's numbers, all of them, so its error is the operand's.
_REARRANGES = frozenset(
    {aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.permute.default, aten.transpose.int, aten.t.default,
     aten.unsqueeze.default, aten.squeeze.dim, aten.clone.default, aten.alias.default, aten.detach.default, aten.contiguous.default}
)  # fmt: skip
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class NodeError:
    """The error at one node of the model's graph, relative (root mean square), against the high-precision run.

    Attributes:
        candidate, model: total error of each. candidate is None where the candidate has no such node.
        amplification: total error over the largest total error among the node's inputs (of the candidate).
    """

    node: str
    op: str
    location: Location
    candidate: float | None
    model: float
    amplification: float | None = None


@dataclass(frozen=True)
class Blame:
    """An op whose value its inputs do not explain.

    Attributes:
        node: its name in the candidate's graph.
        original: the model's node that it stands for (or the first one after it that both graphs have).
        op, location: what it is and the user's line; ``location.module`` is the module path.
        made_by: the pass that made it, ``""`` for a node of the model.
        cause: ``"cast"``, ``"mask overflow"``, ``"integer wrap"``, ``"accumulation"``, ``"reordering"``, ``"rounded weight"`` or
            ``"rewrite"`` (another value altogether).
        local: relative error that it introduces on the candidate's own inputs.
        expected: what the model's op introduces on the same inputs.
        inherited: relative error of its worst input against the reference.
        detail: in words.
    """

    node: str
    original: str
    op: str
    location: Location
    made_by: str
    cause: str
    local: float
    expected: float
    inherited: float
    detail: str

    def __str__(self) -> str:
        by = f" (made by {self.made_by})" if self.made_by else ""
        where = f"{self.location}: {self.location.source}" if self.location.source else str(self.location)
        inside = f" in module {self.location.module}" if self.location.module else ""
        return f"{self.op} `{self.node}`{by}{inside}\n  at {where}\n  cause: {self.cause}; {self.detail}"


@dataclass
class Localisation:
    """Where a candidate leaves the model.

    Attributes:
        first: the first op to blame, None when every value is explained by its inputs.
        others: further ops whose value their inputs do not explain.
        along: total errors along the model's graph, in order.
        amplifiers: nodes that multiplied the error they were given most, worst first: not to blame.
        compared: how many nodes were compared; unmatched: how many of the model's the candidate does not have.
        unseen: deviations that reach no output: values that a later op throws away.
    """

    first: Blame | None = None
    others: list[Blame] = field(default_factory=list)
    along: list[NodeError] = field(default_factory=list)
    amplifiers: list[NodeError] = field(default_factory=list)
    compared: int = 0
    unmatched: int = 0
    unseen: int = 0


@torch.no_grad()
def localise(
    original: fx.GraphModule,
    inputs: Sequence[Any],
    candidate: fx.GraphModule | None,
    candidate_inputs: Sequence[Any],
    precision: Precision,
    *,
    captures: dict[fx.Node, torch.Tensor] | None = None,
    eps: float | None = None,
    around: Around = nullcontext,
    exact: bool = False,
    progress: Progress | None = None,
) -> Localisation:
    """Find the first op of ``candidate`` whose value its inputs do not explain.

    Args:
        original: the model's captured graph, flat and functional.
        inputs: its inputs.
        candidate: the candidate's graph; None where only ``captures`` of its values are there.
        candidate_inputs: the inputs of that.
        precision: of the reference.
        captures: node of the original → the candidate's value of it, from a device.
        eps: precision that the candidate works in, where that is lower than the model's: errors of that size are not blamed.
        around: a context that the candidate's ops run in: an emulation.
        exact: blame any other bits, not only errors beyond the noise.
        progress: called with the number of nodes done and of all.
    """
    eps = lower_eps(original, candidate, eps)
    return _Sweep(original, inputs, candidate, candidate_inputs, precision, captures or {}, eps, around, exact).run(progress)


def lower_eps(original: fx.GraphModule, candidate: fx.GraphModule | None, eps: float | None) -> float | None:
    """The precision of most of the candidate's weights, where it is lower than that of the model's."""
    if candidate is None or eps is not None:
        return eps
    theirs, ours = _usual_dtype(candidate), _usual_dtype(original)
    if theirs is None or ours is None or torch.finfo(theirs).eps <= torch.finfo(ours).eps:
        return None
    return torch.finfo(theirs).eps


def _usual_dtype(graph_module: fx.GraphModule) -> torch.dtype | None:
    sizes: dict[torch.dtype, int] = {}
    for node in graph_module.graph.find_nodes(op="get_attr"):
        value = val(node)
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            sizes[value.dtype] = sizes.get(value.dtype, 0) + value.numel()
    return max(sizes, key=lambda d: sizes[d]) if sizes else None


class _Sweep:
    """One walk over the original graph, with the candidate's values beside it."""

    def __init__(
        self,
        original: fx.GraphModule,
        inputs: Sequence[Any],
        candidate: fx.GraphModule | None,
        candidate_inputs: Sequence[Any],
        precision: Precision,
        captures: dict[fx.Node, torch.Tensor],
        eps: float | None,
        around: Around,
        exact: bool,
    ) -> None:
        self.original, self.candidate, self.precision, self.eps = original, candidate, precision, eps
        self.around, self.exact = around, exact
        self.inputs, self.candidate_inputs = inputs, candidate_inputs
        self.captures = captures
        self.matching: Matching = match(original, candidate) if candidate is not None else {}
        self.result = Localisation()
        self.total: dict[fx.Node, float] = {}
        self.found: list[tuple[fx.Node, Deviation]] = []
        self.reached: dict[fx.Node, int] = {}  # node → which of the deviations can be seen in its value, one bit each

    def run(self, progress: Progress | None) -> Localisation:
        nodes = list(self.original.graph.nodes)
        lanes = _Lanes(self, keep=frozenset())
        for position, node in enumerate(nodes):
            if progress is not None and position % 16 == 0:
                progress(position, len(nodes))
            if node.op == "output":
                self._forget_unseen(node)
                break
            lanes.step(node)
            self._note(node, lanes)
            lanes.drop_after(node)
        self._conclude()
        return self.result

    def _forget_unseen(self, output: fx.Node) -> None:
        """Values that a later op throws away (what a mask hides, what a minimum cuts off) may be anything."""
        seen = 0
        for node in output.all_input_nodes:
            seen |= self.reached[node]
        kept = [found for position, found in enumerate(self.found) if seen >> position & 1]
        self.result.unseen = len(self.found) - len(kept)
        self.found = kept

    def _note(self, node: fx.Node, lanes: _Lanes) -> None:
        given = lanes.theirs.get(node, MISSING)
        if given is not MISSING and not self._is_body(node):
            self.result.compared += 1
        elif node.op == "call_function":
            self.result.unmatched += 1
        found = lanes.deviation(node)
        carried = 0
        for used in node.all_input_nodes if not lanes.same[node] else ():
            carried |= self.reached[used]
        if found is not None:
            carried |= 1 << len(self.found)
            self.found.append((node, found))
        self.reached[node] = carried
        floats = [t for t in tensors(lanes.high[node]) if t.is_floating_point()]
        if not floats or node.op == "get_attr":
            self.total[node] = max((self.total.get(n, 0.0) for n in node.all_input_nodes), default=0.0)
            return
        source = node.args[0] if node.target in _REARRANGES else None
        if isinstance(source, fx.Node) and lanes.same[node] and source in self.total:
            self.total[node] = self.total[source]  # the same numbers in another order
            return
        noise = relative_error(lanes.own[node], lanes.high[node])
        error = None
        if given is not MISSING:
            error = noise if lanes.same[node] else relative_error(given, lanes.high[node])
        self.total[node] = noise if error is None else error
        handed = max((self.total.get(n, 0.0) for n in node.all_input_nodes), default=0.0)
        factor = error / handed if error is not None and handed and math.isfinite(error) and math.isfinite(handed) else None
        self.result.along.append(NodeError(node.name, printing.short(node.target), locate(node), error, noise, factor))

    @staticmethod
    def _is_body(node: fx.Node) -> bool:
        return node.op == "get_attr" and not isinstance(val(node), torch.Tensor)

    def _conclude(self) -> None:
        for node, found in self.found[:_SHOWN]:
            inherited = max((self.total.get(n, 0.0) for n in node.all_input_nodes), default=0.0)
            if self.result.first is None:
                self.result.first = self._search(node, found, inherited)
            else:
                self.result.others.append(self._blame(self._theirs(node), node, found, inherited))
        guilty = {node.name for node, _ in self.found}
        grown = [e for e in self.result.along if e.amplification is not None and e.amplification > 4 and e.node not in guilty]
        self.result.amplifiers = sorted(grown, key=lambda e: -(e.amplification or 0.0))[:_SHOWN]

    def _theirs(self, node: fx.Node) -> fx.Node:
        return self.matching.get(node, node)

    @staticmethod
    def _blame(culprit: fx.Node, original: fx.Node, found: Deviation, inherited: float) -> Blame:
        location = locate(culprit)
        if not location.file:
            location = locate(original)
        op = printing.short(culprit.target) if culprit.op == "call_function" else f"{culprit.op} {culprit.target}"
        cause = cause_of(culprit, original, found)
        return Blame(
            culprit.name,
            original.name,
            op,
            location,
            printing.made_by(culprit),
            cause,
            found.local,
            found.expected,
            inherited,
            found.detail,
        )

    # -- inside a replaced run ----------------------------------------------------------------------------------------------

    def _search(self, node: fx.Node, found: Deviation, inherited: float) -> Blame:
        """The node at fault among those that only the candidate has and that lead to ``node``."""
        culprit = self._theirs(node)
        if self.candidate is None or node not in self.matching:
            return self._blame(culprit, node, found, inherited)
        matched = set(self.matching.values())
        inside = _between(culprit, matched)
        if not inside:
            return self._blame(culprit, node, found, inherited)
        run = [n for n in self.candidate.graph.nodes if n in inside]
        replaced = self._replaced(run, node)
        lanes = _Lanes(self, keep=frozenset(replaced.values()))
        for step in self.original.graph.nodes:
            lanes.step(step)
            if step is node:
                break
            lanes.drop_after(step)
        needed = {*run, culprit, *(n for r in (*run, culprit) for n in r.all_input_nodes)}
        needed |= {self.matching[n] for n in node.all_input_nodes if n in self.matching}
        stepper = Stepper(self.candidate, self.candidate_inputs, needed, self.around)
        for theirs in run:
            value = stepper.value(theirs)
            ours = replaced.get(theirs)
            if ours is not None:
                wrong = deviation(value, lanes.explained(ours), lanes.explained_high(ours), self.eps)
                if wrong is not None:
                    return self._blame(theirs, ours, wrong, inherited)
        inserted = self._inserted(node, culprit, run, stepper)
        if inserted is not None:
            return self._blame(inserted[0], node, inserted[1], inherited)
        lossy = self._lossiest([*run, culprit], stepper, found)
        return self._blame(lossy or culprit, node, found, inherited)

    def _inserted(self, node: fx.Node, culprit: fx.Node, run: list[fx.Node], stepper: Stepper) -> tuple[fx.Node, Deviation] | None:
        """The first node put between ``culprit`` and one of the model's values that is no longer that value."""
        if culprit.target != node.target:
            return None
        for ours, theirs in zip(_operands(node), _operands(culprit), strict=False):
            if ours not in self.matching or theirs not in run:
                continue
            stands = stepper.value(self.matching[ours])
            behind = {self.matching[ours]}
            for step in run:
                if behind.isdisjoint(step.all_input_nodes):
                    continue
                behind.add(step)
                value = stepper.value(step)
                if [t.shape for t in tensors(value)] != [t.shape for t in tensors(stands)]:
                    continue
                found = deviation(value, stands, stands, self.eps)
                if found is not None:
                    return step, found
        return None

    def _replaced(self, run: list[fx.Node], node: fx.Node) -> dict[fx.Node, fx.Node]:
        """The last node made for each node of the original that the candidate lacks, where it has that node's shape.

        A node that kept its name and calls another op is made for the one of that name.
        """
        names = {n.name: n for n in self.original.graph.nodes}
        last: dict[fx.Node, fx.Node] = {}
        for theirs in run:
            ours = names.get(str(theirs.meta.get("nxfx", {}).get("origin", theirs.name)))
            if ours is None or ours in self.matching or not is_tensor(theirs) or not is_tensor(ours):
                continue
            if tuple(map(str, val(theirs).shape)) == tuple(map(str, val(ours).shape)):
                last[ours] = theirs
        before = _between(node, set(self.matching)) | {node}
        return {theirs: ours for ours, theirs in last.items() if ours in before}

    def _lossiest(self, run: list[fx.Node], stepper: Stepper, found: Deviation) -> fx.Node | None:
        """The op that loses most of its own inputs' precision; the first that makes a nan, an infinity or a wrapped integer."""
        worst, loss = None, 0.0
        for node in run:
            if node.op != "call_function" or is_random(node):
                continue
            value = stepper.value(node)
            operands = {n: stepper.value(n) for n in node.all_input_nodes}
            wide = evaluate(node, operands.__getitem__, _IntegersToo(self.precision.dtype))
            error = relative_error(value, wide)
            if math.isinf(error) and found.kind in ("special", "integer"):
                return node
            if error > loss:
                worst, loss = node, error
        dtype = dtype_of(run[-1])
        own = torch.finfo(dtype).eps if dtype is not None and dtype.is_floating_point else 0.0
        return worst if loss > 2 * own else None


class _IntegersToo(Precision):
    """High precision for integers as well: one that wraps shows."""

    def dtype_for(self, dtype: torch.dtype) -> torch.dtype:
        integer = not dtype.is_floating_point and not dtype.is_complex and dtype is not torch.bool
        return torch.int64 if integer else super().dtype_for(dtype)


class _Lanes:
    """The values at one point of the walk.

    Attributes:
        own, high: the model's own run, and the reference's.
        theirs: the candidate's values of matched nodes.
        same: whether the candidate has the very value that the model has.
    """

    def __init__(self, sweep: _Sweep, keep: frozenset[fx.Node]) -> None:
        self.sweep, self.keep = sweep, keep
        graph = sweep.original.graph
        self.own, self.high = Values(graph), Values(graph)
        self._own_on_theirs, self._high_on_theirs = Values(graph), Values(graph)
        self.theirs: dict[fx.Node, Any] = {}
        self.same: dict[fx.Node, bool] = {}
        self._given: dict[fx.Node, tuple[Any, Any]] = {}
        self._inputs = iter(sweep.inputs)
        pinned = set(sweep.matching.values())
        candidate = sweep.candidate
        self._stepper = Stepper(candidate, sweep.candidate_inputs, pinned, sweep.around) if candidate is not None else None

    def step(self, node: fx.Node) -> None:
        """Compute everything there is to know of ``node``."""
        theirs = self._candidates(node)
        if node.op == "placeholder":
            own = next(self._inputs)
            high = own
        elif node.op == "get_attr":
            own = high = attribute(self.sweep.original, node)
        elif is_random(node):  # one draw for all: it is no fault to draw again
            own = theirs if theirs is not MISSING else evaluate(node, self.own.__getitem__, None)
            high = own
        else:
            own = evaluate(node, self.own.__getitem__, None)
            high = evaluate(node, self.high.__getitem__, self.sweep.precision)
        self.own[node], self.high[node] = own, high
        same_inputs = all(self.same[n] for n in node.all_input_nodes)
        explained, explained_high = own, None
        if node.op == "call_function" and not is_random(node) and not same_inputs:
            explained = evaluate(node, self._own_on_theirs.__getitem__, None)
        if theirs is MISSING:
            self.same[node] = same_inputs
            explained_high = explained if node.op != "call_function" or is_random(node) else self._on_theirs(node)
            self._own_on_theirs[node], self._high_on_theirs[node] = explained, explained_high
        else:
            self.theirs[node] = theirs
            self.same[node] = theirs is own or bits_equal(theirs, own)
            value = own if self.same[node] and _dtypes(theirs) == _dtypes(own) else theirs
            self._own_on_theirs[node] = self._high_on_theirs[node] = value
        self._given[node] = (explained, explained_high)

    def _on_theirs(self, node: fx.Node) -> Any:
        return evaluate(node, self._high_on_theirs.__getitem__, self.sweep.precision)

    def _candidates(self, node: fx.Node) -> Any:
        sweep = self.sweep
        if node in sweep.captures:
            return sweep.captures[node]
        if self._stepper is not None and node in sweep.matching:
            return self._stepper.value(sweep.matching[node])
        return MISSING

    def explained(self, node: fx.Node) -> Any:
        """What the candidate's inputs make of ``node`` in the model's precision."""
        return self._given[node][0]

    def explained_high(self, node: fx.Node) -> Any:
        """The same in high precision."""
        kept = self._given[node][1]
        if kept is not None or node.op != "call_function" or is_random(node):
            return self._given[node][0] if kept is None else kept
        return self._on_theirs(node)

    def deviation(self, node: fx.Node) -> Deviation | None:
        """How the candidate's value deviates from what its inputs explain."""
        theirs = self.theirs.get(node, MISSING)
        if theirs is MISSING or not tensors(theirs):
            return None
        explained = self.explained(node)
        if theirs is explained:
            return None
        if self.sweep.exact:
            return other_bits(theirs, explained)
        if bits_equal(theirs, explained):
            return None
        return deviation(theirs, explained, self.explained_high(node), self.sweep.eps, computed=node.op == "call_function")

    def drop_after(self, node: fx.Node) -> None:
        for values in (self.own, self.high, self._own_on_theirs, self._high_on_theirs):
            dead = values.drop_after(node)
        for used in dead:
            self.theirs.pop(used, None)
            if used not in self.keep:
                self._given.pop(used, None)
            if self._stepper is not None and used in self.sweep.matching:
                self._stepper.release(self.sweep.matching[used])
        if node not in self.keep:
            self._given.pop(node, None)


def _dtypes(value: Any) -> list[torch.dtype]:
    return [t.dtype for t in tensors(value)]


def _operands(node: fx.Node) -> list[fx.Node]:
    """The nodes among the arguments, in order, repeated ones too."""
    found: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), found.append)
    return found


def _between(node: fx.Node, known: set[fx.Node]) -> set[fx.Node]:
    """What leads to ``node`` without passing a node of ``known``."""
    found: set[fx.Node] = set()
    pending = [n for n in node.all_input_nodes if n not in known]
    while pending:
        step = pending.pop()
        if step not in found:
            found.add(step)
            pending += [n for n in step.all_input_nodes if n not in known]
    return found
