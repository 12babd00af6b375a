"""The bench of precision asserts what docs/precision.md claims; a part of it runs here."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    path = Path(__file__).parent / "bench" / "precision.py"
    spec = importlib.util.spec_from_file_location("bench_precision", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_tables_of_positions_are_as_good_as_float32_and_never_worse(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """`Row.check` holds every claim of the page, at each auto-cast; these are the claims that it is about something."""
    tables = bench.precision_tables
    kept = ("rotary, product", "rotary, fp32 matmul", "rotary, NTK", "timestep", "ALiBi", "T5 buckets")
    monkeypatch.setattr(tables, "SPELLINGS", {name: tables.SPELLINGS[name] for name in kept})
    rows = {row.spelling: row for row in tables.rows((4096,))}
    assert set(rows) == set(kept) and all(len(row.under) == 8 for row in rows.values())
    assert rows["rotary, product"].original.mean == pytest.approx(0.14, rel=0.1), "as NEURON's table of bf16 positions has it"
    was, is_ = rows["rotary, fp32 matmul"].under["matmult", "bf16"]
    assert was.mean > 0.1 > 1e-3 > is_.mean
    assert ("all", "fp16") in rows["rotary, NTK"].overflowed and ("matmult", "fp16") not in rows["rotary, NTK"].overflowed


def test_a_tiny_model_at_far_positions_has_its_tokens_again(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "FAMILIES", ("mistral",))
    ((name, row),) = bench.models()
    assert name == "mistral" and row["lifted"] >= 1
    assert row["agree before"] < 0.6 and row["agree after"] > 0.9
    assert row["after, mean"] < row["before, mean"] / 10


def test_models_that_round_after_the_cosine_get_no_node_and_no_cast(bench: ModuleType) -> None:
    for name, row, rules in bench.counts(("llama", "bert")):
        assert not rules
        assert row["nodes before"] == row["nodes after"] and row["casts before"] == row["casts after"], name
