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

    def __init__(self, step: Pass, gm: fx.GraphModule, context: PassContext, *wide: torch.dtype) -> None:
        self.step, self.context, self.options = step, context, step.options
        self.result = PassResult()
        self.gm = gm
        self.book = Book(gm.graph, step.name, *wide)
        self.kept: dict[fx.Node, Kept] = {}

    def record(
        self, node: fx.Node, rule: str, before: str, after: str, kind: Kind = Kind.EXACT, bound: str = ""
    ) -> None:
        self.result.rewrites.append(self.step.rewrite(node, f"narrow.{rule}", kind, before, after, bound))

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
            narrow = meta.dtype_of(operand)
            assert narrow is not None
            self.record(operand, "output", name(narrow), name(self.book.wide[narrow]))

    def metadata_assert(self, node: fx.Node) -> None:
        """The assertion now asserts the new dtype."""
        asserted, now = arg(node, 3, "dtype"), meta.dtype_of(node.args[0])
        if now is not None and self.book.narrow.get(asserted) == now:
            integer_ops.set_argument(node, 3 if len(node.args) > 3 else "dtype", now)
            self.record(node, "assert", name(asserted), name(now))
            self.book.changed = True

    def finish(self) -> PassResult:
        self.result.changed = self.book.changed
        self.result.findings += [k.finding() for k in {id(k): k for k in self.kept.values()}.values()]
        return self.result


def name(dtype: torch.dtype) -> str:
    """``"int64"`` for torch.int64."""
    return str(dtype).removeprefix("torch.")
