"""The size of an error: bits, units in the last place, absolute and relative differences of two tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from nxfx.errors import UsageError

MAX_ULP = torch.iinfo(torch.int64).max
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Sign-magnitude formats, whose bits order like their values. float8_e8m0fnu and float4 are not among them.
ORDERED_BITS = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
    torch.float8_e4m3fn: torch.int8,
    torch.float8_e4m3fnuz: torch.int8,
    torch.float8_e5m2: torch.int8,
    torch.float8_e5m2fnuz: torch.int8,
}



@dataclass(frozen=True)
class ErrorStats:
    """Absolute error of one tensor against its float64 reference (complex: the modulus)."""

    max: float
    mean: float
    p999: float
    nan_mismatch: int


@dataclass(frozen=True)
class ErrorMeasures:
    """How far ``actual`` is from ``expected`` where both are finite (complex: worst component)."""

    max_abs: float
    mean_abs: float
    max_rel: float
    max_ulp: int


@torch.no_grad()
def error_against(reference_fp64: torch.Tensor, value: torch.Tensor) -> ErrorStats:
    """Absolute error of ``value`` (any dtype) against a float64 or complex128 reference of the same shape.

    Equal infinities have no error, different ones an infinite one. Elements that are NaN on either side are left out
    of the error; ``nan_mismatch`` counts those that are NaN on one side only.

    Raises:
        UsageError: the reference is not float64 or complex128, or the shapes differ.
    """
    if reference_fp64.dtype not in (torch.float64, torch.complex128):
        raise UsageError(f"the reference must be float64 or complex128, not {dtype_name(reference_fp64.dtype)}")
    if reference_fp64.shape != value.shape:
        raise UsageError(f"shapes differ: reference {shape_text(reference_fp64)}, value {shape_text(value)}")
    reference, value = on_host(reference_fp64), on_host(value)
    if value.is_complex() and not reference.is_complex():
        raise UsageError(f"a {dtype_name(value.dtype)} value needs a complex128 reference")
    value = value.to(reference.dtype)
    comparable = ~(reference.isnan() | value.isnan())
    error = torch.where(reference == value, 0.0, (reference - value).abs())[comparable]
    error = error.nan_to_num(nan=math.inf, posinf=math.inf)  # complex inf - inf
    nan_mismatch = int((reference.isnan() != value.isnan()).sum())
    if error.numel() == 0:
        return ErrorStats(0.0, 0.0, 0.0, nan_mismatch)
    position = math.ceil(0.999 * error.numel())
    return ErrorStats(float(error.max()), float(error.mean()), float(error.kthvalue(position).values), nan_mismatch)


@torch.no_grad()
def ulp_distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """How many representable values lie between ``a`` and ``b``, element by element, as int64 of the same shape.

    Both zeros are one value; the infinities follow the largest finite values. Two NaNs are 0 apart; a NaN and a number
    are ``iinfo(int64).max`` apart, which is also where float64 distances saturate.

    Raises:
        UsageError: dtypes or shapes differ, or the dtype is not float16, bfloat16, float32, float64, float8_e4m3* or
            float8_e5m2*.
    """
    if a.dtype != b.dtype or a.shape != b.shape:
        raise UsageError(
            f"cannot measure {dtype_name(a.dtype)} {shape_text(a)} against {dtype_name(b.dtype)} {shape_text(b)} in ulp"
        )
    if a.dtype not in ORDERED_BITS:
        raise UsageError(f"{dtype_name(a.dtype)} has no ulp distance")
    a, b = on_host(a), on_host(b)
    rank_a, rank_b = rank(a), rank(b)
    low, high = torch.minimum(rank_a, rank_b), torch.maximum(rank_a, rank_b)
    overflows = (low < 0) & (high > MAX_ULP + low.clamp(max=0))
    distance = torch.where(overflows, MAX_ULP, high - low)
    nan_a, nan_b = widen(a).isnan(), widen(b).isnan()
    return torch.where(nan_a & nan_b, 0, torch.where(nan_a | nan_b, MAX_ULP, distance))


def on_host(tensor: torch.Tensor) -> torch.Tensor:
    """A dense CPU tensor of the same dtype and values, without lazy conjugate or negative bits."""
    dense = tensor.detach() if tensor.layout == torch.strided else tensor.detach().to_dense()
    return dense.cpu().resolve_conj().resolve_neg()


def components(tensor: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def component_dtype(tensor: torch.Tensor) -> torch.dtype:
    return tensor.dtype.to_real()


def widen(tensor: torch.Tensor) -> torch.Tensor:
    """The components as float64: exact for every narrower float, NaN and the sign of zero included."""
    return components(tensor).to(torch.float64)


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    parts = components(tensor)
    return parts if parts.dtype == torch.bool else parts.view(_BITS[parts.element_size()])


def rank(tensor: torch.Tensor) -> torch.Tensor:
    """int64 that orders like the float: both zeros 0, the smallest subnormals 1 and -1."""
    ordered = ORDERED_BITS[tensor.dtype]
    bits = tensor.view(ordered).to(torch.int64)
    return torch.where(bits < 0, torch.iinfo(ordered).min - bits, bits)


def first_index(mask: torch.Tensor) -> tuple[int, ...]:
    position = int(mask.flatten().to(torch.uint8).argmax())
    return tuple(int(i) for i in np.unravel_index(position, tuple(mask.shape)))


def element(tensor: torch.Tensor, index: tuple[int, ...]) -> str:
    element = tensor[index]
    if element.dtype.is_floating_point and element.dtype not in ORDERED_BITS:
        return f"{int(bits_of(element)):#x}"
    return repr(element.item())


def shape_text(tensor: torch.Tensor) -> str:
    return str(list(tensor.shape))


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
