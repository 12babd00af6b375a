"""exact-integer-sums: integer products and scattered sums that Neuron computes in fp32, made exact or reported."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import fx

from nxfx.analysis import dtype_rules
from nxfx.analysis.intervals import Interval, Ranges, arg, fits
from nxfx.analysis.range_rules import overloads
from nxfx.analysis.ranges import analyse
from nxfx.graph import meta
from nxfx.graph.builder import NodeBuilder
from nxfx.pipeline import Pass, PassContext, PassResult
from nxfx.report.findings import Severity
from nxfx.report.rewrites import Kind
from nxfx.targets import Target

aten = torch.ops.aten

_DOTS = frozenset(
    overloads("mm", "bmm", "matmul", "dot", "mv", "einsum", "addmm", "baddbmm", "addmv", "addbmm", "linear", "vdot", "inner", "tensordot")
)
_SCATTERS = frozenset([aten.scatter_add.default, aten.index_add.default, aten.index_put.default, aten._unsafe_index_put.default])
_POWERS = frozenset([aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor, aten.pow.Scalar])
# Where the summed values stand; a list of tensors counts as one place.
_VALUES: dict[Any, tuple[int, ...]] = {
    **dict.fromkeys(overloads("mm", "bmm", "matmul", "dot", "mv"), (0, 1)),
    aten.einsum.default: (1,),
    aten.scatter_add.default: (0, 3),
    aten.index_add.default: (0, 3),
    aten.index_put.default: (0, 2),
    aten._unsafe_index_put.default: (0, 2),
}
# What --implicit-integer-downcast calls the operation (neuronx-cc command-line reference).
_DOWNCAST = {
    "NCC_EVRF035": "dot",
    "NCC_EVRF060": "scatter",
    "NCC_EVRF061": "all_reduce",
    "NCC_EVRF062": "pow",
    "NCC_EVRF063": "reduce_scatter",
}
_LIMIT = dtype_rules.exact_integer(torch.float32)
_EXACT: Interval = (-_LIMIT, _LIMIT)


def _collectives() -> dict[Any, tuple[str, str]]:
    """Functional collectives that reduce → what they are and the compiler's error for integers."""
    names = {
        "all_reduce": ("all-reduce", "NCC_EVRF061"),
        "all_reduce_coalesced": ("all-reduce", "NCC_EVRF061"),
        "reduce_scatter_tensor": ("reduce-scatter", "NCC_EVRF063"),
        "reduce_scatter_tensor_coalesced": ("reduce-scatter", "NCC_EVRF063"),
    }
    library = torch.ops._c10d_functional
    return {getattr(library, n).default: what for n, what in names.items() if hasattr(library, n)}


