"""Which neuronx-cc flags a graph needs, and why."""

from __future__ import annotations

from collections import Counter

import torch
from torch import fx

from nxfx.analysis.dtype_rules import is_integral
from nxfx.graph import meta, walk
from nxfx.targets import Target

aten = torch.ops.aten

# The ops that `--auto-cast=matmult` rounds (neuronx-cc command-line reference, "--auto-cast").
MATMULS = frozenset(
    {aten.mm.default, aten.bmm.default, aten.addmm.default, aten.baddbmm.default, aten.matmul.default, aten.linear.default,
     aten.convolution.default, aten.conv1d.default, aten.conv2d.default, aten.conv3d.default,
     aten.scaled_dot_product_attention.default, aten.einsum.default, aten.addmv.default, aten.mv.default, aten.dot.default}
)  # fmt: skip
_INTEGER_SUMS = frozenset({aten.scatter_add.default, aten.index_add.default})


def compiler_args(graph_module: fx.GraphModule, target: Target) -> dict[str, str]:
    """Flag → why this graph needs it on ``target``.

    Sources: neuronx-cc command-line reference (``--auto-cast``) and the release notes of SDK 2.27 and 2.32 (defaults).
    """
    counts = Counter[str]()
    for scope in walk.scopes(graph_module):
        for node in scope.graph_module.graph.nodes:
            if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
                continue
            dtypes = {meta.dtype_of(n) for n in node.all_input_nodes}
            if node.target in MATMULS:
                counts["fp32 matmul"] += torch.float32 in dtypes
                counts["integer dot"] += all(is_integral(d) for d in dtypes)
            counts["integer scatter-add"] += node.target in _INTEGER_SUMS and is_integral(meta.dtype_of(node))
            counts["int64"] += meta.dtype_of(node) is torch.int64
    flags: dict[str, str] = {}
    if counts["fp32 matmul"]:
        flags["--auto-cast=none"] = (
            f"{counts['fp32 matmul']} fp32 matmuls: `matmult`, the default before SDK 2.27, would compute them in bf16"
        )
    inexact = counts["integer dot"] + counts["integer scatter-add"]
    if inexact:
        flags["--implicit-integer-downcast=none"] = (
            f"{inexact} integer dots or scatter-adds: with `all` they run in fp32, exact only to 2**24; `none` refuses them instead"
        )
    if counts["int64"] and target.native_int64:
        flags["--native-int64=enabled"] = f"{counts['int64']} int64 values are kept: without it they are downcast to int32"
    return flags
