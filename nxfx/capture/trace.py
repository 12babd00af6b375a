"""Looking at the trace while it is being made: which values are constants, which bounds are equal, who writes what.

Private torch API used here: ``get_proxy_mode`` and ``get_proxy_slot`` (``torch.fx.experimental.proxy_tensor``),
``FakeTensor.constant``; tested on torch 2.9 and 2.13.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch._guards import detect_fake_mode
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from nxfx.graph.meta import FakeTensor

# Bounds are short integer arithmetic; longer expressions are compared by identity only.
_EXPRESSION_LIMIT = 64

Affine = tuple[int, int]


def _slot(tensor: torch.Tensor) -> Any:
    mode = get_proxy_mode()
    return None if mode is None else get_proxy_slot(tensor, mode.tracer, None)


def fake_mode() -> Any:
    """The fake mode of the trace, None when nothing is traced."""
    mode = get_proxy_mode()
    return getattr(mode.tracer, "fake_tensor_mode", None) or detect_fake_mode() if mode is not None else None


def node_of(tensor: torch.Tensor) -> fx.Node | None:
    """The node that stands for ``tensor`` in the graph being traced, None when nothing is traced."""
    slot = _slot(tensor)
    return None if slot is None else slot.proxy.node


def module_path() -> str:
    """Path of the module that is running, ``""`` for the root."""
    mode = get_proxy_mode()
    stack = getattr(mode.tracer, "module_stack", None) if mode is not None else None
    path = str(next(reversed(stack.values()))[0]) if stack else ""
    return path.removeprefix("_export_root").removeprefix(".")


def is_tracing(tensor: torch.Tensor) -> bool:
    """Whether operations on ``tensor`` are recorded, not computed."""
    if isinstance(tensor, FakeTensor):
        return True
    return get_proxy_mode() is not None and not is_wrapped(tensor)


def is_wrapped(tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` belongs to a ``torch.func`` transform: it has no memory of its own."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))


def literal(tensor: torch.Tensor) -> Any:
    """The Python number in ``tensor`` when the trace knows it for good, else ``tensor``."""
    if not isinstance(tensor, FakeTensor) or is_unknown(tensor):
        return tensor
    number = tensor.item()
    return number if type(number) in (int, bool) else tensor


def is_unknown(value: Any) -> bool:
    """Whether ``value`` is a tensor that is traced and whose numbers the trace does not know.

    False for real tensors, for literals such as ``torch.tensor(True)``, whose constant the tracer keeps, and inside
    ``torch.func`` transforms, which have their own rules.
    """
    if not isinstance(value, FakeTensor) or value.constant is not None:
        return False
    slot = _slot(value)
    return slot is None or slot.constant is None


def is_unbacked(value: Any) -> bool:
    """Whether ``value`` is a symbolic number that came out of a tensor (``.item()``), not out of a shape."""
    return isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)) and bool(free_unbacked_symbols(value))


class Aliases:
    """Who shares memory with whom, and who is written where, in a graph that is being traced and not functional yet."""

    def __init__(self, graph: fx.Graph) -> None:
        self._roots: dict[fx.Node, fx.Node] = {}
        self._last = graph._root
        self._end = graph._root
        self._position: dict[fx.Node, int] = {}
        self._writes: list[tuple[int, fx.Node]] = []
        self.written: set[fx.Node] = set()

    def update(self) -> Aliases:
        """Look at the nodes that are new. A trace only grows, so each is looked at once."""
        while self._last.next is not self._end:
            node = self._last = self._last.next
            self._position[node] = len(self._position)
            if node.op != "call_function":
                continue
            if isinstance(node.target, torch._ops.OpOverload):
                self._record(node, node.target)
            elif getattr(node.target, "__name__", "") == "getitem" and isinstance(node.args[0], fx.Node):
                self._roots[node] = self.root(node.args[0])
        return self

    def _record(self, node: fx.Node, op: torch._ops.OpOverload) -> None:
        shared: dict[str, fx.Node] = {}
        for argument, value in _arguments(node, op):
            if argument.alias_info is None or not isinstance(value, fx.Node):
                continue
            root = self.root(value)
            if argument.alias_info.is_write:
                self._writes.append((self._position[node], root))
                self.written.add(root)
            for name in argument.alias_info.before_set:
                shared[name] = root
        for returned in op._schema.returns:
            for name in returned.alias_info.before_set if returned.alias_info else ():
                if name in shared:
                    self._roots[node] = shared[name]

    def root(self, node: fx.Node) -> fx.Node:
        """The node whose memory ``node`` is a view of; itself when it has its own."""
        return self._roots.get(node, node)

    def first_write(self, root: fx.Node, after: fx.Node) -> int | None:
        """Position of the first write to ``root``'s memory after the node ``after``."""
        return next((p for p, r in self._writes if r is root and p > self._position[after]), None)

    def is_used_after(self, root: fx.Node, position: int) -> bool:
        """Whether ``root`` or a view of it is an operand after ``position``."""
        family = [n for n in self._position if self.root(n) is root]
        return any(self._position.get(user, 0) > position for n in family for user in n.users)


