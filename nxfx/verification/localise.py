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
from typing import Any

import torch
from torch import fx

from nxfx.graph import printing
from nxfx.graph.meta import val
from nxfx.report.locations import locate
from nxfx.verification.culprit import blame, search
from nxfx.verification.deviation import Deviation, relative_error, tensors
from nxfx.verification.lanes import Comparison, Lanes
from nxfx.verification.localisation import Localisation, NodeError
from nxfx.verification.matching import match
from nxfx.verification.precision import Precision
from nxfx.verification.stepping import MISSING, Around

aten = torch.ops.aten
_SHOWN = 20
# The result holds the operand's numbers, all of them, so its error is the operand's.
_REARRANGES = frozenset(
    {aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.permute.default, aten.transpose.int, aten.t.default,
     aten.unsqueeze.default, aten.squeeze.dim, aten.clone.default, aten.alias.default, aten.detach.default, aten.contiguous.default}
)  # fmt: skip
Progress = Callable[[int, int], None]


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
    matching = match(original, candidate) if candidate is not None else {}
    of = Comparison(original, inputs, candidate, candidate_inputs, precision, captures or {}, eps, around, exact, matching)
    return _Sweep(of).run(progress)


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

    def __init__(self, of: Comparison) -> None:
        self.of = of
        self.result = Localisation()
        self.total: dict[fx.Node, float] = {}
        self.found: list[tuple[fx.Node, Deviation]] = []
        self.reached: dict[fx.Node, int] = {}  # node → which of the deviations can be seen in its value, one bit each

    def run(self, progress: Progress | None) -> Localisation:
        nodes = list(self.of.original.graph.nodes)
        lanes = Lanes(self.of, keep=frozenset())
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

    def _note(self, node: fx.Node, lanes: Lanes) -> None:
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
                self.result.first = search(self.of, node, found, inherited)
            else:
                self.result.others.append(blame(self.of.matching.get(node, node), node, found, inherited))
        guilty = {node.name for node, _ in self.found}
        grown = [e for e in self.result.along if e.amplification is not None and e.amplification > 4 and e.node not in guilty]
        self.result.amplifiers = sorted(grown, key=lambda e: -(e.amplification or 0.0))[:_SHOWN]
