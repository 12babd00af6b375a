"""A graph as text, table, JSON, Graphviz or Python; two graphs as a unified diff.

Every rendering is deterministic, linear in the graph, walks the bodies of higher-order ops, and reads only nodes and
their ``meta``: it works on a graph that has not been recompiled. A node made by a pass is marked with that pass's name.
"""

from __future__ import annotations

import difflib
import functools
import json
import keyword
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from nxfx.graph import meta, walk
from nxfx.graph.escaping import printable

Where = Callable[[fx.Node], str]
"""The user's line of a node, as it is to be printed; ``""`` when unknown."""


def nowhere(node: fx.Node) -> str:
    """A :data:`Where` that knows no lines."""
    return ""


def describe(value: Any) -> str:
    """A node's ``val``: ``int64[2, s0]``, ``(float32[3], int64[3])``, ``SymInt(u0)``; ``""`` for None."""
    if value is None:
        return ""
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}[{', '.join(map(str, value.shape))}]"
    if isinstance(value, (list, tuple)):
        return f"({', '.join(map(describe, value))})"
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return f"{type(value).__name__}({value})"
    return type(value).__name__


def literal(value: Any, name: Callable[[fx.Node], str] = str) -> str:
    """``value`` (an argument of a node) as Python source; nodes by ``name``.

    ``inf``, ``nan``, ``device``, ``torch`` and ``operator`` are expected to be in scope.
    """
    spell = functools.partial(literal, name=name)
    if isinstance(value, fx.Node):
        return name(value)
    if isinstance(value, list):
        return f"[{', '.join(map(spell, value))}]"
    if isinstance(value, tuple):
        return f"({', '.join(map(spell, value))}{',' if len(value) == 1 else ''})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{spell(k)}: {spell(v)}" for k, v in value.items()) + "}"
    if isinstance(value, slice):
        return f"slice({spell(value.start)}, {spell(value.stop)}, {spell(value.step)})"
    if isinstance(value, complex) and not (math.isfinite(value.real) and math.isfinite(value.imag)):
        return f"complex({value.real!r}, {value.imag!r})"
    if callable(value) and not isinstance(value, (type, torch.dtype)):
        return qualified(value)
    return repr(value)


def qualified(target: Any) -> str:
    """How Python source names the target of a ``call_function`` node: ``torch.ops.aten.add.Tensor``."""
    if isinstance(target, torch._ops.OpOverload):
        return f"torch.ops.{target}"
    if isinstance(target, torch._ops.HigherOrderOperator):
        return f"torch.ops.higher_order.{target.name()}"
    module = str(getattr(target, "__module__", None) or "").lstrip("_")
    spelled = str(getattr(target, "__qualname__", None) or getattr(target, "__name__", None) or target)
    return spelled if module in ("", "builtins") else f"{module}.{spelled}"


def short(target: Any) -> str:
    """An op's name for people: ``aten.add.Tensor``."""
    return qualified(target).removeprefix("torch.ops.").removeprefix("higher_order.")


def attribute(path: str, root: str = "self") -> str:
    """Python source for the attribute ``path``, whose parts need not be identifiers."""
    source = root
    for part in path.split("."):
        plain = part.isidentifier() and not keyword.iskeyword(part)
        source = f"{source}.{part}" if plain else f"getattr({source}, {part!r})"
    return source


def made_by(node: fx.Node) -> str:
    """Id of the pass that made ``node``, ``""`` when it was captured."""
    return str(node.meta.get("nxfx", {}).get("made_by", ""))


def results(graph: fx.Graph) -> Any:
    """What the graph returns."""
    (output,) = graph.find_nodes(op="output")
    return output.args[0]


def _arguments(node: fx.Node, name: Callable[[fx.Node], str] = str) -> str:
    spell = functools.partial(literal, name=name)
    return ", ".join([*map(spell, node.args), *(f"{k}={spell(v)}" for k, v in node.kwargs.items())])


def _bodies(gm: fx.GraphModule) -> Iterator[tuple[str, fx.GraphModule]]:
    """Every body of every higher-order op of this graph, each once, known op or not."""
    seen = set()
    for node in gm.graph.nodes:
        if walk.is_higher_order(node):
            for name, body in walk.bodies(gm, node):
                if name not in seen:
                    seen.add(name)
                    yield name, body


