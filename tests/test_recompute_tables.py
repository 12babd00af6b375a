"""recompute_tables: a rounded table is replaced by what its module computes, and only where that is certainly its origin."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import corpus
import pytest
import torch
from torch import Tensor, nn

import nxfx
from nxfx.errors import PrepareError
from nxfx.verification.equivalence import error_against

POSITIONS = torch.arange(30000, 30032)


def frequencies(dim: int = 64, base: float = 10000.0) -> Tensor:
    return 1.0 / base ** (torch.arange(0, dim, 2) / dim)


class Rotary(nn.Module):
    """Knows how to make itself again: its arguments are kept under their own names."""

    def __init__(self, dim: int, base: float = 10000.0) -> None:
        super().__init__()
        self.dim, self.base = dim, base
        self.register_buffer("inv_freq", frequencies(dim, base), persistent=False)

    def forward(self, positions: Tensor) -> Tensor:
        return (positions[:, None].float() * self.inv_freq.float()).cos().to(self.inv_freq.dtype)


class Original(Rotary):
    """Keeps a copy that no cast reaches, as transformers did."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.dim = -1  # the constructor cannot be called again with what is kept
        self.original_inv_freq = self.inv_freq


class Function(Rotary):
    def __init__(self, config: Any) -> None:
        super().__init__(64)
        self.rope_init_fn = lambda config, device: (frequencies(64).to(device), 1.0)


class Frozen(Rotary):
    """Its table is a parameter that is not trained."""

    def __init__(this, dim: int = 64) -> None:  # noqa: N805
        super().__init__(dim)
        del this.inv_freq
        this.inv_freq = nn.Parameter(frequencies(dim), requires_grad=False)


class Model(nn.Module):
    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        self.rotary = rotary

    def forward(self, positions: Tensor) -> Tensor:
        return self.rotary(positions)


WAYS = {
    "made-again": lambda: Rotary(64),
    "kept-copy": lambda: Original(64),
    "function": lambda: Function(None),
    "frozen-parameter": Frozen,
}


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_a_rounded_table_is_computed_again(way: str, low: torch.dtype) -> None:
    model = Model(WAYS[way]()).to(low)
    truth = (POSITIONS.double()[:, None] * frequencies().double()).cos()
    rounded = nxfx.prepare(model, (POSITIONS,))
    assert "NX102" in [f.code for f in rounded.report.findings]
    prepared = nxfx.prepare(model, (POSITIONS,), recompute_tables=True, verify_each=True)
    assert "NX102" not in [f.code for f in prepared.report.findings]
    (record,) = [r for r in prepared.report.rewrites if r.rule == "lift.table"]
    assert "'rotary.inv_freq'" in record.before and type(model.rotary).__name__ in record.after
    assert error_against(truth, rounded(POSITIONS)).mean > 0.1
    assert error_against(truth, prepared(POSITIONS)).mean < 0.002 and prepared(POSITIONS).dtype is low
    assert model.rotary.inv_freq.dtype is low, "the model keeps what it has"


def test_numbers_that_were_rounded_and_are_held_in_float32() -> None:
    model = Model(Rotary(64)).bfloat16().float()
    prepared = nxfx.prepare(model, (POSITIONS,), recompute_tables=True)
    truth = (POSITIONS.double()[:, None] * frequencies().double()).cos()
    assert error_against(truth, prepared(POSITIONS)).max < 0.01 < error_against(truth, model(POSITIONS)).mean


