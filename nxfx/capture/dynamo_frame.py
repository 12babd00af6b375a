"""What Dynamo's graph says of the user's program: the names behind its placeholders, and where it had to stop."""

from __future__ import annotations

import linecache
import re
import traceback
from collections.abc import Container, Iterator, Sequence
from typing import Any

import torch
from torch import fx

from nxfx.analysis.provenance import Role
from nxfx.report import Finding, Location, Severity
from nxfx.report.locations import frame_rank

_MODULE_STEP = re.compile(r"""(?:_modules|_parameters|_buffers)\[(['"])(.+?)\1\]""")
_STEP = re.compile(r"""\[(['"])(?P<key>.+?)\1\]|\[(?P<index>\d+)\]|\.(?P<attribute>\w+)""")
_RESUMED = re.compile(r"torch_dynamo_resume_in_(.*)_at_(\d+)$")
_BRANCH = "generic_jump"


def user_names(graph_module: fx.GraphModule) -> list[tuple[str, Role]]:
    """Per placeholder of a Dynamo graph the user's own name and what it stands for; the names are unique.

    ``L['ids']`` is ``ids``, ``L['batch']['ids'][0]`` is ``batch_ids_0``, a keyword argument that a decorator passes on
    as ``L['kwargs']['ids']`` is ``ids``, and module tensors have their fully qualified name.
    """
    found: list[tuple[str, Role]] = []
    taken: set[str] = set()
    for node in graph_module.graph.find_nodes(op="placeholder"):
        name, role = _name_and_role(_source_text(node), node)
        unique, count = name, 1
        while unique in taken:
            unique, count = f"{name}_{count}", count + 1
        taken.add(unique)
        found.append((unique, role))
    return found


def _source_text(node: fx.Node) -> str:
    source = getattr(node, "_dynamo_source", None)
    name = getattr(source, "name", "")
    return str(name() if callable(name) else name)  # a method up to torch 2.9, a property later


def _name_and_role(text: str, node: fx.Node) -> tuple[str, Role]:
    if "._parameters[" in text or "._buffers[" in text:
        role = Role.PARAMETER if "._parameters[" in text else Role.BUFFER
        return ".".join(match[2] for match in _MODULE_STEP.finditer(text)), role
    steps = [match["key"] or match["index"] or match["attribute"] for match in _STEP.finditer(text)]
    if len(steps) > 1 and (steps[0] == "self" or (steps[0] == "kwargs" and not steps[1].isdigit())):
        steps = steps[1:]
    role = Role.PARAMETER if isinstance(node.meta.get("example_value"), torch.nn.Parameter) else Role.INPUT
    return re.sub(r"\W+", "_", "_".join(steps)).strip("_") or node.name, role


def graph_breaks(graph_module: fx.GraphModule, reported: Container[tuple[str, int]]) -> list[Finding]:
    """NX408 for the break that ended this Dynamo graph, and for the one it resumes after if nobody has told it yet.

    A break before the first tensor op makes no graph of its own: only the graph that resumes after it can tell.

    Args:
        reported: ``(file, line)`` of the breaks that earlier graphs have told.
    """
    reason = getattr(graph_module, "compile_subgraph_reason", None)
    stack: Sequence[traceback.FrameSummary] = getattr(reason, "user_stack", None) or ()
    found = []
    for frame in stack[:1]:
        resumed = _RESUMED.match(frame.name)
        if resumed and (frame.filename, line := int(resumed[2])) not in reported:
            found.append(_break_at(frame.filename, line, frame.name, _reason_at(frame.filename, line)))
    if reason is not None and reason.graph_break:
        frames = sorted(stack, key=lambda f: frame_rank(f.filename))  # stable: the user's own innermost comes last
        frame = frames[-1] if frames else traceback.FrameSummary("", 0, "")
        found.append(_break_at(frame.filename, frame.lineno or 0, frame.name, str(reason.reason)))
    return found


def _reason_at(file: str, line: int) -> str:
    for reason in _all_reasons():
        if any(f.filename == file and f.lineno == line for f in reason.user_stack):
            return str(reason.reason)
    return ""


def _all_reasons() -> Iterator[Any]:
    return reversed(list(torch._dynamo.utils.graph_break_reasons))


def _break_at(file: str, line: int, function: str, reason: str) -> Finding:
    why, fix = _in_words(reason)
    if resumed := _RESUMED.match(function):
        function = resumed[1]
    location = Location(file, line, linecache.getline(file, line).strip(), "", function)
    message = f"Dynamo ends the graph here and Python takes over on the host: {why}"
    return Finding("NX408", Severity.WARNING, message, location, "", fix)


def _in_words(reason: str) -> tuple[str, str]:
    """Dynamo's reason as one sentence, and what to write instead."""
    if reason.startswith(_BRANCH):
        fix = "write it with torch.where or torch.cond, or use nxfx.compile(model), whose own capture traces both sides"
        return "it branches on a tensor's value", fix
    lines = [line.strip() for line in reason.splitlines() if line.strip()] or ["no reason given"]
    why = next((line.removeprefix("Explanation:") for line in lines if line.startswith("Explanation:")), lines[0])
    hint = next(
        (line.removeprefix("Hint:") for line in lines if line.startswith("Hint:")),
        "move it out of the compiled function",
    )
    return why.strip().rstrip("."), hint.strip()
