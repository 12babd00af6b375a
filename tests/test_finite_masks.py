"""finite-masks: no minus infinity on the way to a softmax, the same bits in every row that keeps something."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import corpus
import pytest
import torch
from harness import Captured, assert_invariants, golden, graph_of, run_passes
from torch import Tensor, fx, nn
from torch.nn.functional import scaled_dot_product_attention, softmax
from torch.utils import _pytree as pytree

import nxfx
from nxfx.passes.finite_masks import FiniteMasks
from nxfx.pipeline import PassContext, PipelineResult
from nxfx.report.rewrites import Kind

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = (BF16, FP16, FP32)
HEADS, LENGTH, WIDTH = 2, 6, 8


class Watcher(fx.Interpreter):
    """Runs a graph and keeps the names of the nodes that hold minus infinity."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.infinite: list[str] = []

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op == "call_function" and any(
            t.is_floating_point() and bool((t == -math.inf).any()) for t in pytree.tree_leaves(result) if isinstance(t, Tensor)
        ):
            self.infinite.append(n.name)
        return result


def infinite(captured: Captured, args: Sequence[Any]) -> list[str]:
    watcher = Watcher(captured.gm)
    watcher.run(*captured.weights, *args)
    return watcher.infinite


def both(model: Any, args: Sequence[Any], **capture: Any) -> tuple[Captured, Captured, PipelineResult]:
    """The graph before and after the pass; a second run changes nothing."""
    before = graph_of(model, args, **capture)
    after = Captured(copy.deepcopy(before.gm), PassContext(sources=before.context.sources), before.weights)
    result = run_passes(after, "finite-masks")
    assert_invariants(after)
    assert not run_passes(after, "finite-masks").changed
    after.gm.graph.eliminate_dead_code()
    after.gm.recompile()
    return before, after, result


def repaired(
    model: Any, args: Sequence[Any], *more: Sequence[Any], full: tuple[int, ...] = ()
) -> tuple[Captured, Captured, PipelineResult]:
    """Rows that keep something are equal, nan where eager has it or finite, no infinity inside. ``full``: rows not to compare."""
    before, after, result = both(model, args)
    rows = [r for r in range(LENGTH) if r not in full]
    for inputs in (args, *more):
        for was, is_ in zip(before(*inputs), after(*inputs), strict=True):
            assert was.dtype == is_.dtype and was.shape == is_.shape and was.stride() == is_.stride()
            assert not is_.isnan()[~was.isnan()].any(), "no nan that eager had not"
            was, is_ = (was[..., rows, :], is_[..., rows, :]) if full else (was, is_)
            assert torch.equal(is_[~was.isnan()], was[~was.isnan()])
        assert not result.changed or not infinite(after, inputs), infinite(after, inputs)
    return before, after, result


def kept(seed: int, rows: tuple[int, ...] = ()) -> Tensor:
    """Which positions are kept: the first always, those of ``rows`` never."""
    found = torch.rand(1, 1, LENGTH, LENGTH, generator=torch.Generator().manual_seed(seed)) > 0.4
    found[..., 0] = True
    found[..., list(rows), :] = False
    return found


