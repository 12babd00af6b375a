"""Value sites: `nxfx.check` lists every place where a value reaches Python, a shape or the host, and no other."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import site_models
import torch

import nxfx

SITE = re.compile(r"# site: (.*)$")
# From bad to good: a capture may come to do better than what is listed.
ORDER = ("refused", "reported", "removed")


class Model(torch.nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor, n: torch.Tensor, mask: torch.Tensor) -> Any:
        return self.function(x, n, mask)


def example() -> tuple[torch.Tensor, ...]:
    x = torch.tensor([[0.5, -1.0, 2.0], [1.5, 0.25, -0.5], [3.0, -2.0, 1.0], [0.0, 1.0, -1.5]])
    return x, torch.tensor(2), x > 0


def expected(function: Callable[..., Any]) -> dict[tuple[int, str], tuple[str, str]]:
    """(line, kind) → (code, outcome), read from the comments of a model and of the helper it calls."""
    found = {}
    for part in (function, *([site_models.helper] if "helper(" in inspect.getsource(function) else [])):
        lines, first = inspect.getsourcelines(part)
        for number, line in enumerate(lines, first):
            for text in SITE.search(line).group(1).split("; ") if SITE.search(line) else ():
                *kind, code, outcome = text.split(" ")
                found[number, " ".join(kind)] = (code, outcome)
    return found


MODELS = {**site_models.SINGLE, **site_models.SEVERAL}


@pytest.mark.parametrize("name", MODELS)
def test_every_site_is_listed_and_none_is_invented(name: str) -> None:
    wanted = expected(MODELS[name])
    assert wanted or name == "clean"
    report = nxfx.check(Model(MODELS[name]), example())
    assert {(s.location.line, s.kind): s.code for s in report.sites} == {key: code for key, (code, _) in wanted.items()}
    for site in report.sites:
        assert site.location.file == site_models.__file__
        assert site.location.source == site_models_line(site.location.line)
        assert site.count >= 1 and site.becomes["legacy trace"] and site.becomes["torch.compile"]
        outcome = wanted[site.location.line, site.kind][1]
        assert ORDER.index(site.outcome) >= ORDER.index(outcome), (site.outcome, outcome)
        stands = [f for f in report.findings if f.location.line == site.location.line and f.code.startswith(("NX2", "NX4"))]
        assert bool(stands) == (site.outcome != "removed")


def site_models_line(number: int) -> str:
    return inspect.getsource(site_models).splitlines()[number - 1].strip()
