"""nxfx.verify: the three-way verdict, the op at fault, the pass at fault, tokens, files from a device, the certificate, the page."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from planted import Amplifier, ask, plant, small_models
from torch import Tensor, fx, nn

import nxfx
from nxfx.errors import UsageError
from nxfx.graph.builder import NodeBuilder
from nxfx.report import Kind
from nxfx.verification.judge import judge
from nxfx.verification.precision import HigherPrecision, Precision

aten = torch.ops.aten
FP64 = Precision(torch.float64)


# --- the reference ------------------------------------------------------------------------------------------------------


class Casts(nn.Module):
    """Rounds on purpose, in every way that a model writes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 9).reshape(3, 3))
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        h = x.bfloat16() @ self.weight.bfloat16()
        return torch.softmax(h.half(), -1, dtype=torch.float32) + torch.full((3,), 0.1, dtype=torch.bfloat16)


@pytest.mark.parametrize("captured", [True, False])
def test_the_reference_does_not_round_where_the_model_casts(captured: bool) -> None:
    model, x = Casts(), torch.randn(4, 3)
    wide = torch.softmax(x.double() @ model.weight.detach().double(), -1) + 0.1
    if captured:
        prepared = nxfx.prepare(model, (x,), pipeline="")
        (found, *_) = FP64.run(prepared.graph_module, prepared.example_inputs)
    else:
        with torch.no_grad(), HigherPrecision(FP64):
            found = model(x)
    assert found.dtype is torch.float64
    assert torch.allclose(found, wide, rtol=1e-14, atol=0)
    assert (model(x).double() - wide).abs().max() > 1e-5


def test_dropout_that_is_off_and_attention_run_in_high_precision() -> None:
    def attend(q: Tensor) -> Tensor:
        return nn.functional.dropout(nn.functional.scaled_dot_product_attention(q, q, q), 0.5, training=False)

    q = torch.randn(1, 2, 5, 8)
    report = nxfx.verify(attend, attend, (q,))
    assert report.ok
    assert 0 < report.outputs[0].model.max_abs < 1e-5  # type: ignore[union-attr]


# --- the verdict ----------------------------------------------------------------------------------------------------------


def test_a_prepared_model_passes_and_a_constant_shift_is_told_not_subtracted() -> None:
    model, args = small_models()["buckets"]
    assert nxfx.verify(model, None, args).ok
    report = nxfx.verify(model, lambda ids: model(ids) + 1e-3, args)
    assert not report.ok and not report
    assert "shift" in " ".join(report.outputs[0].notes)
    assert report.outputs[0].candidate.shift == pytest.approx(1e-3, rel=1e-2)  # type: ignore[union-attr]


def test_a_candidate_better_than_the_model_passes() -> None:
    def rounded(x: Tensor) -> Tensor:
        return (x.bfloat16() @ x.bfloat16()).float()

    x = torch.randn(16, 16)
    report = nxfx.verify(rounded, lambda x: x @ x, (x,))
    assert report.ok
    assert report.outputs[0].candidate.mean_abs < report.outputs[0].model.mean_abs / 50  # type: ignore[union-attr]


@pytest.mark.parametrize("special", [float("nan"), float("inf"), float("-inf")])
def test_one_nan_or_infinity_is_never_ignored(special: float) -> None:
    truth = torch.randn(100_000, dtype=torch.float64)
    candidate = truth.float()
    candidate[777] = special
    report = judge("output", truth, truth.float(), candidate)
    assert not report.ok
    assert "[777]" in report.problems[0]
    shared = truth.float()
    shared[777] = special
    assert judge("output", truth, shared, candidate).ok  # the model has it too
    assert judge("output", truth, shared, truth.float()).ok  # and the candidate need not


def test_one_wrong_element_in_a_hundred_thousand_fails() -> None:
    truth = torch.randn(100_000, dtype=torch.float64)
    candidate = truth.float()
    candidate[5] += 1e-4
    assert not judge("output", truth, truth.float(), candidate).ok


def test_top_k_errors_have_the_tolerances_of_logit_matching() -> None:
    truth = torch.linspace(0, 1, 2000, dtype=torch.float64)[None]
    candidate = truth.float()
    candidate[0, 0] += 0.04
    report = judge("logits", truth, truth.float(), candidate)
    assert [(t.k, t.tolerance, t.ok) for t in report.top_k] == [(5, 0.01, True), (50, 0.02, True), (1000, 0.03, True), (None, 0.05, True)]
    candidate[0, -3] += 0.02
    assert [t.ok for t in judge("logits", truth, truth.float(), candidate).top_k] == [False, True, True, True]