def scores(dtype: torch.dtype, seed: int = 9, scale: float = 30.0) -> Tensor:
    return (torch.randn(1, HEADS, LENGTH, LENGTH, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


# --- the table of the promise: dtypes × masks added × rows masked whole ------------------------------------------------

FILLS: dict[str, Callable[[torch.dtype], float]] = {"inf": lambda _: -math.inf, "finfo": lambda dtype: torch.finfo(dtype).min}


ROWS = ((), (2,), (0, 5))


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_added_masks_before_a_softmax(dtype: torch.dtype, fill: str, count: int) -> None:
    def model(x: Tensor, *keeps: Tensor) -> Tensor:
        for keep in keeps:
            x = x + torch.where(keep, 0.0, FILLS[fill](dtype)).to(dtype)
        return softmax(x, -1)

    before, after, result = both(model, (scores(dtype), *map(kept, range(count))))
    needed = fill == "inf" or count > 1 or dtype is FP16
    assert result.changed == needed and {r.kind for r in result.rewrites} <= {Kind.REFINES}
    assert ("NX602" in [f.code for f in result.findings]) == needed
    for full in ROWS:
        args = (scores(dtype), *(kept(s, full) for s in range(count)))
        (expected,), (actual,) = before(*args), after(*args)
        some = [r for r in range(LENGTH) if r not in full]
        assert torch.equal(expected[:, :, some], actual[:, :, some])
        assert not actual.isnan().any() and not infinite(after, args)
        assert not full or expected[:, :, list(full)].isnan().all() == (fill == "inf" or count > 1), "twice finfo.min is minus infinity"


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_gives_zeros_for_a_row_of_infinities_and_still_does(dtype: torch.dtype, fill: str, count: int) -> None:
    def model(query: Tensor, *keeps: Tensor) -> Tensor:
        mask = torch.where(keeps[0], 0.0, FILLS[fill](dtype)).to(dtype)
        for keep in keeps[1:]:
            mask = mask + torch.where(keep, 0.0, FILLS[fill](dtype)).to(dtype)
        return scaled_dot_product_attention(query, query, query, attn_mask=mask)

    query = torch.randn(1, HEADS, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)
    before, after, result = both(model, (query, *map(kept, range(count))))
    assert result.changed == (fill == "inf" or count > 1 or dtype is FP16)
    for full in ROWS:
        args = (query, *(kept(s, full) for s in range(count)))
        (expected,), (actual,) = before(*args), after(*args)
        some = [r for r in range(LENGTH) if r not in full]
        assert torch.equal(expected[:, :, some], actual[:, :, some]) and not actual.isnan().any()
        if fill == "inf":
            assert not expected[:, :, list(full)].any() and not actual[:, :, list(full)].any()
        assert not infinite(after, args)


@pytest.mark.parametrize("low", (BF16, FP16), ids=str)
def test_the_smallest_float32_becomes_minus_infinity_in_a_cast(low: torch.dtype) -> None:
    """NEURON.md: ``finfo(float32).min`` cast to bf16 is minus infinity: the number is chosen after the last cast."""

    def model(x: Tensor, keep: Tensor) -> Tensor:
        mask = torch.full((LENGTH, LENGTH), torch.finfo(FP32).min).masked_fill(keep[0, 0], 0.0)
        return softmax(x + mask.to(low), -1, dtype=FP32).to(low)

    args = (scores(low), kept(0, (1,)))
    before, after, result = repaired(model, args, full=(1,))
    assert before(*args)[0].isnan().any() and not after(*args)[0].isnan().any()
    assert [r.rule for r in result.rewrites] == ["finite.fill"]


# --- how masks are written --------------------------------------------------------------------------------------------

SPELLINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "where-tensors": lambda x, k: x + torch.where(k, torch.zeros((), dtype=x.dtype), torch.full((), -math.inf, dtype=x.dtype)),
    "masked-fill": lambda x, k: x + torch.zeros_like(x).masked_fill(~k, -math.inf),
    "masked-fill-of-scores": lambda x, k: x.masked_fill(~k, -math.inf),
    "where-of-scores": lambda x, k: torch.where(k, x, -math.inf),
    "triu": lambda x, k: x + torch.full((LENGTH, LENGTH), -math.inf, dtype=x.dtype).triu(1),
    "slice-write": lambda x, k: (
        x + torch.zeros(LENGTH, LENGTH, dtype=x.dtype).slice_scatter(torch.full((LENGTH, 2), -math.inf, dtype=x.dtype), 1, 4)
    ),
    "index-put": lambda x, k: x + torch.zeros_like(x).index_put((~k.expand_as(x),), torch.tensor(-math.inf, dtype=x.dtype)),
    "complement": lambda x, k: x + (1.0 - k.to(x.dtype)) * torch.finfo(x.dtype).min + (1.0 - k.to(x.dtype)) * torch.finfo(x.dtype).min,
    "minus-one": lambda x, k: x + (k.to(x.dtype) - 1.0) * torch.finfo(x.dtype).max + (k.to(x.dtype) - 1.0) * torch.finfo(x.dtype).max,
    "cat": lambda x, k: x + torch.cat([torch.zeros(LENGTH, 3, dtype=x.dtype), torch.full((LENGTH, 3), -math.inf, dtype=x.dtype)], -1),
    "expanded": lambda x, k: (
        x + torch.where(k, 0.0, -math.inf).to(x.dtype).expand(1, HEADS, LENGTH, LENGTH).reshape(HEADS, LENGTH, LENGTH)[None]
    ),
    "scaled": lambda x, k: (x + torch.where(k, 0.0, torch.finfo(x.dtype).min).to(x.dtype)) * 2.0,
    "divided": lambda x, k: (x + torch.where(k, 0.0, -math.inf).to(x.dtype)) / 8.0,
    "padded": lambda x, k: x + torch.nn.functional.pad(torch.zeros(LENGTH, 4, dtype=x.dtype), (0, 2), value=-math.inf),
    "negated": lambda x, k: x + -torch.where(k, 0.0, torch.finfo(x.dtype).max).to(x.dtype) * 2.0,
}


@pytest.mark.parametrize(
    ("spelling", "dtype"), [(s, BF16) for s in SPELLINGS] + [(s, FP16) for s in ("scaled", "minus-one", "triu")], ids=str
)
def test_masks_in_every_spelling(spelling: str, dtype: torch.dtype) -> None:
    args = (scores(dtype), kept(3, (2,)))
    more = (scores(dtype, 5), kept(4))
    before, after, result = repaired(lambda x, k: softmax(SPELLINGS[spelling](x, k), -1), args, more, full=(2,) if dtype is FP16 else ())
    assert result.changed, golden(after)
    assert not after(*args)[0].isnan().any()


def test_a_buffer_of_infinities_is_clamped() -> None:
    class Causal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.full((LENGTH, LENGTH), -math.inf).triu(1))

        def forward(self, x: Tensor) -> Tensor:
            return softmax(x + self.mask[: x.shape[-2], : x.shape[-1]], -1)

    before, after, result = both(Causal(), (scores(FP32),))
    assert result.changed and torch.equal(before(scores(FP32))[0], after(scores(FP32))[0])
    assert after.ops()["aten.clamp_min.default"] == 1
    prepared = nxfx.prepare(Causal(), (scores(FP32),), verify=True)
    assert torch.equal(prepared(scores(FP32)), Causal()(scores(FP32)))


