"""Which float values are made of integers and constants alone, and where low precision has rounded them.

A *member* is a float value computed by a listed op (:mod:`nxfx.analysis.float_ops`) from integers, numbers, tables
(parameters, buffers and constants that nobody writes) and other members. Everything else is an *activation*. There
are two sweeps: membership over the graph, rounding over the members only, which are a few dozen in a real model.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from nxfx.analysis import dtype_rules
from nxfx.analysis.exact_integers import ExactIntegers, accumulated, summed, times
from nxfx.analysis.float_ops import (
    BOUNDED,
    LOOKUPS,
    SENSITIVE,
    SEQUENCES,
    SUMS,
    Family,
    accumulates,
    compares_with_small,
    dtype_of,
    family_of,
    fill_of,
    is_complement,
    is_listed,
    representable,
    values_of,
)
from nxfx.analysis.intervals import Interval, Ranges, fits
from nxfx.analysis.provenance import Role, Source
from nxfx.graph import matrix_products, meta, outer_products


@dataclass(slots=True)
class Member:
    """What is known of a member, or of a table that one is made of.

    Attributes:
        family: the op's family; None for a table.
        values: the operands whose values it is made of: nodes and numbers.
        integer: an integer, a sequence or a size is among its ancestors.
        large: it comes with its magnitude: not through a bounded function, not as a truth value.
        learned: a parameter is among its ancestors.
        tables: buffers and constants among its ancestors, the first few.
        low: the low-precision dtype that holds the model's value exactly; None for a value of higher precision.
        rounded: low precision has rounded it, here or in an ancestor.
    """

    family: Family | None
    values: tuple[Any, ...] = ()
    integer: bool = False
    large: bool = False
    learned: bool = False
    tables: tuple[fx.Node, ...] = ()
    low: torch.dtype | None = None
    rounded: bool = False


@dataclass(slots=True)
class Entry:
    """Where integers beyond a low-precision dtype's exact range enter it.

    Attributes:
        integer: the integer operand, None for a sequence, a constant or a sum made in low precision.
        bounds: what the integers can be.
        proved: the bounds say more than the integer's dtype or an undeclared input does.
        mask: undeclared, and used only as ``1 - x`` or compared with a small number: taken for a 0/1 mask.
        root: the value that is converted, an integer or one in float32; None for one made in low precision.
    """

    integer: fx.Node | None
    bounds: Interval
    proved: bool
    mask: bool = False
    root: fx.Node | None = None


class IntegerOrigins:
    """The members of a graph.

    Args:
        gm: a functional ATen graph with ``val`` on every node.
        sources: placeholder or ``get_attr`` node name → origin.
        ranges: gives the integer intervals; called only when an integer meets low precision.

    Attributes:
        members: node → :class:`Member`, in topological order.
        entries: node → :class:`Entry`: the casts, promotions and factories that round integers.
        sinks: comparisons, integer casts and complex numbers made of members: they read float32 as it is.
        sensitive: members and sinks that magnify the rounding of an integer-derived operand.
        met: ``(node, integer operand)`` where integers are combined with an activation.
        exact: the members that are exact integers.
        products: matrix products with a large integer-derived factor that bf16 does not hold exactly.
        family: of the nodes that any of these hold.
        inputs: the graph's placeholders and ``get_attr`` nodes.
    """

    def __init__(self, gm: fx.GraphModule, sources: Mapping[str, Source], ranges: Callable[[], Ranges]) -> None:
        self.sources = sources
        self.members: dict[fx.Node, Member] = {}
        self.entries: dict[fx.Node, Entry] = {}
        self.sinks: dict[fx.Node, None] = {}
        self.sensitive: list[fx.Node] = []
        self.met: list[tuple[fx.Node, fx.Node]] = []
        self.products: list[fx.Node] = []
        self.family: dict[fx.Node, Family] = {}
        self.inputs: list[fx.Node] = []
        self.exact = ExactIntegers(sources, functools.cache(ranges))
        self._tables: dict[fx.Node, Member | None] = {}
        for node in gm.graph.nodes:
            if node.op in ("placeholder", "get_attr"):
                self.inputs.append(node)
            elif node.op == "call_function":
                family = family_of(node)
                if family is not None:
                    self.family[node] = family
                    self._admit(node, family)
                if factors := matrix_products.factors(node):
                    self._note_product(node, factors)
        for node, member in self.members.items():
            self._follow_rounding(node, member)
        for node in self.sinks:
            self._watch(node, self.family[node], values_of(node, self.family[node]))

    def of(self, value: Any) -> Member | None:
        """The member or table that ``value`` is; None for an activation, an integer or a number."""
        if not isinstance(value, fx.Node):
            return None
        return self.members.get(value) if value.op == "call_function" else self._table(value)

    # --- membership --------------------------------------------------------------------------------------------------

    def _table(self, node: fx.Node) -> Member | None:
        if node not in self._tables:
            source, dtype = self.sources.get(node.name), dtype_of(node)
            role = source.role if source is not None and not source.mutated else None
            held, learned = role in (Role.PARAMETER, Role.BUFFER, Role.CONSTANT), role is Role.PARAMETER
            low = dtype if dtype_rules.is_low_precision(dtype) else None
            # Whoever computes a table again says that its rounding matters: it counts as made of integers.
            integer = source is not None and (source.recomputed or (role is Role.CONSTANT and _holds_positions(source.value, low)))
            is_table = source is not None and source.is_table
            table = Member(None, integer=integer, large=integer, learned=learned, tables=(node,) if is_table else (), low=low)
            self._tables[node] = table if held and dtype is not None and dtype.is_floating_point else None
        return self._tables[node]

    def _admit(self, node: fx.Node, family: Family) -> None:
        dtype = dtype_of(node)
        if dtype is None or (family is Family.OUTER and outer_products.operands(node) is None):
            return
        if node.target is operator.getitem and node.args[0] not in self.members:
            return  # one output of an op that is not listed; another may well be an integer
        values = values_of(node, family)
        made_of: list[Member] = []
        integer = large = node.target in SEQUENCES or _is_rounded(fill_of(node), dtype)
        for value in values:
            if not isinstance(value, fx.Node):
                continue
            kind = dtype_of(value)
            if kind is None or not kind.is_floating_point:
                integer = integer or kind is not None or isinstance(value.meta.get("val"), torch.SymInt)
                large = large or kind is not torch.bool
                continue
            member = self.of(value)
            is_activation = member is not None and member.learned and not member.integer and node.target in LOOKUPS
            if member is None or is_activation or (member.learned and not is_listed(node)):
                self._meet(node, family, values)
                return
            made_of.append(member)
        if dtype.is_floating_point:
            tables = dict.fromkeys(t for m in made_of for t in m.tables)
            learned = any(m.learned for m in made_of)
            counts = node.target in SUMS or accumulates(node) or any(_is_rounded(v, dtype) for v in values)
            integer = integer or any(m.integer for m in made_of) or (counts and not tables and not learned)
            large = large or any(m.large for m in made_of) or (integer and counts)
            self.members[node] = Member(family, values, integer, large and node.target not in BOUNDED, learned, tuple(tables)[:4])
        elif not made_of:
            return
        elif dtype.is_complex:  # half-precision parts would make another complex dtype
            low = any(map(dtype_rules.is_low_precision, map(dtype_of, node.all_input_nodes)))
            if (family is Family.COMPLEX and not low) or (family is Family.COMPUTE and dtype is torch.complex64):
                self.sinks[node] = None
        elif family in (Family.COMPARE, Family.CAST):
            self.sinks[node] = None

    def _meet(self, node: fx.Node, family: Family, values: tuple[Any, ...]) -> None:
        if family in (Family.COMPUTE, Family.SELECT, Family.COMPARE):
            for value in values:
                kind = dtype_of(value) if isinstance(value, fx.Node) else None
                if dtype_rules.is_integral(kind) and kind is not torch.bool:
                    self.met.append((node, value))

    def _note_product(self, node: fx.Node, factors: list[fx.Node]) -> None:
        limit = dtype_rules.exact_integer(torch.bfloat16)
        for value in factors:
            member = self.members.get(value)
            if member is not None and member.large and not fits(self.exact.of(value) or (0, limit + 1), (-limit, limit)):
                self.products.append(node)
                return

    # --- rounding ----------------------------------------------------------------------------------------------------

    def _follow_rounding(self, node: fx.Node, member: Member) -> None:
        dtype = dtype_of(node)
        assert dtype is not None and member.family is not None
        made_of = [m for m in map(self.of, member.values) if m is not None]
        member.rounded = any(m.rounded for m in made_of)
        if member.family in (Family.CAST, Family.MOVE) and made_of:
            member.low = made_of[0].low
        if dtype_rules.is_low_precision(dtype):
            was, member.low = member.low, dtype
            entry = self._entry(node, member, dtype)
            if entry is not None:
                self.entries[node] = entry
                if not entry.proved and member.family in (Family.CAST, Family.SELECT) and self._is_mask(node):
                    entry.mask = True
                    self.exact.masks.add(node)
                member.rounded |= not entry.mask
            elif not (member.family is Family.MOVE or (member.family is Family.CAST and was == dtype)):
                member.rounded |= self._rounds(node, member, dtype)
        self._watch(node, member.family, member.values)

    def _entry(self, node: fx.Node, member: Member, dtype: torch.dtype) -> Entry | None:
        limit = dtype_rules.exact_integer(dtype)
        if member.family is Family.FACTORY:
            inexact = member.integer and self.exact.of(node) is None
            return Entry(None, (-limit - 1, limit + 1), True) if inexact else None
        for value in member.values if member.family is not Family.MOVE else ():
            if not isinstance(value, fx.Node):
                continue
            is_integer = dtype_rules.is_integral(dtype_of(value))
            bounds, proved = self.exact.bounds(value) if is_integer else (None, True)
            if node.target in SUMS or accumulates(node):  # it is the sum that is rounded
                added = bounds or self.exact.of(value)
                count = summed(node) if node.target in SUMS else accumulated(node)
                bounds = None if added is None else times(added, count) or (-limit - 1, limit + 1)
            elif member.family is Family.CAST and not is_integer:  # an integer that was float32 meanwhile
                value = self._unconverted(value)
                is_integer = dtype_rules.is_integral(dtype_of(value))
                bounds, proved = self.exact.bounds(value) if is_integer else (self._counted(value), True)
            if bounds is not None and not fits(bounds, (-limit, limit)):
                return Entry(value if is_integer else None, bounds, proved, root=value)
        made = self.exact.made(node) if member.family is Family.COMPUTE else None
        return Entry(None, made, True) if made is not None and not fits(made, (-limit, limit)) else None

    def _counted(self, value: fx.Node) -> Interval | None:
        """Bounds of a sequence or sum of integers in float32, or of what arithmetic makes of some; None for anything else."""
        member = self.members.get(value)
        if member is None or not member.integer:
            return None
        if value.target in SEQUENCES or value.target in SUMS:
            return self.exact.of(value)
        return self.exact.made(value) if member.family is Family.COMPUTE else None

    def _unconverted(self, value: fx.Node) -> fx.Node:
        """What ``value`` was before float32 and views of it; ``value`` itself once low precision has held it."""
        while (member := self.members.get(value)) is not None and member.family in (Family.CAST, Family.MOVE) and member.low is None:
            value = member.values[0]
        return value

    def _rounds(self, node: fx.Node, member: Member, dtype: torch.dtype) -> bool:
        if member.family is Family.SELECT:
            return not all(representable(float(v), dtype) for v in member.values if isinstance(v, (int, float)))
        fill = fill_of(node)
        if isinstance(fill, (int, float)):
            return not representable(float(fill), dtype)
        return self.exact.of(node) is None

    def _watch(self, node: fx.Node, family: Family, values: tuple[Any, ...]) -> None:
        """Note ``node`` when it magnifies the rounding of an integer-derived operand."""
        is_index = node in self.sinks and family is Family.CAST and dtype_of(node) is not torch.bool
        if is_index or family is Family.COMPARE or node.target in SENSITIVE:
            made_of = [m for m in map(self.of, values) if m is not None]
            if any(m.rounded for m in made_of) and any(m.integer for m in made_of):
                self.sensitive.append(node)

    def _is_mask(self, entry: fx.Node) -> bool:
        """Whether ``entry`` is used as a number only in ``1 - x`` and comparisons that large integers cannot change."""
        pending, seen, found = [entry], {entry}, False
        while pending:
            for user in pending.pop().users:
                member = self.members.get(user)
                if is_complement(user) or compares_with_small(user):
                    found = True
                elif member is None:
                    if user in self.sinks and dtype_of(user) is not torch.bool:
                        return False
                elif member.family in (Family.CAST, Family.MOVE, Family.SELECT):
                    if user not in seen:
                        seen.add(user)
                        pending.append(user)
                elif member.family is not Family.FACTORY:
                    return False
        return found


def _holds_positions(value: torch.Tensor | None, low: torch.dtype | None) -> bool:
    """Whether a constant of the model's code holds integers beyond those that low precision holds exactly: ``torch.tensor([999, 750])``."""
    if value is None or low is None or isinstance(value, meta.FakeTensor) or value.is_meta or not 0 < value.numel() <= 64:
        return False
    held = value.double().abs()
    return bool((held == held.floor()).all()) and dtype_rules.exact_integer(low) < float(held.max()) < 2**31


def _is_rounded(number: Any, dtype: torch.dtype) -> bool:
    """A constant beyond ``dtype``'s exact integers that it rounds; limits such as ``finfo.min`` are no positions."""
    if not isinstance(number, (int, float)) or not dtype_rules.is_low_precision(dtype):
        return False
    return dtype_rules.exact_integer(dtype) < abs(number) < 2**31 and not representable(float(number), dtype)
