"""Integers that forward keeps on the model: buffers of the graph where that is exact, an error finding where it is not."""

from __future__ import annotations

import copy
import itertools
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import nxfx
from nxfx.capture.counters import Count
from nxfx.capture.interception import Session, interception
from nxfx.verification.equivalence import compare

CALLS = 10


def state(model: nn.Module) -> dict[str, Any]:
    """The plain attributes of a model, those of its submodules too."""
    return {f"{name}.{k}": v for name, m in model.named_modules() for k, v in vars(m).items() if not k.startswith("_")}


def counts_like_eager(model: nn.Module, *inputs: torch.Tensor, calls: int = CALLS) -> nxfx.PreparedModule:
    """Ten calls on one capture: results, buffers and Python state equal to the model's own after each."""
    eager = copy.deepcopy(model)
    before = state(model)
    prepared = nxfx.prepare(model, inputs)
    assert state(model) == before
    (capture,) = prepared.captures.values()
    generator = torch.Generator().manual_seed(0)
    for number in range(calls):
        fresh = [torch.randn(t.shape, generator=generator).to(t.dtype) if t.is_floating_point() else t for t in inputs]
        expected, actual = eager(*(t.clone() for t in fresh)), prepared(*(t.clone() for t in fresh))
        outcome = compare([expected, dict(eager.named_buffers())], [actual, dict(model.named_buffers())])
        assert outcome.ok, (number, outcome.mismatches)
        assert state(model) == state(eager), number
    assert list(prepared.captures.values()) == [capture]
    assert not [f for f in prepared.report.errors if f.code == "NX406"]
    assert any(r.rule == "state.counter-buffer" for r in prepared.report.rewrites)
    return prepared


# --- what becomes a buffer -------------------------------------------------------------------------------------------


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x * self.calls


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool)


