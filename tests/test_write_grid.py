"""The grid of slice bounds: dim × start × end × step, static and as tensors, through prepare(), strictly equal to eager."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from tools import nasty_like, random_like
from torch import Tensor

import nxfx
from nxfx.verification.equivalence import compare

INT64_MAX = 2**63 - 1
BOUNDS = [None, 0, 1, -1, 2, -2, 99, -99]  # 8 × 8 bounds × 3 dims × 3 steps: 576 cases
SENTINELS = [None, 1, INT64_MAX, -INT64_MAX]
DIMS, STEPS = (0, 1, -1), (1, 2, 3)
DTYPES = [torch.float32, torch.bfloat16, torch.int32, torch.bool]
PIPELINE = "mask-slice-writes,flag-value-dependence"
SCATTERS = ("scatter", "index_put", "copy_", "aten.copy", "item", "scalar_dense")


def at(dim: int, index: slice) -> tuple[object, ...]:
    return (index,) if dim == 0 else (slice(None), index) if dim == 1 else (..., index)


def bases(dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """Base and value: finite ones, then inf, nan, -0.0 and the like."""
    for make in (random_like, nasty_like):
        example = torch.ones(4, 5, dtype=dtype)
        yield make(example, 1), make(example, 2)


class Static(torch.nn.Module):
    """Every pair of bounds along one dim with one step: a tensor is written, and every other time a number."""

    def __init__(self, dim: int, step: int) -> None:
        super().__init__()
        self.dim, self.step = dim, step
        self.pairs = [*itertools.product(BOUNDS, BOUNDS), *zip(SENTINELS, reversed(SENTINELS), strict=True)]

    def forward(self, x: Tensor, v: Tensor) -> list[Tensor]:
        results = []
        for number, (start, end) in enumerate(self.pairs):
            y, where = x.clone(), at(self.dim, slice(start, end, self.step))
            y[where] = 1 if number % 4 == 3 else v[where].flip(0)
            results.append(y)
        return results


QUICK = {(torch.float32, 0, 1), (torch.bfloat16, 1, 2), (torch.int32, -1, 3)}


@pytest.mark.parametrize(
    ("dtype", "dim", "step"),
    [
        pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow, id="-".join(map(str, case)))
        for case in itertools.product(DTYPES, DIMS, STEPS)
    ],
)
def test_static_bounds(dtype: torch.dtype, dim: int, step: int) -> None:
    """Traps 11, 12, 13, 16, 20. The pass alone has the grid in test_mask_slice_writes.py; this is the way from the model."""
    model = Static(dim, step)
    prepared = nxfx.prepare(model, next(bases(dtype)), pipeline=PIPELINE)
    assert not prepared.report.findings
    targets = [str(n.target) for n in prepared.graph_module.graph.nodes if n.op == "call_function"]
    assert not [t for t in targets if any(s in t for s in SCATTERS)]
    for inputs in bases(dtype):
        outcome = compare(model(*inputs), prepared(*inputs))
        assert outcome.ok, str(outcome)


class Dynamic(torch.nn.Module):
    """One slice in the four ways in which a bound can be absent; what is written is a number, a part and a 0-d tensor."""

    def __init__(self, dim: int, step: int) -> None:
        super().__init__()
        self.dim, self.step = dim, step

    def forward(self, x: Tensor, v: Tensor, start: Tensor, end: Tensor) -> list[Tensor]:
        results = []
        for first, last in ((start, end), (start, None), (None, end)):
            where = at(self.dim, slice(first, last, self.step))
            for value in ("part", "number", "single"):
                y = x.clone()
                y[where] = v[where] if value == "part" else 1 if value == "number" else v[0, 0]
                results.append(y)
        return results


@pytest.mark.parametrize(("dim", "step"), list(itertools.product(DIMS, STEPS)))
def test_tensor_bounds(dim: int, step: int) -> None:
    """One capture per (dim, step, dtype) serves all pairs of bounds; each absent bound is a form of its own."""
    numbers = [b for b in (*BOUNDS, INT64_MAX, -INT64_MAX) if b is not None]
    model = Dynamic(dim, step)
    for dtype in DTYPES if (dim, step) in ((0, 1), (1, 2), (-1, 3)) else DTYPES[:1]:
        inputs = list(bases(dtype))
        prepared = nxfx.prepare(model, (*inputs[0], torch.tensor(1), torch.tensor(3)), pipeline=PIPELINE, check="never")
        targets = [str(n.target) for n in prepared.graph_module.graph.nodes if n.op == "call_function"]
        assert not [t for t in targets if any(s in t for s in SCATTERS)]
        for (start, end), arguments in itertools.product(itertools.product(numbers, numbers), inputs):
            bounds = torch.tensor(start), torch.tensor(end)
            outcome = compare(model(*arguments, *bounds), prepared(*arguments, *bounds))
            assert outcome.ok, f"{dtype} [{start}:{end}:{step}] of dim {dim}: {outcome}"
        assert len(prepared.captures) == 1
