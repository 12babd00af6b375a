"""neuronx-cc flags: what a graph needs, merged with what the user wants."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

from nxfx.report import Finding, Severity


def merge_flags(recommended: Mapping[str, str], wanted: str | Sequence[str] | None) -> tuple[list[str], list[Finding]]:
    """The flags to compile with, and where the user's override what the graph needs.

    Args:
        recommended: flag → why the graph needs it, as in ``report.compiler_args``.
        wanted: the user's, as the Neuron entry points take them: one string or a list. They win.

    Returns:
        The user's flags as they were given, after the recommended ones that they say nothing about; an NX550 finding for
        each recommended flag that they contradict.
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
    return kept + tokens, findings


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
