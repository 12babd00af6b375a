"""Which neuronx-cc flags a graph needs, and why. Each depends on the graph and the table of facts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx

from nxfx.analysis.dtype_rules import is_low_precision
from nxfx.analysis.intervals import arg
from nxfx.analysis.wide_edges import wide_int64
from nxfx.graph import matrix_products, meta, walk
from nxfx.targets import Target

aten = torch.ops.aten

# The ops that accumulate, besides matrix products (neuronx-cc command-line reference, "--enable-mixed-precision-accumulation").
_ACCUMULATE = frozenset(
    {"sum", "mean", "softmax", "_softmax", "log_softmax", "_log_softmax", "logsumexp", "cumsum", "var", "std", "var_mean",
     "layer_norm", "native_layer_norm", "group_norm", "native_group_norm", "rms_norm", "batch_norm", "avg_pool2d", "norm"}
)  # fmt: skip


def compiler_args(graph_module: fx.GraphModule, target: Target, float32_products: Mapping[str, str] | None = None) -> dict[str, str]:
    """Flag → why this graph is to be compiled with it on ``target``.

    Args:
        float32_products: node name → what it would cost to run this matrix product in a smaller type, as the passes found.

    ``--auto-cast=none`` is for these, and for any float32 matrix product where the SDK's default would round it.

    The two integer flags are always there where the SDK has them: whether their defaults changed after SDK 2.32 is not
    established. Every flag here is legal for the target and its SDK.

    Sources: neuronx-cc command-line reference and the release notes of SDK 2.27 and 2.32, row by row in :mod:`nxfx.targets.facts`.
    """
    counts = Counter[str]()
    for node in _calls(graph_module):
        counts.update(_needs(node))
    flags: dict[str, str] = {}
    if float32_products:
        costs = list(float32_products.values())
        flags["--auto-cast=none"] = "; ".join(costs[:3]) + (f"; and {len(costs) - 3} more" if len(costs) > 3 else "")
    elif counts["fp32 matmul"] and target.auto_cast == "matmult":
        what = _number(counts["fp32 matmul"], "fp32 matmul")
        flags["--auto-cast=none"] = f"{what}: `matmult`, the default of SDK {target.sdk}, would compute them in bf16"
    if counts["low-precision sum"] and not target.fp32_accumulation:
        what = _number(counts["low-precision sum"], "sum of bf16 or fp16 values", "sums of bf16 or fp16 values")
        flags["--enable-mixed-precision-accumulation"] = f"{what}: fp32 accumulation is not the default before SDK 2.27"
    if counts["infinity"] and target.saturate_infinity:
        what = _number(counts["infinity"], "infinity", "infinities")
        flags["--enable-saturate-infinity"] = f"{what} in the graph: {target.core} turns them into nan in transposes on the matmul engine"
    if target.native_int64:
        kept = wide_int64(graph_module)
        flags[f"--native-int64={'enabled' if kept else 'disabled'}"] = (
            f"{_number(kept, 'int64 value')} kept: `disabled` would compute them in int32 (`enabled` is 20 to 30 % slower)"
            if kept
            else f"no int64 value is kept: `enabled` would only be slower; the default of SDK {target.sdk} is {target.native_int64_default}"
        )
    if target.integer_downcast_flag:
        flags["--implicit-integer-downcast=none"] = (
            "integer dots, scatter-adds and reductions over ranks that are left are refused, not rounded to fp32 in silence "
            f"(`all`); the default of SDK {target.sdk} is {target.integer_downcast_default}"
        )
    return flags


def together(*flags: dict[str, str]) -> dict[str, str]:
    """The flags of graphs that are compiled alike: int64 is native when one of them keeps some."""
    merged = {flag: why for of_one in reversed(flags) for flag, why in of_one.items()}
    if "--native-int64=enabled" in merged:
        merged.pop("--native-int64=disabled", None)
    return merged


def _calls(graph_module: fx.GraphModule) -> Iterator[fx.Node]:
    for scope in walk.scopes(graph_module):
        for node in scope.graph_module.graph.nodes:
            if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
                yield node


def _needs(node: fx.Node) -> Iterator[str]:
    if factors := matrix_products.factors(node):
        dtypes = set(map(meta.dtype_of, factors))
        if torch.float32 in dtypes:
            yield "fp32 matmul"
        elif any(map(is_low_precision, dtypes)):
            yield "low-precision sum"
    elif node.target._schema.name.partition("::")[2] in _ACCUMULATE and is_low_precision(meta.dtype_of(node)):  # type: ignore[union-attr]
        yield "low-precision sum"
    if node.target is aten.scaled_dot_product_attention.default and _is_masked(node):
        yield "infinity"  # what the mask leaves out becomes minus infinity
    if any(map(_is_infinite, (*node.args, *node.kwargs.values()))):
        yield "infinity"


def _is_masked(attention: fx.Node) -> bool:
    return bool(arg(attention, 5, "is_causal", False)) or meta.dtype_of(arg(attention, 3, "attn_mask")) is torch.bool


def _is_infinite(value: Any) -> bool:
    return isinstance(value, float) and math.isinf(value)


def _number(count: int, one: str, many: str = "") -> str:
    return f"{count} {one if count == 1 else many or one + 's'}"