class _Counting(torch.nn.Module):
    def __init__(self, keep: bool = True) -> None:
        super().__init__()
        self.keep = keep
        self.register_buffer("total", torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total = self.total + x
        if self.keep:
            self.total.copy_(total)
        return total * 2


def test_what_only_one_side_writes_fails_or_is_told() -> None:
    x = torch.randn(4)
    for model, candidate, who in ((True, False, "the model"), (False, True, "the candidate")):
        report = nxfx.verify(_Counting(model), _Counting(candidate), (x,))
        assert not report.ok and _problems(report, "state.total") == [f"only {who} changes it"]

    opaque = _Counting()
    report = nxfx.verify(_Counting(), lambda x: opaque(x), (x,))
    assert report.ok and any("state.total is not compared" in note for note in report.notes)

    def destroys(x: torch.Tensor) -> torch.Tensor:
        result = _Counting(False)(x)
        x.zero_()
        return result

    report = nxfx.verify(_Counting(False), destroys, (x,))
    assert not report.ok and _problems(report, "argument.0") == ["only the candidate changes it"]


def _problems(report: nxfx.VerifyReport, path: str) -> list[str]:
    return next(o.problems for o in report.outputs if o.path == path)


def test_arrays_of_a_remote_function_count_as_tensors() -> None:
    model, x = torch.nn.Linear(4, 2).eval(), torch.randn(3, 4)
    assert nxfx.verify(model, lambda x: model(x).numpy(), (x,)).ok
    report = nxfx.verify(model, lambda x: model(x).numpy() + 1, (x,))
    assert not report.ok and report.outputs[0].problems


def test_state_and_arguments_are_outputs_too_and_are_put_back() -> None:
    class Counts(nn.Module):
        def __init__(self, step: float) -> None:
            super().__init__()
            self.register_buffer("total", torch.zeros(3))
            self.step = step

        def forward(self, x: Tensor) -> Tensor:
            self.total += x * self.step
            return x * 2

    model, x = Counts(1.0), torch.randn(3)
    assert nxfx.verify(model, None, (x,)).ok
    assert not model.total.any()
    report = nxfx.verify(model, Counts(3.0), (x,))
    assert [o.path for o in report.outputs if not o.ok] == ["state.total"]


def test_a_model_that_cannot_be_captured_is_still_judged() -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.exp() if x.sum() > 0 else x.sin().repeat(2)

    x = torch.rand(5)
    report = nxfx.verify(Branches(), lambda x: x.exp() * 1.01, (x,))
    assert not report.ok
    assert any("cannot be captured" in n for n in report.notes)
    assert nxfx.verify(Branches(), torch.exp, (x,)).ok


def test_a_candidate_that_raises_fails() -> None:
    def refuses(x: Tensor) -> Tensor:
        raise RuntimeError("device lost")

    report = nxfx.verify(torch.sin, refuses, (torch.randn(3),))
    assert not report.ok and "device lost" in report.problems[0]


# --- which line -----------------------------------------------------------------------------------------------------------

FAST = [("rotary", "round_positions", "cast"), ("rotary", "round_table", "rounded weight"), ("amplifier", "other_activation", "rewrite"),
        ("amplifier", "low_precision_matmul", "cast"), ("buckets", "wrap_integers", "integer wrap")]  # fmt: skip


@pytest.mark.parametrize(("model", "fault", "cause"), FAST)
def test_a_planted_fault_is_found_at_its_node_and_line(model: str, fault: str, cause: str) -> None:
    module, args = small_models()[model]
    verdict = ask(model, module, args, {}, fault)
    assert verdict is not None
    assert verdict.hit, str(verdict)
    assert verdict.cause == cause
    assert not verdict.ok


def test_a_layer_that_amplifies_is_not_blamed() -> None:
    model, x = Amplifier(norm=1e4).eval(), torch.randn(2, 32)
    prepared = nxfx.prepare(model, (x,))
    build = NodeBuilder(prepared.graph_module.graph, "planted")
    (gelu,) = prepared.graph_module.graph.find_nodes(op="call_function", target=aten.gelu.default)
    (large,) = gelu.users.keys() - {n for n in gelu.users if n.target is not aten.linear.default}
    with build.after(gelu):
        shifted = build.call(aten.add.Tensor, gelu, 1e-4)  # small, and large once the next layer has had it
    large.replace_input_with(gelu, shifted)
    prepared.graph_module.recompile()
    found = nxfx.verify(model, prepared, (x,), localise=True, bisect=False).localisation
    assert found is not None and found.first is not None
    assert found.first.node == shifted.name
    assert large.name not in [found.first.node, *(b.node for b in found.others)]


class Overflows(nn.Module):
    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times

    def forward(self, scores: Tensor, keep: Tensor) -> Tensor:
        bias = torch.where(keep, 0.0, torch.finfo(scores.dtype).min)
        bias = bias * self.times
        return torch.softmax(scores + bias, -1)


def test_a_masked_row_that_overflows_is_found_in_another_module() -> None:
    keep = torch.ones(4, 4, dtype=torch.bool)
    keep[2] = False
    report = nxfx.verify(Overflows(1), Overflows(2), (torch.randn(4, 4), keep))
    assert report.localisation is not None and report.localisation.first is not None
    assert report.localisation.first.cause == "mask overflow"
    assert report.localisation.first.location.source == "bias = bias * self.times"


class Positions(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.register_buffer("inv_freq", 10000.0 ** (-torch.arange(0, 8).float() / 8), persistent=False)

    def forward(self, positions: Tensor) -> Tensor:
        angles = positions.to(self.dtype).float()[:, None] * self.inv_freq
        return angles.cos()


def test_a_cast_that_only_the_candidate_writes_is_found_by_aligning_the_graphs() -> None:
    report = nxfx.verify(Positions(torch.float32), Positions(torch.bfloat16), (torch.arange(3000, 3064),))
    assert not report.ok
    first = report.localisation.first  # type: ignore[union-attr]
    assert first is not None and first.cause == "cast"
    assert "positions.to(self.dtype)" in first.location.source


def test_a_rewritten_clean_model_blames_nobody() -> None:
    class Writes(nn.Module):
        def forward(self, x: Tensor, n: Tensor) -> Tensor:
            mask = torch.ones(4, 6)
            mask[:2, :n] = 0
            hidden = torch.where(x > 0, x.log(), -1.0)
            return hidden * mask + torch.arange(6).bfloat16().cos().float()

    x = torch.randn(4, 6)
    report = nxfx.verify(Writes(), None, (x, torch.tensor(3)), localise=True)
    assert report.ok
    assert report.localisation.first is None  # type: ignore[union-attr]
    assert report.localisation.unmatched > 0  # type: ignore[union-attr]


@pytest.mark.slow
def test_thirty_faults_in_ten_models_and_nobody_blamed_in_twenty_clean_ones() -> None:
    from planted import clean_set, planted_set

    verdicts = planted_set()
    assert len(verdicts) >= 30
    assert sum(v.hit for v in verdicts) >= len(verdicts) - len(verdicts) // 30, "\n".join(map(str, verdicts))
    blamed = {name: first for name, first in clean_set().items() if first is not None}
    assert not blamed


# --- which pass -----------------------------------------------------------------------------------------------------------


class AddForMul(nxfx.Pass):
    """A third-party pass with a bug: products of two tensors become sums."""

    name = "add-for-mul"
    targets = frozenset({aten.mul.Tensor})

    def run(self, graph_module: fx.GraphModule, context: nxfx.PassContext) -> nxfx.PassResult:
        result = nxfx.PassResult()
        build = NodeBuilder(graph_module.graph, self.name)
        for node in list(graph_module.graph.find_nodes(op="call_function", target=aten.mul.Tensor)):
            if all(isinstance(a, fx.Node) for a in node.args):
                with build.before(node):
                    node.replace_all_uses_with(build.call(aten.add.Tensor, *node.args))
                result.rewrites.append(self.rewrite(node, "wrong.product", Kind.EXACT, "mul", "add"))
                graph_module.graph.erase_node(node)
                result.changed = True
        return result


class Gated(nn.Module):
    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        shifted = x + ids.sum() * 0.1
        gate = torch.sigmoid(shifted)
        return (gate * shifted).tanh()


GATED = (torch.randn(4, 6), torch.arange(6))


def test_a_wrong_rewrite_is_bisected_to_its_pass_node_and_record() -> None:
    pipeline = nxfx.Pipeline.default().with_pass(AddForMul, before="check-constraints")
    prepared = nxfx.prepare(Gated(), GATED, pipeline=pipeline)
    report = nxfx.verify(Gated(), prepared, GATED)
    found = report.bisection
    assert found is not None
    assert (found.pass_name, found.pipeline) == ("add-for-mul", "add-for-mul")
    assert found.first is not None and found.first.op == "aten.add.Tensor"
    assert found.first.made_by == "add-for-mul"
    assert found.first.location.source == "return (gate * shifted).tanh()"
    assert found.rewrite is not None and found.rewrite.rule == "wrong.product"
    assert report.localisation.first.node == found.first.node  # type: ignore[union-attr]
    assert "add-for-mul" in str(report)


def test_a_certificate_that_fails_raises_with_a_reproducer_that_shows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NXFX_REPRODUCER_DIR", str(tmp_path))
    with pytest.raises(nxfx.PrepareError, match="differs from the model on the example") as caught:
        nxfx.prepare(Gated(), GATED, pipeline=nxfx.Pipeline.default().with_pass(AddForMul), verify=True)
    assert "add-for-mul" in str(caught.value) and "test_verify.py" in str(caught.value)
    assert caught.value.report is not None and caught.value.report.certificate is not None
    assert caught.value.report.certificate.status == "failed"
    (script,) = tmp_path.glob("*/reproduce.py")
    assert str(script) in str(caught.value)
    root = Path(nxfx.__file__).parents[1]
    environment = {"PYTHONPATH": f"{root}:{root / 'tests'}", "PATH": ""}
    ran = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment, timeout=120)
    assert ran.returncode != 0
    assert "changes what the graph computes" in ran.stderr


# --- the certificate ------------------------------------------------------------------------------------------------------


def test_a_certificate_says_what_was_run_and_is_saved_with_the_graph(tmp_path: Path) -> None:
    length = torch.export.Dim("length", min=0, max=64)

    class Masks(nn.Module):
        def forward(self, x: Tensor, ids: Tensor) -> Tensor:
            mask = torch.ones(x.shape[0], 6)
            mask[:, 2:4] = 0
            return x * mask + ids.bfloat16().float()[:, None]

    args = (torch.randn(5, 6), torch.arange(5))
    prepared = nxfx.prepare(Masks(), args, verify=True, ranges={"ids": (0, 4000)}, dynamic_shapes={"x": {0: length}, "ids": {0: length}})
    certificate = prepared.report.certificate
    assert certificate is not None and certificate.status == "passed"
    outcomes = {c.name: c.outcome for c in certificate.cases}
    assert {"example", "random values", "lowest values", "highest values", "nan and infinities", "size 1", "one more"} <= outcomes.keys()
    refused = {name for name, outcome in outcomes.items() if outcome == "refused at the boundary"}
    assert refused <= {"size 0", "size 1"}  # torch.export keeps a dynamic size above one
    assert {outcome for name, outcome in outcomes.items() if name not in refused} <= {"equal", "within noise"}
    assert certificate.classes["exact"]["rewrites"] >= 1 and certificate.classes["exact"]["comparisons"] >= 7
    assert "Certificate: passed" in str(prepared.report)
    prepared.save(tmp_path / "masks.pt2")
    assert nxfx.load(tmp_path / "masks.pt2").report.certificate == certificate


def test_what_the_example_does_not_show_is_found_on_generated_inputs() -> None:
    class Clamp(nxfx.Pass):
        name = "clamp-everything"

        def run(self, graph_module: fx.GraphModule, context: nxfx.PassContext) -> nxfx.PassResult:
            build = NodeBuilder(graph_module.graph, self.name)
            result = nxfx.PassResult()
            for node in graph_module.graph.find_nodes(op="call_function", target=aten.relu.default):
                with build.before(node):
                    node.replace_all_uses_with(build.call(aten.clamp.default, node.args[0], 0.0, 5.0))
                graph_module.graph.erase_node(node)
                result.changed = True
            return result

    pipeline = nxfx.Pipeline([Clamp])
    nxfx.prepare(nn.ReLU(), (torch.rand(9),), pipeline=pipeline)
    with pytest.raises(nxfx.PrepareError, match="inputs of the kind"):
        nxfx.prepare(nn.ReLU(), (torch.rand(9),), pipeline=pipeline, verify=True)


def test_a_model_without_weights_is_not_certified_and_says_so() -> None:
    with torch.device("meta"):
        model = nn.Linear(4, 4)
    prepared = nxfx.prepare(model, (torch.empty(2, 4, device="meta"),), verify=True)
    certificate = prepared.report.certificate
    assert certificate is not None and certificate.status == "not run" and "meta" in certificate.reason
    with pytest.raises(UsageError, match="example arguments"):
        nxfx.prepare(nn.Linear(4, 4), verify=True)


# --- tokens ---------------------------------------------------------------------------------------------------------------


class Tiny(nn.Module):
    """A causal model over token ids: gives logits."""

    def __init__(self, sharpness: float = 4.0) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed, self.head = nn.Embedding(64, 32), nn.Linear(32, 64)
        self.sharpness = sharpness

    def forward(self, input_ids: Tensor) -> Tensor:
        seen = self.embed(input_ids).cumsum(1) / torch.arange(1, input_ids.shape[1] + 1)[:, None]
        return self.head(seen) * self.sharpness


def test_tokens_of_equal_models_match() -> None:
    report = nxfx.verify(Tiny(), Tiny(), {"input_ids": torch.arange(10).reshape(2, 5)}, tokens=6)
    assert report.ok and report.tokens is not None
    assert report.tokens.status == "No divergence"
    assert report.tokens.candidate == report.tokens.expected
    assert [len(row) for row in report.tokens.expected] == [6, 6]


def test_a_divergence_has_its_index_and_difference() -> None:
    model, other = Tiny(), Tiny()
    prompt = torch.arange(5)[None]
    golden = nxfx.verify(model, Tiny(), (prompt,), tokens=4).tokens
    assert golden is not None
    with torch.no_grad():
        other.head.bias[golden.expected[0][2]] -= 100  # that token is never given again
    report = nxfx.verify(model, other, (prompt,), tokens=4, localise=False)
    assert report.tokens is not None and not report.ok
    assert report.tokens.greedy[0].index <= 2 and not report.tokens.greedy[0].near_tie
    assert report.tokens.status.startswith("Divergence at index")
    assert report.tokens.teacher_forced[0].expected == golden.expected[0][report.tokens.teacher_forced[0].index]


def test_a_near_tie_is_no_fault() -> None:
    class Tie(nn.Module):
        def __init__(self, favour: int) -> None:
            super().__init__()
            self.favour = favour

        def forward(self, ids: Tensor) -> Tensor:
            logits = torch.zeros(*ids.shape, 8)
            logits[..., 1:3] = 5.0
            logits[..., self.favour] += 1e-4
            return logits

    report = nxfx.verify(Tie(1), Tie(2), (torch.zeros(1, 3, dtype=torch.int64),), tokens=2, localise=False)
    assert report.tokens is not None
    assert report.tokens.teacher_forced and all(d.near_tie for d in report.tokens.teacher_forced)
    assert "near ties" in report.tokens.status


def test_tokens_of_a_model_that_sees_what_follows_are_refused() -> None:
    class Sees(Tiny):
        def forward(self, input_ids: Tensor) -> Tensor:
            return super().forward(input_ids.flip(1))

    with pytest.raises(UsageError, match="causal"):
        nxfx.verify(Sees(), Sees(), (torch.arange(5)[None],), tokens=2)


# --- auto-cast --------------------------------------------------------------------------------------------------------------


def test_autocast_lists_what_each_matmul_loses() -> None:
    model, args = small_models()["rotary"]
    report = nxfx.verify(model, None, args, autocast="matmult")
    assert not report.ok  # bf16 products against an fp32 model's own noise
    assert len(report.matmuls) == 6
    assert report.matmuls == sorted(report.matmuls, key=lambda m: -m.loss)
    assert all(2**-11 < m.loss < 2**-6 and m.own < 2**-20 for m in report.matmuls)
    assert nxfx.verify(model, None, args, autocast="none").ok
    assert report.matmuls[0].location.file.endswith("planted.py")


# --- from a device ------------------------------------------------------------------------------------------------------------


def test_saved_outputs_are_a_candidate(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2)), torch.randn(3, 4)
    value = model(x).detach()
    torch.save(value, tmp_path / "out.pt")
    numpy.savez(tmp_path / "out.npz", logits=value.numpy())
    assert nxfx.verify(model, tmp_path / "out.pt", (x,)).ok
    report = nxfx.verify(model, str(tmp_path / "out.npz"), (x,))
    assert report.ok and "compared in order" in report.notes[0]
    torch.save(value + 1, tmp_path / "out.pt")
    assert not nxfx.verify(model, tmp_path / "out.pt", (x,)).ok
    with pytest.raises(UsageError, match="no such file"):
        nxfx.verify(model, tmp_path / "nothing.pt", (x,))