class ExactIntegerSums(Pass):
    """Integer dot products and scatter-adds that provably stay within 2^24 are computed in fp32, where they are exact; others are
    reported.

    Given::

        %a : int32[4, 8] = placeholder                      # declared: [0, 99]
        %b : int32[8, 4] = placeholder                      # declared: [0, 99]
        %counts : int32[4, 4] = aten.mm.default(%a, %b)     # at most 8 * 99 * 99 < 2^24

    Result::

        %_to_copy : float32[4, 8] = aten._to_copy.default(%a, dtype=float32)
        %_to_copy_1 : float32[8, 4] = aten._to_copy.default(%b, dtype=float32)
        %mm : float32[4, 4] = aten.mm.default(%_to_copy, %_to_copy_1)
        %counts : int32[4, 4] = aten._to_copy.default(%mm, dtype=int32)

    With ``--implicit-integer-downcast=all`` neuronx-cc runs integer dots, scatter-adds, all-reduces and reduce-scatters in fp32 and
    int64 powers in int32, without a word; with ``none`` it refuses them (NCC_EVRF035, 060, 061, 063, 062; release notes of SDK 2.32).
    An int64 power by 2, 3 or 4 becomes products, which wrap as it does.
    """

    name = "exact-integer-sums"
    after: ClassVar[tuple[str, ...]] = ("narrow-64bit",)

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self.collectives = _collectives()
        self.targets = _DOTS | _SCATTERS | _POWERS | frozenset(self.collectives)  # type: ignore[misc]

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> PassResult:
        result = PassResult()
        found = [n for t in self.targets or () for n in graph_module.graph.find_nodes(op="call_function", target=t, sort=False)]
        found = [n for n in found if _is_concerned(n)]
        if not found:
            return result
        order = {n: i for i, n in enumerate(graph_module.graph.nodes)}
        ranges = analyse(graph_module, context.sources, context.requirements)
        build = NodeBuilder(graph_module.graph, self.name)
        for node in sorted(found, key=order.__getitem__):
            if node.target in _POWERS:
                self._power(node, build, result, context.target)
            elif node.target in self.collectives:
                self._collective(node, ranges, result, context.target)
            elif _is_exact(node, ranges):
                self._in_fp32(node, build, result, context)
            else:
                dot = node.target in _DOTS
                what, code = ("dot product", "NCC_EVRF035") if dot else ("scatter-add", "NCC_EVRF060")
                fix = "multiply and sum element by element" if dot else "sum a one-hot mask times the values"
                fix = f"bound the values (ranges=, clamp), or {fix}"
                self._report(node, what, code, _reach(ranges.proved(node)), fix, result, context.target)
        result.changed = bool(result.rewrites)
        return result

    def _in_fp32(self, node: fx.Node, build: NodeBuilder, result: PassResult, context: PassContext) -> None:
        dtype = meta.dtype_of(node)
        assert dtype is not None and isinstance(node.target, torch._ops.OpOverload)
        with build.before(node):
            args = list(node.args)
            for place in _VALUES[node.target]:
                args[place] = fx.node.map_arg(args[place], lambda n: build.cast(n, torch.float32))
            product = build.call(node.target, *args, **node.kwargs)
            back = build.cast(product, dtype)
        if node.target in _DOTS:
            context.float32_products[product.name] = f"`{product.name}`, a product of integers, in bf16: wrong above 256"
        kind = "integer-dot" if node.target in _DOTS else "integer-scatter-add"
        before = str(dtype).removeprefix("torch.")
        result.rewrites.append(self.rewrite(node, f"sums.{kind}", Kind.EXACT, before, "float32, exact below 2^24"))
        node.replace_all_uses_with(back)
        node.graph.erase_node(node)

    def _power(self, node: fx.Node, build: NodeBuilder, result: PassResult, target: Target) -> None:
        base, exponent = node.args
        if not isinstance(base, fx.Node) or type(exponent) is not int or exponent not in (2, 3, 4):
            fix = "multiply, or bound it so that it is an int32 power"
            self._report(node, "power", "NCC_EVRF062", "in int64", fix, result, target, "int32")
            return
        with build.before(node):
            square = build.call(aten.mul.Tensor, base, base)
            product = square if exponent == 2 else build.call(aten.mul.Tensor, square, base if exponent == 3 else square)
        result.rewrites.append(self.rewrite(node, "sums.power", Kind.EXACT, f"pow(x, {exponent})", "products"))
        node.replace_all_uses_with(product)
        node.graph.erase_node(node)

    def _collective(self, node: fx.Node, ranges: Ranges, result: PassResult, target: Target) -> None:
        what, code = self.collectives[node.target]
        operands = node.args[0] if isinstance(node.args[0], (list, tuple)) else node.args[:1]
        bounds = [ranges.proved(n) for n in operands if isinstance(n, fx.Node)]
        picks = node.args[1] in ("max", "min")  # one of the values; a sum grows with the number of ranks
        if not (picks and all(b is not None and fits(b, _EXACT) for b in bounds)):
            fix = "reduce float32 values below 2^24, or halves of the integer"
            self._report(node, what, code, "over all ranks", fix, result, target)

    def _report(
        self,
        node: fx.Node,
        what: str,
        code: str,
        reach: str,
        fix: str,
        result: PassResult,
        target: Target,
        runs_in: str = "fp32, exact to 2^24",
    ) -> None:
        """An error where nxfx's own flag makes it one. A compiler without the flag, and an int32 dot on NeuronCore-v2, goes on."""
        refused = target.integer_downcast_flag and not (code == "NCC_EVRF035" and target.int32_dot and meta.dtype_of(node) is torch.int32)
        severity = Severity.ERROR if refused else Severity.WARNING
        if refused:
            fix += f"; or accept the rounding with --implicit-integer-downcast={_DOWNCAST[code]}"
        consequence = f"refuses it with --implicit-integer-downcast=none ({code})"
        message = f"integer {what} {reach}: neuronx-cc computes it in {runs_in}, or {consequence}"
        result.findings.append(self.finding(node, "NX305", severity, message, fix))


def _is_concerned(node: fx.Node) -> bool:
    value = node.meta.get("val")
    first = value[0] if isinstance(value, (list, tuple)) and value else value
    dtype = first.dtype if isinstance(first, torch.Tensor) else None
    if not dtype_rules.is_integral(dtype) or dtype is torch.bool:
        return False
    if node.target in _POWERS:
        return dtype is torch.int64
    return node.target not in (aten.index_put.default, aten._unsafe_index_put.default) or bool(arg(node, 3, "accumulate", False))


def _is_exact(node: fx.Node, ranges: Ranges) -> bool:
    """Whether every value and every partial sum, in whatever order, is an integer within 2^24."""
    places = _VALUES.get(node.target)
    if places is None or not fits(ranges.proved(node) or (0, _LIMIT + 1), _EXACT):
        return False
    values = [n for place in places for n in (node.args[place] if isinstance(node.args[place], (list, tuple)) else [node.args[place]])]  # type: ignore[union-attr]
    return all(isinstance(n, fx.Node) and fits(ranges.proved(n) or (0, _LIMIT + 1), _EXACT) for n in values)


def _reach(bounds: Interval | None) -> str:
    if bounds is None or bounds in (dtype_rules.integer_bounds(torch.int32), dtype_rules.integer_bounds(torch.int64)):
        return "without a known bound"
    return f"that may reach {max(bounds[1], -bounds[0])}"