def _indent(block: str) -> str:
    return "\n".join("    " + line if line else line for line in block.splitlines())


# Text: one line a node, what tests compare and docstrings show.


def text(gm: fx.GraphModule) -> str:
    """One line a node, ``%name : dtype[shape] = op(arguments)``; then the bodies of higher-order ops by name."""
    lines = []
    for node in gm.graph.nodes:
        if node.op == "output":
            lines.append(f"return {literal(node.args[0])}")
        elif node.op in ("placeholder", "get_attr"):
            lines.append(f"{_typed(node)} = {node.op}[{node.target}]")
        else:
            lines.append(f"{_typed(node)} = {short(node.target)}({_arguments(node)})")
    for name, body in _bodies(gm):
        lines.append(f"{name}:")
        lines.append(_indent(text(body)))
    return "\n".join(lines)


def _typed(node: fx.Node) -> str:
    described = describe(meta.val(node))
    return f"%{node.name} : {described}" if described else f"%{node.name}"


# Python, as torch's print_readable shows it, without the `; x = None` that make every diff noisy.


def code(gm: fx.GraphModule, where: Where = nowhere, class_name: str = "GraphModule") -> str:
    """The graph as a Python class: types as annotations, the user's line and the pass as comments where they change."""
    parameters = []
    lines: list[str] = []
    previous = ""
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            parameters.append(f'{node.name}: "{describe(meta.val(node))}"')
            continue
        comment = _comment(node, where)
        if comment and comment != previous:
            lines.append(comment)
        previous = comment
        lines.append(_statement(node))
    body = [f"def forward({', '.join(['self', *parameters])}):", *("    " + line for line in lines)]
    nested = [f"\n{_indent(code(graph, where, name))}" for name, graph in _bodies(gm)]
    return "\n".join([f"class {class_name}(torch.nn.Module):", *("    " + line for line in body), *nested])


def _comment(node: fx.Node, where: Where) -> str:
    if node.op in ("get_attr", "output"):
        return ""
    line, maker = where(node), made_by(node)
    parts = [*([f"[{maker}]"] if maker else []), *([line] if line else [])]
    return "# " + printable(" ".join(parts)).replace("\n", "\\n") if parts else ""


def _statement(node: fx.Node) -> str:
    if node.op == "output":
        return f"return {literal(node.args[0])}"
    if node.op == "get_attr":
        value = attribute(str(node.target))
    elif node.op == "call_module":
        value = f"{attribute(str(node.target))}({_arguments(node)})"
    elif node.op == "call_method":
        receiver, *rest = node.args
        arguments = [*map(literal, rest), *(f"{k}={literal(v)}" for k, v in node.kwargs.items())]
        value = f"{literal(receiver)}.{node.target}({', '.join(arguments)})"
    else:
        value = f"{qualified(node.target)}({_arguments(node)})"
    annotation = describe(meta.val(node))
    return f'{node.name}: "{annotation}" = {value}' if annotation else f"{node.name} = {value}"


# Table.


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    op: str
    value: str
    arguments: str
    made_by: str
    where: str


HEADINGS = Row("name", "op", "value", "arguments", "made by", "where")


def rows(gm: fx.GraphModule, where: Where = nowhere, path: str = "") -> Iterator[Row]:
    """The graph's nodes in order, then those of its higher-order ops' bodies, their names prefixed by the body's."""
    for node in gm.graph.nodes:
        op = node.op if node.op in ("placeholder", "get_attr", "output") else short(node.target)
        arguments = str(node.target) if node.op in ("placeholder", "get_attr") else _arguments(node)
        yield Row(path + node.name, op, describe(meta.val(node)), arguments, made_by(node), where(node))
    for name, body in _bodies(gm):
        yield from rows(body, where, f"{path}{name}.")


def table(gm: fx.GraphModule, where: Where = nowhere) -> str:
    """Aligned columns, one row a node: name, op, dtype and shape, arguments, the pass that made it, the user's line."""
    cells = [[printable(c).replace("\n", "\\n") for c in vars(row).values()] for row in (HEADINGS, *rows(gm, where))]
    used = [i for i in range(len(cells[0])) if any(row[i] for row in cells[1:])]
    widths = {i: max(len(row[i]) for row in cells) for i in used}
    aligned = ["  ".join(row[i].ljust(widths[i]) for i in used).rstrip() for row in cells]
    return "\n".join([aligned[0], "  ".join("-" * widths[i] for i in used), *aligned[1:]])


