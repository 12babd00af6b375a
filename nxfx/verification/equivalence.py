"""Strict comparison of outputs: nothing is dropped, broadcast, cast or skipped before it is compared.

Order of the checks: structure and number of outputs; Python values with their types; then for each tensor dtype, shape,
layout and device type; NaN positions; signed infinities; signs of zeros; and last the bits (``exact``) or the size of
the error (every other kind). Integers, booleans and dtypes without arithmetic are compared bit for bit in every kind.
"""

from __future__ import annotations

import dataclasses
import enum
import inspect
import math
import types
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from nxfx.errors import UsageError

Kind = Literal["exact", "refines", "reassociated", "close"]

# A refinement's mean and 99.9th-percentile error against float64 may exceed eager's by this factor (docs: the promise).
REFINES_FACTOR = 1.02

_MAX_ULP = torch.iinfo(torch.int64).max
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Sign-magnitude formats, whose bits order like their values. float8_e8m0fnu and float4 are not among them.
_ORDERED_BITS = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
    torch.float8_e4m3fn: torch.int8,
    torch.float8_e4m3fnuz: torch.int8,
    torch.float8_e5m2: torch.int8,
    torch.float8_e5m2fnuz: torch.int8,
}


@dataclass(frozen=True)
class ErrorStats:
    """Absolute error of one tensor against its float64 reference (complex: the modulus)."""

    max: float
    mean: float
    p999: float
    nan_mismatch: int


@dataclass(frozen=True)
class ErrorMeasures:
    """How far ``actual`` is from ``expected`` where both are finite (complex: worst component)."""

    max_abs: float
    mean_abs: float
    max_rel: float
    max_ulp: int


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
    pairing = _Pairing.of(expected, actual)
    result = Comparison(kind, pairing.mismatches, leaves=len(pairing.leaves))
    for path, expected_leaf, actual_leaf in pairing.leaves:
        result.mismatches += _compare_leaf(path, expected_leaf, actual_leaf, rules, result.measures)
    if reference is not None:
        result.mismatches += _refinement_mismatches(pairing, _Pairing.of(expected, reference))
    return result


@torch.no_grad()
def error_against(reference_fp64: torch.Tensor, value: torch.Tensor) -> ErrorStats:
    """Absolute error of ``value`` (any dtype) against a float64 or complex128 reference of the same shape.

    Equal infinities have no error, different ones an infinite one. Elements that are NaN on either side are left out
    of the error; ``nan_mismatch`` counts those that are NaN on one side only.

    Raises:
        UsageError: the reference is not float64 or complex128, or the shapes differ.
    """
    if reference_fp64.dtype not in (torch.float64, torch.complex128):
        raise UsageError(f"the reference must be float64 or complex128, not {_dtype_name(reference_fp64.dtype)}")
    if reference_fp64.shape != value.shape:
        raise UsageError(f"shapes differ: reference {_shape(reference_fp64)}, value {_shape(value)}")
    reference, value = _on_host(reference_fp64), _on_host(value)
    if value.is_complex() and not reference.is_complex():
        raise UsageError(f"a {_dtype_name(value.dtype)} value needs a complex128 reference")
    value = value.to(reference.dtype)
    comparable = ~(reference.isnan() | value.isnan())
    error = torch.where(reference == value, 0.0, (reference - value).abs())[comparable]
    error = error.nan_to_num(nan=math.inf, posinf=math.inf)  # complex inf - inf
    nan_mismatch = int((reference.isnan() != value.isnan()).sum())
    if error.numel() == 0:
        return ErrorStats(0.0, 0.0, 0.0, nan_mismatch)
    rank = math.ceil(0.999 * error.numel())
    return ErrorStats(float(error.max()), float(error.mean()), float(error.kthvalue(rank).values), nan_mismatch)


