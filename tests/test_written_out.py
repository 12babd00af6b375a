"""A finding writes the user's own statement out as data flow, where that is sure to mean the same: what is written is run."""

from __future__ import annotations

import inspect
import math
import textwrap
from collections.abc import Callable
from typing import Any

import pytest
import torch

import nxfx
from nxfx.report.locations import Location
from nxfx.report.written_out import written_out


def early_return(x, n, mask):
    if n > 1 and not mask.all():  # NX401
        return x + 1
    return x - 1


def one_assignment(x, n, mask):
    if n:  # NX401
        x = x * 2
    return x


def both_assign(x, n, mask):
    if mask.any():  # NX401  # noqa: SIM108
        y = x
    else:
        y = -x
    return y


def conditional(x, n, mask):
    return x + (x if n == 2 else -x)  # NX401


def rounds(x, n, mask):
    while n > 0:  # NX401
        x, n = x * 2, n - 1
        x += 1
    return x


def counted(x, n, mask):
    for _ in range(n):  # NX402
        x = x * 2
    return x


def chained(x, n, mask):
    return x * (n.item() + 1)  # NX402


def number(x, n, mask):
    x = x * float(n)  # NX402
    return x + 1


def root(x, n, mask):
    return x * math.sqrt(n)  # NX402


def scaled(x, n, mask):
    return x / math.sqrt(x.shape[0]) * math.sqrt(n.item())  # NX402


def summed(x, n, mask):
    return x[mask].sum()  # NX403


def mean(x, n, mask):
    total = x[x > 1].mean()  # NX403
    return total * 2


WRITTEN = [early_return, one_assignment, both_assign, conditional, rounds, counted, chained, number, root, scaled, summed, mean]


def _line(function: Callable[..., Any]) -> tuple[int, str]:
    lines, first = inspect.getsourcelines(function)
    number, line = next((i, line) for i, line in enumerate(lines) if "# NX" in line)
    return first + number, line.partition("# ")[2].split()[0]


def _rewritten(function: Callable[..., Any], text: str) -> Callable[..., Any]:
    """``function`` with the statement replaced: what a user would make of it."""
    lines, first = inspect.getsourcelines(function)
    number = _line(function)[0] - first
    indent = lines[number][: len(lines[number]) - len(lines[number].lstrip())]
    end = number + 1
    while end < len(lines) and (lines[end].startswith(indent + " ") or lines[end].strip() == "else:"):
        end += 1
    made = textwrap.indent(text, indent) + "\n"
    namespace: dict[str, Any] = {"torch": torch, "math": math, "N": 5}
    exec("".join([*lines[:number], made, *lines[end:]]), namespace)
    return namespace[function.__name__]


@pytest.mark.parametrize("function", WRITTEN, ids=lambda f: f.__name__)
def test_what_is_written_out_computes_the_same(function: Callable[..., Any]) -> None:
    line, code = _line(function)
    text = written_out(code, Location(__file__, line))
    assert text, "nothing is written out"
    other = _rewritten(function, text)
    for n in (0, 1, 2, 4):
        for x in (torch.tensor([0.5, 1.5, 3.0]), torch.tensor([2.0, -1.0, 7.0])):
            for mask in (x > 1, torch.ones(3, dtype=torch.bool)):
                expected, actual = function(x, torch.tensor(n), mask), other(x, torch.tensor(n), mask)
                assert expected.dtype is actual.dtype and torch.allclose(expected, actual, rtol=1e-6), text


def two_values(x, n, mask):
    if n > 1:  # NX401
        return x, n
    return x, n + 1


def more_than_a_value(x, n, mask):
    if n > 1:  # NX401
        x = x + 1
        x.add_(1)
    return x


def which_one(x, n, mask):
    return x[n].sum() + x[mask].sum()  # NX403


def printing(x, n, mask):
    for row in range(n):  # NX402
        print(row)
    return x


@pytest.mark.parametrize("function", [two_values, more_than_a_value, which_one, printing], ids=lambda f: f.__name__)
def test_nothing_is_written_out_where_it_may_mean_something_else(function: Callable[..., Any]) -> None:
    line, code = _line(function)
    assert written_out(code, Location(__file__, line)) == ""


class Loop(torch.nn.Module):
    def forward(self, x: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        while n > 0:
            x, n = x * 2, n - 1
        return x


class Shapes(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x[0] > 0:
            return x
        return x.sum()


def test_sides_of_two_shapes_are_not_written_as_a_choice() -> None:
    (finding,) = nxfx.check(Shapes(), (torch.ones(3),)).errors
    assert "its sides give" in finding.message and finding.instead == ""


def test_the_report_and_the_error_show_it() -> None:
    report = nxfx.check(Loop(), (torch.ones(2), torch.tensor(2)))
    shown = [
        "for _ in range(N):  # N: the most rounds there can be",
        "    active = n > 0",
        "    x, n = torch.where(active, x * 2, x), torch.where(active, n - 1, n)",
    ]
    (finding,) = [f for f in report.errors if f.code == "NX401"]
    assert finding.instead.splitlines() == shown and all(line in str(report) for line in shown)
    assert nxfx.Report.from_dict(report.to_dict()).findings == report.findings
    with pytest.raises(nxfx.CaptureError) as caught:
        nxfx.prepare(Loop(), (torch.ones(2), torch.tensor(2)))
    assert all(line in str(caught.value) for line in shown)
