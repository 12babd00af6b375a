"""What was run to certify a prepared model, how often, and with what result."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class CertificateCase:
    """One set of inputs.

    Attributes:
        name: what is special about it: ``example``, ``random values``, ``nan and infinities``, ``size 1``.
        outcome: ``"equal"`` (all bits), ``"within noise"`` (of the model's own error against float64), ``"differs"``, ``"refused by the
            model"`` or ``"refused at the boundary"`` (a value outside an enforced range).
        detail: what differs, or the error.
    """

    name: str
    outcome: str
    detail: str = ""


@dataclass
class Certificate:
    """The result of ``prepare(..., verify=True)``.

    Attributes:
        status: ``"passed"``, ``"failed"`` or ``"not run"``.
        reason: why it was not run, or what differs.
        cases: model against prepared model, one entry per set of inputs.
        classes: kind of rewrite (``exact``, ``refines``, ``reassociated``) → ``rewrites`` of it, and the ``comparisons`` of the graph
            before and after the passes that made them.
    """

    status: str = "not run"
    reason: str = ""
    cases: list[CertificateCase] = field(default_factory=list)
    classes: dict[str, dict[str, int]] = field(default_factory=dict)

    def summary(self) -> str:
        """One line."""
        if self.status == "not run":
            return f"not run: {self.reason}"
        counts: dict[str, int] = {}
        for case in self.cases:
            counts[case.outcome] = counts.get(case.outcome, 0) + 1
        told = ", ".join(f"{n} {outcome}" for outcome, n in counts.items())
        kinds = "; ".join(f"{kind}: {c['rewrites']} rewrites, {c['comparisons']} comparisons" for kind, c in self.classes.items())
        return f"{self.status}: {len(self.cases)} sets of inputs ({told}){'; ' + kinds if kinds else ''}"

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Certificate:
        """The inverse of ``asdict``."""
        return cls(data["status"], data["reason"], [CertificateCase(**c) for c in data["cases"]], data["classes"])

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
