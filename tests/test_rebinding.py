"""Tensors that forward replaces on the model: written to the graph's buffers where nothing else holds the old one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import nxfx
from nxfx.verification.equivalence import compare

CALLS = 6


class Holding(nn.Module):
    """Tensors in an attribute, a list and a dict; ``step`` is forward."""

    def __init__(self, step: Callable[[Any, torch.Tensor], Any]) -> None:
        super().__init__()
        self.step = step
        self.a, self.b = torch.zeros(3), torch.ones(3)
        self.items = [torch.zeros(3), torch.zeros(3, dtype=torch.int64)]
        self.register_buffer("kept", torch.zeros(2, 3))

    def forward(self, x: torch.Tensor) -> Any:
        return self.step(self, x)

    def held(self) -> list[Any]:
        return [self.a, self.b, *self.items, self.kept]


def recurrent(m: Any, x: torch.Tensor) -> Any:
    m.a = torch.tanh(m.a + x)
    m.items[0] = m.items[0] * 0.5 + m.a
    m.items[1] = m.items[1] + 1
    return m.a, m.items[0] * m.items[1]


def exchanged(m: Any, x: torch.Tensor) -> Any:
    m.a, m.b = m.b + x, m.a - x
    return m.a * m.b


def on_one_side(m: Any, x: torch.Tensor) -> Any:
    if x.sum() > 0:
        m.a = m.a + x
    return m.a * 2


def returned(m: Any, x: torch.Tensor) -> Any:
    old = m.a
    m.a = x * 2
    return old


def shifted(m: Any, x: torch.Tensor) -> Any:
    m.a = m.b
    m.b = x * 2
    return m.a + m.b


def shared(m: Any, x: torch.Tensor) -> Any:
    m.a = m.b = x * 2
    m.a.add_(1)
    return m.b + 0


def the_argument(m: Any, x: torch.Tensor) -> Any:
    y = m.a + x
    m.a = x
    return y


def a_view(m: Any, x: torch.Tensor) -> Any:
    m.kept.add_(x)
    m.a = m.kept[0]
    return m.a * 2


def written_first(m: Any, x: torch.Tensor) -> Any:
    m.a.add_(x)
    m.a = m.a * 2
    return m.a + 1


BUFFERS = {"recurrent": (recurrent, 3), "exchanged": (exchanged, 2), "on one side": (on_one_side, 1)}
STAYING = {f.__name__.replace("_", " "): f for f in (returned, shifted, shared, the_argument, written_first)}


def like_eager(model: Holding) -> nxfx.PreparedModule:
    """Results and state equal after each call, and those who held the old tensors hold what they held."""
    eager = copy.deepcopy(model)
    prepared = nxfx.prepare(model, (torch.ones(3),))
    generator = torch.Generator().manual_seed(0)
    for number in range(CALLS):
        x = torch.randn(3, generator=generator)
        before = [m.held() for m in (eager, model)]
        results = [m(x.clone()) for m in (eager, prepared)]
        now = [[*before[i], m.held(), results[i]] for i, m in enumerate((eager, model))]
        outcome = compare(*now)
        assert outcome.ok, (number, outcome.mismatches)
        assert [a is b for a, b in zip(before[0], eager.held(), strict=True)] == [
            a is b for a, b in zip(before[1], model.held(), strict=True)
        ]
    return prepared


@pytest.mark.parametrize("name", [n for n in BUFFERS if n != "on one side"])
def test_a_replaced_tensor_is_a_buffer_of_the_graph(name: str) -> None:
    step, count = BUFFERS[name]
    prepared = like_eager(Holding(step))
    assert len(prepared.captures) == 1 and not [f for f in prepared.report.findings if f.code == "NX406"]
    rebound = [r for r in prepared.report.rewrites if r.rule == "state.rebound-buffer"]
    assert len(rebound) == count and len(prepared.input_output_aliases) == count


def test_a_tensor_that_one_side_of_a_branch_replaces_is_chosen() -> None:
    model = Holding(on_one_side)
    eager, prepared = copy.deepcopy(model), nxfx.prepare(model, (torch.ones(3),))
    for x in (torch.ones(3), -torch.ones(3), torch.full((3,), 2.0)):
        assert compare([eager(x), eager.held()], [prepared(x), model.held()]).ok
    assert [r.rule for r in prepared.report.rewrites if r.rule.startswith("state")] == ["state.rebound-buffer"]


@pytest.mark.parametrize("name", STAYING)
def test_where_something_else_holds_the_tensor_python_goes_on_and_it_is_reported(name: str) -> None:
    prepared = like_eager(Holding(STAYING[name]))
    assert [f for f in prepared.report.findings if f.code == "NX406" and "rebinds" in f.message]


def test_a_part_of_another_tensor_left_in_an_attribute_is_an_error() -> None:
    """``self.a = self.kept[0]`` follows what is written to ``kept``; a copy does not."""
    (finding,) = [f for f in nxfx.prepare(Holding(a_view), (torch.ones(3),)).report.errors if f.code == "NX406"]
    assert "a part of another tensor in 'a'" in finding.message


def test_the_graph_alone_carries_the_state() -> None:
    """As it runs once compiled: outputs go back into the buffers they alias."""
    model = Holding(recurrent)
    eager, prepared = copy.deepcopy(model), nxfx.prepare(model, (torch.ones(3),))
    for _ in range(3):
        x = torch.randn(3)
        results = prepared.graph_module(x)
        assert compare(list(eager(x)), list(results[:2])).ok
        for buffer, output in prepared.input_output_aliases.items():
            buffer.copy_(results[output])


def test_a_saved_module_carries_the_state(tmp_path: Path) -> None:
    model = Holding(recurrent)
    eager, prepared = copy.deepcopy(model), nxfx.prepare(model, (torch.ones(3),))
    assert compare(eager(torch.ones(3)), prepared(torch.ones(3))).ok
    prepared.save(tmp_path / "held.pt2")
    loaded = nxfx.load(tmp_path / "held.pt2")
    for _ in range(3):
        x = torch.randn(3)
        assert compare(eager(x), loaded(x)).ok
