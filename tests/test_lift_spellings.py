"""lift-int-casts: the casts nobody wrote, and the position encodings that users write, each against float64.

A case is an encoding of positions 30000 and on in bf16, with the factor by which its error has to shrink. None of them is told to the pass:
it sees integers, casts and promotions.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from lifting import errors, lifted
from torch import Tensor
from torch.nn import functional as F

BF16, FP32 = torch.bfloat16, torch.float32
START, COUNT, WIDTH = 30000, 16, 32
POSITIONS = torch.arange(START, START + COUNT)
HIDDEN = torch.randn(COUNT, WIDTH, generator=torch.Generator().manual_seed(0)).to(BF16)


def frequencies(width: int = WIDTH, base: float = 10000.0) -> Tensor:
    return 1.0 / base ** (torch.arange(0, width, 2).to(BF16) / width)


def turned(hidden: Tensor, angles: Tensor) -> Tensor:
    """Half-split rotation."""
    both = torch.cat([angles, angles], -1)
    half = hidden.shape[-1] // 2
    return hidden * both.cos() + torch.cat([-hidden[..., half:], hidden[..., :half]], -1) * both.sin()


def two_dimensional(p: Tensor, h: Tensor) -> Tensor:
    """Qwen2-VL's and Pixtral's: rows and columns each turn half of the width."""
    rows, columns = p // 128, p
    angles = torch.cat([rows[:, None].to(BF16) * frequencies(WIDTH // 2), columns[:, None].to(BF16) * frequencies(WIDTH // 2)], -1)
    return turned(h, angles)


def three_dimensional(p: Tensor, h: Tensor) -> Tensor:
    """Time, height and width as a stack of ids, a section of the width each."""
    ids = torch.stack([p, p // 7, p % 1009]).to(BF16)
    angles = ids[:, :, None] * frequencies()[None, None]
    sections = [part[i] for i, part in enumerate(angles.split([4, 6, 6], -1))]
    return turned(h, torch.cat(sections, -1))


def flux(p: Tensor, h: Tensor) -> Tensor:
    """Diffusers: a rotation matrix a pair, from an einsum."""
    angles = torch.einsum("n,d->nd", p.to(BF16), frequencies())
    matrix = torch.stack([angles.cos(), -angles.sin(), angles.sin(), angles.cos()], -1).unflatten(-1, (2, 2))
    return (matrix * h.unflatten(-1, (-1, 1, 2))).sum(-1).flatten(-2)


def yarn(p: Tensor, h: Tensor) -> Tensor:
    """Interpolated and extrapolated frequencies, blended by a ramp."""
    low, high = 3.0, 12.0
    ramp = ((torch.arange(WIDTH // 2).to(BF16) - low) / (high - low)).clamp(0, 1)
    blended = frequencies() / 8.0 * ramp + frequencies() * (1 - ramp)
    return turned(h, p[:, None].to(BF16) * blended) * (0.1 * math.log(8) + 1)


def ntk(p: Tensor, h: Tensor) -> Tensor:
    """A base that grows with the length."""
    length = p.max() + 1
    base = 10000.0 * ((4.0 * length.to(BF16) / 2048) - 3.0) ** (WIDTH / (WIDTH - 2))
    return turned(h, p[:, None].to(BF16) / base ** (torch.arange(0, WIDTH, 2).to(BF16) / WIDTH))


def longrope(p: Tensor, h: Tensor) -> Tensor:
    """A factor for each frequency, chosen by the length."""
    factors = torch.where(p.max() + 1 > 4096, torch.linspace(1, 30, WIDTH // 2), torch.ones(WIDTH // 2))
    return turned(h, p[:, None].to(BF16) * (1.0 / (factors * 10000.0 ** (torch.arange(0, WIDTH, 2) / WIDTH))).to(BF16))


def written_table(p: Tensor, h: Tensor) -> Tensor:
    """Integers written into slices of a bf16 tensor."""
    table = torch.zeros(COUNT, 2, dtype=BF16)
    table[:, 0] = p
    table[:, 1].copy_(p // 3)
    return h + (table.sum(-1)[:, None] * 0.3).cos()


def meshgrid(p: Tensor, h: Tensor) -> Tensor:
    y, x = torch.meshgrid(torch.arange(600, 616, dtype=BF16), torch.arange(500, 532, dtype=BF16), indexing="ij")
    return h + (y * 0.7 + x * 0.3).sin()


def affine(p: Tensor, h: Tensor) -> Tensor:
    """Sample coordinates of an affine grid, scaled to pixels."""
    theta = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]], dtype=BF16)
    grid = F.affine_grid(theta, [1, 1, COUNT, WIDTH], align_corners=False)
    return h + ((grid[0, ..., 0] + 1) * 4000.0).cos()


def complex_exponential(p: Tensor, h: Tensor) -> Tensor:
    """Angles rounded, then float32, then a complex number that no listed op makes."""
    turn = torch.exp(1j * (p[:, None].to(BF16) * frequencies()).float())
    return torch.view_as_real(torch.view_as_complex(h.float().unflatten(-1, (-1, 2))) * turn).flatten(-2).to(BF16)


def sampled_grid(p: Tensor, h: Tensor) -> Tensor:
    """Coordinates rounded, then float32 for an op that has no other dtype."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, COUNT, dtype=BF16), torch.linspace(-1, 1, WIDTH, dtype=BF16), indexing="ij")
    image = torch.arange(4000.0).view(1, 1, 50, 80)
    return h + F.grid_sample(image, torch.stack([x, y], -1)[None].float(), align_corners=True)[0, 0]


