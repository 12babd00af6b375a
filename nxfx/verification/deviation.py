"""Whether a value is explained by its inputs: the candidate's against the model's op, in both precisions, on the same inputs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from nxfx.verification.equivalence import compare
from nxfx.verification.measures import on_host

_CHUNK = 1 << 20  # elements that are held in float64 at a time
# The local error may be this many times what the model's own op makes on the same inputs (root mean square, largest).
_RMS_FACTOR, _MAX_FACTOR = 2.0, 4.0


@dataclass(frozen=True)
class Deviation:
    """How a value differs from what its inputs explain.

    Attributes:
        kind: ``"special"`` (nan, inf), ``"integer"``, ``"shape"`` or ``"error"``.
        local: relative error against the op in high precision on the candidate's own inputs.
        expected: the same of the model's own op on these inputs.
        detail: in words.
    """

    kind: str
    local: float
    expected: float
    detail: str


def bits_equal(a: Any, b: Any) -> bool:
    """Whether two values hold the same numbers, nan included, in whatever dtype."""
    ours, theirs = tensors(a), tensors(b)
    if len(ours) != len(theirs):
        return False
    for one, other in zip(ours, theirs, strict=True):
        if one is other:
            continue
        if one.shape != other.shape:
            return False
        if one.dtype != other.dtype:
            if one.is_floating_point() != other.is_floating_point():
                return False
            other = other.to(one.dtype) if one.dtype.itemsize >= other.dtype.itemsize else other
            one = one.to(other.dtype) if one.dtype != other.dtype else one
        if _bits(one, other):
            continue
        if not torch.equal(one, other) and not (one.is_floating_point() and _equal_with_nan(one, other)):
            return False
    return True


def _bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """The quick way to equal: the same bits in the same layout."""
    if a.dtype not in (torch.bfloat16, torch.float16) or not a.is_contiguous() or not b.is_contiguous() or a.dtype != b.dtype:
        return False
    return torch.equal(a.view(torch.int16), b.view(torch.int16))


def _equal_with_nan(a: torch.Tensor, b: torch.Tensor) -> bool:
    same = a == b
    if same.all():
        return True
    nan = a.isnan()
    return bool(nan.any()) and bool((same | (nan & b.isnan())).all())


def tensors(value: Any) -> list[torch.Tensor]:
    """The tensors of a node's value."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for v in value for t in tensors(v)] if isinstance(value, (list, tuple)) else []


def _chunks(*values: torch.Tensor) -> Iterator[list[torch.Tensor]]:
    flat = [_real(on_host(v)).reshape(-1) for v in values]
    if flat[0].numel() <= _CHUNK:
        yield [f.to(torch.float64) for f in flat]
        return
    for start in range(0, flat[0].numel(), _CHUNK):
        yield [f[start : start + _CHUNK].to(torch.float64) for f in flat]


