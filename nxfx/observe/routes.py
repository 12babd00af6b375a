"""What a value site becomes on each way to Neuron.

Sources: ``nxfx.report.advice`` for the legacy trace and TorchNeuron; Dynamo's breaks were measured with ``torch._dynamo.explain`` on
one model a construct, on torch 2.9 and 2.13 (``tests/test_sites.py`` holds the table to it).
"""

from __future__ import annotations

from nxfx.observe.constructs import Reading

_TRACED = {
    "branch": "baked to the example's branch",
    "check": "checked once, on the example; the compiled model does not check",
    "value": "baked to the example's value",
    "text": "done once, with the example's value",
    "size": "frozen to the example's size",
    "bound": "frozen to the example's bound",
    "position": "frozen to the example's position",
    "copy": "the trace is cut here: what follows takes the example's value as a constant",
    "random": "drawn by the device's own generator: other numbers than a CPU's",
    "host op": "computed on the host: the example's result is baked",
    "host random": "baked: every call repeats the numbers drawn at the trace",
}
_WITH_VALUES = frozenset({"branch", "value", "bound", "position", "size"})
# Kinds at which Dynamo does not break: it makes a runtime assertion, a copy node, or traces the call itself.
_UNBROKEN_ROLES = frozenset({"random", "copy", "host op", "host random", "position"})
_UNBROKEN = frozenset({"assert"})


def breaks_graph(reading: Reading) -> bool:
    """Whether ``torch.compile`` breaks the graph there, and ``fullgraph=True`` refuses it."""
    return reading.role not in _UNBROKEN_ROLES and reading.kind not in _UNBROKEN


def waits(reading: Reading) -> bool:
    """Whether the host waits for the device there."""
    return reading.role not in ("random", "host random")


def becomes(reading: Reading, values: tuple[str, ...], count: int) -> dict[str, str]:
    """Route → what the site turns into there."""
    seen = f" ({', '.join(values)})" if values and reading.role in _WITH_VALUES else ""
    broken = breaks_graph(reading)
    times = "once" if count <= 1 else f"{count} times"
    found = {
        "legacy trace": _TRACED[reading.role] + seen,
        "torch.compile": f"graph break: {count + 1} subgraphs instead of one" if broken else "no graph break",
        "TorchNeuron": "refused (fullgraph=True)" if broken else "accepted",
    }
    if waits(reading):
        found["host"] = f"waits for the device, {times} a call"
    return found
