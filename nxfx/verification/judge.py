"""Three-way judgement of one output: how far the candidate is from the reference, against how far the model itself is.

The model's own error against the high-precision reference is its noise floor. A candidate passes when its error stays within a
small multiple of that floor, everywhere: mean, 99.9th percentile and largest error. nan and infinities must stand where the
model has them (or where the reference has them); nothing is masked out, and a constant shift is told, not subtracted.

Tolerances of the top-k logit errors are those of NxD Inference's logit matching (rtol 0.01, 0.02, 0.03, 0.05 for the top 5, 50,
1000 and all), the error divided by the row's largest reference logit.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from nxfx.verification.measures import ORDERED_BITS, dtype_name, on_host, shape_text, ulp_distance

TOP_K: tuple[tuple[int | None, float], ...] = ((5, 0.01), (50, 0.02), (1000, 0.03), (None, 0.05))
# A candidate's error may be this many times the noise floor (mean, 99.9th percentile, largest).
MEAN_FACTOR, TAIL_FACTOR, MAX_FACTOR = 2.0, 3.0, 8.0
_FEW = 64  # with fewer elements the model's own error is a matter of luck
_FEW_FACTOR = 8.0


@dataclass(frozen=True)
class Errors:
    """Of one float tensor against the reference, over the elements that are finite in both (complex: the components).

    ``max_rel`` and ``mean_rel`` are relative to the root mean square of the reference; ``shift`` is the mean signed error.
    """

    max_abs: float = 0.0
    mean_abs: float = 0.0
    p999: float = 0.0
    max_rel: float = 0.0
    mean_rel: float = 0.0
    max_ulp: int = 0
    cosine: float = 1.0
    shift: float = 0.0


@dataclass(frozen=True)
class TopK:
    """Largest error among the top ``k`` reference logits of any row (None: all), over the row's largest reference logit."""

    k: int | None
    error: float
    model_error: float
    tolerance: float

    @property
    def ok(self) -> bool:
        return self.error <= self.tolerance


@dataclass
class OutputReport:
    """The verdict on one output.

    Attributes:
        path: where it stands in the result, e.g. ``output.logits``; ``state.x`` and ``argument.x`` are what the call left behind.
        ok: whether it passes.
        problems: why not.
        notes: what is worth knowing and does not fail.
        candidate, model: errors against the reference; None for what is not a float.
        top_k: logit errors, for outputs with a vocabulary-like last dimension.
    """

    path: str
    dtype: str = ""
    shape: str = ""
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    candidate: Errors | None = None
    model: Errors | None = None
    top_k: list[TopK] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ok": self.ok, "top_k": [{**asdict(t), "ok": t.ok} for t in self.top_k]}


@torch.no_grad()
def judge(path: str, reference: Any, model: Any, candidate: Any, *, strict: bool = True) -> OutputReport:
    """Judge one leaf of the outputs.

    Args:
        reference: the high-precision value, None when there is none (then the candidate is held to the model's).
        model: what the model gave.
        candidate: what the candidate gave.
        strict: whether a dtype other than the model's is a problem (else a note: devices narrow 64-bit results).
    """
    if not isinstance(model, torch.Tensor) or not isinstance(candidate, torch.Tensor):
        same = type(model) is type(candidate) and (model is candidate or model == candidate or (model != model and candidate != candidate))
        report = OutputReport(path, type(model).__name__)
        if not same:
            report.problems.append(f"value differs: the model gives {model!r}, the candidate {candidate!r}")
        return report
    report = OutputReport(path, dtype_name(model.dtype), shape_text(model))
    if model.shape != candidate.shape:
        report.problems.append(f"shape differs: the model gives {shape_text(model)}, the candidate {shape_text(candidate)}")
        return report
    if model.dtype != candidate.dtype:
        told = f"dtype differs: the model gives {dtype_name(model.dtype)}, the candidate {dtype_name(candidate.dtype)}"
        (report.problems if strict else report.notes).append(told)
    if model.is_meta or candidate.is_meta:
        report.problems.append("has no values to compare (a meta tensor)")
        return report
    model, candidate = on_host(model), on_host(candidate)
    known = isinstance(reference, torch.Tensor) and reference.shape == model.shape
    truth = on_host(reference) if known else model
    if _is_float(model) and _is_float(candidate):
        _judge_floats(report, _wide(truth), model, candidate)
    else:
        _judge_exactly(report, truth, model, candidate)
    return report


