"""lift-int-casts: integers stay exact until it is safe to round."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from nxfx.analysis import dtype_rules, ranges
from nxfx.analysis.float_region import Region, grow
from nxfx.analysis.integer_origin import FAMILIES, METADATA, PERIODIC, Entry, Family, IntegerOrigins, dtype_of
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
        outer_products: turn matrix products of integer-derived values that sum over one element into broadcast products.
    """

    outer_products: bool = True


class LiftIntCasts(Pass):
    """Integers beyond a low-precision float's exact range are not rounded before they are used.

    Every conversion of an integer to bf16, fp16 or fp8, written or hidden in a type promotion, becomes one to float32 unless its
    range is exactly representable. What is computed from it stays float32 until it meets an activation, an output or an op
    that is not listed; there it is cast back to the dtype the model had, once per value. The same for values that low precision
    rounds before sin, exp, floor and the like magnify the error. Matrix products that sum over one element become broadcast
    products, which no auto-cast rounds. Class: ``refines``.

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

    Low-precision *tables* (a rounded ``inv_freq``) cannot be restored: NX102 gives the error. An integer that meets an activation
    at once (``hidden * attention_mask``) stays as it is, NX101: lifting would cast the activation twice to gain half a unit in the
    last place at most, and nothing for a 0/1 mask.
    """

    name = "lift-int-casts"
    Options = LiftOptions
    after = ("mask-slice-writes",)

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> PassResult:
        result = PassResult()
        build = NodeBuilder(graph_module.graph, self.name)
        origins = self._origins(graph_module, context)
        if self.options.outer_products and (products := [n for n in origins.members if _is_worth_spreading(n, origins)]):
            for node in products:
                kind = _product_kind(node, origins)
                result.rewrites.append(self.rewrite(node, "lift.outer-product", kind, f"{_name(node)}, one term a sum", "mul"))
                outer_products.spread(build, node)
            origins = self._origins(graph_module, context)
        lift = _Lift(build, origins)
        region = grow(origins)
        result.rewrites += self._records(origins, region)
        lift.raise_region(region)
        for node, value, entry in lift.compare_exactly():
            result.rewrites.append(self._record(node, "lift.comparison", entry, dtype_of(value)))
        result.changed = bool(result.rewrites)
        result.findings = [*self._unlifted(origins, region, lift), *self._tables(origins, context)]
        return result

    @staticmethod
    def _origins(graph_module: fx.GraphModule, context: PassContext) -> IntegerOrigins:
        return IntegerOrigins(graph_module, context.sources, lambda: ranges.analyse(graph_module, context.sources))

    def _records(self, origins: IntegerOrigins, region: Region) -> list[Rewrite]:
        records = []
        for node, entry in origins.entries.items():
            if node in region.nodes:
                family = origins.members[node].family
                rule = {Family.CAST: "lift.cast", Family.FACTORY: "lift.factory"}.get(family, "lift.promotion")
                records.append(self._record(node, rule, entry, dtype_of(node)))
        for node in region.causes:
            low = next((origins.members[n].low for n in node.all_input_nodes if n in region.nodes), None) or dtype_of(node)
            before = f"{_short(low)} before {_name(node)}, derived from integers"
            records.append(self.rewrite(node, "lift.sensitive-use", Kind.REFINES, before, "float32"))
        return records

    def _record(self, node: fx.Node, rule: str, entry: Entry, low: torch.dtype | None) -> Rewrite:
        after = f"float32, {_short(low)} again where an activation is met" if rule != "lift.comparison" else "compared in float32"
        return self.rewrite(node, rule, Kind.REFINES, f"{_describe(entry)} → {_short(low)} (rounds above {_exact(low)})", after)

    def _unlifted(self, origins: IntegerOrigins, region: Region, lift: _Lift) -> list[Finding]:
        found = []
        for node, entry in origins.entries.items():
            if entry.mask and _used(node):
                found.append(self._declare(node, entry, "is taken for a 0/1 mask (it is used as 1 - x only)"))
            elif (node not in region.nodes or node in lift.left) and _used(node):
                found.append(self._declare(node, entry, f"is rounded to {_short(dtype_of(node))} as it meets an activation"))
        for node, integer in origins.met:
            if node in lift.compared:
                continue
            low = next((dtype_of(n) for n in node.all_input_nodes if dtype_rules.is_low_precision(dtype_of(n))), None)
            if low is None or (dtype_of(node) not in (low, torch.bool)):
                continue
            bounds, proved = origins.bounds(integer)
            if not ranges.fits(bounds, (-_exact(low), _exact(low))):
                entry = Entry(integer, bounds, proved)
                found.append(self._declare(node, entry, f"is rounded to {_short(low)} as {_name(node)} promotes it with an activation"))
        for node in lift.early():
            found.append(
                self.finding(
                    node, "NX103", Severity.WARNING,
                    f"a value derived from integers is rounded as it meets an activation, and {_name(node)} follows",
                    "cast the activation to float32 before it is combined with positions, and back after sin and cos",
                )
            )  # fmt: skip
        return found

    def _declare(self, node: fx.Node, entry: Entry, what: str) -> Finding:
        severity = Severity.WARNING if entry.proved else Severity.INFO
        fix = "compute in float32 and cast the result" if entry.proved else "declare its range, e.g. ranges={'attention_mask': (0, 1)}"
        return self.finding(node, "NX101", severity, f"{_describe(entry)} {what}", fix)

    def _tables(self, origins: IntegerOrigins, context: PassContext) -> list[Finding]:
        found = []
        for node, source, low, error in rounded_table_errors(origins, context.sources):
            found.append(
                self.finding(
                    node, "NX102", Severity.WARNING if error > 0.01 else Severity.INFO,
                    f"{source.name!r} holds {_short(low)} values: {_name(node)} is off by up to {error:.2g} over the positions' range",
                    f"keep {source.name!r} in float32: .bfloat16()/.half() on the whole model rounds its buffers; compute it again after that",
                )
            )  # fmt: skip
        return found


