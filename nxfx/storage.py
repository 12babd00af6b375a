"""Saving a prepared module to one file and loading it without the model's code.

The file is a ``.pt2`` written by ``torch.export.save``: the cleaned graph with its weights, and as an extra file the boundary,
the calling convention and the report as JSON. Loading imports the classes that the arguments and results are made of, by
name, and runs no other code.
"""

from __future__ import annotations

import enum
import importlib
import inspect
import json
import warnings
from pathlib import Path as FilePath
from typing import Any

import torch
from torch import fx

from nxfx.analysis.provenance import Role, Source
from nxfx.boundary import Boundary, InputRule, widened
from nxfx.capture.export import Capture
from nxfx.capture.shell import Assigned, Convention
from nxfx.capture.structure import Container, Leaf, Same, Static
from nxfx.capture.unlift import constants_to_attributes, mirror
from nxfx.captured_call import CapturedCall
from nxfx.errors import PrepareError, UsageError
from nxfx.graph.attributes import own_buffer, share_registries
from nxfx.graph.walk import reshape_views
from nxfx.prepared import PreparedModule, Signature
from nxfx.report import Report

EXTRA = "nxfx.json"
FORMAT = 1


def save(prepared: PreparedModule, path: str | FilePath) -> None:
    """Write the only capture of ``prepared`` to ``path``.

    Raises:
        PrepareError: there is not exactly one capture, ``forward`` keeps Python state, or an argument cannot be described in a file.
    """
    ((signature, call),) = prepared.captures.items() if len(prepared.captures) == 1 else ((None, prepared._only()),)
    call._sync()
    convention = call.convention
    if convention.state_writes:
        raise PrepareError(f"cannot save: forward changes the Python attribute {convention.state_writes[0].path!r}", call.report)
    extra = {
        "format": FORMAT,
        "model": type(prepared._model).__name__,
        "training_mode": prepared._model.training,
        "signature": _signature_to_json(signature),
        "parameters": _parameters_to_json(prepared._model),
        "convention": _convention_to_json(convention),
        "boundary": _boundary_to_json(call.boundary),
        "mutated_buffers": call.mutated_buffers,
        "mutated_inputs": call.mutated_inputs,
        "premises_hold": True,
        "report": call.report.to_dict(),
        "allow_grad": call.training,
        "check": call.check,
        "names": _tensor_names(prepared._model, call),
    }
    program = _reexport(call)
    torch.export.save(program, str(path), extra_files={EXTRA: json.dumps(extra)})


def load(path: str | FilePath) -> PreparedModule:
    """The prepared module that :meth:`PreparedModule.save` wrote: called like the model it was made from.

    Raises:
        UsageError: no such file, or not one that nxfx wrote.
    """
    if not FilePath(path).is_file():
        raise UsageError(f"no such file: {path}")
    files = {EXTRA: ""}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.load(str(path), extra_files=files)
    except Exception as error:
        raise UsageError(f"{path} is not a .pt2 file: {str(error).splitlines()[0] if str(error) else type(error).__name__}") from error
    if not files[EXTRA]:
        raise UsageError(f"{path} was not written by nxfx: load it with torch.export.load and prepare its module")
    extra = json.loads(files[EXTRA])
    if extra["format"] != FORMAT:
        raise UsageError(f"{path} has format {extra['format']}, this nxfx reads {FORMAT}")
    return _rebuild(program, extra)


def _reexport(call: CapturedCall) -> torch.export.ExportedProgram:
    graph_module = call.graph_module
    symbolic = {
        index: {d: torch.export.Dim.AUTO for d, size in enumerate(value.shape) if not isinstance(size, int)}
        for index, value in enumerate(call.placeholders)
    }
    shapes = tuple(symbolic[i] or None for i in range(len(call.placeholders))) if any(symbolic.values()) else None
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return torch.export.export(_Flat(graph_module), call.example_inputs, strict=False, dynamic_shapes=(shapes,) if shapes else None)


