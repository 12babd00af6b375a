"""What a lowering is given in the place of an op, against the op: on eager tensors, before any compiler."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from nxfx.handoff.decompositions import TABLE
from nxfx.verification.equivalence import compare
from tests import tools

aten = torch.ops.aten
LOW, HIGH = torch.iinfo(torch.int32).min, torch.iinfo(torch.int32).max


def agrees(op: Any, *args: Any, **kwargs: Any) -> None:
    outcome = compare(op(*args, **kwargs), TABLE[op](*args, **kwargs))
    assert outcome.ok, (op, [getattr(a, "shape", a) for a in args], kwargs, outcome.mismatches)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int8, torch.uint8, torch.int64], ids=str)
def test_integers_divide_and_round_down_exactly(dtype: torch.dtype) -> None:
    info = torch.iinfo(dtype)
    x = torch.tensor([info.min, info.min + 1, info.max, info.max - 1, 0, 1, 7, 100], dtype=dtype)
    divisors = [d for d in (1, 2, 3, 7, info.max, -2, -3, -7, info.min) if d >= info.min and d]
    for d in divisors:
        agrees(aten.floor_divide.default, x, torch.tensor(d, dtype=dtype))
        agrees(aten.div.Tensor_mode, x, torch.full_like(x, d), rounding_mode="floor")
        agrees(aten.div.Scalar_mode, x, d, rounding_mode="floor")


def test_what_is_no_integer_division_is_left_alone() -> None:
    x = torch.randn(3)
    assert TABLE[aten.div.Tensor_mode](x, x, rounding_mode="floor") is NotImplemented
    assert TABLE[aten.div.Tensor_mode](x.int(), x.int() + 9, rounding_mode="trunc") is NotImplemented
    assert TABLE[aten.floor_divide.default](x.int(), 2.5) is NotImplemented


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.int32, torch.bool], ids=str)
def test_eye(dtype: torch.dtype | None) -> None:
    for n in (0, 1, 5):
        agrees(aten.eye.default, n, dtype=dtype)
        agrees(aten.eye.m, n, 3, dtype=dtype)


def test_unfold_with_gaps_and_overlaps() -> None:
    for x in (tools.nasty_like(torch.zeros(7, 5, 6), 0), torch.randn(7, 5, 6).transpose(0, 2), torch.arange(210).reshape(7, 5, 6)):
        for dim in range(-3, 3):
            for size, step in ((1, 1), (2, 1), (3, 2), (2, 4), (x.shape[dim], 1), (0, 2)):
                agrees(aten.unfold.default, x, dim, size, step)


def test_nearest_reads_the_very_elements_that_the_kernels_read() -> None:
    draw = random.Random(0)
    for _ in range(400):
        rank = draw.choice((1, 2, 3))
        sizes = [draw.randint(1, 40) for _ in range(rank)]
        x = torch.arange(torch.Size(sizes).numel(), dtype=torch.float32).reshape(1, 1, *sizes)
        op = getattr(aten, f"upsample_nearest{rank}d")
        out = [draw.randint(1, 60) for _ in range(rank)]
        agrees(op.vec, x, out, None)
        agrees(op.default, x, out)
        factors = [draw.choice((0.5, 0.3, 1.0, 1.7, 2.0, 3.3)) for _ in range(rank)]
        if all(int(n * f) for n, f in zip(sizes, factors, strict=True)):
            agrees(op.vec, x, None, factors)
            agrees(op.default, x, [int(n * f) for n, f in zip(sizes, factors, strict=True)], *factors)
