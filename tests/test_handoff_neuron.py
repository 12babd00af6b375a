"""``nxfx.trace`` on the contract double of the legacy torch_neuronx, which executes the graph (on torch-xla where it is there)."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import io
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import doubles
import pytest
import torch
from doubles import legacy
from doubles.execution import HAS_XLA
from torch import nn

import nxfx
from nxfx.handoff.flags import merge_flags
from nxfx.verification.equivalence import compare

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def torch_neuronx() -> Iterator[Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    legacy.calls.clear()
    with doubles.installed("torch_neuronx") as double:
        yield double
    torch.set_num_threads(threads)


def assert_same(expected: Any, actual: Any) -> None:
    """Equal bits on the CPU; XLA rounds matmuls in another order."""
    outcome = compare(expected, actual, **({"kind": "close", "max_abs": 1e-5, "signed_zeros": False} if HAS_XLA else {"kind": "exact"}))
    assert outcome, str(outcome)


class Cached(nn.Module):
    """One decoding step: writes a token into buffers and attends over them."""

    keys: torch.Tensor
    written: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.project = nn.Linear(8, 16, bias=False)
        self.register_buffer("keys", torch.randn(2, 16, 16))
        self.register_buffer("written", torch.zeros(16, dtype=torch.int64))

    def forward(self, x: torch.Tensor, position: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        token = self.project(x)
        self.keys[:, position : position + 1] = token
        self.written[position] += 1
        return (self.keys @ token.transpose(1, 2)).sum(-1), self.written.cumsum(0)


class Passed(nn.Module):
    """The same cache as an argument."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.project = nn.Linear(8, 16, bias=False)

    def forward(self, x: torch.Tensor, cache: dict[str, torch.Tensor], position: torch.Tensor, scale: float = 2.0) -> torch.Tensor:
        cache["keys"][:, position : position + 1] = self.project(x) * scale
        return cache["keys"].sum(-1)


@torch.no_grad()
@pytest.mark.parametrize("returns_aliased", [False, True], ids=["aliased-dropped", "aliased-returned"])
def test_a_cache_in_buffers_is_updated_in_place_through_aliases_over_ten_steps(torch_neuronx: Any, returns_aliased: bool) -> None:
    legacy.returns_aliased = returns_aliased
    try:
        model, eager = Cached(), Cached()
        traced = nxfx.trace(model, (torch.randn(2, 1, 8), torch.tensor(0)), target="trn1", ranges={"position": (0, 15)})
    finally:
        legacy.returns_aliased = False
    (call,) = legacy.calls
    held = dict(call["func"].named_buffers())
    assert {name for name, t in held.items() if any(t is key for key in call["aliases"])} == {"keys", "written"}
    assert not any(t.dtype == torch.int64 for t in call["example_inputs"])
    for step in range(10):
        x = torch.randn(2, 1, 8)
        assert_same(eager(x, torch.tensor(step)), traced(x, torch.tensor(step)))
    assert_same(Cached().keys, model.keys)  # the state is the compiled graph's, from the trace on


@torch.no_grad()
def test_saved_with_torch_jit_save_it_keeps_state_checks_and_dtypes(tmp_path: Path) -> None:
    eager = Cached()
    traced = nxfx.trace(Cached(), (torch.randn(2, 1, 8), torch.tensor(0)), target="trn1", ranges={"position": (0, 15)})
    torch.jit.save(traced, str(tmp_path / "step.pt"))
    buffer = io.BytesIO()
    torch.jit.save(traced, buffer)
    buffer.seek(0)
    for loaded in (torch.jit.load(str(tmp_path / "step.pt")), torch.jit.load(buffer)):
        reference = copy.deepcopy(eager)
        for step in range(3):
            x = torch.randn(2, 1, 8)
            assert_same(reference(x, torch.tensor(step)), loaded(x=x, position=torch.tensor(step)))
        with pytest.raises(Exception, match=re.escape("input 'position': a value lies outside [0, 15], found 16 to 16")):
            loaded(torch.randn(2, 1, 8), torch.tensor(16))
        with pytest.raises(Exception, match=re.escape("compiled for x: float32[2, 1, 8], position: int64[]")):
            loaded(torch.randn(2, 2, 8), torch.tensor(1))


