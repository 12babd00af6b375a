"""The emulation of --auto-cast: roundings against torch's and ml_dtypes' own formats, and which operands are rounded."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from harness import graph_of
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import nxfx
from nxfx.errors import UsageError
from nxfx.verification.autocast import Emulation, emulate, round_to
from nxfx.verification.equivalence import compare, error_against

CAST_TYPES = ("bf16", "fp16", "tf32", "fp8_e4m3")


def every_16_bit_pattern() -> Tensor:
    """Float32 values of every sign, exponent and upper mantissa, with lower bits that tie, nearly tie and do not."""
    upper = torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16
    lower = torch.tensor([0, 1, 0x0FFF, 0x1000, 0x1001, 0x1FFF, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)
    return (upper[:, None] | lower).reshape(-1).view(torch.float32)


# --- the roundings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cast_type", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_16_bit_types_round_as_torch_does(cast_type: Any, dtype: torch.dtype) -> None:
    values = every_16_bit_pattern()
    outcome = compare(values.to(dtype).float(), round_to(values, cast_type))
    assert outcome.ok, outcome.mismatches


def test_tf32_is_a_bf16_with_three_more_bits() -> None:
    """Its neighbours are 2**13 float32 steps apart; ties go to the even one; the largest float32 overflows."""
    values = every_16_bit_pattern()
    rounded = round_to(values, "tf32")
    finite = values.isfinite()
    bits = rounded[finite].view(torch.int32)
    assert not (bits & 0x1FFF).any(), "ten bits of mantissa"
    distance = (bits.long() - values[finite].view(torch.int32).long()).abs()
    assert distance.max() == 0x1000, "never more than half a step"
    tied = distance == 0x1000
    assert tied.any() and not (bits[tied] >> 13 & 1).any(), "to even"
    assert torch.equal(rounded[values.isinf()], values[values.isinf()]) and rounded[values.isnan()].isnan().all()
    assert round_to(torch.tensor(torch.finfo(torch.float32).max), "tf32").item() == math.inf
    assert round_to(torch.tensor([-0.0, -1e-45]), "tf32").signbit().all()


def test_fp8_e4m3_agrees_with_torch_up_to_240_and_overflows_beyond() -> None:
    """F8E4M3 and F8E4M3FN differ in what their highest exponent means only."""
    values = every_16_bit_pattern()
    small = values[values.abs() <= 240]
    outcome = compare(small.to(torch.float8_e4m3fn).float(), round_to(small, "fp8_e4m3"))
    assert outcome.ok, outcome.mismatches
    found = round_to(torch.tensor([247.9, 248.0, 1e9, -249.0, math.inf, -math.inf, math.nan]), "fp8_e4m3")
    assert found[:-1].tolist() == [240.0, math.inf, math.inf, -math.inf, math.inf, -math.inf] and found[-1].isnan()


def test_fp8_e4m3_is_the_ieee_format_of_ml_dtypes() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    values = every_16_bit_pattern()
    values = values[~values.isnan()]
    wanted = torch.from_numpy(values.numpy().astype(ml_dtypes.float8_e4m3).astype("float32"))
    outcome = compare(wanted, round_to(values, "fp8_e4m3"))
    assert outcome.ok, outcome.mismatches


@pytest.mark.parametrize("cast_type", CAST_TYPES)
def test_rounding_twice_is_rounding_once(cast_type: Any) -> None:
    once = round_to(every_16_bit_pattern(), cast_type)
    assert compare(once, round_to(once, cast_type)).ok
    assert round_to(torch.zeros(0, 3), cast_type).shape == (0, 3)


# --- which operands ---------------------------------------------------------------------------------------------------

A, B = (torch.randn(n, 8, 8, generator=torch.Generator().manual_seed(n)) for n in (2, 3))
LEFT, RIGHT = A[0], B[0]
IMAGE, KERNEL = A[None], torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(4))

PRODUCTS: dict[str, Any] = {
    "matmul": lambda r: r(LEFT) @ r(RIGHT),
    "batched": lambda r: r(A) @ r(A.flip(0)),
    "vector": lambda r: r(LEFT) @ r(RIGHT[0]),
    "dot": lambda r: torch.dot(r(LEFT[0]), r(RIGHT[0])),
    "linear": lambda r: nn.functional.linear(r(LEFT), r(RIGHT), RIGHT[0]),
    "addmm": lambda r: torch.addmm(LEFT, r(LEFT), r(RIGHT), beta=0.3),
    "einsum": lambda r: torch.einsum("bij,bkj->bik", r(A), r(A)),
    "outer": lambda r: r(LEFT[0])[:, None] @ r(RIGHT[0])[None],
    "conv": lambda r: nn.functional.conv2d(r(IMAGE), r(KERNEL), RIGHT[0, :4], padding=1),
    "conv-transpose": lambda r: nn.functional.conv_transpose2d(r(IMAGE), r(KERNEL.transpose(0, 1))),
}


@pytest.mark.parametrize("cast_type", CAST_TYPES)
@pytest.mark.parametrize("product", PRODUCTS)
def test_matmult_rounds_the_factors_and_sums_in_float32(product: str, cast_type: Any) -> None:
    compute = PRODUCTS[product]
    found = emulate(_Module(lambda: compute(lambda x: x)), "matmult", cast_type)()
    with torch.backends.mkldnn.flags(enabled=False):
        wanted = compute(lambda x: round_to(x, cast_type))
    outcome = compare(wanted, found)
    assert outcome.ok, outcome.mismatches
    assert not torch.equal(found, compute(lambda x: x)), "something is rounded"


def test_attention_rounds_its_probabilities_too() -> None:
    query, key, value = (torch.randn(1, 2, 6, 8, generator=torch.Generator().manual_seed(s)) for s in range(3))
    found = emulate(_Module(lambda: scaled_dot_product_attention(query, key, value)), "matmult")()
    def bf16(x: Tensor) -> Tensor:
        return round_to(x, "bf16")

    scale = 8**-0.25
    scores = bf16(query * scale) @ bf16(key * scale).mT
    wanted = bf16(scores.softmax(-1)) @ bf16(value)
    assert (found - wanted).abs().max() < 1e-6
    exact = scaled_dot_product_attention(query, key, value)
    assert (found - exact).abs().max() > 1e-4


def test_an_lstm_is_made_of_products() -> None:
    torch.manual_seed(0)
    lstm, x = nn.LSTM(8, 8), torch.randn(5, 2, 8)
    emulated = emulate(lstm, "matmult", "fp8_e4m3")
    assert (emulated(x)[0] - lstm(x)[0]).abs().max() > 1e-3
    assert emulated.emulation.rounded


def test_matmult_leaves_everything_else_alone() -> None:
    def model() -> tuple[Tensor, ...]:
        half = LEFT.to(torch.bfloat16)
        return (LEFT * RIGHT).cos(), LEFT.softmax(-1), half @ half, LEFT.double() @ RIGHT.double(), torch.outer(LEFT[0], RIGHT[0])

    emulated = emulate(_Module(model), "matmult", "fp8_e4m3")
    assert compare(model(), emulated()).ok and not emulated.emulation.rounded


def test_all_rounds_operands_numbers_and_results() -> None:
    def model() -> tuple[Tensor, ...]:
        positions = torch.arange(300, 304)
        return LEFT * 0.3, positions.float() * 1.0, torch.full((2,), 1.001), LEFT.softmax(-1), (positions * 2, positions > 301)

    product, floats, filled, probabilities, integers = emulate(_Module(model), "all")()
    def bf16(x: Tensor) -> Tensor:
        return round_to(x, "bf16")

    assert torch.equal(product, bf16(bf16(LEFT) * bf16(torch.tensor(0.3)).item()))
    assert floats.tolist() == [300.0, 300.0, 302.0, 304.0] and filled.tolist() == [1.0, 1.0]
    assert torch.equal(probabilities, bf16(bf16(LEFT).softmax(-1)))
    assert [i.tolist() for i in integers] == [[600, 602, 604, 606], [False, False, True, True]]


def test_numbers_that_the_cast_type_has_none_for_are_counted() -> None:
    for cast_type, overflowed in (("bf16", set()), ("tf32", set()), ("fp16", {"aten::mul.Tensor"}), ("fp8_e4m3", {"aten::mul.Tensor"})):
        with Emulation("all", cast_type) as emulation:  # type: ignore[arg-type]
            torch.tensor([70000.0, math.inf, 1.0]) * 1.0
            torch.tensor([math.inf, math.nan, 1.0]) + 1.0
        assert set(emulation.overflowed) == overflowed, "an infinity that was one is none"


def test_all_keeps_writes_in_place() -> None:
    def model() -> Tensor:
        table = torch.zeros(4)
        table[1:3] = 1.001
        return table.add_(2.003)

    assert emulate(_Module(model), "all")().tolist() == [2.0, 3.0, 3.0, 2.0]


@pytest.mark.parametrize("autocast", ["matmult", "all"])
def test_bodies_of_higher_order_ops_are_cast(autocast: Any) -> None:
    def model(flag: Tensor) -> Tensor:
        return torch.cond(flag, lambda a: a @ RIGHT, lambda a: a + 1, (LEFT,))

    captured = graph_of(model, (torch.tensor(True),))
    inputs = (*captured.weights, torch.tensor(True))
    (found,) = emulate(captured.gm, autocast)(*inputs)
    (plain,) = captured.gm(*inputs)
    assert not torch.equal(found, plain) and (found - plain).abs().max() < 0.2


def test_none_is_the_graph_itself_and_inference_mode_is_like_no_grad() -> None:
    compute = PRODUCTS["linear"]
    module = _Module(lambda: compute(lambda x: x))
    assert torch.equal(emulate(module, "none")(), module())
    with torch.inference_mode():
        inside = emulate(module, "matmult")()
    assert torch.equal(inside, emulate(module, "matmult")())


def test_what_auto_cast_does_to_a_rotary_and_what_nxfx_does_about_it() -> None:
    """The reason for broadcast products: `matmult` rounds the positions of inv_freq @ position_ids."""

    class Rotary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("inv_freq", 1.0 / 10000 ** (torch.arange(0, 64, 2) / 64))

        def forward(self, position_ids: Tensor) -> Tensor:
            return (self.inv_freq[None, :, None] @ position_ids[:, None, :].float()).cos()

    model, positions = Rotary(), torch.arange(30000, 30064)[None]
    truth = (model.inv_freq.double()[None, :, None] * positions[:, None].double()).cos()
    prepared = nxfx.prepare(model, (positions,))
    before = error_against(truth, emulate(model, "matmult")(positions)).mean
    after = error_against(truth, emulate(prepared, "matmult")(positions)).mean
    assert before > 0.2 and after < 1e-3


def test_unknown_names_are_told() -> None:
    with pytest.raises(UsageError, match="one of none, matmult, all"):
        emulate(nn.Identity(), "matmul")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="fp8_e4m3"):
        Emulation("all", "int8")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="tf32"):
        round_to(LEFT, "fp32")  # type: ignore[arg-type]


class _Module(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(*args)
