"""The node at fault inside a run of nodes that a pass put in place of the model's."""

from __future__ import annotations

import math

import torch
from torch import fx

from nxfx.graph import printing
from nxfx.graph.meta import dtype_of, is_tensor, val
from nxfx.report.locations import locate
from nxfx.verification.causes import cause_of
from nxfx.verification.deviation import Deviation, deviation, relative_error, tensors
from nxfx.verification.lanes import Comparison, Lanes
from nxfx.verification.localisation import Blame
from nxfx.verification.precision import Precision
from nxfx.verification.stepping import Stepper, evaluate, is_random


def search(of: Comparison, node: fx.Node, found: Deviation, inherited: float) -> Blame:
    """The node at fault among those that only the candidate has and that lead to ``node``."""
    culprit = of.matching.get(node, node)
    if of.candidate is None or node not in of.matching:
        return blame(culprit, node, found, inherited)
    matched = set(of.matching.values())
    inside = _between(culprit, matched)
    if not inside:
        return blame(culprit, node, found, inherited)
    run = [n for n in of.candidate.graph.nodes if n in inside]
    replaced = _replaced(of, run, node)
    lanes = Lanes(of, keep=frozenset(replaced.values()))
    for step in of.original.graph.nodes:
        lanes.step(step)
        if step is node:
            break
        lanes.drop_after(step)
    needed = {*run, culprit, *(n for r in (*run, culprit) for n in r.all_input_nodes)}
    needed |= {of.matching[n] for n in node.all_input_nodes if n in of.matching}
    stepper = Stepper(of.candidate, of.candidate_inputs, needed, of.around)
    for theirs in run:
        value = stepper.value(theirs)
        ours = replaced.get(theirs)
        if ours is not None:
            wrong = deviation(value, lanes.explained(ours), lanes.explained_high(ours), of.eps)
            if wrong is not None:
                return blame(theirs, ours, wrong, inherited)
    inserted = _inserted(of, node, culprit, run, stepper)
    if inserted is not None:
        return blame(inserted[0], node, inserted[1], inherited)
    lossy = _lossiest(of, [*run, culprit], stepper, found)
    return blame(lossy or culprit, node, found, inherited)


def _inserted(
    of: Comparison, node: fx.Node, culprit: fx.Node, run: list[fx.Node], stepper: Stepper
) -> tuple[fx.Node, Deviation] | None:
    """The first node put between ``culprit`` and one of the model's values that is no longer that value."""
    if culprit.target != node.target:
        return None
    for ours, theirs in zip(_operands(node), _operands(culprit), strict=False):
        if ours not in of.matching or theirs not in run:
            continue
        stands = stepper.value(of.matching[ours])
        behind = {of.matching[ours]}
        for step in run:
            if behind.isdisjoint(step.all_input_nodes):
                continue
            behind.add(step)
            value = stepper.value(step)
            if [t.shape for t in tensors(value)] != [t.shape for t in tensors(stands)]:
                continue
            found = deviation(value, stands, stands, of.eps)
            if found is not None:
                return step, found
    return None


def _replaced(of: Comparison, run: list[fx.Node], node: fx.Node) -> dict[fx.Node, fx.Node]:
    """The last node made for each node of the original that the candidate lacks, where it has that node's shape.

    A node that kept its name and calls another op is made for the one of that name.
    """
    names = {n.name: n for n in of.original.graph.nodes}
    last: dict[fx.Node, fx.Node] = {}
    for theirs in run:
        ours = names.get(str(theirs.meta.get("nxfx", {}).get("origin", theirs.name)))
        if ours is None or ours in of.matching or not is_tensor(theirs) or not is_tensor(ours):
            continue
        if tuple(map(str, val(theirs).shape)) == tuple(map(str, val(ours).shape)):
            last[ours] = theirs
    before = _between(node, set(of.matching)) | {node}
    return {theirs: ours for ours, theirs in last.items() if ours in before}


def _lossiest(of: Comparison, run: list[fx.Node], stepper: Stepper, found: Deviation) -> fx.Node | None:
    """The op that loses most of its own inputs' precision; the first that makes a nan, an infinity or a wrapped integer."""
    worst, loss = None, 0.0
    for node in run:
        if node.op != "call_function" or is_random(node):
            continue
        value = stepper.value(node)
        operands = {n: stepper.value(n) for n in node.all_input_nodes}
        wide = evaluate(node, operands.__getitem__, _IntegersToo(of.precision.dtype))
        error = relative_error(value, wide)
        if math.isinf(error) and found.kind in ("special", "integer"):
            return node
        if error > loss:
            worst, loss = node, error
    dtype = dtype_of(run[-1])
    own = torch.finfo(dtype).eps if dtype is not None and dtype.is_floating_point else 0.0
    return worst if loss > 2 * own else None


def blame(culprit: fx.Node, original: fx.Node, found: Deviation, inherited: float) -> Blame:
    """``culprit`` is to blame for the value of ``original``."""
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


class _IntegersToo(Precision):
    """High precision for integers as well: one that wraps shows."""

    def dtype_for(self, dtype: torch.dtype) -> torch.dtype:
        integer = not dtype.is_floating_point and not dtype.is_complex and dtype is not torch.bool
        return torch.int64 if integer else super().dtype_for(dtype)


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