@torch.no_grad()
def test_a_cache_passed_as_argument_becomes_state_and_is_left_out_of_calls() -> None:
    eager, cache = Passed(), {"keys": torch.randn(2, 16, 16)}
    example = (torch.randn(2, 1, 8), copy.deepcopy(cache), torch.tensor(0))
    traced = nxfx.trace(Passed(), example, target="trn1", state_inputs=["cache"])
    for step in range(10):
        x = torch.randn(2, 1, 8)
        assert_same(eager(x, cache, torch.tensor(step)), traced(x, position=torch.tensor(step)))
    with pytest.raises(nxfx.UsageError, match=r"'cache' became the compiled graph's own state: leave it out; the call is \(x"):
        traced(x, cache=cache, position=torch.tensor(1))
    loaded = torch.jit.load(_saved(traced))
    assert loaded(x, torch.tensor(3)).shape == (2, 16)


class _Window:
    """A cache that keeps its length as a Python integer."""

    def __init__(self) -> None:
        self.keys, self.seen = torch.zeros(4, 8), 0

    def push(self, x: torch.Tensor) -> torch.Tensor:
        self.keys[self.seen % 4] = x
        self.seen += 1
        return self.keys.sum(0) * self.seen


class _Sliding(torch.nn.Module):
    def forward(self, x: torch.Tensor, cache: _Window) -> torch.Tensor:
        return cache.push(x)


@torch.no_grad()
def test_a_cache_that_counts_in_python_is_told_and_does_not_become_state() -> None:
    """With the cache left out of calls nobody would see that its count is another one than at capture."""
    prepared = nxfx.prepare(_Sliding(), (torch.randn(8), _Window()))
    (finding,) = [f for f in prepared.report.findings if f.code == "NX406"]
    assert "cache.seen" in finding.message and finding.location.source == "self.seen += 1"
    eager, own, theirs = _Sliding(), _Window(), _Window()
    for _ in range(6):
        x = torch.randn(8)
        assert torch.equal(eager(x, theirs), prepared(x, own)) and own.seen == theirs.seen
    with pytest.raises(nxfx.PrepareError, match=r"(?s)counts in Python.*cache\.seen.*self\.seen \+= 1"):
        nxfx.trace(_Sliding(), (torch.randn(8), _Window()), target="trn1", state_inputs=["cache"])


def _saved(traced: Any) -> io.BytesIO:
    buffer = io.BytesIO()
    torch.jit.save(traced, buffer)
    buffer.seek(0)
    return buffer


@torch.no_grad()
def test_an_argument_that_forward_writes_and_that_is_no_state_is_written_back() -> None:
    eager, cache, own = Passed(), {"keys": torch.zeros(2, 16, 16)}, {"keys": torch.zeros(2, 16, 16)}
    traced = nxfx.trace(Passed(), (torch.randn(2, 1, 8), copy.deepcopy(cache), torch.tensor(0)), target="trn1")
    for step in range(3):
        x = torch.randn(2, 1, 8)
        assert_same(eager(x, cache, torch.tensor(step)), traced(x, own, torch.tensor(step)))
        assert_same(cache, own)


@dataclasses.dataclass
class Result:
    ids: torch.Tensor
    scores: dict[str, torch.Tensor]
    given: torch.Tensor


class Nested(nn.Module):
    def forward(self, batch: dict[str, torch.Tensor], *, factor: int = 3) -> Result:
        total = batch["ids"].sum(-1) * factor
        wide = batch["weights"].double() * 2
        return Result(total, {"wide": wide, "half": batch["weights"].bfloat16()}, batch["ids"])


def _batch(rows: int = 2) -> dict[str, torch.Tensor]:
    return {"ids": torch.randint(0, 100, (rows, 5)), "weights": torch.randn(rows, 3)}


@torch.no_grad()
def test_called_like_the_model_structure_dtypes_and_identity() -> None:
    example = _batch()
    traced = nxfx.trace(Nested(), (example,), {"factor": 4}, target="trn1", ranges={"batch_ids": (0, 99)})
    batch = _batch()
    expected, actual = Nested()(batch, factor=4), traced(batch, factor=4)
    assert isinstance(actual, Result) and actual.given is batch["ids"]
    assert_same([expected.ids, expected.scores], [actual.ids, actual.scores])
    with pytest.raises(nxfx.RangeError, match="'batch_ids'"):
        traced({**batch, "ids": batch["ids"] + 2**40}, factor=4)
    with pytest.raises(nxfx.UsageError, match="another structure or Python value"):
        traced(batch, factor=5)