class Unknown(Rotary):
    """Was scaled after it was made: what the constructor gives is another table."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)

    def scale(self) -> Unknown:
        self.inv_freq = self.inv_freq / 3
        return self


def test_a_table_that_the_module_does_not_give_is_left_and_reported() -> None:
    for module in (Unknown(64).scale(), Rotary(64)):
        module.base = 500.0 if type(module) is Rotary else module.base
        model = Model(module).bfloat16()
        prepared = nxfx.prepare(model, (POSITIONS,), recompute_tables=True)
        assert not [r for r in prepared.report.rewrites if r.rule == "lift.table"]
        assert "NX102" in [f.code for f in prepared.report.findings]
        assert torch.equal(prepared(POSITIONS), model(POSITIONS))


@pytest.mark.parametrize("called", [False, True], ids=["before-the-first-call", "between-calls"])
@pytest.mark.parametrize("how", ["written", "replaced"])
@pytest.mark.parametrize("kind", [Rotary, Frozen])
def test_a_table_that_changes_later_is_refused(kind: type[Rotary], how: str, called: bool) -> None:
    model = Model(kind(64)).bfloat16()
    prepared = nxfx.prepare(model, (POSITIONS,), recompute_tables=True)
    if called:
        prepared(POSITIONS)
    if how == "written":
        model.rotary.inv_freq.mul_(0.5)
    else:
        half = model.rotary.inv_freq * 0.5
        model.rotary.inv_freq = half if kind is Rotary else nn.Parameter(half, requires_grad=False)
    with pytest.raises(PrepareError, match="rotary.inv_freq"):
        prepared(POSITIONS)


@pytest.mark.parametrize("how", ["trained", "many-weights"])
def test_a_module_that_learns_or_holds_many_weights_is_not_made_again(how: str) -> None:
    made = []

    class Counted(Frozen):
        def __init__(self) -> None:
            made.append(self)
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1 << 17 if how == "many-weights" else 1), requires_grad=how == "trained")

    prepared = nxfx.prepare(Model(Counted()).bfloat16(), (POSITIONS,), recompute_tables=True)
    assert len(made) == 1 and "NX102" in [f.code for f in prepared.report.findings]


class Angles(nn.Module):
    """What is rounded is no frequency but the angles themselves, or their cosines: no integer is left in the graph."""

    def __init__(self, cached: bool) -> None:
        super().__init__()
        self.cached = cached
        angles = torch.outer(torch.arange(512.0), frequencies())
        self.register_buffer("table", angles.cos() if cached else angles)

    def forward(self, positions: Tensor) -> Tensor:
        table = self.table[: len(positions)]
        return table * 1 if self.cached else table.cos()


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_a_table_of_angles_is_computed_again(low: torch.dtype) -> None:
    model, positions = Model(Angles(cached=False)).to(low), torch.arange(512)
    truth = torch.outer(positions.double(), frequencies().double()).cos()
    prepared = nxfx.prepare(model, (positions,), recompute_tables=True, verify_each=True)
    assert [r.rule for r in prepared.report.rewrites if r.rule == "lift.table"] and not prepared.report.findings
    assert error_against(truth, model(positions)).max > 0.1
    assert error_against(truth, prepared(positions)).max <= torch.finfo(low).eps / 2 and prepared(positions).dtype is low


def test_a_table_whose_rounding_nothing_magnifies_is_left_as_it_is() -> None:
    model, positions = Model(Angles(cached=True)).bfloat16(), torch.arange(512)
    prepared = nxfx.prepare(model, (positions,), recompute_tables=True)
    assert not prepared.report.rewrites and not prepared.report.findings
    assert torch.equal(prepared(positions), model(positions))


SMALL = {"hidden_size": 128, "num_attention_heads": 2}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 2048}
# The model's type, the prefix of its classes, the suffix of its configuration, how its rotary is scaled.
ROTARIES = {
    "default": ("llama", "Llama", "Config", {}),
    "llama3": ("llama", "Llama", "Config", LLAMA3),
    "linear": ("llama", "Llama", "Config", {"factor": 4.0}),
    "yarn": ("llama", "Llama", "Config", {"factor": 4.0, "original_max_position_embeddings": 2048}),
    "gemma3": ("gemma3", "Gemma3", "TextConfig", None),
    "gpt_neox": ("gpt_neox", "GPTNeoX", "Config", {}),
    "qwen2_vl": ("qwen2_vl", "Qwen2VL", "TextConfig", {"mrope_section": [8, 12, 12]}),
    "modernbert": ("modernbert", "ModernBert", "Config", None),
}


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ROTARIES)
def test_a_rotary_of_transformers_is_computed_again(name: str, low: torch.dtype) -> None:
    kind, prefix, suffix, scaling = ROTARIES[name]
    package = f"transformers.models.{kind}"
    config = getattr(importlib.import_module(f"{package}.configuration_{kind}"), prefix + suffix)(**SMALL)
    if scaling is not None:
        scheme = name if name in ("llama3", "linear", "yarn") else "default"
        config.rope_parameters = {"rope_type": scheme, "rope_theta": 10000.0, **scaling}
    module = getattr(importlib.import_module(f"{package}.modeling_{kind}"), f"{prefix}RotaryEmbedding")(config)
    positions = torch.arange(5000, 5064).expand(*([3] if name == "qwen2_vl" else []), 1, -1)
    for layer in getattr(module, "layer_types", [None]):
        choice = {} if layer is None else {"layer_type": layer}
        truth, rounded = module(torch.ones(1), positions, **choice), copy.deepcopy(module).to(low)
        arguments = (torch.ones(1, dtype=low), positions)
        prepared = nxfx.prepare(rounded, arguments, choice, recompute_tables=True)
        assert [r.rule for r in prepared.report.rewrites].count("lift.table") == 1
        assert "NX102" not in [f.code for f in prepared.report.findings]
        for true, eager, restored in zip(truth, rounded(*arguments, **choice), prepared(*arguments, **choice), strict=True):
            assert error_against(true.double(), restored).max <= torch.finfo(low).eps < 0.1 < error_against(true.double(), eager).max


def test_a_model_of_transformers_after_bfloat16() -> None:
    model, kwargs = corpus.BY_NAME["llama"].build()
    kwargs["position_ids"] = (30000 + torch.arange(corpus.LENGTH)).expand(corpus.BATCH, -1)
    with torch.no_grad():
        table = model.model.rotary_emb.inv_freq.clone()
        low = model.bfloat16()
        assert low.model.rotary_emb.inv_freq.dtype is torch.bfloat16
        prepared = nxfx.prepare(low, (), corpus.clone(kwargs), recompute_tables=True)
        assert [r.rule for r in prepared.report.rewrites].count("lift.table") == 1
        rounded, restored = low(**corpus.clone(kwargs)).logits, prepared(**corpus.clone(kwargs)).logits
        low.model.rotary_emb.inv_freq = table  # as from_pretrained leaves it
        right = low(**corpus.clone(kwargs)).logits
    assert torch.equal(restored, right) and not torch.equal(rounded, right)
