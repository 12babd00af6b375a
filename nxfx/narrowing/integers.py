"""The integer half of narrow-64bit: one visit a node, in graph order."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from nxfx.analysis import integer_ops
from nxfx.analysis.assumptions import assume_small_sums
from nxfx.analysis.integer_ops import IntegerRule, Result
from nxfx.analysis.intervals import INT32, INT64, Interval, fits, meet
from nxfx.analysis.ranges import analyse
from nxfx.graph import meta, walk
from nxfx.graph.higher_order import Slot, take_apart
from nxfx.narrowing.base import Narrower
from nxfx.narrowing.bodies import agreeing, retype
from nxfx.narrowing.verdicts import assumptions, op_name, why_kept
from nxfx.pipeline import Pass, PassContext, PassResult
from nxfx.report.findings import Severity

aten = torch.ops.aten


class NarrowIntegers(Narrower):
    """Narrows the int64 values of one graph as far as their ranges prove it."""

    def __init__(self, step: Pass, gm: fx.GraphModule, context: PassContext) -> None:
        super().__init__(step, gm, context, torch.int64)
        self.unproved: dict[fx.Node, None] = {}
        self.ranges = analyse(gm, context.sources, context.requirements)
        if self.options.mode == "assume":
            self.ranges = assume_small_sums(gm, context.sources, context.requirements, self.ranges)
        self.memory = _read_as_memory(gm.graph)

    def run(self, nodes: list[fx.Node]) -> PassResult:
        for node in nodes:
            self.visit(node)
        self._require_declared()
        for node in self.unproved:
            message = f"`{op_name(node)}` is narrowed without proof (mode=aggressive)"
            self.result.findings.append(self.step.finding(node, "NX301", Severity.WARNING, message))
        self.context.assumed_sizes.update(map(str, self.ranges.dims))
        self.result.findings += assumptions(self.gm, self.ranges, self.context)
        return self.finish()

    def visit(self, node: fx.Node) -> None:
        rule = integer_ops.RULES.get(node.target)
        if node.op == "output":
            self.output(node)
        elif node.op in ("placeholder", "get_attr"):
            self._source(node)
        elif node.target is integer_ops.METADATA_ASSERT:
            self.metadata_assert(node)
        elif self.book.is_own_cast(node) or node.target in integer_ops.READS_LAYOUT:
            return
        elif walk.is_higher_order(node):
            self._higher_order(node)
        elif node.target is operator.getitem:
            self._getitem(node)
        elif rule is None or node in self.memory or isinstance(node.kwargs.get("sorter"), fx.Node):
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
        if node in self.memory:
            self.keep(node, "NX301", "`as_strided` reads its memory, which a cast would pack", "index or slice it instead")
            if self.options.mode != "proved":
                self._require(node)  # what is computed from it counts on that all the same
            return
        if not self._fits(node):
            self._keep(node)
            return
        origin = node if node.op == "placeholder" else next(iter(node.users))
        if self.book.cast_source(node, origin):
            self._record(node, "input")
        if any(reader.target is not integer_ops.METADATA_ASSERT for u in node.users if self.book.is_own_cast(u) for reader in u.users):
            self._require(node)

    def _require(self, node: fx.Node) -> None:
        """The boundary enforces what the proofs take ``node`` to hold. The model's own cast to int32 wraps, and needs nothing."""
        requirement, source = self.ranges.requirements.get(node), self.context.sources.get(node.name)
        if requirement is not None and source is not None:
            before = self.context.requirements.get(source.name, INT64)
            self.context.requirements[source.name] = meet(before, requirement.bounds)

    def _getitem(self, node: fx.Node) -> None:
        if not self.book.is_wide(node):
            return
        source, index = node.args
        assert isinstance(source, fx.Node)
        if source.meta["val"][index].dtype == torch.int32:
            self.book.in_place(node)
        else:
            self._settle(node)

    def _demands(self, node: fx.Node) -> None:
        if self.book.widen(node, self.book.operands(node)):
            message = f"`{op_name(node)}` demands int64: a cast stands before it"
            self.result.findings.append(self.step.finding(node, "NX304", Severity.INFO, message))
            self.record(node, "local-cast", "int32", "int64")
        self._settle(node)

    def _higher_order(self, node: fx.Node) -> None:
        """Values that fit cross the edge of a body as int32, on both sides of it; the body itself has had its turn."""
        call = take_apart(node)
        slots = call.slots if call is not None else []
        narrow = agreeing(slots, [s for s in slots if self._slot_fits(node, s)])
        operands = [v for s in narrow for v in s.operands]
        self.book.widen(node, [n for n in self.book.operands(node) if n not in operands])
        self._take(node, operands)
        for slot in narrow:
            retype(slot, torch.int32, self.step.name)
            self._record(node, "body")
        if results := {s.result for s in narrow if s.result is not None}:
            self.book.in_place(node, results)
        self.book.changed |= bool(narrow)
        self._settle(node)

    def _slot_fits(self, node: fx.Node, slot: Slot) -> bool:
        if any(meta.dtype_of(n) is not torch.int64 for n in (*slot.placeholders, *slot.returned())):
            return False
        if not all(isinstance(v, fx.Node) and self.book.takes(v, node) for v in slot.operands):
            return False
        if any(p in _read_as_memory(p.graph) for p in slot.placeholders):
            return False
        proved = self.options.mode == "proved"
        inside = [self.ranges.operands.get(p, (INT64, INT64))[proved] for p in slot.placeholders]
        outside = [self._bounds(v)[0] or INT64 for v in slot.operands]
        results = [self._bounds(node)[slot.result] or INT64] if slot.result is not None else []
        return all(fits(b, INT32) for b in (*inside, *outside, *results))

    def _factory(self, node: fx.Node) -> None:
        if not self.book.is_wide(node):
            return
        if self._fits(node) and _numbers_are_int32(node):
            self._take(node, self.book.operands(node))
            node.update_kwarg("dtype", torch.int32)
            self.book.in_place(node)
            self._record(node, "factory")
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
            self._record(node, "cast")

    def _accumulates(self, node: fx.Node) -> None:
        """The bound of a sum or product covers every partial one, so where it fits the accumulator fits too."""
        if self._fits(node):
            self._take(node, self.book.operands(node))
            node.update_kwarg("dtype", torch.int32)
            self.book.in_place(node)
            self._record(node, "accumulator")
        else:
            self._keep(node)  # torch accumulates an int32 operand in int64

    def _computes(self, node: fx.Node, rule: IntegerRule) -> None:
        operands = self.book.operands(node)
        indices = {i for p in rule.index if p < len(node.args) for i in _nodes_in(node.args[p])} if rule.index else ()
        values = [n for n in operands if n not in indices]
        wide = self.book.is_wide(node)
        follows = rule.result is Result.FOLLOWS
        narrow = all(self.book.takes(n, node) for n in values) and (not (wide and follows) or self._fits(node, rule.forced))
        promotes = wide and follows and not values and node.target in integer_ops.POINTWISE
        if narrow and not (_numbers_are_int32(node) if promotes else self._numbers_fit(node, values) and self._shifts_fit(node)):
            narrow = False
            message = f"`{op_name(node)}` takes a number or a shift beyond 32 bits: it is computed in int64"
            self.result.findings.append(self.step.finding(node, "NX301", Severity.WARNING, message, "keep it within int32 in the model"))
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
            if rule.composite:
                self.book.re_evaluate(node)
                self._record(node, "follow")
            elif outputs is None or any(meta_dtype == torch.int64 for meta_dtype in _dtypes(node, outputs)):
                self.book.in_place(node, outputs)
                self._record(node, "follow")
        elif promotes:
            self._promote(node)
        elif "out_int32" in _keywords(node) and self._fits(node):
            node.update_kwarg("out_int32", True)
            self.book.in_place(node)
            self._record(node, "index")
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
        """``bool + 1`` is int64; with the operand as int32 it is int32. The condition of a ``where`` stays a bool."""
        for position, operand in enumerate(node.args):
            if isinstance(operand, fx.Node) and meta.is_tensor(operand) and not (position == 0 and node.target in integer_ops.CHOICES):
                with self.book.build.before(node):
                    node.update_arg(position, self.book.build.cast(operand, torch.int32))
        self.book.in_place(node)
        self._record(node, "promotion")

    # --- verdicts ----------------------------------------------------------------------------------------------------

    def _bounds(self, node: fx.Node) -> list[Interval | None]:
        while node not in self.ranges and self.book.is_own_cast(node):
            (node,) = node.all_input_nodes
        return self.ranges.outputs(node, proved=self.options.mode == "proved")

    def _fits(self, node: fx.Node, besides: frozenset[int] = frozenset()) -> bool:
        """Whether ``node`` (every int64 output of it but ``besides``) holds only int32 values."""
        bounds = [b for i, b in enumerate(self._bounds(node)) if i not in besides]
        if all(b is None or fits(b, INT32) for b in bounds):
            return True
        if self.options.mode != "aggressive" or not _numbers_are_int32(node):
            return False
        self.unproved[node] = None
        return True

    def _numbers_fit(self, node: fx.Node, values: list[fx.Node]) -> bool:
        """Whether ``node`` means the same in int32 with its Python numbers, once those beyond int32 are replaced."""
        numbers = {k: v for k, v in integer_ops.python_numbers(node).items() if isinstance(v, int)}
        if not values or not numbers:
            return True
        bounds = self._bounds(values[0])[0] or INT64
        replaced = {k: integer_ops.in_int32(node, v, bounds) for k, v in numbers.items()}
        if any(v is None for v in replaced.values()):
            return False
        for key, number in replaced.items():
            if number != numbers[key]:
                integer_ops.set_argument(node, key, number)
                self.record(node, "sentinel", str(numbers[key]), str(number))
                self.book.changed = True
        return True

    def _shifts_fit(self, node: fx.Node) -> bool:
        if node.target not in integer_ops.SHIFTS:
            return True
        amount = node.args[1]
        bounds = self._bounds(amount)[0] if isinstance(amount, fx.Node) else self.ranges.read(amount)
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
            self._record(operand, "index" if integer_ops.is_forced(operand) else "result")

    def _record(self, node: fx.Node, rule: str) -> None:
        self.record(node, rule, "int64", "int32")

    def _keep(self, node: fx.Node) -> None:
        self.keep(node, *why_kept(node, self._bounds(node)[0], self.ranges, self.context))

    def _require_declared(self) -> None:
        """What the user declared holds for every input that the proofs may have used, narrowed or not."""
        self.context.premises.extend(p for p in self.ranges.premises if p not in self.context.premises)
        for node, requirement in self.ranges.requirements.items():
            if requirement.basis == "declared":
                self.context.requirements.setdefault(self.context.sources[node.name].name, requirement.bounds)


def _read_as_memory(graph: fx.Graph) -> set[fx.Node]:
    """What an ``as_strided`` looks through to the memory of an input: a cast would pack it."""
    found: set[fx.Node] = set()
    for op in integer_ops.READS_MEMORY:
        for node in graph.find_nodes(op="call_function", target=op, sort=False):
            view = node.args[0]
            chain: list[fx.Node] = []
            while isinstance(view, fx.Node) and _is_view(view):
                chain.append(view)
                view = view.args[0]
            if isinstance(view, fx.Node) and view.op in ("placeholder", "get_attr"):
                found.update(chain, (view,))
    return found


def _is_view(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target.is_view


def _numbers_are_int32(node: fx.Node) -> bool:
    return all(INT32[0] <= n <= INT32[1] for n in integer_ops.python_numbers(node).values())


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
