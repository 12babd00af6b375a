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


def repaired(model: Any, args: Sequence[Any], *more: Sequence[Any], full: tuple[int, ...] = ()) -> tuple[Captured, Captured, PipelineResult]:
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
    "slice-write": lambda x, k: x + torch.zeros(LENGTH, LENGTH, dtype=x.dtype).slice_scatter(torch.full((LENGTH, 2), -math.inf, dtype=x.dtype), 1, 4),
    "index-put": lambda x, k: x + torch.zeros_like(x).index_put((~k.expand_as(x),), torch.tensor(-math.inf, dtype=x.dtype)),
    "complement": lambda x, k: x + (1.0 - k.to(x.dtype)) * torch.finfo(x.dtype).min + (1.0 - k.to(x.dtype)) * torch.finfo(x.dtype).min,
    "minus-one": lambda x, k: x + (k.to(x.dtype) - 1.0) * torch.finfo(x.dtype).max + (k.to(x.dtype) - 1.0) * torch.finfo(x.dtype).max,
    "cat": lambda x, k: x + torch.cat([torch.zeros(LENGTH, 3, dtype=x.dtype), torch.full((LENGTH, 3), -math.inf, dtype=x.dtype)], -1),
    "expanded": lambda x, k: x + torch.where(k, 0.0, -math.inf).to(x.dtype).expand(1, HEADS, LENGTH, LENGTH).reshape(HEADS, LENGTH, LENGTH)[None],
    "scaled": lambda x, k: (x + torch.where(k, 0.0, torch.finfo(x.dtype).min).to(x.dtype)) * 2.0,
    "divided": lambda x, k: (x + torch.where(k, 0.0, -math.inf).to(x.dtype)) / 8.0,
    "padded": lambda x, k: x + torch.nn.functional.pad(torch.zeros(LENGTH, 4, dtype=x.dtype), (0, 2), value=-math.inf),
    "negated": lambda x, k: x + -torch.where(k, 0.0, torch.finfo(x.dtype).max).to(x.dtype) * 2.0,
}


@pytest.mark.parametrize(("spelling", "dtype"), [(s, BF16) for s in SPELLINGS] + [(s, FP16) for s in ("scaled", "minus-one", "triu")], ids=str)
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
    "log-softmax": lambda x, k: torch.where(k, x, -math.inf).log_softmax(-1),
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
