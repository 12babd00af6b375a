"""Test-only helpers: inputs that hold what breaks rewrites."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch.utils import _pytree as pytree

Range = tuple[int, int]

# Around the limits of exact integers in bf16, fp16 and fp32, of the narrow integer types, and of 32 bits.
INTEGER_LANDMARKS = (255, 257, 2047, 2049, 2**15, 2**16, 2**24 + 1, 2**31 - 1, 2**31, 2**32, 2**53 + 1)


def float_corners(dtype: torch.dtype) -> list[float]:
    """nan and, with both signs, inf, 0, 1, 1 + eps, smallest and largest subnormal, smallest normal, largest value."""
    info = torch.finfo(dtype)
    subnormal, largest_subnormal = info.tiny * info.eps, info.tiny * (1 - info.eps)
    magnitudes = [0.0, 1.0, 1 + info.eps, subnormal, largest_subnormal, info.tiny, info.max, float("inf")]
    return [float("nan"), *magnitudes, *(-magnitude for magnitude in magnitudes)]


def int_corners(dtype: torch.dtype, bounds: Range | None = None) -> list[int]:
    """0, ±1, the ends of the dtype or of ``bounds``, their neighbours and the landmarks, all within both."""
    low, high = _int_bounds(dtype, bounds)
    landmarks = [sign * value for value in INTEGER_LANDMARKS for sign in (1, -1)]
    candidates = [0, 1, -1, low, low + 1, high - 1, high, *landmarks]
    return sorted({value for value in candidates if low <= value <= high})


def random_like(t: torch.Tensor, seed: int, bounds: Range | None = None) -> torch.Tensor:
    """Ordinary values: normal floats; integers within ``bounds``, else between ``t``'s extremes; fair bools."""
    rng = random.Random(seed)
    if t.dtype == torch.bool:
        return _filled(t, lambda: rng.random() < 0.5)
    if t.is_complex():
        return _filled(t, lambda: complex(rng.gauss(0, 1), rng.gauss(0, 1)))
    if t.is_floating_point():
        return _filled(t, lambda: rng.gauss(0, 1))
    low, high = _int_bounds(t.dtype, bounds or _extremes(t))
    return _filled(t, lambda: rng.randint(low, high))


def nasty_like(t: torch.Tensor, seed: int, bounds: Range | None = None) -> torch.Tensor:
    """Every corner of the dtype (integers: within ``bounds``) in random places, the rest half corners, half ordinary.

    A tensor too small for all corners gets another selection from each seed.
    """
    rng = random.Random(seed)
    if t.dtype == torch.bool:
        return random_like(t, seed)
    if t.is_floating_point() or t.is_complex():
        corners: list[Any] = float_corners(t.dtype)
        ordinary: Callable[[], Any] = partial(rng.gauss, 0, 1)
    else:
        corners = int_corners(t.dtype, bounds)
        ordinary = partial(rng.randint, *_int_bounds(t.dtype, bounds))
    count = t.numel() * (2 if t.is_complex() else 1)
    values = rng.sample(corners, len(corners))[:count]
    values += [rng.choice(corners) if rng.random() < 0.5 else ordinary() for _ in range(count - len(values))]
    rng.shuffle(values)
    source = iter(values)
    return _filled(t, (lambda: complex(next(source), next(source))) if t.is_complex() else lambda: next(source))


def corner_inputs(
    example_inputs: Any, ranges: Mapping[int | str, Range] | None = None, *, seeds: int = 2
) -> list[tuple[str, Any]]:
    """``(readable id, inputs)`` cases of the example's structure: as given, extremes, nasty values and random ones.

    Args:
        example_inputs: a tuple of positional or a dict of named arguments, nested as the model wants them.
        ranges: integers an argument may hold, both ends included, by position or name. Undeclared integers stay between
            the example's own extremes, since they may be indices.
        seeds: how many nasty and how many random cases.

    Raises:
        KeyError: ``ranges`` names an argument that the example has not.
    """
    ranges = dict(ranges or {})
    items = list(example_inputs.items()) if isinstance(example_inputs, Mapping) else list(enumerate(example_inputs))
    if unknown := set(ranges) - {key for key, _ in items}:
        raise KeyError(f"ranges for unknown arguments: {unknown}")

    def rebuild(make: Callable[[torch.Tensor, Range | None], torch.Tensor]) -> Any:
        changed = {}
        for key, item in items:
            declared = ranges.get(key)
            leaves, spec = pytree.tree_flatten(item)
            made = [make(x, declared or _extremes(x)) if isinstance(x, torch.Tensor) else x for x in leaves]
            changed[key] = pytree.tree_unflatten(made, spec)
        return changed if isinstance(example_inputs, Mapping) else type(example_inputs)(changed.values())

    makers: dict[str, Callable[[torch.Tensor, Range | None], torch.Tensor]] = {
        "example": lambda t, _: t.detach().clone().requires_grad_(t.requires_grad),
        "lowest": partial(_extreme_like, highest=False),
        "highest": partial(_extreme_like, highest=True),
    }
    for seed in range(seeds):
        makers[f"nasty-{seed}"] = partial(_seeded, nasty_like, seed)
        makers[f"random-{seed}"] = partial(_seeded, random_like, seed)
    return [(case, rebuild(make)) for case, make in makers.items()]


def _seeded(
    make: Callable[[torch.Tensor, int, Range | None], torch.Tensor], seed: int, t: torch.Tensor, bounds: Range | None
) -> torch.Tensor:
    return make(t, seed, bounds)


def _extreme_like(t: torch.Tensor, bounds: Range | None, *, highest: bool) -> torch.Tensor:
    if t.dtype == torch.bool:
        return _filled(t, lambda: highest)
    if t.is_floating_point() or t.is_complex():
        info = torch.finfo(t.dtype)
        return _filled(t, lambda: info.max if highest else info.min)
    low, high = _int_bounds(t.dtype, bounds)
    return _filled(t, lambda: high if highest else low)


def _extremes(t: torch.Tensor) -> Range | None:
    if t.is_floating_point() or t.is_complex() or t.dtype == torch.bool:
        return None
    values = t.flatten().tolist()
    return (min(values), max(values)) if values else (0, 0)


def _int_bounds(dtype: torch.dtype, bounds: Range | None) -> Range:
    info = torch.iinfo(dtype)
    low, high = bounds or (info.min, info.max)
    if low > high or low < info.min or high > info.max:
        raise ValueError(f"[{low}, {high}] is no range of {dtype}")
    return low, high


def _filled(t: torch.Tensor, draw: Callable[[], Any]) -> torch.Tensor:
    """A tensor of ``t``'s shape, dtype, device, strides (where it has no overlap) and ``requires_grad``."""
    wide = torch.complex128 if t.is_complex() else torch.float64 if t.is_floating_point() else t.dtype
    values = torch.tensor([draw() for _ in range(t.numel())], dtype=wide).reshape(t.shape)
    return torch.empty_like(t, requires_grad=False).copy_(values).requires_grad_(t.requires_grad)
