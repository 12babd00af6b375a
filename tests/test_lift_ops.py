"""lift-int-casts: ops that positions pass on their way to an angle or an index, products that are no matmul, integers made in low precision."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from lifting import BF16, FP32, HIDDEN, POSITIONS, errors, inv_freq, lifted, untouched
from torch import Tensor
from torch.nn import functional as F

from nxfx.report.rewrites import Kind

P = POSITIONS[0]
H = HIDDEN[0, 0]
FAR = {"args_0": (0, 131071)}
TABLE = torch.cat([inv_freq(64)] * 2)


def turned(p: Tensor) -> Tensor:
    return (p[:, None] * 0.3).cos()


PASSED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "index_copy": lambda p, h: h + turned(torch.zeros(16, dtype=BF16).index_copy(0, torch.arange(16), p.to(BF16))),
    "masked_scatter": lambda p, h: h + turned(torch.zeros(16, dtype=BF16).masked_scatter(p > 0, p.to(BF16))),
    "scatter_add": lambda p, h: h + turned(torch.zeros(16, dtype=BF16).scatter_add(0, torch.arange(16), p.to(BF16))),
    "index_add": lambda p, h: h + turned(torch.ones(16, dtype=BF16).index_add(0, torch.arange(16), p.to(BF16))),
    "pad": lambda p, h: h + turned(F.pad(p.to(BF16), (2, 2), value=30001)[2:18]),
    "diff": lambda p, h: h + torch.diff(p.to(BF16), prepend=p[:1].to(BF16) - 1)[:, None],
    "scaled-to-one": lambda p, h: h + ((p.to(BF16) - p.to(BF16).min()) / (p.to(BF16).max() - p.to(BF16).min()))[:, None],
    "standardised": lambda p, h: h + ((p.to(BF16) - p.to(BF16).mean()) / p.to(BF16).std())[:, None],
    "argmax": lambda p, h: h + p.to(BF16).argmax(),
    "argsort": lambda p, h: h + p.flip(0).to(BF16).argsort()[:, None].to(BF16),
    "bucketize": lambda p, h: h + torch.bucketize(p.to(BF16), torch.linspace(29952, 30080, 8, dtype=BF16))[:, None].to(BF16),
    "searchsorted": lambda p, h: h + torch.searchsorted(torch.arange(30000, 30016).to(BF16), p.to(BF16))[:, None].to(BF16),
}


@pytest.mark.parametrize("op", PASSED)
def test_ops_that_positions_pass(op: str) -> None:
    found = lifted(PASSED[op], (P, H), ranges=FAR)
    before, after = errors(found, (P, H * 0))
    assert found.before(P, H * 0)[0].isnan().all() or after < before / 10, (before, after)  # nan: eager divides by zero
    assert found.after(P, H * 0)[0].isfinite().all()


PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": lambda p, h: h * F.linear(p[:, None].to(BF16), TABLE[:, None].to(BF16)).sin(),
    "linear-of-a-vector": lambda p, h: h * F.linear(p[:1].to(BF16), TABLE[:, None].to(BF16)).sin(),
    "linear-with-a-bias": lambda p, h: h * F.linear(p[:, None].to(BF16), TABLE[:, None].to(BF16), torch.ones(64, dtype=BF16)).sin(),
    "addmm": lambda p, h: h * torch.addmm(torch.zeros(64, dtype=BF16), p.to(BF16)[:, None], TABLE.to(BF16)[None]).sin(),
    "baddbmm": lambda p, h: h * torch.baddbmm(torch.ones(1, 16, 64, dtype=BF16), p.to(BF16)[None, :, None], TABLE.to(BF16)[None, None])[0].sin(),
    "einsum-ellipsis": lambda p, h: h * torch.einsum("..., f -> ... f", p.to(BF16), TABLE.to(BF16)).sin(),
    "einsum-batched": lambda p, h: h * torch.einsum("...i,...j->...ij", p[None].to(BF16), TABLE[None].to(BF16))[0].sin(),
    "einsum-no-arrow": lambda p, h: h * torch.einsum("i,j", p.to(BF16), TABLE.to(BF16)).sin(),
}


@pytest.mark.parametrize("product", PRODUCTS)
def test_products_with_one_term_a_sum_in_every_spelling(product: str) -> None:
    found = lifted(PRODUCTS[product], (P, H), ranges=FAR)
    assert "lift.outer-product" in found.rules
    before, after = errors(found, (P, H * 0 + 1))
    assert after < before / 50


def test_an_autocast_linear_of_positions() -> None:
    """The cast is torch.autocast's, from float32: the integers behind it are known all the same."""

    def model(p: Tensor, h: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=BF16):
            return h * F.linear(p[:, None].float(), torch.linspace(0.1, 1, 64)[:, None]).cos()

    found = lifted(model, (P, H), ranges=FAR)
    before, after = errors(found, (P, H * 0 + 1))
    assert after < before / 50