@torch.no_grad()
def ulp_distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """How many representable values lie between ``a`` and ``b``, element by element, as int64 of the same shape.

    Both zeros are one value; the infinities follow the largest finite values. Two NaNs are 0 apart; a NaN and a number
    are ``iinfo(int64).max`` apart, which is also where float64 distances saturate.

    Raises:
        UsageError: dtypes or shapes differ, or the dtype is not float16, bfloat16, float32, float64, float8_e4m3* or
            float8_e5m2*.
    """
    if a.dtype != b.dtype or a.shape != b.shape:
        raise UsageError(
            f"cannot measure {_dtype_name(a.dtype)} {_shape(a)} against {_dtype_name(b.dtype)} {_shape(b)} in ulp"
        )
    if a.dtype not in _ORDERED_BITS:
        raise UsageError(f"{_dtype_name(a.dtype)} has no ulp distance")
    a, b = _on_host(a), _on_host(b)
    rank_a, rank_b = _rank(a), _rank(b)
    low, high = torch.minimum(rank_a, rank_b), torch.maximum(rank_a, rank_b)
    overflows = (low < 0) & (high > _MAX_ULP + low.clamp(max=0))
    distance = torch.where(overflows, _MAX_ULP, high - low)
    nan_a, nan_b = _widen(a).isnan(), _widen(b).isnan()
    return torch.where(nan_a & nan_b, 0, torch.where(nan_a | nan_b, _MAX_ULP, distance))


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


# --- structure -------------------------------------------------------------------------------------------------------


@dataclass
class _Pairing:
    """The leaves of two outputs, paired by path, and where the structures part."""

    leaves: list[tuple[str, Any, Any]] = field(default_factory=list)
    mismatches: list[str] = field(default_factory=list)
    # Values, not ids alone: an id is only unique while its object lives.
    _seen: dict[tuple[int, int], tuple[object, object]] = field(default_factory=dict)

    @classmethod
    def of(cls, expected: object, actual: object) -> _Pairing:
        pairing = cls()
        pairing._walk("output", expected, actual)
        return pairing

    def _walk(self, path: str, expected: object, actual: object) -> None:
        if _is_plain_tensor(expected) and _is_plain_tensor(actual):  # a Parameter and a Tensor are the same output
            self.leaves.append((path, expected, actual))
            return
        if type(expected) is not type(actual):
            types = f"expected {_describe(expected)}, actual {_describe(actual)}"
            self.mismatches.append(f"{path}: structure differs: {types}")
            return
        expected_children, actual_children = _children(expected), _children(actual)
        if expected_children is None or actual_children is None:
            self.leaves.append((path, expected, actual))
            return
        if (id(expected), id(actual)) in self._seen:
            return
        self._seen[id(expected), id(actual)] = (expected, actual)
        self._match_names(path, [name for name, _ in expected_children], [name for name, _ in actual_children])
        for name, expected_child, actual_child in _pair_children(expected_children, actual_children):
            self._walk(path + name, expected_child, actual_child)

    def _match_names(self, path: str, expected: list[str], actual: list[str]) -> None:
        if expected == actual:
            return
        missing = [name for name in expected if name not in actual]
        unexpected = [name for name in actual if name not in expected]
        details = [f"missing {', '.join(missing)}"] if missing else []
        details += [f"unexpected {', '.join(unexpected)}"] if unexpected else []
        details = details or [f"expected order {', '.join(expected)}, actual order {', '.join(actual)}"]
        counts = f"expected {len(expected)} item(s), actual {len(actual)}"
        self.mismatches.append(f"{path}: structure differs: {counts}: {'; '.join(details)}")


_Children = list[tuple[str, Any]]
_VALUES = (str, bytes, bytearray, int, float, complex, range, slice, set, frozenset, type(None), np.ndarray, np.generic)
_NAMED = (type, types.ModuleType, enum.Enum, torch.dtype, torch.device, torch.Generator)


def _pair_children(expected: _Children, actual: _Children) -> Iterator[tuple[str, Any, Any]]:
    if [name for name, _ in expected] == [name for name, _ in actual]:
        for (name, expected_child), (_, actual_child) in zip(expected, actual, strict=True):
            yield name, expected_child, actual_child
        return
    by_name = dict(actual)
    for name, expected_child in expected:
        if name in by_name:
            yield name, expected_child, by_name[name]


def _children(value: Any) -> _Children | None:
    """The named parts of ``value``, one level deep; ``None`` for a leaf."""
    if isinstance(value, torch.Tensor):
        return _inner_tensors(value) if is_traceable_wrapper_subclass(value) else None
    if isinstance(value, _VALUES + _NAMED) or inspect.isroutine(value):
        return None
    if isinstance(value, Mapping):
        items = [(f"[{key!r}]", item) for key, item in value.items()]
        return items + [(f".{name}", part) for name, part in _attributes(value) if name not in value]
    if isinstance(value, tuple | list | deque):
        names = getattr(value, "_fields", None)
        items = [(f".{names[i]}" if names else f"[{i}]", item) for i, item in enumerate(value)]
        return items + [(f".{name}", part) for name, part in _attributes(value)]
    if not pytree.tree_is_leaf(value):
        items, spec = pytree.tree_flatten(value, is_leaf=lambda inner: inner is not value)
        return [(f"[{i}]", item) for i, item in enumerate(items)] + [(".<context>", spec.context)]
    return [(f".{name}", part) for name, part in _attributes(value)] or None


