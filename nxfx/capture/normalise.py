"""The normal form: functional ATen, no ``aten.to``, no aliasing composite, no grad-mode or autocast region, no ``torch.vmap``.

``ExportedProgram.run_decompositions({})`` gives it by retracing the whole graph. Where the captured graph mutates nothing a
node-local rewrite reaches the same form for a fraction of the time; golden tests hold the two equal.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import fx

from nxfx.capture.masks import same_size
from nxfx.graph import meta, walk
from nxfx.graph.builder import NodeBuilder

aten = torch.ops.aten

_TO = frozenset({aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.to.other, aten.to.prim_Device, aten.to.prim_dtype})
# The module of the calls that stand around a ``torch.vmap``: between them ops are recorded, and valued, as written for one row.
_TRANSFORMS = "torch._functorch.predispatch"
_LOCAL = _TO | {aten.reshape.default, aten.contiguous.default, aten.lift_fresh_copy.default}


@functools.cache
def _is_normal(op: Any) -> bool:
    """Functional, and neither composite nor aliasing at once: ``run_decompositions({})`` leaves such an op alone."""
    if not isinstance(op, torch._ops.OpOverload):
        return getattr(op, "__module__", "") != _TRANSFORMS
    if op._schema.is_mutable:
        return False
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CompositeImplicitAutograd")
    aliases = any(r.alias_info is not None for r in op._schema.returns)
    return not (composite and aliases)


def needs_functionalisation(gm: fx.GraphModule) -> bool:
    """Whether the graph mutates, holds a region (grad mode, autocast, vmap) or an op that only a retrace brings to normal form."""
    for scope in walk.scopes(gm):
        for node in scope.graph_module.graph.nodes:
            if node.op != "call_function":
                continue
            if walk.is_higher_order(node) and node.target.name().startswith("wrap_"):
                return True
            if node.target not in _LOCAL and not _is_normal(node.target):
                return True
    return False


def spell_out_copies(gm: fx.GraphModule) -> None:
    """Bring what ``copy_`` copies to the dtype, shape and device of what it overwrites.

    ``run_decompositions`` puts the source of a copy that ends in a buffer in the buffer's place as it is, with no cast and no
    expansion (torch 2.9 to 2.13, ``_remove_unneccessary_copy_op_pass``): the rest would read what was never stored.
    """
    for scope in walk.scopes(gm):
        build = NodeBuilder(scope.graph_module.graph, "capture")
        for node in scope.graph_module.graph.find_nodes(op="call_function", target=aten.copy_.default, sort=False):
            target, source = node.args[:2]
            kept, new = meta.val(target), meta.val(source)
            with build.before(node):
                if new.dtype != kept.dtype or new.device != kept.device:
                    source = build.call(aten._to_copy.default, source, dtype=kept.dtype, device=kept.device)
                if len(new.shape) != len(kept.shape) or not all(map(same_size, new.shape, kept.shape)):
                    source = build.call(aten.expand_as.default, source, target)
            node.args = (target, source, *node.args[2:])


def normalise(gm: fx.GraphModule) -> None:
    """Bring a graph that mutates nothing to normal form, node by node, in place."""
    for scope in walk.scopes(gm):
        graph = scope.graph_module.graph
        build = NodeBuilder(graph, "capture")
        for op in _LOCAL:
            for node in graph.find_nodes(op="call_function", target=op, sort=False):
                with build.before(node):
                    replacement = _local(build, node)
                node.replace_all_uses_with(replacement)
                graph.erase_node(node)


def _local(build: NodeBuilder, node: fx.Node) -> fx.Node:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    was, is_ = meta.val(source), meta.val(node)
    if node.target is aten.lift_fresh_copy.default:
        return build.call(aten.clone.default, source)
    if node.target is aten.reshape.default:
        if _viewable(was, is_):
            return build.call(aten.view.default, source, node.args[1])
        copy = build.call(aten.clone.default, source, memory_format=torch.contiguous_format)
        return build.call(aten._unsafe_view.default, copy, node.args[1])
    if node.target is aten.contiguous.default:
        memory_format = node.kwargs.get("memory_format") or (node.args[1] if len(node.args) > 1 else torch.contiguous_format)
        if was.is_contiguous(memory_format=memory_format):
            return source
        return build.call(aten.clone.default, source, memory_format=memory_format)
    return _to_copy(build, node, source, was, is_)


def _viewable(was: torch.Tensor, is_: torch.Tensor) -> bool:
    # A fake reshape that could stay a view shares its strides' layout; `untyped_storage` tells a view from a copy.
    return bool(is_.untyped_storage()._cdata == was.untyped_storage()._cdata)


def _to_copy(build: NodeBuilder, node: fx.Node, source: fx.Node, was: torch.Tensor, is_: torch.Tensor) -> fx.Node:
    assert isinstance(node.target, torch._ops.OpOverload)
    names = [a.name for a in node.target._schema.arguments]
    given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    same = was.dtype == is_.dtype and was.device == is_.device and was.stride() == is_.stride()
    if same and not given.get("copy"):
        return source
    options: dict[str, Any] = {}
    if was.dtype != is_.dtype:
        options["dtype"] = is_.dtype
    if was.device != is_.device:
        options["device"] = is_.device
    if given.get("memory_format") is not None:
        options["memory_format"] = given["memory_format"]
    return build.call(aten._to_copy.default, source, **options)
