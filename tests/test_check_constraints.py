"""check-constraints: each documented constraint is predicted with the compiler's code at the user's line; what is rewritten keeps its bits."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import apply_pass, graph_of, run_passes
from tools import nasty_like, random_like

import nxfx
from nxfx.constraints import integers, operators, pooling, values
from nxfx.constraints.base import Constraint
from nxfx.graph.builder import NodeBuilder
from nxfx.passes.check_constraints import CheckConstraints
from nxfx.pipeline import PassResult, PipelineResult
from nxfx.report.findings import CODES
from nxfx.targets import Target
from nxfx.verification.equivalence import compare

aten = torch.ops.aten
I32, I64 = torch.int32, torch.int64


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


class Model(torch.nn.Module):
    """Its tensors arrive as ``a``, ``b``, ``c``; ``violate`` is the line that a finding names."""

    def forward(self, a: torch.Tensor, b: torch.Tensor | None = None, c: torch.Tensor | None = None) -> Any:
        return self.violate(a, b, c)

    def violate(self, a: Any, b: Any, c: Any) -> Any:
        raise NotImplementedError


def model(function: Callable[..., Any]) -> Model:
    """A model whose line is the function's own."""
    return type("Written", (Model,), {"violate": lambda self, a, b, c: function(*[t for t in (a, b, c) if t is not None])})()