class Product(nn.Module):
    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a * (b + 1)


class Grow(nn.Module):
    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        a += 1
        return a * b


def test_one_tensor_given_twice_is_two_inputs() -> None:
    x, y = torch.randn(3), torch.randn(3)
    for example in ((x, x), (x, y)):
        traced = nxfx.trace(Product(), example, target="trn1")
        assert_same(x * (y + 1), traced(x, y))
        assert_same(y * (y + 1), traced(y, y))
    grow = nxfx.trace(Grow(), (x.clone(), y), target="trn1")
    with pytest.raises(nxfx.UsageError, match="one tensor is passed twice, and the model writes"):
        grow(x, x)


class Embed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.table = nn.Embedding(50, 4)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        found = self.table(ids).sum(1)
        return found if mask is None else found * mask


@torch.no_grad()
def test_buckets_one_capture_each_over_the_same_weights(tmp_path: Path) -> None:
    model = Embed()
    traced = nxfx.trace(model, [(torch.randint(50, (2, n)),) for n in (4, 8)], target="trn1", compiler_workdir=tmp_path)
    first, second = legacy.calls
    assert first["func"].get_parameter("table.weight") is second["func"].get_parameter("table.weight") is model.table.weight
    assert [Path(c["compiler_workdir"]).name for c in legacy.calls] == ["bucket_0", "bucket_1"]
    loaded = torch.jit.load(_saved(traced))
    for n in (8, 4):
        ids = torch.randint(50, (2, n))
        assert_same(model(ids), traced(ids))
        assert_same(model(ids), loaded(ids))
    with pytest.raises(nxfx.UsageError, match=re.escape("compiled for (int64[2, 4]); (int64[2, 8]); this call has (int64[2, 9])")):
        traced(torch.randint(50, (2, 9)))
    with pytest.raises(nxfx.PrepareError, match="2 buckets have a report each"):
        _ = traced.report


