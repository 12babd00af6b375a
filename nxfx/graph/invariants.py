"""What must hold of a graph after every pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from nxfx.graph import meta, walk
from nxfx.graph.higher_order import take_apart

# Nodes that legitimately have no value: assertions and constraint hints.
_VALUELESS = ("_assert", "sym_constrain_range", "_assert_async", "_assert_scalar", "_assert_tensor_metadata")


@dataclass(frozen=True)
class Broken:
    """One broken invariant."""

    rule: str
    node: str
    message: str

    def __str__(self) -> str:
        return f"{self.rule}: {self.node}: {self.message}"


@dataclass(frozen=True)
class Contract:
    """What callers rely on: placeholder names with dtype and shape, and the outputs' dtypes and shapes in order."""

    inputs: tuple[tuple[str, str], ...]
    outputs: tuple[str, ...]


def contract_of(gm: fx.GraphModule) -> Contract:
    """The contract of ``gm`` as it stands."""
    inputs = tuple((n.name, _describe(meta.val(n))) for n in gm.graph.find_nodes(op="placeholder"))
    return Contract(inputs, tuple(_describe(_output_value(o)) for o in _outputs(gm.graph)))


def drawing(gm: fx.GraphModule) -> tuple[str, ...]:
    """The graph as text: two drawings differ when a node, its place, its op or its arguments do."""
    return tuple(f"{n.op} {n.name} {n.target} {n.args} {n.kwargs}" for n in gm.graph.nodes)


def check(gm: fx.GraphModule, contract: Contract | None = None, *, may_narrow: bool = False) -> list[Broken]:
    """Every broken invariant of ``gm``: order, metadata, values that re-evaluation does not confirm, mutation, contract.

    Args:
        may_narrow: ``gm`` is a body, whose edge may have become narrow together with the op that runs it (that they agree is an
            invariant of the graph around it).
    """
    broken = list(_structure(gm))
    if broken:
        return broken
    broken += _values(gm.graph)
    broken += _bodies(gm.graph)
    if contract is not None:
        broken += _contract(gm, contract, _narrowed if may_narrow else str)
    return broken


def _structure(gm: fx.GraphModule) -> Iterator[Broken]:
    try:
        gm.graph.lint()
    except Exception as error:
        yield Broken("well-formed", "", str(error))


def _is_valueless(node: fx.Node) -> bool:
    name = getattr(node.target, "__name__", str(node.target))
    return name.startswith(_VALUELESS)


def _values(graph: fx.Graph) -> Iterator[Broken]:
    mode = meta.fake_mode_of(graph)
    for node in graph.nodes:
        if node.op in ("output", "placeholder"):
            continue
        if node.op == "get_attr":
            if meta.val(node) is None and not all(walk.is_higher_order(user) for user in node.users):
                yield Broken("has-val", node.name, f"the attribute {node.target} has no `val`")
            continue
        if meta.val(node) is None and not _is_valueless(node):
            yield Broken("has-val", node.name, f"{node.target} has no `val`")
            continue
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable and not _is_valueless(node):
            yield Broken("functional", node.name, f"{node.target} mutates its argument")
        if "nxfx" in node.meta and node.op == "call_function" and "stack_trace" not in node.meta:
            origin = node.meta["nxfx"].get("origin", "")
            if origin not in {n.name for n in graph.find_nodes(op="placeholder")} and not _untraced(node):
                yield Broken("has-trace", node.name, "made by a pass without the user's stack trace")
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            yield from _re_evaluate(node, mode)


def _bodies(graph: fx.Graph) -> Iterator[Broken]:
    """What a higher-order op passes, its bodies take and return, and its results are of one dtype."""
    for node in graph.nodes:
        call = take_apart(node) if walk.is_higher_order(node) else None
        for slot in call.slots if call is not None else ():
            values = [meta.val(v) for v in (*slot.operands, *slot.placeholders, *slot.returned()) if isinstance(v, fx.Node)]
            if slot.result is not None:
                values.append(meta.val(node)[slot.result])
            dtypes = {v.dtype for v in values if isinstance(v, torch.Tensor)}
            if len(dtypes) > 1:
                yield Broken("bodies-agree", node.name, f"one variable of it is {' and '.join(sorted(map(str, dtypes)))}")


