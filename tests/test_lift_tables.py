"""lift-int-casts: tables that were rounded before capture are reported with what that costs."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from harness import golden
from lifting import (
    BF16,
    FAR,
    FP16,
    FP32,
    HIDDEN,
    POSITIONS,
    Rotary,
    errors,
    inv_freq,
    lifted,
    outputs,
    recorded,
    untouched,
)
from torch import Tensor, nn

from nxfx.report.findings import Severity

# --- tables -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["bf16", "fp16", "fp32-with-bf16-values"])
def test_a_rounded_table_is_reported_with_its_error(how: str) -> None:
    low = FP16 if how == "fp16" else BF16

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("inv_freq", inv_freq(128).to(low).to(FP32 if "fp32" in how else low), persistent=False)

        def forward(self, position_ids: Tensor) -> Tensor:
            return (self.inv_freq[None, :].float() * position_ids[:, None].float()).cos()

    found = untouched(Model(), (torch.arange(64),), ranges={"position_ids": (0, 4095)})
    (finding,) = found.result.findings
    assert finding.code == "NX102" and "'inv_freq' was rounded to" in finding.message
    told = float(finding.message.rsplit(" ", 1)[1])
    rounded = inv_freq(128).to(low).double()
    positions = torch.arange(4096).double()[:, None]
    measured = ((positions * rounded).cos() - (positions * inv_freq(128).double()).cos()).abs().max().item()
    assert measured <= told * 1.01 and told <= 2
    assert finding.severity is Severity.WARNING


def test_a_table_of_rounded_positions_is_reported() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("positions", torch.arange(600).to(BF16))
            self.register_buffer("inv_freq", inv_freq())

        def forward(self, hidden: Tensor) -> Tensor:
            return hidden * (self.positions[:, None].float() * self.inv_freq).cos()

    (finding,) = untouched(Model(), (torch.ones(600, 32),)).result.findings
    assert "'positions' was rounded to bfloat16" in finding.message


def test_the_error_of_a_table_shrinks_with_the_range() -> None:
    model = Rotary("half-split", table=BF16)
    near = lifted(model, (POSITIONS, HIDDEN), ranges={"position_ids": (0, 3)})
    far = lifted(model, (POSITIONS, HIDDEN), ranges=FAR)
    told = [float(f.message.rsplit(" ", 1)[1]) for x in (near, far) for f in x.result.findings if f.code == "NX102"]
    assert told[0] < 0.02 and told[1] == 2


EXACT_TABLES = {
    "powers": 2.0 ** -torch.arange(8),
    "integers": torch.arange(256.0),
    "bf16-integers": torch.arange(256).to(BF16),
    "positions-from-2": torch.arange(2.0, 130.0),
    "positions-from-3-in-bf16": torch.arange(3, 100).to(BF16),
    "positions-from-2-in-fp16": torch.arange(2, 2000).to(FP16),
    "periods-by-hand": torch.tensor([7.0, 12, 24, 60, 91, 101, 167, 251]),
    "one-period": torch.tensor([251.0]).to(BF16),
    "even-steps": torch.arange(128) / 128,
    "fp32": inv_freq(),
}


@pytest.mark.parametrize("name", EXACT_TABLES)
def test_tables_that_were_not_rounded_are_not_reported(name: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", EXACT_TABLES[name])

        def forward(self, position_ids: Tensor) -> Tensor:
            return (self.table.float() * position_ids[:, None].float()).sin()

    assert not untouched(Model(), (torch.arange(16),)).codes


ROUNDED_TABLES = {
    "two": torch.tensor([0.3, 0.7]).to(BF16),
    "positions-from-0": torch.arange(4000).to(BF16),
    "positions-from-2": torch.arange(2, 4000).to(BF16),
    "positions-from-2-held-in-float32": torch.arange(2, 4000).to(BF16).float(),
    "positions-in-fp16": torch.arange(4000).to(FP16),
    "frequencies-in-fp16": inv_freq().to(FP16),
}


@pytest.mark.parametrize("name", ROUNDED_TABLES)
def test_tables_that_were_rounded_are_reported(name: str) -> None:
    found = untouched(with_table(lambda p, t: (p.float() * t.float()).cos(), ROUNDED_TABLES[name]), (POSITIONS.T,))
    assert found.codes == ["NX102"]


def with_table(angles: Callable[[Tensor, Tensor], Tensor], table: Tensor, frozen: bool = False) -> nn.Module:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            if frozen:
                self.table = nn.Parameter(table, requires_grad=False)
            else:
                self.register_buffer("table", table)

        def forward(self, position_ids: Tensor) -> Tensor:
            return angles(position_ids, self.table)

    return Model()


def coordinates(positions: Tensor) -> Tensor:
    """From -1 to 1, as in DINOv3; the positions say only how many there are."""
    return 2 * (torch.arange(0.5, len(positions)) / len(positions))[:, None] - 1


PERIODS = 100.0 ** (torch.arange(16) / 16)
# The angle, the table as it was, and by how much the bound may exceed what is off.
ANGLES = {
    "quotient": (lambda p, t: p / t, PERIODS, 4),
    "coordinates": (lambda p, t: 2 * math.pi * coordinates(p) / t, PERIODS, 4),
    "coordinates-times": (lambda p, t: 2 * math.pi * coordinates(p) * t, 1 / PERIODS, 4),
    "negative": (lambda p, t: p / -t, PERIODS, 4),
    "reciprocal": (lambda p, t: p * t.reciprocal(), PERIODS, 4),
    "number-divided": (lambda p, t: p * (0.5 / t), PERIODS, 4),
    "root": (lambda p, t: p * t.sqrt(), PERIODS / 50, 4),
    "inverse-root": (lambda p, t: p * t.rsqrt(), PERIODS, 4),
    "square": (lambda p, t: p * t**2, 1 / PERIODS, 10),
    "power": (lambda p, t: p * t**-1.5, PERIODS, 6),
    "base-to-the-power": (lambda p, t: p * 100.0**-t, torch.arange(16) / 16 + 0.01, 200),
    "exponential": (lambda p, t: p * torch.exp(t), -torch.arange(1, 16) / 7, 8),
    "scaled-sum": (lambda p, t: torch.add(p, t, alpha=3), inv_freq() / 10, 4),
    "scaled-difference": (lambda p, t: torch.sub(p, t, alpha=3), inv_freq() / 10, 4),
    "sum-in-a-quotient": (lambda p, t: p / (1 + t), PERIODS, 4),
}


@pytest.mark.parametrize("frozen", [False, True], ids=["buffer", "frozen-parameter"])
@pytest.mark.parametrize("name", ANGLES)
def test_the_error_of_an_angle_is_bounded_whatever_made_it_of_the_table(name: str, frozen: bool) -> None:
    angles, table, slack = ANGLES[name]
    positions = torch.arange(16)[:, None]
    table = table[torch.arange(len(table)) > 0]  # powers and integers are not rounded

    def model(position_ids: Tensor, table: Tensor) -> Tensor:
        return angles(position_ids.float(), table.float()).cos()

    found = untouched(with_table(model, table.to(BF16), frozen), (positions,), ranges={"position_ids": (0, 15)})
    (finding,) = found.result.findings
    told = float(finding.message.rsplit(" ", 1)[1])
    exact, rounded = (angles(positions.double(), t.double()) for t in (table, table.to(BF16)))
    measured = (exact - rounded).abs().max().item()
    assert finding.code == "NX102" and measured <= told * 1.05 <= slack * measured and told < 2


def test_a_step_makes_the_error_of_a_table_unknown() -> None:
    def model(position_ids: Tensor, table: Tensor) -> Tensor:
        return torch.div(position_ids.float() * table.float(), 4.0, rounding_mode="floor").cos()

    found = untouched(with_table(model, inv_freq().to(BF16)), (torch.arange(16)[:, None],), ranges={"position_ids": (0, 15)})
    assert [f.message.rsplit(" ", 1)[1] for f in found.result.findings] == ["2"]


def test_a_divisor_that_may_be_zero_makes_the_error_of_a_table_unknown() -> None:
    def model(position_ids: Tensor, table: Tensor) -> Tensor:
        return (position_ids.float() / table.float()).cos()

    table = torch.cat([torch.zeros(1), inv_freq()]).to(BF16)
    found = untouched(with_table(model, table), (torch.arange(1, 16)[:, None],), ranges={"position_ids": (1, 15)})
    assert [f.message.rsplit(" ", 1)[1] for f in found.result.findings] == ["2"]


@pytest.mark.parametrize("how", ["training", "two-dimensional", "long"])
def test_a_parameter_that_is_learned_or_has_not_the_form_of_frequencies_is_no_table(how: str) -> None:
    table = inv_freq(16384 if how == "long" else 64).to(BF16)
    model = with_table(lambda p, t: (p.float() * t.float()).cos(), table[None] if how == "two-dimensional" else table, frozen=True)
    model.requires_grad_(how == "training")
    assert not untouched(model, (torch.arange(16)[:, None],)).codes


def test_the_weights_of_a_frozen_model_are_learned_all_the_same() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.norm, self.rotary = nn.Embedding(600, 64), nn.LayerNorm(64), Rotary("half-split")

        def forward(self, ids: Tensor, position_ids: Tensor) -> Tensor:
            hidden = self.norm(self.tokens(ids)) + position_ids[..., None].to(BF16) * self.norm.weight
            return self.rotary(position_ids, hidden[:, None])

    torch.manual_seed(0)
    model = Model().to(BF16)
    inputs = torch.arange(500, 516)[None], POSITIONS
    trained, frozen = (lifted(m, inputs, ranges=FAR) for m in (model, copy.deepcopy(model).requires_grad_(False)))
    assert golden(trained.after) == golden(frozen.after) and trained.rules and trained.codes == frozen.codes


ANGLE_TABLE = torch.outer(torch.arange(512.0), inv_freq())


@pytest.mark.parametrize("low", [BF16, FP16], ids=str)
@pytest.mark.parametrize("how", ["at-once", "sliced", "looked-up", "widened", "scaled"])
def test_a_table_of_rounded_angles_is_reported(how: str, low: torch.dtype) -> None:
    def model(position_ids: Tensor, table: Tensor) -> Tensor:
        angles = {"sliced": table[: len(position_ids)], "looked-up": table[position_ids]}.get(how, table)
        angles = angles.float() if how == "widened" else angles * 0.5 if how == "scaled" else angles
        return angles.cos()

    found = lifted(with_table(model, ANGLE_TABLE.to(low)), (torch.arange(512),))
    (finding,) = found.result.findings
    told = float(finding.message.rsplit(" ", 1)[1])
    share = 0.5 if how == "scaled" else 1
    measured = ((ANGLE_TABLE.to(low) * share).double().cos() - (ANGLE_TABLE.double() * share).cos()).abs().max().item()
    assert finding.code == "NX102" and measured <= told * 1.05 <= 4 * measured


@pytest.mark.parametrize("how", ["cached-cosine", "sinusoidal-sum"])
def test_what_was_rounded_after_the_cosine_is_half_a_unit_off_and_not_reported(how: str) -> None:
    def model(position_ids: Tensor, table: Tensor) -> Tensor:
        hidden = torch.ones_like(table[position_ids])
        return hidden * table[position_ids] if how == "cached-cosine" else hidden + table[position_ids]

    found = untouched(with_table(model, ANGLE_TABLE.cos().to(BF16)), (torch.arange(512),))
    (eager,) = outputs(recorded(found.before, (torch.arange(512),)))
    truth = ANGLE_TABLE.double().cos() + (how == "sinusoidal-sum")
    assert not found.codes and (eager.double() - truth).abs().max() <= 2**-7


def test_a_table_in_a_region_is_converted_once() -> None:
    found = lifted(Rotary("half-split", table=BF16), (POSITIONS, HIDDEN), ranges=FAR)
    eager, after = errors(found, (POSITIONS, HIDDEN))
    assert after < eager / 50
    assert found.casts(FP32) == 2, "positions and the table"


def test_positions_rounded_as_they_meet_an_activation_before_a_sine() -> None:
    """NX103: a bf16 timestep input times frequencies cannot be lifted without widening the activation."""

    def model(timestep: Tensor) -> Tensor:
        frequencies = torch.exp(torch.arange(320, dtype=BF16) * -0.03)
        return (timestep[:, None] * frequencies).sin()

    found = lifted(model, (torch.tensor([999.0, 3.0], dtype=BF16),))
    assert "NX103" in found.codes


