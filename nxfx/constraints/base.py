"""What every rule of check-constraints works with: the target, the ranges, and where results are noted.

A rule is ``rule(check, node)``. It looks at one node, reports what the compiler would refuse there, or asks for a rewrite with
:meth:`Checker.later`. Rewrites are made after every rule has looked: what is known of a node's values is known of the graph as it was.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx

from nxfx.analysis import dtype_rules
from nxfx.analysis.intervals import Interval, Ranges, fits
from nxfx.analysis.ranges import analyse
from nxfx.graph.builder import NodeBuilder
from nxfx.pipeline import Pass, PassContext, PassResult
from nxfx.report.findings import Severity
from nxfx.report.rewrites import Kind

LIMIT = dtype_rules.exact_integer(torch.float32)
EXACT: Interval = (-LIMIT, LIMIT)
"""Integers that fp32 holds exactly."""


@dataclass(frozen=True)
class Constraint:
    """One documented constraint of the compiler.

    Attributes:
        code: nxfx's code.
        error: the compiler's, as AWS's list of Neuron Compiler Error Codes has it.
        rule: what the compiler takes or refuses, as the end of a sentence.
        fix: what to write instead.
    """

    code: str
    error: str
    rule: str
    fix: str


class Checker:
    """One run over one graph."""

    def __init__(self, step: Pass, gm: fx.GraphModule, context: PassContext) -> None:
        self.step = step
        self.gm = gm
        self.context = context
        self.target = context.target
        self.build = NodeBuilder(gm.graph, step.name)
        self.result = PassResult()
        self._rewrites: list[Callable[[], None]] = []

    @functools.cached_property
    def ranges(self) -> Ranges:
        """Bounds of the graph's integers; computed when a rule asks for the first time."""
        return analyse(self.gm, self.context.sources, self.context.requirements)

    def within(self, node: object, limits: Interval = EXACT) -> bool:
        """Whether every element of an integer ``node`` (or the number) is proved to lie in ``limits``."""
        bounds = self.ranges.proved(node) if isinstance(node, fx.Node) else (node, node) if isinstance(node, int) else None
        return bounds is not None and fits(bounds, limits)

    def report(self, node: fx.Node, constraint: Constraint, what: str, severity: Severity = Severity.ERROR, fix: str = "") -> None:
        """Note that the compiler refuses ``node``."""
        message = f"{what}: {constraint.rule} ({constraint.error})"
        self.result.findings.append(self.step.finding(node, constraint.code, severity, message, fix or constraint.fix))

    def later(self, rewrite: Callable[[], None]) -> None:
        """Make ``rewrite`` once every rule has looked at the graph."""
        self._rewrites.append(rewrite)

    def rewritten(self, node: fx.Node, rule: str, before: str, after: str) -> None:
        """Note an exact rewrite of ``node``, which is now without users, and take it out."""
        self.result.rewrites.append(self.step.rewrite(node, f"constraints.{rule}", Kind.EXACT, before, after))
        node.graph.erase_node(node)

    def finish(self) -> PassResult:
        """Make the rewrites asked for; the result of the run."""
        for rewrite in self._rewrites:
            rewrite()
        self.result.changed = bool(self.result.rewrites)
        if self.result.changed and "ranges" in self.__dict__:
            known = self.context.premises
            known.extend(p for p in self.ranges.premises if p not in known)
        return self.result


Rule = Callable[[Checker, fx.Node], None]


def items(node: fx.Node) -> list[tuple[int, fx.Node]] | None:
    """``(index, getitem)`` of every reader of a multi-output node, None when something reads the whole of it."""
    found = []
    for user in node.users:
        if user.target is not operator.getitem or not isinstance(user.args[1], int):
            return None
        found.append((user.args[1], user))
    return found
