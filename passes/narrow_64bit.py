"""narrow-64bit: 64-bit values become 32-bit ones wherever it is proved that nothing is lost."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from nxfx.analysis import float64, integer_ops
from nxfx.analysis.integer_ops import IntegerRule, Result
from nxfx.analysis.intervals import INT32, INT64, Interval, arg, fits
from nxfx.analysis.provenance import Role
from nxfx.analysis.ranges import analyse
from nxfx.graph import meta
from nxfx.graph.narrowing import Narrowing
from nxfx.pipeline import Pass, PassContext, PassResult
from nxfx.report.findings import Finding, Severity
from nxfx.report.rewrites import Kind

aten = torch.ops.aten

_CHOICES = {"mode": ("proved", "assume", "aggressive"), "boundary": ("narrow", "keep"), "fp64": ("keep", "narrow")}


@dataclass(frozen=True)
class NarrowOptions:
    """Options of narrow-64bit.

    Attributes:
        mode: ``"assume"`` takes undeclared int64 inputs to fit int32 and has the boundary enforce it; ``"proved"`` narrows only what
            holds for every input; ``"aggressive"`` narrows unproved values too, as every layer below does, and reports each.
        boundary: ``"narrow"`` casts 64-bit outputs down and back up, so that the boundary can take both casts out of the graph;
            ``"keep"`` hands an output that an op makes in int64 on as it is.
        fp64: ``"keep"`` reports float64 and complex128, and narrows constants where that changes no bit; ``"narrow"`` computes in
            float32 and complex64.
    """

    mode: str = "assume"
    boundary: str = "narrow"
    fp64: str = "keep"

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"option {name!r} is one of {', '.join(choices)}, not {getattr(self, name)!r}")


class Narrow64bit(Pass):
    """int64 values that provably fit int32 are produced as int32; what may not fit stays and is reported with the reason.

    Given::

        %ids : int64[2, 8] = placeholder                    # indexes an embedding of 100 rows
        %positions : int64[8] = aten.arange.default(8)
        %sum : int64[2, 8] = aten.add.Tensor(%ids, %positions)
        %best : int64[2] = aten.argmax.default(%sum, 1)
        return (%best,)

    Result::

        %ids : int64[2, 8] = placeholder                    # required: [0, 99]
        %_to_copy : int32[2, 8] = aten._to_copy.default(%ids, dtype=int32)
        %positions : int32[8] = aten.arange.default(8, dtype=int32)
        %sum : int32[2, 8] = aten.add.Tensor(%_to_copy, %positions)
        %best : int64[2] = aten.argmax.default(%sum, 1)     # its schema forces int64
        %_to_copy_1 : int32[2] = aten._to_copy.default(%best, dtype=int32)
        %_to_copy_2 : int64[2] = aten._to_copy.default(%_to_copy_1, dtype=int64)
        return (%_to_copy_2,)

    Casts behind inputs and before outputs are there for the boundary to take out. Sums and cumulative sums accumulate in int32
    only where the bound of the result covers every partial sum; an op that demands int64 gets a local cast.
    """

    name = "narrow-64bit"
    Options = NarrowOptions
    after: ClassVar[tuple[str, ...]] = ("mask-slice-writes", "lift-int-casts")

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> PassResult:
        result = PassResult()
        integers, floats = _concerned(graph_module.graph)
        if integers:
            _Integers(self, graph_module, context, result).run(integers)
        if floats:
            for wide in (torch.float64, torch.complex128):
                _Floats(self, graph_module, context, result, wide).run(floats)
        return result


_FLOATS = frozenset({torch.float64, torch.complex128})


def _concerned(graph: fx.Graph) -> tuple[list[fx.Node], list[fx.Node]]:
    """Nodes that give or read int64, and those that give or read float64 or complex128, in order."""
    integers: dict[fx.Node, None] = {}
    floats: dict[fx.Node, None] = {}
    readers: set[fx.Node] = set()
    float_readers: set[fx.Node] = set()
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            dtypes: Any = (value.dtype,)
        elif isinstance(value, (list, tuple)):
            dtypes = {v.dtype for v in value if isinstance(v, torch.Tensor)}
        else:
            dtypes = ()
        if torch.int64 in dtypes:
            integers[node] = None
            readers.update(node.users)
        elif node in readers:
            integers[node] = None
        if not _FLOATS.isdisjoint(dtypes):
            floats[node] = None
            float_readers.update(node.users)
        elif node in float_readers:
            floats[node] = None
    return list(integers), list(floats)


@dataclass
class _Kept:
    """A 64-bit value that stays, and everything computed from it that therefore stays too."""

    node: fx.Node
    code: str
    reason: str
    fix: str
    count: int = 0

    def finding(self) -> Finding:
        more = f"; {self.count} more value{'s' if self.count > 1 else ''} computed from it" if self.count else ""
        return Finding.at(self.node, self.code, Severity.WARNING, f"{self.reason}: 64 bits are kept{more}", self.fix)


class _Narrower:
    """What both dtypes have in common: records, findings and the consumers that must see the wide dtype."""

    def __init__(
        self, step: Narrow64bit, gm: fx.GraphModule, context: PassContext, result: PassResult, wide: torch.dtype, narrow: torch.dtype
    ) -> None:
        self.step, self.context, self.result = step, context, result
        self.options: NarrowOptions = step.options
        self.gm = gm
        self.book = Narrowing(gm.graph, step.name, wide, narrow)
        self.kept: dict[fx.Node, _Kept] = {}
        self._names = (str(wide).removeprefix("torch."), str(narrow).removeprefix("torch."))

    def record(self, node: fx.Node, rule: str, before: str = "", after: str = "", kind: Kind = Kind.EXACT, bound: str = "") -> None:
        rewrite = self.step.rewrite(node, f"narrow.{rule}", kind, before or self._names[0], after or self._names[1], bound)
        self.result.rewrites.append(rewrite)

    def keep(self, node: fx.Node, code: str, reason: str, fix: str) -> None:
        if self.inherit(node):
            self.kept[node].count += 1
        else:
            self.kept[node] = _Kept(node, code, reason, fix)

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

    def finish(self) -> None:
        self.result.changed |= self.book.changed
        self.result.findings += [k.finding() for k in {id(k): k for k in self.kept.values()}.values()]


class _Integers(_Narrower):
    def __init__(self, step: Narrow64bit, gm: fx.GraphModule, context: PassContext, result: PassResult) -> None:
        super().__init__(step, gm, context, result, torch.int64, torch.int32)
        self.ranges = analyse(gm, context.sources)

    def run(self, nodes: list[fx.Node]) -> None:
        for node in nodes:
            self.visit(node)
        self.finish()
        self._report_assumptions()

    def visit(self, node: fx.Node) -> None:
        rule = integer_ops.RULES.get(node.target)
        if node.op == "output":
            self.output(node)
        elif node.op in ("placeholder", "get_attr"):
            self._source(node)
        elif node.target is integer_ops.METADATA_ASSERT:
            self.metadata_assert(node)
        elif self.book.is_own_cast(node):
            return
        elif node.target is operator.getitem:
            self._getitem(node)
        elif rule is None or isinstance(node.kwargs.get("sorter"), fx.Node):
            self._demands(node)
        elif rule.result is Result.CAST:
            self._cast(node)
        elif rule.result is Result.FACTORY:
            self._factory(node)
        elif rule.result is Result.ACCUMULATES and self.book.is_wide(node):
            self._accumulates(node)
        else:
            self._computes(node, rule)

    # --- one kind of node each ---------------------------------------------------------------------------------------

    def _source(self, node: fx.Node) -> None:
        if not self.book.is_wide(node) or all(u.op == "output" for u in node.users):
            return
        if not self._fits(node):
            self._keep(node)
            return
        origin = node if node.op == "placeholder" else next(iter(node.users))
        if self.book.cast_source(node, origin):
            self.record(node, "input")
        requirement = self.ranges.requirements.get(node)
        source = self.context.sources.get(node.name)
        if requirement is not None and source is not None and any(self.book.is_own_cast(u) for u in node.users):
            before = self.context.requirements.get(source.name, INT64)
            low, high = max(before[0], requirement.bounds[0]), min(before[1], requirement.bounds[1])
            self.context.requirements[source.name] = (low, high)

    def _getitem(self, node: fx.Node) -> None:
        if not self.book.is_wide(node):
            return
        source, index = node.args
        assert isinstance(source, fx.Node)
        if source.meta["val"][index].dtype == self.book.narrow:
            self.book.in_place(node)
        else:
            self._settle(node)

    def _demands(self, node: fx.Node) -> None:
        if self.book.widen(node, self.book.operands(node)):
            message = f"`{_op(node)}` demands int64: a cast stands before it"
            self.result.findings.append(self.step.finding(node, "NX304", Severity.INFO, message))
            self.record(node, "local-cast", "int32", "int64")
        self._settle(node)

    def _factory(self, node: fx.Node) -> None:
        if not self.book.is_wide(node):
            return
        if self._fits(node) and all(fits((int(n), int(n)), INT32) for n in integer_ops.python_numbers(node).values()):
            self._take(node, self.book.operands(node))
            node.update_kwarg("dtype", torch.int32)
            self.book.in_place(node)
            self.record(node, "factory")
            return
        if self.book.operands(node) and node.kwargs.get("dtype") is None:
            node.update_kwarg("dtype", torch.int64)  # its template may have been narrowed
            self.book.changed = True
        self._keep(node)

    def _cast(self, node: fx.Node) -> None:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if not self.book.is_wide(node):
            if meta.dtype_of(node) == torch.int32 == meta.dtype_of(source) and _is_pure_cast(node, source):
                self.book.bypass(node, narrowed=False)
            return
        if not self._fits(node):
            self._keep(node)
            return
        self._take(node, [source])
        source = node.all_input_nodes[0]
        if meta.dtype_of(source) == torch.int32 and _is_pure_cast(node, source) and self.book.bypass(node, narrowed=True):
            self.record(source, "cast", "int64", "no cast")
        else:
            node.update_kwarg("dtype", torch.int32)
            self.book.in_place(node)
            self.record(node, "cast")

    def _accumulates(self, node: fx.Node) -> None:
        """The bound of a sum or product covers every partial one, so where it fits the accumulator fits too."""
        if self._fits(node):
            self._take(node, self.book.operands(node))
            node.update_kwarg("dtype", torch.int32)
            self.book.in_place(node)
            self.record(node, "accumulator")
        else:
            self._keep(node)  # torch accumulates an int32 operand in int64

    def _computes(self, node: fx.Node, rule: IntegerRule) -> None:
        operands = self.book.operands(node)
        indices = {i for p in rule.index if p < len(node.args) for i in _nodes_in(node.args[p])} if rule.index else ()
        values = [n for n in operands if n not in indices]
        wide = self.book.is_wide(node)
        follows = rule.result is Result.FOLLOWS
        narrow = all(self.book.takes(n, node) for n in values) and (not (wide and follows) or self._fits(node, rule.forced))
        narrow = narrow and self._numbers_fit(node, values) and self._shifts_fit(node)
        self._take(node, [n for n in operands if narrow or n in indices])
        if node.target in integer_ops.EXPANDED_INDEX:
            self._dense_index(node)
        if not narrow:
            self.book.widen(node, values)
            if wide:
                self._settle(node)
        elif not wide:
            return
        elif follows and values:
            outputs = None if not rule.forced else set(range(len(node.meta["val"]))) - rule.forced
            if outputs is None or any(meta_dtype == torch.int64 for meta_dtype in _dtypes(node, outputs)):
                self.book.in_place(node, outputs)
                self.record(node, "follow")
        elif follows and node.target in integer_ops.POINTWISE - integer_ops.CHOICES:
            self._promote(node)
        elif "out_int32" in _keywords(node) and self._fits(node):
            node.update_kwarg("out_int32", True)
            self.book.in_place(node)
            self.record(node, "index")
        else:
            self._settle(node)

    def _dense_index(self, node: fx.Node) -> None:
        """torch's CPU kernels read an expanded index as int64 whatever its dtype: an int32 one is copied out first."""
        index = node.args[2]
        assert isinstance(index, fx.Node)
        if self.book.narrowed(index, node) and 0 in index.meta["val"].stride()[1:]:
            with self.book.build.before(node):
                dense = self.book.build.call(aten.clone.default, index, memory_format=torch.contiguous_format)
            node.update_arg(2, dense)
            self.record(node, "dense-index", "expanded index", "dense index")

    def _promote(self, node: fx.Node) -> None:
        """``bool + 1`` is int64; with the operand as int32 it is int32."""
        for operand in node.all_input_nodes:
            if meta.is_tensor(operand):
                with self.book.build.before(node):
                    node.replace_input_with(operand, self.book.build.cast(operand, torch.int32))
        self.book.in_place(node)
        self.record(node, "promotion")

    # --- verdicts ----------------------------------------------------------------------------------------------------

    def _bounds(self, node: fx.Node) -> list[Interval | None]:
        return self.ranges.outputs(node, proved=self.options.mode == "proved")

    def _fits(self, node: fx.Node, besides: frozenset[int] = frozenset()) -> bool:
        """Whether ``node`` (every int64 output of it but ``besides``) holds only int32 values."""
        bounds = [b for i, b in enumerate(self._bounds(node)) if i not in besides]
        if self.options.mode == "aggressive" and not integer_ops.python_numbers(node):
            return True
        return all(b is None or fits(b, INT32) for b in bounds)

    def _numbers_fit(self, node: fx.Node, values: list[fx.Node]) -> bool:
        """Whether ``node`` means the same in int32 with its Python numbers: sentinels beyond int32 become its ends."""
        beyond = {k: v for k, v in integer_ops.python_numbers(node).items() if isinstance(v, int) and not fits((v, v), INT32)}
        if not beyond or not values:
            return True
        bounds = self._bounds(values[0])[0] or INT64
        for value in beyond.values():
            end_is_free = bounds[1] < INT32[1] if value > 0 else bounds[0] > INT32[0]
            if node.target not in integer_ops.CLAMPS and not (node.target in integer_ops.COMPARISONS and end_is_free):
                return False
        for key, value in beyond.items():
            integer_ops.set_argument(node, key, max(INT32[0], min(INT32[1], value)))
        self.record(node, "sentinel", str(next(iter(beyond.values()))), "the end of int32")
        self.book.changed = True
        return True

    def _shifts_fit(self, node: fx.Node) -> bool:
        if node.target not in integer_ops.SHIFTS:
            return True
        bounds = self.ranges.read(node.args[1])
        return bounds is not None and fits(bounds, (0, 31))

    def _settle(self, node: fx.Node) -> None:
        """``node`` is computed in int64: whoever can take it in int32 gets a cast where its value fits."""
        if isinstance(node.meta.get("val"), (list, tuple)):
            self.inherit(node)
        elif not self.book.is_wide(node):
            return
        elif not self._fits(node):
            self._keep(node)
        else:
            self.book.offer(node)

    def _take(self, node: fx.Node, operands: list[fx.Node]) -> None:
        for operand in self.book.take(node, operands):
            self.record(operand, "index" if integer_ops.is_forced(operand) else "result")

    # --- words -------------------------------------------------------------------------------------------------------

    def _keep(self, node: fx.Node) -> None:
        bounds = self._bounds(node)[0]
        source = self.context.sources.get(node.name) if node.op != "call_function" else None
        culprit = self.ranges.culprit(node)
        origin = self.context.sources.get(culprit.name) if culprit is not None else None
        fix = f'declare ranges={{"{origin.name}": (low, high)}}' if origin else "bound it in the model, e.g. with clamp or remainder"
        if self.context.is_body and node.op == "placeholder":
            reason, fix = f"`{node.name}` is an operand of a higher-order op: nothing is known of it", "cast it inside the branch"
        elif source is not None and source.role in (Role.BUFFER, Role.PARAMETER, Role.CONSTANT):
            self.keep(node, "NX306", f"`{source.name}` holds values beyond int32" if source.is_known else f"`{source.name}` may hold anything", fix)
            return
        elif node.op != "call_function":
            reason = f"`{origin.name if origin else node.name}` may hold values beyond int32"
        elif bounds is None or bounds == INT64:
            reason = f"no bound is known for `{_op(node)}`, or it may pass the end of int64"
        else:
            end = bounds[1] if bounds[1] > INT32[1] else bounds[0]
            reason = f"`{_op(node)}` may reach {_power(end)}"
        self.keep(node, "NX301", reason, fix)

    def _report_assumptions(self) -> None:
        self.context.premises.extend(p for p in self.ranges.premises if p not in self.context.premises)
        for node, requirement in self.ranges.requirements.items():
            source = self.context.sources[node.name]
            if requirement.basis == "declared":
                self.context.requirements.setdefault(source.name, requirement.bounds)
            elif requirement.basis == "assumed" and source.name in self.context.requirements:
                message = f"`{source.name}` is taken to fit int32; the boundary refuses anything else"
                fix = f'declare ranges={{"{source.name}": (low, high)}} to make it a promise'
                self.result.findings.append(self.step.finding(node, "NX303", Severity.INFO, message, fix))
        for symbol in sorted(self.ranges.dims, key=str):
            anchor = next((n for n in self.gm.graph.nodes if _has_dimension(n, symbol)), None)
            if anchor is not None:
                message = f"the dynamic dimension {symbol} of `{anchor.name}` is taken to stay below 2^31"
                fix = "give it a maximum in dynamic_shapes"
                self.result.findings.append(self.step.finding(anchor, "NX303", Severity.INFO, message, fix))


