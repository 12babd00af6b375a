"""torch-mlir at work: a decomposed graph imported, lowered to StableHLO and folded; what it refuses is found and named.

torch-mlir API used here and nowhere else: ``extras.fx_importer`` (``FxImporter``, ``FxImporterHooks``, ``GraphNodeImporter``),
``extras.fx_decomp_util.get_decomposition_table``, ``ir``, ``passmanager`` and the names of its pipelines; run with 20261001.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import fx

from nxfx.analysis.dtype_rules import is_wide
from nxfx.analysis.intervals import INT32, arg
from nxfx.errors import LoweringError, MissingDependencyError
from nxfx.graph import meta
from nxfx.report.locations import Location, locate

INSTALL = "pip install 'nxfx[stablehlo]'"

_PIPELINES = (
    "builtin.module(func.func(torch-match-quantized-custom-ops),torchdynamo-export-to-torch-backend-pipeline{extra-library=})",
    "builtin.module(torch-backend-to-stablehlo-backend-pipeline)",
)
_FOLD = "builtin.module(func.func(stablehlo-aggressive-simplification),canonicalize,cse)"
_INLINE_LIMIT = 1024  # elements: larger literals become one blob behind the text
_DTYPES = {
    "f64": torch.float64, "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16,
    "i64": torch.int64, "i32": torch.int32, "i16": torch.int16, "i8": torch.int8,
}  # fmt: skip
_KEEP_VALUE = ("stablehlo.convert", "stablehlo.reshape", "stablehlo.broadcast_in_dim")
_NAMES = re.compile(r'"((?:[^"\\]|\\.)*)"\(')


@functools.cache
def torch_mlir() -> SimpleNamespace:
    """The parts of torch-mlir that are used.

    Raises:
        MissingDependencyError: it or ml_dtypes (for bf16 constants) is not installed, or has other parts.
    """
    wanted = {
        "ir": "torch_mlir.ir",
        "passmanager": "torch_mlir.passmanager",
        "torch": "torch_mlir.dialects.torch",
        "importer": "torch_mlir.extras.fx_importer",
        "decompositions": "torch_mlir.extras.fx_decomp_util",
        "ml_dtypes": "ml_dtypes",
    }
    try:
        return SimpleNamespace(**{name: importlib.import_module(module) for name, module in wanted.items()})
    except ImportError as error:
        raise MissingDependencyError(f"lowering to StableHLO needs torch-mlir and ml_dtypes: {INSTALL} ({error})") from error


def decompositions() -> Mapping[Any, Callable[..., Any]]:
    """What torch-mlir wants decomposed."""
    table: Mapping[Any, Callable[..., Any]] = torch_mlir().decompositions.get_decomposition_table()
    return table


def lower(graph_module: fx.GraphModule, origins: Mapping[str, fx.Node], arguments: Sequence[str], *, fold_casts: bool = True) -> Any:
    """The folded StableHLO module (``torch_mlir.ir.Module``) of a decomposed, legalised graph.

    Each operation's location is the name of its node at the user's line; each argument's is its name.

    Args:
        origins: node name → node of the cleaned graph, for messages.
        arguments: names of the placeholders.
        fold_casts: also fold what torch-mlir's own simplifications leave: scalars that pass through 64 bits.

    Raises:
        LoweringError: torch-mlir refuses; names the op and the user's line.
    """
    _refuse_endless(graph_module, origins)
    try:
        module = _import_and_lower(graph_module)
    except LoweringError:
        raise
    except Exception as error:  # a pipeline's failure is an MLIRError, the importer's anything
        raise _refusal(graph_module, origins, error) from error
    _run(module, _FOLD)
    if fold_casts:
        _fold(module)
    _name_arguments(module, arguments)
    return module


def _import_and_lower(graph_module: fx.GraphModule) -> Any:
    mlir = torch_mlir()
    context = mlir.ir.Context()
    context.enable_multithreading(False)  # an exception in a thread of the pass manager ends the process
    mlir.torch.register_dialect(context)
    importer = mlir.importer.FxImporter(context=context, hooks=_hooks(), graph_node_importer_cls=_node_importer())
    importer.import_graph_module(graph_module)
    for pipeline in _PIPELINES:
        _run(importer.module, pipeline)
    return importer.module


def _run(module: Any, pipeline: str) -> None:
    with module.context:
        torch_mlir().passmanager.PassManager.parse(pipeline).run(module.operation)


# -- importing ------------------------------------------------------------------------------------------------------------------


@functools.cache
def _node_importer() -> Any:
    mlir = torch_mlir()
    base: Any = mlir.importer.GraphNodeImporter

    class NodeImporter(base):  # type: ignore[misc]  # known at run time only
        """Gives each operation its node's name and the user's own line; names the node when it cannot be imported."""

        def _import_torch_op_overload(self, loc: Any, node: fx.Node, concrete_target: Any = None) -> None:
            where = locate(node)
            place = mlir.ir.Location.file(where.file, where.line, 0, context=self._c) if where.file else None
            loc = mlir.ir.Location.name(node.name, childLoc=place, context=self._c)
            super()._import_torch_op_overload(loc, node, concrete_target)

    return NodeImporter


@functools.cache
def _hooks() -> Any:
    mlir = torch_mlir()
    base: Any = mlir.importer.FxImporterHooks

    class Hooks(base):  # type: ignore[misc]  # known at run time only
        """Large literals by their bytes: torch-mlir's own way makes a Python list of them first."""

        def resolve_literal(self, gni: Any, literal: Any, info: Any = None) -> Any:
            if not isinstance(literal, torch.Tensor) or literal.numel() < _INLINE_LIMIT or literal.is_complex():
                return None
            ir, tensor_type = mlir.ir, mlir.importer.create_mlir_tensor_type(literal)
            data = literal.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
            attribute = ir.DenseResourceElementsAttr.get_from_buffer(data, "weight", tensor_type)
            shape = ",".join(map(str, literal.shape))
            result = ir.Type.parse(f"!torch.vtensor<[{shape}],{_element(literal)}>", context=gni._c)
            return ir.Operation.create("torch.vtensor.literal", results=[result], attributes={"value": attribute}).result

    return Hooks()


