"""``x * t.item()``: the tensor takes the number's place where that gives equal bits."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import nxfx
from nxfx.verification.equivalence import compare

SYMMETRIC = (operator.add, operator.mul, operator.sub, operator.truediv, operator.lt, operator.eq)
DTYPES = {"f32": torch.float32, "f64": torch.float64, "bf16": torch.bfloat16, "f16": torch.float16, "i64": torch.int64, "i32": torch.int32, "u8": torch.uint8}
# dtype and rank of the operand, dtype of what is read; whether every read goes
PAIRS = {
    "f32 f32": True, "f32 f64": True, "f32 i64": True, "f32 bf16": True, "bf16 f32": True, "f16 f32": True, "f16 i64": True,
    "i64 f32": True, "i64 f64": True, "i32 i64": True, "u8 i64": True,
    "f32 f32 0-d": True, "i32 i64 0-d": True, "u8 i32 0-d": True, "i64 f64 0-d": True, "bf16 f32 0-d": False, "f32 f64 0-d": False,
}  # fmt: skip
NUMBERS = (0.0, -0.0, 1.5, -3.0, 1e30, float("inf"), float("nan"), 70000.0)


class Operands(nn.Module):
    def forward(self, x: torch.Tensor, t: torch.Tensor) -> list[torch.Tensor]:
        return [*(f(x, t.item()) for f in SYMMETRIC), *(f(t.item(), x) for f in SYMMETRIC), torch.add(x, t.item()), x.clone().mul(t.item())]


@pytest.mark.parametrize("pair", PAIRS)
def test_a_number_read_to_be_an_operand_is_the_tensor(pair: str) -> None:
    """Over dtypes: 0-d tensors and numbers promote differently, and low precision rounds a 0-d tensor before it computes."""
    first, second, *flat = pair.split()
    dtype, read = DTYPES[first], DTYPES[second]
    values = torch.tensor([1.0, -2.5, 0.0, 3.3, 100.0] if dtype.is_floating_point else [1, 2, 0, 3, 100]).to(dtype)
    x = values[3] if flat else values
    prepared = nxfx.prepare(Operands(), (x, torch.ones((), dtype=read)), check="never")
    assert any(r.rule == "read.operand" for r in prepared.report.rewrites) or not PAIRS[pair]
    assert bool([f for f in prepared.report.findings if f.code == "NX402"]) != PAIRS[pair]
    for number in NUMBERS:
        if not read.is_floating_point and abs(number) > 2**31 or number != number and not read.is_floating_point:
            continue
        t = torch.tensor(number).to(read)
        expected, actual = Operands()(x, t), prepared(x, t)
        assert compare(expected, actual).ok, (number, compare(expected, actual).mismatches)


def chained(x: torch.Tensor, t: torch.Tensor) -> Any:
    return x * (t.item() + 1)


def power(x: torch.Tensor, t: torch.Tensor) -> Any:
    return x ** t.item()


def scaled(x: torch.Tensor, t: torch.Tensor) -> Any:
    return torch.add(x, x, alpha=t.item())


class Fn(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> Any:
        return self.function(x, t)


@pytest.mark.parametrize("function", [chained, power, scaled], ids=lambda f: f.__name__)
def test_more_than_an_operand_stays_and_is_reported(function: Callable[..., Any]) -> None:
    x, t = torch.randn(3), torch.tensor(2)
    try:
        prepared = nxfx.prepare(Fn(function), (x, t))
    except nxfx.CaptureError as error:  # torch 2.9 takes no symbol as an exponent
        assert error.report is not None and [f.code for f in error.report.errors] == ["NX402"]
        return
    assert [f.code for f in prepared.report.errors] == ["NX402"] and compare(function(x, t), prepared(x, t)).ok


def test_what_is_written_after_the_read_does_not_change_the_number() -> None:
    def written(x: torch.Tensor, t: torch.Tensor) -> Any:
        number = t.item()
        t.add_(1)
        return x * number

    prepared = nxfx.prepare(Fn(written), (torch.randn(3), torch.tensor(2)))
    for start in (2, 5):
        x = torch.randn(3)
        assert compare(written(x, torch.tensor(start)), prepared(x, torch.tensor(start))).ok


def test_no_gradient_comes_through_a_number() -> None:
    x, t = torch.randn(3, requires_grad=True), torch.randn((), requires_grad=True)
    prepared = nxfx.prepare(Fn(lambda x, t: x * t.item() + t), (x, t), training=True)
    prepared(x, t).sum().backward()
    assert t.grad is not None and t.grad.item() == 3 and torch.equal(x.grad, t.detach().expand(3))
