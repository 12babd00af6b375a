"""Inputs like the example that hold what breaks rewrites: ends of ranges, nan and infinities, empty and single sizes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from nxfx.boundary import InputRule
from nxfx.capture.structure import Flat, flatten
from nxfx.captured_call import CapturedCall
from nxfx.graph import meta
from nxfx.observe.variations import Call, duplicate, variations

_ENFORCED = ("declared", "implied by use", "assumed")
_SPECIAL = (math.nan, math.inf, -math.inf, -0.0, 0.0)


def generated_calls(call: Call, captured: CapturedCall) -> Iterator[tuple[str, Call]]:
    """``(what is special about it, call)``: the example first.

    Integers stay within the ranges that the boundary enforces; where it enforces none that says something of the model, between
    the example's own extremes. Sizes change only where the capture left them dynamic.
    """
    flat = flatten(call, share=True)
    rules = _rules(captured)
    yield "example", duplicate(call, flat)
    limits = [None if r is None or r.low is None or r.high is None else (r.low, r.high) for r in rules]
    yield from variations(call, flat, limits)
    if any(limits):
        yield "lowest values", _filled(call, flat, rules, 0)
        yield "highest values", _filled(call, flat, rules, 1)
    if any(isinstance(t, torch.Tensor) and t.is_floating_point() for t in flat.leaves):
        yield "nan and infinities", _special(call, flat)
    yield from _sizes(call, flat, captured)


def _rules(captured: CapturedCall) -> list[InputRule | None]:
    """One rule per leaf, None where nothing is known of it."""
    rules = {rule.name: rule for rule in captured.boundary.inputs}
    found = []
    for name in captured.convention.input_names:
        rule = rules.get(name)
        found.append(rule if rule is not None and rule.why in _ENFORCED else None)
    return found


def _filled(call: Call, flat: Flat, rules: list[InputRule | None], end: int) -> Call:
    leaves: list[Any] = []
    for leaf, rule in zip(flat.leaves, rules, strict=True):
        bound = None if rule is None else (rule.low, rule.high)[end]
        plain = isinstance(leaf, torch.Tensor) and bound is not None and not leaf.is_floating_point() and leaf.dtype is not torch.bool
        leaves.append(torch.full_like(leaf, bound) if plain else _copy(leaf))  # type: ignore[arg-type]
    return duplicate(call, flat, leaves)


def _special(call: Call, flat: Flat) -> Call:
    """Every seventh element of every float input is a nan, an infinity or a signed zero, in turn."""
    leaves = []
    for leaf in flat.leaves:
        made = _copy(leaf)
        if isinstance(made, torch.Tensor) and made.is_floating_point() and made.numel():
            line = made.reshape(-1).clone()
            places = torch.arange(0, line.numel(), 7)
            line[places] = torch.tensor(_SPECIAL, dtype=line.dtype)[torch.arange(len(places)) % len(_SPECIAL)]
            made = line.reshape(made.shape)
        leaves.append(made)
    return duplicate(call, flat, leaves)


def _sizes(call: Call, flat: Flat, captured: CapturedCall) -> Iterator[tuple[str, Call]]:
    """Other values for every dynamic size: one, none, one more."""
    names = captured.convention.input_names
    passed = [i for i, n in enumerate(names) if n not in captured.state_inputs]
    values = dict(zip(passed, captured.placeholders, strict=True))
    known = {
        meta.symbol_of(size): flat.leaves[i].shape[d]
        for i, value in values.items()
        for d, size in enumerate(value.shape)
        if meta.is_symbol(size)
    }
    if not known:
        return
    for name, change in (("size 1", lambda n: 1), ("size 0", lambda n: 0), ("one more", lambda n: n + 1)):
        sizes = {symbol: change(n) for symbol, n in known.items()}
        leaves = []
        for i, leaf in enumerate(flat.leaves):
            made = _copy(leaf)
            for d, size in enumerate(values[i].shape if i in values else ()):
                wanted = meta.size_given(size, sizes)
                if wanted is not None and wanted >= 0 and not isinstance(size, int):
                    positions = torch.arange(wanted) % max(made.shape[d], 1)
                    made = made.index_select(d, positions.to(made.device)) if made.shape[d] else made
            leaves.append(made)
        yield name, duplicate(call, flat, leaves)


def _copy(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf
