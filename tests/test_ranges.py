"""Interval analysis: bounds by op, where they come from, and that no value ever leaves them."""

from __future__ import annotations

import copy
from typing import Any

import integer_programs
import pytest
import torch
import torch.nn.functional as F
from harness import Captured, graph_of
from torch import fx
from tracing import trace

from nxfx.analysis.intervals import INT32, INT64
from nxfx.analysis.provenance import Role, Source
from nxfx.analysis.ranges import Ranges, analyse

aten = torch.ops.aten


def ids(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int64)


def analysed(model: Any, args: tuple[Any, ...], **options: Any) -> tuple[Captured, Ranges]:
    """A traced function and its ranges; through ``torch.export`` where options other than ``ranges`` ask for it."""
    captured = trace(model, args, **options) if set(options) <= {"ranges"} else graph_of(model, args, **options)
    return captured, analyse(captured.gm, captured.context.sources)


def result(captured: Captured, index: int = 0) -> fx.Node:
    (output,) = captured.gm.graph.find_nodes(op="output")
    node = output.args[0][index]
    assert isinstance(node, fx.Node)
    return node


HUNDRED = {"args_0": (0, 99)}
MIXED = {"args_0": (-5, 99)}

# name: function of one int64 tensor [2, 8], declared range, expected bounds
BY_OP: dict[str, tuple[Any, dict[str, tuple[int, int]], tuple[int, int]]] = {
    "arange": (lambda x: torch.arange(3, 20, 4), HUNDRED, (3, 19)),
    "arange downwards": (lambda x: torch.arange(5, -5, -2), HUNDRED, (-3, 5)),
    "arange of whole floats": (lambda x: torch.arange(5.0, -5.0, -1.0, dtype=torch.int64), HUNDRED, (-4, 5)),
    "arange of nothing": (lambda x: torch.arange(0), HUNDRED, (0, 0)),
    "full": (lambda x: torch.full((2,), 2**40), HUNDRED, (2**40, 2**40)),
    "ones_like": (lambda x: torch.ones_like(x), HUNDRED, (1, 1)),
    "add": (lambda x: x + x, MIXED, (-10, 198)),
    "add alpha": (lambda x: torch.add(x, x, alpha=-2), MIXED, (-203, 109)),
    "sub": (lambda x: x - 7, MIXED, (-12, 92)),
    "rsub": (lambda x: 7 - x, MIXED, (-92, 12)),
    "mul": (lambda x: x * (x + 1), MIXED, (-500, 9900)),
    "square of itself": (lambda x: x * x, MIXED, (0, 9801)),
    "mul beyond int64 wraps": (lambda x: x * 2**60, HUNDRED, INT64),
    "neg": (lambda x: -x, MIXED, (-99, 5)),
    "abs": (lambda x: x.abs(), MIXED, (0, 99)),
    "abs of int64 min": (lambda x: x.abs(), {"args_0": INT64}, INT64),
    "floor_divide": (lambda x: x // 4, MIXED, (-2, 24)),
    "floor_divide by -1": (lambda x: x // -1, MIXED, (-99, 5)),
    "trunc divide": (lambda x: torch.div(x, 4, rounding_mode="trunc"), MIXED, (-1, 24)),
    "remainder": (lambda x: x % 10, MIXED, (0, 9)),
    "remainder of something smaller": (lambda x: x % 1000, HUNDRED, (0, 99)),
    "remainder by a negative": (lambda x: x % -10, MIXED, (-9, 0)),
    "fmod": (lambda x: torch.fmod(x, 10), MIXED, (-5, 9)),
    "pow": (lambda x: x**3, MIXED, (-125, 970299)),
    "even pow": (lambda x: x**2, MIXED, (0, 9801)),
    "pow too far": (lambda x: x**60, HUNDRED, INT64),
    "clamp": (lambda x: x.clamp(0, 7), MIXED, (0, 7)),
    "clamp with a sentinel": (lambda x: x.clamp(min=-(2**63)), MIXED, (-5, 99)),
    "maximum": (lambda x: torch.maximum(x, x + 5), MIXED, (0, 104)),
    "minimum": (lambda x: torch.minimum(x, torch.tensor(3)), MIXED, (-5, 3)),
    "and with a mask": (lambda x: x & 12, {"args_0": INT64}, (0, 12)),
    "or": (lambda x: x | 4, HUNDRED, (0, 127)),
    "or of negatives": (lambda x: x | 4, MIXED, (-128, 127)),
    "xor": (lambda x: x ^ (x + 1), HUNDRED, (0, 127)),
    "not": (lambda x: ~x, MIXED, (-100, 4)),
    "left shift": (lambda x: x << 3, MIXED, (-40, 792)),
    "left shift out of the word": (lambda x: x << 62, HUNDRED, INT64),
    "right shift": (lambda x: x >> 2, MIXED, (-2, 24)),
    "comparison": (lambda x: (x < 3).to(torch.int64), MIXED, (0, 1)),
    "where": (lambda x: torch.where(x > 3, x, -1), HUNDRED, (-1, 99)),
    "cat": (lambda x: torch.cat([x, x + 1000]), HUNDRED, (0, 1099)),
    "stack": (lambda x: torch.stack([x, -x]), HUNDRED, (-99, 99)),
    "masked_fill": (lambda x: x.masked_fill(x > 3, -100), HUNDRED, (-100, 99)),
    "slice": (lambda x: x[:, 1:-1], MIXED, (-5, 99)),
    "pad": (lambda x: F.pad(x, (1, 1), value=-7), HUNDRED, (-7, 99)),
    "tril keeps zero": (lambda x: (x + 5).tril(), HUNDRED, (0, 104)),
    "gather": (lambda x: torch.full((2, 8), 5).gather(1, x % 8), HUNDRED, (5, 5)),
    "scatter": (lambda x: x.scatter(1, x % 8, -3), HUNDRED, (-3, 99)),
    "scatter_add counts": (lambda x: torch.zeros(2, 8, dtype=torch.int64).scatter_add(1, x % 8, torch.ones_like(x)), HUNDRED, (0, 16)),
    "index_put adds": (lambda x: aten.index_put(torch.zeros_like(x), [x[:, 0] % 2], x[0], True), HUNDRED, (0, 1584)),
    "sum": (lambda x: x.sum(), MIXED, (-80, 1584)),
    "sum over one dim": (lambda x: x.sum(-1), MIXED, (-40, 792)),
    "sum of bools": (lambda x: (x > 3).sum(-1), MIXED, (0, 8)),
    "sum over nothing": (lambda x: x[:, :0].sum(-1), {"args_0": (5, 9)}, (0, 0)),
    "prod": (lambda x: (x % 3).prod(-1), HUNDRED, (0, 256)),
    "cumsum": (lambda x: x.cumsum(-1), MIXED, (-40, 792)),
    "cumsum of bools less one": (lambda x: (x > 3).cumsum(-1) - 1, MIXED, (-1, 7)),
    "cumprod": (lambda x: (x % 3).cumprod(-1), HUNDRED, (0, 256)),
    "argmax": (lambda x: x.argmax(-1), MIXED, (0, 7)),
    "argmax of all": (lambda x: x.argmax(), MIXED, (0, 15)),
    "max index": (lambda x: x.max(-1).indices, MIXED, (0, 7)),
    "max value": (lambda x: x.max(-1).values, MIXED, (-5, 99)),
    "topk index": (lambda x: x.topk(3).indices, MIXED, (0, 7)),
    "sort index": (lambda x: x.sort(0).indices, MIXED, (0, 1)),
    "argsort": (lambda x: torch.argsort(x, stable=True), MIXED, (0, 7)),
    "count_nonzero": (lambda x: x.count_nonzero(), MIXED, (0, 16)),
    "one_hot": (lambda x: F.one_hot(x % 5, 5), HUNDRED, (0, 1)),
    "bucketize": (lambda x: torch.bucketize(x, torch.arange(6)), MIXED, (0, 6)),
    "searchsorted": (lambda x: torch.searchsorted(torch.arange(6), x), MIXED, (0, 6)),
    "diff": (lambda x: torch.diff(x), MIXED, (-104, 104)),
    "meshgrid": (lambda x: torch.meshgrid(torch.arange(3), torch.arange(9), indexing="ij")[1], HUNDRED, (0, 8)),
    "einsum": (lambda x: torch.einsum("bi,bj->ij", x, x), HUNDRED, (0, 2 * 99 * 99)),
    "matmul": (lambda x: x @ x.mT, HUNDRED, (0, 8 * 99 * 99)),
    "cast to uint8 wraps": (lambda x: x.to(torch.uint8).long(), {"args_0": (0, 300)}, (0, 255)),
    "cast to int32 wraps": (lambda x: x.to(torch.int32).long(), {"args_0": (0, 2**31)}, INT32),
    "cast of a bounded float": (lambda x: (x.float() * 0.5).long(), MIXED, (-2, 49)),
    "cast of a clamped float": (lambda x: (x / 3.0).clamp(0, 8).long(), MIXED, (0, 8)),
    "cast of an unknown float": (lambda x: torch.randn(4).long(), MIXED, INT64),
    "cast of a quotient by zero": (lambda x: (x / x).long(), HUNDRED, INT64),
}


@pytest.mark.parametrize("name", BY_OP)
def test_bounds_by_op(name: str) -> None:
    function, declared, expected = BY_OP[name]
    captured, ranges = analysed(lambda x: (function(x),), (ids(2, 8) + 4,), ranges=declared)
    low, high = ranges.of(result(captured)) or INT64
    # Rounding widens what comes from floats by at most one.
    slack = 1 if "float" in name else 0
    assert expected[0] - slack <= low <= expected[0]
    assert expected[1] <= high <= expected[1] + slack
    assert not ranges.assumed(result(captured))


@pytest.mark.parametrize("core_aten", [False, True], ids=["training-ir", "core-aten"])
def test_bounds_do_not_depend_on_the_form(core_aten: bool) -> None:
    def positions(mask: torch.Tensor) -> tuple[torch.Tensor]:
        return ((mask.cumsum(-1) - 1).masked_fill(mask == 0, 1),)

    captured, ranges = analysed(positions, (ids(2, 8),), ranges={"mask": (0, 1), "args_0": (0, 1)}, core_aten=core_aten)
    assert ranges.of(result(captured)) == (-1, 7)


# --- where bounds come from ------------------------------------------------------------------------------------------


def test_an_undeclared_input_is_assumed_to_fit_and_its_derivatives_say_so() -> None:
    captured, ranges = analysed(lambda x: (x // 2, x % 7, x > 0, torch.arange(4)), (ids(4),))
    half, small, sign, positions = (result(captured, i) for i in range(4))
    assert ranges.of(half) == (-(2**30), 2**30 - 1)
    assert ranges.proved(half) == (-(2**62), 2**62 - 1)
    assert ranges.assumed(half)
    assert ranges.culprit(half) is captured.gm.graph.find_nodes(op="placeholder")[0]
    assert not any(map(ranges.assumed, (small, sign, positions)))  # hold for every input
    (requirement,) = ranges.requirements.values()
    assert (requirement.bounds, requirement.basis) == (INT32, "assumed")


def test_what_comes_back_from_a_float_is_assumed_too() -> None:
    captured, ranges = analysed(lambda x: ((x.float() * 0.25).long(),), (ids(4),))
    assert ranges.assumed(result(captured))
    assert ranges.proved(result(captured)) != ranges.of(result(captured))


TABLE = torch.randn(100, 4)
IMPLIED = {
    "embedding": (lambda x: F.embedding(x, TABLE), (0, 99)),
    "embedding through views": (lambda x: F.embedding(x.view(-1, 2).unsqueeze(0).clone(), TABLE), (0, 99)),
    "index": (lambda x: TABLE[x], (-100, 99)),
    "index_select": (lambda x: TABLE.index_select(0, x.flatten()), (0, 99)),
    "gather": (lambda x: TABLE.gather(0, x), (0, 99)),
    "the tightest of two": (lambda x: (TABLE[x], F.embedding(x, TABLE[:50])), (0, 49)),
    "every column": (lambda x: [TABLE[x[:, i].unsqueeze(0)] for i in range(3)] + [F.embedding(x[..., -1], TABLE)], (-100, 99)),
    "every column, unbound": (lambda x: [F.embedding(c, TABLE[: 9 + i]) for i, c in enumerate(x.unbind(1))], (0, 11)),
    "the tightest use of each column": (
        lambda x: [F.embedding(c, t) for c in x.unbind() for t in (TABLE, TABLE[:7])],
        (0, 6),
    ),
    "columns of rows": (lambda x: [F.embedding(row[j], TABLE) for row in x for j in range(4)], (0, 99)),
    "a column is missing": (lambda x: [F.embedding(x[:, i], TABLE) for i in range(3)], None),
    "columns of two dims": (lambda x: [F.embedding(x[0], TABLE), F.embedding(x[1], TABLE), F.embedding(x[:, 2], TABLE)], None),
    "a part only": (lambda x: F.embedding(x[:, :2], TABLE), None),
    "a sum": (lambda x: F.embedding(x + 1, TABLE), None),
    "a wrapping cast": (lambda x: F.embedding(x.to(torch.int32), TABLE), None),
    "an empty result": (lambda x: F.embedding(x, torch.randn(100, 0)), None),
    "a mask": (lambda x: TABLE[(x > 0)[:, 0].repeat(25)], None),
}


@pytest.mark.parametrize("name", IMPLIED)
def test_an_index_implies_the_range_of_the_very_input(name: str) -> None:
    function, expected = IMPLIED[name]
    captured, ranges = analysed(lambda x: tuple(torch.utils._pytree.tree_leaves(function(x))), (ids(4, 4),)) if name != "a mask" else (None, None)
    if ranges is None:
        return
    (requirement,) = ranges.requirements.values()
    assert requirement.basis == ("implied" if expected else "assumed")
    assert requirement.bounds == (expected or INT32)


def test_a_use_inside_a_branch_implies_nothing() -> None:
    def model(x: torch.Tensor, flag: torch.Tensor) -> torch.Tensor:
        return torch.cond(flag.sum() > 0, lambda i: F.embedding(i, torch.ones(9, 2)), lambda i: torch.ones(4, 2), (x,))

    captured = graph_of(model, (ids(4), ids(2)))
    ranges = analyse(captured.gm, captured.context.sources)
    assert {r.basis for r in ranges.requirements.values()} == {"assumed"}


class WithBuffer(torch.nn.Module):
    def __init__(self, value: torch.Tensor, writes: bool = False) -> None:
        super().__init__()
        self.register_buffer("table", value)
        self.writes = writes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.writes:
            self.table.add_(1)
        return self.table + x


def test_a_never_written_buffer_has_the_range_of_its_values_and_that_is_a_premise() -> None:
    captured = graph_of(WithBuffer(torch.tensor([3, 41, 7])), (ids(3),), ranges={"x": (0, 1)})
    ranges = analyse(captured.gm, captured.context.sources)
    assert ranges.of(result(captured)) == (3, 42)
    assert [(p.source, p.fact, p.detail) for p in ranges.premises] == [("table", "range", (3, 41))]


@pytest.mark.parametrize("case", ["written", "fake", "unknown"])
def test_a_buffer_that_may_change_proves_nothing(case: str) -> None:
    captured = graph_of(WithBuffer(torch.tensor([3, 41, 7]), writes=case == "written"), (ids(3),), ranges={"x": (0, 1)})
    name = captured.gm.graph.find_nodes(op="placeholder")[0].name
    source = captured.context.sources[name]
    if case == "fake":
        source = Source("table", Role.BUFFER, captured.gm.graph.find_nodes(op="placeholder")[0].meta["val"])
    elif case == "unknown":
        source = Source("table", Role.BUFFER, None)
    ranges = analyse(captured.gm, {**captured.context.sources, name: source})
    assert not ranges.premises
    assert ranges.proved(captured.gm.graph.find_nodes(op="placeholder")[0]) == INT64


def test_a_lifted_constant_needs_no_premise() -> None:
    captured, ranges = analysed(lambda x: (x + torch.tensor([5, 6]),), (ids(2),), ranges=HUNDRED)
    assert ranges.of(result(captured)) == (5, 105)
    assert not ranges.premises


def test_dynamic_dimensions_bound_what_counts_along_them() -> None:
    seq = torch.export.Dim("seq", min=2, max=512)
    captured, ranges = analysed(
        lambda x: (x.argmax(-1), torch.arange(x.shape[1]), (x > 0).sum(-1)), (torch.randn(2, 8),), dynamic_shapes=(({1: seq},),)
    )
    assert [ranges.of(result(captured, i)) for i in range(3)] == [(0, 511), (0, 511), (0, 512)]
    assert not ranges.dims


def test_a_dynamic_dimension_without_a_maximum_is_assumed_to_fit() -> None:
    captured, ranges = analysed(
        lambda x: (torch.arange(x.shape[1]),), (torch.randn(2, 8),), dynamic_shapes=(({1: torch.export.Dim("seq")},),)
    )
    assert ranges.of(result(captured)) == (0, 2**31 - 2)
    assert ranges.assumed(result(captured))
    assert len(ranges.dims) == 1


def test_the_operands_of_a_body_are_known_by_their_dtype() -> None:
    graph = fx.Graph()
    operand = graph.placeholder("operand")
    operand.meta["val"] = ids(3)
    graph.output(operand)
    assert analyse(fx.GraphModule(torch.nn.Module(), graph), {}).of(operand) == INT64


def test_an_unknown_op_is_as_wide_as_its_dtype() -> None:
    captured, ranges = analysed(lambda x: (torch.gcd(x, x),), (ids(3),), ranges=HUNDRED)
    assert ranges.of(result(captured)) == INT64


# --- guarded branches ------------------------------------------------------------------------------------------------


def buckets(x: torch.Tensor) -> torch.Tensor:
    x = x.abs()
    large = 8 + (torch.log(x.float() / 8) / 2.77 * 8).to(torch.int64)
    return torch.where(x < 8, x, torch.minimum(large, torch.full_like(large, 15)))


def test_a_branch_is_bounded_where_its_condition_selects_it() -> None:
    captured, ranges = analysed(lambda x: (buckets(x),), (ids(4),), ranges={"args_0": (-100, 100)})
    low, high = ranges.of(result(captured)) or INT64
    assert (low, high) == (0, 15)
    assert ranges.guarded  # log(0) never counts


def test_a_guarded_value_that_something_else_reads_is_not_bounded() -> None:
    def model(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        large = (torch.log(x.float() / 8) * 8).to(torch.int64)
        return torch.where(x < 8, x, large), large + 1

    captured, ranges = analysed(model, (ids(4),), ranges={"args_0": (0, 100)})
    low, high = ranges.of(result(captured, 0)) or INT64
    assert low == 0
    assert high <= 100
    assert ranges.of(result(captured, 1)) == INT64
    assert not ranges.guarded


def test_both_branches_reading_one_value_get_both_bounds() -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        twice = x * 2
        return torch.where(x < 1, twice, twice)

    captured, ranges = analysed(lambda x: (model(x),), (ids(4),))
    assert ranges.of(result(captured)) == (-(2**32), 2**32 - 2)


def test_a_condition_on_a_cast_bounds_what_was_cast() -> None:
    def model(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        as_int32 = x.to(torch.int32)
        return torch.where(as_int32 < 8, x * 2**30, 0), torch.where(as_int32 < 8, 0, x * 2**30)

    captured, ranges = analysed(model, (ids(4),), ranges={"args_0": (0, 99)})
    assert ranges.of(result(captured, 0)) == (0, 7 * 2**30)
    assert ranges.of(result(captured, 1)) == (0, 99 * 2**30)


def test_a_condition_on_a_cast_that_wraps_bounds_nothing_but_the_cast() -> None:
    captured, ranges = analysed(
        lambda x: (torch.where(x.to(torch.int32) < 8, x, 0),), (ids(4),), ranges={"args_0": (0, 2**40)}
    )
    assert ranges.of(result(captured)) == (0, 2**40)


# --- soundness -------------------------------------------------------------------------------------------------------


class Recorder(fx.Interpreter):
    """Runs a graph and keeps every value."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.seen: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.seen[n] = super().run_node(n)
        return self.seen[n]


def leaving(ranges: Ranges, seen: dict[fx.Node, Any], *, proved: bool) -> list[str]:
    """Every integer value outside its bounds."""
    found = []
    for node, value in seen.items():
        if node.op == "output" or node in ranges.guarded:
            continue
        values = value if isinstance(value, (list, tuple)) else [value]
        for bounds, tensor in zip(ranges.outputs(node, proved=proved), values, strict=False):
            if bounds and isinstance(tensor, torch.Tensor) and tensor.numel():
                low, high = int(tensor.min()), int(tensor.max())
                if low < bounds[0] or high > bounds[1]:
                    found.append(f"{node.format_node()}: [{low}, {high}] is not in {bounds}")
    return found


@pytest.mark.parametrize("proved", [False, True], ids=["assumed", "proved"])
def test_no_value_of_a_random_program_leaves_its_bounds(proved: bool) -> None:
    for seed in range(250):
        program = integer_programs.Program(seed)
        ranges = analyse(program.gm, program.sources)
        limits = {} if proved else {n.name: r.bounds for n, r in ranges.requirements.items()}
        if proved:
            limits = {n.name: r.bounds for n, r in ranges.requirements.items() if r.basis != "assumed"}
        for draw in range(2):
            recorder = Recorder(program.gm)
            try:
                recorder.run(*copy.deepcopy(program.inputs(draw, limits)))
            except (RuntimeError, IndexError):
                continue  # the program refuses these values
            assert not leaving(ranges, recorder.seen, proved=proved), f"seed {seed}\n{program.gm.code}"


def test_the_analysis_is_linear() -> None:
    def visits(count: int) -> int:
        calls = 0

        def chain(x: torch.Tensor) -> torch.Tensor:
            for _ in range(count):
                x = (x + 1) % 1000
            return x

        captured = trace(lambda x: (chain(x),), (ids(4),))
        original = Ranges.read

        def counted(self: Ranges, value: Any) -> Any:
            nonlocal calls
            calls += 1
            return original(self, value)

        Ranges.read = counted  # type: ignore[method-assign]
        try:
            analyse(captured.gm, captured.context.sources)
        finally:
            Ranges.read = original  # type: ignore[method-assign]
        return calls

    assert visits(80) <= 4.2 * visits(20)