class _Floats(_Narrower):
    def __init__(self, step: Narrow64bit, gm: fx.GraphModule, context: PassContext, result: PassResult, wide: torch.dtype) -> None:
        super().__init__(step, gm, context, result, wide, float64.NARROW[wide])
        self.everything = self.options.fp64 == "narrow"

    def run(self, nodes: list[fx.Node]) -> None:
        for node in nodes:
            if node.op == "output":
                self.output(node)
            elif node.target is integer_ops.METADATA_ASSERT:
                self.metadata_assert(node)
            elif not self.book.is_own_cast(node):
                self._visit(node)
        self.finish()

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
        if node.kwargs.get("dtype") == self.book.wide:
            node.update_kwarg("dtype", self.book.narrow)
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
            self.record(node, rule)
        else:
            self.record(node, rule, kind=Kind.REASSOCIATED, bound="rounded to fp32 on request (fp64=narrow)")

    def _keep(self, node: fx.Node) -> None:
        if not self.book.is_wide(node):
            return
        name = self._names[0]
        source = self.context.sources.get(node.name)
        what = f"`{source.name}` is {name}" if source is not None else f"`{_op(node)}` gives {name}"
        fix = f"write {self._names[1]} in the model, or let narrow-64bit{{fp64=narrow}} compute in it"
        self.keep(node, "NX302", what, fix)


