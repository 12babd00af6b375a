"""How lift-int-casts says what it found."""

from __future__ import annotations

import torch

from nxfx.analysis import dtype_rules
from nxfx.analysis.float_ops import dtype_of
from nxfx.analysis.integer_origin import Entry


def exact_limit(dtype: torch.dtype | None) -> int:
    """Up to which number ``dtype`` holds every integer."""
    return dtype_rules.exact_integer(dtype) if dtype is not None else 0


def short(dtype: torch.dtype | None) -> str:
    """``bfloat16`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


def described(entry: Entry) -> str:
    """The integers that enter low precision, and how large they can be."""
    largest = max(abs(entry.bounds[0]), abs(entry.bounds[1]))
    if entry.integer is None:
        return "a sequence or sum of integers"
    name = short(dtype_of(entry.integer))
    return f"{name} up to {largest}" if entry.proved else f"{name} of undeclared range"
