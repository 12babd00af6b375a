"""finite-masks: no minus infinity in an additive mask."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from nxfx.analysis.constants import constant_value
from nxfx.analysis.float_ops import METADATA, op_name
from nxfx.analysis.intervals import arg
from nxfx.analysis.mask_levels import CLAMPED, RULES, SCORE, Level, MaskLevels, rounded
from nxfx.analysis.nan_readers import make_zero, nan_readers
from nxfx.analysis.range_rules import overloads
from nxfx.analysis.uniform import UniformValues
from nxfx.graph import meta
from nxfx.graph.builder import NodeBuilder
from nxfx.pipeline import Pass, PassContext, PassResult
from nxfx.report.findings import Severity
from nxfx.report.rewrites import Kind

aten = torch.ops.aten

_SDPA = aten.scaled_dot_product_attention.default
_SAFE = frozenset([_SDPA, aten._safe_softmax.default])  # a row of minus infinity gives zeros
_SOFTMAX = frozenset(overloads("softmax", "_softmax", "_safe_softmax"))


@dataclass
class _Site:
    """A softmax and the masked scores (or, for attention, the mask) that it reads."""

    node: fx.Node
    root: fx.Node
    dim: int

    @property
    def scored(self) -> bool:
        """Whether scores are still to be added."""
        return self.node.target is _SDPA


class FiniteMasks(Pass):
    """Minus infinity, and what overflows to it, leaves the masks that are added to attention scores.

    ``finfo(float32).min`` cast to bf16 is minus infinity, twice ``finfo(bfloat16).min`` is, and a row of it through a softmax is nan,
    which stops the Neuron runtime. The mask's number is chosen after its last cast, in the smallest dtype it passes, and so that as many
    masks as are added stay finite together with a score: half of the dtype's smallest number over the number of masks. What is left out
    by ``where`` stays ``where``. Class: ``refines``: equal bits in every row that keeps something, while scores are smaller than the
    mask's number.

    Given::

        %where : float32[1, 1, 8, 8] = aten.where(%causal, 0.0, -3.4028234663852886e+38)
        %where_1 : float32[1, 1, 1, 8] = aten.where(%kept, 0.0, -inf)
        %add : float32[1, 1, 8, 8] = aten.add(%where, %where_1)
        %mask : bfloat16[1, 1, 8, 8] = aten._to_copy(%add, dtype=bfloat16)
        %scores : bfloat16[1, 2, 8, 8] = aten.add(%product, %mask)
        %softmax : bfloat16[1, 2, 8, 8] = aten.softmax(%scores, -1)

    Result::

        %where : float32[1, 1, 8, 8] = aten.where(%causal, 0.0, -8.4739e+37)
        %where_1 : float32[1, 1, 1, 8] = aten.where(%kept, 0.0, -8.4739e+37)
        %add : float32[1, 1, 8, 8] = aten.add(%where, %where_1)
        %mask : bfloat16[1, 1, 8, 8] = aten._to_copy(%add, dtype=bfloat16)
        %scores : bfloat16[1, 2, 8, 8] = aten.add(%product, %mask)
        %softmax : bfloat16[1, 2, 8, 8] = aten.softmax(%scores, -1)

    A row that is masked whole was nan after a plain softmax and becomes finite: NX602 says so. Where eager gives zeros for it
    (``scaled_dot_product_attention``, safe softmax, ``softmax(...).nan_to_num()``) it still does. Where the model asks for that
    nan otherwise (``isnan``) the mask stays, NX601. A mask that nothing overflows is left as it is.
    """

    name = "finite-masks"
    targets = _SOFTMAX | {_SDPA}
    after = ("mask-slice-writes", "lift-int-casts", "narrow-64bit", "exact-integer-sums")

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> PassResult:
        result = PassResult()
        masks = _Masks(graph_module.graph, self, context, result)
        for site in list(_sites(graph_module.graph)):
            masks.repair(site)
        result.changed = bool(result.rewrites)
        return result


def _sites(graph: fx.Graph) -> Iterator[_Site]:
    for node in graph.nodes:
        if node.op != "call_function" or (node.target is not _SDPA and node.target not in _SOFTMAX):
            continue
        position = 3 if node.target is _SDPA else 0
        root = arg(node, position, "attn_mask")
        dtype = meta.dtype_of(root)
        if dtype is not None and dtype.is_floating_point and meta.val(root).dim():
            yield _Site(node, root, -1 if node.target is _SDPA else node.args[1])


class _Masks:
    """The edits: mask values built again with finite fills; what else reads the old ones keeps them."""

    def __init__(self, graph: fx.Graph, step: FiniteMasks, context: PassContext, result: PassResult) -> None:
        self.step, self.context, self.result = step, context, result
        self.build = NodeBuilder(graph, step.name)
        self.uniform = UniformValues(context.sources)
        self.levels = {-math.inf: MaskLevels(context.sources, uniform=self.uniform)}
        self._made: dict[tuple[fx.Node, float], fx.Node] = {}
        self._full: dict[tuple[fx.Node, float, int], fx.Node | None] = {}
        self._told: set[fx.Node] = set()

    def repair(self, site: _Site) -> None:
        """Give one softmax finite masks, where they are not."""
        eager = self.levels[-math.inf]
        hazard = eager.hazard(site.root, scored=site.scored)
        if hazard is None:
            return
        floor = self._floor(site)
        if floor is None:
            self._kept(hazard, "so many masks are added that no finite number leaves room for their sum")
            return
        levels = self.levels[floor].of(site.root)
        gone, threshold = _threshold(levels)
        if gone and threshold is None and site.node.target in _SAFE:
            self._kept(hazard, "some sums of masks are minus infinity and others, no smaller, are not")
            return
        readers = nan_readers(site.node) if gone and site.node.target not in _SAFE and self._may_be_full(site) else []
        if readers and (threshold is None or not make_zero(readers)):
            self._kept(hazard, f"{op_name(readers[0])} tells rows that are masked whole by their nan")
            return
        root = self._again(site.root, floor)
        if (site.node.target in _SAFE or readers) and threshold is not None:
            self._zero_full_rows(site, root, threshold)
        elif self._may_be_full(site):
            self._tell_full_rows(site, gone)
        site.node.replace_input_with(site.root, root)

    def _floor(self, site: _Site) -> float | None:
        """The lowest number that fills can be raised to so that nothing on the way to the softmax is minus infinity."""
        eager = self.levels[-math.inf]
        dtypes: set[Any] = {meta.dtype_of(n) for n in eager.reached(site.root) if eager.of(n) != SCORE}
        dtypes |= {meta.dtype_of(site.node), arg(site.node, 2, "dtype")} if not site.scored else {meta.dtype_of(site.node)}
        floats = [d for d in dtypes if isinstance(d, torch.dtype) and d in _FLOATS]
        if not floats:
            return None
        smallest = max(floats, key=lambda d: torch.finfo(d).min)
        for share in (1, 2, 4, 6, 8, 10, 12, 16, 24, 32):
            floor = _towards_zero(torch.finfo(smallest).min / share, smallest)
            if floor not in self.levels:
                self.levels[floor] = MaskLevels(self.context.sources, floor, self.uniform)
            if self.levels[floor].hazard(site.root, scored=site.scored) is None:
                return floor
        return None

    # --- building ----------------------------------------------------------------------------------------------------

    def _again(self, node: fx.Node, floor: float) -> fx.Node:
        """``node`` with its fills raised to ``floor``: itself where nothing is below."""
        order = [n for n in self.levels[floor].reached(node) if (n, floor) not in self._made]
        for reached in sorted(order):
            if not self._differs(reached, floor):
                self._made[reached, floor] = reached
                continue
            self._made[reached, floor] = made = self._rebuilt(reached, floor)
            for check in [u for u in reached.users if u.target in METADATA]:  # of the same dtype, shape and device
                check.replace_input_with(reached, made)
        return self._made[node, floor]

    def _differs(self, node: fx.Node, floor: float) -> bool:
        return any(level.eager != level.now for level in self.levels[floor].of(node)) or any(
            self._made.get((n, floor), n) is not n for n in node.all_input_nodes
        )

    def _rebuilt(self, node: fx.Node, floor: float) -> fx.Node:
        levels = self.levels[floor]
        if levels.is_fill(node):
            return self._filled(node, floor)
        rule = RULES[node.target]

        def again(value: Any) -> Any:
            if isinstance(value, (list, tuple)):
                return type(value)(again(v) for v in value)
            if isinstance(value, fx.Node):
                return self._made.get((value, floor), value)
            is_low = isinstance(value, (int, float)) and value < floor
            if is_low:
                self._record(node, value, floor)
            return floor if is_low else value

        args = tuple(again(a) if p in rule.positions else a for p, a in enumerate(node.args))
        kwargs = {k: again(v) if k == "value" else v for k, v in node.kwargs.items()}
        with self.build.after(node):
            made = self.build.call(node.target, *args, **kwargs)  # type: ignore[arg-type]
            if not any(level.scored for level in levels.of(node)) and self._sinks(made, floor):
                self._record(node, -math.inf, floor)
                made = self.build.call(aten.clamp_min.default, made, floor)
        return made

    def _sinks(self, made: fx.Node, floor: float) -> bool:
        """Whether ``made`` is below the floor for another reason than a fill: a product such as ``(mask - 1) * max``."""
        return made.target in CLAMPED and any(level.eager < floor for level in self.levels[-math.inf].of(made))

    def _filled(self, node: fx.Node, floor: float) -> fx.Node:
        """A constant again: as a number, or (a table) clamped."""
        self._record(node, min(level.eager for level in self.levels[floor].of(node)), floor)
        value = meta.val(node)
        with self.build.after(node):
            if self.uniform.value(node) is None:
                return self.build.call(aten.clamp_min.default, node, floor)
            if node.op == "call_function" and node.target in (aten.full.default, aten.scalar_tensor.default):
                args = (node.args[0], floor) if node.target is aten.full.default else (floor,)
                return self.build.call(node.target, *args, **node.kwargs)
            if node.op != "call_function" and value.dim() == 0:
                return self.build.scalar(floor, value.dtype, value.device)
            return self.build.call(aten.full_like.default, node, floor)

    # --- rows that are masked whole ------------------------------------------------------------------------------------

    def _rows(self, site: _Site, root: fx.Node, threshold: float) -> fx.Node | None:
        """Where everything in a row is left out; None when that is nowhere."""
        key = root, threshold, site.dim
        if key not in self._full:
            with self.build.after(root):
                left_out = self.build.call(aten.le.Scalar, root, threshold)
                self._full[key] = full = self.build.call(aten.all.dim, left_out, site.dim, True)
            held = constant_value(full, self.context.sources)
            if held is not None and not bool(held.any()):
                self.build.graph.erase_node(full)
                self.build.graph.erase_node(left_out)
                self._full[key] = None
        return self._full[key]

    def _zero_full_rows(self, site: _Site, root: fx.Node, threshold: float) -> None:
        full = self._rows(site, root, threshold)
        if full is None:
            return
        with self.build.after(site.node):
            zeroed = self.build.call(aten.masked_fill.Scalar, site.node, full, 0.0)
        site.node.replace_all_uses_with(zeroed, delete_user_cb=lambda user: user is not zeroed)

    def _may_be_full(self, site: _Site) -> bool:
        """False where the mask is a constant, and keeps something in every row."""
        eager = self.levels[-math.inf]
        mask = next((n for n in eager.reached(site.root) if len(eager.of(n)) > 1 and not any(m.scored for m in eager.of(n))), None)
        held = constant_value(mask, self.context.sources) if mask is not None else None
        return held is None or bool((held < 0).all(site.dim).any())

    def _tell_full_rows(self, site: _Site, gone: bool) -> None:
        message = "a row that is masked whole is nan in the model, and finite now: what its softmax makes of equal scores"
        if not gone:
            message = "a row that is masked whole holds what its scores round to beside the mask's number, which is another one now"
        self.result.findings.append(
            self.step.finding(site.node, "NX602", Severity.INFO, message, "do not use such rows (padding), or multiply them by zero")
        )

    # --- the report --------------------------------------------------------------------------------------------------

    def _record(self, node: fx.Node, was: float, floor: float) -> None:
        if node not in self._told:
            self._told.add(node)
            bound = f"equal bits in rows that keep something, for scores within ±{-floor / 2:.3g}"
            self.result.rewrites.append(self.step.rewrite(node, "finite.fill", Kind.REFINES, f"{was:.5g} in a mask", f"{floor:.5g}", bound))

    def _kept(self, node: fx.Node, why: str) -> None:
        message = f"minus infinity in an additive mask: {why}"
        fix = "combine the conditions with & and choose one finite number: torch.where(a & b, 0.0, torch.finfo(dtype).min / 2)"
        self.result.findings.append(self.step.finding(node, "NX601", Severity.WARNING, message, fix))


_FLOATS = frozenset([torch.bfloat16, torch.float16, torch.float32, torch.float64])


def _threshold(levels: frozenset[Level]) -> tuple[bool, float | None]:
    """Whether eager has minus infinities, and a number that now parts them from the rest (None where there is none)."""
    gone = [level.now for level in levels if level.eager == -math.inf]
    rest = [level.now for level in levels if level.eager != -math.inf]
    if not gone:
        return False, None
    if not rest:
        return True, max(gone) / 2
    return True, (max(gone) / 2 + min(rest) / 2) if max(gone) < min(rest) else None


def _towards_zero(number: float, dtype: torch.dtype) -> float:
    near = rounded(number, dtype)
    return near if near >= number else float(torch.nextafter(torch.tensor(near, dtype=dtype), torch.tensor(0.0, dtype=dtype)))
