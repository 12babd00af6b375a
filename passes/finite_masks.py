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
from nxfx.analysis.full_rows import may_be_full
from nxfx.analysis.intervals import arg
from nxfx.analysis.mask_levels import MaskLevels, rounded
from nxfx.analysis.mask_rules import CLAMPED, LOW, RULES, SCORE, Levels, operands
from nxfx.analysis.nan_readers import nan_readers
from nxfx.analysis.range_rules import overloads
from nxfx.analysis.unknown_masks import unknown_masks
from nxfx.graph import meta, walk
from nxfx.graph.builder import NodeBuilder
from nxfx.pipeline import Pass, PassContext, PassResult
from nxfx.report.findings import Severity
from nxfx.report.rewrites import Kind

aten = torch.ops.aten

_SDPA = aten.scaled_dot_product_attention.default
_SAFE = frozenset([_SDPA, aten._safe_softmax.default])  # a row of minus infinity gives zeros
_LOGARITHM = frozenset(overloads("log_softmax", "_log_softmax"))  # what is left out is minus infinity after it too
_SOFTMAX = frozenset(overloads("softmax", "_softmax", "_safe_softmax")) | _LOGARITHM


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
    masks as are added stay finite together with a score. Huge finite numbers become half of what minus infinity becomes: which of two
    masks is the lower stays so. What is left out by ``where`` stays ``where``. Class: ``refines``: equal bits in every row that keeps
    something, while scores are within the bound that each rewrite states; where scales after the mask leave less than 100, the mask
    stays, NX601.

    Given::

        %where : float32[1, 1, 8, 8] = aten.where(%causal, 0.0, -3.4028234663852886e+38)
        %where_1 : float32[1, 1, 1, 8] = aten.where(%kept, 0.0, -inf)
        %add : float32[1, 1, 8, 8] = aten.add(%where, %where_1)
        %mask : bfloat16[1, 1, 8, 8] = aten._to_copy(%add, dtype=bfloat16)
        %scores : bfloat16[1, 2, 8, 8] = aten.add(%product, %mask)
        %softmax : bfloat16[1, 2, 8, 8] = aten.softmax(%scores, -1)

    Result::

        %where : float32[1, 1, 8, 8] = aten.where(%causal, 0.0, -8.4738e+37)
        %where_1 : float32[1, 1, 1, 8] = aten.where(%kept, 0.0, -1.6948e+38)
        %add : float32[1, 1, 8, 8] = aten.add(%where, %where_1)
        %mask : bfloat16[1, 1, 8, 8] = aten._to_copy(%add, dtype=bfloat16)
        %scores : bfloat16[1, 2, 8, 8] = aten.add(%product, %mask)
        %softmax : bfloat16[1, 2, 8, 8] = aten.softmax(%scores, -1)

    A row of minus infinities was nan after a plain softmax and becomes finite: NX602 says so. Where eager gives zeros for it
    (``scaled_dot_product_attention``, safe softmax, ``softmax(...).nan_to_num()``) it still does. Where the model asks for that
    nan otherwise (``isnan``, a comparison, ``nan_to_num`` of a sum) the mask stays, NX601. So it does where minus infinity goes through
    an op that is not followed, before ``log_softmax``, and (as information) where a float mask is given. A mask that nothing overflows
    is left as it is. What a buffer holds is a premise: another mask loaded into it is checked.
    """

    name = "finite-masks"
    targets = _SOFTMAX | {_SDPA}
    after = ("mask-slice-writes", "lift-int-casts", "narrow-64bit", "exact-integer-sums")

    def wanted(self, graph: fx.Graph) -> bool:
        return super().wanted(graph) or any(walk.is_higher_order(node) for node in graph.nodes)

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> PassResult:
        result = PassResult()
        masks = _Masks(graph_module.graph, self, context, result)
        for site in list(_sites(graph_module.graph)):
            masks.repair(site)
        for call in filter(walk.is_higher_order, list(graph_module.graph.nodes)):
            inside = [scope for _, body in walk.bodies(graph_module, call) for scope in walk.scopes(body)]
            if any(super(FiniteMasks, self).wanted(scope.graph_module.graph) for scope in inside):
                masks.tell_entering(call)
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
        self.eager = MaskLevels(context.sources)
        self.levels: dict[float, MaskLevels] = {}
        self._made: dict[tuple[fx.Node, float], fx.Node] = {}
        self._full: dict[tuple[fx.Node, float, int], fx.Node | None] = {}
        self._told: set[tuple[fx.Node, str]] = set()

    def repair(self, site: _Site) -> None:
        """Give one softmax finite masks, where they are not."""
        for mask in unknown_masks(site.root, self.context.sources, scored=site.scored):
            self._kept(mask, "nothing is known of a mask that is given", Severity.INFO)
        hazard = self.eager.hazard(site.root, scored=site.scored)
        known = {table.premise(repaired=hazard is not None) for table in self.eager.held(site.root)} - {None, *self.context.premises}
        self.context.premises += sorted(known, key=str)  # type: ignore[arg-type]
        if hazard is None:
            return
        full = may_be_full(self.eager, site.root, site.dim, self.context.sources)
        if site.node.target in _LOGARITHM:
            if full and any(level.eager == -math.inf for level in self.eager.of(site.root)):
                self._kept(hazard, "log_softmax makes nan of a row that is masked whole, and its result holds minus infinity as it should")
            return
        floor = self._floor(site)
        if floor is None:
            self._kept(*self._why(site, hazard))
            return
        gone, threshold = _threshold(self.levels[floor].of(site.root))
        safe = site.node.target in _SAFE
        readers = nan_readers(site.node, site.dim) if gone and not safe and full else []
        if gone and threshold is None and (safe or readers):
            self._kept(hazard, "some sums of masks are minus infinity and others, no smaller, are not")
            return
        if not all(reader.zeroed for reader in readers):
            reader = next(r.node for r in readers if not r.zeroed)
            self._kept(hazard, f"{op_name(reader)} tells rows that are masked whole by their nan")
            return
        self._replace(site, floor, threshold if safe or readers else None, full)

    def tell_entering(self, call: fx.Node) -> None:
        """A body's graph is another one: a mask that is made outside stays what it is."""
        for operand in filter(meta.is_tensor, call.all_input_nodes):
            if any(level.eager == -math.inf for level in self.eager.of(operand)):
                self._kept(operand, f"it is made outside the body of {op_name(call)} whose softmax may read it")

    def _replace(self, site: _Site, floor: float, threshold: float | None, full: bool) -> None:
        levels = self.levels[floor].of(site.root)
        root = self._again(site.root, floor, _bound(levels))
        if threshold is not None:
            self._zero_full_rows(site, root, threshold)
        if full:
            self._tell_full_rows(site, levels, zeroed=threshold is not None)
        site.node.replace_input_with(site.root, root)

    def _floor(self, site: _Site) -> float | None:
        """The lowest number that fills can be raised to so that nothing on the way to the softmax is minus infinity."""
        reached = [n for n in self.eager.reached(site.root) if self.eager.of(n) != SCORE]
        dtypes: set[Any] = {meta.dtype_of(n) for n in [*reached, site.node]}
        dtypes |= set() if site.scored else {arg(site.node, 2, "dtype")}
        floats = [d for d in dtypes if isinstance(d, torch.dtype) and d in _FLOATS]
        smallest = max(floats, key=lambda d: torch.finfo(d).min)
        for share in (1, 2, 4, 6, 8, 10, 12, 16, 24, 32):
            floor = _towards_zero(torch.finfo(smallest).min / share, smallest)
            if floor not in self.levels:
                self.levels[floor] = self.eager.raised(floor)
            levels = self.levels[floor]
            if levels.hazard(site.root, scored=site.scored) is None and _bound(levels.of(site.root)) >= _SCORES:
                return floor
        return None

    # --- building ----------------------------------------------------------------------------------------------------

    def _again(self, node: fx.Node, floor: float, bound: float) -> fx.Node:
        """``node`` with its fills raised to ``floor``: itself where nothing is below."""
        order = [n for n in self.levels[floor].reached(node) if (n, floor) not in self._made]
        for reached in sorted(order):
            if not self._differs(reached, floor):
                self._made[reached, floor] = reached
                continue
            self._made[reached, floor] = made = self._rebuilt(reached, floor, bound)
            for check in [u for u in reached.users if u.target in METADATA]:  # of the same dtype, shape and device
                check.replace_input_with(reached, made)
        return self._made[node, floor]

    def _differs(self, node: fx.Node, floor: float) -> bool:
        """Only what the levels are made of counts: ``zeros_like(mask)`` is a fill of its own, a score is no mask."""
        levels = self.levels[floor]
        own = any(level.eager != level.now for level in levels.of(node))
        if not levels.follows(node):
            return own and levels.is_fill(node)
        return own or any(self._made.get((n, floor), n) is not n for n in operands(node))

    def _rebuilt(self, node: fx.Node, floor: float, bound: float) -> fx.Node:
        levels = self.levels[floor]
        if levels.is_fill(node):
            return self._filled(node, floor, bound)
        rule = RULES[node.target]

        def again(value: Any) -> Any:
            if isinstance(value, (list, tuple)):
                return type(value)(again(v) for v in value)
            if isinstance(value, fx.Node):
                return self._made.get((value, floor), value)
            raised = levels.raise_fill(value) if isinstance(value, (int, float)) else value
            if raised != value:
                self._record(node, value, raised, bound)
            return value if raised == value else raised

        args = tuple(again(a) if p in rule.positions else a for p, a in enumerate(node.args))
        kwargs = {k: again(v) if k == "value" else v for k, v in node.kwargs.items()}
        with self.build.after(node):
            made = self.build.call(node.target, *args, **kwargs)  # type: ignore[arg-type]
            if node.target in CLAMPED:
                self._record(node, -math.inf, floor, bound)
                made = self.build.call(aten.clamp_min.default, made, floor)
        return made

    def _filled(self, node: fx.Node, floor: float, bound: float) -> fx.Node:
        """A constant again: as a number, or (a table) clamped."""
        level, value = min(self.levels[floor].of(node)), meta.val(node)
        self._record(node, level.eager, level.now, bound)
        with self.build.after(node):
            if self.eager.uniform.value(node) is None:
                return self._clamped(node, floor)
            if node.op == "call_function" and node.target in (aten.full.default, aten.scalar_tensor.default):
                args = (node.args[0], level.now) if node.target is aten.full.default else (level.now,)
                return self.build.call(node.target, *args, **node.kwargs)
            if node.op != "call_function" and value.dim() == 0:
                return self.build.scalar(level.now, value.dtype, value.device)
            return self.build.call(aten.full_like.default, node, level.now)

    def _clamped(self, node: fx.Node, floor: float) -> fx.Node:
        """A table within the floor; where it holds huge numbers beside minus infinity, each as its own."""
        changed = [level for level in self.levels[floor].of(node) if level.eager != level.now]
        finite = any(-math.inf < level.eager < LOW for level in changed)
        least = floor / 2 if finite else floor
        made = self.build.call(aten.clamp_min.default, node, least)
        if any(level.eager > 0 for level in changed):
            made = self.build.call(aten.clamp_max.default, made, max(level.now for level in changed))
        if least != floor and any(level.eager == -math.inf for level in changed):
            made = self.build.call(aten.masked_fill.Scalar, made, self.build.call(aten.eq.Scalar, node, -math.inf), floor)
        return made

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

    def _tell_full_rows(self, site: _Site, levels: Levels, *, zeroed: bool) -> None:
        told = ["a row of minus infinities is nan in the model, and finite now: what its softmax makes of the masks' new numbers"]
        if zeroed or not any(level.eager == -math.inf for level in levels):
            told = []
        if any(-math.inf < level.eager < LOW and level.eager != level.now for level in levels):
            told.append("a row that is masked whole by finite numbers holds what its scores round to beside them, which are others now")
        fix = "do not use such rows (padding), or multiply them by zero"
        if told:
            self.result.findings.append(self.step.finding(site.node, "NX602", Severity.INFO, "; ".join(told), fix))

    # --- the report --------------------------------------------------------------------------------------------------

    def _record(self, node: fx.Node, was: float, now: float, bound: float) -> None:
        if (node, "") not in self._told:
            self._told.add((node, ""))
            told = f"equal bits in rows that keep something, for scores within ±{bound:.3g} where the softmax reads them"
            self.result.rewrites.append(self.step.rewrite(node, "finite.fill", Kind.REFINES, f"{was:.5g} in a mask", f"{now:.5g}", told))

    def _why(self, site: _Site, hazard: fx.Node) -> tuple[fx.Node, str]:
        lost = self.eager.lost(site.root)
        if lost is not None:
            return lost, f"it comes to the softmax through {op_name(lost)}, through which no other number is followed"
        return hazard, "so many masks are added, or so large scales, that no finite number leaves room and still masks"

    def _kept(self, node: fx.Node, why: str, severity: Severity = Severity.WARNING) -> None:
        if (node, why) in self._told:
            return
        self._told.add((node, why))
        message = f"minus infinity in an additive mask: {why}"
        fix = "combine the conditions with & and choose one finite number: torch.where(a & b, 0.0, torch.finfo(dtype).min / 2)"
        self.result.findings.append(self.step.finding(node, "NX601", severity, message, fix))


_FLOATS = frozenset([torch.bfloat16, torch.float16, torch.float32, torch.float64])
_UNDERFLOWS = 104.0  # exp of its negative is zero in float32
_SCORES = 100.0  # scores at a softmax within it are those of a model that works


def _bound(levels: Levels) -> float:
    """How large scores may be so that what was left out still is: nothing of it remains in a softmax; negative where it is not."""
    fills = [level for level in levels if level.eager != level.now]
    others = [level for level in levels if level.eager == level.now]
    if any(level.eager >= LOW for level in fills):
        return -math.inf
    gaps = [b.now - a.now for a in fills for b in others if b.eager > a.eager]
    return (min(gaps, default=math.inf) - _UNDERFLOWS) / 2


def _threshold(levels: Levels) -> tuple[bool, float | None]:
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
