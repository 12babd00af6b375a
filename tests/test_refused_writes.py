"""Writes that eager refuses, or whose result is a matter of order: prepare raises at the user's line, in eager's words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import nxfx
from nxfx.capture.export import capture
from nxfx.errors import CaptureError
from nxfx.verification.equivalence import compare


class Writes(torch.nn.Module):
    """``statements`` on copies of x and v; i holds indices, m is a mask of x's shape."""

    def __init__(self, statements: str) -> None:
        super().__init__()
        scope: dict[str, Any] = {"torch": torch}
        exec(f"def run(x, v, i, m):\n    {statements}\n    return x", scope)
        self.run: Callable[..., Tensor] = scope["run"]

    def forward(self, x: Tensor, v: Tensor, i: Tensor, m: Tensor) -> Tensor:
        return self.run(x.clone(), v.clone(), i, m)


def inputs() -> tuple[Tensor, ...]:
    return torch.randn(4, 6), torch.randn(4, 6), torch.tensor([2, 0, 1]), torch.randn(4, 6) > 0


REFUSED = {
    "too many rows": "x[:2] = v[:3]",
    "too many rows for a list of indices": "x[[0, 1]] = v[:3]",
    "too many rows for an index tensor": "x[i[:2]] = v[:3]",
    "too many dims": "x[[0, 1]] = v[:2][None].expand(2, 2, 6)",
    "values of a pair of indices": "x[[0, 1], [2, 3]] = v[0]",
    "index tensors that do not broadcast": "x[[0, 1], [0, 1, 2]] = 1",
    "a mask with too few rows": "x[m[:3]] = 0",
    "a transposed mask": "x[m.t()] = 0",
    "a mask of the wrong axis": "x[:, m[:, 0]] = 0",
    "masked_fill_ with a short mask": "x.masked_fill_(m[:3], 0)",
    "masked_scatter_ of another dtype": "x.masked_scatter_(m, v.double())",
    "an index out of range": "x[[5]] = 1",
    "a negative index out of range": "x[[-5]] = 1",
    "a computed index out of range": "x[torch.arange(5)] = 1",
    "index_fill_ out of range": "x.index_fill_(0, torch.tensor([7]), 1)",
    "index_copy_ out of range": "x.index_copy_(0, torch.tensor([7]), v[:1])",
    "scatter_ out of range": "x.scatter_(0, torch.tensor([[7]]), 1.0)",
    "scatter_ does not wrap": "x.scatter_(0, torch.tensor([[-1]]), 1.0)",
    "an index of another dtype": "x[v[0]] = 1",
    "index_copy_ of int32": "x.index_copy_(0, i.int(), v[:3])",
    "index_copy_ of another dtype": "x.index_copy_(0, i, v[:3].double())",
    "index_put of another dtype": "x[i] = v[:3].double()",
    "index_add_ of another dtype": "x.index_add_(0, i, v[:3].double())",
    "index_add_ of another shape": "x.index_add_(0, i, v[:3, :2])",
    "floats added to integers": "x.long()[1:3] += 0.5",
    "floats multiplied into integers": "y = x.long()\n    y[1:3] *= v[1:3]",
    "slice_scatter of another size": "x = torch.slice_scatter(x, v[:3], 0, 0, 2)",
    "slice_scatter does not broadcast": "x = torch.slice_scatter(x, v[:1], 0, 0, 2)",
    "select_scatter of another size": "x = torch.select_scatter(x, v[:, 0], 0, 1)",
    "diagonal_scatter of another size": "x = torch.diagonal_scatter(x, v[0], 0)",
    "overlapping rows": "x[1:] = x[:-1]",
    "overlapping rows added": "x[1:] += x[:-1]",
    "a square onto its transpose": "y = x[:, :4].clone()\n    y.copy_(y.t())",
    "one place written twice": "x[:1].expand(4, 6)[1:] = 3",
    "a number beyond the dtype": "x.to(torch.int8)[1:3] = 300",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_eager_refuses_raises(name: str) -> None:
    model = Writes(REFUSED[name])
    with pytest.raises((RuntimeError, IndexError)):
        model(*inputs())
    with pytest.raises(CaptureError, match="cannot be captured"):
        capture(model, inputs())


AMBIGUOUS = {
    "overlapping columns": "x[:, 1:] = x[:, :-1]",
    "a part onto its transpose": "x[:4, :4].copy_(x[:4, :4].t())",
    "a number through expand": "x[:1].expand(4, 6).fill_(3)",
    "a row of an expanded tensor": "x[:, :1].expand(4, 3)[:, 1] = v[:, 0]",
    "windows that leave gaps, the last one short": "x[:, :5].unfold(1, 2, 3).fill_(3)",
    "overlapping windows": "x.unfold(1, 3, 1).fill_(3)",
    "overlapping strides": "x.as_strided((3, 3), (1, 1)).copy_(v[:3, :3])",
    "as_strided after a transposed write": "x.t().scatter_(0, i[:1, None].expand(1, 4), 7.0)\n    x.as_strided((3,), (3,), 2)[:1] = 9",
}


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_what_a_functional_graph_cannot_mean_raises(name: str) -> None:
    """Eager takes these, with a result that rests on the order of elements, or that functionalisation gets wrong."""
    Writes(AMBIGUOUS[name])(*inputs())
    with pytest.raises(CaptureError, match="memory|functional form"):
        capture(Writes(AMBIGUOUS[name]), inputs())


ACCEPTED = {
    "leading ones": "x[[0, 1]] = v[None, None, :2]",
    "a mask and a fixed number of values": "x[m] = v[0, 0]\n    x[m[:, 0]] = v[0]\n    x[m[:, 0], 1:3] = 4",
    "a tensor onto itself": "x[1:3].copy_(x[1:3])\n    x[0] = x[0]",
    "parts that do not overlap": "x[:2] = x[2:]\n    x[:, ::2] += x[:, 1::2]",
    "expand that repeats nothing": "x[:, :1].expand(4, 1)[1:] = 3\n    x.expand(1, 4, 6)[0, 1] = v[0]\n    x.expand_as(v)[2] = 1",
    "diagonals": "x.fill_diagonal_(3)\n    x[:3].fill_diagonal_(2)\n    x.t()[1:].fill_diagonal_(5)",
    "int32 indices": "x[i.int()] = 3\n    x[:, i.int()] *= 2",
    "windows with gaps": "x.unfold(1, 2, 3).fill_(3)\n    x.unfold(0, 1, 2).mul_(2)\n    x.unfold(0, 4, 4)[0, 1:] = 3",
    "windows side by side": "x.unfold(1, 2, 2).mul_(2)\n    x.as_strided((2, 3), (6, 2), 1).fill_(1)",
}  # fmt: skip


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_eager_takes_is_taken(name: str) -> None:
    x, *rest = inputs()
    x[0, 0], x[1, 1], x[2, 0] = float("inf"), float("nan"), -0.0
    model = Writes(ACCEPTED[name])
    graph = capture(model, (x, *rest)).graph_module
    with torch.no_grad():
        outcome = compare(model(x, *rest), graph(x, *rest)[0])
    assert outcome.ok, str(outcome)


class Shift(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        x[[0, 1]] = x[:3] * 2  # marker
        return x


def test_the_error_names_the_users_line() -> None:
    with pytest.raises(CaptureError) as caught:
        nxfx.prepare(Shift(), (torch.randn(4, 6),))
    (finding,) = caught.value.report.findings
    assert finding.code == "NX201" and finding.location.source == "x[[0, 1]] = x[:3] * 2  # marker"
    assert "shape mismatch" in finding.message and finding.fix
    assert [f.code for f in nxfx.check(Shift(), (torch.randn(4, 6),)).findings] == ["NX201"]


def test_each_kind_of_write_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixty layers that write their caches alike cost one trial."""
    from nxfx.capture import writes

    tried = []
    real = writes._StandIns.refusal
    monkeypatch.setattr(writes._StandIns, "refusal", lambda self: tried.append(self._node) or real(self))

    def run(x: Tensor, v: Tensor, i: Tensor, m: Tensor) -> Tensor:
        for _ in range(60):
            x = x.index_copy(0, i, v[:3])
        return x

    model = Writes("pass")
    model.run = run
    capture(model, inputs())
    assert len(tried) <= 2


class _Where(torch.nn.Module):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = x.clone()
        y[torch.where(mask)] = -1.0
        return y


@pytest.mark.parametrize("mask", [(torch.arange(24).view(6, 4) % 3 > 0).t(), (torch.arange(4) > 1)[:, None].expand(4, 6)])
def test_a_mask_of_any_strides_is_checked_like_a_dense_one(mask: Tensor) -> None:
    x = torch.randn(6, 4).t()
    prepared = nxfx.prepare(_Where(), (x, mask))
    for given in (mask, ~mask, torch.zeros_like(mask)):
        assert torch.equal(_Where()(x, given), prepared(x, given))