def _element(tensor: torch.Tensor) -> str:
    return str(torch_mlir().importer.TORCH_DTYPE_TO_MLIR_TYPE_ASM[tensor.dtype])


# -- folding --------------------------------------------------------------------------------------------------------------------


def _fold(module: Any) -> None:
    """Fold what torch-mlir leaves of Python scalars: f64 and i64 constants that are cast at once."""
    for _ in range(2):  # what the one uncovers the other folds
        _fold_casts(module)
        _run(module, _FOLD)
    _fold_casts(module)


def _fold_casts(module: Any) -> None:
    """Constants of the ``arith`` dialect in StableHLO's own words, one-valued ones cast and shaped; casts that pass through 64 bits."""
    for operation in operations(module):
        if not operation.results or not str(operation.results[0].type).startswith("tensor<"):
            continue
        if operation.name == "arith.constant":
            _replace(operation, operation.attributes["value"])
        elif operation.name in _KEEP_VALUE and (value := _one_value(operation.operands[0])) is not None:
            _replace(operation, _splat(value, operation.results[0].type))
        elif operation.name == "stablehlo.convert" and (source := _before_widening(operation.operands[0])) is not None:
            operation.operands[0] = source  # to 64 bits and on: the simplifier drops what has become an identity


def _before_widening(operand: Any) -> Any:
    """What ``operand`` holds in fewer bits, where it is that and nothing else, cast to 64."""
    owner = operand.owner
    if isinstance(owner, torch_mlir().ir.Block) or owner.name != "stablehlo.convert":
        return None
    wide, narrow = (_DTYPES.get(str(v.type.element_type)) for v in (operand, owner.operands[0]))
    if wide is None or narrow is None or not is_wide(wide) or is_wide(narrow):
        return None
    return owner.operands[0] if wide.is_floating_point == narrow.is_floating_point else None


def _one_value(operand: Any) -> torch.Tensor | None:
    """The value of a constant all of whose elements are equal, as a 0-d tensor of its dtype."""
    ir, owner = torch_mlir().ir, operand.owner
    if isinstance(owner, ir.Block) or owner.name not in ("stablehlo.constant", "arith.constant"):
        return None
    attribute = owner.attributes["value"]
    dtype = _DTYPES.get(str(attribute.type.element_type))
    if dtype is None or not getattr(attribute, "is_splat", False):
        return None
    return torch.tensor(attribute.get_splat_value().value, dtype=dtype)


def _splat(value: torch.Tensor, tensor_type: Any) -> Any:
    """``value`` as a constant of ``tensor_type``, converted as ``stablehlo.convert`` does."""
    ir = torch_mlir().ir
    element = tensor_type.element_type
    dtype = _DTYPES.get(str(element))
    if dtype is None or (value.is_floating_point() and not dtype.is_floating_point):
        return None
    number = value.to(dtype).item()
    if not dtype.is_floating_point and number != value.item():
        return None
    with tensor_type.context, ir.Location.unknown():
        scalar = ir.FloatAttr.get(element, number) if dtype.is_floating_point else ir.IntegerAttr.get(element, int(number))
    return ir.DenseElementsAttr.get_splat(tensor_type, scalar)