def _is_float(value: torch.Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()


def _wide(value: torch.Tensor) -> torch.Tensor:
    return (torch.view_as_real(value) if value.is_complex() else value).to(torch.float64)


def _judge_exactly(report: OutputReport, truth: torch.Tensor, model: torch.Tensor, candidate: torch.Tensor) -> None:
    other = candidate != model
    differing = int(other.sum())
    as_reference = int((other & (candidate == truth)).sum())
    if differing > as_reference:
        index = tuple(int(i) for i in (other & (candidate != truth)).nonzero()[0])
        was, now = model[index].item(), candidate[index].item()
        report.problems.append(f"{differing - as_reference} of {model.numel()} values differ, first at {list(index)}: {was} became {now}")
    if as_reference:
        report.notes.append(f"{as_reference} values differ from the model's and equal the reference's")


def _judge_floats(report: OutputReport, truth: torch.Tensor, model: torch.Tensor, candidate: torch.Tensor) -> None:
    exact_dtype, ours, theirs = model.dtype.to_real(), _wide(model), _wide(candidate)
    _judge_special_values(report, truth, ours, theirs)
    finite = truth.isfinite() & ours.isfinite() & theirs.isfinite()
    report.model = errors_of(truth, ours, finite, exact_dtype)
    report.candidate = errors_of(truth, theirs, finite, candidate.dtype.to_real())
    count = int(finite.sum())
    if count:
        magnitudes = truth[finite].abs()
        eps = torch.finfo(exact_dtype).eps * (_FEW_FACTOR if count < _FEW else 1.0)
        floors = (0.5 * eps * float(magnitudes.mean()), eps * float(magnitudes.max()), eps * float(magnitudes.max()))
        pairs = (("mean_abs", MEAN_FACTOR), ("p999", TAIL_FACTOR), ("max_abs", MAX_FACTOR))
        words = {"mean_abs": "mean error", "p999": "99.9th percentile of the error", "max_abs": "largest error"}
        for (name, factor), floor in zip(pairs, floors, strict=True):
            noise, error = getattr(report.model, name), getattr(report.candidate, name)
            if error > factor * (noise + floor):
                report.problems.append(f"{words[name]} {error:.3g} is {_times(error, noise)} the model's own {noise:.3g}")
        if report.model.mean_rel > math.sqrt(torch.finfo(exact_dtype).eps):
            off = f"the model itself is off by {report.model.mean_rel:.2g} of the reference's size"
            report.notes.append(f"{off}: a candidate that agrees with it is off as much")
    _tell_shift(report, truth, theirs, finite)
    report.top_k = _top_k(truth, ours, theirs)
    if "logits" in report.path:
        report.problems += [
            f"top-{t.k or 'all'} logit error {t.error:.3g} > {t.tolerance}, which the model itself keeps ({t.model_error:.3g})"
            for t in report.top_k
            if not t.ok and t.model_error <= t.tolerance
        ]


def _times(error: float, noise: float) -> str:
    return f"{error / noise:.3g} times" if noise else "above"


def _classes(value: torch.Tensor) -> torch.Tensor:
    """0 finite, 1 nan, 2 inf, 3 -inf."""
    return value.isnan() * 1 + value.isposinf() * 2 + value.isneginf() * 3


def _judge_special_values(report: OutputReport, truth: torch.Tensor, model: torch.Tensor, candidate: torch.Tensor) -> None:
    truths, ours, theirs = _classes(truth), _classes(model), _classes(candidate)
    other = ours != theirs
    wrong = other & (theirs != truths)
    if bool(wrong.any()):
        index = tuple(int(i) for i in wrong.nonzero()[0])
        was, now = float(model[index]), float(candidate[index])
        report.problems.append(
            f"nan or infinity at {int(wrong.sum())} of {wrong.numel()} places where the model has another value (or the other way round), "
            f"first at {list(index)}: {was:.6g} became {now:.6g}"
        )
    if bool((other & ~wrong).any()):
        report.notes.append(f"at {int((other & ~wrong).sum())} places the model has nan or infinity and the candidate is as the reference")
    if bool((ours != 0).any()):
        report.notes.append(f"the model itself gives nan or infinity at {int((ours != 0).sum())} places")


def errors_of(truth: torch.Tensor, value: torch.Tensor, finite: torch.Tensor, dtype: torch.dtype) -> Errors:
    """The measures of ``value`` against ``truth`` (both float64) where ``finite``; ulps are those of ``dtype``."""
    truth, value = truth[finite], value[finite]
    if truth.numel() == 0:
        return Errors()
    signed = value - truth
    error = signed.abs()
    scale = float(truth.square().mean().sqrt())
    norm = float(truth.norm() * value.norm())
    position = math.ceil(0.999 * error.numel())
    ulp = int(ulp_distance(value.to(dtype), truth.to(dtype)).max()) if dtype in ORDERED_BITS else 0
    return Errors(
        max_abs=float(error.max()),
        mean_abs=float(error.mean()),
        p999=float(error.kthvalue(position).values),
        max_rel=_over(float(error.max()), scale),
        mean_rel=_over(float(error.mean()), scale),
        max_ulp=ulp,
        cosine=float(truth @ value) / norm if norm else float(not bool(error.any())),
        shift=float(signed.mean()),
    )


def _over(error: float, scale: float) -> float:
    return error / scale if scale else (math.inf if error else 0.0)


def _tell_shift(report: OutputReport, truth: torch.Tensor, candidate: torch.Tensor, finite: torch.Tensor) -> None:
    signed = (candidate - truth)[finite]
    if signed.numel() < _FEW or report.candidate is None:
        return
    spread, shift = float(signed.std()), report.candidate.shift
    if abs(shift) > 0.5 * report.candidate.mean_abs and abs(shift) > 6 * spread / math.sqrt(signed.numel()):
        share = abs(shift) / report.candidate.mean_abs
        report.notes.append(f"a constant shift of {shift:.3g} is {min(share, 1.0):.0%} of the mean error (told, not subtracted)")


def _top_k(truth: torch.Tensor, model: torch.Tensor, candidate: torch.Tensor) -> list[TopK]:
    if truth.dim() == 0 or truth.shape[-1] <= TOP_K[0][0] or truth.numel() == 0:  # type: ignore[operator]
        return []
    rows = truth.reshape(-1, truth.shape[-1])
    clean = rows.nan_to_num(nan=-math.inf)
    scale = clean.where(clean.isfinite(), 0.0).abs().amax(-1, keepdim=True)
    scale = scale.where(scale > 0, 1.0)
    sides = []
    for value in (model, candidate):
        error = (value.reshape(rows.shape) - rows).abs() / scale
        # An infinite or missing value is an infinite error, unless both sides have it.
        same = (value.reshape(rows.shape) == rows) | (value.reshape(rows.shape).isnan() & rows.isnan())
        sides.append(error.nan_to_num(nan=math.inf).where(~same, 0.0))
    largest = TOP_K[-2][0]
    assert largest is not None
    order = clean.topk(min(largest, rows.shape[-1]), -1).indices
    found = []
    for k, tolerance in TOP_K:
        if k is None:
            worst = [float(s.max()) for s in sides]
        elif k < rows.shape[-1]:
            worst = [float(s.gather(-1, order[:, :k]).max()) for s in sides]
        else:
            continue
        found.append(TopK(k, worst[1], worst[0], tolerance))
    return found
