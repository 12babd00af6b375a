"""The boundary: what is enforced of inputs, where the ranges come from, and what the caller can switch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

import nxfx
from nxfx.boundary import InputRule
from nxfx.verification.equivalence import compare


class Model(torch.nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(x)


def tensor(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def prepared_of(function: Any, *values: int, **options: Any) -> nxfx.PreparedModule:
    return nxfx.prepare(Model(function), (tensor(*values),), **options)


def equal(function: Any, prepared: nxfx.PreparedModule, x: torch.Tensor) -> None:
    outcome = compare(function(x), prepared(x))
    assert outcome.ok, outcome.mismatches


# --- what is enforced ---------------------------------------------------------------------------------------------------


def test_a_cast_to_int32_that_the_model_wrote_wraps_as_it_does_in_eager() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return x.to(torch.int32) * 2

    prepared = prepared_of(function, 1, 2)
    assert prepared.report.requirements == {}
    equal(function, prepared, tensor(2**40 + 5, -(2**33) - 1))


def test_beside_another_use_of_the_input_the_range_is_enforced() -> None:
    prepared = prepared_of(lambda x: (x.to(torch.int32) * 2, x % 7), 1, 2)
    with pytest.raises(nxfx.RangeError, match=r"value 1099511627776 at \[1\] .*declare what it can hold"):
        prepared(tensor(1, 2**40))


def test_what_is_computed_from_an_input_that_stays_wide_still_counts_on_its_range() -> None:
    """``as_strided`` keeps the input in 64 bits; ``x // 2`` fits int32 only because the input is taken to."""
    prepared = prepared_of(lambda x: (x.as_strided((2,), (2,)), x // 2 + 1), 0, 1, 2, 3)
    with pytest.raises(nxfx.RangeError, match="input 'x': value 1099511627776"):
        prepared(tensor(2**40, 1, 5, 7))


def test_a_range_that_the_dtype_implies_is_not_scanned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "aminmax", lambda *_: pytest.fail("scanned"))
    InputRule("x", None, 0, 255, "declared").enforce(torch.zeros(4, dtype=torch.uint8), "always")
    InputRule("x", None, -(2**31), 2**31 - 1, "int32").enforce(torch.zeros(4, dtype=torch.int32), "always")


def test_one_scan_per_checked_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    scans = []
    real = torch.aminmax
    monkeypatch.setattr(torch, "aminmax", lambda t, **k: (scans.append(t.shape), real(t, **k))[1])
    rule = InputRule("x", torch.int32, 0, 9, "declared")
    rule.enforce(tensor(1, 2), "always")
    rule.enforce(tensor(1, 2), "first")
    rule.enforce(tensor(1, 200), "never")
    assert len(scans) == 1


@pytest.mark.parametrize("check", ["always", "first", "never"])
def test_check_says_when(check: Any) -> None:
    prepared = prepared_of(lambda x: x + 1, 1, 2, ranges={"x": (0, 9)}, check=check)
    if check == "always":
        with pytest.raises(nxfx.RangeError):
            prepared(tensor(1, 10))
    else:  # "first" was the example
        assert torch.equal(prepared(tensor(1, 10)), tensor(2, 11))


def test_an_unknown_check_is_refused_at_once() -> None:
    with pytest.raises(nxfx.UsageError, match="check is one of always, first, never, not 'sometimes'"):
        prepared_of(lambda x: x + 1, 1, check="sometimes")


def test_an_unbounded_dynamic_dimension_is_enforced_as_it_is_assumed(tmp_path: Path) -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return torch.zeros(1, dtype=torch.int64) + x.shape[0]

    model = Model(function)
    shapes = {"x": {0: torch.export.Dim("n")}}
    prepared = nxfx.prepare(model, (torch.zeros(4),), dynamic_shapes=shapes)
    assert any("taken to stay below 2^31" in f.message for f in prepared.report.findings if f.code == "NX303")
    equal(function, prepared, torch.zeros(9))
    prepared.save(tmp_path / "model.nxfx")
    for one in (prepared, nxfx.load(tmp_path / "model.nxfx")):
        with pytest.raises(nxfx.PrepareError, match=r"input 'x': size 2147483653 of dimension 0"):
            one(torch.zeros(1).expand(2**31 + 5))


# --- sums of undeclared inputs ------------------------------------------------------------------------------------------


def positions(mask: torch.Tensor) -> Any:
    """As OPT and Bloom compute them."""
    return mask.cumsum(-1) * mask - 1, mask.sum(-1)


def test_a_mask_that_is_summed_is_assumed_to_be_as_small_as_its_sums_need() -> None:
    prepared = nxfx.prepare(Model(positions), (torch.ones(2, 64, dtype=torch.int64),))
    assert prepared.report.wide_edges["after"] == 0
    assert prepared.report.requirements == {"x": (-(2**12), 2**12)}
    assert any("`x` is taken to stay within [-4096, 4096], where what is computed from it fits int32" in f.message for f in prepared.report.findings)
    for value in (0, 1, -1, 4096, -4096):
        equal(positions, prepared, torch.full((2, 64), value))
    with pytest.raises(nxfx.RangeError, match=r"value 4097 at \[1, 63\] .*what is computed from larger values may leave int32") as caught:
        prepared(torch.ones(2, 64, dtype=torch.int64).index_put((tensor(1), tensor(63)), tensor(4097)))
    assert caught.value.range == (-4096, 4096) and caught.value.flat_position == 127


def test_an_example_near_the_bound_is_evidence_against_it() -> None:
    prepared = nxfx.prepare(Model(positions), (torch.full((2, 64), 1000),))
    assert prepared.report.requirements == {"x": (-(2**31), 2**31 - 1)}
    assert prepared.report.wide_edges["after"] > 0
    equal(positions, prepared, torch.full((2, 64), 2**31 - 1))


def test_a_declared_range_takes_the_place_of_the_assumption() -> None:
    prepared = nxfx.prepare(Model(positions), (torch.ones(2, 64, dtype=torch.int64),), ranges={"x": (0, 2**20)})
    assert prepared.report.requirements == {"x": (0, 2**20)}
    equal(positions, prepared, torch.full((2, 64), 2**20))


def test_products_alone_are_no_reason_for_an_assumption() -> None:
    """A hash is not a sum: tightening its input would refuse what the model is for."""
    prepared = prepared_of(lambda x: x * 2654435761 % 1000, 1, 2)
    assert prepared.report.requirements == {"x": (-(2**31), 2**31 - 1)}
    equal(lambda x: x * 2654435761 % 1000, prepared, tensor(2**31 - 1, -7))


def test_mode_proved_assumes_nothing_of_sums() -> None:
    pipeline = nxfx.Pipeline.parse("default,narrow-64bit{mode=proved}")
    prepared = nxfx.prepare(Model(positions), (torch.ones(2, 64, dtype=torch.int64),), pipeline=pipeline)
    assert prepared.report.requirements == {}
    equal(positions, prepared, torch.full((2, 64), 2**40))


def test_positions_less_one_are_narrow_within_an_enforced_range() -> None:
    prepared = prepared_of(lambda x: x.view(-1) - 1, 0, 1)
    assert prepared.report.wide_edges["after"] == 0
    assert prepared.report.requirements == {"x": (-(2**30), 2**30)}
    equal(lambda x: x.view(-1) - 1, prepared, tensor(2**30, -(2**30)))
    with pytest.raises(nxfx.RangeError, match=r"value -2147483648 at \[1\] .*what is computed from larger values may leave int32"):
        prepared(tensor(0, -(2**31)))


def outer_masks(x: torch.Tensor) -> Any:
    """As deberta-v2 and big_bird compute them."""
    return x[:, None] * x[None], torch.einsum("i,j->ij", x[1:], x[:2])


def test_a_mask_times_a_mask_is_narrow_within_an_enforced_range() -> None:
    prepared = prepared_of(outer_masks, 0, 1, 1)
    assert prepared.report.wide_edges["after"] == 0
    assert prepared.report.requirements == {"x": (-(2**15), 2**15)}
    equal(outer_masks, prepared, tensor(2**15, -(2**15), 3))
    with pytest.raises(nxfx.RangeError, match="value 32769"):
        prepared(tensor(1, 1, 2**15 + 1))


def test_a_product_of_ids_is_kept_and_takes_every_int32() -> None:
    prepared = prepared_of(outer_masks, 5, 9, 2)
    assert prepared.report.wide_edges["after"] > 0
    equal(outer_masks, prepared, tensor(2**31 - 1, -(2**31), 3))


def test_an_input_with_large_examples_does_not_loosen_the_bound_of_another() -> None:
    def function(x: torch.Tensor, y: torch.Tensor) -> Any:
        return x.cumsum(-1) * x, y + 1

    class Two(torch.nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
            return function(x, y)

    prepared = nxfx.prepare(Two(), (torch.ones(64, dtype=torch.int64), tensor(10**6)))
    assert prepared.report.requirements == {"x": (-(2**12), 2**12), "y": (-(2**26), 2**26)}
    outcome = compare(function(torch.full((64,), 2**12), tensor(2**26)), prepared(torch.full((64,), 2**12), tensor(2**26)))
    assert outcome.ok, outcome.mismatches


# --- what is no tensor --------------------------------------------------------------------------------------------------


class TakesAnything(torch.nn.Module):
    def forward(self, x: Any, times: int = 3) -> torch.Tensor:
        return torch.as_tensor(x) * times + 1


def test_numpy_arrays_are_taken_as_the_model_takes_them() -> None:
    """Their values are part of the capture: none is narrowed unseen, and another value is another capture."""
    model, array = TakesAnything(), numpy.array([1, 2])
    prepared = nxfx.prepare(model)
    assert torch.equal(prepared(array), model(array))
    array[1] = 2**40
    assert torch.equal(prepared(array), model(array))
    assert len(prepared.captures) == 2


@pytest.mark.parametrize("times", [-1, 2**31, 2**40], ids=str)
def test_a_python_int_beyond_int32_is_computed_in_int64(times: int) -> None:
    model = TakesAnything()
    prepared = nxfx.prepare(model)
    for number in (2, times):
        assert torch.equal(prepared(tensor(3, 7), number), model(tensor(3, 7), number))
    assert len(prepared.captures) == 2


# --- outputs ------------------------------------------------------------------------------------------------------------


def test_outputs_are_restored_or_left_in_32_bits() -> None:
    def function(x: torch.Tensor) -> Any:
        return {"next": x % 7, "best": x.argmax(), "same": x}

    restored = prepared_of(function, 1, 5, verify=True)(tensor(3, 4))
    assert {v.dtype for v in restored.values()} == {torch.int64}
    narrow = prepared_of(function, 1, 5, restore_outputs=False, verify=True)(tensor(3, 4))
    assert [narrow[k].dtype for k in ("next", "best", "same")] == [torch.int32, torch.int32, torch.int64]  # `same` is the argument itself
    assert all(torch.equal(narrow[k].long(), restored[k]) for k in restored)


def test_state_is_written_in_the_models_dtypes_whatever_the_outputs_are() -> None:
    class Counter(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(2, dtype=torch.int64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.count.copy_(x % 10)
            return self.count + 1

    model = Counter()
    prepared = nxfx.prepare(model, (tensor(1, 2),), restore_outputs=False)
    assert prepared(tensor(13, 24)).tolist() == [4, 5]
    assert model.count.dtype == torch.int64 and model.count.tolist() == [3, 4]


# --- declarations -------------------------------------------------------------------------------------------------------


class Nested(torch.nn.Module):
    def forward(self, ids: torch.Tensor, extra: dict[str, torch.Tensor], scale: torch.Tensor) -> torch.Tensor:
        return (ids + extra["a"] % 5 + extra["b"] % 5) * scale


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ({"idz": (0, 9)}, r"no input 'idz'\. Did you mean 'ids'\?"),
        ({"ids": (9, 0)}, "'ids' has low 9 above high 0"),
        ({"ids": 9}, r"'ids' wants two integers \(low, high\), not 9"),
        ({"ids": (0.0, 9.0)}, "wants two integers"),
        ({"scale": (0, 1)}, "'scale' is float32, and ranges are of integers"),
        ({"ids": (2**63, 2**64)}, "no int64 is in"),
    ],
)
def test_a_declaration_that_makes_no_sense_is_refused_by_name(ranges: Any, message: str) -> None:
    arguments = (tensor(1), {"a": tensor(1), "b": tensor(2)}, torch.ones(1))
    with pytest.raises(nxfx.UsageError, match=message):
        nxfx.prepare(Nested(), arguments, ranges=ranges)


def test_a_leafs_own_range_goes_before_that_of_its_argument() -> None:
    arguments = (tensor(1), {"a": tensor(1), "b": tensor(2)}, torch.ones(1))
    prepared = nxfx.prepare(Nested(), arguments, ranges={"extra_b": (0, 3), "extra": (0, 50), "ids": (0, 9)})
    assert prepared.report.requirements == {"ids": (0, 9), "extra_a": (0, 50), "extra_b": (0, 3)}
    with pytest.raises(nxfx.RangeError, match="'extra_b': value 4"):
        prepared(tensor(1), {"a": tensor(40), "b": tensor(4)}, torch.ones(1))


# --- float64 ------------------------------------------------------------------------------------------------------------


def test_values_beyond_float32_become_its_ends_and_infinities_stay() -> None:
    class Masked(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.tensor([0.0, torch.finfo(torch.float64).min, float("-inf"), float("nan")], dtype=torch.float64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.mask * 1

    prepared = nxfx.prepare(Masked(), (torch.zeros(4, dtype=torch.float64),), pipeline="default,narrow-64bit{fp64=narrow}")
    found = prepared(torch.tensor([1e300, 0.0, 0.0, 0.0], dtype=torch.float64))
    assert found.dtype == torch.float64
    end = torch.finfo(torch.float32).max
    assert compare(found, torch.tensor([end, -end, float("-inf"), float("nan")], dtype=torch.float64)).ok
