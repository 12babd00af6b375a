"""What an upstream lowering needs said another way. On a copy of the graph, before it is lowered; every rewrite is exact.

- ``x[i]`` counts negative indices from the end. torch-mlir's gather reads before the tensor instead, and torch-xla wraps them in
  int64. They are wrapped here, unless the interval analysis proves them non-negative.
- Both widen the indices of ``x[i, j]`` to int64; those of ``index_select`` they take as they are. So indices are combined to one.
- A comparison with a Python scalar, or a masked fill with one, is made in int64 or float64 by torch-xla, where PyTorch casts the
  scalar: it is typed here.
- An empty list of dimensions means all of them; torch-xla's ``amax`` and ``amin`` take it for none, and reduce nothing.
- Assertions do not run on the device: they are dropped (NX407 has reported the user's own).
- Slice ends of 2**63 - 1 make torch-mlir fail with ``std::bad_alloc``: bounds are clamped to the axis.

Measured with torch-mlir 20261001 and torch-xla 2.9.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from nxfx.analysis import ranges
from nxfx.analysis.dtype_rules import integer_bounds, is_integral
from nxfx.analysis.intervals import INT32, arg, fits
from nxfx.analysis.provenance import Source
from nxfx.graph import meta
from nxfx.graph.builder import NodeBuilder
from nxfx.graph.slices import is_static, slice_bounds

aten = torch.ops.aten

_SLICES = {aten.slice.Tensor: 1, aten.slice_scatter.default: 2}  # op → position of dim
_ASSERTIONS = (aten._assert_scalar.default, aten._assert_async.msg, aten._assert_async.default, aten._assert_tensor_metadata.default)
_READS = (aten.index.Tensor, aten._unsafe_index.Tensor)
_REDUCTIONS = (aten.amax.default, aten.amin.default, aten.sum.dim_IntList, aten.mean.dim, aten.logsumexp.default)
_TYPED = {getattr(aten, name).Scalar: getattr(aten, name).Tensor for name in ("eq", "ne", "lt", "le", "gt", "ge", "masked_fill")}
_WRITES = (aten.index_put.default, aten._unsafe_index_put.default)


def legalise(graph_module: fx.GraphModule, sources: Mapping[str, Source]) -> None:
    """Rewrite ``graph_module`` in place.

    Args:
        graph_module: functional ATen with ``val`` on every node.
        sources: placeholder or ``get_attr`` node name → origin, for the ranges of inputs.
    """
    graph = graph_module.graph
    build = NodeBuilder(graph, "handoff")
    for op in _ASSERTIONS:
        for node in graph.find_nodes(op="call_function", target=op):
            graph.erase_node(node)
    for op, dim in _SLICES.items():
        for node in graph.find_nodes(op="call_function", target=op):
            _clamp(node, dim)
    for op in _REDUCTIONS:
        for node in graph.find_nodes(op="call_function", target=op):
            _name_dims(node)
    for op, typed in _TYPED.items():
        for node in graph.find_nodes(op="call_function", target=op):
            with build.before(node):
                _type_scalar(build, node, typed)
    indexed = [n for op in (*_READS, *_WRITES) for n in graph.find_nodes(op="call_function", target=op)]
    if indexed:
        known = ranges.analyse(graph_module, sources)
        for node in indexed:
            with build.before(node):
                _index(build, node, known)
    graph.eliminate_dead_code()
    graph.lint()
    graph_module.recompile()


def _name_dims(node: fx.Node) -> None:
    if not arg(node, 1, "dim"):
        dims = list(range(meta.val(node.args[0]).dim()))  # type: ignore[arg-type]
        node.kwargs = {k: v for k, v in node.kwargs.items() if k != "dim"}
        node.args = (node.args[0], dims, *node.args[2:])


def _type_scalar(build: NodeBuilder, node: fx.Node, typed: Any) -> None:
    *before, scalar = node.args
    tensor = before[0]
    if not isinstance(tensor, fx.Node) or isinstance(scalar, bool) or not isinstance(scalar, (int, float)):
        return
    dtype = meta.val(tensor).dtype
    if dtype == torch.bool or dtype.is_complex:
        return
    if not dtype.is_floating_point and (not isinstance(scalar, int) or not fits((scalar, scalar), integer_bounds(dtype))):
        return
    node.target, node.args = typed, (*before, build.scalar(scalar, dtype, meta.val(tensor).device))


def _clamp(node: fx.Node, dim_position: int) -> None:
    names = ("self", "src", "dim", "start", "end", "step") if dim_position == 2 else ("self", "dim", "start", "end", "step")
    given: dict[str, Any] = {"dim": 0, "start": None, "end": None, "step": 1} | dict(zip(names, node.args, strict=False)) | node.kwargs
    size = meta.val(given["self"]).shape[given["dim"]]
    if not is_static(size) or not all(b is None or is_static(b) for b in (given["start"], given["end"])):
        return
    first, last = slice_bounds(given["start"], given["end"], size)
    node.args = tuple((given | {"start": first, "end": max(first, last)})[name] for name in names)
    node.kwargs = {}


def _index(build: NodeBuilder, node: fx.Node, known: ranges.Ranges) -> None:
    base: Any = node.args[0]
    indices: list[Any] = list(node.args[1])  # type: ignore[arg-type]
    shape = meta.val(base).shape
    used = [d for d, i in enumerate(indices) if i is not None]
    if not is_static(*shape) or not all(meta.is_tensor(i) and _is_index(i) for i in (indices[d] for d in used)):
        return
    for d in used:
        indices[d] = _wrapped(build, indices[d], shape[d], known)
    if node.target in _READS and math.prod(shape[d] for d in used) <= INT32[1]:
        replacement = _select(build, base, used, [indices[d] for d in used])
        node.replace_all_uses_with(replacement)
        node.graph.erase_node(node)
    else:
        node.args = (base, indices, *node.args[2:])


def _is_index(node: fx.Node) -> bool:
    dtype = meta.dtype_of(node)
    return dtype is not None and dtype not in (torch.bool, torch.uint8) and is_integral(dtype)


def _wrapped(build: NodeBuilder, index: fx.Node, size: int, known: ranges.Ranges) -> fx.Node:
    bounds = known.of(index)
    if bounds is not None and bounds[0] >= 0:
        return index
    zero = build.scalar(0, meta.val(index).dtype, meta.val(index).device)
    negative = build.call(aten.lt.Tensor, index, zero)
    return build.call(aten.where.self, negative, build.call(aten.add.Tensor, index, size), index)


def _select(build: NodeBuilder, base: fx.Node, axes: Sequence[int], indices: Sequence[fx.Node]) -> fx.Node:
    """``base`` indexed at ``axes``, by one ``index_select`` over their product."""
    shape = list(meta.val(base).shape)
    together = list(axes) == list(range(axes[0], axes[-1] + 1))
    place = axes[0] if together else 0  # indices with a gap between them put their own axes first
    if not together:
        rest = [d for d in range(len(shape)) if d not in axes]
        base = build.call(aten.permute.default, base, [*axes, *rest])
        shape = [shape[d] for d in (*axes, *rest)]
    sizes = shape[place : place + len(axes)]
    flat = indices[0]
    for size, index in zip(sizes[1:], indices[1:], strict=True):
        flat = build.call(aten.add.Tensor, build.call(aten.mul.Tensor, flat, size), index)
    own = list(meta.val(flat).shape)
    before, after = shape[:place], shape[place + len(axes) :]
    if len(axes) > 1:
        base = build.call(aten.reshape.default, base, [*before, math.prod(sizes), *after])
    if len(own) != 1:
        flat = build.call(aten.reshape.default, flat, [math.prod(own)])
    picked = build.call(aten.index_select.default, base, place, flat)
    return picked if len(own) == 1 else build.call(aten.reshape.default, picked, [*before, *own, *after])