def _inner_tensors(value: Any) -> _Children:
    names, context = value.__tensor_flatten__()
    return [(f".{name}", getattr(value, name)) for name in names] + [(".<context>", context)]


def _attributes(value: Any) -> _Children:
    names = set(getattr(value, "__dict__", ()))
    if dataclasses.is_dataclass(value):
        names |= {f.name for f in dataclasses.fields(value)}
    for cls in type(value).__mro__:
        slots = cls.__dict__.get("__slots__", ())
        slots = (slots,) if isinstance(slots, str) else slots
        private = f"_{cls.__name__.lstrip('_')}"
        names |= {f"{private}{s}" if s.startswith("__") and not s.endswith("__") else s for s in slots}
    names -= {"__dict__", "__weakref__"}
    return [(name, getattr(value, name)) for name in sorted(names) if hasattr(value, name)]


def _is_plain_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor) and not is_traceable_wrapper_subclass(value)


def _describe(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"{type(value).__name__} {_dtype_name(value.dtype)} {_shape(value)}"
    children = _children(value)
    if children is None:
        return f"{type(value).__name__} {value!r}"
    return f"{type(value).__name__} of {len(children)} item(s)"


# --- leaves ----------------------------------------------------------------------------------------------------------


def _compare_leaf(
    path: str, expected: Any, actual: Any, rules: _Rules, measures: dict[str, ErrorMeasures]
) -> list[str]:
    if isinstance(expected, torch.device):
        same = expected.type == actual.type or not rules.check_device
        return [] if same else [f"{path}: device differs: expected {expected}, actual {actual}"]
    expected_tensor, actual_tensor = _as_tensor(expected), _as_tensor(actual)
    if expected_tensor is None or actual_tensor is None:
        same = _equal_objects(expected, actual)
        return [] if same else [f"{path}: value differs: expected {expected!r}, actual {actual!r}"]
    mismatches = _metadata_mismatches(expected_tensor, actual_tensor, rules)
    if not mismatches:
        pair = _TensorPair(path, _on_host(expected_tensor), _on_host(actual_tensor))
        mismatches = pair.mismatches(rules)
        if rules.kind != "exact" and pair.is_measurable:
            measures[path] = pair.measures()
    return [f"{path}: {line}" for line in mismatches]


def _as_tensor(value: Any) -> torch.Tensor | None:
    """Tensors, numpy data, Python floats and complex numbers as a tensor; ``None`` for other values."""
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, np.ndarray | np.generic):
        try:
            return torch.from_numpy(np.array(value))
        except TypeError:  # strings, objects, structured or byte-swapped data
            return None
    if isinstance(value, float):
        return torch.tensor(value, dtype=torch.float64)
    return torch.tensor(value, dtype=torch.complex128) if isinstance(value, complex) else None


def _equal_objects(expected: Any, actual: Any) -> bool:
    if isinstance(expected, np.ndarray | np.generic):
        same_metadata = expected.dtype == actual.dtype and expected.shape == actual.shape
        return bool(same_metadata and expected.tolist() == actual.tolist())
    return expected is actual or (expected == actual) is True