def test_buckets_of_other_keywords_share_the_arguments() -> None:
    ids = torch.randint(50, (2, 4))
    traced = nxfx.trace(Embed(), (ids,), [{}, {"mask": torch.ones(2, 4)}], target="trn1")
    with torch.no_grad():
        mask = torch.rand(2, 4)
        assert_same(Embed()(ids, mask), traced(ids, mask=mask))
        assert_same(Embed()(ids), traced(ids))
    with pytest.raises(nxfx.PrepareError, match="buckets differ in their inputs"):
        traced.script()


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: nxfx.trace(Cached(), [(torch.randn(2, 1, 8), torch.tensor(0)), (torch.randn(2, 1, 8), torch.tensor(1))], target="trn1"),
         nxfx.PrepareError, "each bucket would keep a state of its own"),
        (lambda: nxfx.trace(Embed(), [(torch.ones(2, 4, dtype=torch.int64),)] * 2, target="trn1"), nxfx.UsageError, "bucket 1 has the shapes of bucket 0"),
        (lambda: nxfx.trace(Embed(), (torch.ones(2, 4, dtype=torch.int64),), target="trn1", dynamic_shapes={"ids": {1: torch.export.Dim("n", min=2, max=9)}}),
         nxfx.PrepareError, "Neuron compiles fixed shapes"),
        (lambda: nxfx.trace(Counting(), (torch.ones(2),), target="trn1"), nxfx.PrepareError, r"(?s)'calls'.*self\.calls \+= 1"),
        (lambda: nxfx.trace(Embed(), (torch.ones(2, 4, dtype=torch.int64),), target="trn1", input_output_aliases={torch.ones(3): 0}),
         nxfx.UsageError, "neither a parameter or buffer of the model nor state"),
        (lambda: nxfx.trace(Branches(), (torch.ones(2), torch.tensor(1)), target="trn1"), nxfx.PrepareError, r"(?s)would freeze.*return torch\.cond"),
        (lambda: nxfx.trace(Embed(), ["ids"], target="trn1"), nxfx.UsageError, "a tuple, or a list of tuples"),
    ],
    ids=["state-in-buckets", "same-bucket-twice", "dynamic", "python-state", "alias-of-nothing", "cond", "no-tuple"],
)  # fmt: skip
def test_refused_with_what_to_write_instead(call: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()


class Branches(nn.Module):
    def forward(self, x: torch.Tensor, flag: torch.Tensor) -> torch.Tensor:
        return torch.cond(flag > 0, lambda a: a + 1, lambda a: a * 2, (x,))


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x * float(self.calls)


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.position = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        start, self.position = self.position, self.position + x.shape[0]
        return x + torch.arange(start, self.position)


def test_a_counter_of_the_model_becomes_state_of_the_traced_module() -> None:
    model = Positions()
    model.position = 4
    traced = nxfx.trace(model, (torch.zeros(3),), target="trn1")
    assert [traced(torch.zeros(3)).tolist() for _ in range(2)] == [[4, 5, 6], [7, 8, 9]]


def test_aliases_are_checked_against_the_outputs() -> None:
    model = Cached()
    example = (torch.randn(2, 1, 8), torch.tensor(0))
    with pytest.raises(nxfx.UsageError, match=r"'keys' is torch.float32 \[2, 16, 16\], output 0 is torch.float32 \[2, 16\]"):
        nxfx.trace(model, example, target="trn1", input_output_aliases={model.keys: 0})
    with pytest.raises(nxfx.UsageError, match="the graph has 4 outputs"):
        nxfx.trace(model, example, target="trn1", input_output_aliases={model.keys: 9})
    traced = nxfx.trace(model, example, target="trn1", input_output_aliases={model.keys: 2})
    assert not [f for f in traced.report.findings if f.code == "NX550"]


def test_the_graph_is_handed_on_without_a_device_and_without_assertions() -> None:
    nxfx.trace(Cached(), (torch.randn(2, 1, 8), torch.tensor(0)), target="trn1")
    graph = legacy.calls[0]["func"].graph
    assert not [n for n in graph.nodes if any(isinstance(a, torch.device) for a in (*n.args, *n.kwargs.values()))]
    assert not graph.find_nodes(op="call_function", target=torch.ops.aten._assert_tensor_metadata.default)
    moved = legacy.calls[0]["func"].to("meta")
    outputs = moved(*(t.to("meta") for t in legacy.calls[0]["example_inputs"]))
    assert {t.device.type for t in outputs} == {"meta"}


def test_moving_what_was_handed_on_does_not_move_the_model() -> None:
    model = Cached()
    nxfx.trace(model, (torch.randn(2, 1, 8), torch.tensor(0)), target="trn1")
    legacy.calls[0]["func"].to("meta")
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"cpu"}


