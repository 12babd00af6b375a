"""narrow-64bit: what becomes 32 bits, what stays and why, and that nothing changes."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import expecttest
import integer_programs
import pytest
import torch
import torch.nn.functional as F
from harness import Captured, apply_pass, golden, graph_of, run_passes
from torch import fx
from torch._functorch.aot_autograd import aot_export_module
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from tracing import trace

from nxfx.analysis.intervals import INT32
from nxfx.analysis.provenance import Role, Source
from nxfx.analysis.wide_edges import wide_edges
from nxfx.errors import UsageError
from nxfx.graph import invariants, walk
from nxfx.passes.narrow_64bit import Narrow64bit, NarrowOptions
from nxfx.pipeline import PassContext, Pipeline, PipelineResult
from nxfx.verification.equivalence import compare

aten = torch.ops.aten
TABLE = torch.randn(100, 4)
Ranges = dict[str, tuple[int, int]]


def ids(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int64)


def tensor(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def narrow(
    model: Any, args: tuple[Any, ...], *more: tuple[Any, ...], ranges: Ranges | None = None, **changes: Any
) -> tuple[Captured, PipelineResult]:
    """One run of the pass on a traced function, checked for invariants, idempotence and equal bits on all inputs."""
    step = Narrow64bit(NarrowOptions(**changes))
    before, after = trace(model, args, ranges=ranges), trace(model, args, ranges=ranges)
    result = run_passes(after, step)
    again = run_passes(after, step)
    assert not again.changed, f"a second run changed the graph again: {again.rewrites}"
    for inputs in (args, *more):
        outcome = compare(before(*copy.deepcopy(inputs)), after(*copy.deepcopy(inputs)))
        assert outcome.ok, f"{outcome.mismatches}\n{golden(after)}"
    return after, result


def narrow_exported(
    model: Any, args: tuple[Any, ...], *more: tuple[Any, ...], **options: Any
) -> tuple[Captured, PipelineResult]:
    """The same through ``torch.export``: composite ops, metadata assertions, dynamic shapes, buffers."""
    return apply_pass(Narrow64bit(), model, args, more_inputs=more, **options)


def codes(result: PipelineResult) -> Counter[str]:
    return Counter(f.code for f in result.findings)


def messages(result: PipelineResult, code: str) -> list[str]:
    return [f.message for f in result.findings if f.code == code]


def rules(result: PipelineResult) -> Counter[str]:
    return Counter(r.rule for r in result.rewrites)


def assert_all_narrow(captured: Captured, result: PipelineResult) -> None:
    assert wide_edges(captured.gm)["edges"] == 0, golden(captured)
    assert not messages(result, "NX301"), messages(result, "NX301")


class TestGolden(expecttest.TestCase):
    def test_given_result(self) -> None:
        def model(ids: torch.Tensor, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            best = (ids + torch.arange(8)).argmax(1)
            return F.embedding(ids, table), best

        captured, _ = narrow_exported(model, (ids(2, 8), TABLE), (torch.randint(0, 100, (2, 8)), TABLE))
        self.assertExpectedInline(
            golden(captured),
            """\
%args_0 : int64[2, 8] = placeholder[args_0]
%args_1 : float32[100, 4] = placeholder[args_1]
%_to_copy_default : int32[2, 8] = aten._to_copy.default(args_0, dtype=torch.int32)
%arange : int32[8] = aten.arange.default(8, device=cpu, pin_memory=False, dtype=torch.int32)
%add : int32[2, 8] = aten.add.Tensor(_to_copy_default, arange)
%argmax : int64[2] = aten.argmax.default(add, 1)
%_to_copy_default_1 : int32[2] = aten._to_copy.default(argmax, dtype=torch.int32)
%embedding : float32[2, 8, 4] = aten.embedding.default(args_1, _to_copy_default)
%_to_copy_default_2 : int64[2] = aten._to_copy.default(_to_copy_default_1, dtype=torch.int64)
return (embedding, _to_copy_default_2)""",
        )
        self.assertEqual(captured.context.requirements, {"args_0": (0, 99)})

    def test_a_kept_value_is_computed_wide_from_wide_operands(self) -> None:
        captured, result = narrow_exported(lambda t: (torch.arange(4) + t,), (tensor(3)[0],), (tensor(2**31 - 1)[0],))
        self.assertExpectedInline(
            golden(captured),
            """\
