"""What the eager run saw and what capture and passes found, brought together: no place twice, none lost."""

from __future__ import annotations

from nxfx.observe.run import Observation
from nxfx.report import Finding, Report, Severity
from nxfx.report.advice import BECOMES
from nxfx.report.sites import ValueSite

# What the interception of a capture turns into data flow by itself, or what is no obstacle: a warning where nothing was captured.
_MILD = frozenset(
    {"tensor index", "slice bound", "boolean write", "torch.tensor of tensors", "assert", "torch._assert", "check that raises"}
)


def settle(report: Report, observation: Observation, *, captured: bool) -> None:
    """Put the sites into ``report``, each with its outcome, and a finding for each line that has none where nothing was captured."""
    _locate_state(report, observation.sites)
    stands = {(f.location.file, f.location.line) for f in report.findings if f.code.startswith(("NX2", "NX4"))}
    report.sites = observation.sites
    for site in observation.sites:
        reported = (site.location.file, site.location.line) in stands
        site.outcome = "refused" if not captured else "reported" if reported else "removed"
    if not captured:
        report.add([], [_finding(s) for s in observation.sites if (s.location.file, s.location.line) not in stands])
    elif observation.error is not None:
        error = observation.error
        message = f"run eagerly on the example, forward raises {type(error).__name__}: {error}; the list of value sites ends there"
        report.add([], [Finding("NX409", Severity.WARNING, message)])


def _locate_state(report: Report, sites: list[ValueSite]) -> None:
    """Findings about Python state move to the line that was seen to write it."""
    for site in sites:
        if site.code != "NX406":
            continue
        name = repr(site.values[0].partition(":")[0]) if site.values else f"draws from {site.kind}"
        for finding in report.findings:
            if finding.code == "NX406" and name in finding.message:
                finding.location = site.location


def _finding(site: ValueSite) -> Finding:
    if site.code == "NX405" or site.kind == ".cpu()":
        severity = Severity.INFO
    else:
        severity = Severity.WARNING if site.kind in _MILD else Severity.ERROR
    message = f"{site.kind}, as an eager run shows. {BECOMES[site.code]}"
    if site.reads is not None:
        message += f" (read in {site.reads}: {site.reads.source})"
    return Finding(site.code, severity, message, site.location, "", site.fix, max(site.count, 1))
