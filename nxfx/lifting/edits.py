"""The edits of lift-int-casts: a region computed in float32, and the dtype that the model had for everyone outside it."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from nxfx.analysis import dtype_rules, ranges
from nxfx.analysis.float_ops import METADATA, SEARCHES, Family, dtype_of, has_several_results, is_listed, promotes
from nxfx.analysis.float_region import Region
from nxfx.analysis.integer_origin import Entry, IntegerOrigins
from nxfx.graph import meta
from nxfx.graph.builder import NodeBuilder, refresh
from nxfx.lifting.words import exact_limit

aten = torch.ops.aten
FP32 = torch.float32


class Lift:
    """The edits: the region computed in float32, everyone outside it given the dtype that the model had.

    Attributes:
        raised: region node → the node that holds its value unrounded: itself, or the float32 source of a cast.
        left: casts of the region that stay for those who take the rounded value.
        compared: comparisons that are now made in float32.
    """

    def __init__(self, build: NodeBuilder, origins: IntegerOrigins, region: Region) -> None:
        self.build = build
        self.origins = origins
        self.bound = region.bound
        self.raised: dict[fx.Node, fx.Node] = {}
        self.left: set[fx.Node] = set()
        self.compared: set[fx.Node] = set()
        self._made: set[fx.Node] = set()
        self._were_low: set[fx.Node] = set()
        self._moved: set[fx.Node] = set()
        self._upcasts: dict[fx.Node, fx.Node] = {}
        self._restored: dict[fx.Node, fx.Node] = {}
        self._handed: set[tuple[fx.Node, fx.Node]] = set()
        for node in region.nodes:
            is_cast = origins.members[node].family is Family.CAST
            self.raised[node] = self._recast(node) if is_cast else self._raise(node)
        for node in reversed(region.nodes):
            self._settle(node)
        for node in origins.sinks:
            if node.target in SEARCHES and any(dtype_of(v) is FP32 for v in node.all_input_nodes):
                for value in node.all_input_nodes:
                    node.replace_input_with(value, self._high(value))

    def _raise(self, node: fx.Node) -> fx.Node:
        """Compute ``node`` in float32, in place."""
        member, dtype = self.origins.members[node], dtype_of(node)
        values = [v for v in member.values if isinstance(v, fx.Node)]
        swap = {v: self._high(v) for v in values}
        keeps_layout = not any(self._moves(v, high) for v, high in swap.items())
        is_promoted = member.family in (Family.COMPUTE, Family.SELECT) and "dtype" not in node.kwargs
        if is_promoted and values and all(dtype_rules.is_integral(dtype_of(v)) for v in values):
            swap[values[0]] = self._upcast(values[0])  # torch's default dtype was the low one
        node.args = fx.map_arg(node.args, lambda a: swap.get(a, a))
        node.kwargs = fx.map_arg(node.kwargs, lambda a: swap.get(a, a))
        if "dtype" in node.kwargs or member.family is Family.FACTORY:
            node.update_kwarg("dtype", FP32)
        if dtype_rules.is_low_precision(dtype):
            self._were_low.add(node)
            if (keeps_layout and is_listed(node)) or node.meta.get("unbacked_bindings"):  # evaluating again would invent new symbols
                node.meta["val"] = _retyped(node.meta["val"])
                node.meta.pop("tensor_meta", None)
            else:
                self._refresh(node)
        return node

    def _moves(self, value: fx.Node, high: fx.Node) -> bool:
        """Whether ``high`` is laid out in memory otherwise than ``value`` was."""
        return high in self._moved or (high is not value and _layout(meta.val(high)) != _layout(meta.val(value)))

    def _refresh(self, node: fx.Node) -> None:
        layout = str(pytree.tree_map(_layout, meta.val(node)))
        try:
            refresh(node, self.build.mode)
        except RuntimeError:
            if node.target is not aten.view.default:
                raise
            # What is no longer copied by a cast can be an expanded value, which no view takes.
            with self.build.before(node):
                node.update_arg(0, self._make(aten.clone.default, node.args[0], memory_format=torch.contiguous_format))
            refresh(node, self.build.mode)
        if str(pytree.tree_map(_layout, meta.val(node))) != layout:
            self._moved.add(node)

    def _recast(self, node: fx.Node) -> fx.Node:
        """What the cast ``node`` converts, in float32 (or the higher precision that ``node`` gives)."""
        value: fx.Node = self.origins.members[node].values[0]
        source, target = self.raised.get(value, value), dtype_of(node)
        target = FP32 if dtype_rules.is_low_precision(target) else target
        was, is_ = meta.val(source), meta.val(node)
        is_plain = node.target is not aten._to_copy.default
        options = {} if is_plain else {k: v for k, v in node.kwargs.items() if k != "dtype"}
        if was.dtype == target and not options and was.device == is_.device and _layout(was) == _layout(is_):
            return source
        if was.device != is_.device:
            options["device"] = is_.device
        with self.build.after(node):
            cast = self._make(aten._to_copy.default, source, dtype=target, **options)
            if str(was.shape) != str(is_.shape):  # a copy broadcasts
                cast = self._make(aten.expand.default, cast, list(is_.shape))
                cast = self._make(aten.clone.default, cast, memory_format=torch.contiguous_format)
        return cast

    def _high(self, value: fx.Node) -> fx.Node:
        """``value`` as an operand in the region: raised with it, or converted once, which is exact."""
        if value in self.raised:
            return self.raised[value]
        return self._upcast(value) if dtype_rules.is_low_precision(dtype_of(value)) else value

    def _upcast(self, value: fx.Node) -> fx.Node:
        if value not in self._upcasts:
            member = self.origins.members.get(value)
            if member is not None and member.family is Family.CAST:
                self._upcasts[value] = self._recast(value)
            else:
                with self.build.after(value):
                    self._upcasts[value] = self._make(aten._to_copy.default, value, dtype=FP32)
        return self._upcasts[value]

    def _make(self, op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = self.build.call(op, *args, **kwargs)
        self._made.add(node)
        return node

    def _settle(self, node: fx.Node) -> None:
        """Point every user of a region node to the value it wants; users stand later and are settled already."""
        high, members, checks = self.raised[node], self.origins.members, []
        for user in list(node.users):
            member = members.get(user)
            if user in self._made or self.raised.get(user) is user or (has_several_results(node) and user.target is operator.getitem):
                continue
            if user.target in METADATA:
                checks.append(user)
            elif member is not None and member.family is Family.FACTORY:  # x_like: only the shape counts
                user.update_kwarg("dtype", dtype_of(user))
                if not self._moves(node, high):
                    user.replace_input_with(node, high)
            elif user in self.origins.sinks or (member is not None and member.low is None):
                user.replace_input_with(node, high)
            elif (user, node) in self._handed:
                continue
            elif not self._is_low(node) or (node not in self.bound and promotes(user)):
                self._hand_over(node, high, user)
            else:
                if high is node:
                    user.replace_input_with(node, self._restore(node))
                else:
                    self.left.add(node)
        for user in checks if node not in self.left else ():
            checked = self._restored.get(node, high)
            user.replace_input_with(node, checked)
            if user.target is aten._assert_tensor_metadata.default:
                _expect(user, dtype_of(checked))
        if high is not node and not node.users:
            self.build.graph.erase_node(node)

    def _hand_over(self, node: fx.Node, high: fx.Node, user: fx.Node) -> None:
        """Give ``user``, who takes float32, the value unrounded."""
        if high is not node and high in self._were_low and high in user.all_input_nodes:  # it takes the rounded one too
            user.replace_input_with(high, self._restore(high))
        user.replace_input_with(node, high)
        self._handed.add((user, high))

    def _is_low(self, node: fx.Node) -> bool:
        """Whether the model has ``node`` in low precision; where it has float32, who takes that is given it unrounded."""
        return node in self._were_low or dtype_rules.is_low_precision(dtype_of(node))

    def _restore(self, node: fx.Node) -> fx.Node:
        """``node`` rounded as the model rounded it."""
        if node not in self._restored:
            low = self.origins.members[node].low
            assert low is not None
            with self.build.after(node):
                self._restored[node] = self._make(aten._to_copy.default, node, dtype=low)
        return self._restored[node]

    def compare_exactly(self) -> list[tuple[fx.Node, torch.dtype | None, Entry]]:
        """Let integers be compared with low-precision floats in float32, which holds both; eager rounds the integers.

        An activation that is itself made of rounded integers is left alone: the two roundings may well belong together.
        """
        done = []
        pairs = [(n, v) for n in self.origins.sinks for v in n.all_input_nodes if dtype_rules.is_integral(dtype_of(v))]
        for node, integer in (*pairs, *self.origins.met):
            floats = [v for v in node.all_input_nodes if dtype_rules.is_low_precision(dtype_of(v))]
            if self.origins.family[node] is not Family.COMPARE or not floats:
                continue
            low = dtype_of(floats[0])
            bounds, proved = self.origins.exact.bounds(integer)
            if ranges.fits(bounds, (-exact_limit(low), exact_limit(low))):
                continue
            if all(self.origins.of(v) is not None or _is_unmixed(v) for v in floats):
                for value in floats:
                    node.replace_input_with(value, self._high(value))
                self.compared.add(node)
                done.append((node, low, Entry(integer, bounds, proved)))
        return done


def _is_unmixed(value: fx.Node) -> bool:
    """Whether no integer was converted on the way to ``value``; no is the answer for a long way."""
    pending, seen = [value], {value}
    for node in pending:
        if len(seen) > 64:
            return False
        for operand in node.all_input_nodes:
            if dtype_rules.is_integral(dtype_of(operand)) and dtype_of(operand) is not torch.bool:
                return False
            if operand not in seen:
                seen.add(operand)
                pending.append(operand)
    return True


def _retyped(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)([_retyped(v) for v in value])
    return meta.retype(value, FP32) if dtype_rules.is_low_precision(value.dtype) else value


def _layout(value: torch.Tensor) -> tuple[str, str]:
    return str(value.shape), str(value.stride())  # as text: comparing symbols would add guards


def _expect(check: fx.Node, dtype: torch.dtype | None) -> None:
    """Let a metadata assertion that names a dtype name this one."""
    if len(check.args) > 3 and check.args[3] is not None:
        check.update_arg(3, dtype)
    elif check.kwargs.get("dtype") is not None:
        check.update_kwarg("dtype", dtype)
