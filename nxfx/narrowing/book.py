"""The book of values that hold the same numbers in a narrower dtype, and the casts between the two."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from nxfx.analysis import dtype_rules
from nxfx.graph import meta
from nxfx.graph.builder import NodeBuilder, refresh

aten = torch.ops.aten


class Book:
    """Turns nodes of wide dtypes into nodes of narrow ones, keeping every consumer's operands consistent.

    A value is narrow either in place (the op itself now gives the narrow dtype) or by a cast right after its producer, which is made
    when the first consumer takes it. Nodes are to be visited in topological order: a consumer either takes all its operands narrow
    or asks for all of them wide.
    """

    def __init__(self, graph: fx.Graph, made_by: str, *wide: torch.dtype) -> None:
        self.build = NodeBuilder(graph, made_by)
        self.graph = graph
        self.narrow = {w: dtype_rules.narrow(w) for w in wide}
        self.wide = {n: w for w, n in self.narrow.items()}
        self.changed = False
        self._narrow: set[fx.Node] = set()
        self._edges: dict[tuple[fx.Node, fx.Node], bool] = {}  # exceptions to _narrow, by (producer, consumer)
        self._wide_of: dict[fx.Node, fx.Node] = {}
        self._offered: dict[fx.Node, fx.Node | None] = {}  # wide node → its narrow cast, once there is one

    def narrowed(self, node: fx.Node, user: fx.Node) -> bool:
        """Whether ``user`` reads narrow from ``node`` what the model gave it wide."""
        return self._edges.get((node, user), node in self._narrow)

    def takes(self, node: fx.Node, user: fx.Node) -> bool:
        """Whether ``user`` reads ``node`` narrow, or can."""
        return node in self._offered or self.narrowed(node, user)

    def is_wide(self, node: Any) -> bool:
        """Whether ``node``'s value (or one of its outputs) is wide as it stands."""
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            return value.dtype in self.narrow
        return isinstance(value, (list, tuple)) and any(isinstance(v, torch.Tensor) and v.dtype in self.narrow for v in value)

    def is_own_cast(self, node: fx.Node) -> bool:
        """A cast that this pass made in an earlier run: final."""
        return node.target is aten._to_copy.default and node.meta.get("nxfx", {}).get("made_by") == self.build.made_by

    def operands(self, node: fx.Node) -> list[fx.Node]:
        """Input nodes that are wide, or were in the model."""
        return [n for n in node.all_input_nodes if self.narrowed(n, node) or self.is_wide(n)]

    def in_place(self, node: fx.Node, only: Iterable[int] | None = None) -> None:
        """``node`` itself gives the narrow dtype now (all its wide outputs, or ``only`` these)."""
        value = node.meta["val"]
        if isinstance(value, torch.Tensor):
            node.meta["val"] = meta.retype(value, self.narrow[value.dtype])
        else:
            chosen = range(len(value)) if only is None else set(only)
            new = [
                meta.retype(v, self.narrow[v.dtype]) if i in chosen and isinstance(v, torch.Tensor) and v.dtype in self.narrow else v
                for i, v in enumerate(value)
            ]
            node.meta["val"] = new if isinstance(value, list) else tuple(new)
        node.meta.pop("tensor_meta", None)
        self._narrow.add(node)
        self.changed = True

    def re_evaluate(self, node: fx.Node) -> None:
        """``node``'s value after its operands or its dtype keyword changed: narrow in place, or on offer where torch insists."""
        refresh(node, self.build.mode)
        if self.is_wide(node):
            self.offer(node)
        else:
            self._narrow.add(node)
        self.changed = True

    def offer(self, node: fx.Node) -> None:
        """``node`` is wide as it stands, but whoever wants it narrow can :meth:`take` it."""
        self._offered[node] = None

    def take(self, user: fx.Node, operands: Iterable[fx.Node]) -> list[fx.Node]:
        """``user`` reads what is on offer among ``operands`` by narrow casts behind their producers; returns those it is first to take."""
        first = []
        for operand in operands:
            if operand not in self._offered:
                continue
            cast = self._offered[operand]
            if cast is None:
                cast = self._offered[operand] = self.cast_behind(operand)
                self._wide_of[cast] = operand
                first.append(operand)
            user.replace_input_with(operand, cast)
            self.changed = True
        return first

    def cast_behind(self, node: fx.Node, origin: fx.Node | None = None) -> fx.Node:
        """A narrow cast of ``node``, right behind it."""
        with self.build.after(node, origin):
            cast = self.build.cast(node, self.narrow[node.meta["val"].dtype])
        self._narrow.add(cast)
        return cast

    def cast_source(self, source: fx.Node, origin: fx.Node) -> bool:
        """Every use of an input reads a narrow cast right behind it, but for the model's own cast to the narrow dtype."""
        users = [u for u in source.users if not (self._is_cast(u) and meta.dtype_of(u) in self.wide)]
        if not users:
            return False
        cast = self.cast_behind(source, origin)
        for user in users:
            user.replace_input_with(source, cast)
        self.changed = True
        return True

    def bypass(self, cast: fx.Node, *, narrowed: bool) -> bool:
        """A cast to the dtype that its operand now has goes; False (and nothing done) where a user reads both.

        ``narrowed`` says whether the users of ``cast`` read a wide value in the model.
        """
        (source,) = cast.all_input_nodes
        if any(source in user.all_input_nodes for user in cast.users):
            return False
        for user in list(cast.users):
            user.replace_input_with(cast, source)
            self._edges[source, user] = narrowed
        self.graph.erase_node(cast)
        self.changed = True
        return True

    def widen(self, node: fx.Node, operands: Iterable[fx.Node]) -> bool:
        """``node`` reads these operands in the wide dtype again; whether any of them needed a cast up."""
        cast_up = False
        for operand in operands:
            if not self.narrowed(operand, node) or isinstance(operand.meta["val"], (list, tuple)):
                continue
            if operand not in self._wide_of:
                with self.build.after(operand):
                    self._wide_of[operand] = self.build.cast(operand, self.wide[operand.meta["val"].dtype])
            wide = self._wide_of[operand]
            cast_up |= self.is_own_cast(wide)
            node.replace_input_with(operand, wide)
            self.changed = True
        return cast_up

    def restore(self, output: fx.Node, *, peel: bool) -> list[fx.Node]:
        """The graph's outputs get their wide dtype back by casts right before ``output``; returns what needed one.

        With ``peel`` an output that is computed wide anyway is handed on as it is.
        """
        cast_up = []
        if not peel:
            self.take(output, self.operands(output))
        for operand in self.operands(output):
            if not self.narrowed(operand, output):
                continue
            wide = self._wide_of.get(operand) if peel else None
            if wide is None:
                with self.build.before(output, operand):
                    wide = self.build.cast(operand, self.wide[operand.meta["val"].dtype])
                cast_up.append(operand)
            output.replace_input_with(operand, wide)
            self.changed = True
        return cast_up

    @staticmethod
    def _is_cast(node: fx.Node) -> bool:
        return node.target is aten._to_copy.default and set(node.kwargs) == {"dtype"}
