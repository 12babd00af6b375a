"""What a node's ``meta`` must hold, and the one place that talks to torch's fake tensors.

Private torch API used here, and nowhere else in nxfx: ``torch._subclasses.fake_tensor`` (``FakeTensor``,
``FakeTensorMode``), tested on torch 2.9 and 2.13.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

__all__ = ["FakeTensor", "FakeTensorMode", "dtype_of", "evaluate", "fake_mode_of", "inherit", "is_tensor", "move", "retype", "val"]

# Facts about the old node's own value or construction; everything else (stack_trace, nn_module_stack,
# partitioner tags, seq_nr ...) is inherited by the nodes that replace it.
_NOT_INHERITED = frozenset({"val", "tensor_meta", "unbacked_bindings", "eager_input_vals", "from_node", "desc", "nxfx"})


def val(node: fx.Node) -> Any:
    """The fake value of ``node``: a FakeTensor, SymInt, number, list of these, or None for a node without a value."""
    return node.meta.get("val")


def is_tensor(node: Any) -> bool:
    """Whether ``node`` is an FX node whose value is one tensor."""
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), torch.Tensor)


def dtype_of(node: Any) -> torch.dtype | None:
    """The dtype of a tensor node, None for anything else."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value.dtype if isinstance(value, torch.Tensor) else None


def fake_mode_of(graph: fx.Graph) -> FakeTensorMode | None:
    """The fake mode that the graph's values belong to (first one found), or None when the graph holds no fake tensor."""
    for node in graph.nodes:
        value = node.meta.get("val")
        for leaf in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(leaf, FakeTensor):
                return leaf.fake_mode
    return None


@contextlib.contextmanager
def _quiet(mode: FakeTensorMode) -> Iterator[None]:
    shape_env = mode.shape_env
    with torch.no_grad(), mode:
        if shape_env is None:
            yield
        else:
            with shape_env.ignore_fresh_unbacked_symbols():
                yield


def evaluate(mode: FakeTensorMode | None, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What ``op`` gives on the fake values of ``args`` and ``kwargs`` (FX nodes are replaced by their ``val``).

    Raises:
        Whatever the op itself raises on such shapes and dtypes.
    """
    args, kwargs = fx.node.map_arg((args, kwargs), val)
    if mode is None:
        return op(*args, **kwargs)
    # Kernels that take no SymInt (constant_pad_nd) refuse symbolic sizes, or fix them to the example's; the Python dispatcher
    # decomposes such ops, but it is slower.
    symbolic = any(map(_is_symbolic, (*args, *kwargs.values())))
    with _quiet(mode), enable_python_dispatcher() if symbolic else contextlib.nullcontext():
        return op(*args, **kwargs)


def _is_symbolic(value: Any) -> bool:
    if isinstance(value, (list, tuple, torch.Tensor)):
        return any(map(_is_symbolic, value.shape if isinstance(value, torch.Tensor) else value))
    return isinstance(value, torch.SymInt)


def retype(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``value`` with another dtype: same size, strides, offset and device. An order of magnitude cheaper than running a cast."""
    if not isinstance(value, FakeTensor):
        return value.to(dtype)
    with torch._C._DisableTorchDispatch():  # inside AOTAutograd a fake mode is active, and would make a fake of its own
        meta = torch.empty_strided(value.size(), value.stride(), dtype=dtype, device="meta")
        if not isinstance(value.storage_offset(), int):  # of a slice whose start is data; the graph may ask for it
            meta = meta.as_strided(value.size(), value.stride(), value.storage_offset())
    return FakeTensor(value.fake_mode, meta, value.device)


def contiguous(like: torch.Tensor, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A new contiguous fake value of a static ``shape``, of the mode and on the device of ``like``."""
    with torch._C._DisableTorchDispatch():
        made = torch.empty(tuple(shape), dtype=dtype, device="meta")
    return FakeTensor(like.fake_mode, made, like.device) if isinstance(like, FakeTensor) else torch.empty_like(made, device=like.device)


def cast(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What ``_to_copy(value, dtype=dtype)`` gives: the same strides when ``value`` is dense, packed ones when it is not."""
    if isinstance(value, FakeTensor) and not _is_dense(value):
        with _quiet(value.fake_mode):
            packed: torch.Tensor = torch.ops.aten._to_copy.default(value, dtype=dtype)
            return packed
    return retype(value, dtype)


def _is_dense(value: torch.Tensor) -> bool:
    """Whether the strides cover memory without holes or overlaps, in some order of the dimensions. Unsure: False."""
    if any(not isinstance(n, int) for n in (*value.shape, *value.stride())):
        return False
    expected = 1
    for stride, size in sorted((t, s) for s, t in zip(value.shape, value.stride(), strict=True) if s != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def part(value: torch.Tensor, dim: int, positions: range, *, keep: bool = True) -> torch.Tensor:
    """The fake value of a slice of a static ``value`` (without ``keep`` of a select of the one position), not evaluated."""
    shape, strides = list(value.shape), list(value.stride())
    offset = value.storage_offset() + positions.start * strides[dim]
    shape[dim], strides[dim] = len(positions), strides[dim] * positions.step
    if not keep:
        del shape[dim], strides[dim]
    last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) if 0 not in shape else 0
    made = torch.empty(offset + last + 1, dtype=value.dtype, device="meta").as_strided(shape, strides, offset)
    return FakeTensor(value.fake_mode, made, value.device) if isinstance(value, FakeTensor) else made


def move(value: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The fake ``value`` on another device (a meta tensor stands for itself)."""
    if not isinstance(value, FakeTensor):
        return value
    meta = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device="meta")
    return meta if device.type == "meta" else FakeTensor(value.fake_mode, meta, device)


def is_empty(value: torch.Tensor) -> bool:
    """Whether a size is known to be zero; one that depends on data is not known."""
    return any(type(size) is int and size == 0 for size in value.shape)


def symbol_of(size: Any) -> Any:
    """The sympy expression of a symbolic size, None for an int."""
    return size.node.expr if isinstance(size, torch.SymInt) else None


def is_symbol(size: Any) -> bool:
    """Whether ``size`` is one plain symbol (not an int, not an expression)."""
    expression = symbol_of(size)
    return expression is not None and bool(expression.is_symbol)


def size_range(size: Any) -> tuple[int, int]:
    """Inclusive bounds of a size; of a symbol those that its ShapeEnv knows."""
    if isinstance(size, int):
        return size, size
    bounds = size.node.shape_env.bound_sympy(size.node.expr)
    return (int(bounds.lower) if bounds.lower.is_Integer else 0), (int(bounds.upper) if bounds.upper.is_Integer else sys.maxsize)


def size_given(size: Any, known: dict[Any, int]) -> int | None:
    """The value of ``size`` once the symbols in ``known`` have theirs, None while one of its symbols is missing."""
    if isinstance(size, int):
        return size
    value = symbol_of(size).subs(known)
    return int(value) if value.is_number else None


def inherit(node: fx.Node, origin: fx.Node, made_by: str) -> None:
    """Give ``node`` the provenance of ``origin`` (the user's line, module path, tags) and record the pass that made it."""
    for key, value in origin.meta.items():
        if key not in _NOT_INHERITED:
            node.meta.setdefault(key, value)
    node.meta["nxfx"] = {"made_by": made_by, "origin": origin.meta.get("nxfx", {}).get("origin", origin.name)}