def _arguments(node: fx.Node, op: torch._ops.OpOverload) -> Iterator[tuple[Any, Any]]:
    for i, argument in enumerate(op._schema.arguments):
        value = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
        yield from ((argument, v) for v in (value if isinstance(value, (list, tuple)) else (value,)))


class Trace:
    """What is known of the graphs of one trace (a higher-order op's body is a graph of its own)."""

    def __init__(self) -> None:
        self._aliases: dict[fx.Graph, Aliases] = {}
        self._numbers: dict[Any, int] = {}

    def aliases(self, graph: fx.Graph) -> Aliases:
        return self._aliases.setdefault(graph, Aliases(graph)).update()

    def affine(self, tensor: torch.Tensor) -> Affine | None:
        """``tensor`` as (key, constant): equal keys mean that the values differ by the constants' difference.

        None when that cannot be told: nothing is traced, or something the value is made of is written in place.
        """
        node = node_of(tensor)
        made_of = None if node is None else _made_of(node)
        if node is None or made_of is None:
            return None
        aliases = self.aliases(node.graph)
        if any(aliases.root(n) in aliases.written for n in made_of):
            return None
        constant = 0
        while node.target in (torch.ops.aten.add.Tensor, torch.ops.aten.sub.Tensor) and not node.kwargs:
            left, right = node.args
            if not isinstance(left, fx.Node) or type(right) is not int:
                break
            constant += right if node.target is torch.ops.aten.add.Tensor else -right
            node = left
        return self._number(node), constant

    def version(self, tensor: torch.Tensor) -> object:
        """Equal as long as ``tensor`` was not written in place in between."""
        if not tensor.is_inference():
            return tensor._version
        node = node_of(tensor)  # tensors made in inference mode do not count their writes
        if node is None:
            return object()
        aliases = self.aliases(node.graph)
        return object() if aliases.root(node) in aliases.written else 0

    def _number(self, value: Any) -> int:
        """The same number for everything that computes the same thing from the same nodes."""
        if isinstance(value, (list, tuple)):
            key: Any = tuple(self._number(v) for v in value)
        elif not isinstance(value, fx.Node):
            key = (type(value).__name__, str(value))
        elif value in self._numbers:
            return self._numbers[value]
        elif _is_pure(value):
            key = (value.target, self._number(value.args), self._number(list(value.kwargs.items())))
            self._numbers[value] = self._numbers.setdefault(key, len(self._numbers))
        else:
            key = value
        return self._numbers.setdefault(key, len(self._numbers))


def _made_of(node: fx.Node) -> set[fx.Node] | None:
    """``node`` and everything pure below it, down to what is not; None when that is much."""
    found, pending = {node}, [node]
    while pending and len(found) <= _EXPRESSION_LIMIT:
        current = pending.pop()
        for operand in current.all_input_nodes if _is_pure(current) else ():
            if operand not in found:
                found.add(operand)
                pending.append(operand)
    return None if pending else found


def _is_pure(node: fx.Node) -> bool:
    op = node.target
    return (
        isinstance(op, torch._ops.OpOverload)
        and not op._schema.is_mutable
        and torch.Tag.nondeterministic_seeded not in op.tags
    )
