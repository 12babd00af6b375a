"""What a value site becomes on each way to Neuron.

Sources: ``nxfx.report.advice`` for the legacy trace and TorchNeuron; Dynamo's breaks were measured with ``torch._dynamo.utils.counters``
on one model a construct, on torch 2.9 and 2.13 (``tests/test_sites.py`` holds the table to it).
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
}
_WITH_VALUES = frozenset({"branch", "value", "bound", "position", "size"})
# Dynamo makes a runtime assertion, a copy, a tensor operation or a traced call of these; there is no break.
_UNBROKEN_ROLES = frozenset({"random", "copy", "host op", "position"})
_UNBROKEN = frozenset(
    {"assert", "max()", "min()", ".numpy()", "numpy conversion", "torch.tensor of tensors", "number argument", "size", "k", "boolean write"}
)
# From torch 2.13 on, fullgraph=True goes on with a symbol for the number or the size at these roles.
_SYMBOLIC = frozenset({"value", "size", "bound"})


def breaks_graph(reading: Reading) -> bool:
    """Whether ``torch.compile`` breaks the graph there."""
    kind = reading.kind
    return reading.role not in _UNBROKEN_ROLES and kind not in _UNBROKEN and kind not in ("narrow bound", "select bound")


def _torch_neuron(reading: Reading, broken: bool) -> str:
    if not broken:
        return "accepted by Dynamo" + (": as a number or a size that depends on data" if reading.role in _SYMBOLIC else "")
    if reading.role in _SYMBOLIC:
        return "refused (fullgraph=True); from torch 2.13 on Dynamo goes on with a symbol, and static shapes refuse that (EMOD025)"
    return "refused (fullgraph=True)"


def waits(reading: Reading) -> bool:
    """Whether the host waits for the device there."""
    return reading.role != "random"


def becomes(reading: Reading, values: tuple[str, ...], count: int) -> dict[str, str]:
    """Route → what the site turns into there."""
    seen = f" ({', '.join(values)})" if values and reading.role in _WITH_VALUES else ""
    broken = breaks_graph(reading)
    times = "once" if count <= 1 else f"{count} times"
    found = {
        "legacy trace": _TRACED[reading.role] + seen,
        "torch.compile": f"graph break: up to {count + 1} subgraphs instead of one" if broken else "no graph break",
        "TorchNeuron": _torch_neuron(reading, broken),
    }
    if waits(reading):
        found["host"] = f"waits for the device, {times} a call"
    return found
