"""The hand-off to the real upstream lowerings: the lowered program itself is executed and compared with eager."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nxfx
from nxfx.errors import LoweringError, MissingDependencyError, PrepareError, UsageError
from nxfx.handoff import mlir, stablehlo, xla
from nxfx.handoff.decompose import decompose
from nxfx.handoff.lowered import Lowered
from nxfx.verification.equivalence import compare
from tests import run_stablehlo

needs_torch_mlir = pytest.mark.skipif(importlib.util.find_spec("torch_mlir") is None, reason="torch-mlir is not installed")
needs_iree = pytest.mark.skipif(not run_stablehlo.INSTALLED, reason="IREE is not installed")


class Wrap(nn.Module):
    def __init__(self, fn: Callable[..., Any]) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, *args: Tensor) -> Any:
        return self.fn(*args)


def prepared_of(fn: Callable[..., Any], *args: Tensor, **options: Any) -> nxfx.PreparedModule:
    return nxfx.prepare(fn if isinstance(fn, nn.Module) else Wrap(fn), args, **options)


def execute(fn: Callable[..., Any], *args: Tensor, more: tuple[tuple[Tensor, ...], ...] = (), max_abs: float | None = None) -> Lowered:
    """Lower, execute in the place of the graph, compare with eager on ``args`` and ``more``."""
    prepared = prepared_of(fn, *args)
    lowered = stablehlo.lower(prepared)
    (call,) = prepared.captures.values()
    call.compiled = run_stablehlo.Program(lowered)
    for inputs in (args, *more):
        kind: Any = {"kind": "close", "max_abs": max_abs, "signed_zeros": False} if max_abs is not None else {}
        outcome = compare(fn(*inputs), prepared(*inputs), **kind)
        assert outcome.ok, outcome.mismatches
    return lowered


def wide(lowered: Lowered) -> tuple[int, int]:
    return lowered.types["i64"], lowered.types["f64"]


X = torch.linspace(-3, 3, 24).reshape(4, 6)
AT = torch.tensor([-1, 0, 2])
NAN, INF = float("nan"), float("inf")


# -- what the lowering would get wrong ------------------------------------------------------------------------------------------

INTEGERS = torch.arange(-9, 9)
FLOATS = torch.tensor([-7.5, -6, -3, -0.5, 0.5, 3, 4, 7.5])
WRONG_ALONE: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "negative-index": (lambda x, i: x[i], (X, AT)),
    "negative-index-of-dim-1": (lambda x, i: x[:, i], (X, AT)),
    "two-indices": (lambda x, i: x[i, i], (X, AT)),
    "two-indices-broadcast": (lambda x, i: x[i[:, None], i[None]], (X, AT)),
    "indices-with-a-gap": (lambda x, i: x.view(2, 2, 6)[i.clamp(-2, 1), :, i], (X, AT)),
    "0-d-index": (lambda x, i: x[i[0]], (X, AT)),
    "integer-remainder": (lambda x: (x % 3, x % -3, x.remainder(4)), (INTEGERS,)),
    "integer-remainder-by-a-tensor": (lambda x: x % (x.flip(0) * 2 + 1), (INTEGERS,)),
    "argmax-of-ties-and-nan": (
        lambda x: (x.argmax(1), x.argmin(1), x.argmax(), x.argmin(0, keepdim=True)),
        (torch.tensor([[1.0, 3, 3, 0], [NAN, 5, NAN, 1], [-INF, -INF, -INF, -INF]]),),
    ),
    "argmax-of-integers": (lambda x: (x.argmax(-1), x.argmin(-1)), (INTEGERS.reshape(3, 6),)),
    "topk": (lambda x: (*x.topk(3), *x.topk(2, largest=False)), (X,)),
    "slice-to-int64-max": (lambda x: torch.slice_scatter(x, x[1:] * 2, 0, 1, 2**63 - 1), (X,)),
    "comparison-with-a-scalar": (lambda x: (x > 0.1, x <= 1, x.to(torch.int64) != 2), (X,)),
    "integers-divided-and-rounded-down": (lambda x: (x // 4, x.div(-3, rounding_mode="floor")), (INTEGERS,)),
    "eye": (lambda x: x + torch.eye(18, dtype=torch.int64), (INTEGERS,)),
    "unfold": (lambda x: x.unfold(0, 4, 3), (INTEGERS,)),
    "nearest": (lambda x: torch.nn.functional.interpolate(x[None, None], size=(7, 4)), (X,)),
    "masked-fill-with-a-scalar": (
        lambda x, i: (x.masked_fill(x > 0, -1e4), x.masked_fill(x < 0, -INF), x.masked_fill(x > 1, 2), i.masked_fill(i > 0, 7)),
        (X, INTEGERS),
    ),
    "pad-integers": (lambda x: torch.nn.functional.pad(x, (1, 2)), (INTEGERS,)),
    "int-min-and-max": (lambda x: (x.amax(), x.amin(), x.clamp(-2, 3), x.abs()), (INTEGERS,)),
}


@needs_torch_mlir
@needs_iree
@pytest.mark.parametrize("case", WRONG_ALONE)
def test_integers_and_masks_are_equal(case: str) -> None:
    fn, args = WRONG_ALONE[case]
    assert wide(execute(fn, *args))[1] == 0


@needs_torch_mlir
@needs_iree
def test_one_program_serves_other_indices() -> None:
    lowered = execute(lambda x, i: x[i], X, AT, more=((X, torch.tensor([3, -4, 1])), (X, torch.tensor([0, 0, -2]))))
    assert lowered.watched()["scatter"] == 0 and wide(lowered) == (0, 0)


class Norms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.group, self.batch = nn.LayerNorm(6), nn.GroupNorm(2, 4), nn.BatchNorm1d(4)
        self.eval()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.layer(x), self.group(x), self.batch(x), x.var(-1), x.std(), x.var(0, correction=0), *torch.var_mean(x, 1)


FLOAT_CASES: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "norms": (Norms(), (torch.stack([X, X.flip(0)]),)),
    "scalars": (lambda x: (x * 0.1 + 2, x**2, (x - 0.5) / 3, torch.where(x > 0, x, 0.25), x.masked_fill(x > 1, -1e4)), (X,)),
    "attention": (lambda x: torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True), (X[None],)),
    "pool": (lambda x: (torch.nn.functional.adaptive_avg_pool1d(x[None], 1), torch.nn.functional.avg_pool2d(x[None], 2)), (X,)),
    "interpolate": (lambda x: torch.nn.functional.interpolate(x[None, None], scale_factor=2, mode="bilinear"), (X,)),
    "float-remainder": (lambda x: (x % 2.5, x % -3, x % x.flip(0)), (FLOATS,)),
    "low-precision": (lambda x: (x.bfloat16() * 0.5).softmax(-1).float(), (X,)),
}


@needs_torch_mlir
@needs_iree
@pytest.mark.parametrize("case", FLOAT_CASES)
def test_floats_are_close(case: str) -> None:
    fn, args = FLOAT_CASES[case]
    with torch.no_grad():
        lowered = execute(fn, *args, max_abs=2e-3 if case == "low-precision" else 2e-5)
    assert lowered.types["f64"] == 0
    assert case == "interpolate" or lowered.types["i64"] == 0


class MaskAndCache(nn.Module):
    """A tensor-bound mask, a written buffer, an unused and a non-persistent buffer, a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("cache", torch.zeros(4, 6))
        self.register_buffer("scale", torch.tensor([2.0]), persistent=False)

    def forward(self, ids: Tensor, n: Tensor) -> Tensor:
        x = self.embedding(ids) * self.scale
        mask = torch.ones(4, 6)
        mask[:n, 1:3] = 0
        self.cache[n] = x[0]
        return self.head(x * mask + self.cache)


