"""Writes that eager refuses although a trace on tensors without data takes them: refused at the user's line.

The kernels that capture runs on have shapes and no memory, and leave out checks: ``x[[0, 1]] = three_rows``, an
``index_copy_`` of another dtype, a mask of another shape, an index out of range, a copy between parts of one tensor that
overlap. Each such write of the captured graph runs here once, for real, on memory of the same layout: eager itself says
whether it refuses, in its own words.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx

from nxfx.capture import errors, trace
from nxfx.graph import meta, walk
from nxfx.graph.masks import is_row_major

aten = torch.ops.aten

# What the fake kernels do not check, or not all of it.
_WRITERS = (
    "index_put", "index_copy", "index_add", "index_fill", "index_reduce", "scatter", "scatter_add", "scatter_reduce",
    "masked_scatter", "masked_fill", "put", "slice_scatter", "select_scatter", "diagonal_scatter", "as_strided_scatter",
)  # fmt: skip


def _overloads(name: str) -> Iterator[Any]:
    """The functional and the in-place forms of an op."""
    packets = (getattr(aten, name), getattr(aten, f"{name}_", None))
    for op in (getattr(packet, overload) for packet in packets if packet is not None for overload in packet.overloads()):
        if not any(argument.is_out for argument in op._schema.arguments):
            yield op


_UNCHECKED = frozenset(op for name in _WRITERS for op in _overloads(name))
_LARGEST = 1 << 28  # bytes of stand-in memory for one write
_FOLDED = 1 << 16  # elements of an index that is computed from constants
_CLONE = "clone() what is read: x[:, 1:] = x[:, :-1].clone()"


def check_writes(program: torch.export.ExportedProgram) -> None:
    """Run the writes of a graph that is not functional yet, each kind once.

    Raises:
        CaptureError: eager refuses one of them, or its result depends on the order in which elements are copied.
    """
    for scope in walk.scopes(program.graph_module):
        constants = _constants(program) if scope.graph_module is program.graph_module else {}
        _Writes(scope.graph_module.graph, constants).check()


def _constants(program: torch.export.ExportedProgram) -> dict[str, torch.Tensor]:
    """Placeholder → the tensor that the model's source states there."""
    return {
        spec.arg.name: program.constants[spec.target]
        for spec in program.graph_signature.input_specs
        if spec.kind.name == "CONSTANT_TENSOR" and isinstance(program.constants.get(spec.target or ""), torch.Tensor)
    }


class _Writes:
    def __init__(self, graph: fx.Graph, constants: Mapping[str, torch.Tensor]) -> None:
        self._graph = graph
        self._known: dict[fx.Node, torch.Tensor | None] = {}
        for node in graph.find_nodes(op="placeholder"):
            self._known[node] = constants.get(node.name)
        self._nodes = [n for n in graph.nodes if n.op == "call_function" and isinstance(n.target, torch._ops.OpOverload)]
        self._written = {_memory(n.args[0]) for n in self._nodes if _writes(n) and n.target is not aten.detach_.default}

    def check(self) -> None:
        self._check_memory_reads()
        seen = set()
        for node in self._nodes:
            if node.target not in _UNCHECKED and not (_writes(node) and _is_risky(node)):
                continue
            key = self._kind(node)
            if key not in seen:
                seen.add(key)
                self._check(node)

    def _check_memory_reads(self) -> None:
        """``as_strided`` counts positions in memory. A write through a reordered view comes back in another memory order."""
        reordered: dict[Any, fx.Node] = {}
        for node in self._nodes:
            if _writes(node) and not is_row_major(meta.val(node.args[0])):
                reordered.setdefault(_memory(node.args[0]), node)
        for node in self._nodes if reordered else ():
            if node.target is aten.as_strided.default and _memory(node.args[0]) in reordered:
                raise errors.refused_write(
                    reordered[_memory(node.args[0])],
                    "a write through a transposed or permuted view of memory that as_strided() reads",
                    "slice, index or unfold() instead of as_strided(), or write to the tensor itself",
                )

    def _check(self, node: fx.Node) -> None:
        if _writes(node) and (through := _shared_elements(node)):
            raise errors.refused_write(
                node,
                f"a write through {through}, which has no functional form",
                "write to the tensor itself, or to a clone() of the view",
            )
        try:
            stand_ins = _StandIns(node, self._constant)
        except (_Unknown, RuntimeError):
            return
        refusal = stand_ins.refusal()
        if refusal is not None:
            fix = _CLONE if "single memory location" in refusal else "give it the shape, dtype and indices that eager takes"
            raise errors.refused_write(node, f"a write that eager refuses: {refusal}", fix)
        if _writes(node) and _reads_what_it_writes(node):
            raise errors.refused_write(
                node,
                "a write that reads the memory it writes to, at other elements: eager's result depends on their order",
                _CLONE,
            )

    def _kind(self, node: fx.Node) -> Any:
        """What the check of a write depends on: equal for the same write in another layer."""
        parts: list[Any] = [node.target]
        memories: dict[int, int] = {}
        for value in (*_leaves(node.args), *_leaves(node.kwargs.values())):
            fake = value.meta.get("val") if isinstance(value, fx.Node) else None
            if not isinstance(fake, torch.Tensor):
                parts.append(str(value))
                continue
            memory = memories.setdefault(_memory_of(fake), len(memories))
            known = None if fake.dtype.is_floating_point else self._constant(value)
            parts.append((*map(str, (fake.shape, fake.stride(), fake.storage_offset())), fake.dtype, memory, id(known)))
        return tuple(parts)

    def _constant(self, node: fx.Node, depth: int = 16) -> torch.Tensor | None:
        """The value of an index that is made of nothing but constants."""
        if node in self._known:
            return self._known[node]
        self._known[node] = None
        op, value = node.target, node.meta.get("val")
        if node.op != "call_function" or not isinstance(op, torch._ops.OpOverload) or depth == 0:
            return None
        if op is aten.detach_.default:  # torch.tensor(...) in forward
            self._known[node] = self._constant(node.all_input_nodes[0], depth - 1)
            return self._known[node]
        if op._schema.is_mutable or torch.Tag.nondeterministic_seeded in op.tags or _memory(node) in self._written:
            return None
        if not isinstance(value, torch.Tensor) or not all(type(s) is int for s in value.shape) or value.numel() > _FOLDED:
            return None
        found = {a: self._constant(a, depth - 1) for a in node.all_input_nodes}
        if any(v is None for v in found.values()):
            return None
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), found.__getitem__)
        try:
            result = op(*args, **{**kwargs, **({"device": "cpu"} if "device" in kwargs else {})})
        except (RuntimeError, IndexError, TypeError):
            return None
        self._known[node] = result if isinstance(result, torch.Tensor) else None
        return self._known[node]


