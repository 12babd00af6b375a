"""Findings and their stable codes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from typing import Any

from torch import fx

from nxfx.report.locations import Location, locate
from nxfx.report.written_out import written_out


class Severity(str, Enum):
    """``error``: the result on Neuron would be wrong or there would be none; ``warning``: may be; ``info``: good to know."""

    ERROR = "error"
    WARNING = "warning"
    INFO = "info"


# Stable: a code is never reused. One documentation page each (docs/codes/NXnnn.md).
CODES: dict[str, str] = {
    # NX1xx casts and precision
    "NX101": "an integer beyond the low-precision float's exact range is rounded",
    "NX102": "a table was rounded to low precision before capture",
    "NX103": "an integer-derived fp32 value is rounded before a sensitive use",
    # NX2xx slice assignments
    "NX201": "a slice assignment that is kept, or that eager refuses",
    "NX202": "a write through integer indices is kept",
    "NX203": "a dynamic-size read cannot be masked",
    "NX204": "a zero fill multiplies a base that is not proved finite and non-negative",
    # NX3xx 64-bit
    "NX301": "a 64-bit integer value is kept: it may not fit 32 bits",
    "NX302": "float64 is kept or was used on purpose",
    "NX303": "a range is assumed and enforced at the boundary",
    "NX304": "an operator demands int64: a local cast stands before it",
    "NX305": "integer arithmetic that Neuron runs in fp32 (exact to 2**24)",
    "NX306": "a 64-bit buffer is kept",
    # NX4xx value dependence
    "NX401": "a branch reads a tensor's value",
    "NX402": "a tensor's value reaches Python (.item(), int(), .tolist())",
    "NX403": "an output size depends on data",
    "NX404": "a tensor-valued bound",
    "NX405": "a random op",
    "NX406": "Python state changes in forward and is baked at capture",
    "NX407": "an assertion reads a tensor's value",
    "NX408": "the captured graph has a graph break",
    "NX409": "the model cannot be captured",
    "NX410": "a higher-order op's body is not rewritten",
    "NX411": "an op that torch-xla runs on the host",
    # NX5xx Neuron compiler constraints
    "NX501": "an operator that the Neuron compiler does not have",
    "NX502": "complex numbers",
    "NX503": "a float format that the target does not have",
    "NX504": "a convolution whose input and kernel are both dilated",
    "NX505": "a dilated pooling window",
    "NX506": "top-k or sort of integers, or a sort where there is none",
    "NX507": "a scatter that reduces integers",
    "NX508": "a shift to the right of other than 32 bits",
    "NX509": "positions beyond the operand",
    "NX510": "a 64-bit constant beyond 32 bits",
    "NX511": "a dynamic size",
    "NX550": "an option of yours overrides what the graph needs",
    # NX6xx masks and infinities
    "NX601": "minus infinity in an additive mask",
    "NX602": "a row that a mask leaves out whole",
}


@dataclass
class Finding:
    """Something nxfx did not change and that the user should know.

    Attributes:
        code: stable code, documented one page each.
        severity: see :class:`Severity`.
        message: what happens, in one sentence.
        location: the user's line.
        node: name of the FX node.
        fix: what to write instead.
        count: how many equal findings this one stands for.
        instead: the statement at that line as it can be written, where that is sure to mean the same.
    """

    code: str
    severity: Severity
    message: str
    location: Location = field(default_factory=Location)
    node: str = ""
    fix: str = ""
    count: int = 1
    instead: str = ""

    def __post_init__(self) -> None:
        if self.code not in CODES:
            raise ValueError(f"unknown finding code {self.code}")

    @classmethod
    def at(cls, node: fx.Node, code: str, severity: Severity, message: str, fix: str = "") -> Finding:
        """A finding at ``node``'s user line."""
        return cls(code, severity, message, locate(node), node.name, fix)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "severity": self.severity.value}


def _instead(finding: Finding) -> str:
    """Nothing where the finding says that the two sides are no values of one kind."""
    return "" if "since its sides" in finding.message else written_out(finding.code, finding.location)


def merge(findings: list[Finding]) -> list[Finding]:
    """Equal findings on one line folded into one with a count, in order of first appearance."""
    merged: dict[tuple[Any, ...], Finding] = {}
    for f in findings:
        key = (f.code, f.severity, f.message, f.location.file, f.location.line, f.fix)
        if key in merged:
            merged[key].count += f.count
        else:
            merged[key] = replace(f, instead=f.instead or _instead(f))  # the caller's own record keeps its count
    return list(merged.values())
