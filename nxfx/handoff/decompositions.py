"""Composites that torch-mlir's own decompositions say in a costly or unsupported way, said better.

``var`` runs in float64 there, and so does an integer division that rounds down; ``group_norm``, ``unfold`` and ``upsample_nearest``
gather by int64 indices, ``argmax`` and ``eye`` count in int64, ``topk`` is given a type that its readers refuse, a remainder has the
sign of the dividend, pooling to one value writes strides. Each of these computes what
PyTorch documents for the op: integers exactly, floats up to the order of a sum.

Private torch API used here: ``torch._decomp.get_decompositions``, tested on torch 2.9 and 2.13.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._decomp import get_decompositions

aten = torch.ops.aten


def _axes(x: Tensor, dim: Sequence[int] | int | None) -> list[int]:
    if isinstance(dim, int):
        dim = [dim]
    return [d % max(x.dim(), 1) for d in dim] if dim else list(range(x.dim()))


def _var_mean(x: Tensor, dim: Sequence[int] | None, *, correction: float | None = None, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    axes = _axes(x, dim)
    count = math.prod(x.shape[d] for d in axes)
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x  # as the kernels accumulate
    mean = wide.mean(axes, keepdim=True)
    away = wide - mean
    divisor = max(count - (1 if correction is None else correction), 0)
    var = (away * away).sum(axes, keepdim=True) / divisor
    if not keepdim:
        var, mean = var.squeeze(axes), mean.squeeze(axes)
    return var.to(x.dtype), mean.to(x.dtype)


def _var(x: Tensor, dim: Sequence[int] | None = None, *, correction: float | None = None, keepdim: bool = False) -> Any:
    if x.is_complex():
        return NotImplemented
    return _var_mean(x, dim, correction=correction, keepdim=keepdim)[0]


def _std(x: Tensor, dim: Sequence[int] | None = None, *, correction: float | None = None, keepdim: bool = False) -> Any:
    return NotImplemented if x.is_complex() else _var(x, dim, correction=correction, keepdim=keepdim).sqrt()


def _var_mean_op(x: Tensor, dim: Sequence[int] | None = None, *, correction: float | None = None, keepdim: bool = False) -> Any:
    return NotImplemented if x.is_complex() else _var_mean(x, dim, correction=correction, keepdim=keepdim)


def _normalised(x: Tensor, axes: list[int], eps: float) -> tuple[Tensor, Tensor, Tensor]:
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    mean = wide.mean(axes, keepdim=True)
    away = wide - mean
    rstd = ((away * away).mean(axes, keepdim=True) + eps).rsqrt()
    return away * rstd, mean, rstd


def _layer_norm(x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float) -> Any:
    out, mean, rstd = _normalised(x, list(range(x.dim() - len(normalized_shape), x.dim())), eps)
    out = out if weight is None else out * weight
    out = out if bias is None else out + bias
    return out.to(x.dtype), mean, rstd


def _group_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, N: int, C: int, HxW: int, group: int, eps: float) -> Any:
    grouped, mean, rstd = _normalised(x.reshape(N, group, C // group * HxW), [2], eps)
    shape = [1, C] + [1] * (x.dim() - 2)
    out = grouped.reshape(x.shape)
    out = out if weight is None else out * weight.reshape(shape)
    out = out if bias is None else out + bias.reshape(shape)
    return out.to(x.dtype), mean.squeeze(2).to(x.dtype), rstd.squeeze(2).to(x.dtype)


def _extreme_position(x: Tensor, dim: int | None, keepdim: bool, extreme: Callable[..., Tensor]) -> Any:
    """The first position of the extreme value; the first nan's where there is one. Counted in int32."""
    if dim is None:
        shape = [1] * x.dim()
        found = _extreme_position(x.reshape(-1), 0, False, extreme)
        return found.reshape(shape) if keepdim else found
    if x.dim() == 0 or x.shape[dim] > torch.iinfo(torch.int32).max:
        return NotImplemented
    hit = x == extreme(x, [dim], keepdim=True)
    if x.is_floating_point():
        hit = hit | x.isnan()
    size = x.shape[dim]
    shape = [size if d == dim % x.dim() else 1 for d in range(x.dim())]
    positions = torch.arange(size, dtype=torch.int32, device=x.device).reshape(shape)
    found = torch.where(hit, positions, size).to(torch.int32).amin([dim], keepdim=keepdim)
    # Without a hit all are infinite: torch-xla's amax of these is the largest finite value.
    return torch.where(found < size, found, 0).to(torch.int64)


def _argmax(x: Tensor, dim: int | None = None, keepdim: bool = False) -> Any:
    return _extreme_position(x, dim, keepdim, torch.amax)


def _argmin(x: Tensor, dim: int | None = None, keepdim: bool = False) -> Any:
    return _extreme_position(x, dim, keepdim, torch.amin)


