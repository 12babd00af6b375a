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
    "conv-of-time": lambda r: torch.conv_tbc(r(A), r(A), RIGHT[0]),
    "tensordot": lambda r: torch.tensordot(r(LEFT), r(RIGHT), 2),
    "bilinear": lambda r: nn.functional.bilinear(r(LEFT), r(RIGHT), r(B)),
    "grouped": lambda r: torch._grouped_mm(r(LEFT), r(B), offs=torch.tensor([2, 5, 8], dtype=torch.int32)),
    "out": lambda r: torch.mm(r(LEFT), r(RIGHT), out=torch.empty(8, 8)),
    "out-of-sum": lambda r: torch.addmm(LEFT, r(LEFT), r(RIGHT), out=torch.empty(8, 8)),
    "in-place": lambda r: RIGHT[0].clone().addmv_(r(LEFT), r(RIGHT[1])),
    "in-place-batched": lambda r: LEFT.clone().addbmm_(r(A), r(A), beta=0.3),
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


QUERY, KEY = (torch.randn(1, heads, 6, 8, generator=torch.Generator().manual_seed(heads)) for heads in (4, 2))
MASK = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
FUTURE = torch.ones(6, 6, dtype=torch.bool).tril()
SPELLINGS: dict[str, tuple[Any, Any]] = {
    "grouped-heads": (
        lambda: scaled_dot_product_attention(QUERY, KEY, KEY, enable_gqa=True),
        lambda: scaled_dot_product_attention(QUERY, KEY.repeat_interleave(2, 1), KEY.repeat_interleave(2, 1)),
    ),
    "causal": (lambda: scaled_dot_product_attention(KEY, KEY, KEY, is_causal=True), lambda: scaled_dot_product_attention(KEY, KEY, KEY, FUTURE)),
    "causal-and-masked": (
        lambda: scaled_dot_product_attention(KEY, KEY, KEY, MASK, is_causal=True),
        lambda: scaled_dot_product_attention(KEY, KEY, KEY, MASK.masked_fill(~FUTURE, -math.inf)),
    ),
    "scaled": (
        lambda: scaled_dot_product_attention(KEY, KEY, KEY, scale=0.5),
        lambda: scaled_dot_product_attention(KEY * 4, KEY, KEY, scale=0.125),
    ),
    "shorter-values": (
        lambda: scaled_dot_product_attention(KEY, KEY, KEY[..., :5]),
        lambda: scaled_dot_product_attention(KEY, KEY, KEY)[..., :5],
    ),
}


@pytest.mark.parametrize("autocast", ["matmult", "all"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_attention_means_the_same_however_it_is_spelled(spelling: str, autocast: Any) -> None:
    one, other = (emulate(_Module(f), autocast)() for f in SPELLINGS[spelling])
    assert (one - other).abs().max() < 1e-6
    exact = SPELLINGS[spelling][0]()
    assert 1e-4 < (one - exact).abs().max() < 0.1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_attention_in_another_dtype_is_left_alone(dtype: torch.dtype) -> None:
    query = QUERY.to(dtype)
    for autocast in ("matmult", "all"):
        found = emulate(_Module(lambda: scaled_dot_product_attention(query, query, query, scale=0.3)), autocast)()
        assert compare(scaled_dot_product_attention(query, query, query, scale=0.3), found).ok


MADE_OF_PRODUCTS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "lstm": (lambda: nn.LSTM(8, 8), (5, 2, 8)),
    "gru": (lambda: nn.GRU(8, 8), (5, 2, 8)),
    "attention": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (2, 5, 8)),
    "distances": (lambda: _Module(lambda x: torch.cdist(x, x + 1)), (2, 30, 8)),
}


@pytest.mark.parametrize("case", MADE_OF_PRODUCTS)
def test_what_is_made_of_products_is_rounded_as_they_are(case: str) -> None:
    """Also where one fused kernel computes it, with and without a module around the emulation."""
    torch.manual_seed(0)
    make, shape = MADE_OF_PRODUCTS[case]
    module, x = make().eval(), torch.randn(shape)
    emulated = emulate(module, "matmult", "fp8_e4m3")
    (found, *_), (exact, *_) = emulated(x), module(x)
    assert (found - exact).abs().max() > 1e-3
    assert {name.rpartition(".")[0] or name for name in emulated.emulation.rounded} <= {"aten::addmm", "aten::mm", "aten::bmm"}
    with torch.no_grad(), Emulation("matmult", "fp8_e4m3"):
        (inside, *_) = module(x)
    assert torch.equal(inside, found)


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


def test_all_rounds_numbers_by_keyword_and_those_beside_integers_whose_result_is_float32() -> None:
    held, small = round_to(LEFT, "bf16"), round_to(torch.tensor(0.3), "bf16").item()
    integers, evens = torch.tensor([1, 3]), torch.tensor([300.0, 302.0, 304.0])

    def model(number: float, large: int) -> tuple[Tensor, ...]:
        return torch.add(held, held, alpha=number), torch.addcmul(held, held, held, value=number), integers * number, evens > large

    found = emulate(_Module(lambda: model(0.3, 303)), "all")()
    assert compare(tuple(round_to(x, "bf16") if x.is_floating_point() else x for x in model(small, 304)), found).ok


