"""Tensors that a device wrote down, by name: of nodes, or of modules as NxD Inference's tensor capture names them.

A name is a node of the captured graph (``mul_3``), a module path (``layers.0.mlp``: its output), either with ``_output`` or
``.output`` behind it, or a file ``captured_tensors_<phase>_step_<n>_module_<path>_output.pt`` (of several steps the first).
Module paths may leave out a leading ``model.``, and may have underscores for dots.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import fx

from nxfx.errors import UsageError
from nxfx.graph.meta import is_tensor, val
from nxfx.verification.subjects import load_outputs

_NXDI = re.compile(r"captured_tensors_(?P<phase>\w+?)_step_(?P<step>\d+)_module_(?P<name>.+)")
_SUFFIX = re.compile(r"[._]outputs?$")
_FILES = (".pt", ".pth", ".npy", ".npz")


def load_captures(source: str | Path | dict[str, Any]) -> dict[str, torch.Tensor]:
    """Name → tensor.

    Raises:
        UsageError: no such file, or nothing in it that is a tensor.
    """
    if isinstance(source, dict):
        found = _flat("", source)
    else:
        path = Path(source)
        found = _directory(path) if path.is_dir() else _flat("", load_outputs(path))
    if not found:
        raise UsageError(f"no tensors in {source if not isinstance(source, dict) else 'captures'}")
    return found


def _directory(path: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    steps: dict[str, int] = {}
    for file in sorted(p for p in path.iterdir() if p.suffix in _FILES):
        name, step = file.stem, 0
        if match := _NXDI.fullmatch(name):
            name, step = match["name"], int(match["step"])
        for key, tensor in _flat(name, load_outputs(file)).items():
            if key not in found or step < steps[key]:
                found[key], steps[key] = tensor, step
    return found


def _flat(name: str, value: Any) -> dict[str, torch.Tensor]:
    if isinstance(value, numpy.ndarray):
        value = torch.from_numpy(value)
    if isinstance(value, torch.Tensor):
        return {name: value}
    if isinstance(value, dict):
        return {k: t for key, v in value.items() for k, t in _flat(f"{name}.{key}" if name else str(key), v).items()}
    if isinstance(value, (list, tuple)) and value:
        return _flat(name, value[0])  # a module's first result
    return {}


def captured_values(graph_module: fx.GraphModule, source: Any, notes: list[str]) -> dict[fx.Node, torch.Tensor]:
    """Node of the graph → its captured value. Names that fit nothing, and shapes that do not fit, are told in ``notes``.

    Raises:
        UsageError: not one name fits.
    """
    captures = load_captures(source)
    nodes = {n.name: n for n in graph_module.graph.nodes if n.op != "output"}
    modules = _module_outputs(graph_module)
    found: dict[fx.Node, torch.Tensor] = {}
    unknown = []
    for name, tensor in captures.items():
        node = nodes.get(name) or nodes.get(_SUFFIX.sub("", name)) or modules.get(_key(name))
        if node is None:
            unknown.append(name)
            continue
        shape = tuple(val(node).shape)
        if tuple(tensor.shape) != shape and all(isinstance(s, int) for s in shape):
            notes.append(f"capture {name!r} has shape {list(tensor.shape)}, the model {list(shape)}: left out")
            continue
        found[node] = tensor
    if unknown:
        near = difflib.get_close_matches(unknown[0], [*nodes, *modules], n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        told = f"{len(unknown)} captures fit no node and no module of the model: {', '.join(unknown[:3])}{hint}"
        if not found:
            raise UsageError(told)
        notes.append(told)
    return found


def _key(name: str) -> str:
    return _SUFFIX.sub("", name).replace(".", "_").removeprefix("model_")


def _module_outputs(graph_module: fx.GraphModule) -> dict[str, fx.Node]:
    """Module path → the last tensor that was computed inside it and is used outside, or the last one."""
    last: dict[str, fx.Node] = {}
    for node in graph_module.graph.nodes:
        if node.op != "call_function" or not is_tensor(node):
            continue
        inside = _modules_of(node)
        for path in inside:
            leaves = any(path not in _modules_of(user) for user in node.users)
            if leaves or path not in last:
                last[path] = node
    return {_key(path): node for path, node in last.items()}


def _modules_of(node: fx.Node) -> set[str]:
    stack = node.meta.get("nn_module_stack") or {}
    paths = (str(entry[0]) for entry in stack.values())
    return {p.removeprefix("L['self'].").removeprefix("L['self']") for p in paths} - {""}
