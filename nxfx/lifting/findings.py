"""What lift-int-casts leaves as it is, and says: integers that stay rounded, tables that were, products that an auto-cast would round."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from nxfx.analysis import dtype_rules, ranges
from nxfx.analysis.float_ops import MAGNIFIERS, METADATA, SENSITIVE, Family, compares_with_small, dtype_of, family_of, is_pointwise, op_name
from nxfx.analysis.integer_origin import Entry, IntegerOrigins
from nxfx.analysis.provenance import Source
from nxfx.analysis.rounded_tables import rounded_table_errors
from nxfx.graph import matrix_products, walk
from nxfx.lifting.edits import Lift
from nxfx.lifting.words import described, exact_limit, short
from nxfx.report.findings import Finding, Severity
from nxfx.report.locations import locate

aten = torch.ops.aten
_FAR = 32  # nodes after which nothing is said any more


def kept(origins: IntegerOrigins, lift: Lift) -> list[Finding]:
    """Integers that are still rounded, and why."""
    found = []
    for node, entry in origins.entries.items():
        if not any(user.target not in METADATA for user in node.users):
            continue
        if entry.mask:
            found.append(_rounded(node, entry, "is taken for a 0/1 mask, since it is used as 1 - x", origins))
        elif node in lift.left or node not in lift.raised:
            body = next((u for u in node.users if walk.is_higher_order(u)), None)
            what = f"is rounded to {short(dtype_of(node))} as it {f'goes into {op_name(body)}' if body else 'meets an activation'}"
            found.append(_rounded(node, entry, what, origins))
    for node, integer in origins.met:
        low = next((d for d in map(dtype_of, node.all_input_nodes) if dtype_rules.is_low_precision(d)), None)
        if node in lift.compared or low is None or dtype_of(node) not in (low, torch.bool):
            continue
        bounds, proved = origins.exact.bounds(integer)
        if not ranges.fits(bounds, (-exact_limit(low), exact_limit(low))):
            what = f"is rounded to {short(low)} as {op_name(node)} promotes it with an activation"
            found.append(_rounded(node, Entry(integer, bounds, proved), what, origins))
    return found


def _rounded(node: fx.Node, entry: Entry, what: str, origins: IntegerOrigins) -> Finding:
    severity = Severity.WARNING if entry.proved else Severity.INFO
    fix = "combine them in float32 and cast the result"
    if not entry.proved and entry.integer is not None:
        fix = f"declare what it can be, e.g. ranges={{{origins.exact.culprit(entry.integer) or 'input'!r}: (0, 1)}}"
    return Finding.at(node, "NX101", severity, f"{described(entry)} {what}", fix)


def early(graph: fx.Graph, origins: IntegerOrigins) -> list[Finding]:
    """Ops that magnify what low precision has rounded of integers and an activation together: neither is made of integers alone."""
    found = []
    for target in MAGNIFIERS:
        for node in graph.find_nodes(op="call_function", target=target):
            is_index = dtype_rules.is_integral(dtype_of(node)) and dtype_of(node) is not torch.bool
            if target is aten._to_copy.default and not is_index:
                continue
            met = _meeting(node, origins)
            if met is not None:
                low, what = short(dtype_of(met)), "an integer is made of them" if is_index else op_name(node)
                message = f"{low} rounds positions combined with an activation ({op_name(met)}) before {what}"
                fix = "cast the activation to float32 before it is combined with positions, and back after that"
                found.append(Finding.at(node, "NX103", Severity.WARNING, message, fix))
    return found


def _meeting(node: fx.Node, origins: IntegerOrigins) -> fx.Node | None:
    """Where integer-derived values went into the low-precision activation that ``node`` reads; None where they did not."""
    pending = [v for v in node.all_input_nodes if _is_activation(v, origins)]
    seen = set(pending)
    for reached in pending:
        if dtype_rules.is_low_precision(dtype_of(reached)) and any(_is_position(v, origins) for v in reached.all_input_nodes):
            return reached
        if len(seen) < _FAR and (is_pointwise(reached) or family_of(reached) in (Family.CAST, Family.MOVE, Family.SELECT)):
            fresh = [v for v in reached.all_input_nodes if v not in seen and _is_activation(v, origins)]
            seen.update(fresh)
            pending += fresh
    return None


def _is_activation(value: fx.Node, origins: IntegerOrigins) -> bool:
    dtype = dtype_of(value)
    return value.op == "call_function" and value not in origins.members and dtype is not None and dtype.is_floating_point


def _is_position(value: fx.Node, origins: IntegerOrigins) -> bool:
    """Whether ``value`` is an integer, or is made of some other than by waves, which are no larger than one."""
    if dtype_rules.is_integral(dtype_of(value)):
        return dtype_of(value) is not torch.bool and not ranges.fits(origins.exact.bounds(value)[0], (-1, 1))
    member = origins.members.get(value)
    return member is not None and member.large


def tables(origins: IntegerOrigins, sources: Mapping[str, Source]) -> list[Finding]:
    found = []
    for node, source, low, error in rounded_table_errors(origins, sources):
        severity = Severity.WARNING if error > 0.01 else Severity.INFO
        message = f"{source.name!r} was rounded to {short(low)}: {op_name(node)} is off by up to {error:.2g}"
        fix = f"keep {source.name!r} in float32: .bfloat16() and .half() round it; compute it again after that"
        found.append(Finding.at(node, "NX102", severity, message, fix))
    return found


def float32_products(origins: IntegerOrigins) -> dict[str, str]:
    """Matrix products that have to run in float32, by node name, and what a smaller type would cost: integers that bf16 rounds."""
    found = {}
    for node in origins.products:
        if dtype_of(node) is not torch.float32:
            continue
        bounds = [origins.exact.of(v) for v in matrix_products.factors(node) if (m := origins.members.get(v)) is not None and m.large]
        largest = max((max(map(abs, b)) for b in bounds if b is not None), default=None)
        cost = "an integer-derived factor would be off by one part in 512"
        if largest is not None:
            step = 2 ** (largest.bit_length() - 8)
            cost = f"integers up to {largest} would be off by up to {max(step // 2, 1)}"
        found[node.name] = f"{_named(node)} in bf16: {cost}"
    return found


def float32_uses(origins: IntegerOrigins) -> dict[str, str]:
    """Ops that magnify what an auto-cast of every float32 value would round of integers, by node name."""
    found: dict[str, str] = {}
    for value, member in origins.members.items():
        if member.integer and dtype_of(value) is torch.float32:
            exact = origins.exact.of(value) if any(map(_is_step, value.users)) else None
            held = exact is not None and ranges.fits(exact, (-exact_limit(torch.bfloat16), exact_limit(torch.bfloat16)))
            found |= {n.name: _named(n) for n in value.users if n.target in SENSITIVE or (_is_step(n) and not held)}
    return found


def _is_step(node: fx.Node) -> bool:
    """Whether a small change of what ``node`` reads can be another answer: a comparison, an integer."""
    family = family_of(node)
    if family is Family.CAST:
        return dtype_rules.is_integral(dtype_of(node)) and dtype_of(node) is not torch.bool
    return family is Family.COMPARE and not compares_with_small(node)


def _named(node: fx.Node) -> str:
    where = locate(node)
    line = f" at {where.file}:{where.line}" if where.file else ""
    return f"`{op_name(node)}` ({node.name}{line})"