def test_all_leaves_ops_without_float32_alone() -> None:
    integers, double, half = torch.tensor([301, 302]), LEFT.double(), LEFT.to(torch.bfloat16)

    def model() -> tuple[Tensor, ...]:
        listed = torch._foreach_add([double], 1.003)[0]
        return integers > 301.5, double * 1.003, half * 1.003, torch.add(half, half, alpha=1.003), double.clone().add_(1.003), listed

    assert compare(model(), emulate(_Module(model), "all")()).ok


def test_all_returns_what_the_op_returns_and_writes_what_it_writes() -> None:
    """What is written is read rounded, as any other operand."""
    first, second = torch.tensor([1.003, 301.1]), torch.tensor([2.0, 0.5])
    mean, deviation, into = torch.zeros(8), torch.ones(8), torch.empty(8, 8)

    def model() -> tuple[Any, ...]:
        nothing = torch._foreach_add_([first, second], 1.0)  # a list or None, by release
        normal = nn.functional.batch_norm(LEFT, mean, deviation, training=True)
        return nothing, normal, torch.mul(LEFT, 1.003, out=into), torch.eye(2).addmm_(torch.eye(2), torch.eye(2) * 303)

    _, normal, product, added = emulate(_Module(model), "all")()
    def bf16(x: Tensor) -> Tensor:
        return round_to(x, "bf16")

    held = bf16(LEFT)
    assert first.tolist() == [2.0, 304.0] and second.tolist() == [3.0, 1.5]
    assert product is into and torch.equal(into, bf16(held * bf16(torch.tensor(1.003))))
    assert torch.equal(added, torch.tensor([[304.0, 0.0], [0.0, 304.0]]))
    assert torch.equal(normal, bf16(nn.functional.batch_norm(held, None, None, training=True)))
    assert torch.equal(mean, bf16(held.mean(0) * 0.1)) and (deviation - LEFT.var(0) * 0.1 - 0.9).abs().max() < 0.01


def test_all_leaves_the_statistics_of_a_model_that_is_not_trained() -> None:
    norm = nn.BatchNorm1d(8).eval()
    norm.running_mean = torch.full((8,), 1.003)
    emulate(norm, "all")(LEFT)
    assert norm.running_mean.tolist() == torch.full((8,), 1.003).tolist()


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


@pytest.mark.parametrize("before", [True, False], ids=["after-a-plain-call", "at-first"])
def test_bodies_of_eager_higher_order_ops_are_cast(before: bool) -> None:
    """They call torch.compile, which keeps what it compiled for a call outside the emulation."""
    def loop() -> Tensor:
        steps = torch.zeros((), dtype=torch.int64)
        return torch._higher_order_ops.while_loop(lambda i, x: i < 2, lambda i, x: (i + 1, x @ RIGHT), (steps, LEFT))[1]

    torch.compiler.reset()
    plain = LEFT @ RIGHT @ RIGHT
    assert not before or torch.equal(loop(), plain)
    found = emulate(_Module(loop), "matmult")()
    def bf16(x: Tensor) -> Tensor:
        return round_to(x, "bf16")

    assert torch.equal(found, bf16(bf16(LEFT) @ bf16(RIGHT)) @ bf16(RIGHT))
    assert torch.equal(emulate(_Module(loop), "none")(), plain)


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


# --- the flags that follow ----------------------------------------------------------------------------------------------

POSITIONS, TABLE = torch.arange(30000, 30016), torch.randn(16, 16, generator=torch.Generator().manual_seed(5))
ACTIVATION = torch.randn(4, 16, generator=torch.Generator().manual_seed(6))
_BATCH = torch.stack([TABLE] * 4)
FOR_A_FLAG: dict[str, Any] = {
    "linear": lambda x: nn.functional.linear(x, TABLE),
    "conv-transpose": lambda x: nn.functional.conv_transpose1d(x[None, None, 0], torch.ones(1, 2, 3)),
    "conv": lambda x: nn.functional.conv1d(x[None, None, 0], torch.ones(2, 1, 3), padding="same"),
    "tensordot": lambda x: torch.tensordot(x, TABLE, 1),
    "inner": lambda x: torch.inner(x, TABLE),
    "addbmm": lambda x: torch.addbmm(torch.zeros(1, 16), x[None, :1], TABLE[None]),
    "addmv": lambda x: torch.addmv(torch.zeros(16), TABLE, x[0]),
    "vdot": lambda x: torch.vdot(x[0], TABLE[0]),
    "chain": lambda x: torch.linalg.multi_dot([x, TABLE, TABLE]),
    "power": lambda x: torch.linalg.matrix_power(x[:, :1] * TABLE[:4, :4], 3),
    "bilinear": lambda x: nn.functional.bilinear(x, x * 0 + 1, _BATCH),
    "distances": lambda x: torch.cdist(x.expand(32, 16) if len(x) == 1 else x.repeat(8, 1), TABLE),
    "queries": lambda x: scaled_dot_product_attention(x[None], TABLE[None], TABLE[None]),
    "keys": lambda x: scaled_dot_product_attention(TABLE[None], x[None], x[None] * 0 + 1),
    "lstm": lambda x: _LSTM(x)[0],
    "cell": lambda x: _CELL(x),
    "elementwise": lambda x: (x * TABLE[:1]).softmax(-1) + torch.outer(x[0], TABLE[0])[:1],
}
_LSTM, _CELL = nn.LSTM(16, 8).requires_grad_(False), nn.GRUCell(16, 8).requires_grad_(False)


