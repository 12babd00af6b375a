"""float64 and complex128: kept and reported, narrowed where no bit changes, or narrowed throughout on request."""

from __future__ import annotations

import operator

import torch
from torch import fx

from nxfx.analysis import float64, integer_ops
from nxfx.analysis.provenance import Role
from nxfx.graph import meta
from nxfx.narrowing.base import Narrower, name
from nxfx.narrowing.verdicts import op_name
from nxfx.pipeline import Pass, PassContext, PassResult
from nxfx.report.findings import Severity
from nxfx.report.rewrites import Kind


class NarrowFloats(Narrower):
    def __init__(self, step: Pass, gm: fx.GraphModule, context: PassContext) -> None:
        super().__init__(step, gm, context, torch.float64, torch.complex128)
        self.everything = self.options.fp64 == "narrow"

    def run(self, nodes: list[fx.Node]) -> PassResult:
        for node in nodes:
            if node.op == "output":
                self.output(node)
            elif node.target is integer_ops.METADATA_ASSERT:
                self.metadata_assert(node)
            elif not self.book.is_own_cast(node):
                self._visit(node)
        return self.finish()

    def _visit(self, node: fx.Node) -> None:
        operands = self.book.operands(node)
        if node.op in ("placeholder", "get_attr"):
            if self.book.is_wide(node) and not all(u.op == "output" for u in node.users):
                self._source(node)
        elif not isinstance(node.target, torch._ops.OpOverload) and node.target is not operator.getitem:
            self.book.widen(node, operands)
            self._keep(node)
        elif any(self.book.narrowed(n, node) for n in operands) or (self.book.is_wide(node) and self._may_narrow(node)):
            self._narrow(node)
        elif self.book.is_wide(node):
            self._keep(node)

    def _may_narrow(self, node: fx.Node) -> bool:
        if self.everything:
            return True
        return not self.book.operands(node) and float64.rounds_at_every_use(node, float64.filled_with(node))

    def _source(self, node: fx.Node) -> None:
        source = self.context.sources.get(node.name)
        value = source.value if source is not None and source.is_known else None
        exact = float64.rounds_at_every_use(node, value)
        if self.everything or (exact and source is not None and source.role is not Role.INPUT):
            origin = node if node.op == "placeholder" else next(iter(node.users))
            if self.book.cast_source(node, origin):
                self._record(node, "input", exact=exact)
        elif not exact:
            self._keep(node)

    def _narrow(self, node: fx.Node) -> None:
        """``node`` in the narrow dtype: its dtype keyword, sentinels beyond fp32, and what torch then makes of it."""
        exact = not self.everything or float64.rounds_at_every_use(node, float64.filled_with(node))
        was_wide = self.book.is_wide(node)
        asked = node.kwargs.get("dtype")
        if isinstance(asked, torch.dtype) and asked in self.book.narrow:
            node.update_kwarg("dtype", self.book.narrow[asked])
        for key, number in integer_ops.python_numbers(node).items() if self.everything else ():
            saturated = float64.saturated(number)
            if saturated != number:
                integer_ops.set_argument(node, key, saturated)
                message = f"{number:g} is beyond float32 and became {saturated:g}"
                self.result.findings.append(self.step.finding(node, "NX302", Severity.WARNING, message))
        if was_wide:
            self.book.re_evaluate(node)
            self._record(node, "float", exact=exact)

    def _record(self, node: fx.Node, rule: str, *, exact: bool) -> None:
        if exact:
            self.record(node, rule, "float64", "float32")
        else:
            self.record(node, rule, "float64", "float32", Kind.REASSOCIATED, "rounded to fp32 on request (fp64=narrow)")

    def _keep(self, node: fx.Node) -> None:
        if not self.book.is_wide(node):
            return
        dtype = meta.dtype_of(node) or torch.float64
        source = self.context.sources.get(node.name)
        what = f"`{source.name}` is {name(dtype)}" if source is not None else f"`{op_name(node)}` gives {name(dtype)}"
        fix = f"write {name(self.book.narrow[dtype])} in the model, or let narrow-64bit{{fp64=narrow}} compute in it"
        if sums := float64.done_on_purpose(node):
            what = f"`{'`, `'.join(sums)}` in float64 between casts: no Neuron generation has it, and it becomes float32 there"
            fix = "pass --auto-cast=none, or a matmul becomes bf16; narrow-64bit{fp64=narrow} makes it float32 for CPU and device alike"
        self.keep(node, "NX302", what, fix)