def test_weights_that_can_be_replaced_later_prove_nothing() -> None:
    """inline_weights_to_neff=False: a buffer's present values must not become a premise."""

    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("steps", torch.arange(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sum() + self.steps.to(torch.bfloat16)

    inlined = nxfx.trace(Table(), (torch.ones(4),), target="trn1")
    assert "steps" in {p.source for p in inlined.report.premises}
    replaceable = nxfx.trace(Table(), (torch.ones(4),), target="trn1", inline_weights_to_neff=False)
    assert not replaceable.report.premises
    assert legacy.calls[1]["inline_weights_to_neff"] is False


# -- flags ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "flags", "conflicts"),
    [
        (None, ["--auto-cast=none"], 0),
        ("--model-type=transformer -O1", ["--auto-cast=none", "--model-type=transformer", "-O1"], 0),
        (["--auto-cast=none"], ["--auto-cast=none"], 0),
        ("--auto-cast none", ["--auto-cast", "none"], 0),
        ("--auto-cast=all", ["--auto-cast=all"], 1),
        (["--auto-cast", "matmult"], ["--auto-cast", "matmult"], 1),
        ("--auto-cast=all --auto-cast=none", ["--auto-cast=all", "--auto-cast=none"], 0),
        ("--auto-cast-type=bf16", ["--auto-cast=none", "--auto-cast-type=bf16"], 0),
    ],
)
def test_flags_the_users_win_and_contradictions_are_told(wanted: Any, flags: list[str], conflicts: int) -> None:
    merged, findings = merge_flags({"--auto-cast=none": "fp32 matmuls"}, wanted)
    assert merged == flags
    assert [f.code for f in findings] == ["NX550"] * conflicts
    assert all("--auto-cast" in f.message and "fp32 matmuls" in f.message for f in findings)


def test_flags_reach_the_compiler_and_the_report() -> None:
    example = (torch.randn(2, 1, 8), torch.tensor(0))
    traced = nxfx.trace(Cached(), example, target="trn1", sdk="2.26", compiler_args="--auto-cast=all", cpu_backend=True)
    assert legacy.calls[0]["compiler_args"] == traced.compiler_args
    assert "--auto-cast=all" in traced.compiler_args and "--target=trn1" in traced.compiler_args
    assert [f.code for f in traced.report.findings if f.code == "NX550"] == ["NX550"]


# -- failures and detection -----------------------------------------------------------------------------------------------------


def test_a_failing_compile_names_the_users_line(torch_neuronx: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(func: Any, example_inputs: Any, **options: Any) -> Any:
        node = func.graph.find_nodes(op="call_function", target=torch.ops.aten.cumsum.default)[0]
        raise RuntimeError(f"neuronx-cc: [NCC_EVRF001] cannot lower %{node.name}")

    monkeypatch.setattr(torch_neuronx, "trace", refuse)
    with pytest.raises(nxfx.CompilerError, match=r"(?s)NCC_EVRF001.*aten\.cumsum.*test_handoff_neuron\.py:\d+: return .*self\.written\.cumsum\(0\)"):
        nxfx.trace(Cached(), (torch.randn(2, 1, 8), torch.tensor(0)), target="trn1")


def test_an_op_that_raises_while_it_is_traced_is_named_too(torch_neuronx: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_on_other_shapes(func: Any, example_inputs: Any, **options: Any) -> Any:
        return func(torch.randn(2, 1, 9), *example_inputs[1:])

    monkeypatch.setattr(torch_neuronx, "trace", run_on_other_shapes)
    with pytest.raises(nxfx.CompilerError, match=r"(?s)aten\.linear.*token = self\.project\(x\)"):
        nxfx.trace(Cached(), (torch.randn(2, 1, 8), torch.tensor(0)), target="trn1")


def test_the_double_takes_what_the_documentation_says() -> None:
    """NEURON.md, "Entry points"."""
    documented = (
        "(func, example_inputs, *_, input_output_aliases={}, compiler_workdir=None, compiler_args=None, partitioner_config=None, "
        "inline_weights_to_neff=True, cpu_backend=False)"
    )
    signature = inspect.signature(legacy.trace)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    assert str(inspect.Signature(bare)) == documented
    assert list(inspect.signature(legacy.analyze).parameters)[:2] == ["func", "example_inputs"]


@pytest.mark.skipif(HAS_XLA, reason="torch_xla registers itself with torch")
def test_importing_nxfx_imports_nothing_of_neuron() -> None:
    code = (
        "import sys, nxfx; nxfx.prepare, nxfx.trace, nxfx.compile, nxfx.warmup\n"
        "import nxfx.handoff.modelbuilder, nxfx.handoff.submodule\n"
        "found = {m.split('.')[0] for m in sys.modules} & "
        "{'torch_neuronx', 'neuronx_distributed', 'libneuronxla', 'neuronxcc', 'torch_xla', 'torch_mlir'}\n"
        "assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


@pytest.mark.parametrize(("wanted", "told"), [("--auto-cast=all", 1), ("--auto-cast all --auto-cast-type fp16", 1), ("--auto-cast=matmult", 0), (None, 0)])
def test_an_auto_cast_that_rounds_positions_in_float32_is_told(wanted: str | None, told: int) -> None:
    class Rotary(nn.Module):
        def forward(self, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            return hidden * (positions[:, None].to(hidden.dtype) * 0.3).cos()

    args = (torch.ones(4, 8, dtype=torch.bfloat16), torch.arange(4))
    traced = nxfx.trace(Rotary(), args, target="trn1", compiler_args=wanted, cpu_backend=True)
    findings = [f for f in traced.report.findings if f.code == "NX550"]
    assert len(findings) == told and not any(flag.startswith("--auto-cast") and "none" in flag for flag in traced.compiler_args)
    assert all("`cos`" in f.message and "test_handoff_neuron.py:" in f.message for f in findings)
    assert ("infinite above 65504" in str(findings)) == ("fp16" in str(wanted))
