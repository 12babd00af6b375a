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
from typing import Any

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


def ratio(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], backend: str, rounds: int = 100) -> float:
    """The median time after lift-int-casts and finite-masks over that before them."""
    prepared = [nxfx.prepare(model, args, corpus.clone(kwargs), pipeline=p) for p in PIPELINES]
    runs = [_compiled(each, backend) for each in prepared]  # which moves the model's own weights, so after both
    for run in runs:
        for _ in range(3):
            run()
    samples: list[list[float]] = [[], []]
    for turn in range(rounds):
        for which in (0, 1) if turn % 2 else (1, 0):
            started = time.process_time()
            runs[which]()
            samples[which].append(time.process_time() - started)
    before, after = (sorted(kept)[rounds // 2] for kept in samples)
    return after / before


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


def model_ratios(names: tuple[str, ...], change: Callable[[Any], Any], backend: str) -> Iterator[tuple[str, float]]:
    """For each family: the running time after over that before. Fails where they are slower as a whole.

    Args:
        change: puts into a model what is to be lifted.
        backend: "inductor" or "openxla".
    """
    found = []
    for name in names:
        model, kwargs = example(name, change)
        found.append(ratio(model, (), kwargs, backend))
        yield name, found[-1]
    mean = math.exp(sum(map(math.log, found)) / len(found))
    yield "geometric mean", mean
    assert mean <= 1.02, mean
