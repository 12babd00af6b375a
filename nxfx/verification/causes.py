"""What kind of fault a deviation looks like."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from nxfx.graph.meta import dtype_of
from nxfx.verification.deviation import Deviation

aten = torch.ops.aten
_CASTS = frozenset({aten._to_copy.default, aten.to.dtype, torch.ops.prims.convert_element_type.default})
_ACCUMULATE = frozenset(
    {"mm", "bmm", "addmm", "baddbmm", "matmul", "linear", "dot", "mv", "einsum", "sum", "mean", "cumsum", "cumprod", "prod", "logsumexp",
     "softmax", "_softmax", "_log_softmax", "log_softmax", "var", "std", "var_mean", "norm", "linalg_vector_norm", "native_layer_norm",
     "layer_norm", "rms_norm", "group_norm", "native_group_norm", "batch_norm", "convolution", "conv1d", "conv2d", "conv3d",
     "scaled_dot_product_attention", "avg_pool2d", "index_add", "scatter_add"}
)  # fmt: skip
# Above this the value is another one, not the same one rounded.
_OTHER_VALUE = 0.05
_LOWEST_EPS = 2**-7


def cause_of(node: fx.Node, original: fx.Node, found: Deviation) -> str:
    """The cause that ``found`` at ``node`` fits: one of the words of :class:`~nxfx.verification.localisation.Blame`."""
    if node.op in ("get_attr", "placeholder"):
        return "rounded weight" if node.op == "get_attr" and found.local < _OTHER_VALUE else "rewrite"
    if found.kind == "integer":
        return "integer wrap" if _is_integer(dtype_of(node)) and _narrower(node, original) else "rewrite"
    if found.kind == "special":
        return "mask overflow"
    if found.kind == "shape":
        return "rewrite"
    if node.target in _CASTS or _loses_dtype(node, original):
        return "cast" if found.local < 1 else "rewrite"
    if _name(node.target) in _ACCUMULATE and found.local < _OTHER_VALUE:
        return "reordering" if found.local < 2**-16 else "accumulation"
    return "rewrite"


def _name(target: Any) -> str:
    return str(getattr(target, "_opname", getattr(target, "__name__", "")))


def _is_integer(dtype: torch.dtype | None) -> bool:
    return dtype is not None and not dtype.is_floating_point and not dtype.is_complex and dtype is not torch.bool


def _narrower(node: fx.Node, original: fx.Node) -> bool:
    ours, theirs = dtype_of(original), dtype_of(node)
    return ours is not None and theirs is not None and theirs.itemsize < ours.itemsize


def _loses_dtype(node: fx.Node, original: fx.Node) -> bool:
    ours, theirs = dtype_of(original), dtype_of(node)
    if ours is None or theirs is None or not ours.is_floating_point or not theirs.is_floating_point:
        return False
    return torch.finfo(theirs).eps > torch.finfo(ours).eps
