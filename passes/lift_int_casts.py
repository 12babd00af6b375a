"""lift-int-casts: integers stay exact until it is safe to round."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from nxfx.analysis import dtype_rules, ranges
from nxfx.analysis.broadcast_products import bit_equal, worth_spreading
from nxfx.analysis.float_ops import FAMILIES, METADATA, PERIODIC, Family, dtype_of, op_name
from nxfx.analysis.float_region import Region, grow
from nxfx.analysis.integer_origin import Entry, IntegerOrigins
from nxfx.analysis.rounded_tables import rounded_table_errors
from nxfx.graph import meta, outer_products
from nxfx.graph.builder import NodeBuilder, refresh
from nxfx.pipeline import Pass, PassContext, PassResult
from nxfx.report.findings import Finding, Severity
from nxfx.report.rewrites import Kind, Rewrite

aten = torch.ops.aten
FP32 = torch.float32


@dataclass(frozen=True)
class LiftOptions:
    """Options of lift-int-casts.

    Attributes:
        outer_products: turn matrix products of integer-derived values with one term a sum into broadcast products.
    """

    outer_products: bool = True


class LiftIntCasts(Pass):
    """Integers beyond a low-precision float's exact range are not rounded before they are used.

    Every conversion of an integer to bf16, fp16 or fp8, written or hidden in a type promotion, becomes one to float32
    unless its range is exactly representable. What is computed from it stays float32 until it meets an activation, an
    output or an op that is not listed; there it is cast back to the dtype the model had, once per value. So does what
    low precision rounds before sin, exp, floor and the like magnify the error. Matrix products of such values with
    one term a sum become broadcast products, which no auto-cast rounds. Class: ``refines``.

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

    Low-precision *tables* (a rounded ``inv_freq``) cannot be restored: NX102 gives the error. An integer that meets
    an activation at once (``hidden * attention_mask``) stays as it is, NX101: lifting would cast the activation up
    and down to gain half a unit in the last place at most, and nothing for a 0/1 mask.
    """

    name = "lift-int-casts"
    Options = LiftOptions
    after = ("mask-slice-writes",)

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> PassResult:
        result = PassResult()
        build = NodeBuilder(graph_module.graph, self.name)
        origins = self._origins(graph_module, context)
        if self.options.outer_products and (products := worth_spreading(origins)):
            result.rewrites += [self._spread(build, node, origins, context) for node in products]
            origins = self._origins(graph_module, context)
        region = grow(origins)
        result.rewrites += self._records(origins, region)
        lift = _Lift(build, origins, region)
        for node, low, entry in lift.compare_exactly():
            result.rewrites.append(self._record(node, "lift.comparison", entry, low))
        result.changed = bool(result.rewrites)
        result.findings = [*self._kept(origins, lift), *self._early(origins, lift), *self._tables(origins, context)]
        return result

    @staticmethod
    def _origins(graph_module: fx.GraphModule, context: PassContext) -> IntegerOrigins:
        return IntegerOrigins(graph_module, context.sources, lambda: ranges.analyse(graph_module, context.sources, context.requirements))

    def _spread(self, build: NodeBuilder, node: fx.Node, origins: IntegerOrigins, context: PassContext) -> Rewrite:
        premises = bit_equal(node, origins, context.sources)
        kind = Kind.REFINES if premises is None else Kind.EXACT
        context.premises += premises or []
        record = self.rewrite(node, "lift.outer-product", kind, f"{op_name(node)} with one term a sum", "broadcast mul")
        outer_products.spread(build, node)
        return record

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
            before = f"{_short(low or dtype_of(node))} rounds what {op_name(node)} magnifies"
            records.append(self.rewrite(node, "lift.sensitive-use", Kind.REFINES, before, "float32"))
        return records

    def _record(self, node: fx.Node, rule: str, entry: Entry, low: torch.dtype | None) -> Rewrite:
        before = f"{_describe(entry)} → {_short(low)}, which rounds above {_exact(low)}"
        after = f"float32, {_short(low)} again where it meets an activation"
        after = "compared in float32" if rule == "lift.comparison" else after
        return self.rewrite(node, rule, Kind.REFINES, before, after)

    def _kept(self, origins: IntegerOrigins, lift: _Lift) -> list[Finding]:
        """Integers that are still rounded, and why."""
        found = []
        for node, entry in origins.entries.items():
            if not any(user.target not in METADATA for user in node.users):
                continue
            if entry.mask:
                found.append(self._rounded(node, entry, "is taken for a 0/1 mask, since it is used as 1 - x", origins))
            elif node in lift.left or node not in lift.raised:
                what = f"is rounded to {_short(dtype_of(node))} as it meets an activation"
                found.append(self._rounded(node, entry, what, origins))
        for node, integer in origins.met:
            low = next((d for d in map(dtype_of, node.all_input_nodes) if dtype_rules.is_low_precision(d)), None)
            if node in lift.compared or low is None or dtype_of(node) not in (low, torch.bool):
                continue
            bounds, proved = origins.exact.bounds(integer)
            if not ranges.fits(bounds, (-_exact(low), _exact(low))):
                what = f"is rounded to {_short(low)} as {op_name(node)} promotes it with an activation"
                found.append(self._rounded(node, Entry(integer, bounds, proved), what, origins))
        return found

    def _rounded(self, node: fx.Node, entry: Entry, what: str, origins: IntegerOrigins) -> Finding:
        severity = Severity.WARNING if entry.proved else Severity.INFO
        fix = "combine them in float32 and cast the result"
        if not entry.proved and entry.integer is not None:
            fix = f"declare what it can be, e.g. ranges={{{origins.exact.culprit(entry.integer) or 'input'!r}: (0, 1)}}"
        return self.finding(node, "NX101", severity, f"{_describe(entry)} {what}", fix)

    def _early(self, origins: IntegerOrigins, lift: _Lift) -> list[Finding]:
        """Periodic functions of what was combined with an activation in low precision."""
        found: dict[fx.Node, Finding] = {}
        for node in (*lift.meetings, *(n for n, _ in origins.met)):
            is_low = FAMILIES.get(node.target) is Family.COMPUTE and dtype_rules.is_low_precision(dtype_of(node))
            pending = list(node.users)[:8] if is_low else []
            for user in pending:
                if user.target in PERIODIC:
                    low = _short(dtype_of(node))
                    message = f"{low} rounds positions combined with an activation before {op_name(user)}"
                    fix = "cast the activation to float32 before it is combined with positions, and back after that"
                    found[user] = self.finding(user, "NX103", Severity.WARNING, message, fix)
                elif FAMILIES.get(user.target) is Family.MOVE and len(pending) < 32:
                    pending += list(user.users)[:8]
        return list(found.values())

    def _tables(self, origins: IntegerOrigins, context: PassContext) -> list[Finding]:
        found = []
        for node, source, low, error in rounded_table_errors(origins, context.sources):
            severity = Severity.WARNING if error > 0.01 else Severity.INFO
            message = f"{source.name!r} was rounded to {_short(low)}: {op_name(node)} is off by up to {error:.2g}"
            fix = f"keep {source.name!r} in float32: .bfloat16() and .half() round it; compute it again after that"
            found.append(self.finding(node, "NX102", severity, message, fix))
        return found


class _Lift:
    """The edits: the region computed in float32, everyone outside it given the dtype that the model had.

    Attributes:
        raised: region node → the node that holds its value unrounded: itself, or the float32 source of a cast.
        left: casts of the region that stay for those who take the rounded value.
        meetings: nodes outside the region that take a rounded value.
        compared: comparisons that are now made in float32.
    """

    def __init__(self, build: NodeBuilder, origins: IntegerOrigins, region: Region) -> None:
        self.build = build
        self.origins = origins
        self.raised: dict[fx.Node, fx.Node] = {}
        self.left: set[fx.Node] = set()
        self.meetings: dict[fx.Node, None] = {}
        self.compared: set[fx.Node] = set()
        self._made: set[fx.Node] = set()
        self._were_low: set[fx.Node] = set()
        self._moved: set[fx.Node] = set()
        self._upcasts: dict[fx.Node, fx.Node] = {}
        self._restored: dict[fx.Node, fx.Node] = {}
        for node in region.nodes:
            is_cast = origins.members[node].family is Family.CAST
            self.raised[node] = self._recast(node) if is_cast else self._raise(node)
        for node in reversed(region.nodes):
            self._settle(node)

    def _raise(self, node: fx.Node) -> fx.Node:
        """Compute ``node`` in float32, in place."""
        member, dtype = self.origins.members[node], dtype_of(node)
        values = [v for v in member.values if isinstance(v, fx.Node)]
        swap = {v: self._high(v) for v in values}
        keeps_layout = not any(self._moves(v, high) for v, high in swap.items())
        is_promoted = member.family in (Family.COMPUTE, Family.SELECT) and "dtype" not in node.kwargs
        if is_promoted and values and all(dtype_rules.is_integral(dtype_of(v)) for v in values):
            swap[values[0]] = self._upcast(values[0])  # torch's default dtype was the low one
        node.args = fx.map_arg(node.args, lambda a: swap.get(a, a))
        node.kwargs = fx.map_arg(node.kwargs, lambda a: swap.get(a, a))
        if "dtype" in node.kwargs or member.family is Family.FACTORY:
            node.update_kwarg("dtype", FP32)
        if dtype_rules.is_low_precision(dtype):
            self._were_low.add(node)
            if keeps_layout or node.meta.get("unbacked_bindings"):  # evaluating again would invent new symbols
                node.meta["val"] = _retyped(node.meta["val"])
                node.meta.pop("tensor_meta", None)
            else:
                self._refresh(node)
        return node

    def _moves(self, value: fx.Node, high: fx.Node) -> bool:
        """Whether ``high`` is laid out in memory otherwise than ``value`` was."""
        return high in self._moved or (high is not value and _layout(meta.val(high)) != _layout(meta.val(value)))

    def _refresh(self, node: fx.Node) -> None:
        layout = str(pytree.tree_map(_layout, meta.val(node)))
        try:
            refresh(node, self.build.mode)
        except RuntimeError:
            if node.target is not aten.view.default:
                raise
            # What is no longer copied by a cast can be an expanded value, which no view takes.
            with self.build.before(node):
                node.update_arg(0, self._make(aten.clone.default, node.args[0], memory_format=torch.contiguous_format))
            refresh(node, self.build.mode)
        if str(pytree.tree_map(_layout, meta.val(node))) != layout:
            self._moved.add(node)

    def _recast(self, node: fx.Node) -> fx.Node:
        """What the cast ``node`` converts, in float32 (or the higher precision that ``node`` gives)."""
        value: fx.Node = self.origins.members[node].values[0]
        source, target = self.raised.get(value, value), dtype_of(node)
        target = FP32 if dtype_rules.is_low_precision(target) else target
        was, is_ = meta.val(source), meta.val(node)
        is_plain = node.target is not aten._to_copy.default
        options = {} if is_plain else {k: v for k, v in node.kwargs.items() if k != "dtype"}
        if was.dtype == target and not options and was.device == is_.device and _layout(was) == _layout(is_):
            return source
        if was.device != is_.device:
            options["device"] = is_.device
        with self.build.after(node):
            cast = self._make(aten._to_copy.default, source, dtype=target, **options)
            if str(was.shape) != str(is_.shape):  # a copy broadcasts
                cast = self._make(aten.expand.default, cast, list(is_.shape))
                cast = self._make(aten.clone.default, cast, memory_format=torch.contiguous_format)
        return cast

    def _high(self, value: fx.Node) -> fx.Node:
        """``value`` as an operand in the region: raised with it, or converted once, which is exact."""
        if value in self.raised:
            return self.raised[value]
        return self._upcast(value) if dtype_rules.is_low_precision(dtype_of(value)) else value

    def _upcast(self, value: fx.Node) -> fx.Node:
        if value not in self._upcasts:
            member = self.origins.members.get(value)
            if member is not None and member.family is Family.CAST:
                self._upcasts[value] = self._recast(value)
            else:
                with self.build.after(value):
                    self._upcasts[value] = self._make(aten._to_copy.default, value, dtype=FP32)
        return self._upcasts[value]

    def _make(self, op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = self.build.call(op, *args, **kwargs)
        self._made.add(node)
        return node

    def _settle(self, node: fx.Node) -> None:
        """Point every user of a region node to the value it wants; users stand later and are settled already."""
        high, members, checks = self.raised[node], self.origins.members, []
        for user in list(node.users):
            member = members.get(user)
            if user in self._made or self.raised.get(user) is user:
                continue
            if user.target in METADATA:
                checks.append(user)
            elif member is not None and member.family is Family.FACTORY:  # x_like: only the shape counts
                user.update_kwarg("dtype", dtype_of(user))
            elif user in self.origins.sinks or (member is not None and member.low is None):
                user.replace_input_with(node, high)
            else:
                self.meetings[user] = None
                if high is node:
                    user.replace_input_with(node, self._restore(node))
                else:
                    self.left.add(node)
        for user in checks if node not in self.left else ():
            checked = self._restored.get(node, high)
            user.replace_input_with(node, checked)
            if user.target is aten._assert_tensor_metadata.default:
                _expect(user, dtype_of(checked))
        if high is not node and not node.users:
            self.build.graph.erase_node(node)

    def _restore(self, node: fx.Node) -> fx.Node:
        """``node`` rounded as the model rounded it."""
        if node not in self._restored:
            low, dtype = self.origins.members[node].low, dtype_of(node)
            assert low is not None and dtype is not None
            with self.build.after(node):
                rounded = self.build.cast(node, low)
                restored = rounded if node in self._were_low else self.build.cast(rounded, dtype)
            self._made.update((rounded, restored))
            self._restored[node] = restored
        return self._restored[node]

    def compare_exactly(self) -> list[tuple[fx.Node, torch.dtype | None, Entry]]:
        """Let integers be compared with low-precision floats in float32, which holds both; eager rounds the integers.

        An activation that is itself made of rounded integers is left alone: the two roundings may well belong together.
        """
        done = []
        pairs = [(n, v) for n in self.origins.sinks for v in n.all_input_nodes if dtype_rules.is_integral(dtype_of(v))]
        for node, integer in (*pairs, *self.origins.met):
            floats = [v for v in node.all_input_nodes if dtype_rules.is_low_precision(dtype_of(v))]
            if FAMILIES[node.target] is not Family.COMPARE or not floats:
                continue
            low = dtype_of(floats[0])
            bounds, proved = self.origins.exact.bounds(integer)
            if ranges.fits(bounds, (-_exact(low), _exact(low))):
                continue
            if all(self.origins.of(v) is not None or _is_unmixed(v) for v in floats):
                for value in floats:
                    node.replace_input_with(value, self._high(value))
                self.compared.add(node)
                done.append((node, low, Entry(integer, bounds, proved)))
        return done


def _is_unmixed(value: fx.Node) -> bool:
    """Whether no integer was converted on the way to ``value``; no is the answer for a long way."""
    pending, seen = [value], {value}
    for node in pending:
        if len(seen) > 64:
            return False
        for operand in node.all_input_nodes:
            if dtype_rules.is_integral(dtype_of(operand)) and dtype_of(operand) is not torch.bool:
                return False
            if operand not in seen:
                seen.add(operand)
                pending.append(operand)
    return True


def _retyped(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(map(_retyped, value))
    return meta.retype(value, FP32)


def _layout(value: torch.Tensor) -> tuple[str, str]:
    return str(value.shape), str(value.stride())  # as text: comparing symbols would add guards


def _expect(check: fx.Node, dtype: torch.dtype | None) -> None:
    """Let a metadata assertion that names a dtype name this one."""
    if len(check.args) > 3 and check.args[3] is not None:
        check.update_arg(3, dtype)
    elif check.kwargs.get("dtype") is not None:
        check.update_kwarg("dtype", dtype)


def _exact(dtype: torch.dtype | None) -> int:
    return dtype_rules.exact_integer(dtype) if dtype is not None else 0


def _short(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


def _describe(entry: Entry) -> str:
    largest = max(abs(entry.bounds[0]), abs(entry.bounds[1]))
    if entry.integer is None:
        return "a sequence or sum of integers"
    name = _short(dtype_of(entry.integer))
    return f"{name} up to {largest}" if entry.proved else f"{name} of undeclared range"
