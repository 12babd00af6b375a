"""From an ExportedProgram with lifted weights to a flat graph whose ``get_attr`` nodes are the model's own tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from nxfx.analysis.provenance import Role, Source
from nxfx.capture.shell import Convention, Shell
from nxfx.capture.strict import PREFIX, StrictShell
from nxfx.graph import meta
from nxfx.graph.attributes import CONSTANTS, own_buffer
from nxfx.graph.builder import NodeBuilder


def mirror(model: torch.nn.Module) -> torch.nn.Module:
    """Bare modules with the model's own registries: the same names, the same tensor objects, no code."""
    twins: dict[int, torch.nn.Module] = {}

    def twin(module: torch.nn.Module) -> torch.nn.Module:
        if id(module) not in twins:
            bare = twins[id(module)] = torch.nn.Module()
            bare.__dict__["_parameters"] = module._parameters
            bare.__dict__["_buffers"] = module._buffers
            bare.__dict__["_non_persistent_buffers_set"] = module._non_persistent_buffers_set
            bare.__dict__["training"] = module.training
            bare.__dict__["_modules"] = {k: None if m is None else twin(m) for k, m in module._modules.items()}
        return twins[id(module)]

    return twin(model)


def unlift(
    program: torch.export.ExportedProgram,
    shell: Shell | StrictShell,
    model: torch.nn.Module,
    convention: Convention,
    ranges: dict[str, tuple[int, int]],
) -> tuple[fx.GraphModule, dict[str, Source], dict[str, int], dict[str, int]]:
    signature, graph = program.graph_signature, program.graph_module.graph
    root = mirror(model)
    build = NodeBuilder(graph, "capture")
    written = _written(signature)
    sources: dict[str, Source] = {}
    placeholders = {n.name: n for n in graph.find_nodes(op="placeholder")}
    user_names = iter(convention.input_names)
    first = next(n for n in graph.nodes if n.op != "placeholder")
    roles = {"PARAMETER": Role.PARAMETER, "BUFFER": Role.BUFFER}
    for spec in signature.input_specs:
        node = placeholders[spec.arg.name]
        kind = spec.kind.name
        if kind == "USER_INPUT":
            name = next(user_names)
            sources[node.name] = Source(name, Role.INPUT, mutated=node.name in written, range=ranges.get(name))
            continue
        target = str(spec.target)
        value = _value_of(program, shell, target)
        if target in shell.slots:
            own_buffer(root, name := shell.slots[target].name, value)
        elif kind in roles:
            name = _own_name(shell, target)
        else:
            own_buffer(root, name := f"{CONSTANTS}.{target.replace('.', '_')}", value)
        with build.before(first, node):
            attribute = build.get_attr(name, meta.val(node))
        role = roles.get(kind, Role.CONSTANT)
        known = None if isinstance(value, meta.FakeTensor) or value.is_meta else value
        sources[attribute.name] = Source(name, role, known, mutated=target in written)
        node.replace_all_uses_with(attribute)
        graph.erase_node(node)
    buffers, inputs = _order_outputs(graph, signature, shell, convention, sources)
    return _assemble(root, program.graph_module), sources, buffers, inputs


def _name_of(target: str, shell: Shell | StrictShell, sources: dict[str, Source]) -> str:
    """The user's name for what a mutation writes: an input, a plain tensor, a buffer."""
    if target in sources:
        return sources[target].name
    return shell.slots[target].name if target in shell.slots else _own_name(shell, target)


def _own_name(shell: Shell | StrictShell, target: str) -> str:
    """The model's own name for a parameter or buffer of the shell."""
    return target.removeprefix(PREFIX) if isinstance(shell, StrictShell) else target


def _written(signature: Any) -> set[str]:
    return {str(s.target) for s in signature.output_specs if s.kind.name.endswith("MUTATION")}


def _value_of(program: torch.export.ExportedProgram, shell: Shell | StrictShell, target: str) -> torch.Tensor:
    module_path, _, leaf = target.rpartition(".")
    try:
        module = shell.get_submodule(module_path)
    except AttributeError:
        module = None
    for registry in (module._parameters, module._buffers) if module is not None else ():
        registered = registry.get(leaf)
        if registered is not None:
            return registered
    value = program.constants.get(target)
    assert isinstance(value, torch.Tensor), f"no value for {target}"
    return value


