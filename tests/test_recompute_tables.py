"""recompute_tables: a rounded table is replaced by what its module computes, and only where that is certainly its origin."""

from __future__ import annotations

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


class Model(nn.Module):
    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        self.rotary = rotary

    def forward(self, positions: Tensor) -> Tensor:
        return self.rotary(positions)


WAYS = {"made-again": lambda: Rotary(64), "kept-copy": lambda: Original(64), "function": lambda: Function(None)}


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


def test_a_table_that_changes_later_is_refused() -> None:
    model = Model(Rotary(64)).bfloat16()
    prepared = nxfx.prepare(model, (POSITIONS,), recompute_tables=True)
    prepared(POSITIONS)
    model.rotary.inv_freq.mul_(0.5)
    with pytest.raises(PrepareError, match="rotary.inv_freq"):
        prepared(POSITIONS)


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
