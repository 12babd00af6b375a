"""Warm-up: dummy requests for every bucket until latencies settle, nothing of the model's state changed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import doubles
import pytest
import torch
from torch import nn

import nxfx
from nxfx import latency


class Clock:
    """Each call of the function under test takes as long as it says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: list[float]) -> None:
        self.now, self.seconds, self.calls = 0.0, list(seconds), []
        monkeypatch.setattr(latency.time, "perf_counter", lambda: self.now)

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.calls.append((args, kwargs))
        self.now += self.seconds.pop(0) if len(self.seconds) > 1 else self.seconds[0]
        return torch.zeros(1)


@pytest.mark.parametrize(
    ("seconds", "requests", "settled"),
    [
        ([5.0, 1.0], 3, True),  # a slow first request
        ([5.0, 3.0, 1.0, 1.0], 4, True),
        ([1.0], 3, True),
        ([64.0, 32.0, 16.0, 8.0, 4.0, 2.0, 1.9], 7, True),
        ([2.0**-n for n in range(20)], 15, False),  # never: it stops after five times three
    ],
)
def test_it_returns_when_settled(monkeypatch: pytest.MonkeyPatch, seconds: list[float], requests: int, settled: bool) -> None:
    clock = Clock(monkeypatch, seconds)
    report = nxfx.warmup(clock, (torch.zeros(2),))
    (bucket,) = report.buckets
    assert (len(clock.calls), bucket.first, bucket.settled, report.settled) == (requests, seconds[0], settled, settled)
    assert ("settled at" in str(report)) == settled


def test_every_bucket_is_sent_in_the_form_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, [1.0])
    x = torch.ones(2)
    report = nxfx.warmup(clock, [(x,), {"x": x}, ((x,), {"flag": True}), x], iterations=2)
    shapes = [([a.shape for a in args], sorted(kwargs)) for args, kwargs in clock.calls[::2]]
    assert shapes == [([x.shape], []), ([], ["x"]), ([x.shape], ["flag"]), ([x.shape], [])]
    assert len(report.buckets) == 4 and "float32[2]" in str(report)


def test_what_a_request_writes_does_not_reach_the_example() -> None:
    x = torch.zeros(3)
    nxfx.warmup(lambda t: t.add_(1), (x,))
    assert torch.equal(x, torch.zeros(3))


def test_nothing_is_sent_where_the_runtime_warms_up_itself() -> None:
    calls = []

    class Application:
        neuron_config = SimpleNamespace(skip_warmup=False)

        def __call__(self, x: torch.Tensor) -> None:
            calls.append(x)

    report = nxfx.warmup(Application(), (torch.ones(1),))
    assert not calls and "skip_warmup is False" in str(report) and not report.buckets
    Application.neuron_config = SimpleNamespace(skip_warmup=True)
    nxfx.warmup(Application(), (torch.ones(1),))
    assert len(calls) >= 3


@pytest.mark.parametrize(("examples", "iterations"), [([], 3), ((torch.ones(1),), 0)])
def test_senseless_requests_are_refused(examples: Any, iterations: int) -> None:
    with pytest.raises(nxfx.UsageError):
        nxfx.warmup(lambda *a: None, examples, iterations)


class Running(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(3))
        self.calls = 0
        self.plain = [torch.zeros(3)]

    def forward(self, ids: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        self.total += x
        self.plain[0].add_(1)
        return self.total.cumsum(0) + ids


def test_a_prepared_module_warms_up_each_capture_and_its_state_is_put_back() -> None:
    model = Running()
    prepared = nxfx.prepare(model)
    with pytest.raises(nxfx.PrepareError, match="nothing is captured yet"):
        prepared.warmup()
    prepared(torch.tensor([1]), torch.ones(3))
    prepared(torch.tensor([[1]]), torch.ones(3))
    report = prepared.warmup(2)
    assert [bucket.shapes for bucket in report.buckets] == ["(int64[1], float32[3])", "(int64[1, 1], float32[3])"]
    assert torch.equal(model.total, torch.full((3,), 2.0)) and torch.equal(model.plain[0], torch.full((3,), 2.0))
    assert len(prepared.captures) == 2


def test_a_traced_module_with_state_on_the_device_asks_first() -> None:
    with doubles.installed("torch_neuronx"):
        traced = nxfx.trace(Running(), (torch.tensor([1]), torch.ones(3)), target="trn1")
        with pytest.raises(nxfx.PrepareError, match=r"total.*changes_state=True"):
            traced.warmup()
        assert len(traced.warmup(2, changes_state=True).buckets) == 1