def _order_outputs(
    graph: fx.Graph, signature: Any, shell: Shell | StrictShell, convention: Convention, sources: dict[str, Source]
) -> tuple[dict[str, int], dict[str, int]]:
    (output,) = graph.find_nodes(op="output")
    values = list(zip(signature.output_specs, output.args[0], strict=True))
    ordered = [value for spec, value in values if spec.kind.name == "USER_OUTPUT"]
    buffers: dict[str, int] = {}
    inputs: dict[str, int] = {}
    for kinds, into in ((("BUFFER_MUTATION", "PARAMETER_MUTATION"), buffers), (("USER_INPUT_MUTATION",), inputs)):
        for spec, value in values:
            if spec.kind.name not in kinds:
                continue
            target = str(spec.target)
            into[_name_of(target, shell, sources)] = len(ordered)
            ordered.append(value)
    output.args = (tuple(ordered),)
    return buffers, inputs


def _assemble(root: torch.nn.Module, traced: fx.GraphModule) -> fx.GraphModule:
    """A GraphModule over ``traced``'s graph whose attributes are ``root``'s registries and the higher-order ops' bodies."""
    bodies = {name: child for name, child in traced.named_children() if isinstance(child, fx.GraphModule)}
    root.__dict__["_modules"] = {**root._modules, **bodies}
    traced.graph.set_codegen(fx.graph.CodeGen())
    result = fx.GraphModule(torch.nn.Module(), fx.Graph())
    for registry in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
        result.__dict__[registry] = root.__dict__[registry]
    result.__dict__["training"] = root.training
    result.graph = traced.graph
    result.meta.clear()
    return result


STATE = "_state"


def inputs_to_buffers(
    graph_module: fx.GraphModule,
    sources: dict[str, Source],
    example: dict[str, torch.Tensor],
    mutated_buffers: dict[str, int],
    mutated_inputs: dict[str, int],
) -> dict[str, str]:
    """Turn the inputs named in ``example`` (KV caches) into buffers of the graph, so that a compiler can alias them.

    Outputs are put in order again: the user's, mutated buffers, mutated inputs. Gives input name → buffer name.
    """
    graph = graph_module.graph
    build = NodeBuilder(graph, "capture")
    renamed: dict[str, str] = {}
    for node in graph.find_nodes(op="placeholder"):
        source = sources[node.name]
        if source.name not in example:
            continue
        buffer = renamed[source.name] = f"{STATE}.{source.name}"
        own_buffer(graph_module, buffer, example[source.name].detach().clone())
        with build.after(node):
            attribute = build.get_attr(buffer, meta.val(node))
        sources[attribute.name] = Source(buffer, Role.BUFFER, None, mutated=source.name in mutated_inputs)
        node.replace_all_uses_with(attribute)
        graph.erase_node(node)
    (output,) = graph.find_nodes(op="output")
    values = list(output.args[0])
    written = [(mutated_buffers, n, values[i]) for n, i in mutated_buffers.items()]
    written += [(mutated_buffers, renamed[n], values[i]) for n, i in mutated_inputs.items() if n in renamed]
    written += [(mutated_inputs, n, values[i]) for n, i in mutated_inputs.items() if n not in renamed]
    ordered = values[: len(values) - len(written)]
    mutated_buffers.clear()
    mutated_inputs.clear()
    for into, name, value in written:
        into[name] = len(ordered)
        ordered.append(value)
    output.args = (tuple(ordered),)
    return renamed


def constants_to_attributes(
    program: torch.export.ExportedProgram,
) -> tuple[fx.GraphModule, dict[str, tuple[torch.Tensor, Role]]]:
    """The graph of a loaded program with its lifted tensors as ``get_attr`` nodes, and those tensors by name."""
    signature, graph = program.graph_signature, program.graph_module.graph
    build = NodeBuilder(graph, "load")
    placeholders = {n.name: n for n in graph.find_nodes(op="placeholder")}
    first = next(n for n in graph.nodes if n.op != "placeholder")
    found: dict[str, tuple[torch.Tensor, Role]] = {}
    for spec in signature.input_specs:
        if spec.kind.name == "USER_INPUT":
            continue
        name = str(spec.target)
        value = program.state_dict[name] if name in program.state_dict else program.constants[name]
        found[name] = (value, Role.PARAMETER if spec.kind.name == "PARAMETER" else Role.BUFFER)
        node = placeholders[spec.arg.name]
        with build.before(first, node):
            attribute = build.get_attr(name, meta.val(node))
        node.replace_all_uses_with(attribute)
        graph.erase_node(node)
    return _assemble(torch.nn.Module(), program.graph_module), found