def test_one_mask_for_many_layers_is_built_once() -> None:
    def model(x: Tensor, keep: Tensor) -> Tensor:
        mask = torch.where(keep, 0.0, -math.inf).to(x.dtype)
        for _ in range(5):
            x = softmax(x + mask, -1)
        return x

    _, after, result = repaired(model, (scores(BF16), kept(1)))
    assert len(result.rewrites) == 1 and after.ops()["aten.where.ScalarSelf"] + after.ops()["aten.where.Scalar"] == 1


def test_what_else_reads_the_mask_keeps_it() -> None:
    def model(x: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mask = torch.where(keep, 0.0, -math.inf).to(x.dtype)
        return softmax(x + mask, -1), mask, mask == -math.inf

    args = (scores(BF16), kept(1))
    before, after, _ = both(model, args)
    for was, is_ in zip(before(*args), after(*args), strict=True):
        assert torch.equal(was, is_)


# --- what is left alone -----------------------------------------------------------------------------------------------

LEFT_ALONE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "one-finite-mask": lambda x, k: softmax(x + torch.where(k, 0.0, torch.finfo(x.dtype).min).to(x.dtype), -1),
    "small-masks": lambda x, k: softmax(x + torch.where(k, 0.0, -1e4).to(x.dtype) + torch.where(k, 0.0, -1e4).to(x.dtype), -1),
    "no-softmax": lambda x, k: torch.where(k, x, -math.inf).amax(-1),
    "log-softmax-that-keeps": lambda x, k: (x + torch.full((LENGTH, LENGTH), -math.inf, dtype=x.dtype).triu(1)).log_softmax(-1),
    "logsumexp": lambda x, k: torch.where(k, x, -math.inf).logsumexp(-1),
    "topk": lambda x, k: torch.where(k, x, -math.inf).topk(2).values,
    "bool-mask": lambda x, k: scaled_dot_product_attention(x, x, x, attn_mask=k),
    "no-mask": lambda x, k: softmax(x, -1) * k,
    "where-finite": lambda x, k: softmax(torch.where(k, x, torch.finfo(x.dtype).min), -1),
}


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_masks_that_nothing_overflows_cost_nothing(case: str) -> None:
    before, after, result = repaired(LEFT_ALONE[case], (scores(BF16), kept(1)))
    assert not result.changed and golden(before) == golden(after) and not result.findings


def test_a_causal_mask_alone_needs_no_rows_and_no_finding() -> None:
    """Its rows all keep something: that is computed, not assumed."""

    def model(query: Tensor) -> Tensor:
        mask = torch.full((LENGTH, LENGTH), -math.inf, dtype=query.dtype).triu(1)
        return scaled_dot_product_attention(query, query, query, attn_mask=mask) + softmax(query @ query.mT + mask, -1).sum(-1, True)

    _, after, result = repaired(model, (torch.randn(1, HEADS, LENGTH, WIDTH).to(BF16),))
    assert result.changed and not result.findings and not after.ops()["aten.masked_fill.Scalar"]


def test_too_many_masks_are_told() -> None:
    def model(x: Tensor, keep: Tensor) -> Tensor:
        for _ in range(40):
            x = x + torch.where(keep, 0.0, -math.inf).to(x.dtype)
        return softmax(x, -1)

    captured = graph_of(model, (scores(FP16), kept(1)))
    result = run_passes(captured, "finite-masks")
    (finding,) = result.findings
    assert not result.changed and finding.code == "NX601" and "so many masks" in finding.message and finding.location.line


def test_bodies_of_higher_order_ops_are_repaired() -> None:
    def model(flag: Tensor, x: Tensor, keep: Tensor) -> Tensor:
        def masked(x: Tensor, keep: Tensor) -> Tensor:
            return softmax(x + torch.where(keep, 0.0, -math.inf).to(x.dtype), -1)

        return torch.cond(flag, masked, lambda x, keep: softmax(x, -1), (x, keep))

    captured = graph_of(model, args := (torch.tensor(True), scores(BF16), kept(1, (2,))))
    assert run_passes(captured, "finite-masks").changed
    assert not captured(*args)[0].isnan().any()


