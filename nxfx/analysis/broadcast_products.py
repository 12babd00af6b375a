"""Which matrix products with one term a sum are worth turning into broadcast products, and what that promises."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from nxfx.analysis import dtype_rules
from nxfx.analysis.finiteness import Finiteness
from nxfx.analysis.float_ops import Family, dtype_of
from nxfx.analysis.integer_origin import IntegerOrigins, Member
from nxfx.analysis.intervals import fits
from nxfx.analysis.provenance import Premise, Source
from nxfx.graph import meta, outer_products

_MOST_MULTIPLICATIONS = 1 << 24


def worth_spreading(origins: IntegerOrigins) -> list[fx.Node]:
    """Products of integer-derived values, other than those of integers that bf16 holds exactly (with each other, or with weights)."""
    limit = dtype_rules.exact_integer(torch.bfloat16)
    found = []
    for node, member in origins.members.items():
        if member.family is Family.OUTER and member.integer:
            exact = [origins.exact.of(v) for v in member.values[:2] if not _is_weight(origins.of(v))]
            if not all(e is not None and fits(e, (-limit, limit)) for e in exact):
                found.append(node)
    return found


def worth_spreading_terms(origins: IntegerOrigins, most: int) -> list[fx.Node]:
    """Products of integer-derived values and tables with two to ``most`` terms a sum, small enough for element-wise arithmetic.

    Below 2**24 multiplications they are a small part of any model; above, a matrix engine is what they are for.
    """
    found = []
    for node in origins.products:
        count = outer_products.terms(node)
        if count is None or not 2 <= count <= most or any(origins.of(v) is None for v in outer_products.factors(node)):
            continue
        sizes = [s for s in meta.val(node).shape if type(s) is int]  # of a dynamic one nothing is known
        if count * math.prod(sizes) <= _MOST_MULTIPLICATIONS:
            found.append(node)
    return found


def bit_equal(node: fx.Node, origins: IntegerOrigins, sources: Mapping[str, Source]) -> list[Premise] | None:
    """The premises under which the broadcast product equals ``node`` bit for bit; None when it need not.

    Matrix kernels give ``-1 * 0`` either sign as they please, and those for bf16 flush subnormal numbers: measured on
    torch 2.9 and 2.13, CPU, where shapes decide. Without signs, and in float32, nothing is left to chance.
    """
    if dtype_of(node) not in (torch.float32, torch.float64) or len(origins.members[node].values) > 2:
        return None
    premises: list[Premise] = []
    for value in origins.members[node].values:
        found = _unsigned(value, origins, sources)
        if found is None:
            return None
        premises += found
    return premises


def _is_weight(member: Member | None) -> bool:
    return member is not None and member.learned and not member.integer


def _unsigned(value: Any, origins: IntegerOrigins, sources: Mapping[str, Source]) -> list[Premise] | None:
    node = value
    while (member := origins.of(node)) is not None and member.family in (Family.CAST, Family.MOVE):
        (node,) = member.values
    if dtype_rules.is_integral(dtype_of(node)):
        return [] if origins.exact.bounds(node)[0][0] >= 0 else None
    facts = Finiteness(sources)
    return facts.premises(value) if facts.of(value).non_negative and facts.of(value).finite else None