@pytest.mark.parametrize("naming", ["nodes", "modules", "nxdi"])
def test_captured_tensors_localise_a_device(naming: str, tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2)).eval(), torch.randn(3, 4)
    with torch.no_grad():
        first = model[0](x)
        second = nn.functional.gelu(first, approximate="tanh")  # the device's own gelu
        third = model[2](second)
    values = {"nodes": ("linear", "gelu", "linear_1"), "modules": ("0", "1", "2"), "nxdi": ("0", "1", "2")}[naming]
    captures: Any = dict(zip(values, (first, second, third), strict=True))
    if naming == "nxdi":
        for name, tensor in captures.items():
            torch.save(tensor, tmp_path / f"captured_tensors_cte_step_1_module_{name}_output.pt")
        captures = tmp_path
    report = nxfx.verify(model, third, (x,), captures=captures)
    assert not report.ok
    assert report.localisation is not None and report.localisation.first is not None
    assert report.localisation.first.node == "gelu"
    assert not report.localisation.others  # what follows is explained by what it was given


def test_captures_that_fit_nothing_are_told() -> None:
    with pytest.raises(UsageError, match="fit no node"):
        nxfx.verify(nn.ReLU(), torch.zeros(3), (torch.ones(3),), captures={"no_such_layer": torch.zeros(3)})


