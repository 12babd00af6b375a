"""Writing the script."""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from sympy.printing.str import StrPrinter
from torch import fx

from nxfx.analysis.provenance import Role
from nxfx.errors import PassError
from nxfx.graph import printing
from nxfx.graph.escaping import printable
from nxfx.graph.meta import val
from nxfx.pipeline import Pass, PassContext, Pipeline, available_passes
from nxfx.report.locations import Location, locate

DIRECTORY_VARIABLE = "NXFX_REPRODUCER_DIR"
_STORED_ELEMENTS = 1 << 16  # a buffer of at most this many elements is stored with its values
_STORED_WEIGHTS = 1 << 22
INPUT = "input "  # before an input's position: no attribute has a space in its name
_RESERVED = frozenset({"g", "torch", "device", "inf", "nan", "operator", "math", "complex", "slice", "getattr"})


def write_reproducer(
    graph_module: fx.GraphModule,
    pipeline: Pipeline | str,
    error: PassError,
    context: PassContext | None = None,
    *,
    inputs: list[Any] | None = None,
    exact: bool = True,
) -> str:
    """Write a script that rebuilds ``graph_module`` and runs ``pipeline`` on it.

    Args:
        graph_module: the graph before the failing pass.
        pipeline: the failing pass, or it and what follows; a pass that is not registered is imported by its module.
        error: what the pass raised; it is quoted in the script.
        context: what the pass knew about the graph's sources, the target and training.
        inputs: where the pass does not fail but changes what the graph computes: inputs that show it.
        exact: of such a pass: whether it promises equal bits.

    Returns:
        Path of ``reproduce.py``, in a new directory under ``$NXFX_REPRODUCER_DIR`` or the system's temporary directory.

    Raises:
        OSError: the directory cannot be written.
    """
    parent = os.environ.get(DIRECTORY_VARIABLE) or None
    if parent:
        os.makedirs(parent, exist_ok=True)
    name = re.sub(r"[^\w-]+", "-", error.pass_name) or "pass"
    directory = Path(tempfile.mkdtemp(prefix=f"nxfx-{name}-", dir=parent))
    context = context or PassContext()
    stored = dict(_stored_tensors(graph_module, context))
    if inputs is not None:
        stored |= dict(_small_weights(graph_module)) | {f"{INPUT}{i}": t for i, t in enumerate(inputs) if isinstance(t, torch.Tensor)}
    if stored:
        torch.save(stored, directory / "tensors.pt")
    path = directory / "reproduce.py"
    call = "" if inputs is None else f"g.compare({{steps}}, inputs={_given(inputs)}, exact={exact})"
    path.write_text(_Script(graph_module, context).render(pipeline, error, call), encoding="utf-8", errors="backslashreplace")
    return str(path)


def _attribute_value(gm: fx.GraphModule, target: str) -> Any:
    value: Any = gm
    for part in target.split("."):
        value = getattr(value, part, None)
    return value


def _stored_tensors(gm: fx.GraphModule, context: PassContext) -> Iterator[tuple[str, torch.Tensor]]:
    """Small tensors other than parameters: a pass may have read their values."""
    for source in context.sources.values():
        if (
            source.role in (Role.BUFFER, Role.CONSTANT)
            and isinstance(source.value, torch.Tensor)
            and _has_small_data(source.value)
        ):
            yield source.name, source.value.detach().cpu().clone()
    for node in gm.graph.find_nodes(op="get_attr"):
        value = _attribute_value(gm, str(node.target))
        if isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter) and _has_small_data(value):
            yield str(node.target), value.detach().cpu().clone()


def _small_weights(gm: fx.GraphModule) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters, while they are few: the difference may rest on their values."""
    left = _STORED_WEIGHTS
    for node in gm.graph.find_nodes(op="get_attr"):
        value = _attribute_value(gm, str(node.target))
        if isinstance(value, torch.Tensor) and not value.is_meta and value.numel() <= left:
            left -= value.numel()
            yield str(node.target), value.detach().cpu().clone()


def _given(inputs: list[Any]) -> str:
    """The inputs of the graph as source: those that are tensors are stored."""
    parts = [f"g.stored({i})" if isinstance(value, torch.Tensor) else printing.literal(value) for i, value in enumerate(inputs)]
    return f"[{', '.join(parts)}]"


def _has_small_data(tensor: torch.Tensor) -> bool:
    return type(tensor) in (torch.Tensor, torch.nn.Buffer) and not tensor.is_meta and tensor.numel() <= _STORED_ELEMENTS


class _ExpressionPrinter(StrPrinter):  # type: ignore[misc]  # sympy has no annotations
    """Symbolic sizes as calls of torch's own sympy functions, which :meth:`Rebuild.size` evaluates again."""

    printmethod = "_nxfx_never"  # torch's functions print themselves as operators that sympy would read differently