class _Lift:
    """The edits of one run."""

    def __init__(self, build: NodeBuilder, origins: IntegerOrigins) -> None:
        self.build = build
        self.origins = origins
        self.raised: dict[fx.Node, fx.Node] = {}  # region node → the node that now holds its value unrounded
        self.left: set[fx.Node] = set()  # casts that stay for those who take the rounded value
        self.compared: set[fx.Node] = set()
        self._made: set[fx.Node] = set()
        self._were_low: set[fx.Node] = set()
        self._upcasts: dict[fx.Node, fx.Node] = {}
        self._restored: dict[fx.Node, fx.Node] = {}
        self._meetings: dict[fx.Node, None] = {}  # arithmetic that takes a rounded value

    def raise_region(self, region: Region) -> None:
        """Compute the region in float32 and give everyone outside it the dtype that the model had."""
        for node in region.nodes:
            member = self.origins.members[node]
            self.raised[node] = self._recast(node) if member.family is Family.CAST else self._raise(node)
        for node in reversed(region.nodes):
            self._settle(node)

    def _raise(self, node: fx.Node) -> fx.Node:
        member, dtype = self.origins.members[node], dtype_of(node)
        values = [v for v in member.values if isinstance(v, fx.Node)]
        swap = {v: self._high(v) for v in values}
        if values and not any(_is_float(v) for v in values) and "dtype" not in node.kwargs and member.family is not Family.FACTORY:
            swap[values[0]] = self._high(values[0], even_integer=True)  # torch's default dtype was the low one
        node.args = fx.map_arg(node.args, lambda a: swap.get(a, a))
        node.kwargs = fx.map_arg(node.kwargs, lambda a: swap.get(a, a))
        if "dtype" in node.kwargs or member.family is Family.FACTORY:
            node.update_kwarg("dtype", FP32)
        if dtype_rules.is_low_precision(dtype):
            self._were_low.add(node)
            self._refresh(node)
        return node

    def _refresh(self, node: fx.Node) -> None:
        if node.meta.get("unbacked_bindings"):  # evaluating again would invent new symbols
            node.meta["val"] = meta.retype(node.meta["val"], FP32)
            return
        try:
            refresh(node, self.build.mode)
        except RuntimeError:
            if node.target is not aten.view.default:
                raise
            # A value that is no longer rounded can be an expanded one, which no view takes.
            with self.build.before(node):
                node.update_arg(0, self._make(aten.clone.default, node.args[0], memory_format=torch.contiguous_format))
            refresh(node, self.build.mode)

    def _recast(self, node: fx.Node) -> fx.Node:
        """What the cast ``node`` converts, in float32 (or the higher precision that it gives)."""
        (value,) = self.origins.members[node].values
        source, target = self.raised.get(value, value), dtype_of(node)
        target = FP32 if dtype_rules.is_low_precision(target) else target
        was, is_ = meta.val(source), meta.val(node)
        options = {k: v for k, v in node.kwargs.items() if k != "dtype"} if node.target is aten._to_copy.default else {}
        if was.dtype == target and not options and was.device == is_.device and _layout(was) == _layout(is_):
            return source
        if was.device != is_.device:
            options["device"] = is_.device
        with self.build.after(node):
            cast = self._make(aten._to_copy.default, source, dtype=target, **options)
            if was.dim() != is_.dim() or str(was.shape) != str(is_.shape):  # a copy broadcasts
                cast = self._make(aten.expand.default, cast, list(is_.shape))
                cast = self._make(aten.clone.default, cast, memory_format=torch.contiguous_format)
        return cast

    def _make(self, op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = self.build.call(op, *args, **kwargs)
        self._made.add(node)
        return node

    def _high(self, value: fx.Node, even_integer: bool = False) -> fx.Node:
        """``value`` as a float32 operand: raised with the region, else converted once, which is exact."""
        if value in self.raised:
            return self.raised[value]
        if not dtype_rules.is_low_precision(dtype_of(value)) and not even_integer:
            return value
        if value not in self._upcasts:
            member = self.origins.members.get(value)
            if member is not None and member.family is Family.CAST:
                self._upcasts[value] = self._recast(value)
            else:
                with self.build.after(value):
                    self._upcasts[value] = self._make(aten._to_copy.default, value, dtype=FP32)
        return self._upcasts[value]

    def _settle(self, node: fx.Node) -> None:
        """Point every user of a region node to the value it wants. Users come later in the graph and are settled already."""
        high, checks = self.raised[node], []
        for user in list(node.users):
            member = self.origins.members.get(user)
            if user in self._made or (user in self.raised and self.raised[user] is user):
                continue
            if user.target in METADATA:
                checks.append(user)
            elif member is not None and member.family is Family.FACTORY:  # x_like(node): only its shape counts
                user.update_kwarg("dtype", dtype_of(user))
            elif user not in self.raised and (user in self.origins.sinks or (member is not None and member.low is None)):
                user.replace_input_with(node, high)
            else:
                self._meetings[user] = None
                if high is node:
                    user.replace_input_with(node, self._restore(node))
                else:
                    self.left.add(node)
        for user in checks:
            if node in self._restored:
                user.replace_input_with(node, self._restored[node])
            elif node not in self.left:
                user.replace_input_with(node, high)
                if user.target is aten._assert_tensor_metadata.default:
                    _expect(user, dtype_of(high))
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

    def compare_exactly(self) -> list[tuple[fx.Node, fx.Node, Entry]]:
        """Let integers be compared with low-precision floats in float32, which holds both; eager rounds the integers first.

        An activation that is itself made of rounded integers is left alone: the two roundings may well belong together.
        """
        done = []
        pairs = [(n, v) for n in self.origins.sinks for v in n.all_input_nodes if dtype_rules.is_integral(dtype_of(v))]
        for node, integer in (*pairs, *self.origins.met):
            floats = [v for v in node.all_input_nodes if dtype_rules.is_low_precision(dtype_of(v))]
            if FAMILIES.get(node.target) is not Family.COMPARE or not floats:
                continue
            bounds, proved = self.origins.bounds(integer)
            limit = _exact(dtype_of(floats[0]))
            if ranges.fits(bounds, (-limit, limit)) or not all(self.origins.of(v) or _is_unmixed(v) for v in floats):
                continue
            for value in floats:
                node.replace_input_with(value, self._high(value))
            self.compared.add(node)
            done.append((node, floats[0], Entry(integer, bounds, proved)))
        return done

    def early(self) -> list[fx.Node]:
        """Periodic functions of what was combined with an activation after it had been rounded."""
        found: dict[fx.Node, None] = {}
        for node in (*self._meetings, *(n for n, _ in self.origins.met)):
            pending = list(node.users)[:8] if FAMILIES.get(node.target) is Family.COMPUTE else []
            for user in pending:
                if user.target in PERIODIC and dtype_rules.is_low_precision(dtype_of(node)):
                    found[user] = None
                elif FAMILIES.get(user.target) is Family.MOVE and len(pending) < 32:
                    pending += list(user.users)[:8]
        return list(found)


def _is_worth_spreading(node: fx.Node, origins: IntegerOrigins) -> bool:
    """Integer-derived, and not a product of integers that bf16 holds exactly."""
    member, limit = origins.members[node], _exact(torch.bfloat16)
    if member.family is not Family.OUTER or not member.integer:
        return False
    exact = [origins.exact(v) for v in member.values]
    return not all(e is not None and ranges.fits(e, (-limit, limit)) for e in exact)


def _product_kind(node: fx.Node, origins: IntegerOrigins) -> Kind:
    """Equal bits, unless a zero of either sign can come out (``-1 * 0``): matrix kernels sign it as they please."""
    signs = [_signs(v, origins) for v in origins.members[node].values]
    return Kind.EXACT if all("unsigned" in s for s in signs) or ("integer" in signs[0] and "positive" in signs[1]) or (
        "positive" in signs[0] and "integer" in signs[1]
    ) else Kind.REFINES  # fmt: skip


def _signs(value: Any, origins: IntegerOrigins) -> set[str]:
    member = origins.of(value)
    while member is not None and member.family in (Family.CAST, Family.MOVE):
        (value,) = member.values
        if dtype_rules.is_integral(dtype_of(value)):
            return {"integer", "unsigned"} if origins.bounds(value)[0][0] >= 0 else {"integer"}
        member = origins.of(value)
    if member is None or member.family is not None:
        return set()
    held = origins.sources[value.name].value
    if held is None or isinstance(held, meta.FakeTensor) or held.is_meta or bool(held.signbit().any()):
        return set()
    # bf16 matrix kernels flush subnormal numbers.
    return {"unsigned", "positive"} if bool((held >= torch.finfo(torch.bfloat16).tiny).all()) else set()


def _is_unmixed(value: fx.Node) -> bool:
    """Whether no integer was converted on the way to ``value``."""
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


def _is_float(value: fx.Node) -> bool:
    dtype = dtype_of(value)
    return dtype is not None and dtype.is_floating_point


def _layout(value: torch.Tensor) -> tuple[str, str]:
    return str(value.shape), str(value.stride())  # as text: comparing symbols would add guards


def _expect(check: fx.Node, dtype: torch.dtype | None) -> None:
    """Let a metadata assertion name the new dtype, where it names one."""
    if len(check.args) > 3 and check.args[3] is not None:
        check.update_arg(3, dtype)
    elif check.kwargs.get("dtype") is not None:
        check.update_kwarg("dtype", dtype)


def _used(node: fx.Node) -> bool:
    return any(user.target not in METADATA for user in node.users)


def _exact(dtype: torch.dtype | None) -> int:
    return dtype_rules.exact_integer(dtype) if dtype is not None else 0


def _short(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target)).split(".")[0]


def _describe(entry: Entry) -> str:
    if entry.integer is None:
        return "a sequence of integers made"
    largest = max(abs(entry.bounds[0]), abs(entry.bounds[1]))
    return f"{_short(dtype_of(entry.integer))} up to {largest}" + ("" if entry.proved else " (undeclared)")
