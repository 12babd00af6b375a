"""The one fallback: strict ``torch.export`` (Dynamo reads the model's bytecode instead of running it).

It captures a few things that running on fakes cannot: ``int(t)``, ``float(t)``, NumPy in the middle of a model. It takes plain
calling conventions only (tensors in lists, tuples and dicts, literals for everything else) and models without plain tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree

from nxfx.capture.shell import Convention
from nxfx.capture.structure import Container, Leaf, Static, flatten

PREFIX = "model."


class NotPlain(Exception):
    """The call cannot be written down as source code."""


class StrictShell(torch.nn.Module):
    """``forward`` takes one tensor per leaf and is one call expression, so that Dynamo sees nothing but the model."""

    slots: dict[str, Any] = {}

    def __init__(self, model: torch.nn.Module, convention: Convention) -> None:
        super().__init__()
        self.model = model
        names = convention.input_names
        args, kwargs = convention.input_spec.children
        call = ", ".join([*(_source(c, names) for c in args.children), *_keywords(kwargs, names)])
        namespace: dict[str, Any] = {}
        exec(f"def forward({', '.join(['self', *names])}):\n    return self.model({call})", namespace)
        self.__class__ = type("StrictShell", (StrictShell,), {"forward": namespace["forward"]})


def _keywords(spec: Container, names: list[str]) -> list[str]:
    return [f"{key}={_source(child, names)}" for key, child in zip(spec.keys, spec.children, strict=True)]


def _source(spec: Any, names: list[str]) -> str:
    """The expression that rebuilds ``spec`` from the parameters ``names``."""
    if isinstance(spec, Leaf):
        return names[spec.index]
    if isinstance(spec, Static):
        if spec.value is None or type(spec.value) in (bool, int, float, str):
            return repr(spec.value)
        raise NotPlain(type(spec.value).__name__)
    if isinstance(spec, Container) and spec.type in (list, tuple, dict):
        parts = [_source(c, names) for c in spec.children]
        if spec.type is dict:
            return "{" + ", ".join(f"{k!r}: {p}" for k, p in zip(spec.keys, parts, strict=True)) + "}"
        return f"[{', '.join(parts)}]" if spec.type is list else f"({', '.join(parts)}{',' if parts else ''})"
    raise NotPlain(str(spec))


def export_strict(
    model: torch.nn.Module, convention: Convention, leaves: tuple[torch.Tensor, ...], dynamic_shapes: Any
) -> tuple[torch.export.ExportedProgram, StrictShell]:
    """Export ``model`` strictly and complete ``convention`` with its results.

    Raises:
        NotPlain: the call is not plain.
        Exception: whatever ``torch.export`` raises.
    """
    shell = StrictShell(model, convention)
    program = torch.export.export(shell, leaves, strict=True, dynamic_shapes=dynamic_shapes)
    _read_results(program, convention)
    return program, shell


def _read_results(program: torch.export.ExportedProgram, convention: Convention) -> None:
    """The structure of the result from the program's own; its tensors must stand in nxfx's order already."""
    (output,) = program.graph.find_nodes(op="output")
    values = []
    for spec, value in zip(program.graph_signature.output_specs, output.args[0], strict=True):
        if spec.kind.name == "USER_OUTPUT":
            values.append(value.meta["val"] if isinstance(value, torch.fx.Node) else value)
    tree = program.call_spec.out_spec
    assert tree is not None
    # A tensor that is returned twice must stay two leaves.
    distinct = [v.view(v.shape) if isinstance(v, torch.Tensor) else v for v in values]
    flat = flatten(pytree.tree_unflatten(distinct, tree))
    tensors = [v for v in distinct if isinstance(v, (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool))]
    if [id(v) for v in flat.leaves] != [id(v) for v in tensors] or len(tensors) != len(values):
        raise NotPlain("results that are not all tensors in order")
    convention.output_spec, convention.output_count = flat.spec, len(flat.leaves)
