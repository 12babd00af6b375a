"""The one dtype table."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class DtypeRule:
    """What nxfx knows of a dtype.

    Attributes:
        narrow: the 32-bit (or 2 x 32-bit) dtype that stands for it on Neuron; itself when it needs none.
        exact_integer: every integer with magnitude up to this is representable (float dtypes).
        low_precision: integers as small as a sequence length are rounded.
    """

    narrow: torch.dtype
    exact_integer: int = 0
    low_precision: bool = False


# exact_integer = 2 ** (explicit mantissa bits + 1), from the formats' definitions (IEEE 754, bfloat16, OCP fp8).
TABLE: dict[torch.dtype, DtypeRule] = {
    torch.int64: DtypeRule(torch.int32),
    torch.uint64: DtypeRule(torch.uint64),
    torch.int32: DtypeRule(torch.int32),
    torch.uint32: DtypeRule(torch.uint32),
    torch.int16: DtypeRule(torch.int16),
    torch.uint16: DtypeRule(torch.uint16),
    torch.int8: DtypeRule(torch.int8),
    torch.uint8: DtypeRule(torch.uint8),
    torch.bool: DtypeRule(torch.bool),
    torch.float64: DtypeRule(torch.float32, 2**53),
    torch.float32: DtypeRule(torch.float32, 2**24),
    torch.float16: DtypeRule(torch.float16, 2**11, low_precision=True),
    torch.bfloat16: DtypeRule(torch.bfloat16, 2**8, low_precision=True),
    torch.float8_e4m3fn: DtypeRule(torch.float8_e4m3fn, 2**4, low_precision=True),
    torch.float8_e5m2: DtypeRule(torch.float8_e5m2, 2**3, low_precision=True),
    torch.complex128: DtypeRule(torch.complex64, 2**53),
    torch.complex64: DtypeRule(torch.complex64, 2**24),
}


def narrow(dtype: torch.dtype) -> torch.dtype:
    """The dtype that stands for ``dtype`` where 64 bits are not wanted."""
    rule = TABLE.get(dtype)
    return rule.narrow if rule else dtype


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that ``dtype`` stands for: the inverse of :func:`narrow`."""
    return next(d for d, rule in TABLE.items() if rule.narrow is dtype and d is not dtype)


def is_wide(dtype: torch.dtype | None) -> bool:
    """int64, float64 or complex128."""
    return dtype is not None and narrow(dtype) != dtype


def is_low_precision(dtype: torch.dtype | None) -> bool:
    """bf16, fp16 or fp8."""
    rule = TABLE.get(dtype) if dtype is not None else None
    return rule is not None and rule.low_precision


def exact_integer(dtype: torch.dtype) -> int:
    """The largest N such that every integer in [-N, N] is representable in the float ``dtype``."""
    return TABLE[dtype].exact_integer


def is_integral(dtype: torch.dtype | None) -> bool:
    """An integer or bool dtype."""
    return dtype is not None and not dtype.is_floating_point and not dtype.is_complex


def integer_bounds(dtype: torch.dtype) -> tuple[int, int]:
    """Inclusive bounds of an integer or bool dtype."""
    if dtype is torch.bool:
        return (0, 1)
    info = torch.iinfo(dtype)
    return (info.min, info.max)