def _topk(x: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
    values, indices = aten.sort.default(x, dim, largest)
    return values.narrow(dim, 0, k), indices.narrow(dim, 0, k)


def _both(x: Tensor, y: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.result_type(x, y)
    return x.to(dtype), y.to(dtype) if isinstance(y, Tensor) else torch.full((), y, dtype=dtype, device=x.device)


def _fmod(x: Tensor, y: Any) -> Any:
    return aten.fmod.Tensor(*_both(x, y))


def _remainder(x: Tensor, y: Any) -> Any:
    """The remainder with the sign of the divisor, as in Python; torch-mlir gives it the sign of the dividend."""
    x, y = _both(x, y)
    rest = aten.fmod.Tensor(x, y)
    return torch.where((rest != 0) & ((rest < 0) != (y < 0)), rest + y, rest)


def _floor_divide(x: Tensor, y: Any) -> Any:
    """Integers divided and rounded down without a detour through floats."""
    x, y = _both(x, y)
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        return NotImplemented
    quotient, rest = aten.div.Tensor_mode(x, y, rounding_mode="trunc"), aten.fmod.Tensor(x, y)
    return torch.where((rest != 0) & ((rest < 0) != (y < 0)), quotient - 1, quotient)


def _div_mode(x: Tensor, y: Any, *, rounding_mode: str | None = None) -> Any:
    return _floor_divide(x, y) if rounding_mode == "floor" else NotImplemented


def _eye(n: int, m: int | None = None, *, dtype: Any = None, layout: Any = None, device: Any = None, pin_memory: Any = None) -> Tensor:
    rows = torch.arange(n, dtype=torch.int32, device=device)
    columns = rows if m is None else torch.arange(m, dtype=torch.int32, device=device)
    return (rows.unsqueeze(1) == columns).to(dtype or torch.get_default_dtype())


def _unfold(x: Tensor, dimension: int, size: int, step: int) -> Any:
    if x.dim() == 0:
        return NotImplemented
    dim = dimension % x.dim()
    starts = torch.arange((x.shape[dim] - size) // step + 1, dtype=torch.int32, device=x.device) * step
    positions = starts.unsqueeze(1) + torch.arange(size, dtype=torch.int32, device=x.device)
    windows = x.index_select(dim, positions.reshape(-1)).reshape(*x.shape[:dim], *positions.shape, *x.shape[dim + 1 :])
    return windows.movedim(dim + 1, -1)


def _nearest(x: Tensor, sizes: Sequence[int], scales: Sequence[float | None]) -> Tensor:
    """Each output position reads ``floor(position * scale)``, computed in float32 as the kernels do."""
    for dim, (out, scale) in enumerate(zip(sizes, scales, strict=True), x.dim() - len(sizes)):
        size = x.shape[dim]
        if out != size or scale not in (None, 1.0):
            ratio = float(np.float32(1.0 / scale if scale else size / out))
            positions = (torch.arange(out, dtype=torch.float32, device=x.device) * ratio).to(torch.int32)
            x = x.index_select(dim, positions.clamp(max=size - 1))
    return x


def _upsample_nearest(x: Tensor, output_size: Sequence[int], *scales: float | None, **named: float | None) -> Tensor:
    given = [*scales, *(named[name] for name in ("scales", "scales_d", "scales_h", "scales_w") if name in named)]
    return _nearest(x, output_size, [None] * (len(output_size) - len(given)) + given)


def _upsample_nearest_vec(x: Tensor, output_size: Sequence[int] | None, scale_factors: Sequence[float] | None) -> Tensor:
    if output_size is not None:
        return _nearest(x, output_size, [None] * len(output_size))
    assert scale_factors is not None
    sizes = [math.floor(n * f) for n, f in zip(x.shape[2:], scale_factors, strict=True)]
    return _nearest(x, sizes, scale_factors)


def _pool_to_one(x: Tensor, output_size: Sequence[int]) -> Any:
    if any(n != 1 for n in output_size):
        return NotImplemented
    return x.mean(list(range(x.dim() - len(output_size), x.dim())), keepdim=True)


def _constant_pad(x: Tensor, pad: Sequence[int], value: Any = 0) -> Any:
    """A float fills integers with what it becomes as one of them."""
    if isinstance(value, float) and not x.is_floating_point() and not x.is_complex():
        return aten.constant_pad_nd.default(x, pad, int(value))
    return NotImplemented


TABLE: dict[Any, Callable[..., Any]] = {
    aten.var.correction: _var,
    aten.std.correction: _std,
    aten.var_mean.correction: _var_mean_op,
    aten.native_layer_norm.default: _layer_norm,
    aten.native_group_norm.default: _group_norm,
    aten.argmax.default: _argmax,
    aten.argmin.default: _argmin,
    aten.constant_pad_nd.default: _constant_pad,
    aten.topk.default: _topk,
    aten.fmod.Scalar: _fmod,
    aten.remainder.Scalar: _remainder,
    aten.remainder.Tensor: _remainder,
    aten.floor_divide.default: _floor_divide,
    aten.div.Tensor_mode: _div_mode,
    aten.div.Scalar_mode: _div_mode,
    aten.eye.default: _eye,
    aten.eye.m: _eye,
    aten.unfold.default: _unfold,
    **{getattr(aten, f"upsample_nearest{n}d").default: _upsample_nearest for n in (1, 2, 3)},
    **{getattr(aten, f"upsample_nearest{n}d").vec: _upsample_nearest_vec for n in (1, 2, 3)},
}

# Where torch has a decomposition of the overload that a composite leads to, and torch-mlir names another overload or none.
TORCH = (
    aten.upsample_bilinear2d, aten.upsample_bicubic2d, aten.upsample_linear1d, aten.upsample_trilinear3d,
    aten.native_batch_norm,
)



def complete(table: Mapping[Any, Callable[..., Any]]) -> dict[Any, Callable[..., Any]]:
    """``table`` of a lowering with what it lacks and with what is better said here."""
    return {**get_decompositions(TORCH), **table, **TABLE}


# Composites that are taken apart before a decomposition table sees them.
COMPOSITES: dict[Any, Callable[..., Any]] = {
    aten.adaptive_avg_pool1d.default: _pool_to_one,
    aten.adaptive_avg_pool2d.default: _pool_to_one,
    aten.adaptive_avg_pool3d.default: _pool_to_one,
}