def _in_a_body(x: Tensor, keep: Tensor) -> Tensor:
    return torch.cond(keep.any(), lambda x, mask: softmax(x + mask, -1), lambda x, mask: softmax(x, -1), (x, _inf(x, keep)))


def _out_of_a_body(x: Tensor, keep: Tensor) -> Tensor:
    mask = torch.cond(keep.any(), lambda keep: torch.where(keep, 0.0, -math.inf), lambda keep: torch.zeros(keep.shape), (keep,))
    return softmax(x + mask, -1)


def _out_of_a_body_finite(x: Tensor, keep: Tensor) -> Tensor:
    mask = torch.cond(keep.any(), lambda keep: torch.where(keep, 0.0, -1e9), lambda keep: torch.zeros(keep.shape), (keep,))
    return softmax(x + mask, -1)


@pytest.mark.parametrize(("model", "lost"), [(_in_a_body, True), (_out_of_a_body, True), (_out_of_a_body_finite, False)])
def test_a_mask_that_crosses_the_edge_of_a_body_is_told(model: Callable[[Tensor, Tensor], Tensor], lost: bool) -> None:
    result = run_passes(graph_of(model, (scores(FP32), kept(0))), "finite-masks")
    assert not result.changed and [f.code for f in result.findings] == ["NX601"] * lost


def test_dynamic_shapes() -> None:
    length = torch.export.Dim("length", min=2, max=64)

    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            n = x.shape[-1]
            return softmax(x + torch.full((n, n), -math.inf, dtype=x.dtype).triu(1), -1)

    before, after, result = both(Model(), (torch.randn(8, 8),), dynamic_shapes={"x": {0: length, 1: length}})
    assert result.changed
    for size in (2, 8, 33):
        x = torch.randn(size, size)
        assert torch.equal(before(x)[0], after(x)[0])


# --- in models --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "dtype"), [("llama", BF16), ("t5", FP16), ("bloom", BF16), ("swin", BF16)], ids=str)
def test_models_keep_their_outputs(name: str, dtype: torch.dtype) -> None:
    model, kwargs = corpus.BY_NAME[name].build(dtype)
    with torch.no_grad():
        prepared = nxfx.prepare(model, (), corpus.clone(kwargs), pipeline="finite-masks")
        expected, actual = model(**corpus.clone(kwargs)), prepared(**corpus.clone(kwargs))
    for was, is_ in zip(pytree.tree_leaves(expected), pytree.tree_leaves(actual), strict=True):
        if isinstance(was, Tensor):
            assert torch.equal(was.isnan() | (was == is_), torch.ones_like(was, dtype=torch.bool))


def test_a_certificate_allows_rows_that_are_masked_whole() -> None:
    """The model's nan became a number, which NX602 reports; nowhere else."""

    class Attention(torch.nn.Module):
        def forward(self, scores: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
            return torch.softmax(scores + torch.zeros(4, 4).masked_fill(~kept, float("-inf")), -1)

    kept = torch.ones(4, 4, dtype=torch.bool).tril()
    kept[2] = False
    prepared = nxfx.prepare(Attention(), (torch.randn(4, 4), kept), verify=True)
    assert "NX602" in {f.code for f in prepared.report.findings}
    assert prepared.report.certificate is not None and prepared.report.certificate.status == "passed"


NAN_READERS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "nan_to_num": (lambda a: a.nan_to_num(), True),
    "nan_to_num-of-a-product": (lambda a: (a.to(FP32) @ torch.ones(LENGTH, 3)).nan_to_num(0.0), True),
    "nan_to_num-another-number": (lambda a: a.nan_to_num(0.5), False),
    "where-isnan": (lambda a: torch.where(a.isnan(), 0.0, a), False),
    "not-equal-to-itself": (lambda a: a.masked_fill(a != a, 0.0), False),
    "after-isinf": (lambda a: torch.where(a.isinf().any(), a, a * 1.0).nan_to_num(), False),
    "nansum": (lambda a: a.nansum(1, True), True),
    "mean-over-heads": (lambda a: a.mean(1, True).nan_to_num(), False),
    "sum-over-heads": (lambda a: a.sum(1, True).nan_to_num(), False),
    "a-number-added": (lambda a: (a + 1).nan_to_num(), False),
    "linear": (lambda a: torch.nn.functional.linear(a, torch.ones(3, LENGTH).to(a.dtype), torch.ones(3).to(a.dtype)).nan_to_num(), False),
    "cat": (lambda a: torch.cat([a, a], -1).nan_to_num(), False),
    "product-of-products": (lambda a: ((a @ a.new_ones(LENGTH, 3)).mT @ a.new_ones(LENGTH, 2)).nan_to_num(), False),
    "compared": (lambda a: (a > 0.1).to(a.dtype), False),
    "argmax": (lambda a: a.argmax(-1, True).to(a.dtype), False),
}