# --- the page ---------------------------------------------------------------------------------------------------------------

HOSTILE = "<img src=x onerror=document.title='hacked'>\"'&</script><script>document.title='hacked'</script>"


@pytest.fixture(scope="module")
def failing() -> nxfx.VerifyReport:
    module, args = small_models()["buckets"]
    planted = plant(module, args, {}, "wrong_scalar")
    assert planted is not None
    for node in planted[0].graph_module.graph.nodes:  # a hostile file name behind every node
        if "stack_trace" in node.meta:
            node.meta["stack_trace"] = f'  File "/models/{HOSTILE.replace(chr(34), "")}.py", line 3, in forward\n    {HOSTILE}\n'
    report = nxfx.verify(module, planted[0], args, bisect=False)
    report.model = HOSTILE
    return report


def test_the_page_is_self_contained_and_escapes(failing: nxfx.VerifyReport) -> None:
    page = failing.to_html()
    assert "<img" not in page and page.count("<script>") == 1
    assert "http" not in page.replace("http-equiv", "")
    assert "&lt;img src=x" in page and "<svg" in page
    json.loads(failing.to_json())


def test_the_page_renders_in_a_browser_without_script_errors(failing: nxfx.VerifyReport, tmp_path: Path) -> None:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    if browser is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("NO BROWSER: no chromium or chrome on the PATH, so the page was not rendered")
    file = tmp_path / "report.html"
    failing.save_html(file)
    probe = "<script>window.addEventListener('error', function (e) { document.documentElement.dataset.error = e.message; });</script>"
    click = (
        "<script>document.querySelector('.g span').click();"
        "document.documentElement.dataset.lit = document.querySelectorAll('.g span.on').length;"
        "document.documentElement.dataset.images = document.images.length;"
        "document.documentElement.dataset.wide = document.querySelector('svg').getBoundingClientRect().width > 100;"
        "document.documentElement.dataset.fits = document.documentElement.scrollWidth <= window.innerWidth;</script>"
    )
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace("<title>", probe + "<title>", 1).replace("</body>", click + "</body>", 1), encoding="utf-8")
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync", "--window-size=1300,900", f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=2000")  # fmt: skip
    ran = subprocess.run([browser, *flags, "--dump-dom", file.as_uri()], capture_output=True, text=True, timeout=120)
    head = ran.stdout[: ran.stdout.index("<head>")]
    assert "data-error" not in head
    assert 'data-lit="2"' in head and 'data-images="0"' in head and 'data-wide="true"' in head and 'data-fits="true"' in head
    assert "<title>FAIL: &lt;img" in ran.stdout  # had the page run what it shows, this would be another