class _Unknown(Exception):
    """A size that is known at run time only, or more memory than a check is worth."""


class _StandIns:
    """The arguments of a write as real tensors; those that share memory in the model share it here."""

    def __init__(self, node: fx.Node, constant: Any) -> None:
        self._node, self._constant = node, constant
        self._storages: dict[Any, torch.UntypedStorage] = {}
        self._masks: list[torch.Tensor] = []
        self._is_indexing = node.target in _UNCHECKED
        self._first = True
        self._args = [self._of(a) for a in node.args]
        self._kwargs = {k: self._of(v) for k, v in node.kwargs.items()}

    def refusal(self) -> str | None:
        """What eager says to the write; None when it accepts it."""
        message = None
        for count in self._counts():
            for mask in self._masks:
                mask.copy_((torch.arange(mask.numel()) < count).view(mask.shape))  # whatever its strides
            try:
                with torch.no_grad():
                    self._node.target(*self._args, **self._kwargs)  # type: ignore[operator]
                return None
            except NotImplementedError:
                return None
            except (RuntimeError, IndexError) as error:
                message = message or str(error).splitlines()[0]
        return None if message is None or "not implemented for" in message else message

    def _counts(self) -> list[int]:
        """How many elements of the masks may hold: eager compares that with the sizes of what stands beside them."""
        if not self._masks:
            return [0]
        tensors = [a for a in _leaves((*self._args, *self._kwargs.values())) if isinstance(a, torch.Tensor)]
        sizes = {1, *itertools.chain.from_iterable(t.shape for t in tensors[1:])}
        limit = min(mask.numel() for mask in self._masks)
        return sorted(size for size in sizes if size <= limit) or [0]

    def _of(self, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(self._of(v) for v in value)
        if not isinstance(value, fx.Node):
            return value
        first, self._first = self._first, False
        fake = value.meta.get("val")
        if not isinstance(fake, torch.Tensor):
            return _hint(fake)
        if not first and self._is_indexing and (known := self._constant(value)) is not None:
            return known
        real = self._real(fake)
        if first or not (real.dtype is torch.bool or not real.dtype.is_floating_point and not real.dtype.is_complex):
            return real
        if real.dtype is torch.bool and self._is_indexing and "index_put" in str(self._node.target):
            real = torch.empty(real.shape, dtype=torch.bool) if 0 in real.stride() else real  # an expanded one cannot be filled
            self._masks.append(real)
            return real
        return real.fill_(0 if self._is_indexing else 1)

    def _real(self, fake: torch.Tensor) -> torch.Tensor:
        size, stride = [_hint(s) for s in fake.shape], [_hint(s) for s in fake.stride()]
        offset = _hint(fake.storage_offset())
        if fake.layout is not torch.strided:
            raise _Unknown
        storage = fake.untyped_storage()
        wanted = _hint(storage.nbytes())
        if wanted > _LARGEST:
            raise _Unknown
        if storage._cdata not in self._storages:
            self._storages[storage._cdata] = torch.empty(wanted, dtype=torch.uint8).untyped_storage()
        return torch.empty(0, dtype=fake.dtype).set_(self._storages[storage._cdata], offset, size, stride)


def _writes(node: fx.Node) -> bool:
    """Whether an op writes its first operand, a tensor."""
    op: Any = node.target
    arguments = op._schema.arguments
    info = arguments[0].alias_info if arguments and op.namespace == "aten" else None
    return info is not None and bool(info.is_write) and bool(node.args) and meta.is_tensor(node.args[0])


def _is_risky(node: fx.Node) -> bool:
    """Whether eager may refuse an in-place op that the trace accepted: shared memory, or a result of another dtype."""
    args: Any = node.args
    if _shared_elements(node):
        return True
    own = meta.val(args[0])
    others = [meta.val(a) for a in _leaves(args[1:]) if isinstance(a, fx.Node) and meta.is_tensor(a)]
    if any(_memory_of(o) == _memory_of(own) and not _is_same(o, own) for o in others):
        return True
    return node.target is not aten.copy_.default and any(not torch.can_cast(o.dtype, own.dtype) for o in others)


def _shared_elements(node: fx.Node) -> str:
    """The view through which one place in memory is written as several elements, or by way of them; empty: none."""
    view: Any = node.args[0]
    if _overlaps_itself(meta.val(view)):
        return "a view of overlapping elements"
    while isinstance(view, fx.Node) and view.op == "call_function" and meta.is_tensor(view):
        if view.target is aten.expand.default:
            return "expand()"
        if view.target is aten.unfold.default and not _covers(view):
            return "unfold() with windows that leave gaps"
        operand = view.args[0] if view.args else None
        if not meta.is_tensor(operand) or _memory(operand) != _memory(view):
            return ""
        view = operand
    return ""


def _covers(unfold: fx.Node) -> bool:
    """Whether the windows of ``unfold`` hold all of its operand."""
    return bool(meta.val(unfold).numel() == meta.val(unfold.all_input_nodes[0]).numel())


def _overlaps_itself(value: torch.Tensor) -> bool:
    sizes, strides = list(value.shape), list(value.stride())
    if not all(type(s) is int for s in (*sizes, *strides)) or 0 in sizes:
        return False
    reach = 0
    for stride, size in sorted((st, si) for st, si in zip(strides, sizes, strict=True) if si > 1):
        if stride <= reach:
            return value.numel() > 1 << 20 or len(_places(value).unique()) < value.numel()
        reach += (size - 1) * stride
    return False


def _places(value: torch.Tensor) -> torch.Tensor:
    """The position in memory of each element."""
    places = torch.tensor(int(value.storage_offset()))
    for size, stride in zip(value.shape, value.stride(), strict=True):
        places = places.unsqueeze(-1) + torch.arange(size) * stride
    return places.flatten()


def _reads_what_it_writes(node: fx.Node) -> bool:
    """Whether elements of another operand stand where others are written."""
    args: Any = node.args
    own = meta.val(args[0])
    for other in _leaves((*args[1:], *node.kwargs.values())):
        if not isinstance(other, fx.Node) or not meta.is_tensor(other) or _memory(other) != _memory(args[0]):
            continue
        value = meta.val(other)
        numbers = (*own.shape, *own.stride(), *value.shape, *value.stride(), own.storage_offset(), value.storage_offset())
        if _is_same(value, own) or own.dtype != value.dtype or not all(type(n) is int for n in numbers):
            continue
        if max(own.numel(), value.numel()) <= 1 << 22 and bool(torch.isin(_places(value), _places(own)).any()):
            return True
    return False


def _is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Each element in the very same place."""
    return (one.shape, one.stride(), one.storage_offset()) == (other.shape, other.stride(), other.storage_offset())


def _memory(node: Any) -> Any:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return _memory_of(value) if isinstance(value, torch.Tensor) else node


def _memory_of(value: torch.Tensor) -> int:
    wrapped = value.layout is not torch.strided or trace.is_wrapped(value)
    return id(value) if wrapped else int(value.untyped_storage()._cdata)


def _leaves(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _leaves(value)
        else:
            yield value


def _hint(value: Any) -> Any:
    """A symbolic number of the example."""
    if not isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return value
    hint = value.node.hint
    if hint is None:
        raise _Unknown
    return hint
