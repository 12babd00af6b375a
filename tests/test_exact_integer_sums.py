"""exact-integer-sums: what stays within 2^24 is computed in fp32 with equal bits, what may not is reported with its code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import apply_pass, graph_of, run_passes
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

import nxfx
from nxfx.passes.exact_integer_sums import ExactIntegerSums
from nxfx.pipeline import PassContext, PipelineResult
from nxfx.verification.equivalence import compare

aten = torch.ops.aten
Ranges = dict[str, tuple[int, int]]


def full(value: int, *shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.full(shape, value, dtype=dtype)


def rules(result: PipelineResult) -> list[str]:
    return [r.rule for r in result.rewrites]


def messages(result: PipelineResult) -> list[str]:
    return [f.message for f in result.findings if f.code == "NX305"]


INDEX = torch.tensor([0, 1, 1, 0, 1, 1, 1, 1])
SUMS: dict[str, Any] = {
    "mm": lambda a, b: aten.mm(a, b),
    "matmul": lambda a, b: a @ b,
    "bmm": lambda a, b: aten.bmm(a[None], b[None]),
    "mv": lambda a, b: aten.mv(a, b[0]),
    "dot": lambda a, b: aten.dot(a[0], b[0]),
    "einsum": lambda a, b: torch.einsum("ij,kj->ik", a, b),
    "scatter_add": lambda a, b: a.scatter_add(0, INDEX[:, None].expand(8, 8), b),
    "index_add": lambda a, b: a.index_add(0, INDEX, b),
    "index_put": lambda a, b: aten.index_put(a, [INDEX], b, True),
}


@pytest.mark.parametrize("name", SUMS)
def test_a_sum_within_2_24_runs_in_fp32_and_keeps_its_bits(name: str) -> None:
    corners = [(full(v, 8, 8), full(w, 8, 8)) for v in (-1400, 0, 1400) for w in (-1400, 1, 1400)]
    mixed = [(torch.randint(-1400, 1401, (8, 8)).int(), torch.randint(-1400, 1401, (8, 8)).int())]
    captured, result = apply_pass(
        ExactIntegerSums(), lambda a, b: (SUMS[name](a, b),), corners[0], more_inputs=corners + mixed,
        ranges={"args_0": (-1400, 1400), "args_1": (-1400, 1400)},
    )  # fmt: skip
    assert len(rules(result)) == 1 and not messages(result)
    assert {r.kind.value for r in result.rewrites} == {"exact"}


@pytest.mark.parametrize("name", SUMS)
def test_a_sum_that_may_pass_2_24_is_left_alone_and_reported_with_its_code(name: str) -> None:
    captured = graph_of(lambda a, b: (SUMS[name](a, b),), (full(1, 8, 8), full(1, 8, 8)), ranges={"args_0": (0, 2**22), "args_1": (0, 2**22)})
    result = run_passes(captured, ExactIntegerSums())
    assert not result.changed
    (message,) = messages(result)
    assert ("NCC_EVRF060" if name in ("scatter_add", "index_add", "index_put") else "NCC_EVRF035") in message
    assert "--implicit-integer-downcast" in message


def test_the_very_bound_of_fp32_counts() -> None:
    """8 * 1448 * 1448 is 2^24 - 3,584; one more each is beyond it."""
    for most, exact in ((1448, True), (1449, False)):
        captured = graph_of(lambda a, b: (a @ b,), (full(1, 8, 8), full(1, 8, 8)), ranges={"args_0": (0, most), "args_1": (0, most)})
        assert run_passes(captured, ExactIntegerSums()).changed is exact


def test_floats_and_bools_are_no_concern() -> None:
    captured = graph_of(lambda a, b: (a @ a, b.float() @ a, aten.index_put(a, [INDEX], a, True)), (torch.randn(8, 8), full(1, 8, 8).bool()))
    result = run_passes(captured, ExactIntegerSums())
    assert not result.changed and not result.findings


def test_an_index_put_that_replaces_is_no_sum() -> None:
    captured = graph_of(lambda a, b: (aten.index_put(a, [torch.arange(8)], b),), (full(1, 8, 8), full(1, 8, 8)))
    assert not run_passes(captured, ExactIntegerSums()).findings


@pytest.mark.parametrize("exponent", [2, 3, 4])
def test_an_int64_power_becomes_products_that_wrap_alike(exponent: int) -> None:
    values = (torch.tensor([0, -1, 3, 2**31, -(2**40) + 1, 2**63 - 1, -(2**63)]),)
    captured, result = apply_pass(ExactIntegerSums(), lambda x: (x**exponent,), values, ranges={"args_0": (-(2**63), 2**63 - 1)})
    assert rules(result) == ["sums.power"]
    assert not [n for n in captured.gm.graph.nodes if n.target is aten.pow.Tensor_Scalar]


def test_other_int64_powers_are_reported_and_int32_ones_are_fine() -> None:
    captured = graph_of(lambda x, y: (x**7, x**x, y**7), (torch.tensor([2]), full(2, 1)), ranges={"args_0": (0, 2**40)})
    result = run_passes(captured, ExactIntegerSums())
    assert [("NCC_EVRF062" in m, "int32" in m) for m in messages(result)] == [(True, True)] * 2


@pytest.mark.parametrize(("op", "high", "reported"), [("sum", 3, True), ("max", 2**24, False), ("max", 2**24 + 1, True)])
@pytest.mark.parametrize("name", ["all_reduce", "reduce_scatter_tensor"])
def test_integer_collectives_are_reported_unless_they_pick_a_small_value(name: str, op: str, high: int, reported: bool) -> None:
    graph, mode = fx.Graph(), FakeTensorMode()
    x = graph.placeholder("x")
    target = getattr(torch.ops._c10d_functional, name).default
    y = graph.call_function(target, (x, op, *((2,) if name != "all_reduce" else ()), "group"))
    graph.output((y,))
    with mode:
        x.meta["val"] = y.meta["val"] = torch.empty(4, dtype=torch.int32)
    source = nxfx.analysis.provenance.Source("x", nxfx.analysis.provenance.Role.INPUT, range=(0, high))
    result = ExactIntegerSums().run(fx.GraphModule(torch.nn.Module(), graph), PassContext(sources={"x": source}))
    assert not result.changed
    assert bool(result.findings) is reported
    assert not reported or ("NCC_EVRF061" if name == "all_reduce" else "NCC_EVRF063") in result.findings[0].message


def test_what_an_undeclared_input_may_hold_counts_only_where_the_boundary_enforces_it() -> None:
    """Without narrow-64bit nothing enforces int32; with it, the declared range makes the proof."""

    class Model(torch.nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return (a % 100) @ (b % 100)

    model, args = Model(), (torch.arange(64).view(8, 8), torch.arange(64).view(8, 8))
    prepared = nxfx.prepare(model, args, verify_each=True)
    assert [r.rule for r in prepared.report.rewrites if r.pass_name == "exact-integer-sums"] == ["sums.integer-dot"]
    assert "--auto-cast=none" in prepared.compiler_args  # bf16 would round the operands
    far = (torch.full((8, 8), 2**31 - 1), torch.full((8, 8), -(2**31)))
    outcome = compare(model(*far), prepared(*far))
    assert outcome.ok, outcome.mismatches


@pytest.mark.parametrize(
    ("target", "sdk", "dot", "scatter"),
    [("trn1", "2.31", "warning", "warning"), ("trn1", "2.32", "warning", "error"), ("trn2", "2.31", "warning", "warning"), ("trn2", "2.33", "error", "error")],
)
def test_what_nxfx_tells_the_compiler_to_refuse_is_an_error(target: str, sdk: str, dot: str, scatter: str) -> None:
    class Sums(torch.nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor, at: torch.Tensor) -> Any:
            return a @ b, a.index_add(0, at, b)

    prepared = nxfx.prepare(Sums(), (full(1, 8, 8), full(1, 8, 8), INDEX), target=target, sdk=sdk, pipeline="narrow-64bit,exact-integer-sums")
    found = {f.message.partition(" ")[2].partition(" ")[0]: f for f in prepared.report.findings if f.code == "NX305"}
    assert [found["dot"].severity.value, found["scatter-add"].severity.value] == [dot, scatter]
    refuses = "--implicit-integer-downcast=none" in prepared.compiler_args
    assert refuses is (scatter == "error")
    assert ("--implicit-integer-downcast=scatter" in found["scatter-add"].fix) is refuses