@needs_torch_mlir
@needs_iree
@pytest.mark.parametrize("weights", ["arguments", "inline"])
def test_masks_caches_and_weights(weights: Any) -> None:
    torch.manual_seed(0)
    model, twin = MaskAndCache(), MaskAndCache()
    twin.load_state_dict(model.state_dict())
    ids = torch.tensor([1, 10, 3, 4])
    prepared = nxfx.prepare(model, (ids, torch.tensor(2)))
    lowered = stablehlo.lower(prepared, weights=weights)
    assert lowered.watched()["scatter"] == 0 and lowered.watched()["dynamic-update-slice"] == 0
    assert lowered.arguments[-2:] == ("ids", "n")
    assert {n.replace("head", "embedding") for n in lowered.arguments[:-2]} == (
        {"embedding.weight", "cache", "scale"} if weights == "arguments" else set()
    )
    (call,) = prepared.captures.values()
    call.compiled = run_stablehlo.Program(lowered)
    if weights == "arguments":  # the buffer that the model writes is passed anew
        names = lowered.arguments[: len(lowered.weights)]
        program, held = call.compiled, {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
        call.compiled = lambda *inputs: program(*inputs, weights=[held[n] for n in names])
    for n in (1, 3, 0, 2)[: 4 if weights == "arguments" else 1]:
        with torch.no_grad():
            outcome = compare(twin(ids, torch.tensor(n)), prepared(ids, torch.tensor(n)), kind="close", max_abs=1e-5, signed_zeros=False)
        assert outcome.ok, outcome.mismatches
        assert torch.equal(twin.cache, model.cache)


# -- what is said about a program -------------------------------------------------------------------------------------------------


class TwoLines(nn.Module):
    def forward(self, x: Tensor, i: Tensor) -> Tensor:
        y = x.double().cumsum(0)  # >>> wide
        return torch.index_add(x, 0, i, x[:3]) + y.float()  # >>> scatter


def line(mark: str) -> int:
    return next(n for n, text in enumerate(Path(__file__).read_text().splitlines(), 1) if f"# >>> {mark}" in text)


@needs_torch_mlir
def test_what_is_left_is_traced_to_the_users_line() -> None:
    lowered = stablehlo.lower(prepared_of(TwoLines(), X, torch.tensor([0, 1, 1])))
    (scatter,) = (t for t in lowered.traces if t.what == "scatter")
    assert scatter.demanded and scatter.op == "aten.index_add.default" and scatter.location.line == line("scatter")
    assert {t.location.line for t in lowered.traces if t.what == "f64" and t.demanded} == {line("wide"), line("scatter")}
    assert all(t.location.file == __file__ for t in lowered.traces)
    assert lowered.watched()["scatter"] == scatter.count == 1 and lowered.types["f64"] > 0
    told = lowered.summary()
    assert "1 scatter by the graph: aten.index_add.default" in told and f":{line('scatter')}" in told


@needs_torch_mlir
def test_source_lines_and_argument_names_are_mlir_locations(tmp_path: Path) -> None:
    lowered = stablehlo.lower(prepared_of(TwoLines(), X, torch.tensor([0, 1, 1])))
    assert f'"{__file__}":{line("scatter")}:0' in lowered.text
    assert 'loc("x")' in lowered.text and 'loc("i")' in lowered.text
    lowered.write(tmp_path / "a.mlir")
    lowered.write(tmp_path / "a.mlirbc")
    assert (tmp_path / "a.mlir").read_text() == lowered.text
    assert (tmp_path / "a.mlirbc").read_bytes()[:4] == b"ML\xefR"


@needs_torch_mlir
@needs_iree
def test_bytecode_is_the_same_program() -> None:
    lowered = stablehlo.lower(prepared_of(lambda x: x.sin() + 2, X))
    assert torch.allclose(run_stablehlo.Program(lowered, lowered.bytecode)(X)[0], X.sin() + 2)


@needs_torch_mlir
def test_the_lowering_alone_is_told_apart() -> None:
    prepared = prepared_of(lambda x: torch.nn.functional.layer_norm(x * 0.5, (6,)), X)
    alone, ours = stablehlo.lower(prepared, as_is=True), stablehlo.lower(prepared)
    assert alone.types["f64"] > 0 and not any(t.demanded for t in alone.traces if t.what == "f64")
    assert wide(ours) == (0, 0)


@needs_torch_mlir
def test_the_model_and_its_graph_are_left_alone() -> None:
    prepared = prepared_of(lambda x, i: x[i].argmax(-1), X, AT)
    code, state = prepared.graph_module.code, [n.meta["val"].dtype for n in prepared.graph_module.graph.nodes if "val" in n.meta]
    first = stablehlo.lower(prepared).text
    assert stablehlo.lower(prepared).text == first
    assert prepared.graph_module.code == code
    assert [n.meta["val"].dtype for n in prepared.graph_module.graph.nodes if "val" in n.meta] == state


# -- refusals ---------------------------------------------------------------------------------------------------------------------


class Refused(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 2 + 1
        return torch.histc(y, 4).sum() + y.mean()  # >>> histc


@needs_torch_mlir
def test_a_refusal_names_the_op_and_the_line() -> None:
    with pytest.raises(LoweringError, match=rf"aten\.histc\.default at .*:{line('histc')}: return torch\.histc") as refused:
        stablehlo.lower(prepared_of(Refused(), X))
    assert refused.value.op == "aten.histc.default" and refused.value.location.line == line("histc")


class Both(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda y: y + 1, lambda y: y - 1, (x * 2,))


@needs_torch_mlir
def test_a_higher_order_op_is_named() -> None:
    with pytest.raises(LoweringError, match="cannot lower cond") as refused:
        stablehlo.lower(prepared_of(Both(), X))
    assert refused.value.op == "cond"


@needs_torch_mlir
def test_a_slice_write_to_the_end_is_refused_before_it_takes_all_memory() -> None:
    prepared = prepared_of(lambda x: torch.slice_scatter(x, x[1:] * 2, 0, 1, 2**63 - 1).cos(), X, pipeline="")
    with pytest.raises(LoweringError, match=rf"aten\.slice_scatter\.default at .*count up to the end of the slice, {2**63 - 1}"):
        stablehlo.lower(prepared, as_is=True)
    assert stablehlo.lower(prepared).ops["cosine"] == 1


@needs_torch_mlir
def test_a_refusal_without_a_word_is_found_by_bisection() -> None:
    def late(x: Tensor) -> Tensor:
        for _ in range(20):
            x = x.sin() + 1
        return torch.histc(x, 4) + x.cos().sum()

    flat = decompose(prepared_of(late, X).graph_module, mlir.decompositions())
    found = mlir._first_refused(flat.graph_module)
    assert found is not None and found.target is torch.ops.aten.histc.default


def test_only_graphs_are_lowered() -> None:
    with pytest.raises(UsageError, match="call nxfx.prepare first"):
        stablehlo.lower(nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no value"):
        stablehlo.lower(torch.fx.symbolic_trace(nn.Linear(2, 2)))
    with pytest.raises(PrepareError, match="nothing is captured"):
        stablehlo.lower(nxfx.prepare(nn.Linear(2, 2)))


def test_without_the_package_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    mlir.torch_mlir.cache_clear()
    monkeypatch.setitem(sys.modules, "torch_mlir.ir", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'nxfx\[stablehlo\]'"):
        stablehlo.lower(prepared_of(lambda x: x + 1, X))
    mlir.torch_mlir.cache_clear()
    xla.torch_xla.cache_clear()
    monkeypatch.setitem(sys.modules, "torch_xla", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'nxfx\[xla\]'"):
        xla.lower(prepared_of(lambda x: x + 1, X))
    xla.torch_xla.cache_clear()


# -- torch-xla --------------------------------------------------------------------------------------------------------------------


@pytest.mark.xla
@pytest.mark.parametrize("case", WRONG_ALONE)
def test_xla_gives_what_eager_gives(case: str) -> None:
    pytest.importorskip("torch_xla")
    fn, args = WRONG_ALONE[case]
    prepared = prepared_of(fn, *args)
    (call,) = prepared.captures.values()
    call.compiled = lambda *inputs: xla.run(prepared, inputs)
    outcome = compare(fn(*args), prepared(*args))
    assert outcome.ok, outcome.mismatches


@pytest.mark.xla
def test_xla_text_counts_and_arguments() -> None:
    pytest.importorskip("torch_xla")
    torch.manual_seed(0)
    model = MaskAndCache()
    ids = torch.tensor([1, 10, 3, 4])
    lowered = xla.lower(nxfx.prepare(model, (ids, torch.tensor(2))))
    assert lowered.text.startswith("HloModule") and lowered.dialect == "hlo"
    assert lowered.watched()["scatter"] == 0 and lowered.ops["dot"] == 1 and lowered.types["f64"] == 0
    assert {"embedding.weight", "cache", "scale", "ids", "n"} <= {n.replace("head", "embedding") for n in lowered.arguments}
    assert lowered.text.count(" parameter(") >= len(lowered.arguments)
    with pytest.raises(UsageError, match="no bytecode"):
        lowered.write("a.mlirbc")
    alone = xla.lower(prepared_of(lambda x, i: x[i], X, AT), as_is=True)
    assert alone.types["i64"] > 0 and xla.lower(prepared_of(lambda x, i: x[i], X, AT)).types["i64"] == 0


@pytest.mark.xla
def test_xla_operations_name_the_users_line() -> None:
    pytest.importorskip("torch_xla")
    alone = xla.lower(prepared_of(lambda x, i: x[i], X, AT), as_is=True)
    (here,) = {t.location.line for t in alone.traces}
    assert {(t.what, t.op, t.location.source) for t in alone.traces if t.what == "gather"} == {
        ("gather", "aten.index.Tensor", "alone = xla.lower(prepared_of(lambda x, i: x[i], X, AT), as_is=True)")
    }
    assert f'source_file="{__file__}" source_line={here}' in alone.text and "fx/interpreter.py" not in alone.text
    asked = xla.lower(prepared_of(lambda x: x * 2**40, torch.tensor([5, 3]), pipeline=""))
    assert {(t.op, t.demanded) for t in asked.traces if t.what == "i64"} == {("aten.mul.Tensor", True)}


@pytest.mark.xla
def test_xla_refuses_what_it_would_run_while_tracing() -> None:
    pytest.importorskip("torch_xla")
    with pytest.raises(LoweringError, match=rf"aten\.histc\.default at .*:{line('histc')}.*freezes the result") as refused:
        xla.lower(prepared_of(Refused(), X))
    assert refused.value.location.line == line("histc")
    assert torch.equal(xla.run(prepared_of(lambda x: x * 2, X))[0], X * 2)  # and goes on afterwards
