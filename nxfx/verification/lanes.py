"""Two graphs in step: at each node the model's own value, the reference's, the candidate's, and what its inputs explain."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from nxfx.verification.deviation import Deviation, bits_equal, deviation, other_bits, tensors
from nxfx.verification.matching import Matching
from nxfx.verification.precision import Precision
from nxfx.verification.stepping import MISSING, Around, Stepper, Values, attribute, evaluate, is_random


@dataclass(frozen=True)
class Comparison:
    """What is compared, and how; see :func:`~nxfx.verification.localise.localise`.

    Attributes:
        matching: node of the original → the candidate's node that stands for it.
    """

    original: fx.GraphModule
    inputs: Sequence[Any]
    candidate: fx.GraphModule | None
    candidate_inputs: Sequence[Any]
    precision: Precision
    captures: dict[fx.Node, torch.Tensor] = field(default_factory=dict)
    eps: float | None = None
    around: Around = nullcontext
    exact: bool = False
    matching: Matching = field(default_factory=dict)


class Lanes:
    """The values at one point of the walk.

    Attributes:
        own, high: the model's own run, and the reference's.
        theirs: the candidate's values of matched nodes.
        same: whether the candidate has the very value that the model has.
    """

    def __init__(self, of: Comparison, keep: frozenset[fx.Node]) -> None:
        self.of, self.keep = of, keep
        graph = of.original.graph
        self.own, self.high = Values(graph), Values(graph)
        self._own_on_theirs, self._high_on_theirs = Values(graph), Values(graph)
        self.theirs: dict[fx.Node, Any] = {}
        self.same: dict[fx.Node, bool] = {}
        self._given: dict[fx.Node, tuple[Any, Any]] = {}
        self._inputs = iter(of.inputs)
        pinned = set(of.matching.values())
        candidate = of.candidate
        self._stepper = Stepper(candidate, of.candidate_inputs, pinned, of.around) if candidate is not None else None

    def step(self, node: fx.Node) -> None:
        """Compute everything there is to know of ``node``."""
        theirs = self._candidates(node)
        if node.op == "placeholder":
            own = next(self._inputs)
            high = own
        elif node.op == "get_attr":
            own = high = attribute(self.of.original, node)
        elif is_random(node):  # one draw for all: it is no fault to draw again
            own = theirs if theirs is not MISSING else evaluate(node, self.own.__getitem__, None)
            high = own
        else:
            own = evaluate(node, self.own.__getitem__, None)
            high = evaluate(node, self.high.__getitem__, self.of.precision)
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
        return evaluate(node, self._high_on_theirs.__getitem__, self.of.precision)

    def _candidates(self, node: fx.Node) -> Any:
        of = self.of
        if node in of.captures:
            return of.captures[node]
        if self._stepper is not None and node in of.matching:
            return self._stepper.value(of.matching[node])
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
        if self.of.exact:
            return other_bits(theirs, explained)
        if bits_equal(theirs, explained):
            return None
        return deviation(theirs, explained, self.explained_high(node), self.of.eps, computed=node.op == "call_function")

    def drop_after(self, node: fx.Node) -> None:
        for values in (self.own, self.high, self._own_on_theirs, self._high_on_theirs):
            dead = values.drop_after(node)
        for used in dead:
            self.theirs.pop(used, None)
            if used not in self.keep:
                self._given.pop(used, None)
            if self._stepper is not None and used in self.of.matching:
                self._stepper.release(self.of.matching[used])
        if node not in self.keep:
            self._given.pop(node, None)


def _dtypes(value: Any) -> list[torch.dtype]:
    return [t.dtype for t in tensors(value)]
