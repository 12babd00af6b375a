"""The node builder: the only code in nxfx that adds a node to a graph.

Every node it makes has ``val`` (the op evaluated on fakes), the user's ``stack_trace`` and ``nn_module_stack`` of the
node it stands for, and the name of the pass that made it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

from nxfx.graph import meta

aten = torch.ops.aten


class NodeBuilder:
    """Builds nodes before an anchor on behalf of one pass.

    Args:
        graph: the graph that is edited.
        made_by: id of the pass, recorded on each node.

    Use::

        build = NodeBuilder(gm.graph, "narrow-64bit")
        with build.before(node):
            narrow = build.call(aten._to_copy.default, node.args[0], dtype=torch.int32)
    """

    def __init__(self, graph: fx.Graph, made_by: str) -> None:
        self.graph = graph
        self.made_by = made_by
        self.mode = meta.fake_mode_of(graph)
        self.created = 0
        self._origin: fx.Node | None = None

    @contextlib.contextmanager
    def before(self, anchor: fx.Node, origin: fx.Node | None = None) -> Iterator[NodeBuilder]:
        """Insert what is built inside just before ``anchor``; provenance comes from ``origin`` (default: the anchor)."""
        previous, self._origin = self._origin, origin or anchor
        try:
            with self.graph.inserting_before(anchor):
                yield self
        except Exception as error:
            # The pipeline names the node and the user's line when a pass fails.
            if not hasattr(error, "nxfx_node"):
                error.nxfx_node = self._origin  # type: ignore[attr-defined]
            raise
        finally:
            self._origin = previous

    @contextlib.contextmanager
    def after(self, anchor: fx.Node, origin: fx.Node | None = None) -> Iterator[NodeBuilder]:
        """Insert just after ``anchor``, in order; after the *last* placeholder when the anchor is one."""
        following = anchor.next
        if anchor.op == "placeholder":
            while following.op == "placeholder":
                following = following.next
        with self.before(following, origin or anchor):
            yield self

    def call(self, op: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """Add ``op(*args, **kwargs)`` at the current place.

        Raises:
            Whatever ``op`` raises when evaluated on the fake values of its arguments (wrong dtype, shape ...).
        """
        if self._origin is None:
            raise RuntimeError("NodeBuilder.call outside `with build.before(...)` or `build.after(...)`")
        value = meta.evaluate(self.mode, op, args, kwargs)
        return self._finish(self.graph.call_function(op, args, kwargs), value)

    def known(self, value: Any, op: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """Add ``op(*args, **kwargs)`` whose fake ``value`` the caller is certain of: much cheaper than :meth:`call`."""
        if self._origin is None:
            raise RuntimeError("NodeBuilder.known outside `with build.before(...)` or `build.after(...)`")
        return self._finish(self.graph.call_function(op, args, kwargs), value)

    def cast(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        """``node`` as ``dtype`` (node itself when it already is): an ``aten._to_copy``."""
        value = meta.val(node)
        if value.dtype == dtype:
            return node
        if self._origin is None:
            raise RuntimeError("NodeBuilder.cast outside `with build.before(...)` or `build.after(...)`")
        cast = self.graph.call_function(aten._to_copy.default, (node,), {"dtype": dtype})
        return self._finish(cast, meta.cast(value, dtype))

    def scalar(self, value: bool | int | float, dtype: torch.dtype, device: torch.device) -> fx.Node:
        """A 0-d tensor constant of ``dtype``: ``aten.full([], value)``."""
        return self.call(aten.full.default, [], value, dtype=dtype, device=device)

    def get_attr(self, name: str, value: torch.Tensor) -> fx.Node:
        """A reference to the attribute ``name`` of the module; ``value`` is its fake value."""
        return self._finish(self.graph.create_node("get_attr", name, name=name.replace(".", "_")), value)

    def _finish(self, node: fx.Node, value: Any) -> fx.Node:
        node.meta["val"] = value
        if self._origin is not None:
            meta.inherit(node, self._origin, self.made_by)
        self.created += 1
        return node


def refresh(node: fx.Node, mode: meta.FakeTensorMode | None) -> None:
    """Re-evaluate ``node``'s ``val`` after its inputs' dtypes or its arguments changed."""
    node.meta["val"] = meta.evaluate(mode, node.target, node.args, dict(node.kwargs))
    node.meta.pop("tensor_meta", None)
