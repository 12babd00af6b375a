"""What nxfx can say of a failure inside a compiler that was handed one of its graphs: the node it was at, the user's line."""

from __future__ import annotations

import linecache
import re
from collections.abc import Iterable, Iterator

from torch import fx

from nxfx.report.findings import Finding
from nxfx.report.locations import locate

_SHOWN = 3
_COMPILER_CODE = re.compile(r"\bNCC_[A-Z]+\d+\b|\b[A-Z]{4}\d{3}\b")
_ASSIGNED = re.compile(r"\s*(\w+)(?: : [^=]+)? = ")


def explain(error: BaseException, graph_module: fx.GraphModule, findings: Iterable[Finding] = ()) -> str:
    """Lines to append to the compiler's message, each with the user's file, line and source; empty when nothing is known.

    Args:
        error: what the compiler raised; its causes are looked at too.
        graph_module: the graph it was handed.
        findings: the report's; one that names a compiler error code which the message holds is repeated.
    """
    nodes = {node.name: node for node in graph_module.graph.nodes}
    messages = [str(e) for e in _chain(error)]
    told: dict[str, None] = {}
    for name in _failing_nodes(error):
        if name in nodes:
            told[_at(nodes[name])] = None
    for node in nodes.values() if not told else ():
        if node.op == "call_function" and any(re.search(rf"[%'`\"]{re.escape(node.name)}\b", m) for m in messages):
            told[_at(node)] = None
    codes = {code for message in messages for code in _COMPILER_CODE.findall(message)}
    for finding in findings:
        if any(code.removeprefix("NCC_") in finding.message for code in codes):
            where = f"{finding.location}: {finding.location.source}"
            told[f"  {finding.code}: {finding.message}\n    at {where}\n    fix: {finding.fix}"] = None
    return "".join(f"\n{line}" for line in list(told)[:_SHOWN])


def _at(node: fx.Node) -> str:
    location = locate(node)
    made_by = node.meta.get("nxfx", {}).get("made_by")
    by = f" (made by {made_by})" if made_by else ""
    return f"  {node.target} `{node.name}`{by}\n    at {location}: {location.source}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _failing_nodes(error: BaseException) -> Iterator[str]:
    """Names that the generated code of graph modules was assigning when it raised."""
    for link in _chain(error):
        trace = link.__traceback__
        while trace is not None:
            file = trace.tb_frame.f_code.co_filename
            if file.startswith("<eval_with_key>"):
                assigned = _ASSIGNED.match(linecache.getline(file, trace.tb_lineno))
                if assigned:
                    yield assigned[1]
            trace = trace.tb_next