@pytest.mark.parametrize("reader", NAN_READERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_the_model_tells_by_their_nan_are_what_it_makes_of_them(dtype: torch.dtype, reader: str) -> None:
    read, is_made = NAN_READERS[reader]

    def model(x: Tensor, keep: Tensor) -> Tensor:
        return read(softmax(x + torch.where(keep, 0.0, -math.inf).to(dtype), -1))

    before, after, result = both(model, (scores(dtype), kept(0)))
    assert result.changed == is_made and ("NX601" in [f.code for f in result.findings]) != is_made
    assert "NX602" not in [f.code for f in result.findings]
    for full in ROWS:
        args = (scores(dtype), kept(0, full))
        assert torch.equal(before(*args)[0], after(*args)[0])
        assert not is_made or not infinite(after, args)


# --- what is not a mask, though it is made of one or stands beside one ---------------------------------------------------

MADE_LIKE_A_MASK: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "zeros-like-masked-scores": lambda x, k: _masked(_masked(x, k), torch.ones_like(k).tril()),
    "zeros-like-where-a-row-is-full": lambda x, k: (
        x + (lambda m: torch.where((m == -math.inf).all(-1, True), torch.zeros_like(m), m))(_inf(x, k))
    ),
    "ones-like-a-mask-times-half": lambda x, k: (x + _inf(x, k)) * (torch.ones_like(_inf(x, k)) * 0.5),
    "full-like-masked-scores": lambda x, k: (lambda y: torch.where(k.roll(1, -1), y, torch.full_like(y, -5.0)))(
        x.masked_fill(~k, -math.inf)
    ),
    "new-zeros-of-a-mask": lambda x, k: (lambda m: x + m + m.new_zeros(LENGTH, LENGTH))(_inf(x, k)),
}


def _inf(x: Tensor, keep: Tensor) -> Tensor:
    return torch.where(keep, 0.0, -math.inf).to(x.dtype)


def _low(x: Tensor, keep: Tensor) -> Tensor:
    return (1.0 - keep.to(x.dtype)) * torch.finfo(x.dtype).min


def _masked(x: Tensor, keep: Tensor) -> Tensor:
    return x + torch.zeros_like(x).masked_fill(~keep, -math.inf)


def same_rows(model: Any, *args: Any, stays: bool = False) -> PipelineResult:
    """Rows that keep something have equal bits whichever rows are left out; no new nan, and no minus infinity in a softmax."""
    before, after, result = both(model, args)
    for full in ROWS:
        inputs = [kept(11, full) if isinstance(a, Tensor) and a.dtype is torch.bool else a for a in args]
        (was,), (now,) = before(*inputs), after(*inputs)
        some = [r for r in range(LENGTH) if r not in full]
        assert not (now.isnan() & ~was.isnan()).any()
        number = ~was[..., some, :].isnan()
        assert torch.equal(was[..., some, :][number], now[..., some, :][number])
        assert bool(into_softmax(after, inputs)) <= stays
    return result