@pytest.mark.parametrize(("dtype", "shape"), [(torch.bfloat16, (3,)), (torch.int32, ()), (torch.uint8, ())], ids=str)
def test_a_counter_promotes_as_a_python_integer(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """A 0-d int64 tensor would make int64 of a 0-d int32 one."""
    counts_like_eager(Counting(), torch.full(shape, 3).to(dtype))


class Cache(nn.Module):
    """A ring of keys with its own length: bounds, positions and masks made of a counter."""

    def __init__(self, size: int = 32) -> None:
        super().__init__()
        self.position = 0
        self.register_buffer("keys", torch.zeros(size, 4))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        start, end = self.position, self.position + x.shape[0]
        self.keys[start:end] = x
        ids = torch.arange(start, end, device=x.device)
        seen = torch.arange(self.keys.shape[0]) < end
        self.position = end
        return torch.where(seen[:, None], self.keys, 0.0), ids, self.keys[start] + x[0], torch.full((2,), start), torch.tensor([start, 7])


def test_a_cache_that_counts_its_own_length_decodes_on_one_capture() -> None:
    counts_like_eager(Cache(), torch.randn(3, 4))


class Spread(nn.Module):
    """Counters in a submodule, a dict and a list, exchanged and set anew."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Counting()
        self.seen = {"steps": 3, "pair": [1, 2]}
        self.low, self.high = 0, 5

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = self.inner(x)
        self.low, self.high = self.high, self.low + 1
        self.seen["steps"] = (self.seen["steps"] * 3 + 1) % 17
        self.seen["pair"][1] = abs(-self.seen["pair"][0] // 2) - 7
        self.seen["pair"][0] += self.inner.calls & 3
        late = (self.inner.calls > 4) & (self.seen["steps"] != 3)
        return x - self.high, self.seen["steps"] / (x * x + 1), x.long() // (self.seen["pair"][1] * 0 + 2), torch.where(x > 0, x, self.low) * late


def test_counters_anywhere_on_the_model_are_exchanged_and_computed_with() -> None:
    prepared = counts_like_eager(Spread(), torch.randn(5))
    assert sum(r.rule == "state.counter-buffer" for r in prepared.report.rewrites) == 6


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls, self.hits = 0, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if x.sum() > 0:
            self.hits += 1
        if self.calls > 3:
            x = x * 2
        return x + self.hits


def test_a_branch_on_a_counter_is_merged_and_a_counter_in_a_branch_too() -> None:
    """Without a buffer the first is baked, and the second has sides that leave different Python values."""
    prepared = counts_like_eager(Branching(), torch.randn(3))
    assert any(r.rule == "branch.both-sides" for r in prepared.report.rewrites)


def test_the_models_integer_is_read_and_reset_as_before() -> None:
    model = Counting()
    prepared = nxfx.prepare(model, (torch.ones(2),))
    assert prepared(torch.ones(2)).tolist() == [1, 1] and model.calls == 1 and type(model.calls) is int
    model.calls = 41
    assert prepared(torch.ones(2)).tolist() == [42, 42] and prepared.calls == 42
    assert len(prepared.captures) == 1 and "calls" not in prepared.state_dict()


def test_a_counter_out_of_the_range_that_is_proved_for_is_refused() -> None:
    model = Counting()
    prepared = nxfx.prepare(model, (torch.ones(2),))
    model.calls = 2**31
    with pytest.raises(nxfx.RangeError, match="'calls' is 2147483648"):
        prepared(torch.ones(2))


def test_the_graph_has_the_counter_as_a_buffer_that_a_compiler_can_alias() -> None:
    prepared = nxfx.prepare(Counting(), (torch.ones(2),))
    ((buffer, output),) = prepared.input_output_aliases.items()
    assert buffer.shape == () and buffer is prepared.graph_module.get_buffer("calls")
    for number in (1, 2, 3):
        results = prepared.graph_module(*prepared.example_inputs)
        assert results[0].tolist() == [number, number]
        buffer.copy_(results[output])


def test_a_saved_module_goes_on_counting(tmp_path: Path) -> None:
    prepared = nxfx.prepare(Cache(), (torch.ones(3, 4),))
    eager = Cache()
    for _ in range(2):
        prepared(torch.ones(3, 4))
        eager(torch.ones(3, 4))
    prepared.save(tmp_path / "cache.pt2")
    loaded = nxfx.load(tmp_path / "cache.pt2")
    assert loaded.position.tolist() == 6
    for number in range(3):
        x = torch.randn(3, 4)
        assert compare(eager(x), loaded(x)).ok, number
    loaded.position.zero_()
    eager.position = 0
    assert compare(eager(x), loaded(x)).ok
    assert set(loaded.state_dict()) == set(eager.state_dict())


# --- what does not ---------------------------------------------------------------------------------------------------


def _range(model: Any, x: torch.Tensor) -> torch.Tensor:
    for _ in range(model.calls):
        x = x + 1
    return x


def _caught(model: Any, x: torch.Tensor) -> torch.Tensor:
    try:
        return x * [1.0, 2.0, 3.0, 4.0, 5.0][model.calls]
    except Exception:
        return x


REFUSED: dict[str, tuple[Callable[[Any, torch.Tensor], Any], str]] = {
    "range": (_range, "range()"),
    "list index, caught": (_caught, "list index"),
    "result": (lambda m, x: (x, m.calls), "a result of forward"),
    "float": (lambda m, x: x * (m.calls * 0.1), "a float"),
    "division": (lambda m, x: x * (m.calls / 2), "division"),
    "power": (lambda m, x: x**m.calls, "torch.pow"),
    "size": (lambda m, x: x.new_zeros(m.calls), "torch.new_zeros"),
    "text": (lambda m, x: x * len(f"{m.calls}"), "text"),
    "key": (lambda m, x: x * {1: 2.0, 2: 3.0, 3: 4.0}[m.calls], "hash()"),
    "alpha": (lambda m, x: torch.add(x, x, alpha=m.calls), "torch.add"),
    "narrow dtype": (lambda m, x: torch.where(x > 0, x.to(torch.int8), m.calls), "torch.where"),
    "more than 64 bits": (lambda m, x: x + m.calls * m.calls * m.calls, "64 bits"),
}


class Refused(nn.Module):
    def __init__(self, use: Callable[[Any, torch.Tensor], Any]) -> None:
        super().__init__()
        self.use, self.calls, self.steps = use, 0, 0

    def forward(self, x: torch.Tensor) -> Any:
        self.calls += 1
        self.steps += 2
        return self.use(self, x), x + self.steps


@pytest.mark.parametrize("name", REFUSED)
def test_a_counter_that_python_needs_is_an_error_finding_and_never_baked_silently(name: str) -> None:
    """The other counter of the model still becomes a buffer."""
    use, reason = REFUSED[name]
    model = Refused(use)
    eager = copy.deepcopy(model)
    prepared = nxfx.prepare(model, (torch.ones(4),))
    assert (model.calls, model.steps) == (0, 0)
    (finding,) = [f for f in prepared.report.errors if f.code == "NX406"]
    assert "'calls'" in finding.message and reason in finding.message and finding.location.source == "self.calls += 1"
    assert [r.before for r in prepared.report.rewrites if r.rule == "state.counter-buffer"] == ["self.steps, a Python integer"]
    for _ in range(3):
        assert compare(eager(torch.ones(4)), prepared(torch.ones(4))).ok


def test_check_lists_the_counter_as_removed_or_reported() -> None:
    (site,) = [s for s in nxfx.check(Counting(), (torch.ones(2),)).sites if s.code == "NX406"]
    assert site.outcome == "removed" and site.location.source == "self.calls += 1"
    outcomes = {s.values[0].partition(":")[0]: s.outcome for s in nxfx.check(Refused(_range), (torch.ones(2),)).sites if s.code == "NX406"}
    assert outcomes == {"calls": "reported", "steps": "removed"}


# --- torch's own rules -----------------------------------------------------------------------------------------------

def _reversed(operation: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda x, n: operation(n, x)


PYTHONS = (operator.add, operator.sub, operator.mul, operator.truediv, operator.floordiv, operator.mod, operator.lt, operator.ge, operator.and_)
MORE = (operator.eq, operator.ne, operator.le, operator.gt, operator.or_, operator.xor, operator.lshift, operator.rshift)
TORCHS = (torch.add, torch.sub, torch.mul, torch.div, torch.floor_divide, torch.remainder, torch.fmod, torch.eq, torch.lt, torch.bitwise_or)
OPERATIONS: dict[str, Callable[[Any, Any], Any]] = {
    **{f.__name__: f for f in (*PYTHONS, *MORE)},
    **{f"reversed {f.__name__}": _reversed(f) for f in PYTHONS},
    **{f"torch.{f.__name__}": f for f in TORCHS},
    "add_": lambda x, n: x.clone().add_(n),
    "imul": lambda x, n: operator.imul(x.clone(), n),
    "where": lambda x, n: torch.where(x == 3, x, n),
    "where reversed": lambda x, n: torch.where(x == 3, n, 0.5),
    "clamp": lambda x, n: x.clamp(min=n),
    "clamp_max": lambda x, n: torch.clamp_max(x, n),
    "masked_fill": lambda x, n: x.masked_fill(x == 3, n),
    "setitem": lambda x, n: operator.setitem(y := x.clone(), ..., n) or y,
    "full": lambda x, n: torch.full((2, 2), n),
    "full of a dtype": lambda x, n: torch.full((2,), n, dtype=torch.bfloat16),
    "tensor": lambda x, n: torch.tensor([n, 3]),
}
INTEGERS = (0, 1, 2, 7, -3, 300, 70000, 2**29 + 1)


def _outcome(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except nxfx.CaptureError:
        return None
    except Exception as error:
        return type(error).__name__


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_count_beside_a_tensor_gives_what_the_integer_gives(name: str) -> None:
    """Over dtypes, 0-d and not, and integers that they hold and do not hold: equal bits, or a refusal."""
    taken = 0
    for dtype, shape, number in itertools.product((*DTYPES, torch.float64, torch.int8), ((), (7,)), INTEGERS):
        x = (torch.tensor([1, 2, 3, -1, 5, 100, 0]) * (1.37 if dtype.is_floating_point else 1)).to(dtype)
        x = x if shape else x[2]
        session = Session(counts=True)
        with interception(session):
            count = Count(session, torch.tensor(number), frozenset({"n"}))
            actual = _outcome(lambda x=x, count=count: OPERATIONS[name](x, count))
        expected = _outcome(lambda x=x, number=number: OPERATIONS[name](x, number))
        if actual is None:
            continue
        if isinstance(expected, str):
            assert actual == expected or dtype in (torch.float16, torch.bool), (dtype, shape, number, expected, actual)
            continue
        taken += 1
        assert compare(expected, actual).ok, (dtype, shape, number, expected, actual)
    assert taken > 20