def _untraced(node: fx.Node) -> bool:
    return all("stack_trace" not in n.meta for n in (*node.all_input_nodes, *node.users))


def _re_evaluate(node: fx.Node, mode: meta.FakeTensorMode | None) -> Iterator[Broken]:
    if node.meta.get("unbacked_bindings"):
        return  # evaluating again would invent new symbols; shapes are equal up to renaming
    try:
        again = meta.evaluate(mode, node.target, node.args, dict(node.kwargs))
    except Exception as error:
        yield Broken("evaluates", node.name, f"{node.target} refuses its inputs: {type(error).__name__}: {str(error).splitlines()[0]}")
        return
    if not _confirms(again, meta.val(node), {symbol for operand in node.all_input_nodes for symbol in _symbols(meta.val(operand))}):
        yield Broken("val-is-true", node.name, f"`val` says {_describe(meta.val(node))}, {node.target} gives {_describe(again)}")


def _confirms(again: Any, said: Any, known: set[Any]) -> bool:
    """Whether a value that is evaluated ``again`` is what ``val`` ``said``.

    A size that the data decide is a new symbol each time, none of those ``known`` of the operands: the model may have settled it since.
    """
    if isinstance(again, (list, tuple)) and isinstance(said, (list, tuple)):
        return len(again) == len(said) and all(_confirms(a, b, known) for a, b in zip(again, said, strict=True))
    if isinstance(again, torch.Tensor) and isinstance(said, torch.Tensor) and again.dim() == said.dim():
        return again.dtype == said.dtype and all(_settles(b, a, known) for a, b in zip(again.shape, said.shape, strict=True))
    return _describe(again) == _describe(said) or _settles(said, again, known)


def _settles(size: Any, again: Any, known: set[Any]) -> bool:
    if str(size) == str(again):
        return True
    if not meta.is_symbol(again) or meta.symbol_of(again) in known or not isinstance(size, (int, torch.SymInt)):
        return False
    low, high = meta.size_range(again)
    return not isinstance(size, int) or low <= size <= high


def _symbols(value: Any) -> set[Any]:
    if isinstance(value, (list, tuple, torch.Tensor)):
        return {symbol for part in (value.shape if isinstance(value, torch.Tensor) else value) for symbol in _symbols(part)}
    return meta.symbol_of(value).free_symbols if isinstance(value, torch.SymInt) else set()


def _outputs(graph: fx.Graph) -> tuple[Any, ...]:
    (output,) = graph.find_nodes(op="output")
    results = output.args[0]
    return tuple(results) if isinstance(results, (list, tuple)) else (results,)


def _output_value(value: Any) -> Any:
    return meta.val(value) if isinstance(value, fx.Node) else value


def _narrowed(described: object) -> str:
    """A description in which 64-bit dtypes and the 32-bit ones that stand for them are one."""
    text = str(described)
    for wide, narrow in (("int64[", "int32["), ("float64[", "float32["), ("complex128[", "complex64[")):
        text = text.replace(wide, narrow)
    return text


def _contract(gm: fx.GraphModule, contract: Contract, told_apart: Callable[[object], str]) -> Iterator[Broken]:
    now = contract_of(gm)
    if told_apart(now.inputs) != told_apart(contract.inputs):
        changed = sorted(set(now.inputs) ^ set(contract.inputs))
        yield Broken("inputs-kept", changed[0][0] if changed else "", f"inputs are {now.inputs}, were {contract.inputs}")
    if len(now.outputs) != len(contract.outputs):
        yield Broken("outputs-kept", "output", f"{len(now.outputs)} outputs, were {len(contract.outputs)}")
    for position, (is_, was) in enumerate(zip(now.outputs, contract.outputs, strict=False)):
        if told_apart(is_) != told_apart(was):
            yield Broken("outputs-kept", "output", f"output {position} is {is_}, was {was}")


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}[{', '.join(map(str, value.shape))}]"
    if isinstance(value, (list, tuple)):
        return "(" + ", ".join(_describe(v) for v in value) + ")"
    return type(value).__name__


def unknown_higher_order(gm: fx.GraphModule) -> list[fx.Node]:
    """Higher-order nodes whose bodies are not rewritten: each must be reported."""
    return list(walk.unknown_bodies(gm))
