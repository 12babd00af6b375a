"""Python state that a forward changes, and random numbers of the host: sites too, since a capture bakes what it finds."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch

from nxfx.capture.state import Change, writing_line
from nxfx.observe.watch import Found, Probe
from nxfx.report import advice
from nxfx.report.sites import ValueSite

_ROUTES = {
    "legacy trace": "baked as it is at the trace: wrong from the second call on",
    "torch.compile": "guarded: compiled again whenever it differs",
    "TorchNeuron": "compiled again whenever it differs",
}
_DRAWN = {
    "legacy trace": "baked: every call repeats the numbers drawn at the trace",
    "torch.compile": "drawn on the host at each call where Dynamo knows the function, a graph break elsewhere",
    "TorchNeuron": "a graph break is refused (fullgraph=True)",
}
_SHOWN = 48
_PLAIN = (bool, int, float, complex, str, bytes, type(None))


def sites(
    model: torch.nn.Module, changes: list[Change], draws: list[Probe], watched: Callable[[list[Probe]], Found]
) -> list[ValueSite]:
    """One site for each line that changes an entry of the model's Python state or draws from the host's generators.

    Args:
        changes: what one run changed.
        draws: the generators it drew from.
        watched: runs the model again under a line trace.
    """
    probes = {change.path: Probe(change.path, lambda c=change: _stamp(c)) for change in changes}  # type: ignore[misc]
    lines = watched([*probes.values(), *draws])
    found = []
    for change in changes:
        what = f"{change.path}: {_shown(change.before)} → {'gone' if change.removed else _shown(change.after)}"
        writes = [(w.location, w.count) for w in lines.get(change.path, {}).values()] or [(writing_line(model, change), 1)]
        for location, count in writes:
            found.append(
                ValueSite("Python state", "NX406", location, None, (location,), count, (what,), dict(_ROUTES), fix=advice.PYTHON_STATE.fix)
            )
    for probe in draws:
        for write in lines.get(probe.name, {}).values():
            fix = advice.HOST_RANDOM.fix
            found.append(
                ValueSite(probe.name, "NX406", write.location, None, (write.location,), write.count, (), dict(_DRAWN), fix=fix)
            )
    return found


def _stamp(change: Change) -> Hashable:
    now = change.holder.now()
    if change.key not in now:
        return ("absent",)
    value = now[change.key]
    if isinstance(value, (*_PLAIN, frozenset)):
        return (type(value).__name__, repr(value))
    return (type(value).__name__, id(value))


def _shown(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    text = repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"