@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_layer_of_coordinates_is_a_sum_of_broadcast_products(bias: bool) -> None:
    """Fourier features: three integer coordinates times a matrix; --auto-cast=matmult would round the coordinates."""
    weight = torch.linspace(0.1, 3, 96).view(32, 3)

    def model(p: Tensor) -> Tensor:
        return F.linear(torch.stack([p, p // 2, p % 77], -1).float(), weight, torch.ones(32) if bias else None).sin()

    found = lifted(model, (P,), ranges=FAR)
    assert [(r.rule, r.kind) for r in found.result.rewrites] == [("lift.small-product", Kind.REASSOCIATED)]


def test_products_of_masks_and_activations_stay() -> None:
    mask, weight = torch.ones(16, 1, dtype=torch.bool), torch.randn(8, 1)
    untouched(lambda m, w: F.linear(m.float(), w), (mask, weight))
    untouched(lambda h, w: F.linear(h[:, :1], w.to(BF16)), (H, weight))
    untouched(lambda h, p: torch.einsum("...i,...i->...i", h, h), (H, P))


MADE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "row-times-width": lambda p, h: (lambda i: i[:, None] - i[None])((p % 200).to(BF16) * 97 + (p % 97).to(BF16)),
    "strided": lambda p, h: (lambda i: i[:, None] - i[None])(torch.arange(64).to(BF16) * 33),
    "product-of-coordinates": lambda p, h: (p % 200).to(BF16) * (p % 97).to(BF16) - (p % 200).to(BF16) * (p % 89).to(BF16),
}


@pytest.mark.parametrize("case", MADE)
def test_integers_that_arithmetic_makes_too_large(case: str) -> None:
    """Each operand is exact in bf16; what is made of them is not, and a difference shows it."""
    found = lifted(MADE[case], (P, H))
    before, after = errors(found, (P, H))
    assert "lift.promotion" in found.rules
    assert after < before / 2


def test_a_mask_times_its_fill_is_no_position() -> None:
    """So are two masks that are added: nothing is made of integers there, but a constant rounded."""
    mask = torch.ones(16, dtype=torch.bool)
    untouched(lambda h, m: h + (1 - m.to(BF16))[:, None] * -10000.0, (H, mask))
    untouched(lambda h, m: h + (m.to(FP32) * -10000.0).to(BF16)[:, None], (H, mask))


def test_a_position_that_was_float32_meanwhile_and_meets_an_activation_is_told() -> None:
    found = untouched(lambda p, h: h + p.float().to(BF16)[:, None], (P, H), ranges=FAR)
    assert found.codes == ["NX101"]
    assert "int64 up to 131071" in found.result.findings[0].message


def test_an_undeclared_argmax_of_positions_is_no_mask() -> None:
    found = lifted(lambda p, h: h + p.to(BF16).argmax(0), (P, H))
    assert found.after(P, H * 0)[0].max() == 15
