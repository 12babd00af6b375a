"""The report: a picklable record of what nxfx did, what it found and what it assumed."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from nxfx.analysis.provenance import Premise
from nxfx.report import findings as _findings
from nxfx.report import rewrites as _rewrites
from nxfx.report.certificate import Certificate
from nxfx.report.findings import Finding, Severity
from nxfx.report.rewrites import Rewrite
from nxfx.report.sites import ValueSite


@dataclass
class Report:
    """What one preparation did.

    Attributes:
        target: Neuron generation.
        sdk: Neuron SDK release.
        pipeline: textual form of the pipeline that ran.
        rewrites: changes made, equal ones merged with a count.
        findings: what was not changed and the user should know.
        premises: facts about present buffer values that proofs rest on.
        requirements: input name → inclusive range that the boundary enforces.
        compiler_args: neuronx-cc flag → why this graph needs it.
        float32_uses: node name → an op that magnifies what `--auto-cast=all` would round of integers, and its line.
        timings: seconds by stage: ``capture``, ``normalise``, each pass, ``total``.
        nodes: graph size ``before`` and ``after``.
        wide_edges: 64-bit edges ``before``, ``after`` and ``forced`` (schema-forced producers followed at once by their cast).
        captured_by: ``"non-strict"``, ``"strict"`` or ``"dynamo"``.
        certificate: what ``verify=True`` ran, and with what result; None where it was not asked for.
        sites: where values reach Python, a shape or the host in an eager run of the model; ``check`` fills it.
    """

    target: str = ""
    pipeline: str = ""
    rewrites: list[Rewrite] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    premises: list[Premise] = field(default_factory=list)
    requirements: dict[str, tuple[int, int]] = field(default_factory=dict)
    compiler_args: dict[str, str] = field(default_factory=dict)
    float32_uses: dict[str, str] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)
    nodes: dict[str, int] = field(default_factory=dict)
    wide_edges: dict[str, int] = field(default_factory=dict)
    captured_by: str = ""
    sdk: str = ""
    sites: list[ValueSite] = field(default_factory=list)
    certificate: Certificate | None = None

    def add(self, rewrites: list[Rewrite], findings: list[Finding]) -> None:
        """Append and merge."""
        self.rewrites = _rewrites.merge(self.rewrites + rewrites)
        self.findings = _findings.merge(self.findings + findings)

    @property
    def errors(self) -> list[Finding]:
        return [f for f in self.findings if f.severity is Severity.ERROR]

    @property
    def warnings(self) -> list[Finding]:
        return [f for f in self.findings if f.severity is Severity.WARNING]

    def summary(self) -> str:
        """One line: rewrites by pass and kind, findings by severity."""
        from nxfx.report.text import summary

        return summary(self)

    def __str__(self) -> str:
        from nxfx.report.text import render

        return render(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain data: what :meth:`to_json` writes."""
        data = asdict(self)
        data["rewrites"] = [r.to_dict() for r in self.rewrites]
        data["findings"] = [f.to_dict() for f in self.findings]
        data["requirements"] = {k: list(v) for k, v in self.requirements.items()}
        return {"nxfx": 1, **data}

    def to_json(self, indent: int | None = 2) -> str:
        return json.dumps(self.to_dict(), indent=indent)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Report:
        """The inverse of :meth:`to_dict`."""
        from nxfx.report.locations import Location
        from nxfx.report.rewrites import Kind

        fields = {k: v for k, v in data.items() if k != "nxfx"}
        fields["rewrites"] = [
            Rewrite(**{**r, "kind": Kind(r["kind"]), "location": Location(**r["location"])}) for r in data["rewrites"]
        ]
        fields["findings"] = [
            Finding(**{**f, "severity": Severity(f["severity"]), "location": Location(**f["location"])}) for f in data["findings"]
        ]
        fields["premises"] = [
            Premise(p["source"], p["fact"], tuple(p["detail"]) if p["detail"] is not None else None) for p in data["premises"]
        ]
        fields["sites"] = [ValueSite.from_dict(s) for s in data.get("sites", [])]
        certificate = data.get("certificate")
        fields["certificate"] = Certificate.from_dict(certificate) if certificate is not None else None
        fields["requirements"] = {k: tuple(v) for k, v in data["requirements"].items()}
        return cls(**fields)
