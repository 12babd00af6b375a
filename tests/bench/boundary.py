"""What the boundary costs a call: the range check and the cast of int64 inputs, against the plain cast. Run with `make bench`.

    python tests/bench/boundary.py          1, 8 and 64 inputs of 128k elements

The plain cast is what a wrapper without a check does: ``.to(torch.int32)``. The fastest of many calls, in microseconds, one thread:
these machines are shared.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from nxfx.boundary import Boundary, InputRule

ELEMENTS = 128 * 1024


def fastest_us(call: Callable[[], Any], seconds: float = 1.5) -> float:
    """The fastest of as many calls as fit in ``seconds``, after two that do not count."""
    call(), call()
    times = []
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or len(times) < 5:
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return min(times) * 1e6


def measure(count: int) -> dict[str, float]:
    """Microseconds a call for ``count`` inputs: the plain cast, and the boundary in each of its modes."""
    values = [torch.randint(0, 100_000, (ELEMENTS,)) for _ in range(count)]
    found = {"plain .to(int32)": fastest_us(lambda: [v.to(torch.int32) for v in values])}
    for check in ("always", "first", "never"):
        boundary = Boundary([InputRule(f"x{i}", torch.int32, 0, 2**31 - 1, "int32") for i in range(count)])
        found[f"check={check}"] = fastest_us(lambda b=boundary, c=check: b.admit(values, c))  # type: ignore[misc]
    return found


def main() -> None:
    torch.set_num_threads(1)
    table = Table("inputs", "plain .to(int32)", "check=always", "ratio", "check=first", "check=never", title=f"int64 inputs of {ELEMENTS:,} elements")
    for count in (1, 8, 64):
        row = measure(count)
        plain, always, first, never = row.values()
        table.add_row(str(count), f"{plain:,.0f}", f"{always:,.0f}", f"{always / plain:.2f}", f"{first:,.0f}", f"{never:,.0f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
