"""TorchNeuron as the inner backend, on a contract double that refuses what it documents and runs what it is handed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import doubles
import pytest
import torch
from doubles import native
from torch import nn

import nxfx
from nxfx.capture.dynamo import nxfx_backend
from nxfx.verification.equivalence import compare


@pytest.fixture
def torchneuron() -> Iterator[Any]:
    torch._dynamo.reset()
    for seen in (native.graphs, native.options_seen, native.refused):
        seen.clear()
    with doubles.installed("torchneuron"), torch.no_grad():
        yield native
    torch._dynamo.reset()


class Step(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(50, 8)
        self.register_buffer("cache", torch.zeros(2, 16, 8))

    def forward(self, ids: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        self.cache[:, position : position + 1] = self.embed(ids)
        return self.cache.sort(-1).values.sum(-1)


def example(position: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randint(50, (2, 1)), torch.tensor(position)


def assert_same(expected: Any, actual: Any) -> None:
    outcome = compare(expected, actual)
    assert outcome, str(outcome)


def test_compile_takes_it_by_itself_and_hands_on_one_narrow_functional_graph(torchneuron: Any) -> None:
    eager, compiled = Step(), nxfx.compile(Step(), inner_options={"level": 2})
    for position in range(4):
        ids, at = example(position)
        assert_same(eager(ids, at), compiled(ids, at))
    assert torchneuron.options_seen == [{"level": 2}] and len(torchneuron.graphs) == 1
    placeholders = torchneuron.graphs[0].graph.find_nodes(op="placeholder")
    assert torch.int64 not in {n.meta["val"].dtype for n in placeholders}


def test_torch_compile_fullgraph_with_options_passed_through(torchneuron: Any) -> None:
    layer = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 3))
    options = {"inner": "neuron", "inner_options": {"level": 1}, "target": "trn3"}
    compiled = torch.compile(layer, backend=nxfx_backend, fullgraph=True, dynamic=False, options=options)
    for rows in (2, 3):
        ids = torch.randint(50, (rows, 5))
        assert_same(layer(ids), compiled(ids))
    assert torchneuron.options_seen == [{"level": 1}] * 2


def test_a_dynamic_size_is_refused_with_the_input_and_what_to_say(torchneuron: Any) -> None:
    compiled = torch.compile(nn.Embedding(50, 8), backend=nxfx_backend, dynamic=True)
    with pytest.raises(nxfx.UsageError, match="has a dynamic size, and 'neuron' compiles fixed shapes.*dynamic=False"):
        compiled(torch.randint(50, (2, 5)))
    with pytest.raises(nxfx.UsageError, match="leave dynamic_shapes out"):
        nxfx.compile(nn.Embedding(50, 8), dynamic_shapes={"input": {0: torch.export.Dim("n", min=2, max=9)}})


@pytest.mark.parametrize("way", ["nxfx.compile", "torch.compile"])
def test_a_compile_failure_shows_the_users_line(way: str, torchneuron: Any) -> None:
    torchneuron.refused.add(torch.ops.aten.sort.default)
    compiled = nxfx.compile(Sorted()) if way == "nxfx.compile" else torch.compile(Sorted(), backend=nxfx_backend)
    with pytest.raises(nxfx.CompilerError, match=r"(?s)'neuron' failed.*NCC_EVRF001.*aten\.sort.*test_torchneuron\.py:\d+: return x\.sort"):
        compiled(torch.randn(3, 4))


class Sorted(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sort(-1).values * 2


def test_the_other_package_of_the_same_name_is_told_apart(torchneuron: Any) -> None:
    with pytest.raises(nxfx.NeuronNotFound, match="is TorchNeuron, which registers the Dynamo backend 'neuron' and has no trace"):
        nxfx.trace(Step(), example(), target="trn2")


def test_and_the_legacy_one_where_the_backend_is_wanted() -> None:
    with doubles.installed("torch_neuronx"), pytest.raises(nxfx.NeuronNotFound, match="is the legacy one, on PyTorch/XLA"):
        nxfx.compile(Step(), inner="neuron", target="trn2")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: nxfx.trace(Step(), example(), target="trn1"), ("torch_neuronx is not installed", "torch-neuronx<2.10", "nxfx check", "nxfx lower")),
        (lambda: nxfx.trace(Step(), example(), target="trn2"), ("torch-neuronx<2.10", "torch.compile(model, backend='nxfx')")),
        (lambda: nxfx.trace(Step(), example(), target="trn3"), ("trn3 is served by TorchNeuron", "torch 2.13 or newer")),
        (lambda: nxfx.compile(Step(), inner="neuron", target="trn3"), ("no Dynamo backend 'neuron'", "torch 2.13 or newer", "nxfx lower")),
        (lambda: nxfx.compile(Step(), inner="neuron", target="inf2"), ("does not serve 'inf2'", "nxfx.trace", "torch-neuronx<2.10")),
    ],
    ids=["trace-trn1", "trace-trn2", "trace-trn3", "compile-trn3", "compile-inf2"],
)  # fmt: skip
def test_without_neuron_the_route_for_the_target_and_what_can_be_done_here(call: Any, words: tuple[str, ...]) -> None:
    with pytest.raises(nxfx.NeuronNotFound) as raised:
        call()
    assert isinstance(raised.value, ImportError)
    assert all(word in str(raised.value) for word in words), str(raised.value)


def test_a_package_that_does_not_import_is_told(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch_neuronx.py").write_text("raise OSError('libnrt.so.1: cannot open')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(nxfx.NeuronNotFound, match="does not import: OSError: libnrt.so.1: cannot open"):
        nxfx.trace(Step(), example(), target="trn1")


def test_options_for_no_inner_compiler_are_refused() -> None:
    with pytest.raises(nxfx.UsageError, match="inner_options are for an inner compiler"):
        nxfx.compile(Step(), inner="eager", inner_options={"level": 2})