def into_softmax(captured: Captured, args: Sequence[Any]) -> list[str]:
    """The softmaxes that read a minus infinity."""

    class Reads(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            if n.op == "call_function" and n.target in FiniteMasks.targets:
                given, named = self.fetch_args_kwargs_from_env(n)
                masks = [given[0]] if "attention" not in str(n.target) else [*given[3:4], named.get("attn_mask")]
                found.extend(n.name for m in masks if isinstance(m, Tensor) and m.is_floating_point() and bool((m == -math.inf).any()))
            return super().run_node(n)

    found: list[str] = []
    Reads(captured.gm).run(*captured.weights, *args)
    return found


def told(result: PipelineResult) -> set[str]:
    return {finding.code for finding in result.findings}


@pytest.mark.parametrize("case", MADE_LIKE_A_MASK)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_constant_made_like_a_mask_stays_what_it_is(dtype: torch.dtype, case: str) -> None:
    result = same_rows(lambda x, k: softmax(MADE_LIKE_A_MASK[case](x, k), -1), scores(dtype, scale=3.0), kept(0))
    assert result.changed


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["padding-first", "causal-first"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_constant_mask_does_not_hide_one_that_is_given(dtype: torch.dtype, order: tuple[int, int]) -> None:
    def model(x: Tensor, keep: Tensor) -> Tensor:
        masks = _inf(x, keep), torch.full((LENGTH, LENGTH), -math.inf, dtype=x.dtype).triu(1)
        return softmax(x + masks[order[0]] + masks[order[1]], -1).nan_to_num()

    before, after, result = both(model, (scores(dtype), kept(0)))
    for full in ROWS:
        args = (scores(dtype), kept(0, full))
        assert torch.equal(before(*args)[0], after(*args)[0]) and not infinite(after, args)
    assert result.changed and not result.findings


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_rows_are_those_of_the_softmax_not_of_a_smaller_mask(dim: int) -> None:
    def model(x: Tensor) -> Tensor:
        return softmax(x + torch.full((LENGTH, LENGTH), -math.inf).triu(1), dim)

    before, after, result = both(model, (scores(FP32),))
    was, now = before(scores(FP32))[0], after(scores(FP32))[0]
    assert torch.equal(was[~was.isnan()], now[~was.isnan()]) and not now.isnan().any()
    assert (told(result) == {"NX602"}) == bool(was.isnan().any()) == (dim == 1)


BESIDE_ITS_SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "less-its-amax": lambda y: y - y.amax(-1, True),
    "less-its-max": lambda y: y - y.max(-1, True)[0].detach(),
    "less-its-logsumexp": lambda y: y - y.logsumexp(-1, True),
    "leaky-relu": lambda y: torch.where(y > 0, y, torch.nn.functional.leaky_relu(y)),
    "sink-of-its-amax": lambda y: torch.cat([y, y.amax(-1, True)], -1),
    "clamped": lambda y: torch.where(y > 0, y, y.clamp(min=-5.0)),
    "where-infinite": lambda y: torch.where(y.isinf(), torch.full_like(y, -math.inf), y),
}


@pytest.mark.parametrize("case", BESIDE_ITS_SCORES)
@pytest.mark.parametrize("mask", [_inf, lambda x, k: _low(x, k) + _low(x, k)], ids=["inf", "finfo-twice"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_other_readers_of_masked_scores(dtype: torch.dtype, mask: Callable[[Tensor, Tensor], Tensor], case: str) -> None:
    scaled_away = case == "leaky-relu" and dtype is FP16  # a hundredth of half of its smallest number is an ordinary score

    def model(x: Tensor, keep: Tensor) -> Tensor:
        return softmax(BESIDE_ITS_SCORES[case](x + mask(x, keep)), -1)

    result = same_rows(model, scores(dtype, scale=3.0), kept(0), stays=scaled_away)
    assert result.changed or (scaled_away and told(result) == {"NX601"})


# --- numbers that stay apart, and that still mask -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_minus_infinity_stays_below_the_smallest_number(dtype: torch.dtype) -> None:
    """A padded row of a causal mask attends its own padded past, not the future."""

    def model(x: Tensor, keep: Tensor) -> Tensor:
        return softmax(x + torch.full((LENGTH, LENGTH), -math.inf, dtype=dtype).triu(1) + _low(x, keep), -1)

    before, after, result = both(model, (scores(dtype, scale=0.1), kept(0)))
    for full in ROWS:
        args = (scores(dtype, scale=0.1), kept(0, full))
        was, now = before(*args)[0], after(*args)[0]
        assert result.changed and not infinite(after, args) and torch.equal(was == 0, now == 0)
        assert torch.equal(was, now) or dtype is FP16, "scores round away beside the smallest number, and beside half of it"


def test_attention_keeps_minus_infinity_and_the_smallest_number_apart() -> None:
    def model(query: Tensor, one: Tensor, other: Tensor) -> Tensor:
        return scaled_dot_product_attention(query, query, query, attn_mask=_inf(query, one) + _low(query, other))

    query = torch.randn(1, HEADS, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1))
    before, after, result = both(model, (query, kept(0), kept(1)))
    for full in ROWS:
        for args in ((query, kept(0, full), kept(1)), (query, kept(0), kept(1, full)), (query, kept(0, full), kept(1, full))):
            assert torch.equal(before(*args)[0], after(*args)[0]) and not infinite(after, args)
    assert result.changed and [f.code for f in result.findings] == ["NX602"] and "nan" not in result.findings[0].message


def test_masks_that_are_taken_away() -> None:
    def model(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        most = torch.finfo(x.dtype).max
        return softmax(x - most * (~a).to(x.dtype) - most * (~b).to(x.dtype), -1)

    for dtype in DTYPES:
        assert same_rows(model, scores(dtype), kept(0), kept(1)).changed


@pytest.mark.parametrize("scale", [1.0, 0.125, 1e-2, 1e-3, 1e-4])
def test_a_number_that_a_later_scale_makes_an_ordinary_one_is_none(scale: float) -> None:
    def model(x: Tensor, keep: Tensor) -> Tensor:
        return softmax((x + _inf(x, keep)) * scale, -1, dtype=FP32)

    result = same_rows(model, scores(FP16), kept(0), stays=True)
    assert result.changed == (scale >= 1e-2) and ("NX601" in told(result)) != result.changed
    for rewrite in result.rewrites:
        bound = float(rewrite.bound.split("±")[1].split()[0])
        assert bound == pytest.approx((32752 * scale - 104) / 2, rel=0.01)


# --- minus infinity that comes another way -------------------------------------------------------------------------------

OTHER_WAYS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "baddbmm": lambda x, k: torch.baddbmm(_inf(x, k)[0].expand(HEADS, LENGTH, LENGTH), x[0], x[0].mT)[None],
    "baddbmm-beta": lambda x, k: torch.baddbmm(_inf(x, k)[0].expand(HEADS, LENGTH, LENGTH), x[0], x[0].mT, beta=0.5)[None],
    "addmm": lambda x, k: torch.addmm(_inf(x, k)[0, 0], x[0, 0], x[0, 1]),
    "alpha": lambda x, k: torch.add(x, _inf(x, k), alpha=2),
    "minus-infinite": lambda x, k: x - torch.where(k, 0.0, math.inf).to(x.dtype),
    "log-of-kept": lambda x, k: x + k.to(x.dtype).log(),
    "log1p-of-left-out": lambda x, k: x + torch.log1p(-(~k).float()).to(x.dtype),
    "minimum": lambda x, k: x + torch.minimum(_inf(x, k), _inf(x, k.roll(1, -2))),
    "maximum-of-left-out": lambda x, k: x + torch.maximum(1 - k.to(x.dtype), 1 - k.roll(1, -2).to(x.dtype)) * torch.finfo(x.dtype).min * 2,
    "clamped-and-another": lambda x, k: x + _low(x, k).clamp(min=torch.finfo(x.dtype).min) + _low(x, k),
    "integers-of-left-out": lambda x, k: x + (~k).int().to(x.dtype) * torch.finfo(x.dtype).min * 2.0,
    "scale-of-each-head": lambda x, k: (x + _inf(x, k)) * torch.tensor([0.5, 0.25]).view(2, 1, 1).to(x.dtype),
    "topk": lambda x, k: x.masked_fill(~k, -math.inf).topk(3, -1)[0],
    "sort": lambda x, k: x.masked_fill(~k, -math.inf).sort(-1)[0],
    "repeat-interleave": lambda x, k: x + _inf(x, k).repeat_interleave(HEADS, 1),
    "unbind": lambda x, k: x + _inf(x, k).expand(1, HEADS, LENGTH, LENGTH).unbind(1)[0],
    "chunk": lambda x, k: x + torch.cat(_inf(x, k).chunk(2, -1), -1),
    "scatter": lambda x, k: x.scatter(-1, torch.full((1, HEADS, LENGTH, 1), 3), -math.inf),
}


@pytest.mark.parametrize("way", OTHER_WAYS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_minus_infinity_is_followed(dtype: torch.dtype, way: str) -> None:
    result = same_rows(lambda x, k: softmax(OTHER_WAYS[way](x, k), -1), scores(dtype, scale=2.0), kept(0))
    assert result.changed and "NX601" not in told(result)


LOST_WAYS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "temperature": lambda x, k: x.masked_fill(~k, -math.inf) / (x[..., :1].abs() + 1),
    "abs": lambda x, k: x - _inf(x, k).abs(),
    "addcmul": lambda x, k: torch.addcmul(x, (~k).to(x.dtype), torch.full_like(x, torch.finfo(x.dtype).min), value=2.0),
    "times-scores": lambda x, k: (x + _inf(x, k)) * x.abs(),
    "cumsum": lambda x, k: (x + _inf(x, k)).cumsum(-1),
}


@pytest.mark.parametrize("way", LOST_WAYS)
def test_minus_infinity_that_is_not_followed_is_told(way: str) -> None:
    result = same_rows(lambda x, k: softmax(LOST_WAYS[way](x, k), -1), scores(FP32, scale=2.0), kept(0), stays=True)
    (finding,) = [f for f in result.findings if f.code == "NX601"]
    assert not result.changed and "no other number is followed" in finding.message and finding.severity.value == "warning"


ENDED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "another-softmax": lambda x, k: softmax(x + _low(x, k), -1) @ x,
    "soft-cap": lambda x, k: torch.tanh((x + _inf(x, k)) / 50.0) * 50.0,
    "relu": lambda x, k: torch.relu(x + _inf(x, k)),
    "nan-to-num": lambda x, k: torch.nan_to_num(x + _inf(x, k)),
    "clamped": lambda x, k: (x + _inf(x, k)).clamp(min=-50.0),
}


@pytest.mark.parametrize("case", ENDED)
def test_what_is_bounded_again_is_no_mask(case: str) -> None:
    result = same_rows(lambda x, k: softmax(ENDED[case](x, k), -1), scores(FP32), kept(0))
    assert not result.changed and not result.findings


KEEPS_ITS_LARGEST: dict[str, Callable[[Tensor], Tensor]] = {
    "top-k": lambda x: x.masked_fill(x < x.topk(2, -1)[0][..., -1:], -math.inf),
    "top-k-where": lambda x: torch.where(x >= x.topk(2, -1)[0][..., -1, None], x, -math.inf),
    "sink": lambda x: torch.cat([x + _inf(x, x > 0), torch.zeros_like(x[..., :1])], -1),
}


@pytest.mark.parametrize("case", KEEPS_ITS_LARGEST)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_that_keeps_its_largest_is_never_full(dtype: torch.dtype, case: str) -> None:
    result = same_rows(lambda x: softmax(KEEPS_ITS_LARGEST[case](x), -1), scores(dtype))
    assert result.changed and not result.findings


def test_isinf_tells_no_nan() -> None:
    result = same_rows(lambda x, k: (lambda a: torch.where(a.isinf(), 0.5, a))(softmax(x + _inf(x, k), -1)), scores(FP32), kept(0))
    assert result.changed and told(result) == {"NX602"}


def test_log_softmax_is_told_where_a_row_may_be_full() -> None:
    result = same_rows(lambda x, k: (x + _inf(x, k)).log_softmax(-1), scores(FP32), kept(0), stays=True)
    assert not result.changed and told(result) == {"NX601"}


def test_a_mask_that_is_given_is_told_once() -> None:
    def model(query: Tensor, mask: Tensor) -> Tensor:
        hidden = scaled_dot_product_attention(query, query, query, attn_mask=mask)
        return softmax(hidden @ hidden.mT / 2.0 + mask, -1)

    mask = torch.zeros(LENGTH, LENGTH)
    result = run_passes(graph_of(model, (torch.randn(1, HEADS, LENGTH, WIDTH), mask)), "finite-masks")
    (finding,) = result.findings
    assert finding.code == "NX601" and finding.severity.value == "info" and "given" in finding.message and not result.changed


# --- buffers and parameters --------------------------------------------------------------------------------------------


class Held(nn.Module):
    """Scores and a mask that the module holds."""

    def __init__(self, mask: Tensor, read: Callable[[Tensor, Tensor, Tensor], Tensor], *, parameter: bool = False) -> None:
        super().__init__()
        self.read = read
        if parameter:
            self.mask = nn.Parameter(mask, requires_grad=False)
        else:
            self.register_buffer("mask", mask)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        return softmax(self.read(x, keep, self.mask), -1)


_CAUSAL = torch.full((LENGTH, LENGTH), -math.inf).triu(1)
HELD: dict[str, tuple[Callable[[], Tensor], Callable[[Tensor, Tensor, Tensor], Tensor]]] = {
    "of-many-numbers": (
        lambda: torch.randn(LENGTH, LENGTH, generator=torch.Generator().manual_seed(3)) + _CAUSAL,
        lambda x, k, m: x + m.to(x.dtype),
    ),
    "of-infinity-and-smallest": (
        lambda: _CAUSAL.masked_fill(torch.ones(LENGTH, LENGTH).tril(-3) > 0, torch.finfo(FP32).min),
        lambda x, k, m: x + m.to(x.dtype),
    ),
    "of-ones-and-zeros": (lambda: torch.ones(LENGTH, LENGTH).tril(), lambda x, k, m: x + _low(x, m) + _low(x, k)),
    "large": (lambda: torch.full((2100, 2100), -math.inf).triu(1), lambda x, k, m: x + m[:LENGTH, :LENGTH].to(x.dtype)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", HELD)
def test_masks_that_the_module_holds(dtype: torch.dtype, case: str) -> None:
    make, read = HELD[case]
    assert same_rows(Held(make(), read), scores(dtype, scale=2.0), kept(0)).changed


@pytest.mark.parametrize("case", [case for case in HELD if case != "of-ones-and-zeros"])
def test_a_parameter_that_holds_a_mask_is_one(case: str) -> None:
    make, read = HELD[case]
    assert same_rows(Held(make(), read, parameter=True), scores(BF16, scale=2.0), kept(0)).changed


@pytest.mark.parametrize(
    ("held", "loaded", "holds"),
    [
        (_CAUSAL, _CAUSAL.clone(), True),
        (_CAUSAL, _CAUSAL.mT.contiguous(), True),
        (_CAUSAL, torch.full((LENGTH, LENGTH), -2e4), False),
        (torch.zeros(LENGTH, LENGTH), _CAUSAL, False),
        (torch.linspace(0, 1, LENGTH), torch.linspace(1, 2, LENGTH), True),
        (torch.linspace(0, 1, LENGTH * LENGTH).view(LENGTH, -1), _CAUSAL, False),
    ],
    ids=["the-same", "the-same-numbers", "other-numbers", "no-mask-became-one", "few-others", "a-table-became-a-mask"],
)
def test_what_a_buffer_holds_is_a_premise(held: Tensor, loaded: Tensor, holds: bool) -> None:
    model = Held(held.clone(), lambda x, k, m: x + m)
    args = (scores(FP32), kept(0))
    prepared = nxfx.prepare(model, args)
    assert torch.equal(prepared(*args), model(*args)) and [p.source for p in prepared.report.premises] == ["mask"]
    assert nxfx.Report.from_dict(prepared.report.to_dict()).premises == prepared.report.premises
    model.mask.copy_(loaded)
    if holds:
        assert torch.equal(prepared(*args), model(*args))
    else:
        with pytest.raises(nxfx.PrepareError, match="prepare the model again"):
            prepared(*args)