def relative_bias(p: Tensor, h: Tensor) -> Tensor:
    """Slopes times integer distances as the bias of an attention."""
    distance = (p[None, :] - p[:, None]) * 100
    bias = (distance.abs() * torch.tensor(-0.0123, dtype=BF16))[None, None]
    value = torch.linspace(-1, 1, COUNT)[:, None].expand(COUNT, WIDTH).to(BF16)[None, None]
    return F.scaled_dot_product_attention(h[None, None] * 0, h[None, None] * 0, value, attn_mask=bias.to(BF16) + 0)[0, 0]


def interpolation(p: Tensor, h: Tensor) -> Tensor:
    """Bicubic-like source coordinates and their fractions."""
    source = (torch.arange(COUNT, dtype=BF16) * 37 + 0.5) * 1.3 - 0.5
    fraction = source - source.floor()
    return h * fraction[:, None]


ENCODINGS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], float]] = {
    "two-dimensional": (two_dimensional, 10),
    "three-dimensional": (three_dimensional, 10),
    "rotation-matrices": (flux, 10),
    "yarn": (yarn, 10),
    "ntk": (ntk, 5),
    "longrope": (longrope, 1),
    "slice-and-copy-writes": (written_table, 10),
    "meshgrid": (meshgrid, 10),
    "affine-grid": (affine, 5),
    "complex-exponential": (complex_exponential, 10),
    "sampled-grid": (sampled_grid, 10),
    "bias-of-attention": (relative_bias, 1),
    "interpolation": (interpolation, 10),
    "sinusoidal-log-space": (lambda p, h: h + (p[:, None] * torch.exp(torch.arange(WIDTH).to(BF16) * (-9.21 / WIDTH))).sin(), 10),
    "timestep-scaled": (lambda p, h: h + ((p.to(BF16) / 1000.0)[:, None] * 1000.0 * torch.linspace(0.1, 1, WIDTH)).to(BF16).sin(), 10),
    "hidden-in-where": (lambda p, h: h + (torch.where(p > START, p, torch.tensor(0.0, dtype=BF16))[:, None] * 0.3).cos(), 10),
    "hidden-in-cat": (lambda p, h: h + (torch.cat([p[:8], torch.zeros(8, dtype=BF16)])[:, None] * 0.3).cos(), 10),
    "full_like": (lambda p, h: h + (torch.full_like(h, 30001) * 0.3).cos(), 10),
    "arange": (lambda p, h: h + (torch.arange(START, START + COUNT, dtype=BF16)[:, None] * 0.3).cos(), 10),
    "cumsum": (lambda p, h: h + (torch.cumsum(p, 0, dtype=BF16)[:, None] * 0.3).cos(), 10),
    "cumsum-of-a-mask": (lambda p, h: h + (((p > 0).to(BF16).repeat(100).cumsum(0)[-COUNT:])[:, None] * 0.3).cos(), 10),
    "linspace": (lambda p, h: h + (torch.linspace(0, 30000, COUNT, dtype=BF16)[:, None] * 0.3).cos(), 10),
    "compared": (lambda p, h: h * (p < torch.tensor(30008.0, dtype=FP32)).to(BF16)[:, None] + ((p.to(BF16) - 29000)[:, None] * 0.3).cos(), 10),
    "remainder": (lambda p, h: h + (p.to(BF16) % 7)[:, None], 10),
    "floor-then-index": (lambda p, h: h * (torch.arange(6000.0)[torch.floor(p.to(BF16) / 7).long()] - 4285).to(BF16)[:, None], 10),
    "exponential-decay": (lambda p, h: h * torch.exp((p.to(BF16) - START)[:, None] * -0.1), 10),
    "power": (lambda p, h: h * (0.9 ** (p.to(BF16) - START))[:, None], 10),
    "log": (lambda p, h: h * torch.log(p.to(BF16) - (START - 1))[:, None], 10),
    "tangent": (lambda p, h: h + (p[:, None].to(BF16) * 1e-3).tan(), 3),
    "cumprod": (lambda p, h: h * torch.cumprod((p.to(BF16) - START) * 1e-3 + 1, 0)[:, None], 1),
}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_position_encodings(encoding: str) -> None:
    model, factor = ENCODINGS[encoding]
    found = lifted(model, (POSITIONS, HIDDEN), ranges={"p": (0, 131071)})
    assert found.result.changed
    eager, after = errors(found, (POSITIONS, HIDDEN * 0 + 1))
    assert after <= eager / factor, (eager, after)
