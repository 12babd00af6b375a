"""neuronx-cc flags: what a graph needs, merged with what the user wants."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

from nxfx.report import Finding, Severity


def merge_flags(
    recommended: Mapping[str, str], wanted: str | Sequence[str] | None, float32_uses: Mapping[str, str] | None = None
) -> tuple[list[str], list[Finding]]:
    """The flags to compile with, and where the user's override what the graph needs.

    Args:
        recommended: flag → why the graph needs it, as in ``report.compiler_args``.
        wanted: the user's, as the Neuron entry points take them: one string or a list. They win.
        float32_uses: what ``--auto-cast=all`` would spoil though no flag is needed for it, as in ``report.float32_uses``.

    Returns:
        The user's flags as they were given, after the recommended ones that they say nothing about; an NX550 finding for
        each recommended flag that they contradict, and one where they round integers that float32 holds.
    """
    tokens = shlex.split(wanted) if isinstance(wanted, str) else [str(token) for token in wanted or ()]
    given = _by_name(tokens)
    kept, findings = [], []
    for flag, why in recommended.items():
        name, _, value = flag.partition("=")
        if name not in given:
            kept.append(flag)
        elif given[name] != value:
            findings.append(_conflict(name, value, given[name], why))
    if given.get("--auto-cast") == "all" and float32_uses:
        findings.append(_rounded(list(float32_uses.values()), given.get("--auto-cast-type", "bf16")))
    return kept + tokens, findings


def _rounded(uses: list[str], cast_type: str) -> Finding:
    """What ``--auto-cast=all`` does to positions in float32, in the model's own words or in nxfx's."""
    more = f" and {len(uses) - 1} more" if len(uses) > 1 else ""
    largest = {"fp16": ", which is infinite above 65504,", "fp8_e4m3": ", which is infinite above 240,"}.get(cast_type, "")
    message = f"compiler_args says --auto-cast=all: integers in float32 are rounded to {cast_type}{largest} before {uses[0]}{more}"
    return Finding("NX550", Severity.WARNING, message, fix="pass --auto-cast=matmult: it rounds matrix products only")


def _by_name(tokens: Sequence[str]) -> dict[str, str]:
    """Flag → value, of ``--flag=value`` and ``--flag value``; the last one counts, as for the compiler."""
    found: dict[str, str] = {}
    for position, token in enumerate(tokens):
        if token.startswith("-"):
            name, equals, value = token.partition("=")
            following = tokens[position + 1] if position + 1 < len(tokens) else "-"
            found[name] = value if equals or following.startswith("-") else following
    return found


def _conflict(name: str, needed: str, given: str, why: str) -> Finding:
    message = f"compiler_args says {name}={given} where this graph needs {name}={needed}: {why}"
    return Finding("NX550", Severity.WARNING, message, fix=f"leave {name} out, or pass {name}={needed}")
