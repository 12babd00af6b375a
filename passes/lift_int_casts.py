"""lift-int-casts: integers stay exact until it is safe to round."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from nxfx.analysis import ranges
from nxfx.analysis.broadcast_products import bit_equal, worth_spreading
from nxfx.analysis.float_ops import Family, dtype_of, op_name
from nxfx.analysis.float_region import Region, grow
from nxfx.analysis.integer_origin import Entry, IntegerOrigins
from nxfx.graph import outer_products
from nxfx.graph.builder import NodeBuilder
from nxfx.lifting import findings
from nxfx.lifting.edits import Lift
from nxfx.lifting.words import described, exact_limit, short
from nxfx.pipeline import Pass, PassContext, PassResult
from nxfx.report.rewrites import Kind, Rewrite


@dataclass(frozen=True)
class LiftOptions:
    """Options of lift-int-casts.

    Attributes:
        outer_products: turn matrix products of integer-derived values with one term a sum into broadcast products.
        terms: and those with up to so many terms a sum (coordinates times a matrix), four at most, as sums of broadcast products.
    """

    outer_products: bool = True
    terms: int = 4


class LiftIntCasts(Pass):
    """Integers beyond a low-precision float's exact range are not rounded before they are used.

    Every conversion of an integer to bf16, fp16 or fp8, written or hidden in a type promotion, becomes one to float32
    unless its range is exactly representable. What is computed from it, by any op that makes floats of its operands
    alone, stays float32 until it meets an activation, an output, a large matrix product or a higher-order op; there it is
    cast back to the dtype the model had, once per value. So does what low precision rounds before sin, exp, floor and the
    like magnify the error, and sums of ones that low precision stops counting. Matrix products of such values with
    one term a sum, or a few, become broadcast products, which no auto-cast rounds. Class: ``refines``; a sum of a few
    products is ``reassociated``. Other matrix products of such values are named in ``report.compiler_args``.

    Given::

        %position_ids : int64[1, 4096] = placeholder          # up to 131071
        %_to_copy : bfloat16[1, 4096] = aten._to_copy(%position_ids, dtype=bfloat16)
        %unsqueeze : bfloat16[1, 4096, 1] = aten.unsqueeze(%_to_copy, 2)
        %mul : bfloat16[1, 4096, 64] = aten.mul(%unsqueeze, %inv_freq)
        %cos : bfloat16[1, 4096, 64] = aten.cos(%mul)
        %mul_1 : bfloat16[1, 4096, 64] = aten.mul(%hidden, %cos)

    Result::

        %_to_copy_1 : float32[1, 4096] = aten._to_copy(%position_ids, dtype=float32)
        %unsqueeze : float32[1, 4096, 1] = aten.unsqueeze(%_to_copy_1, 2)
        %_to_copy_2 : float32[64] = aten._to_copy(%inv_freq, dtype=float32)
        %mul : float32[1, 4096, 64] = aten.mul(%unsqueeze, %_to_copy_2)
        %cos : float32[1, 4096, 64] = aten.cos(%mul)
        %_to_copy_3 : bfloat16[1, 4096, 64] = aten._to_copy(%cos, dtype=bfloat16)
        %mul_1 : bfloat16[1, 4096, 64] = aten.mul(%hidden, %_to_copy_3)

    Low-precision *tables* (a rounded ``inv_freq``) cannot be restored here: NX102 gives the error, and
    ``prepare(recompute_tables=True)`` computes again those whose module can. Who takes a rounded value in float32
    (``angles.float()``, a float32 activation that promotes it) is given it unrounded. Where positions meet an activation before a
    sine, a step or a sampled grid it is NX103. An integer that meets an activation at once (``hidden * attention_mask``)
    stays as it is, NX101: lifting would cast the activation up and down to gain half a unit in the last place at most, and
    nothing for a 0/1 mask. Roundings of one integer that cancel (``h - low(p) + (low(p) + 1)``) stay together; what is
    given to a ``torch.cond`` rounded is left rounded outside of it too.
    """

    name = "lift-int-casts"
    Options = LiftOptions
    after = ("mask-slice-writes",)

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> PassResult:
        result = PassResult()
        build = NodeBuilder(graph_module.graph, self.name)
        origins = self._origins(graph_module, context)
        early = findings.early(graph_module.graph, origins)
        region = grow(origins)
        result.rewrites += self._records(origins, region)
        lift = Lift(build, origins, region)
        for node, low, entry in lift.compare_exactly():
            result.rewrites.append(self._record(node, "lift.comparison", entry, low))
        result.findings = [*findings.kept(origins, lift), *early, *findings.tables(origins, context.sources)]
        if result.rewrites:
            origins = self._origins(graph_module, context)
        if spread := self._spread_products(build, origins, context):
            result.rewrites += spread
            origins = self._origins(graph_module, context)
        context.float32_products |= findings.float32_products(origins)
        context.float32_uses |= findings.float32_uses(origins)
        result.changed = bool(result.rewrites)
        return result

    @staticmethod
    def _origins(graph_module: fx.GraphModule, context: PassContext) -> IntegerOrigins:
        return IntegerOrigins(graph_module, context.sources, lambda: ranges.analyse(graph_module, context.sources, context.requirements))

    def _spread_products(self, build: NodeBuilder, origins: IntegerOrigins, context: PassContext) -> list[Rewrite]:
        """Let matrix products become broadcast products, which no auto-cast rounds."""
        records = []
        for node, count in worth_spreading(origins):
            if count == 1 and self.options.outer_products:
                premises = bit_equal(node, origins, context.sources)
                kind = Kind.REFINES if premises is None else Kind.EXACT
                context.premises += premises or []
                before = f"{op_name(node)} with one term a sum"
                records.append(self.rewrite(node, "lift.outer-product", kind, before, "broadcast mul"))
                outer_products.spread(build, node)
            elif 1 < count <= self.options.terms:
                bound = f"each sum of {count} products is rounded {count} times at most, in float32"
                before, after = f"{op_name(node)} with {count} terms a sum", f"sum of {count} broadcast products"
                records.append(self.rewrite(node, "lift.small-product", Kind.REASSOCIATED, before, after, bound))
                outer_products.spread_terms(build, node)
        return records

    # --- the report --------------------------------------------------------------------------------------------------

    def _records(self, origins: IntegerOrigins, region: Region) -> list[Rewrite]:
        rules = {Family.CAST: "lift.cast", Family.FACTORY: "lift.factory"}
        records = []
        for node, entry in origins.entries.items():
            family = origins.members[node].family
            if node in region.nodes and family is not None:
                records.append(self._record(node, rules.get(family, "lift.promotion"), entry, dtype_of(node)))
        for node in region.causes:
            low = next((origins.members[n].low for n in node.all_input_nodes if n in region.nodes), None)
            before = f"{short(low or dtype_of(node))} rounds what {op_name(node)} magnifies"
            records.append(self.rewrite(node, "lift.sensitive-use", Kind.REFINES, before, "float32"))
        if not records and region.nodes:  # what rounds the integers gains nothing itself; the arithmetic after it does
            node = next(iter(region.nodes))
            before = f"{short(dtype_of(node))} rounds what {op_name(node)} makes of integers"
            records.append(self.rewrite(node, "lift.arithmetic", Kind.REFINES, before, "float32"))
        return records

    def _record(self, node: fx.Node, rule: str, entry: Entry, low: torch.dtype | None) -> Rewrite:
        before = f"{described(entry)} → {short(low)}, which rounds above {exact_limit(low)}"
        after = f"float32, {short(low)} again where it meets an activation"
        after = "compared in float32" if rule == "lift.comparison" else after
        return self.rewrite(node, rule, Kind.REFINES, before, after)