# JSON.


def to_dict(gm: fx.GraphModule, where: Where = nowhere) -> dict[str, Any]:
    """Plain data: ``inputs``, ``outputs``, ``nodes`` and ``bodies``.

    A node has ``name``, ``op``, ``target``, ``args``, ``kwargs``, ``value``, ``made_by``, ``where`` and ``users``. A
    reference to a node is ``{"node": name}``; what JSON lacks is ``{"literal": source}``.
    """
    nodes = [
        {
            "name": n.name,
            "op": n.op,
            "target": qualified(n.target) if callable(n.target) else str(n.target),
            "args": _plain(n.args),
            "kwargs": _plain(n.kwargs),
            "value": _value(meta.val(n)),
            "made_by": made_by(n),
            "where": where(n),
            "users": [u.name for u in n.users],
        }
        for n in gm.graph.nodes
    ]
    return {
        "inputs": [n.name for n in gm.graph.find_nodes(op="placeholder")],
        "outputs": _plain(results(gm.graph)),
        "nodes": nodes,
        "bodies": {name: to_dict(body, where) for name, body in _bodies(gm)},
    }


def to_json(gm: fx.GraphModule, where: Where = nowhere) -> str:
    """:func:`to_dict` as JSON text."""
    return json.dumps(to_dict(gm, where), indent=2, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, dict) and all(isinstance(k, str) for k in value):
        return {k: _plain(v) for k, v in value.items()}
    if value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return {"literal": literal(value)}


def _value(value: Any) -> Any:
    if value is None:
        return None
    if isinstance(value, torch.Tensor):
        shape = [d if isinstance(d, int) else str(d) for d in value.shape]
        return {"dtype": str(value.dtype).removeprefix("torch."), "shape": shape, "device": str(value.device)}
    if isinstance(value, (list, tuple)):
        return [_value(v) for v in value]
    return {"python": describe(value)}


# Graphviz.

_MADE, _WIDE, _SOURCE = "#d5f5d5", "#c00000", "#e8e8e8"
_WIDE_DTYPES = frozenset({torch.int64, torch.uint64, torch.float64, torch.complex128})


def dot(gm: fx.GraphModule, where: Where = nowhere, name: str = "graph") -> str:
    """Graphviz: nodes made by a pass are green, inputs and weights grey, 64-bit edges red; a body is a cluster."""
    lines = [f"digraph {_quoted(name)} {{", "  rankdir=TB;", '  node [shape=box, fontname="monospace", fontsize=10];']
    lines += _dot_body(gm, where, "")
    return "\n".join([*lines, "}"])


def _dot_body(gm: fx.GraphModule, where: Where, path: str) -> Iterator[str]:
    for node in gm.graph.nodes:
        title = node.op if node.op in ("placeholder", "get_attr", "output") else short(node.target)
        label = "\n".join(filter(None, [f"{node.name} = {title}", describe(meta.val(node)), made_by(node)]))
        colour = _SOURCE if title == node.op else _MADE if made_by(node) else ""
        style = f', style=filled, fillcolor="{colour}"' if colour else ""
        line = where(node)
        tooltip = f", tooltip={_quoted(line)}" if line else ""
        yield f"  {_quoted(path + node.name)} [label={_quoted(label)}{style}{tooltip}];"
        for used in node.all_input_nodes:
            wide = f' [color="{_WIDE}", penwidth=2]' if meta.dtype_of(used) in _WIDE_DTYPES else ""
            yield f"  {_quoted(path + used.name)} -> {_quoted(path + node.name)}{wide};"
    for name, body in _bodies(gm):
        inner = f"{path}{name}."
        yield f"  subgraph {_quoted('cluster_' + inner)} {{"
        yield f"  label={_quoted(path + name)};"
        yield from _dot_body(body, where, inner)
        yield "  }"


def _quoted(label: str) -> str:
    escaped = printable(label).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def diff(before: str, after: str, before_label: str = "before", after_label: str = "after", context: int = 3) -> str:
    """Unified diff of two renderings, ``""`` when they are equal."""
    lines = difflib.unified_diff(
        before.splitlines(), after.splitlines(), before_label, after_label, n=context, lineterm=""
    )
    return "\n".join(lines)