%args_0 : int64[] = placeholder[args_0]
%_to_copy_default : int32[] = aten._to_copy.default(args_0, dtype=torch.int32)
%_to_copy_default_2 : int64[] = aten._to_copy.default(_to_copy_default, dtype=torch.int64)
%arange : int32[4] = aten.arange.default(4, device=cpu, pin_memory=False, dtype=torch.int32)
%_to_copy_default_1 : int64[4] = aten._to_copy.default(arange, dtype=torch.int64)
%add : int64[4] = aten.add.Tensor(_to_copy_default_1, _to_copy_default_2)
return (add,)""",
        )
        (finding,) = [f for f in result.findings if f.code == "NX301"]
        self.assertExpectedInline(finding.message, """`add` may reach 2147483650: 64 bits are kept""")
        self.assertExpectedInline(finding.fix, """declare ranges={"args_0": (low, high)}""")


# --- everything that is proved becomes 32 bits ------------------------------------------------------------------------

X = torch.randint(0, 100, (2, 8))
NARROWED: dict[str, Any] = {
    "arange": lambda x: torch.arange(8) + x,
    "arange with steps": lambda x: torch.arange(80, 0, -10) + x,
    "full": lambda x: torch.full((8,), 7) + x,
    "full_like": lambda x: torch.full_like(x, 7) + x,
    "zeros and ones": lambda x: torch.zeros(8, dtype=torch.int64) + torch.ones_like(x) + x.new_zeros(8),
    "tril_indices": lambda x: torch.tril_indices(8, 8)[:, :8] + x[:, :8],
    "lifted constant": lambda x: x + torch.tensor([1, 2, 3, 4, 5, 6, 7, 8]),
    "0-d constant": lambda x: x + torch.tensor(5),
    "scalar arithmetic": lambda x: (x * 3 + 7) % 10 // 2 - 1,
    "bitwise": lambda x: ((x & 12) | (x ^ 5)) + ~x,
    "shifts": lambda x: (x << 4) + (x >> 2),
    "abs neg sign": lambda x: x.abs() + (-x) + x.sign(),
    "min max clamp": lambda x: torch.minimum(x, x + 1).clamp(2, 50) + torch.maximum(x, torch.tensor(3)),
    "where": lambda x: torch.where(x > 3, x, -1) + torch.where(x > 3, torch.arange(8), x),
    "cat stack": lambda x: torch.cat([x, torch.arange(8)[None]]).sum() + torch.stack([x, x]).sum(),
    "views": lambda x: x.view(16)[1:9].unsqueeze(0).expand(2, 8).flip(0).transpose(0, 1).reshape(8, 2).repeat(1, 2),
    "split and chunk": lambda x: x.split(3, 1)[0] + x.chunk(2, 1)[1][:, :3],
    "pad roll tril": lambda x: F.pad(x, (1, 1), value=3)[:, :8] + x.roll(1, 1) + x.tril(),
    "comparisons": lambda x: (x < 5) & (x != torch.arange(8)) | (x >= x.flip(1)),
    "to float": lambda x: x.float() / 3 + x.to(torch.bfloat16) + x / 2 + x.sin(),
    "bool arithmetic": lambda x: (x > 3) + 1 + (x > 5) * 2 + (x > 3).long(),
    "true cast and back": lambda x: (x.float() * 0.5).long() + x,
    "sum": lambda x: x.sum() + x.sum(1, keepdim=True) + (x > 3).sum(),
    "cumsum": lambda x: x.cumsum(-1) + ((x > 3).cumsum(1) - 1).clamp(min=0),
    "prod": lambda x: (x % 3 + 1).prod(-1) + (x % 2).cumprod(-1)[:, -1],
    "argmax": lambda x: x.argmax(-1) + x.argmin(-1),
    "max and sort": lambda x: x.max(-1).indices[:, None] + x.max(-1).values[:, None] + torch.sort(x, stable=True).indices,
    "topk": lambda x: x.topk(3).values + x.float().topk(3).indices % 2,
    "bucketize": lambda x: torch.bucketize(x, torch.arange(6)) + torch.searchsorted(torch.arange(9), x),
    "count_nonzero": lambda x: x.count_nonzero(1) + 1,
    "gather": lambda x: x.gather(1, x % 8),
    "gather dim 0": lambda x: x.gather(0, x % 2),
    "index": lambda x: x[x[:, 0] % 2] + x[:, x[0] % 8],
    "index_select": lambda x: x.index_select(1, x[0] % 8),
    "embedding": lambda x: F.embedding(x, TABLE),
    "scatter": lambda x: x.scatter(1, x % 8, x) + x.scatter(1, x % 8, 5),
    "scatter_add": lambda x: torch.zeros_like(x).scatter_add(1, x % 8, torch.ones_like(x)),
    "index_put": lambda x: aten.index_put(x, [x[:, 0] % 2], x[0]) + aten.index_put(x, [x[:, 0] % 2], x[0], True),
    "slice_scatter": lambda x: torch.slice_scatter(x, x[:, :3] * 2, 1, 2, 5) + torch.select_scatter(x, x[0] + 1, 0, -1),
    "masked_fill": lambda x: x.masked_fill(x > 3, -1),
    "matmul": lambda x: x @ x.mT + torch.einsum("bi,bj->b", x, x) + torch.einsum("bi,ci->bc", x, x),
    "repeat_interleave": lambda x: x.repeat_interleave(2, 1),
    "meshgrid": lambda x: torch.meshgrid(torch.arange(2), torch.arange(8), indexing="ij")[0] + x,
    "diff": lambda x: x.diff(dim=1),
    "type_as": lambda x: (x > 3).type_as(x) + x,
    "int32 of the model's own": lambda x: x.to(torch.int32) + x.to(torch.int32).long(),
    "small integers": lambda x: x.to(torch.uint8) + x.to(torch.int16).long() + x,
    "isin any all": lambda x: torch.isin(x, torch.arange(5)).any() & (x > 0).all(),
}


@pytest.mark.parametrize("name", NARROWED)
def test_everything_proved_is_narrow(name: str) -> None:
    model = NARROWED[name]
    more = [(torch.randint(0, 100, (2, 8)),), (torch.full((2, 8), 99),), (ids(2, 8),)]
    captured, result = narrow(lambda x: (model(x),), (X,), *more, ranges={"args_0": (0, 99)})
    assert_all_narrow(captured, result)
    assert captured.context.requirements == {"args_0": (0, 99)}


COMPOSITE = ("matmul", "meshgrid", "diff", "type_as", "tril_indices", "repeat_interleave", "bool arithmetic", "scatter", "index")


def test_composite_ops_of_the_training_ir_narrow_as_well() -> None:
    captured, result = narrow_exported(
        lambda x: tuple(NARROWED[name](x) for name in COMPOSITE), (X,), (X.flip(0),), ranges={"args_0": (0, 99)}
    )
    assert {"aten.einsum.default", "aten.meshgrid.indexing", "aten.diff.default"} <= set(captured.ops())
    assert_all_narrow(captured, result)


CORE = ("arange", "where", "cumsum", "index_put", "slice_scatter", "masked_fill", "bool arithmetic", "gather")


def test_the_core_aten_form_narrows_as_well() -> None:
    captured, result = narrow_exported(
        lambda x: tuple(NARROWED[name](x) for name in CORE), (X,), (X.flip(0),), ranges={"args_0": (0, 99)}, core_aten=True
    )
    assert_all_narrow(captured, result)


@pytest.mark.parametrize("shape", [(), (0, 4), (1, 1)], ids=str)
def test_empty_and_0d_tensors(shape: tuple[int, ...]) -> None:
    captured, result = narrow(lambda x: (x * 2 + 1, x.sum(), x.flatten().cumsum(0)), (ids(*shape),), ranges={"args_0": (0, 99)})
    assert_all_narrow(captured, result)


def test_non_contiguous_and_negative_dims() -> None:
    model = lambda x: ((x.mT[..., ::2] + 1).select(-1, -1).unsqueeze(-1), x.mT.sum(-2))  # noqa: E731
    captured, result = narrow(model, (X,), (X.mT.contiguous().mT,), ranges={"args_0": (0, 99)})
    assert_all_narrow(captured, result)


# --- the table of ops: int32 is taken where the table says so ------------------------------------------------------------

INDEX_OPS: dict[str, Any] = {
    "gather": lambda x, i: aten.gather(x, 1, i),
    "gather dim 0": lambda x, i: aten.gather(x, 0, i),
    "index": lambda x, i: aten.index.Tensor(x, [i]),
    "index mixed": lambda x, i: aten.index.Tensor(x, [i, i.long()]),
    "index_select": lambda x, i: aten.index_select(x, 0, i.flatten()),
    "embedding": lambda x, i: aten.embedding(x, i),
    "embedding_dense_backward": lambda x, i: aten.embedding_dense_backward(x[i], i, 4, -1, False),
    "scatter": lambda x, i: aten.scatter.src(x, 1, i, x * 2),
    "scatter value": lambda x, i: aten.scatter.value(x, 1, i, 2.0),
    "scatter_add": lambda x, i: aten.scatter_add(x, 1, i, x),
    "scatter_reduce": lambda x, i: aten.scatter_reduce.two(x, 1, i, x, "amax"),
    "index_add": lambda x, i: aten.index_add(x, 0, i[0], x),
    "index_put": lambda x, i: aten.index_put(x, [i[0]], x),
    "index_put adds": lambda x, i: aten.index_put(x, [i], x[0], True),
    "repeat_interleave": lambda x, i: aten.repeat_interleave.self_Tensor(x, i[0], 0),
}


@pytest.mark.parametrize("name", INDEX_OPS)
def test_index_ops_take_int32(name: str) -> None:
    table, index = torch.randn(4, 4), torch.randint(0, 4, (4, 4))
    op = INDEX_OPS[name]
    assert torch.equal(op(table, index), op(table, index.int()))
    captured, result = narrow(lambda i: (op(table, i % 4),), (index,))
    assert_all_narrow(captured, result)
    assert "NX304" not in codes(result)


@pytest.mark.parametrize("name", ["gather", "scatter_add", "scatter_reduce"])
def test_an_expanded_int32_index_is_copied_out_because_torch_reads_it_as_int64(name: str) -> None:
    """torch's CPU kernels take ``index.data_ptr<int64_t>()`` when an index is expanded along dim > 0: wrong rows, no word."""
    table, source = torch.randn(40, 64), torch.randn(64, 64)
    ops: dict[str, Any] = {
        "gather": lambda i: table.gather(0, i),
        "scatter_add": lambda i: table.scatter_add(0, i, source),
        "scatter_reduce": lambda i: table.scatter_reduce(0, i, source, "amax"),
    }
    captured, result = narrow(lambda i: (ops[name]((i % 40).unsqueeze(1).expand(64, 64)),), (torch.arange(64),), (torch.arange(64) * 7,))
    assert_all_narrow(captured, result)
    assert rules(result)["narrow.dense-index"] == 1