def _expression(value: Any) -> str:
    return str(_ExpressionPrinter().doprint(value.node.expr))


class _Script:
    """The text of one reproducer."""

    def __init__(self, gm: fx.GraphModule, context: PassContext) -> None:
        self.gm, self.context = gm, context
        self.builders: list[str] = []
        self.symbols: dict[str, str] = {}
        self.modules: set[str] = set()
        self.namespaces: set[str] = set()

    def render(self, pipeline: Pipeline | str, error: PassError, call: str = "") -> str:
        root = self._builder(self.gm, "graph")
        steps = ", ".join(self._steps(pipeline))
        context = self._context()
        imports = [
            f"import {m}" for m in sorted(self.modules | {"operator"}) if m.partition(".")[0] not in ("torch", "math")
        ]
        custom = "".join(
            f"\n# The graph uses ops of {n!r}: import the library that registers them here."
            for n in sorted(self.namespaces)
        )
        return "\n".join(
            [
                _docstring(error),
                "",
                "import math",
                *imports,
                "",
                "import torch",
                "from torch import device, inf, nan",
                "",
                "from nxfx.reproducer import Rebuild" + custom,
                "",
                "",
                *[f"{b}\n\n" for b in self.builders],
                'if __name__ == "__main__":',
                "    g = Rebuild(__file__)",
                *[f"    {line}" for line in self.symbols.values()],
                f"    {root}(g)",
                *[f"    {line}" for line in context],
                "    " + (call.format(steps=steps) if call else f"g.run({steps}, verify_each={_is_broken_invariant(error)})"),
                "",
            ]
        )

    # -- graph ----------------------------------------------------------------------------------------------

    def _builder(self, gm: fx.GraphModule, name: str) -> str:
        """Add the function that builds ``gm``; its name."""
        name = f"build_{re.sub(r'[^0-9A-Za-z_]', '_', name)}_{len(self.builders)}"
        position = len(self.builders)
        self.builders.append("")
        lines = [f"def {name}(g):"]
        variables: dict[fx.Node, str] = {}
        taken = set(_RESERVED)
        here = Location()
        for node in gm.graph.nodes:
            variable = node.name
            while variable in taken:
                variable += "_"
            taken.add(variable)
            variables[node] = variable
            if node.meta.get("stack_trace") and (location := locate(node)) != here:
                here = location
                lines.append(
                    f"    g.at({here.file!r}, {here.line}, {here.function!r}, {here.source!r}, {here.module!r})"
                )
            lines.append("    " + self._statement(gm, node, variables))
        self.builders[position] = "\n".join(lines)
        return name

    def _statement(self, gm: fx.GraphModule, node: fx.Node, variables: dict[fx.Node, str]) -> str:
        spell = variables.__getitem__
        if node.op == "output":
            return f"g.output({printing.literal(node.args[0], spell)})"
        value = self._value(val(node))
        if node.op == "placeholder":
            return f"{variables[node]} = g.input({node.name!r}, {str(node.target)!r}, {value})"
        if node.op == "get_attr":
            attribute = _attribute_value(gm, str(node.target))
            if isinstance(attribute, fx.GraphModule):
                build = self._builder(attribute, node.name)
                return f"{variables[node]} = g.body({node.name!r}, {str(node.target)!r}, {build})"
            parameter = isinstance(attribute, torch.nn.Parameter)
            return (
                f"{variables[node]} = g.attribute({node.name!r}, {str(node.target)!r}, {value}, parameter={parameter})"
            )
        args, kwargs = printing.literal(node.args, spell), printing.literal(dict(node.kwargs), spell)
        target = self._target(node.target) if node.op == "call_function" else repr(node.target)
        extra = "" if node.op == "call_function" else f", op={node.op!r}"
        if printing.made_by(node):
            extra += f", made_by={printing.made_by(node)!r}"
        return f"{variables[node]} = g.call({node.name!r}, {target}, {args}, {kwargs}, {value}{extra})"

    def _target(self, target: Any) -> str:
        name = printing.qualified(target)
        if isinstance(target, torch._ops.OpOverload):
            if target.namespace not in ("aten", "prims", "prim", "higher_order"):
                self.namespaces.add(target.namespace)
        elif not name.startswith("torch.") and "." in name:
            self.modules.add((getattr(target, "__module__", "") or "").lstrip("_"))
        return name

    def _value(self, value: Any) -> str:
        if isinstance(value, torch.Tensor):
            extra = "" if value.device.type == "cpu" else f", device={str(value.device)!r}"
            if value.layout is torch.strided and not value.is_contiguous():
                extra += f", stride={self._sizes(value.stride())}"
            return f"g.tensor({value.dtype}, {self._sizes(value.shape)}{extra})"
        if isinstance(value, (list, tuple)):
            return f"[{', '.join(map(self._value, value))}]"
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return self._size(value)
        return printing.literal(value) if value is None or isinstance(value, (bool, int, float)) else "None"

    def _sizes(self, sizes: Iterable[Any]) -> str:
        parts = [self._size(s) for s in sizes]
        return f"({', '.join(parts)}{',' if len(parts) == 1 else ''})"

    def _size(self, value: Any) -> str:
        if isinstance(value, int):
            return str(value)
        for symbol in sorted(value.node.expr.free_symbols, key=str):
            self._declare(symbol, value.node.shape_env)
        return f"g.symbolic({type(value).__name__!r}, {_expression(value)!r})"

    def _declare(self, symbol: Any, env: Any) -> None:
        name = str(symbol)
        if name in self.symbols:
            return
        known = getattr(env, "backed_var_to_val", None)
        hint = (env.var_to_val if known is None else known).get(symbol)
        bounds = env.var_to_range.get(symbol)
        ends = [
            int(e) if bounds is not None and e.is_Integer else None
            for e in ((bounds.lower, bounds.upper) if bounds else ())
        ]
        low, high = ends or (None, None)
        self.symbols[name] = f"g.symbol({name!r}, hint={None if hint is None else int(hint)}, low={low}, high={high})"

    # -- context and passes ---------------------------------------------------------------------------------

    def _context(self) -> Iterator[str]:
        target = self.context.target
        yield f"g.context(target={target.name!r}, sdk={target.sdk!r}, training={self.context.training})"
        there = {n.name for n in self.gm.graph.nodes}
        for node, source in self.context.sources.items():
            known = source.value is not None and node in there
            yield (
                f"g.source({node!r}, {source.name!r}, {source.role.value!r}, "
                f"known={known}, mutated={source.mutated}, range={source.range!r}{', recomputed=True' if source.recomputed else ''})"
            )

    def _steps(self, pipeline: Pipeline | str) -> Iterator[str]:
        names = (
            pipeline.names if isinstance(pipeline, Pipeline) else re.findall(r"(?:^|,)\s*([\w.-]+)(?![^{]*})", pipeline)
        )
        text = str(pipeline)
        if all(name in available_passes() for name in names):
            yield repr(text)
            return
        steps = {s.name: s for s in pipeline} if isinstance(pipeline, Pipeline) else {}
        for name in names:
            if name in available_passes():
                yield repr(str(Pipeline([steps[name]])) if name in steps else name)
                continue
            cls = type(steps[name]) if name in steps else _subclass(name)
            options = dataclasses.asdict(steps[name].options) if name in steps else {}
            yield (
                f"g.imported({cls.__module__!r}, {_source_file(cls)!r}, {cls.__qualname__!r}, {options!r})"
                if cls
                else repr(name)
            )


def _is_broken_invariant(error: PassError) -> bool:
    """Whether the pass itself was content and verification was not: only then must the rebuilt run verify."""
    return error.__cause__ is None


def _docstring(error: PassError) -> str:
    quoted = printable(str(error)).replace("\\", "\\\\").replace('"', '\\"')
    how = "Run it with a Python that has the same nxfx and torch. Weights are not the model's own."
    return f'"""Fails as this did:\n\n{quoted}\n\n{how}\n"""'


def _subclass(name: str) -> type[Pass] | None:
    pending = Pass.__subclasses__()
    while pending:
        cls = pending.pop()
        if cls.__dict__.get("name") == name:
            return cls
        pending += cls.__subclasses__()
    return None


def _source_file(cls: type[Any]) -> str:
    try:
        return os.path.abspath(inspect.getfile(cls))
    except (TypeError, OSError):
        return ""