class _Flat(torch.nn.Module):
    """Runs a graph module node by node, so that a new export keeps each node's line; shares its registries."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__()
        share_registries(self, graph_module)
        self.__dict__["_graph_module"] = graph_module
        self.training = graph_module.training

    def forward(self, *inputs: torch.Tensor) -> Any:
        with fx.traceback.preserve_node_meta():
            return fx.Interpreter(self.__dict__["_graph_module"], garbage_collect_values=False).run(*inputs)


def _tensor_names(model: torch.nn.Module, call: CapturedCall) -> dict[str, Any]:
    return {
        "non_persistent": sorted(n for n, _ in model.named_buffers() if n not in model.state_dict()),
        "plain": sorted(call.plain),
    }


# -- rebuilding -----------------------------------------------------------------------------------------------------------------


class Skeleton(torch.nn.Module):
    """What is left of a model in a file: its tensors under their names, and the signature of its ``forward``."""

    def __init__(self, name: str, signature: inspect.Signature) -> None:
        super().__init__()
        self.__dict__["_name"] = name

        def forward(*args: Any, **kwargs: Any) -> Any:
            raise PrepareError(f"{name} was loaded from a file: only its captured graph can run")

        forward.__signature__ = signature  # type: ignore[attr-defined]
        self.__dict__["forward"] = forward

    def place(self, name: str, value: torch.Tensor, persistent: bool = True) -> None:
        """Register ``value`` under a dotted name."""
        *path, leaf = name.split(".")
        module: torch.nn.Module = self
        for step in path:
            if step not in module._modules:
                module.add_module(step, torch.nn.Module())
            module = module._modules[step]  # type: ignore[assignment]
        if isinstance(value, torch.nn.Parameter):
            module.register_parameter(leaf, value)
        else:
            module.register_buffer(leaf, value, persistent=persistent)


def _rebuild(program: torch.export.ExportedProgram, extra: dict[str, Any]) -> PreparedModule:
    skeleton = Skeleton(extra["model"], _parameters_from_json(extra["parameters"]))
    boundary = _boundary_from_json(extra["boundary"])
    non_persistent = set(extra["names"]["non_persistent"]) | set(extra["names"]["plain"])
    graph_module, attributes = constants_to_attributes(program)
    reshape_views(graph_module)
    sources: dict[str, Source] = {}
    for name, (value, role) in attributes.items():
        wide = boundary.narrowed_buffers.get(name)
        if not name.startswith("_constants."):
            skeleton.place(name, value if wide is None else widened(value, wide), name not in non_persistent)
        own_buffer(graph_module, name, value) if role is not Role.PARAMETER else None
    skeleton.train(extra["training_mode"])
    _share(graph_module, skeleton, attributes, boundary)
    graph_module.recompile()
    capture = Capture(
        graph_module,
        _convention_from_json(extra["convention"]),
        sources,
        extra["mutated_buffers"],
        extra["mutated_inputs"],
        tuple(program.example_inputs[0]) if program.example_inputs else (),
    )
    report = Report.from_dict(extra["report"])
    call = CapturedCall(skeleton, capture, boundary, report, check=extra["check"], training=extra["allow_grad"])
    signature = _signature_from_json(extra["signature"])

    def refuse(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CapturedCall:
        raise PrepareError(f"this file holds one capture, for {signature}; these arguments need another: prepare the model for them")

    prepared = PreparedModule(skeleton, refuse, training=extra["allow_grad"])
    prepared._captures[signature] = call
    prepared._dynamic[signature.structure] = {
        (i, d): True for i, (_, shape, _) in enumerate(signature.tensors) for d, n in enumerate(shape) if n is None
    }
    return prepared


def _share(graph_module: fx.GraphModule, skeleton: Skeleton, attributes: dict[str, Any], boundary: Boundary) -> None:
    """Let the graph's modules use the skeleton's registries, but for constants and 32-bit twins."""
    root = mirror(skeleton)
    bodies = {n: m for n, m in graph_module.named_children() if isinstance(m, fx.GraphModule)}
    root.__dict__["_modules"] = {**root._modules, **bodies}
    for name, (value, _) in attributes.items():
        if name.startswith("_constants.") or name in boundary.narrowed_buffers:
            own_buffer(root, name, value)
    share_registries(graph_module, root)


# -- JSON -----------------------------------------------------------------------------------------------------------------------


def _class_to_json(cls: type) -> str:
    if "<locals>" in cls.__qualname__ or cls.__module__ == "__main__":
        raise PrepareError(f"cannot save: arguments or results use the class {cls.__qualname__}, which no other process can import")
    return f"{cls.__module__}:{cls.__qualname__}"


def _class_from_json(text: str) -> Any:
    module, _, qualified = text.partition(":")
    value: Any = importlib.import_module(module)
    for step in qualified.split("."):
        value = getattr(value, step)
    if not isinstance(value, type):
        raise UsageError(f"the file names {text!r} as a class, but it is none")
    return value


_TORCH = {torch.dtype: "dtype", torch.layout: "layout", torch.memory_format: "memory_format"}


def _static_to_json(value: Any) -> Any:
    if value is None or isinstance(value, (bool, str)):
        return value
    if type(value) in (int, float):
        return {"number": type(value).__name__, "value": repr(value)}
    if type(value) in _TORCH:
        return {"torch": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, torch.Size):
        return {"size": list(value)}
    if isinstance(value, enum.Enum):
        return {"enum": _class_to_json(type(value)), "name": value.name}
    if isinstance(value, type):
        return {"class": _class_to_json(value)}
    if type(value) in (list, tuple, dict):
        items = [[_static_to_json(k), _static_to_json(v)] for k, v in value.items()] if isinstance(value, dict) else None
        return {type(value).__name__: items if items is not None else [_static_to_json(v) for v in value]}
    raise PrepareError(f"cannot save: an argument or result holds a {type(value).__name__}, which a file cannot describe")


def _static_from_json(data: Any) -> Any:
    if data is None or isinstance(data, (bool, str)):
        return data
    if "number" in data:
        return {"int": int, "float": float}[data["number"]](data["value"])
    if "torch" in data:
        return getattr(torch, data["torch"])
    if "device" in data:
        return torch.device(data["device"])
    if "size" in data:
        return torch.Size(data["size"])
    if "enum" in data:
        return _class_from_json(data["enum"])[data["name"]]
    if "class" in data:
        return _class_from_json(data["class"])
    if "dict" in data:
        return {_static_from_json(k): _static_from_json(v) for k, v in data["dict"]}
    kind = "list" if "list" in data else "tuple"
    return {"list": list, "tuple": tuple}[kind](_static_from_json(v) for v in data[kind])


def _spec_to_json(spec: Any) -> Any:
    if isinstance(spec, Leaf):
        return {"leaf": spec.index}
    if isinstance(spec, Same):
        return {"same": [_static_to_json(k) for k in spec.path]}
    if isinstance(spec, Static):
        return {"static": _static_to_json(spec.value)}
    return {
        "kind": spec.kind,
        "type": _class_to_json(spec.type),
        "keys": [_static_to_json(k) for k in spec.keys],
        "children": [_spec_to_json(c) for c in spec.children],
        "context": _static_to_json(spec.context.value),
    }


def _spec_from_json(data: Any) -> Any:
    if "leaf" in data:
        return Leaf(data["leaf"])
    if "same" in data:
        return Same(tuple(_static_from_json(k) for k in data["same"]))
    if "static" in data:
        return Static(_static_from_json(data["static"]))
    return Container(
        data["kind"],
        _class_from_json(data["type"]),
        tuple(_static_from_json(k) for k in data["keys"]),
        tuple(_spec_from_json(c) for c in data["children"]),
        Static(_static_from_json(data["context"])),
    )


def _convention_to_json(convention: Convention) -> dict[str, Any]:
    after = convention.arguments_after
    return {
        "input_spec": _spec_to_json(convention.input_spec),
        "input_names": convention.input_names,
        "output_spec": _spec_to_json(convention.output_spec),
        "output_count": convention.output_count,
        "passed_through": [[k, v] for k, v in convention.passed_through.items()],
        "returned_state": [[k, v] for k, v in convention.returned_state.items()],
        "arguments_after": None if after is None else [_spec_to_json(after.spec), after.leaves],
    }


def _convention_from_json(data: dict[str, Any]) -> Convention:
    after = data["arguments_after"]
    return Convention(
        _spec_from_json(data["input_spec"]),
        data["input_names"],
        _spec_from_json(data["output_spec"]),
        data["output_count"],
        dict(data["passed_through"]),
        dict(data["returned_state"]),
        None if after is None else Assigned(_spec_from_json(after[0]), [tuple(leaf) for leaf in after[1]]),
    )


def _boundary_to_json(boundary: Boundary) -> dict[str, Any]:
    return {
        "inputs": [
            [r.name, None if r.narrow is None else _static_to_json(r.narrow), r.low, r.high, r.why] for r in boundary.inputs
        ],
        "outputs": [None if d is None else _static_to_json(d) for d in boundary.outputs],
        "narrowed_buffers": {n: _static_to_json(d) for n, d in boundary.narrowed_buffers.items()},
        "largest_size": boundary.largest_size,
    }


def _boundary_from_json(data: dict[str, Any]) -> Boundary:
    return Boundary(
        [InputRule(name, _static_from_json(narrow), low, high, why) for name, narrow, low, high, why in data["inputs"]],
        [_static_from_json(d) for d in data["outputs"]],
        {n: _static_from_json(d) for n, d in data["narrowed_buffers"].items()},
        data["largest_size"],
    )


def _signature_to_json(signature: Signature | None) -> dict[str, Any]:
    assert signature is not None
    return {
        "structure": _spec_to_json(signature.structure),
        "tensors": [[_static_to_json(d), list(shape), device] for d, shape, device in signature.tensors],
        "training": signature.training,
        "grad": signature.grad,
        "autocast": None if signature.autocast is None else [signature.autocast[0], _static_to_json(signature.autocast[1])],
    }


def _signature_from_json(data: dict[str, Any]) -> Signature:
    autocast = data["autocast"]
    return Signature(
        _spec_from_json(data["structure"]),
        tuple((_static_from_json(d), tuple(shape), device) for d, shape, device in data["tensors"]),
        data["training"],
        data["grad"],
        None if autocast is None else (autocast[0], _static_from_json(autocast[1])),
    )


def _parameters_to_json(model: torch.nn.Module) -> list[Any]:
    """Names and kinds of forward's parameters; a default only tells that there is one: a call is bound with it left out."""
    parameters = inspect.signature(model.forward).parameters.values()
    return [[p.name, p.kind.name, p.default is not p.empty, _default_to_json(p.default)] for p in parameters]


def _default_to_json(default: Any) -> Any:
    try:
        return None if default is inspect.Parameter.empty else _static_to_json(default)
    except PrepareError:
        return None


def _parameters_from_json(data: list[Any]) -> inspect.Signature:
    empty = inspect.Parameter.empty
    return inspect.Signature(
        [
            inspect.Parameter(name, getattr(inspect.Parameter, kind), default=_static_from_json(default) if has_default else empty)
            for name, kind, has_default, default in data
        ]
    )