def _op(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target)).split(".")[0]


def _power(value: int) -> str:
    size = abs(value)
    sign = "-" if value < 0 else ""
    if size & (size - 1) == 0:
        return f"{sign}2^{size.bit_length() - 1}"
    return str(value) if size < 2**40 else f"{sign}2^{size.bit_length() - 1} and more"


def _has_dimension(node: fx.Node, symbol: Any) -> bool:
    sizes = getattr(meta.val(node), "shape", ())
    return any(isinstance(s, torch.SymInt) and s.node.expr == symbol for s in sizes)


def _nodes_in(argument: Any) -> list[fx.Node]:
    found = argument if isinstance(argument, (list, tuple)) else (argument,)
    return [n for n in found if isinstance(n, fx.Node)]


def _dtypes(node: fx.Node, outputs: set[int]) -> list[torch.dtype]:
    return [v.dtype for i, v in enumerate(node.meta["val"]) if i in outputs and isinstance(v, torch.Tensor)]


def _keywords(node: fx.Node) -> set[str]:
    return {a.name for a in node.target._schema.arguments} if isinstance(node.target, torch._ops.OpOverload) else set()


def _is_pure_cast(node: fx.Node, source: fx.Node) -> bool:
    """A cast that only changes the dtype: same strides, and no output that would come to alias another."""
    if set(node.kwargs) != {"dtype"} or any(u.op == "output" for u in node.users):
        return False
    return str(node.meta["val"].stride()) == str(source.meta["val"].stride())
