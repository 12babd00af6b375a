"""Positions that a condition gave, used to index back: the condition is the index, and no size depends on data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import nxfx
from nxfx.verification.equivalence import compare


class Fn(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> Any:
        return self.function(x.clone(), mask)


def _set(x: torch.Tensor, index: Any, value: Any) -> torch.Tensor:
    x[index] = value
    return x


def increased(x, mask):
    x[torch.where(mask)] += 1
    return x


def rows(x, mask):
    i = torch.where(mask[:, 0])[0]
    x[i] = x[i] * 2
    return x


def columns_of_a_matrix(x, mask):
    found = mask.nonzero()
    x[found[:, 0], found[:, 1]] = -1.0
    return x


def of_numbers(x, mask):
    rows, columns = torch.where(x)
    x[rows, columns] = x[rows, columns] * 3
    return x


def condition_written_later(x, mask):
    i = torch.where(mask[:, 0])[0]
    mask[:] = False
    x[i] = 3.0
    return x


REMOVED: dict[str, Callable[..., Any]] = {
    "where": lambda x, m: _set(x, torch.where(m), 5.0),
    "as_tuple": lambda x, m: _set(x, m.nonzero(as_tuple=True), torch.tensor(float("nan"))),
    "squeezed": lambda x, m: _set(x, m[:, 0].nonzero().squeeze(-1), 0),
    "flattened": lambda x, m: _set(x, torch.argwhere(m[:, 1]).flatten(), torch.tensor([1.0, 2.0, 3.0])),
    "unbind": lambda x, m: _set(x, tuple(torch.nonzero(m).unbind(1)), 7.0),
    "behind a slice": lambda x, m: _set(x, (slice(None), torch.where(m[0])[0]), -2.0),
    "beside a number": lambda x, m: _set(x, (torch.where(m[:, 2])[0], 1), 4.0),
    **{f.__name__.replace("_", " "): f for f in (increased, rows, columns_of_a_matrix, of_numbers, condition_written_later)},
}


def inputs() -> list[tuple[torch.Tensor, torch.Tensor]]:
    x = torch.tensor([[0.5, float("nan"), 2.0], [-0.0, 0.0, float("inf")], [3.0, -1.0, 0.0], [1.0, 5.0, -float("inf")]])
    mask = torch.tensor([[True, False, True], [False, False, False], [True, True, False], [False, True, True]])
    return [(x, mask), (x, ~mask), (x * 0, torch.zeros_like(mask)), (x, torch.ones_like(mask))]


@pytest.mark.parametrize("name", REMOVED)
def test_positions_of_a_condition_that_index_back_are_a_mask(name: str) -> None:
    function = REMOVED[name]
    x, mask = inputs()[0]
    prepared = nxfx.prepare(Fn(function), (x, mask))
    assert "index.found-positions" in [r.rule for r in prepared.report.rewrites]
    assert not [f for f in prepared.report.findings if f.code in ("NX402", "NX403")]
    for x, mask in inputs():
        assert compare(Fn(function)(x, mask.clone()), prepared(x, mask.clone())).ok
    assert not any("nonzero" in str(n.target) for n in prepared.graph_module.graph.nodes)


def other_order(x, mask):
    i, j = torch.where(mask[:3])
    x[j, i] = 1.0
    return x


def one_of_two(x, mask):
    i, _ = torch.where(mask)
    x[i] = 1.0
    return x


def shifted(x, mask):
    i = torch.where(mask[:3, 0])[0]
    x[i + 1] = 1.0
    return x


def written(x, mask):
    i = torch.where(mask[:, 0])[0]
    i.clamp_(max=1)
    x[i] = 1.0
    return x


def beside_another(x, mask):
    x[torch.where(mask)[0], torch.where(mask)[1]] = 1.0
    return x


def returned(x, mask):
    return _set(x, torch.where(mask), 1.0), torch.where(mask)[0]


KEPT = [other_order, one_of_two, shifted, written, beside_another, returned]


@pytest.mark.parametrize("function", KEPT, ids=lambda f: f.__name__)
def test_other_uses_of_positions_stay_and_are_reported(function: Callable[..., Any]) -> None:
    """Never an internal error: a size that depends on data passes through every pass."""
    x, mask = inputs()[0]
    prepared = nxfx.prepare(Fn(function), (x[:, :3].clone(), mask))
    assert [f for f in prepared.report.errors if f.code == "NX403"]
    for x, mask in inputs():
        assert compare(Fn(function)(x, mask.clone()), prepared(x, mask.clone())).ok