def _prepared(function: Any, x: Tensor, sdk: str = "2.33", **options: Any) -> nxfx.PreparedModule:
    return nxfx.prepare(_Module(function), (x,), target="trn1", sdk=sdk, **options)


@pytest.mark.parametrize("product", FOR_A_FLAG)
def test_where_matmult_is_the_default_the_flag_is_there_if_it_would_round_a_product(product: str) -> None:
    prepared = _prepared(FOR_A_FLAG[product], ACTIVATION, "2.26")
    emulated = emulate(prepared, "matmult")
    emulated(ACTIVATION)
    assert ("--auto-cast=none" in prepared.compiler_args) == bool(emulated.emulation.rounded) == (product != "elementwise")


@pytest.mark.parametrize("product", FOR_A_FLAG)
def test_positions_in_any_product_ask_for_the_flag_and_small_functions_of_them_do_not(product: str) -> None:
    """A sine is rounded as any activation is: by half a step of its size, and its size is one."""
    compute = FOR_A_FLAG[product]
    large = _prepared(lambda p: compute(p.float()[None] * 1.5), POSITIONS)
    small = _prepared(lambda p: compute((p.float()[None] * 1.5).sin()), POSITIONS)
    assert ("--auto-cast=none" in large.compiler_args) == (product != "elementwise")
    assert "--auto-cast=none" not in small.compiler_args


def test_a_timestep_embedding_before_a_linear_loses_what_any_linear_loses() -> None:
    class Embedding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(64, 16)

        def forward(self, steps: Tensor) -> Tensor:
            angles = steps[:, None].float() * torch.exp(-math.log(1e4) * torch.arange(32).float() / 32)
            return self.linear(torch.cat([angles.cos(), angles.sin()], -1))

    torch.manual_seed(0)
    model, steps, others = Embedding(), torch.tensor([1, 500, 999]), torch.rand(3, 64) * 2 - 1
    prepared = nxfx.prepare(model, (steps,), target="trn1", sdk="2.33")
    lost, usual = (((emulate(m, "matmult")(x) - m(x)).norm() / m(x).norm()).item() for m, x in ((prepared, steps), (model.linear, others)))
    assert lost < 2 * usual and "--auto-cast=none" not in prepared.compiler_args


def test_an_addend_of_positions_is_no_factor() -> None:
    """A bias is added in float32: attention's distances, a linear layer's bias."""
    x = torch.zeros(16, 16)

    def model(positions: Tensor) -> Tensor:
        attended = scaled_dot_product_attention(TABLE[None], TABLE[None], TABLE[None], attn_mask=positions.float() * -0.3)
        return torch.addmm(positions.float(), x, TABLE) + attended

    prepared = _prepared(model, POSITIONS)
    exact = prepared(POSITIONS)
    assert (emulate(prepared, "matmult")(POSITIONS) - exact).norm() < 0.01 * exact.norm()
    assert "--auto-cast=none" not in prepared.compiler_args


STEPS: dict[str, Any] = {
    "compared": lambda p: p.float() < 30003.0,
    "compared-with-an-activation": lambda p: p.float() < TABLE[0] + 30003,
    "cut": lambda p: (p.float() * 0.37).long(),
    "floor-then-index": lambda p: torch.arange(20000)[(p.float() * 0.37).floor().long()],
    "searched": lambda p: torch.bucketize(p.float(), POSITIONS.float()),
    "ordered": lambda p: (p.float() * -1).argmin(0),
    "a-mask": lambda p: (p > 30003).float() > 0.5,
    "small": lambda p: (p % 100).float() == 37.0,
    "yes-or-no": lambda p: p.float().bool(),
    "moved": lambda p: p.float().flip(0)[:0],
}


@pytest.mark.parametrize("case", STEPS)
def test_all_is_told_of_the_comparisons_and_integers_that_it_changes(case: str) -> None:
    prepared = _prepared(STEPS[case], POSITIONS)
    changes = not torch.equal(emulate(prepared, "all")(POSITIONS), prepared(POSITIONS))
    assert changes == bool(prepared.report.float32_uses)


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
