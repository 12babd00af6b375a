"""docs/value-dependence.md: rows of the page are what a live run gives, and its sums are of its rows."""

from __future__ import annotations

import re

import pytest
import value_corpus

from tests import corpus

PAGE = value_corpus.PAGE.read_text()
ROWS = {line.split(" | ")[0].removeprefix("| "): line for line in PAGE.splitlines() if line.startswith("| ") and "|---" not in line}


@pytest.mark.corpus
@pytest.mark.parametrize("name", ["fsmt", "llama", "dbrx", "wav2vec2"])
def test_the_page_says_what_a_run_gives(name: str) -> None:
    row = value_corpus.measure(corpus.BY_NAME[name])
    assert value_corpus._cells(row) == ROWS[name]


def test_what_nxfx_captures_anew_is_listed_by_name() -> None:
    """fsmt has an ``if`` on a tensor in library code: plain export refuses it, nxfx makes both sides one graph."""
    found = re.search(r"for value dependence and captured by nxfx: (.*)\.", PAGE)
    assert found is not None
    named = set(found.group(1).split(", "))
    rows = {name for name, line in ROWS.items() if f" | {value_corpus.BY_VALUE} | {value_corpus.CAPTURED} | " in line}
    assert "fsmt" in named and named == rows


def test_the_totals_are_those_of_the_rows() -> None:
    total = re.search(r"(\d+) places, (\d+) removed, (\d+) left in the graph and reported, (\d+) in", PAGE)
    assert total is not None
    places, *outcomes = map(int, total.groups())
    cells = [[c.strip() for c in line.split(" | ")] for line in ROWS.values()]
    counted = [sum(int(c[column]) for c in cells if len(c) > 4 and c[column].isdigit()) for column in (2, 3, 4)]
    assert counted == outcomes and sum(counted) == places
