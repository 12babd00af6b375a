"""What narrowing of integers and of floats have in common: records, kept values, outputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from nxfx.analysis import integer_ops
from nxfx.analysis.intervals import arg
from nxfx.graph import meta
from nxfx.narrowing.book import Book
from nxfx.pipeline import Pass, PassContext, PassResult
from nxfx.report.findings import Finding, Severity
from nxfx.report.rewrites import Kind


@dataclass
class Kept:
    """A 64-bit value that stays, and everything computed from it that therefore stays too."""

    node: fx.Node
    code: str
    reason: str
    fix: str
    count: int = 0

    def finding(self) -> Finding:
        more = f"; {self.count} more value{'s' if self.count > 1 else ''} computed from it" if self.count else ""
        return Finding.at(self.node, self.code, Severity.WARNING, f"{self.reason}: 64 bits are kept{more}", self.fix)


class Narrower:
    """What both dtypes have in common: records, findings and the consumers that must see the wide dtype."""

    def __init__(
        self, step: Pass, gm: fx.GraphModule, context: PassContext, wide: torch.dtype, narrow: torch.dtype
    ) -> None:
        self.step, self.context, self.options = step, context, step.options
        self.result = PassResult()
        self.gm = gm
        self.book = Book(gm.graph, step.name, wide, narrow)
        self.kept: dict[fx.Node, Kept] = {}
        self._names = (str(wide).removeprefix("torch."), str(narrow).removeprefix("torch."))

    def record(self, node: fx.Node, rule: str, before: str = "", after: str = "", kind: Kind = Kind.EXACT, bound: str = "") -> None:
        rewrite = self.step.rewrite(node, f"narrow.{rule}", kind, before or self._names[0], after or self._names[1], bound)
        self.result.rewrites.append(rewrite)

    def keep(self, node: fx.Node, code: str, reason: str, fix: str) -> None:
        if self.inherit(node):
            self.kept[node].count += 1
        else:
            self.kept[node] = Kept(node, code, reason, fix)

    def inherit(self, node: fx.Node) -> bool:
        """Whether ``node`` is computed from a kept value, which is then the one to report."""
        cause = next((self.kept[n] for n in node.all_input_nodes if n in self.kept), None)
        if cause is not None:
            self.kept[node] = cause
        return cause is not None

    def output(self, node: fx.Node) -> None:
        """Outputs keep their dtype: a cast back, which the boundary takes out."""
        peel = self.context.is_body or self.options.boundary == "keep"
        for operand in self.book.restore(node, peel=peel):
            self.record(operand, "output", self._names[1], self._names[0])

    def metadata_assert(self, node: fx.Node) -> None:
        """The assertion now asserts the new dtype."""
        if self.book.operands(node) and node.args[0] not in self.kept and meta.dtype_of(node.args[0]) == self.book.narrow:
            key: int | str = 3 if len(node.args) > 3 else "dtype"
            if arg(node, 3, "dtype") == self.book.wide:
                integer_ops.set_argument(node, key, self.book.narrow)
                self.record(node, "assert")
                self.book.changed = True

    def finish(self) -> PassResult:
        self.result.changed = self.book.changed
        self.result.findings += [k.finding() for k in {id(k): k for k in self.kept.values()}.values()]
        return self.result