def _real(value: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(value) if value.is_complex() else value


def relative_error(value: Any, truth: Any) -> float:
    """Root mean square of the difference over that of the truth, over all finite elements; infinite where special values differ."""
    ours, theirs = tensors(value), tensors(truth)
    error = scale = 0.0
    for one, other in zip(ours, theirs, strict=False):
        if one.shape != other.shape:
            return math.inf
        small = other.dtype is torch.float64 and other.numel() <= _CHUNK and not one.is_complex()
        if small and one.device.type == other.device.type == "cpu":
            difference, flat = (one - other).reshape(-1), other.reshape(-1)  # promotes to float64
            part, whole = _squares(difference), _squares(flat)
            if math.isfinite(part + whole):
                error, scale = error + part, scale + whole
                continue
        for a, b in _chunks(one, other):
            part, whole = _squares(a - b), _squares(b)
            if not math.isfinite(part + whole):  # nan and infinities: they must agree, and count for nothing then
                finite = a.isfinite() & b.isfinite()
                if not bool(((a == b) | (a.isnan() & b.isnan()))[~finite].all()):
                    return math.inf
                part, whole = _squares((a - b)[finite]), _squares(b[finite])
            error, scale = error + part, scale + whole
    return math.sqrt(error / scale) if scale else (math.inf if error else 0.0)


def other_bits(value: Any, own: Any) -> Deviation | None:
    """How ``value`` differs from ``own`` in any bit; a narrower integer with the same numbers does not."""
    for one, mine in zip(tensors(value), tensors(own), strict=False):
        wider = not mine.is_floating_point() and one.dtype != mine.dtype
        outcome = compare(mine, one.to(mine.dtype) if wider else one, kind="exact", check_device=False)
        if not outcome.ok:
            kind = "error" if mine.is_floating_point() or mine.is_complex() else "integer"
            return Deviation(kind, relative_error(one, mine), 0.0, outcome.mismatches[0].removeprefix("output: "))
    return None


def _squares(value: torch.Tensor) -> float:
    return float(torch.dot(value, value))


def deviation(value: Any, own: Any, wide: Any, eps: float | None = None, *, computed: bool = True) -> Deviation | None:
    """How ``value`` deviates from what its inputs explain; None when it does not.

    Args:
        value: the candidate's.
        own: the model's op on the candidate's inputs, in the model's precision.
        wide: the same in high precision.
        eps: precision that the candidate works in, where that is lower than the model's.
        computed: False of a weight: there is nothing that could round it.
    """
    for one, mine, truth in zip(tensors(value), tensors(own), tensors(wide), strict=False):
        found = _deviation(one, mine, truth, eps, computed)
        if found is not None:
            return found
    return None


def _deviation(value: torch.Tensor, own: torch.Tensor, wide: torch.Tensor, eps: float | None, computed: bool) -> Deviation | None:
    if value.shape != own.shape:
        return Deviation("shape", math.inf, 0.0, f"shape {list(value.shape)} instead of {list(own.shape)}")
    if value.is_complex() != own.is_complex():
        return Deviation("shape", math.inf, 0.0, "complex numbers on one side only")
    if not (own.is_floating_point() or own.is_complex()):
        return _integer_deviation(on_host(value), on_host(own), on_host(wide))
    unit = torch.finfo(own.dtype.to_real()).eps if computed or value.dtype != own.dtype else 0.0
    precision = max(unit, eps or 0.0)
    sums = torch.zeros(3, dtype=torch.float64)  # squares of the error, of the model's own, of the truth
    peaks = torch.zeros(3, dtype=torch.float64)
    for y, o, e in _chunks(value, own, wide):
        classes = [t.isnan() * 1 + t.isposinf() * 2 + t.isneginf() * 3 for t in (y, o, e)]
        wrong = (classes[0] != classes[1]) & (classes[0] != classes[2])
        if bool(wrong.any()):
            at = int(wrong.nonzero()[0])
            detail = f"{float(y[at]):.6g} where the model's op gives {float(o[at]):.6g}, {int(wrong.sum())} times"
            return Deviation("special", math.inf, 0.0, detail)
        finite = (classes[0] + classes[1] + classes[2]) == 0
        parts = [(y - e)[finite], (o - e)[finite], e[finite]]
        sums += torch.stack([p.square().sum() for p in parts])
        peaks = torch.maximum(peaks, torch.stack([p.abs().max() if p.numel() else torch.zeros((), dtype=torch.float64) for p in parts]))
    rms = [math.sqrt(s / max(value.numel(), 1)) for s in sums.tolist()]
    top = peaks.tolist()
    beyond = rms[0] > _RMS_FACTOR * rms[1] + precision * rms[2] or top[0] > _MAX_FACTOR * top[1] + 2 * precision * top[2]
    if not beyond:
        return None
    local = rms[0] / rms[2] if rms[2] else math.inf
    expected = rms[1] / rms[2] if rms[2] else 0.0
    detail = f"relative error {local:.3g} on the candidate's own inputs, where the model's op makes {expected:.3g}"
    return Deviation("error", local, expected, detail)


def _integer_deviation(value: torch.Tensor, own: torch.Tensor, wide: torch.Tensor) -> Deviation | None:
    wrong = (value != own) & ((value != wide) if wide.shape == value.shape else True)
    if not bool(wrong.any()):
        return None
    at = tuple(int(i) for i in wrong.nonzero()[0])
    detail = f"{value[at].item()} where the model's op gives {own[at].item()}, {int(wrong.sum())} of {wrong.numel()} times"
    return Deviation("integer", float(wrong.double().mean()), 0.0, detail)
