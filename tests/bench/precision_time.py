"""What lifting costs in running time: whole models and bare tables, before and after, compiled alike by Inductor or by XLA.

Used by `precision.py`. Calls of before and after take turns, each first every other time, and what is measured is the processor time of
the process: the time of day tells what else the machine did.
"""

from __future__ import annotations

import inspect
import math
import os
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

os.environ.setdefault("PJRT_DEVICE", "CPU")

import corpus
import torch

import nxfx
from nxfx.prepared import PreparedModule

LENGTH = 240
PIPELINES = ("", "lift-int-casts,finite-masks")
Run = Callable[[], object]


def example(name: str, change: Callable[[Any], Any]) -> tuple[Any, dict[str, Any]]:
    """A family of the corpus in bf16 on sequences of `LENGTH` at far positions. Its widths are tiny, so its rotary's share is large."""
    model, kwargs = corpus.BY_NAME[name].build(torch.bfloat16)
    kwargs = {k: v.repeat(1, LENGTH // v.shape[1]) if isinstance(v, torch.Tensor) and v.dim() == 2 else v for k, v in kwargs.items()}
    if "position_ids" in inspect.signature(model.forward).parameters:
        kwargs["position_ids"] = (30000 + torch.arange(LENGTH) * 3).expand(corpus.BATCH, -1).contiguous()
    return change(model), kwargs


class Ratio(NamedTuple):
    """A running time over another: the median of the ratios of neighbouring calls, and its 95 % interval."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f})"


def ratio(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], backend: str, seconds: float = 8.0) -> Ratio:
    """The time after lift-int-casts and finite-masks over that before them, measured for so long."""
    prepared = [nxfx.prepare(model, args, corpus.clone(kwargs), pipeline=p) for p in PIPELINES]
    before, after = (_compiled(each, backend) for each in prepared)  # which moves the model's own weights, so after both
    for run in (before, after):
        for _ in range(5):
            run()
    found = []
    started = time.monotonic()
    while time.monotonic() - started < seconds or len(found) < 20:
        first, second = (before, after) if len(found) % 2 else (after, before)
        one, other = _time(first), _time(second)
        found.append(other / one if first is before else one / other)
    found.sort()
    middle, spread = len(found) / 2, 0.98 * math.sqrt(len(found))  # of the binomial distribution: any distribution's median
    return Ratio(found[int(middle)], found[max(int(middle - spread), 0)], found[min(math.ceil(middle + spread), len(found) - 1)])


def _time(run: Run) -> float:
    started = time.process_time()
    run()
    return time.process_time() - started


def _compiled(prepared: PreparedModule, backend: str) -> Run:
    torch._dynamo.reset()
    if backend == "inductor":
        function, given = torch.compile(prepared.graph_module), prepared.example_inputs
        return torch.no_grad()(lambda: function(*given))
    import torch_xla.core.xla_model as xla

    device = xla.xla_device()
    moved = prepared.to(device)
    function, given = torch.compile(moved.graph_module, backend="openxla"), tuple(t.to(device) for t in moved.example_inputs)

    def run() -> None:
        with torch.no_grad():
            function(*given)
        xla.wait_device_ops()

    return run


def model_ratios(names: tuple[str, ...], change: Callable[[Any], Any], backend: str) -> Iterator[tuple[str, str]]:
    """For each family: the running time after over that before. Fails where one is slower by more than 2 %, or all of them as a whole.

    Args:
        change: puts into a model what is to be lifted.
        backend: "inductor" or "openxla".
    """
    found = []
    for name in names:
        model, kwargs = example(name, change)
        found.append(ratio(model, (), kwargs, backend))
        yield name, str(found[-1])
        assert found[-1].low <= 1.02, (name, found[-1])
    mean = math.exp(sum(math.log(each.median) for each in found) / len(found))
    yield "geometric mean", f"{mean:.3f}"
    assert mean <= 1.02, mean