def _metadata_mismatches(expected: torch.Tensor, actual: torch.Tensor, rules: _Rules) -> list[str]:
    pairs = [
        ("dtype", _dtype_name(expected.dtype), _dtype_name(actual.dtype)),
        ("shape", _shape(expected), _shape(actual)),
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
        return _component_dtype(self.expected) in _ORDERED_BITS

    def mismatches(self, rules: _Rules) -> list[str]:
        if not self.is_measurable:
            differ = _bits(self.expected) != _bits(self.actual)
            return self._report("values differ", differ)
        special = self._special_values(rules)
        lines = [line for what, mask in special.items() for line in self._report(what, mask)]
        if rules.kind == "exact":
            differ = _bits(self.expected) != _bits(self.actual)
            for mask in (self._both_nan(), *special.values()):
                differ &= ~mask
            return lines + self._report("bits differ", differ, with_error=True)
        return lines + self._excesses(rules.bounds)

    def _special_values(self, rules: _Rules) -> dict[str, torch.Tensor]:
        expected, actual = _widen(self.expected), _widen(self.actual)
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
        return _widen(self.expected).isnan() & _widen(self.actual).isnan()

    def _errors(self) -> dict[str, torch.Tensor]:
        """Error of each component; zero where either side is not finite, which the special values have judged."""
        expected, actual = _widen(self.expected), _widen(self.actual)
        finite = expected.isfinite() & actual.isfinite()
        absolute = torch.where(finite, (actual - expected).abs(), 0.0)
        relative = torch.where(absolute == 0, 0.0, absolute / expected.abs())
        ulp = torch.where(finite, ulp_distance(_components(self.expected), _components(self.actual)), 0)
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
        index = _first_index(mask)
        one, other = _element(self.expected, index), _element(self.actual, index)
        line = f"{what} at {count} of {mask.numel()} element(s), first at {list(index)}: expected {one}, actual {other}"
        if with_error:
            measures = self.measures()
            line += f" (largest error {measures.max_abs:.6g}, {measures.max_ulp} ulp)"
        return [line]


def _refinement_mismatches(pairing: _Pairing, against: _Pairing) -> list[str]:
    """Where ``actual`` is farther from the float64 reference than ``expected`` is."""
    lines = [f"reference: {line}" for line in against.mismatches]
    references = {path: reference for path, _, reference in against.leaves}
    for path, *leaves in pairing.leaves:
        expected, actual = (_as_tensor(leaf) for leaf in leaves)
        if expected is None or actual is None or _component_dtype(expected) not in _ORDERED_BITS:
            continue
        if expected.dtype != actual.dtype or expected.shape != actual.shape:  # told already
            continue
        reference = _as_tensor(references.get(path))
        try:
            lines += [f"{path}: {line}" for line in _grown_errors(expected, actual, reference)]
        except UsageError as error:
            lines.append(f"{path}: {error}")
    return lines


def _grown_errors(expected: torch.Tensor, actual: torch.Tensor, reference: torch.Tensor | None) -> list[str]:
    if reference is None:
        raise UsageError("no reference for this output")
    error_against(reference, expected)  # refuses a reference of another shape or dtype
    reference, expected, actual = (_on_host(t).to(reference.dtype) for t in (reference, expected, actual))
    # An overflow that both sides share would make both means infinite and hide every other error.
    finite = reference.isfinite() & expected.isfinite() & actual.isfinite()
    before, after = error_against(reference[finite], expected[finite]), error_against(reference[finite], actual[finite])
    pairs = (("mean", before.mean, after.mean), ("99.9th percentile of the", before.p999, after.p999))
    return [
        f"{what} error against float64 grew from {eager:.6g} to {refined:.6g} (allowed: {REFINES_FACTOR} times)"
        for what, eager, refined in pairs
        if refined > REFINES_FACTOR * eager
    ]


# --- bits ------------------------------------------------------------------------------------------------------------


def _on_host(tensor: torch.Tensor) -> torch.Tensor:
    """A dense CPU tensor of the same dtype and values, without lazy conjugate or negative bits."""
    dense = tensor.detach() if tensor.layout == torch.strided else tensor.detach().to_dense()
    return dense.cpu().resolve_conj().resolve_neg()


def _components(tensor: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _component_dtype(tensor: torch.Tensor) -> torch.dtype:
    return tensor.dtype.to_real()


def _widen(tensor: torch.Tensor) -> torch.Tensor:
    """The components as float64: exact for every narrower float, NaN and the sign of zero included."""
    return _components(tensor).to(torch.float64)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    parts = _components(tensor)
    return parts if parts.dtype == torch.bool else parts.view(_BITS[parts.element_size()])


def _rank(tensor: torch.Tensor) -> torch.Tensor:
    """int64 that orders like the float: both zeros 0, the smallest subnormals 1 and -1."""
    ordered = _ORDERED_BITS[tensor.dtype]
    bits = tensor.view(ordered).to(torch.int64)
    return torch.where(bits < 0, torch.iinfo(ordered).min - bits, bits)


def _first_index(mask: torch.Tensor) -> tuple[int, ...]:
    position = int(mask.flatten().to(torch.uint8).argmax())
    return tuple(int(i) for i in np.unravel_index(position, tuple(mask.shape)))


def _element(tensor: torch.Tensor, index: tuple[int, ...]) -> str:
    element = tensor[index]
    if element.dtype.is_floating_point and element.dtype not in _ORDERED_BITS:
        return f"{int(_bits(element)):#x}"
    return repr(element.item())


def _shape(tensor: torch.Tensor) -> str:
    return str(list(tensor.shape))


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