DEMANDING: dict[str, Any] = {
    "one_hot": lambda x: F.one_hot(x % 5, 5),
    "take": lambda x: TABLE.take(x % 100),
    "take_along_dim": lambda x: TABLE[:2, :4].take_along_dim(x[:, :4] % 4, 1),
    "index_fill": lambda x: TABLE.index_fill(0, x[0] % 100, 2.0),
    "index_copy": lambda x: aten.index_copy(TABLE, 0, torch.arange(8) + x[0] * 0, TABLE[:8]),
    "put": lambda x: aten.put(TABLE, torch.arange(8) + x[0] * 0, TABLE[0].repeat(2)),
    "nll_loss": lambda x: F.nll_loss(TABLE[:8], x[0] % 4),
    "cross_entropy": lambda x: F.cross_entropy(TABLE[:8], x[0] % 4),
    "sorter": lambda x: torch.searchsorted(x[0], x[1], sorter=torch.argsort(x[0], stable=True) + x[0] * 0),
}


@pytest.mark.parametrize("name", DEMANDING)
def test_ops_that_demand_int64_get_a_local_cast_and_a_finding(name: str) -> None:
    model = DEMANDING[name]
    run = narrow_exported if name in ("one_hot", "take_along_dim") else narrow  # composite: tracing takes them apart
    captured, result = run(lambda x: (model(x),), (X,), (X.flip(1),), ranges={"args_0": (0, 99)})
    assert wide_edges(captured.gm)["edges"] == 0
    assert codes(result)["NX304"] == 1
    assert "demands int64" in messages(result, "NX304")[0]


