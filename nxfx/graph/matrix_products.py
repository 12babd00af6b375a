"""Every op that multiplies matrices, and where its factors stand: what an auto-cast of matrix products rounds.

Composite ops are here too (``lstm``, ``tensordot``): a captured graph has them whole, an emulation meets what they are made of.
An ``out=`` overload and an op that writes its argument have the factors of the op that returns a new tensor.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import fx

_FACTORS: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(["mm", "bmm", "mv", "dot", "vdot", "matmul", "linalg_matmul", "inner", "tensordot", "linear", "mkldnn_linear"], (0, 1)),
    **dict.fromkeys(["addmm", "baddbmm", "addbmm", "addmv", "_addmm_activation"], (1, 2)),
    **dict.fromkeys(["_grouped_mm", "_euclidean_dist", "cdist"], (0, 1)),
    **dict.fromkeys(["matrix_power", "linalg_matrix_power", "chain_matmul", "linalg_multi_dot", "cov", "corrcoef"], (0,)),
    **dict.fromkeys(["bilinear", "_trilinear"], (0, 1, 2)),
    "einsum": (1,),
    **dict.fromkeys(["convolution", "_convolution", "convolution_overrideable", "mkldnn_convolution", "conv_tbc"], (0, 1)),
    **dict.fromkeys([f"conv{kind}{n}d" for kind in ("", "_transpose") for n in (1, 2, 3)], (0, 1)),
    **dict.fromkeys(["thnn_conv2d", "_slow_conv2d_forward", "slow_conv3d", "slow_conv3d_forward", "conv_depthwise3d"], (0, 1)),
    **dict.fromkeys([f"slow_conv_{kind}{n}d" for kind in ("transpose", "dilated") for n in (2, 3)], (0, 1)),
    "convolution_backward": (0, 1, 2),
    **dict.fromkeys([f"_scaled_dot_product_{how}_attention" for how in ("flash", "efficient", "cudnn")], (0, 1, 2)),
    **dict.fromkeys(["scaled_dot_product_attention", "_scaled_dot_product_attention_math"], (0, 1, 2)),
    **dict.fromkeys(["_scaled_dot_product_fused_attention_overrideable", "_scaled_dot_product_flash_attention_for_cpu"], (0, 1, 2)),
    "_scaled_dot_product_flash_attention_for_cpu_backward": (0, 1, 2, 3),
    "_native_multi_head_attention": (0, 1, 2, 5, 7),
    "_transformer_encoder_layer_fwd": (0, 3, 5, 14, 16),
    **dict.fromkeys([f"{net}{part}" for net in ("lstm", "gru", "rnn_tanh", "rnn_relu") for part in ("", "_cell")], (0, 1, 2, 3)),
    "mkldnn_rnn_layer": (0, 1, 2, 5),
}
NAMES = frozenset(_FACTORS)


@functools.lru_cache(maxsize=4096)
def factor_positions(target: Any) -> tuple[int, ...]:
    """Where the factors stand among the arguments of ``target``, as tensors or lists of them; () for what is no matrix product."""
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return ()
    return _FACTORS.get(target._schema.name.removeprefix("aten::").removesuffix("_"), ())


def factors(node: fx.Node) -> list[fx.Node]:
    """The nodes that the matrix product ``node`` multiplies: its addend or bias is none. Empty for any other node."""
    found: list[fx.Node] = []
    if positions := factor_positions(node.target):
        fx.node.map_arg([node.args[p] for p in positions if p < len(node.args)], found.append)
    return found