def ints(*values: int, dtype: torch.dtype = I32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


@dataclass(frozen=True)
class Case:
    """One constraint: what violates it, the code and compiler error told, and what does not violate it.

    Attributes:
        fixed: the same computation as the fix has it; None: the same model, given ``ranges`` or another target.
        violating: the ranges that the violating model is given.
    """

    violates: Callable[..., Any]
    args: tuple[torch.Tensor, ...]
    code: str
    error: str
    severity: str = "error"
    target: Target = Target("trn2")
    fixed: Callable[..., Any] | None = None
    violating: dict[str, tuple[int, int]] | None = None
    ranges: dict[str, tuple[int, int]] | None = None
    fixed_target: Target | None = None


X, PAIR = torch.randn(4, 4), torch.randn(1, 2, 9, 9)
LONG = ints(5, 3, 9, 3, 2**30)
KERNEL = torch.randn(2, 2, 3)
CASES = {
    "triangular_solve": Case(
        lambda a, b: aten.triangular_solve(b, a)[0], (torch.eye(4), X), "NX501", "NCC_EVRF001", fixed=lambda a, b: torch.inverse(a) @ b
    ),
    "solve_triangular": Case(
        lambda a, b: torch.linalg.solve_triangular(a, b, upper=True), (torch.eye(4), X), "NX501", "NCC_EUOC002",
        fixed=lambda a, b: torch.inverse(a) @ b,
    ),
    "cholesky": Case(lambda a: torch.linalg.cholesky(a), (torch.eye(4),), "NX501", "NCC_EVRF001", "warning", fixed=lambda a: a.sqrt()),
    "complex": Case(
        lambda a, b: torch.view_as_real(torch.polar(a, b).sqrt()), (X.abs(), X), "NX502", "NCC_EVRF004", target=Target("trn2", "2.31"),
        fixed=lambda a, b: a.sqrt()[..., None] * torch.stack([(b / 2).cos(), (b / 2).sin()], -1),
    ),
    "complex-2.32": Case(
        lambda a, b: torch.view_as_real(torch.polar(a, b).sqrt()), (X.abs(), X), "NX502", "NCC_EVRF004", "warning", Target("trn2", "2.32"),
        fixed=lambda a, b: a.sqrt()[..., None] * torch.stack([(b / 2).cos(), (b / 2).sin()], -1),
    ),
    "fft": Case(lambda a: torch.fft.rfft(a).abs(), (X,), "NX502", "NCC_EVRF004", target=Target("inf2", "2.26"), fixed=lambda a: a.abs()),
    "e4m3fn": Case(
        lambda a: a.to(torch.float8_e4m3fn).float() * 2, (X,), "NX503", "NCC_EVRF051", fixed_target=Target("trn3")
    ),
    "e4m3fn-trn1": Case(
        lambda a: a.to(torch.float8_e4m3fn).float() * 2, (X,), "NX503", "NCC_ESPP047", target=Target("trn1"),
        fixed=lambda a: a.to(torch.bfloat16).float() * 2,
    ),
    "fnuz": Case(
        lambda a: a.to(torch.float8_e4m3fnuz).float() * 2, (X,), "NX503", "NCC_EVRF005", target=Target("trn3"),
        fixed=lambda a: a.to(torch.float8_e4m3fn).float() * 2,
    ),
    "e8m0": Case(
        lambda a: a.to(torch.float8_e8m0fnu).float() * 2, (X.abs() + 1,), "NX503", "NCC_ESPP004", fixed_target=Target("trn3")
    ),
    "transposed-convolution": Case(
        lambda a, b: F.conv_transpose1d(a, b, stride=2, dilation=2), (torch.randn(1, 2, 8), KERNEL), "NX504", "NCC_EVRF010",
        fixed=lambda a, b: F.conv_transpose1d(a, F.pad(b[..., None], (0, 1)).flatten(-2)[..., :-1], stride=2),
    ),
    "pool-with-indices": Case(
        lambda a: F.max_pool2d(a, 3, 1, 0, 2, return_indices=True), (PAIR,), "NX505", "NCC_EVRF018",
        fixed=lambda a: F.max_pool2d(a, 3, 1, 0, 1, return_indices=True),
    ),
    "topk": Case(lambda a: torch.topk(a, 3), (LONG,), "NX506", "NCC_EVRF013", target=Target("trn1"), ranges={"a": (0, 2**24)}),
    "topk-int64": Case(
        lambda a: torch.topk(a, 3)[0], (LONG.long(),), "NX506", "NCC_EVRF013", ranges={"a": (-(2**24), 2**24)}
    ),
    "sort": Case(lambda a: torch.sort(a)[0], (LONG,), "NX506", "NCC_EVRF013", target=Target("trn1"), fixed=lambda a: torch.sort(a.float())[0]),
    "argsort": Case(lambda a: a.argsort(), (LONG,), "NX506", "NCC_EVRF013", target=Target("inf2"), fixed=lambda a: (a % 1000).argsort()),
    "kthvalue": Case(lambda a: a.kthvalue(2), (LONG,), "NX506", "NCC_EVRF013", target=Target("trn1"), fixed=lambda a: a.clamp(0, 9).kthvalue(2)),
    "sort-of-floats": Case(
        lambda a: torch.sort(a)[0], (X,), "NX506", "NCC_EVRF029", "warning", fixed=lambda a: torch.topk(a, 4, largest=False)[0]
    ),
    "scatter-reduce": Case(
        lambda a, b: a.scatter_reduce(0, b, a, "amax"), (LONG, torch.tensor([0, 0, 1, 2, 2])), "NX507", "NCC_EVRF016", ranges={"a": (0, 2**24)}
    ),
    "scatter-reduce-sum": Case(
        lambda a, b: a.scatter_reduce(0, b, a, "sum"), (LONG, torch.tensor([0, 0, 1, 2, 2])), "NX507", "NCC_EVRF016",
        ranges={"a": (0, 2**24 // 6)},
    ),
    "index-reduce": Case(
        lambda a, b: a.index_reduce(0, b, a, "amin"), (LONG, torch.tensor([0, 0, 1, 2, 2])), "NX507", "NCC_EVRF016",
        fixed=lambda a, b: a.clamp(-9, 9).index_reduce(0, b, a.clamp(-9, 9), "amin"),
    ),
    "shift": Case(
        lambda a: a >> 40000, (ints(3, -5, dtype=torch.int16),), "NX508", "NCC_EVRF022", fixed=lambda a: a >> 4
    ),
    "shift-int64": Case(
        lambda a: a >> 40, (torch.tensor([2**20]),), "NX508", "NCC_EVRF022", "warning", violating={"a": (0, 2**50)}, ranges={"a": (0, 2**31 - 1)}
    ),
    "gather": Case(
        lambda a: a[torch.arange(9)], (X,), "NX509", "NCC_EVRF056", fixed=lambda a: a[torch.arange(4)]
    ),
    "embedding": Case(
        lambda a: F.embedding(torch.arange(2, 7), a), (X,), "NX509", "NCC_EVRF056", fixed=lambda a: F.embedding(torch.arange(1, 4), a)
    ),
    "index-select": Case(
        lambda a: a.index_select(1, torch.arange(3) + 2), (X,), "NX509", "NCC_EVRF056", fixed=lambda a: a.index_select(1, torch.arange(3) + 1)
    ),
    "constant": Case(
        lambda a: (a * 2654435761) % 1024, (torch.tensor([3]),), "NX510", "NCC_ESFH002", target=Target("trn1"),
        fixed_target=Target("trn2", "2.32"),
    ),
    "constant-2.31": Case(
        lambda a: (a + 2**40) // 3, (torch.tensor([3]),), "NX510", "NCC_ESFH002", target=Target("trn2", "2.31"),
        fixed=lambda a: (a % 1000 + 2**20) // 3,
    ),
    "constant-tensor": Case(
        lambda a: a + torch.tensor([2**40, 1]), (torch.tensor([3]),), "NX510", "NCC_ESFH002", target=Target("inf2"),
        fixed=lambda a: a % 100 + torch.tensor([2**20, 1]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_each_documented_constraint_is_predicted_at_its_line_and_gone_after_the_fix(case: Case) -> None:
    report = nxfx.check(model(case.violates), case.args, target=case.target, ranges=case.violating)
    told = [f for f in report.findings if f.code == case.code and case.error in f.message]
    assert len(told) == 1, [(f.code, f.message) for f in report.findings]
    (finding,) = told
    assert finding.severity.value == case.severity and finding.fix
    lines, first = inspect.getsourcelines(case.violates)
    assert finding.location.file == __file__ and first <= finding.location.line < first + len(lines)

    fixed = model(case.fixed or case.violates)
    args = tuple(t.clamp(max=2**24 // 6) if t.dtype in (I32, I64) else t for t in case.args) if case.ranges else case.args
    prepared = nxfx.prepare(fixed, args, target=case.fixed_target or case.target, ranges=case.ranges)
    assert not [f for f in prepared.report.findings if f.code == case.code and case.error in f.message]
    outcome = compare(fixed(*args), prepared(*args), kind="exact")
    assert outcome.ok, outcome.mismatches


def test_every_rule_has_a_case() -> None:
    constraints = [c for room in (values, operators, integers, pooling) for c in vars(room).values() if isinstance(c, Constraint)]
    errors = {e for c in constraints for e in c.error.replace("in older compilers ", "").split(", ")}
    assert errors - {"NCC_EMOD025", "NCC_EVRF031"} == {case.error for case in CASES.values()}
    assert {c.code for c in constraints} == {code for code in CODES if code.startswith("NX5")} - {"NX550"}


# --- what nxfx's own capture does not let through --------------------------------------------------------------------


def test_a_scatter_to_beyond_the_operand_is_told_in_a_graph_that_another_capture_made() -> None:
    def write(x: torch.Tensor, y: torch.Tensor) -> Any:
        return x.scatter_add(0, torch.arange(6)[:, None].expand(6, 4), y), x.index_add(0, torch.arange(2, 5), y[:3])

    (first, second) = run_passes(graph_of(write, (X, torch.ones(6, 4))), CheckConstraints()).findings
    assert first.code == second.code == "NX509" and "NCC_EVRF031" in first.message
    assert ["position 5 of an axis of 4" in first.message, "position 4 of an axis of 4" in second.message] == [True, True]


# --- dynamic sizes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("target", "severity"), [(Target("trn2"), "error"), (Target("trn1"), "warning"), (Target("trn2", "2.31"), "warning")])
def test_a_dynamic_size_is_refused_natively_and_traced_with_the_examples_sizes_on_the_legacy_route(target: Target, severity: str) -> None:
    rows = torch.export.Dim("rows", max=64)
    prepared = nxfx.prepare(torch.nn.Linear(4, 2), (X,), dynamic_shapes={"input": {0: rows}}, target=target)
    (finding,) = [f for f in prepared.report.findings if f.code == "NX511"]
    assert finding.severity.value == severity and "NCC_EMOD025" in finding.message and "`input`" in finding.message
    assert not [f for f in nxfx.check(torch.nn.Linear(4, 2), (X,), target=target).findings if f.code == "NX511"]


# --- rewrites keep their bits ----------------------------------------------------------------------------------------


TRN1 = Target("trn1")


def applied(function: Callable[..., Any], *args: torch.Tensor, target: Target = TRN1, **options: Any) -> PipelineResult:
    """check-constraints alone on the function's graph: invariants, idempotence and bits are checked."""

    class ForTarget(CheckConstraints):
        def run(self, graph_module: Any, context: Any) -> PassResult:
            context.target = target
            return super().run(graph_module, context)

    return apply_pass(ForTarget(), function, args, **options)[1]


TIES = ints(7, 7, 0, -3, 7, 0, 2**24, -(2**24), 2**24 - 1, 5)
ORDERS: dict[str, Callable[..., Any]] = {
    "topk": lambda x: torch.topk(x, 4),
    "topk-smallest": lambda x: torch.topk(x, 3, largest=False),
    "topk-unsorted": lambda x: torch.topk(x, 9, sorted=False)[0].sum(),
    "sort": lambda x: torch.sort(x, descending=True),
    "sort-stable": lambda x: torch.sort(x, stable=True),
    "argsort": lambda x: torch.argsort(x, stable=True),
    "kthvalue": lambda x: torch.kthvalue(x, 5),
    "rows": lambda x: torch.topk(x.view(2, 5), 2, dim=0),
    "indices-only": lambda x: torch.topk(x, 3).indices,
}


@pytest.mark.parametrize("dtype", [I32, I64], ids=str)
def test_order_of_integers_within_2_24_is_that_of_fp32_ties_included(dtype: torch.dtype) -> None:
    bounds = (-(2**24), 2**24)
    more = [(make(TIES.to(dtype), seed, bounds),) for seed in range(4) for make in (nasty_like, random_like)]
    more += [(torch.randint(0, 3, (10,), dtype=dtype),) for _ in range(4)]
    every = list(ORDERS.values())
    result = applied(lambda x: [order(x) for order in every], TIES.to(dtype), more_inputs=more, ranges={"args_0": bounds})
    assert sum(r.count for r in result.rewrites) == len(ORDERS) and {r.rule for r in result.rewrites} == {"constraints.topk-fp32"}
    assert not result.findings


def test_one_beyond_2_24_is_not_ordered_in_fp32() -> None:
    result = applied(lambda x: torch.topk(x, 2), TIES, ranges={"args_0": (0, 2**24 + 1)})
    assert not result.changed and [f.code for f in result.findings] == ["NX506"]


def test_what_is_sorted_twice_is_rewritten_twice() -> None:
    result = applied(lambda x: torch.sort(torch.topk(x, 4).values), TIES, ranges={"args_0": (0, 99)})
    assert [r.rule for r in result.rewrites] == ["constraints.topk-fp32"] * 2 and not result.findings


WHERE = torch.tensor([0, 2, 2, 1, 0, 2, 2, 2, 9, 9])


@pytest.mark.parametrize(("reduce", "most", "include_self"), [("amax", 2**24, True), ("amin", 2**24, False), ("sum", 2**24 // 11, True)])
def test_a_scatter_that_reduces_small_integers_runs_in_fp32(reduce: str, most: int, include_self: bool) -> None:
    bounds = {"args_0": (-most, most), "args_1": (-most, most)}
    more = [(nasty_like(TIES, s, (-most, most)), nasty_like(TIES, s + 9, (-most, most))) for s in range(6)]
    result = applied(
        lambda x, y: x.scatter_reduce(0, WHERE, y, reduce, include_self=include_self), TIES.clamp(-most, most), TIES.clamp(-most, most),
        more_inputs=[*more, (torch.full((10,), most, dtype=I32), torch.full((10,), most, dtype=I32))], ranges=bounds,
    )  # fmt: skip
    assert [r.rule for r in result.rewrites] == ["constraints.scatter-reduce-fp32"]
    assert not [f for f in result.findings if f.code == "NX507"]


@pytest.mark.parametrize(("reduce", "most"), [("sum", 2**24 // 11 + 1), ("mean", 3), ("prod", 3), ("amax", 2**24 + 1)])
def test_a_scatter_whose_partial_results_may_pass_2_24_is_left_and_reported(reduce: str, most: int) -> None:
    result = applied(lambda x: x.scatter_reduce(0, WHERE, x, reduce), TIES.clamp(0, most), ranges={"args_0": (0, most)})
    assert not result.changed and [f.code for f in result.findings] == ["NX507"]


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16], ids=str)
def test_a_short_shift_in_32_bits_is_the_same_for_every_amount(dtype: torch.dtype) -> None:
    x = torch.arange(-128, 128).to(dtype)
    amounts = [(x, torch.full((256,), n, dtype=dtype)) for n in (-128, -1, 0, 1, 7, 8, 15, 16, 31, 32, 127)]
    low_high = [(nasty_like(x, s), random_like(x, s)) for s in range(3)]
    result = applied(lambda a, b: (a >> b, torch.bitwise_right_shift(a, b)), x, x, more_inputs=[*amounts, *low_high])
    assert [r.rule for r in result.rewrites] == ["constraints.shift-int32"] * 2
    by_number = applied(lambda a: [a >> n for n in (-1, 0, 3, 20, 127)], x, more_inputs=[(nasty_like(x, 1),)])
    assert sum(r.count for r in by_number.rewrites) == 5


def test_shifts_of_32_bits_bytes_and_to_the_left_are_fine() -> None:
    result = applied(lambda a, b, c: (a >> 3, b >> 1, c << 2), ints(-5), torch.tensor([200], dtype=torch.uint8), ints(3, dtype=torch.int16))
    assert not result.changed and not result.findings


POOLS: list[tuple[Callable[[torch.Tensor], Any], tuple[int, ...]]] = [
    (lambda x: F.max_pool2d(x, 3, 1, 0, 2), (2, 3, 9, 8)),
    (lambda x: F.max_pool2d(x, (3, 2), (2, 1), (1, 0), (2, 3)), (1, 2, 9, 9)),
    (lambda x: F.max_pool2d(x, 2, 3, 1, 2, ceil_mode=True), (1, 2, 9, 10)),
    (lambda x: F.max_pool2d(x, 2, dilation=2), (1, 1, 8, 8)),  # the stride is the kernel's size
    (lambda x: F.max_pool2d(x, (1, 3), 1, 0, (1, 2)), (1, 1, 4, 9)),
    (lambda x: F.max_pool2d(x, 2, 1, 0, 3), (2, 7, 7)),
    (lambda x: F.max_pool1d(x, 4, 2, 1, 3), (2, 2, 20)),
    (lambda x: F.max_pool3d(x, 2, 1, 1, (2, 1, 2)), (1, 1, 5, 5, 5)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dilated_max_pooling_is_a_maximum_of_slices(dtype: torch.dtype) -> None:
    every = [pool for pool, _ in POOLS]
    xs = [torch.randn(shape).to(dtype) for _, shape in POOLS]
    zeros = [torch.where(torch.rand(shape) < 0.5, 0.0, -0.0).to(dtype) for _, shape in POOLS]
    least = [torch.full(shape, -torch.inf, dtype=dtype) for _, shape in POOLS]
    more = [zeros, least, *[[nasty_like(x, seed) for x in xs] for seed in range(3)]]
    result = applied(lambda *given: [pool(x) for pool, x in zip(every, given, strict=True)], *xs, more_inputs=more)
    assert [r.rule for r in result.rewrites] == ["constraints.dilated-max-pool"] * len(POOLS) and not result.findings


def test_pooling_of_integers_and_undilated_pooling_are_left() -> None:
    assert not applied(lambda x: F.max_pool2d(x, 3, 1, 1), PAIR).changed
    assert [f.code for f in applied(lambda x: F.max_pool2d(x, 65, 1, 0, 2), torch.randn(1, 1, 130, 130)).findings] == ["NX505"]


def views(x: torch.Tensor) -> Any:
    whole = x.split(3, 1), x.split([1, 4, 3], -1), [part * 2 for part in x.chunk(3, -1)], x.unbind(-2)
    return *whole, x.split(2, -1)[-1] + x.chunk(4, 1)[1], [half.unbind(0) for half in x.split(2, 0)], x.t().split(3, 0)[1]


def test_several_views_become_slices_on_the_legacy_route_only() -> None:
    x = torch.randn(4, 8)
    captured = applied(views, x, more_inputs=[(nasty_like(x, 3),)])
    assert {(r.rule, r.after) for r in captured.rewrites} == {("constraints.split-views", "slice"), ("constraints.split-views", "select")}
    assert sum(r.count for r in captured.rewrites) == 10 and not captured.findings
    assert not applied(views, x, target=Target("trn2")).changed


# --- what is no violation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [Target("trn1", "2.26"), Target("trn2", "2.31"), Target("trn3")], ids=str)
def test_what_the_compiler_takes_is_not_reported(target: Target) -> None:
    def ordinary(x: torch.Tensor, i: torch.Tensor) -> Any:
        return (
            torch.topk(x, 2), x.scatter_add(0, i[:, None].expand(4, 4), x), x.scatter_reduce(0, i[:, None].expand(4, 4), x, "amax"),
            x.index_select(0, i), x[torch.arange(-4, 4)], F.embedding(i, x), F.max_pool2d(x[None], 2), x.argmax(-1) + i, i.int() >> 1,
            F.conv_transpose1d(x[None], x[:, :, None], stride=2), F.conv1d(x[None], x[:, :, None], stride=2, dilation=3),
            x.to(torch.float8_e5m2).float(), i * 2**20, x[i.clamp(0, 3)],
        )  # fmt: skip

    result = applied(ordinary, X, torch.tensor([0, 3, 1, 1]), target=target, ranges={"args_1": (0, 3)})
    assert not result.changed
    assert [f.message for f in result.findings] == []


def test_complex_values_are_told_once_where_they_come_in() -> None:
    def chain(a: torch.Tensor) -> torch.Tensor:
        z = torch.view_as_complex(a)
        return torch.view_as_real((z * z + z).conj() * 2)

    result = applied(chain, torch.randn(3, 2), target=Target("trn2", "2.30"))
    assert [f.code for f in result.findings] == ["NX502"] and "view_as_complex" in result.findings[0].message


def test_inputs_and_buffers_of_a_refused_dtype_are_told_by_name() -> None:
    class Buffer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.ones(3).to(torch.float8_e4m3fn))

        def forward(self, z: torch.Tensor) -> Any:
            return z.real * self.scale.float()

    report = nxfx.check(Buffer(), (torch.zeros(3, dtype=torch.complex64),), target="trn1", sdk="2.30")
    assert {("`scale`" in f.message, "`z`" in f.message) for f in report.errors} == {(True, False), (False, True)}


def test_bodies_of_higher_order_ops_are_looked_at() -> None:
    def choose(x: torch.Tensor) -> Any:
        return torch.cond(x.sum() > 0, lambda v: torch.linalg.det(v) * v, lambda v: v * 1.0, (x,))

    assert [f.code for f in applied(choose, torch.eye(3)).findings] == ["NX501"]


def test_the_gradient_of_a_strided_and_dilated_convolution_is_refused() -> None:
    graph = torch.fx.Graph()
    with torch._subclasses.FakeTensorMode():
        value = torch.empty(1, 2, 9), torch.empty(2, 2, 3), torch.empty(1, 2, 3)
    x, w, g = (graph.placeholder(n) for n in "xwg")
    for node, fake in zip((x, w, g), value, strict=True):
        node.meta["val"] = fake
    build = NodeBuilder(graph, "test")
    graph.output(())
    (end,) = graph.find_nodes(op="output")
    with build.before(end):
        for mask in ([True, True, False], [False, True, False]):
            build.call(aten.convolution_backward.default, g, x, w, None, [2], [0], [2], False, [0], 1, mask)
    found = CheckConstraints().run(torch.fx.GraphModule(torch.nn.Module(), graph), nxfx.PassContext()).findings
    assert [f.code for f in found] == ["NX504"]


def test_ranges_are_not_computed_where_no_rule_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> Any:
        raise AssertionError("the ranges are expensive")

    monkeypatch.setattr("nxfx.constraints.base.analyse", refuse)
    captured = graph_of(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.GELU()), (X,))
    assert not run_passes(captured, CheckConstraints()).findings


def test_a_proof_that_rests_on_a_buffer_is_a_premise() -> None:
    class Table(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", ints(3, 900, 4, 2**20))

        def forward(self, x: torch.Tensor) -> Any:
            return torch.topk(self.table, 2).values + x

    prepared = nxfx.prepare(Table(), (ints(1, 2),), target="trn1")
    assert not prepared.report.errors
    assert ("table", "range") in {(p.source, p.fact) for p in prepared.report.premises}
