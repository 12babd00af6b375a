"""What :func:`nxfx.verify` found: as a value, as text, as JSON, as a page."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nxfx.graph.escaping import printable
from nxfx.verification.autocast import AutoCast, CastType
from nxfx.verification.judge import OutputReport
from nxfx.verification.localisation import Localisation

if TYPE_CHECKING:
    from torch import fx

    from nxfx.report import Report
    from nxfx.verification.bisect import Bisection
    from nxfx.verification.sensitivity import MatmulLoss
    from nxfx.verification.tokens import TokenReport

_SHOWN = 5


@dataclass
class VerifyReport:
    """The verdict of :func:`nxfx.verify`; true when the candidate passes.

    Attributes:
        model, candidate: what was compared, in words.
        reference: ``"fp64"`` or ``"fp32"``.
        autocast, cast_type: what neuronx-cc would do to the candidate, emulated; None: nothing.
        outputs: one verdict per output, and per tensor that the call changes.
        problems: what is wrong beyond single outputs (structure, a candidate that raises).
        notes: what could not be done, and why.
        localisation: where the candidate leaves the model; None when that was not looked for.
        tokens: token matching, when it was asked for.
        matmuls: with ``autocast``: what each matmul loses, worst first.
        bisection: the pass and the rewrite at fault, when the candidate is a prepared model that fails.
        prepared: the candidate's own report of rewrites and findings.
        seconds: how long each stage took.
    """

    model: str = ""
    candidate: str = ""
    reference: str = "fp64"
    autocast: AutoCast | None = None
    cast_type: CastType = "bf16"
    outputs: list[OutputReport] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    localisation: Localisation | None = None
    tokens: TokenReport | None = None
    matmuls: list[MatmulLoss] = field(default_factory=list)
    bisection: Bisection | None = None
    prepared: Report | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    graphs: dict[str, fx.GraphModule] = field(default_factory=dict, repr=False)

    @property
    def ok(self) -> bool:
        failed = any(not o.ok for o in self.outputs) or (self.tokens is not None and not self.tokens.ok)
        return not self.problems and not failed

    def __bool__(self) -> bool:
        return self.ok

    def summary(self) -> str:
        """One line."""
        passed = sum(o.ok for o in self.outputs)
        under = f" under --auto-cast={self.autocast} ({self.cast_type}, emulated)" if self.autocast else ""
        verdict = "PASS" if self.ok else "FAIL"
        tokens = f"; tokens: {self.tokens.status}" if self.tokens is not None else ""
        return f"{verdict}: {passed} of {len(self.outputs)} outputs within the noise floor of {self.model}{under}{tokens}"

    def __str__(self) -> str:
        return printable("\n".join(_lines(self)))

    def to_dict(self) -> dict[str, Any]:
        """Plain data: what :meth:`to_json` writes. An infinite or missing number is a string."""
        skipped = {"graphs", "prepared", "outputs", "tokens"}
        data = {k: v for k, v in self.__dict__.items() if k not in skipped}
        data["localisation"] = asdict(self.localisation) if self.localisation is not None else None
        data["matmuls"] = [asdict(m) for m in self.matmuls]
        data["bisection"] = asdict(self.bisection) if self.bisection is not None else None
        data["outputs"] = [o.to_dict() for o in self.outputs]
        data["tokens"] = self.tokens.to_dict() if self.tokens is not None else None
        data["prepared"] = self.prepared.to_dict() if self.prepared is not None else None
        plain: dict[str, Any] = _plain({"nxfx": 1, "ok": self.ok, **data})
        return plain

    def to_json(self, indent: int | None = 2) -> str:
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)

    def to_html(self) -> str:
        """One self-contained page."""
        from nxfx.verification.html import page

        return page(self)

    def save_html(self, path: str | Path) -> None:
        """Write :meth:`to_html` to a file."""
        Path(path).write_text(self.to_html(), encoding="utf-8", errors="backslashreplace")


def _plain(value: Any) -> Any:
    """JSON has no infinity and no nan."""
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def _lines(report: VerifyReport) -> list[str]:
    lines = [f"nxfx verify · {report.candidate} against {report.model}, {report.reference} reference", report.summary()]
    lines += [f"  problem: {p}" for p in report.problems]
    for output in report.outputs:
        lines += _output_lines(output)
    if report.tokens is not None:
        lines += ["", "Tokens", *(f"  {line}" for line in report.tokens.lines())]
    if report.localisation is not None:
        lines += ["", *localisation_lines(report.localisation)]
    if report.bisection is not None:
        lines += ["", "Bisection", *(f"  {line}" for line in str(report.bisection).splitlines())]
    if report.matmuls:
        lines += ["", f"What --auto-cast={report.autocast} costs, matmul by matmul (relative error it introduces, worst first)"]
        lines += [f"  {m}" for m in report.matmuls[: 2 * _SHOWN]]
        if len(report.matmuls) > 2 * _SHOWN:
            lines.append(f"  and {len(report.matmuls) - 2 * _SHOWN} more")
    lines += ["", *(f"note: {n}" for n in report.notes)] if report.notes else []
    return lines


def _output_lines(output: OutputReport) -> list[str]:
    lines = [f"  {'ok  ' if output.ok else 'FAIL'} {output.path}: {output.dtype}{output.shape}"]
    if output.candidate is not None and output.model is not None:
        ours, theirs = output.model, output.candidate
        lines.append(
            f"       error, candidate (model): max {theirs.max_abs:.3g} ({ours.max_abs:.3g}), "
            f"mean {theirs.mean_abs:.3g} ({ours.mean_abs:.3g}), "
            f"relative {theirs.mean_rel:.3g} ({ours.mean_rel:.3g}), {theirs.max_ulp} ({ours.max_ulp}) ulp, cosine {theirs.cosine:.8f}"
        )
    if output.top_k:
        shown = ", ".join(f"{t.k or 'all'}: {t.error:.3g}{'' if t.ok else f' > {t.tolerance}'}" for t in output.top_k)
        lines.append(f"       top-k error: {shown}")
    lines += [f"       {p}" for p in output.problems]
    return lines + [f"       note: {n}" for n in output.notes]


def localisation_lines(found: Localisation) -> list[str]:
    """The first op to blame, and what else there is to know of it."""
    if found.first is None:
        lines = [f"Every one of {found.compared} compared values is explained by its inputs: no op is to blame."]
    else:
        lines = ["First op whose value its inputs do not explain", *(f"  {line}" for line in str(found.first).splitlines())]
        lines.append(f"  error it was handed: {found.first.inherited:.3g}; it introduces {found.first.local:.3g}")
    for blame in found.others[:_SHOWN]:
        lines.append(f"  also {blame.op} `{blame.node}` at {blame.location}: {blame.cause}")
    if len(found.others) > _SHOWN:
        lines.append(f"  and {len(found.others) - _SHOWN} more")
    for error in found.amplifiers[: 2 if found.first is not None else 0]:
        lines.append(f"  amplifies, not to blame: {error.op} `{error.node}` at {error.location}, {error.amplification:.3g} times")
    return lines
