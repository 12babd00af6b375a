"""What a write becomes, and what all kinds of writes need: the nodes of now, casts, products, copies."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch
from torch import fx

from nxfx.analysis.write_plan import PlannedWrite, WritePlan
from nxfx.graph import meta, storage
from nxfx.graph.builder import NodeBuilder
from nxfx.graph.masks import MaskBuilder, has_shape
from nxfx.pipeline import Pass, PassContext
from nxfx.report.findings import Finding, Severity

aten = torch.ops.aten
UNCHANGED = "its base: the write changes nothing"


@dataclass
class Made:
    """What a write became: the node (None when nothing needs it whole), the countable rule and a few words."""

    node: fx.Node | None
    rule: str
    words: str = "where"


class Masker:
    """The state of one graph's rewrite.

    Args:
        step: the pass, for whom findings are made.
        multiply: see the pass's option.

    Attributes:
        plan: which writes are replaced.
        findings: what there is to say about the writes so far.
        replaced: node → what stands for it by now.
    """

    def __init__(self, step: Pass, multiply: str, graph: fx.Graph, context: PassContext) -> None:
        self.step, self.multiply, self.context = step, multiply, context
        self.plan = WritePlan(graph, context.sources)
        self.build = NodeBuilder(graph, step.name)
        self.masks = MaskBuilder(self.build)
        self.findings: list[Finding] = []
        self.replaced: dict[fx.Node, fx.Node] = {}

    def now(self, node: fx.Node) -> fx.Node:
        """What stands for ``node`` in the graph by now."""
        return self.replaced.get(node, node)

    def find(self, planned: PlannedWrite, code: str, severity: Severity, message: str, fix: str = "") -> None:
        """Report something about one write."""
        self.findings.append(self.step.finding(planned.scatter, code, severity, message, fix))

    def multiplies(self, base: fx.Node, number: torch.Tensor, planned: PlannedWrite) -> bool:
        """Whether a fill with ``number`` becomes a multiplication; its premises and its risk are noted."""
        dtype, mode = meta.val(base).dtype, self.multiply
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
            self.find(planned, "NX204", Severity.WARNING, message, fix)
        return bool(mode == "always")

    def product(self, base: fx.Node, rest: fx.Node) -> Made:
        op = aten.bitwise_and.Tensor if meta.dtype_of(base) is torch.bool else aten.mul.Tensor
        return Made(
            self.masks.elementwise(op, base, rest, dtype=meta.val(base).dtype),
            "multiply",
            "multiplication by the mask of the rest",
        )

    def number(self, number: torch.Tensor, base: fx.Node) -> fx.Node:
        value = meta.val(base)
        key = ("number", repr(number.item()), value.dtype, value.device)
        return self.masks.shared(key, lambda: self.build.scalar(number.item(), value.dtype, value.device))

    def cast(self, node: fx.Node, base: fx.Node, casts: Iterable[torch.dtype]) -> fx.Node:
        """``node`` as ``copy_`` writes it: in the base's dtype, on the base's device."""
        for dtype in (*casts, meta.val(base).dtype):
            if meta.dtype_of(node) != dtype:
                node = self.build.call(aten._to_copy.default, node, dtype=dtype)
        device = meta.val(base).device
        return node if meta.val(node).device == device else self.build.call(aten._to_copy.default, node, device=device)

    def everything(self, node: fx.Node, base: fx.Node, planned: PlannedWrite) -> Made:
        """A write of every element is what it writes."""
        if has_shape(node, meta.val(base).shape):
            return Made(self.own(node, planned), "whole", "what it writes")
        sizes = [self.masks.size(base, dim) for dim in range(meta.val(base).dim())]
        expanded = self.build.call(aten.expand.default, node, sizes)
        return Made(
            self.build.call(aten.clone.default, expanded, memory_format=torch.contiguous_format),
            "whole",
            "what it writes",
        )

    def own(self, node: fx.Node, planned: PlannedWrite) -> fx.Node:
        """``node`` as the result of a write: a copy where the caller could see that the memory is shared."""
        if not storage.escapes(planned.node):
            return node
        seen = storage.may_alias(node) or any(self.plan.is_shared(n) for n in planned.inputs if self.now(n) is node)
        return self.build.call(aten.clone.default, node) if seen else node


def op_name(node: fx.Node) -> str:
    """The op as the user knows it."""
    return str(node.target).removeprefix("aten.").removesuffix(".default")


def erase_unused(graph: fx.Graph, stack: list[fx.Node], candidates: Collection[fx.Node] | None = None) -> None:
    """Remove the nodes of ``stack`` that nothing uses, and then those of ``candidates`` that only they used."""
    erased = set()
    while stack:
        node = stack.pop()
        if node not in erased and not node.users and node.op == "call_function":
            erased.add(node)
            stack += [n for n in node.all_input_nodes if candidates is None or n in candidates]
            graph.erase_node(node)


def with_trace(node: fx.Node) -> fx.Node:
    """``node``, or for a node that knows no user line (in a backward graph) one nearby that does."""
    near = [node]
    for candidate in near:
        if "stack_trace" in candidate.meta:
            return candidate
        if len(near) < 64:
            near += [n for n in (*candidate.all_input_nodes, *candidate.users) if n not in near]
    return node