def test_an_index_producer_feeds_a_demanding_op_without_casts() -> None:
    captured, result = narrow(lambda x: (TABLE.take(x.argmax(-1)),), (torch.randn(2, 8),))
    assert not result.changed
    assert wide_edges(captured.gm) == {"edges": 0, "forced": 1, "kept": 0}


# --- traps (FX.md) and the adversarial set ------------------------------------------------------------------------------

KEPT: dict[str, tuple[Any, tuple[Any, ...], Ranges, str]] = {
    "trap 1: sum that leaves int32": (lambda x: x.sum(), (torch.full((8,), 2**30),), {"args_0": (0, 2**30)}, "`sum` may reach 2^33"),
    "trap 1: cumsum that leaves int32": (
        lambda x: x.cumsum(0), (torch.full((8,), 2**30),), {"args_0": (0, 2**30)}, "`cumsum` may reach 2^33",
    ),
    "trap 1: prod that leaves int32": (lambda x: x.prod(), (torch.full((8,), 99),), {"args_0": (0, 99)}, "`prod` may reach 2^53"),
    "trap 2: an INT64_MAX sentinel": (
        lambda x: torch.where(x > 3, x, 2**63 - 1), (tensor(1, 5),), {"args_0": (0, 9)}, "may reach 2^62",
    ),
    "trap 2: iinfo.min in a full": (lambda x: torch.full((2,), -(2**63)) + x, (tensor(1, 5),), {"args_0": (0, 9)}, "`full` may reach -2^63"),
    "trap 3: arange times 1.5e9": (lambda x: torch.arange(4) * 1_500_000_000 + x, (tensor(1, 2, 3, 4),), {"args_0": (0, 9)}, "4500000000"),
    "trap 4: a shift beyond the word": (lambda x: x << 33, (tensor(1, 5),), {"args_0": (0, 9)}, "`__lshift__` may reach 77309411328"),
    "trap 5: index times stride": (
        lambda x: x * 100_000 + torch.arange(2), (tensor(70_000, 1),), {"args_0": (0, 100_000)}, "`mul` may reach 10000000000",
    ),
    "trap 10: a timestamp": (lambda t: t // 1000, (tensor(1_700_000_000_000),), {"args_0": (0, 2**41)}, "`args_0` may hold values"),
    "trap 10: a hash": (
        lambda x: (x * 2654435761 ^ (x >> 3)) * 40503, (tensor(1, 99),), {"args_0": (0, 99)}, "`mul` may reach 262789140339",
    ),
    "products of two ids": (lambda x: x * x.flip(0), (tensor(99_999, 99_999),), {"args_0": (0, 99_999)}, "`mul` may reach 9999800001"),
    "x * 2**40": (lambda x: x * 2**40, (tensor(1, 9),), {"args_0": (0, 9)}, "may reach"),
    "an undeclared sum": (lambda x: x.sum(), (tensor(1, 9),), {}, "`sum` may reach 4294967294"),
    "an unknown op": (lambda x: torch.gcd(x, x + 1), (tensor(1, 9),), {"args_0": (0, 9)}, "`gcd` has no known bound"),
    "a float that may be infinite": (lambda x: (1 / x).long(), (tensor(1, 9),), {"args_0": (0, 9)}, "`_to_copy` has no known bound"),
}  # fmt: skip


@pytest.mark.parametrize("name", KEPT)
def test_what_may_not_fit_is_kept_and_reported(name: str) -> None:
    model, args, ranges, message = KEPT[name]
    captured, result = narrow(lambda *a: (model(*a),), args, ranges=ranges)
    found = messages(result, "NX301")
    assert any(message in m for m in found), found
    assert wide_edges(captured.gm)["edges"] or any(n.op == "placeholder" for n in captured.gm.graph.nodes)


def test_trap_8_argmax_over_a_dimension_beyond_int32() -> None:
    def model(x: torch.Tensor) -> tuple[torch.Tensor]:
        return (x.expand(2**31 + 8).argmax(-1) // 2,)

    captured = graph_of(model, (torch.zeros(1),))
    result = run_passes(captured, Narrow64bit())
    assert messages(result, "NX301") == ["`argmax` may reach 2147483655: 64 bits are kept"]


def test_trap_1_a_sum_that_fits_accumulates_in_int32_only_as_far_as_every_part_fits() -> None:
    captured, result = narrow(lambda x: (x.sum() // 4,), (torch.full((8,), 2**30),), ranges={"args_0": (0, 2**30)})
    (total,) = [n for n in captured.gm.graph.nodes if n.target is aten.sum.default]
    assert total.meta["val"].dtype == torch.int64  # the mean fits, the sum does not
    captured, _ = narrow(lambda x: (x.sum() // 4,), (torch.full((8,), 2**20),), ranges={"args_0": (0, 2**20)})
    (total,) = [n for n in captured.gm.graph.nodes if n.target is aten.sum.default]
    assert total.meta["val"].dtype == torch.int32


def test_trap_4_both_branches_of_a_select_have_one_dtype() -> None:
    """One branch is kept, so the other is read in int64 too; the result fits again and is narrow."""
    captured, result = narrow(
        lambda x: (torch.where(x > 5, x, x * 2**31).clamp(0, 7) + 1,), (tensor(1, 9),), (tensor(0, 7),), ranges={"args_0": (0, 9)}
    )
    (where,) = [n for n in captured.gm.graph.nodes if n.target is aten.where.self]
    assert {n.meta["val"].dtype for n in where.all_input_nodes[1:]} == {torch.int64}
    assert where.meta["val"].dtype == torch.int64
    assert len(messages(result, "NX301")) == 1


def test_trap_6_updates_and_base_of_a_scatter_agree() -> None:
    captured, _ = narrow(lambda x: (torch.zeros(8, dtype=torch.int64).scatter(0, x % 8, x),), (torch.arange(8),), ranges={"args_0": (0, 9)})
    (scatter,) = [n for n in captured.gm.graph.nodes if n.target is aten.scatter.src]
    assert {n.meta["val"].dtype for n in scatter.all_input_nodes} == {torch.int32}


@pytest.mark.parametrize("mode", ["proved", "assume", "aggressive"])
def test_trap_7_every_mode_is_applied(mode: str) -> None:
    captured, result = narrow(lambda x: (x + 1, x % 7, torch.arange(3)), (tensor(1, 2, 3),), mode=mode)
    dtypes = {n.name: n.meta["val"].dtype for n in captured.gm.graph.nodes if n.target in (aten.add.Tensor, aten.remainder.Scalar)}
    expected = {
        "proved": {"add": torch.int64, "remainder": torch.int64},
        "assume": {"add": torch.int64, "remainder": torch.int32},
        "aggressive": {"add": torch.int32, "remainder": torch.int32},
    }
    assert dtypes == expected[mode]
    assert captured.context.requirements == ({} if mode == "proved" else {"args_0": INT32})
    if mode == "aggressive":
        assert messages(result, "NX301") == ["`add` is narrowed without proof (mode=aggressive)"]


def test_trap_7_options_are_data_and_unknown_ones_are_refused() -> None:
    text = "narrow-64bit{mode=proved;boundary=keep;fp64=narrow}"
    assert str(Pipeline.parse(text)) == text
    with pytest.raises(UsageError, match="'mode' is one of proved, assume, aggressive, not 'bold'"):
        Pipeline.parse("narrow-64bit{mode=bold}")


def test_trap_9_boundaries_keep_their_dtype_in_meta_and_in_fact() -> None:
    captured, _ = narrow_exported(lambda x: (x, x + 0, x.argmax()), (tensor(1, 2),), ranges={"args_0": (0, 9)})
    outputs = captured(tensor(1, 2))
    assert [o.dtype for o in outputs] == [torch.int64] * 3
    assert invariants.contract_of(captured.gm).outputs == ("int64[2]", "int64[2]", "int64[]")


def test_a_sentinel_in_a_clamp_or_comparison_becomes_the_end_of_int32() -> None:
    def model(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x.clamp(min=-(2**63)), x.clamp(max=2**63 - 1), x < 2**40, x == 2**32, x != -(2**63), x >= 2**33

    captured, result = narrow(model, (tensor(0, 1, 99),), ranges={"args_0": (0, 99)})
    assert_all_narrow(captured, result)
    assert rules(result)["narrow.sentinel"] == 6


def test_a_comparison_at_the_very_end_of_int32_stays_wide() -> None:
    """``x < 2**31`` holds for 2**31 - 1, ``x < 2**31 - 1`` does not."""
    captured, result = narrow(lambda x: (x < 2**31,), (tensor(2**31 - 1, 0),))
    assert "computed in int64" in messages(result, "NX301")[0]


def test_bitwise_numbers_beyond_32_bits_keep_their_low_word() -> None:
    captured, result = narrow(
        lambda x: (x & (2**63 - 1), x & (2**32 + 5), x ^ -(2**31) - 0), (tensor(0, 7, 99),), ranges={"args_0": (0, 99)}
    )
    assert_all_narrow(captured, result)


@pytest.mark.parametrize("amount", [31, 32, 40, 63])
def test_right_shifts_of_31_and_more_leave_the_sign(amount: int) -> None:
    captured, result = narrow(lambda x: (x >> amount,), (tensor(-(2**31), -1, 0, 2**31 - 1),))
    assert_all_narrow(captured, result)


def test_shifts_by_a_tensor_that_may_exceed_31_are_computed_wide() -> None:
    captured, result = narrow(lambda x: (x >> (x & 63),), (tensor(0, 31, 32, 63),), ranges={"args_0": (0, 63)})
    assert "computed in int64" in messages(result, "NX301")[0]


def test_mixed_promotion_int32_with_a_kept_0d_int64() -> None:
    """A 0-d int64 would be converted to int32 next to an int32 tensor and wrap."""
    captured, result = narrow(lambda x: (x + torch.tensor(2**40), torch.cat([x, torch.tensor([2**33])])), (tensor(1, 2),), ranges={"args_0": (0, 9)})
    assert codes(result)["NX306"] == 2


def test_a_bool_is_not_promoted_to_int32_next_to_a_number_beyond_it() -> None:
    """``mask % (2**33 + 1)`` is ``mask``; in int32 the number would wrap to 1 and give 0 (found by fuzzing)."""
    captured, result = narrow(lambda x: ((x > 3) % (2**33 + 1), (x > 3) // -(2**63)), (tensor(1, 9),), ranges={"args_0": (0, 9)})
    assert len(messages(result, "NX301")) == 2
    assert all("beyond 32 bits" in m for m in messages(result, "NX301"))


def test_a_subtraction_with_an_alpha_that_int32_cannot_negate_stays_wide() -> None:
    captured, result = narrow(lambda x: (torch.sub(x, x % 1, alpha=-(2**31)),), (tensor(1, 9),), ranges={"args_0": (0, 9)})
    assert "computed in int64" in messages(result, "NX301")[0]


def test_a_where_that_promotes_bools_is_narrow_and_its_condition_stays_a_bool() -> None:
    captured, result = narrow(lambda x: (torch.where(x > 3, x > 3, -1), torch.where(x > 3, 5, x > 3)), (tensor(1, 9),), ranges={"args_0": (0, 9)})
    assert_all_narrow(captured, result)


def test_float_results_do_not_depend_on_the_integer_width() -> None:
    def model(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x / 3, x * 0.5, x.float(), x.to(torch.bfloat16), x.to(torch.float16), x + y, x.sqrt(), torch.true_divide(x, x + 1)

    corners = tensor(0, 255, 257, 2049, 2**24 + 1, 2**30 + 1)
    captured, result = narrow(model, (corners, torch.randn(6)), ranges={"args_0": (0, 2**30 + 1)})
    assert_all_narrow(captured, result)


def test_bucketed_relative_positions_are_narrow_although_log_0_is_cast() -> None:
    def model(x: torch.Tensor) -> tuple[torch.Tensor]:
        large = 8 + (torch.log(x.float() / 8) / 2.77 * 8).to(torch.int64)
        return (torch.where(x < 8, x, torch.minimum(large, torch.full_like(large, 15))),)

    captured, result = narrow(model, (torch.arange(100),), ranges={"args_0": (0, 100)})
    assert_all_narrow(captured, result)


def test_a_guarded_value_with_another_reader_is_kept() -> None:
    def model(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        large = (torch.log(x.float() / 8) * 8).to(torch.int64)
        return torch.where(x < 8, x, large + 1), large  # eager gives the smallest int64 where x is 0

    captured, result = narrow(model, (torch.arange(100),), ranges={"args_0": (0, 100)})
    assert messages(result, "NX301")


def test_a_branch_that_is_never_taken_is_one_in_every_run() -> None:
    """The first run takes the cast away that the condition reads; what it proves must not rest on that."""

    def model(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        small = x & 63
        copied = small.to(torch.int64, copy=True)
        return (torch.where(copied < 100, copied * 2, x.clamp(-2, 2**32) * 3 - small * 1000),)

    captured, result = narrow(model, (tensor(0, 70, 2**31 - 1),))
    (where,) = captured.gm.graph.find_nodes(op="call_function", target=aten.where.self)
    assert [n.meta["val"].dtype for n in where.all_input_nodes] == [torch.bool, torch.int32, torch.int32]


@pytest.mark.parametrize("mode", ["assume", "proved"])
def test_an_integer_program_whose_second_run_added_a_cast(mode: str) -> None:
    integer_programs.check_integers(71650, mode=mode)


# --- inputs, buffers, requirements, reports -----------------------------------------------------------------------------


def test_an_undeclared_input_is_assumed_enforced_and_reported() -> None:
    captured, result = narrow(lambda x: (x.bool(),), (tensor(0, 1),))
    assert captured.context.requirements == {"args_0": INT32}
    assert messages(result, "NX303") == ["`args_0` is taken to fit int32; the boundary refuses anything else"]


def test_an_input_that_is_only_returned_is_left_alone() -> None:
    captured, result = narrow(lambda x, y: (x, y.float()), (tensor(2**40), torch.randn(1)))
    assert not result.changed
    assert not result.findings


def test_int32_inputs_need_nothing() -> None:
    captured, result = narrow(lambda x: (x + 1,), (tensor(1).int(),))
    assert not result.changed
    assert captured.context.requirements == {}


class WithBuffer(torch.nn.Module):
    def __init__(self, *values: int) -> None:
        super().__init__()
        self.register_buffer("positions", torch.tensor(values))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (TABLE[x] + self.positions[:, None],)


def test_a_buffer_is_narrowed_on_the_premise_of_its_values() -> None:
    captured, result = narrow_exported(WithBuffer(3, 7), (tensor(1, 2),))
    assert_all_narrow(captured, result)
    assert [(p.source, p.detail) for p in captured.context.premises] == [("positions", (3, 7))]
    assert captured.context.requirements == {"x": (-100, 99)}


def test_a_buffer_beyond_int32_is_kept() -> None:
    captured, result = narrow_exported(WithBuffer(3, 2**40), (tensor(1, 2),))
    assert messages(result, "NX306") == ["`positions` holds values beyond int32: 64 bits are kept; 1 more value computed from it"] or messages(
        result, "NX306"
    ) == ["`positions` holds values beyond int32: 64 bits are kept"]


def test_weights_as_get_attr_are_sources_like_placeholders() -> None:
    program = torch.export.export(WithBuffer(3, 7), (tensor(1, 2),), strict=False).run_decompositions({})
    gm = program.module()
    sources = {n.name: Source(str(n.target), Role.BUFFER, gm.get_buffer(n.target)) for n in gm.graph.nodes if n.op == "get_attr"
               and isinstance(n.meta.get("val"), torch.Tensor) and n.target == "positions"}  # fmt: skip
    context = PassContext(sources={**sources, "x": Source("x", Role.INPUT)})
    Narrow64bit().run(gm, context)
    gm.recompile()
    casts = [u for n in gm.graph.nodes if n.name in sources for u in n.users]
    assert [c.meta["val"].dtype for c in casts] == [torch.int32]
    assert all("stack_trace" in c.meta for c in casts)
    assert not [b for b in invariants.check(gm) if b.rule in ("val-is-true", "evaluates")]


def test_metadata_assertions_are_rewritten_not_dropped() -> None:
    captured, result = narrow_exported(lambda x: ((x + 1).to(torch.float32),), (tensor(1, 2),), ranges={"args_0": (0, 9)})
    asserted = [n for n in captured.gm.graph.nodes if n.target is aten._assert_tensor_metadata.default]
    assert len(asserted) == 1
    assert torch.int32 in asserted[0].args
    assert rules(result)["narrow.assert"] == 1


def test_one_finding_for_a_kept_value_and_everything_computed_from_it() -> None:
    captured, result = narrow_exported(lambda t: (((t * 2) * 3 + 1) * t,), (tensor(1, 2),))
    assert messages(result, "NX301") == ["`mul` may reach 4294967294: 64 bits are kept; 3 more values computed from it"]
    (finding,) = [f for f in result.findings if f.code == "NX301"]
    assert finding.fix == 'declare ranges={"args_0": (low, high)}'
    assert finding.location.line


def test_rewrites_are_exact_and_countable() -> None:
    _, result = narrow(lambda x: (x + torch.arange(8), x.argmax(-1) + 1), (X,), ranges={"args_0": (0, 99)})
    assert {r.kind.value for r in result.rewrites} == {"exact"}
    assert rules(result) == {
        "narrow.input": 1, "narrow.factory": 1, "narrow.follow": 2, "narrow.index": 1, "narrow.output": 2,
    }  # fmt: skip


def test_no_cast_is_made_that_nothing_reads() -> None:
    captured, result = narrow(lambda x: ((x * 2**40).argmax(-1).float(),), (X,), ranges={"args_0": (0, 99)})
    for node in captured.gm.graph.nodes:
        assert node.users or node.op == "output" or node.target is aten._assert_tensor_metadata.default, node


def test_boundary_keep_hands_an_int64_output_on() -> None:
    captured, _ = narrow(lambda x: (x.argmax(-1),), (torch.randn(2, 8),), boundary="keep")
    assert "aten._to_copy.default" not in captured.ops()
    captured, _ = narrow(lambda x: (x.argmax(-1),), (torch.randn(2, 8),), boundary="narrow")
    assert captured.ops()["aten._to_copy.default"] == 2


def test_dynamic_shapes() -> None:
    def model(mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        length = mask.shape[1]
        return positions + torch.arange(length), mask.float().argmax(-1), mask.sum(), torch.full((length,), length)

    longer = (torch.ones(2, 50, dtype=torch.int64),)
    shapes = (({1: torch.export.Dim("seq", max=4096)},),)
    captured, result = narrow_exported(model, (ids(2, 8),), longer, ranges={"args_0": (0, 1)}, dynamic_shapes=shapes)
    assert_all_narrow(captured, result)


def test_a_dynamic_dimension_without_a_maximum_is_reported() -> None:
    _, result = narrow_exported(lambda x: (torch.arange(x.shape[1]),), (torch.randn(2, 8),), dynamic_shapes=(({1: torch.export.Dim("seq")},),))
    assert "is taken to stay below 2^31" in messages(result, "NX303")[0]


# --- other graphs -------------------------------------------------------------------------------------------------------


def test_trap_29_bodies_are_narrowed_inside_and_operands_that_may_not_fit_stay() -> None:
    def model(x: torch.Tensor, flag: torch.Tensor) -> tuple[torch.Tensor]:
        def true_branch(v: torch.Tensor) -> torch.Tensor:
            return (v % 7) + torch.arange(4)

        def false_branch(v: torch.Tensor) -> torch.Tensor:
            return v.argsort(stable=True) + 1

        return (torch.cond(flag, true_branch, false_branch, (x,)) * 1,)

    args = (tensor(2**40, -5, 3, 0), torch.tensor(True))
    captured, result = narrow_exported(model, args, (args[0], torch.tensor(False)), ranges={"args_0": (-(2**41), 2**41)})
    for scope in walk.scopes(captured.gm):
        if scope.is_body:
            (operand,) = scope.graph_module.graph.find_nodes(op="placeholder")
            assert operand.meta["val"].dtype == torch.int64
            dtypes = {n.target: n.meta["val"].dtype for n in scope.graph_module.graph.nodes if n.op == "call_function"}
            assert dtypes.get(aten.arange.default, torch.int32) == torch.int32
    assert any("operand of a higher-order op" in m for m in messages(result, "NX301"))


def joint(model: torch.nn.Module, args: tuple[Any, ...]) -> tuple[fx.GraphModule, list[torch.Tensor]]:
    gm, signature = aot_export_module(model, args, trace_joint=True, output_loss_index=0)
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    state = [named[n].detach() for n in (*signature.parameters, *signature.buffers)]
    FakeTensorProp(gm, FakeTensorMode()).propagate(*state, *args)  # one fake mode throughout, as Dynamo gives it
    return gm, state


def test_a_joint_training_graph_narrows_and_keeps_its_gradients() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(20, 4)
            self.head = torch.nn.Linear(4, 20)

        def forward(self, x: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor]:
            hidden = self.table(x) + self.table((x + torch.arange(6)) % 20)
            return (F.cross_entropy(self.head(hidden).flatten(0, 1), target.flatten()),)

    model = Model()
    args = (torch.randint(0, 20, (2, 6)), torch.randint(0, 20, (2, 6)))
    gm, state = joint(model, args)
    inputs = state + list(args)
    expected = gm(*inputs)
    contract = invariants.contract_of(gm)
    names = [n.name for n in gm.graph.find_nodes(op="placeholder")]
    context = PassContext(sources={n: Source(n, Role.INPUT) for n in names[len(state) :]}, training=True)
    result = Narrow64bit().run(gm, context)
    assert result.changed
    assert not [b for b in invariants.check(gm, contract) if b.rule != "has-trace"]
    gm.recompile()
    outcome = compare(expected, gm(*inputs))
    assert outcome.ok, outcome.mismatches
    assert wide_edges(gm)["edges"] == 0, [f.message for f in result.findings]


# --- float64 ------------------------------------------------------------------------------------------------------------


def test_float64_on_purpose_is_kept_and_reported_once_where_it_starts() -> None:
    captured, result = narrow(lambda x: ((x.double().cumsum(-1) * 2).float(),), (torch.randn(2, 8),))
    assert not result.changed
    (finding,) = [f for f in result.findings if f.code == "NX302"]
    assert finding.message.startswith("`cumsum` in float64 between casts: no Neuron generation has it")
    assert finding.message.endswith("64 bits are kept; 2 more values computed from it")
    assert "--auto-cast=none" in finding.fix


PURPOSES: dict[str, tuple[Any, str]] = {
    "matmul": (lambda x: (x.double() @ x.double().mT).float(), "mm"),
    "norm": (lambda x: (x * torch.rsqrt(x.double().pow(2).mean(-1, keepdim=True) + 1e-6).float()), "mean"),
    "softmax to bf16": (lambda x: x.double().softmax(-1).to(torch.bfloat16), "softmax"),
}


@pytest.mark.parametrize("name", PURPOSES)
def test_float64_around_a_sum_is_recognised(name: str) -> None:
    model, op = PURPOSES[name]
    _, result = narrow(lambda x: (model(x),), (torch.randn(4, 8),))
    assert any(f"{op}` in float64 between casts" in m for m in messages(result, "NX302")), messages(result, "NX302")


def test_float64_that_leaves_the_model_is_not_taken_for_an_accumulator() -> None:
    _, result = narrow(lambda x: (x.double().sum(-1),), (torch.randn(4, 8),))
    assert "between casts" not in messages(result, "NX302")[0]


def test_a_float64_input_is_kept_and_reported() -> None:
    _, result = narrow(lambda x: (x + 1,), (torch.randn(3, dtype=torch.float64),))
    assert messages(result, "NX302") == ["`args_0` is float64: 64 bits are kept; 1 more value computed from it"]


@pytest.mark.parametrize("value", [0.1, 0.5, 1e300, -1e300, float("inf"), float("nan"), -0.0, 1e-320])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_0d_float64_constant_that_promotion_rounds_is_narrowed_without_changing_a_bit(value: float, dtype: torch.dtype) -> None:
    """bf16 rounds straight from float64, so only a constant that float32 holds may take the way through it."""
    constant = torch.tensor(value, dtype=torch.float64)
    captured, result = narrow(lambda x: (x * constant, torch.where(x > 0, x, constant)), (torch.randn(64).to(dtype),))
    exact = dtype == torch.float32 or constant.float().double().equal(constant) or constant.isnan().item()
    assert (wide_edges(captured.gm)["edges"] == 0) == bool(exact)
    assert bool(messages(result, "NX302")) != bool(exact)


def test_a_float64_constant_next_to_integers_is_kept() -> None:
    """int64 * 0-d float64 is float64: narrowing would compute in float32."""
    constant = torch.tensor(0.1, dtype=torch.float64)
    _, result = narrow(lambda x: (x * constant,), (tensor(1, 2**30 + 1),))
    assert messages(result, "NX302")


def test_float64_is_narrowed_on_request_with_saturated_sentinels() -> None:
    smallest = torch.finfo(torch.float64).min

    def model(x: torch.Tensor) -> tuple[torch.Tensor]:
        return (x.double().masked_fill(x > 0, smallest).clamp(min=smallest).sum(-1).float(),)

    captured = graph_of(model, (torch.randn(2, 8),))
    result = run_passes(captured, Narrow64bit(NarrowOptions(fp64="narrow")))
    assert wide_edges(captured.gm)["edges"] == 0
    assert all("is beyond float32 and became -3.40282e+38" in m for m in messages(result, "NX302"))
    assert {r.kind.value for r in result.rewrites if r.rule == "narrow.float"} == {"reassociated"}
    assert torch.isfinite(captured(-torch.rand(2, 8))[0]).all()


def test_float64_outputs_keep_their_dtype_when_narrowed() -> None:
    captured = graph_of(lambda x: (x.double() * 2,), (torch.randn(3),))
    run_passes(captured, Narrow64bit(NarrowOptions(fp64="narrow")))
    assert captured(torch.ones(3))[0].dtype == torch.float64
    assert run_passes(captured, Narrow64bit(NarrowOptions(fp64="narrow"))).changed is False


def test_complex128_is_reported_and_narrowed_on_request() -> None:
    model = lambda x: (torch.view_as_real(torch.polar(x.double().abs(), x.double())).float(),)  # noqa: E731
    captured, result = narrow(model, (torch.randn(4),))
    assert not result.changed
    assert set(messages(result, "NX302")) == {
        "`_to_copy` gives float64: 64 bits are kept; 3 more values computed from it", "`_to_copy` gives float64: 64 bits are kept",
    }  # fmt: skip
    captured = graph_of(model, (torch.randn(4),))
    run_passes(captured, Narrow64bit(NarrowOptions(fp64="narrow")))
    assert wide_edges(captured.gm)["edges"] == 0


# --- fuzz ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["assume", "proved"])
def test_random_programs_give_equal_bits_at_interval_corners(mode: str) -> None:
    edges = [integer_programs.check_integers(seed, mode) for seed in range(500)]
    assert sum(after for _, after in edges) < sum(before for before, _ in edges) * 0.6


def test_the_pass_is_linear_in_nodes() -> None:
    def inserted(count: int) -> int:
        def chain(x: torch.Tensor) -> tuple[torch.Tensor]:
            total = x
            for _ in range(count):
                total = (total + x).remainder(1000) + torch.arange(4)
            return (total,)

        captured = graph_of(chain, (ids(4),), ranges={"args_0": (0, 99)})
        result = Narrow64bit().run(captured.gm, captured.context)
        return len(result.rewrites)

    assert inserted(80) - inserted(40) == inserted(40) - inserted(20) + inserted(20) - 2
