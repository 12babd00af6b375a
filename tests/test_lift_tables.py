"""lift-int-casts: tables that were rounded before capture are reported with what that costs."""

from __future__ import annotations

import pytest
import torch
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