def _replace(operation: Any, value: Any) -> None:
    """Put a StableHLO constant in the place of ``operation``."""
    if value is None:
        return
    ir = torch_mlir().ir
    constant = ir.Operation.create(
        "stablehlo.constant",
        results=[operation.results[0].type],
        attributes={"value": value},
        loc=operation.location,
        ip=ir.InsertionPoint(operation),
    )
    operation.results[0].replace_all_uses_with(constant.result)
    operation.erase()


def operations(module: Any) -> list[Any]:
    """Every operation inside the functions of ``module``, bodies of regions included."""
    found: list[Any] = []

    def enter(block_owner: Any) -> None:
        for region in block_owner.regions:
            for block in region:
                for operation in block.operations:
                    found.append(operation.operation)
                    enter(operation.operation)

    for function in module.body.operations:
        enter(function.operation)
    return found


def node_names(operation: Any) -> list[str]:
    """Names of the nodes that an operation comes from."""
    return _NAMES.findall(str(operation.location))


def _name_arguments(module: Any, names: Sequence[str]) -> None:
    ir = torch_mlir().ir
    main = next(f for f in module.body.operations if ir.StringAttr(f.attributes["sym_name"]).value == "main")
    for argument, name in zip(main.regions[0].blocks[0].arguments, names, strict=True):
        argument.set_location(ir.Location.name(name, context=module.context))


# -- refusals -------------------------------------------------------------------------------------------------------------------


def _refusal(graph_module: fx.GraphModule, origins: Mapping[str, fx.Node], error: Exception) -> LoweringError:
    """Which op it was: said by the diagnostics, else found by lowering ever smaller beginnings of the graph."""
    graph = graph_module.graph
    by_name = {n.name: n for n in graph.nodes}
    told = [n for d in getattr(error, "error_diagnostics", ()) for n in _NAMES.findall(str(d.location)) if n in by_name]
    node = by_name[told[0]] if told else _first_refused(graph_module)
    said = " ".join(str(getattr(error, "message", error)).split())[:300]
    if node is None:
        return LoweringError(f"torch-mlir cannot lower the graph: {said}")
    return _refused(node, origins, f"it says: {said}")


def _refused(node: fx.Node, origins: Mapping[str, fx.Node], why: str) -> LoweringError:
    origin = origins.get(node.name, node)
    location: Location = locate(origin)
    source = f": {location.source}" if location.source else ""
    inside = f" (inside {origin.target})" if origin.target != node.target else ""
    told = f"torch-mlir cannot lower {node.target}{inside} at {location}{source}; {why}"
    return LoweringError(told, op=str(origin.target), location=location)


def _refuse_endless(graph_module: fx.GraphModule, origins: Mapping[str, fx.Node]) -> None:
    """A slice write to the end, spelled 2**63 - 1: torch-mlir counts up to there, until the machine has no memory left.

    Raises:
        LoweringError: there is one.
    """
    for node in graph_module.graph.find_nodes(op="call_function", target=torch.ops.aten.slice_scatter.default):
        end = arg(node, 4, "end")
        if isinstance(end, int) and end > INT32[1]:
            raise _refused(node, origins, f"it would count up to the end of the slice, {end}")


def _first_refused(graph_module: fx.GraphModule) -> fx.Node | None:
    """The first node whose beginning of the graph cannot be lowered; the beginnings before it can."""
    nodes = [n for n in graph_module.graph.nodes if n.op == "call_function"]

    def fails(count: int) -> bool:
        try:
            _import_and_lower(_beginning(graph_module, nodes[:count]))
        except Exception:
            return True
        return False

    if not nodes or not fails(len(nodes)):
        return None
    good, bad = 0, len(nodes)
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (good, middle) if fails(middle) else (middle, bad)
    refused: fx.Node = nodes[bad - 1]
    return refused


def _beginning(graph_module: fx.GraphModule, nodes: Sequence[fx.Node]) -> fx.GraphModule:
    """A graph of ``nodes`` and what they take; it returns every tensor that is used later or not at all."""
    kept, copies, graph = set(nodes), dict[fx.Node, fx.Node](), fx.Graph()
    for node in graph_module.graph.nodes:
        if node in kept or node.op in ("placeholder", "get_attr"):
            copies[node] = graph.node_copy(node, copies.__getitem__)
    ends = [copies[n] for n in nodes if meta.is_tensor(n) and (not n.users or not kept.issuperset(n.users))]
    graph.output(tuple(ends))
    return fx.GraphModule(graph_module, graph)
