"""The report as text for a terminal."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from nxfx.graph.escaping import printable

if TYPE_CHECKING:
    from nxfx.report.report import Report
    from nxfx.report.rewrites import Rewrite

SHOWN_LINES = 3


def summary(report: Report) -> str:
    """One line: rewrites by kind, findings by severity."""
    kinds = Counter[str]()
    for rewrite in report.rewrites:
        kinds[rewrite.kind.value] += rewrite.count
    severities = Counter(f.severity.value for f in report.findings)
    made = ", ".join(f"{n} {kind}" for kind, n in kinds.items()) or "no"
    found = ", ".join(f"{severities[s]} {s}{'s' if severities[s] != 1 else ''}" for s in ("error", "warning", "info") if severities[s])
    return f"{made} rewrites; {found or 'no findings'}"


def _rewrites(rewrites: list[Rewrite]) -> list[str]:
    """Equal changes together, with the first lines they were made at; the rest is in ``to_dict``."""
    groups: dict[tuple[str, ...], list[Rewrite]] = {}
    for r in rewrites:
        groups.setdefault((r.kind.value, r.rule, r.before, r.after, r.bound), []).append(r)
    lines = []
    for (kind, rule, before, after, bound), group in groups.items():
        count = sum(r.count for r in group)
        lines.append(f"  {kind:<12} {rule}{f' ×{count}' if count > 1 else ''}: {before} → {after}" + (f" [{bound}]" if bound else ""))
        for r in group[:SHOWN_LINES]:
            lines.append(f"               {r.location}" + (f": {r.location.source}" if r.location.source else ""))
        if len(group) > SHOWN_LINES:
            lines.append(f"               and {len(group) - SHOWN_LINES} more lines")
    return lines


def render(report: Report) -> str:
    """Rewrites and findings, each with its code, file:line and source text."""
    lines = [f"nxfx report · target {report.target}{f', SDK {report.sdk}' if report.sdk else ''}: {report.summary()}"]
    if report.rewrites:
        lines.append("\nRewrites")
    lines += _rewrites(report.rewrites)
    if report.findings:
        lines.append("\nFindings")
    for f in report.findings:
        times = f" (×{f.count})" if f.count > 1 else ""
        lines.append(f"  {f.code} {f.severity.value}: {f.message}{times}")
        lines.append(f"        at {f.location}" + (f": {f.location.source}" if f.location.source else ""))
        if f.fix:
            lines.append(f"        fix: {f.fix}")
        lines += [f"        {'here: ' if not number else '      '}{line}" for number, line in enumerate(f.instead.splitlines())]
    if report.sites:
        lines.append("\nWhere values decide (an eager run on the example)")
    for site in report.sites:
        lines += site.lines()
    if report.requirements:
        lines.append("\nEnforced at the boundary")
        lines += [f"  {name} in [{low}, {high}]" for name, (low, high) in report.requirements.items()]
    if report.premises:
        lines.append("\nPremises (re-checked when the tensor changes)")
        lines += [f"  {p.source}: {p.fact}{f' {list(p.detail)}' if p.detail else ''}" for p in report.premises]
    if report.certificate is not None:
        lines.append(f"\nCertificate: {report.certificate.summary()}")
    if report.wide_edges:
        w = report.wide_edges
        lines.append(f"\n64-bit edges: {w.get('before', 0)} before, {w.get('after', 0)} after, {w.get('forced', 0)} forced by a schema")
    if report.nodes:
        lines.append(f"Nodes: {report.nodes.get('before', 0)} before, {report.nodes.get('after', 0)} after")
    if report.compiler_args:
        lines.append("Compiler flags")
        lines += [f"  {flag}: {why}" for flag, why in report.compiler_args.items()]
    return printable("\n".join(lines))  # source lines are the user's, and may hold what drives a terminal
