"""Strict comparison of outputs: nothing is dropped, broadcast, cast or skipped before it is compared.

Order of the checks: structure and number of outputs; Python values with their types; then for each tensor dtype, shape,
layout and device type; NaN positions; signed infinities; signs of zeros; and last the bits (``exact``) or the size of
the error (every other kind). Integers, booleans and dtypes without arithmetic are compared bit for bit in every kind.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor

from nxfx.errors import UsageError
from nxfx.verification.measures import (
    ORDERED_BITS,
    ErrorMeasures,
    ErrorStats,
    bits_of,
    component_dtype,
    components,
    dtype_name,
    element,
    error_against,
    first_index,
    on_host,
    shape_text,
    ulp_distance,
    widen,
)
from nxfx.verification.structure import Pairing, as_tensor

__all__ = ["REFINES_FACTOR", "Comparison", "ErrorMeasures", "ErrorStats", "Kind", "compare", "error_against", "ulp_distance"]

Kind = Literal["exact", "refines", "reassociated", "close"]

# A refinement's mean and 99.9th-percentile error against float64 may exceed eager's by this factor (docs: the promise).
REFINES_FACTOR = 1.02


@dataclass
class Comparison:
    """The verdict of :func:`compare`; true when everything agrees.

    Attributes:
        kind: the kind of agreement that was asked for.
        mismatches: one readable line for each difference, starting with the output's path.
        leaves: how many outputs were compared, Python values included.
        measures: error of every floating-point output whose metadata agree, by path; empty for ``exact``.
    """

    kind: Kind
    mismatches: list[str] = field(default_factory=list)
    leaves: int = 0
    measures: dict[str, ErrorMeasures] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return not self.mismatches

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        if self.ok:
            return f"{self.kind}: {self.leaves} output(s) agree"
        lines = [f"{self.kind}: {len(self.mismatches)} mismatch(es)", *self.mismatches]
        return "\n  ".join(lines)


@torch.no_grad()
def compare(
    expected: object,
    actual: object,
    *,
    kind: Kind = "exact",
    max_abs: float | None = None,
    mean_abs: float | None = None,
    max_rel: float | None = None,
    max_ulp: int | None = None,
    reference: object = None,
    check_device: bool = True,
    signed_zeros: bool = True,
) -> Comparison:
    """Compare two outputs of any structure (tensors, containers, dataclasses, ``ModelOutput``, cache objects).

    Args:
        expected: what the model returned.
        actual: what the candidate returned.
        kind: ``"exact"`` wants equal bits (NaN payloads aside). The other kinds want NaN, infinities and zeros to agree
            and the error at every other element within the bounds given: at least one of them, or ``reference``.
        max_abs: bound on ``|actual - expected|``.
        mean_abs: bound on the mean of ``|actual - expected|`` over the finite elements of each tensor.
        max_rel: bound on ``|actual - expected| / |expected|`` (infinite where only ``expected`` is zero).
        max_ulp: bound on :func:`ulp_distance`. Every bound given must hold.
        reference: for ``"refines"``: the same outputs computed in float64. The mean and the 99.9th percentile of
            ``actual``'s error against it may be at most 1.02 times ``expected``'s.
        check_device: whether tensors must be on the same type of device.
        signed_zeros: whether 0.0 and -0.0 differ; ``exact`` needs it.

    Raises:
        UsageError: an unknown kind, or options that do not belong to the kind.
    """
    bounds = {"max_abs": max_abs, "mean_abs": mean_abs, "max_rel": max_rel, "max_ulp": max_ulp}
    rules = _Rules(kind, {k: v for k, v in bounds.items() if v is not None}, check_device, signed_zeros)
    rules.validate(has_reference=reference is not None)
    pairing = Pairing.of(expected, actual)
    result = Comparison(kind, pairing.mismatches, leaves=len(pairing.leaves))
    for path, expected_leaf, actual_leaf in pairing.leaves:
        result.mismatches += _compare_leaf(path, expected_leaf, actual_leaf, rules, result.measures)
    if reference is not None:
        result.mismatches += _refinement_mismatches(pairing, Pairing.of(expected, reference))
    return result


@dataclass(frozen=True)
class _Rules:
    kind: Kind
    bounds: Mapping[str, float]
    check_device: bool
    signed_zeros: bool

    def validate(self, *, has_reference: bool) -> None:
        if self.kind not in get_args(Kind):
            raise UsageError(f"unknown kind {self.kind!r}; one of {', '.join(get_args(Kind))}")
        if has_reference and self.kind != "refines":
            raise UsageError(f"reference= belongs to kind='refines', not to {self.kind!r}")
        if self.kind == "exact" and (self.bounds or not self.signed_zeros):
            raise UsageError("kind='exact' takes no tolerance and counts the sign of zeros")
        if self.kind != "exact" and not self.bounds and not has_reference:
            raise UsageError(f"kind={self.kind!r} needs a bound: max_abs, mean_abs, max_rel or max_ulp")
        for name, bound in self.bounds.items():
            if not 0 <= bound < math.inf:
                raise UsageError(f"{name}={bound} is not a finite, non-negative bound")


def _compare_leaf(
    path: str, expected: Any, actual: Any, rules: _Rules, measures: dict[str, ErrorMeasures]
) -> list[str]:
    if isinstance(expected, torch.device):
        same = expected.type == actual.type or not rules.check_device
        return [] if same else [f"{path}: device differs: expected {expected}, actual {actual}"]
    expected_tensor, actual_tensor = as_tensor(expected), as_tensor(actual)
    if expected_tensor is None or actual_tensor is None:
        same = _equal_objects(expected, actual)
        return [] if same else [f"{path}: value differs: expected {expected!r}, actual {actual!r}"]
    mismatches = _metadata_mismatches(expected_tensor, actual_tensor, rules)
    if not mismatches:
        pair = _TensorPair(path, on_host(expected_tensor), on_host(actual_tensor))
        mismatches = pair.mismatches(rules)
        if rules.kind != "exact" and pair.is_measurable:
            measures[path] = pair.measures()
    return [f"{path}: {line}" for line in mismatches]


def _equal_objects(expected: Any, actual: Any) -> bool:
    if isinstance(expected, np.ndarray | np.generic):
        same_metadata = expected.dtype == actual.dtype and expected.shape == actual.shape
        return bool(same_metadata and expected.tolist() == actual.tolist())
    return expected is actual or (expected == actual) is True


def _metadata_mismatches(expected: torch.Tensor, actual: torch.Tensor, rules: _Rules) -> list[str]:
    pairs = [
        ("dtype", dtype_name(expected.dtype), dtype_name(actual.dtype)),
        ("shape", shape_text(expected), shape_text(actual)),
        ("layout", str(expected.layout), str(actual.layout)),
    ]
    if rules.check_device:
        pairs.append(("device", expected.device.type, actual.device.type))
    mismatches = [f"{what} differs: expected {one}, actual {other}" for what, one, other in pairs if one != other]
    for side, tensor in (("expected", expected), ("actual", actual)):
        if tensor.is_meta or isinstance(tensor, FakeTensor) or tensor.is_quantized:
            mismatches.append(f"cannot compare values: {side} is a meta, fake or quantized tensor")
    return mismatches


@dataclass
class _TensorPair:
    """Two dense host tensors of one dtype and shape."""

    path: str
    expected: torch.Tensor
    actual: torch.Tensor

    @property
    def is_measurable(self) -> bool:
        return component_dtype(self.expected) in ORDERED_BITS

    def mismatches(self, rules: _Rules) -> list[str]:
        if not self.is_measurable:
            differ = bits_of(self.expected) != bits_of(self.actual)
            return self._report("values differ", differ)
        special = self._special_values(rules)
        lines = [line for what, mask in special.items() for line in self._report(what, mask)]
        if rules.kind == "exact":
            differ = bits_of(self.expected) != bits_of(self.actual)
            for mask in (self._both_nan(), *special.values()):
                differ &= ~mask
            return lines + self._report("bits differ", differ, with_error=True)
        return lines + self._excesses(rules.bounds)

    def _special_values(self, rules: _Rules) -> dict[str, torch.Tensor]:
        expected, actual = widen(self.expected), widen(self.actual)
        number = ~(expected.isnan() | actual.isnan())
        masks = {
            "NaN positions differ": expected.isnan() != actual.isnan(),
            "infinities differ": (expected.isinf() | actual.isinf()) & (expected != actual) & number,
        }
        if rules.signed_zeros:
            both_zero = (expected == 0) & (actual == 0)
            masks["signs of zeros differ"] = both_zero & (expected.signbit() != actual.signbit())
        return masks

    def _both_nan(self) -> torch.Tensor:
        return widen(self.expected).isnan() & widen(self.actual).isnan()

    def _errors(self) -> dict[str, torch.Tensor]:
        """Error of each component; zero where either side is not finite, which the special values have judged."""
        expected, actual = widen(self.expected), widen(self.actual)
        finite = expected.isfinite() & actual.isfinite()
        absolute = torch.where(finite, (actual - expected).abs(), 0.0)
        relative = torch.where(absolute == 0, 0.0, absolute / expected.abs())
        ulp = torch.where(finite, ulp_distance(components(self.expected), components(self.actual)), 0)
        return {"max_abs": absolute, "max_rel": relative, "max_ulp": ulp, "finite": finite}

    def measures(self) -> ErrorMeasures:
        errors = self._errors()
        finite = int(errors["finite"].sum())
        if finite == 0:
            return ErrorMeasures(0.0, 0.0, 0.0, 0)
        return ErrorMeasures(
            max_abs=float(errors["max_abs"].max()),
            mean_abs=float(errors["max_abs"].sum() / finite),
            max_rel=float(errors["max_rel"].max()),
            max_ulp=int(errors["max_ulp"].max()),
        )

    def _excesses(self, bounds: Mapping[str, float]) -> list[str]:
        lines = []
        errors, measures = self._errors(), self.measures()
        for name, bound in bounds.items():
            measured = getattr(measures, name)
            if name == "mean_abs" and measured > bound:
                lines.append(f"mean_abs {measured:.6g} > {bound:.6g}")
            elif name != "mean_abs":
                lines += self._report(f"{name} {measured:.6g} > {bound:.6g}", errors[name] > bound)
        return lines

    def _report(self, what: str, mask: torch.Tensor, *, with_error: bool = False) -> list[str]:
        """One line when ``mask`` (a component each, complex or not) holds anywhere."""
        mask = mask.any(-1) if self.expected.is_complex() else mask
        count = int(mask.sum())
        if count == 0:
            return []
        index = first_index(mask)
        one, other = element(self.expected, index), element(self.actual, index)
        line = f"{what} at {count} of {mask.numel()} element(s), first at {list(index)}: expected {one}, actual {other}"
        if with_error:
            measures = self.measures()
            line += f" (largest error {measures.max_abs:.6g}, {measures.max_ulp} ulp)"
        return [line]


def _refinement_mismatches(pairing: Pairing, against: Pairing) -> list[str]:
    """Where ``actual`` is farther from the float64 reference than ``expected`` is."""
    lines = [f"reference: {line}" for line in against.mismatches]
    references = {path: reference for path, _, reference in against.leaves}
    for path, *leaves in pairing.leaves:
        expected, actual = (as_tensor(leaf) for leaf in leaves)
        if expected is None or actual is None or component_dtype(expected) not in ORDERED_BITS:
            continue
        if expected.dtype != actual.dtype or expected.shape != actual.shape:  # told already
            continue
        reference = as_tensor(references.get(path))
        try:
            lines += [f"{path}: {line}" for line in _grown_errors(expected, actual, reference)]
        except UsageError as error:
            lines.append(f"{path}: {error}")
    return lines


def _grown_errors(expected: torch.Tensor, actual: torch.Tensor, reference: torch.Tensor | None) -> list[str]:
    if reference is None:
        raise UsageError("no reference for this output")
    error_against(reference, expected)  # refuses a reference of another shape or dtype
    reference, expected, actual = (on_host(t).to(reference.dtype) for t in (reference, expected, actual))
    # An overflow that both sides share would make both means infinite and hide every other error.
    finite = reference.isfinite() & expected.isfinite() & actual.isfinite()
    before, after = error_against(reference[finite], expected[finite]), error_against(reference[finite], actual[finite])
    pairs = (("mean", before.mean, after.mean), ("99.9th percentile of the", before.p999, after.p999))
    return [
        f"{what} error against float64 grew from {eager:.6g} to {refined:.6g} (allowed: {REFINES_FACTOR} times)"
        for what, eager, refined in pairs
        if refined > REFINES_FACTOR * eager
    ]
