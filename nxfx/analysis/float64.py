"""Where float64 can become float32 without changing a bit, and what becomes of values that float32 cannot hold."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from nxfx.analysis import dtype_rules
from nxfx.analysis.integer_ops import METADATA_ASSERT, POINTWISE
from nxfx.analysis.intervals import arg
from nxfx.analysis.range_rules import PRESERVING_VIEWS
from nxfx.graph import meta

aten = torch.ops.aten

_WIDE = (torch.float64, torch.complex128)
_LARGEST = torch.finfo(torch.float32).max
_FILLS = {
    aten.full.default: 1,
    aten.full_like.default: 1,
    aten.scalar_tensor.default: 0,
}
# What is computed in float64 to lose less in long sums.
_ACCUMULATING = frozenset(
    ["mm", "bmm", "matmul", "addmm", "baddbmm", "linear", "einsum", "dot", "mv", "sum", "mean", "cumsum", "cumprod", "prod", "var",
     "var_mean", "std", "norm", "linalg_vector_norm", "native_layer_norm", "layer_norm", "rms_norm", "logsumexp", "softmax", "_softmax",
     "log_softmax", "_log_softmax"]
)  # fmt: skip
_REGION = 64  # ops between the casts
_FIXED = {aten.zeros.default: 0.0, aten.zeros_like.default: 0.0, aten.ones.default: 1.0, aten.ones_like.default: 1.0}


def filled_with(node: fx.Node) -> torch.Tensor | None:
    """The one value of a constant factory as a 0-d float64 tensor, None for anything else."""
    number = _FIXED.get(node.target) if node.target in _FIXED else None
    if node.target in _FILLS:
        number = arg(node, _FILLS[node.target], "fill_value")
    return torch.tensor(number, dtype=torch.float64) if isinstance(number, (int, float)) else None


def rounds_at_every_use(node: fx.Node, value: torch.Tensor | None) -> bool:
    """Whether a float64 constant may be rounded to float32 at once because each of its uses does so first.

    A use rounds when it is a cast to float32, or when the constant is 0-d and torch's promotion takes the dtype of a float32
    operand with dimensions. Half-precision uses would round twice, so there ``value`` must be a float32 value to begin with.
    """
    return value is not None and bool(node.users) and all(_rounds(user, node, _is_fp32(value)) for user in node.users)


def _is_fp32(value: torch.Tensor) -> bool:
    if isinstance(value, meta.FakeTensor) or value.is_meta or value.is_complex():
        return False
    back = value.to(torch.float32).to(value.dtype)
    return bool(((back == value) | value.isnan()).all())


def _rounds(user: fx.Node, node: fx.Node, is_fp32: bool) -> bool:
    if user.target is aten._to_copy.default and set(user.kwargs) == {"dtype"}:
        return _takes(meta.dtype_of(user), is_fp32)
    if user.target in PRESERVING_VIEWS:
        return bool(user.users) and all(_rounds(u, user, is_fp32) for u in user.users)
    if user.target not in POINTWISE or node.meta["val"].dim() != 0 or meta.dtype_of(user) in _WIDE:
        return False
    others = [n.meta["val"] for n in user.all_input_nodes if n is not node and meta.is_tensor(n)]
    return any(o.dim() > 0 and _takes(o.dtype, is_fp32) for o in others)


def _takes(dtype: torch.dtype | None, is_fp32: bool) -> bool:
    return dtype == torch.float32 or (is_fp32 and dtype_rules.is_low_precision(dtype))


def done_on_purpose(node: fx.Node) -> list[str]:
    """Sums, products and norms that are computed in float64 between a cast up (``node``) and casts down, by op name.

    Empty when nothing of the kind is in between, or float64 leaves the region other than by a cast.
    """
    if node.target is not aten._to_copy.default or dtype_rules.is_wide(meta.dtype_of(node.args[0])):
        return []
    pending, seen, found = [node], {node}, dict[str, None]()
    while pending and len(seen) <= _REGION:
        for user in pending.pop().users:
            name = str(getattr(user.target, "__name__", user.target)).split(".")[0]
            if user.target is METADATA_ASSERT:
                continue
            if name in _ACCUMULATING:
                found[name] = None
            if meta.dtype_of(user) in _WIDE:
                if user not in seen:
                    seen.add(user)
                    pending.append(user)
            elif user.target is not aten._to_copy.default:
                return []
    return list(found) if not pending else []


def saturated(number: Any) -> Any:
    """``number`` within float32's finite values; infinities stay infinite."""
    if isinstance(number, (int, float)) and math.isfinite(number) and abs(number) > _LARGEST:
        return math.copysign(_LARGEST, number)
    return number
