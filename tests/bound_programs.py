"""Random programs of slice writes whose bounds are tensors: one capture, many run-time values."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.int32, torch.int64, torch.bool]
INT64_MAX = 2**63 - 1
VALUES = [0, 1, 2, 3, 5, -1, -2, -4, 99, -99, INT64_MAX, -INT64_MAX]
# Small ones only where sums and products of them are bounds: eager wraps beyond int64 and so do we, but not usefully.
_SMALL = [0, 1, 2, 3, 4, 6, -1, -2, -5, 9]
_BOUNDS = ["n", "s", "n + 1", "s - n", "n * s", "-n", "n.reshape(1)", "n.int()", "s.clamp(0, 3)", "torch.maximum(n, s)"]


@dataclass
class Program:
    """A function of ``(x, y, n, s)`` as source text; ``x`` and ``y`` have one shape."""

    shape: list[int]
    dtype: torch.dtype
    lines: list[str]

    def __call__(self, x: Tensor, y: Tensor, n: Tensor, s: Tensor) -> tuple[Tensor, ...]:
        scope = {"torch": torch, "x": x.clone(), "y": y, "n": n, "s": s, "reads": []}
        for line in self.lines:
            exec(line, scope)
        reads: Any = scope["reads"]
        return (scope["x"], *reads)  # type: ignore[arg-type]


def generate(rng: random.Random) -> Program:
    program = Program([rng.choice([1, 3, 4, 5]) for _ in range(rng.randrange(1, 4))], rng.choice(DTYPES), [])
    for _ in range(rng.randrange(1, 4)):
        index = _index(rng, len(program.shape))
        boolean = program.dtype is torch.bool
        number = "True" if boolean else rng.choice(["0", "1", "3", "y.flatten()[0]"])
        if program.dtype.is_floating_point and rng.random() < 0.3:
            number = rng.choice(["float('inf')", "-0.0", "float('nan')", "0.5"])
        write = rng.choice(
            [f"x[{index}] = {number}", f"x[{index}] = y[{index}]", f"x[{index}].fill_({number})", f"x[{index}].zero_()",
             f"x[{index}] = x[{index}]", f"x[{index}].copy_(y[{index}])", f"x.transpose(0, -1)[{index}] = {number}"]
            + ([f"x[{index}] ^= True"] if boolean else [f"x[{index}] += 1", f"x[{index}] *= y[{index}]"])
        )  # fmt: skip
        program.lines.append(write)
        if rng.random() < 0.4:
            read = rng.choice(["any", "all", "count_nonzero"] + (["sum"] if not program.dtype.is_floating_point else []))
            part = _index(rng, len(program.shape))
            program.lines.append(f"reads.append(x[{part}].{read}())")
    return program


def _index(rng: random.Random, rank: int) -> str:
    dynamic = rng.randrange(rank)
    items = []
    for dim in range(rank):
        if dim == dynamic or rng.random() < 0.25:
            items.append(_slice(rng))
        else:
            items.append(rng.choice([":", ":", ":", "0", "-1:", "::2", "None, :", ":2"]))
    return ", ".join(items)


def _slice(rng: random.Random) -> str:
    bound, other = rng.choice(_BOUNDS), rng.choice([*_BOUNDS, "", "", "1", "-1", "2"])
    ends = (bound, other) if rng.random() < 0.5 else (other, bound)
    step = rng.choice(["", "", "", ":2", ":3"])
    return f"{ends[0]}:{ends[1]}{step}"


def inputs(rng: random.Random, program: Program, draws: int) -> list[tuple[Tensor, ...]]:
    """``draws`` sets of arguments: corner values, and bounds of every kind."""
    from view_programs import NASTY

    wide = all(not any(op in line for op in (" + 1", "s - n", "n * s", "-n", "n.int()")) for line in program.lines)
    corners: list[Any] = NASTY if program.dtype.is_floating_point else [0, 1, 1] if program.dtype is torch.bool else [0, 1, -1, 7, 2**31 - 1]
    count = torch.Size(program.shape).numel()

    def tensor() -> Tensor:
        return torch.tensor([rng.choice(corners) for _ in range(count)]).to(program.dtype).reshape(program.shape)

    bounds = VALUES if wide else _SMALL
    return [(tensor(), tensor(), torch.tensor(rng.choice(bounds)), torch.tensor(rng.choice(bounds))) for _ in range(draws)]
