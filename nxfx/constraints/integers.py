"""Integer operators that the compiler has for fp32 or for 32 bits only: computed there where that is exact, else reported."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from nxfx.analysis import dtype_rules
from nxfx.analysis.intervals import INT32
from nxfx.analysis.range_rules import overloads
from nxfx.constraints.base import LIMIT, Checker, Constraint, Rule, items
from nxfx.constraints.operators import check_sort, op_name
from nxfx.graph import meta
from nxfx.report.findings import Severity

aten = torch.ops.aten

TOPK = Constraint(
    "NX506",
    "NCC_EVRF013",
    "top-k and sort take no 32-bit or 64-bit integers",
    "convert to float32 before it where every value is within 2^24; bound the values (ranges=, clamp) and nxfx does it",
)
SCATTER_REDUCE = Constraint(
    "NX507",
    "NCC_EVRF016",
    "a scatter that reduces takes floats only",
    "reduce in float32 where values and results stay within 2^24; bound the values (ranges=, clamp) and nxfx does it",
)
SHIFT = Constraint("NX508", "NCC_EVRF022", "an arithmetic shift to the right is for 32 bits", "cast the shifted value to int32")

_REFUSED_BY_TOPK = (torch.int32, torch.int64)


def _topk(check: Checker, node: fx.Node) -> None:
    """Top-k, sort and argsort of integers: fp32 orders integers within 2^24 alike, ties included."""
    operand = node.args[0]
    if meta.dtype_of(operand) not in _REFUSED_BY_TOPK:
        return
    if check.within(operand) and (not isinstance(node.meta["val"], (list, tuple)) or items(node) is not None):
        check.later(lambda: _through_fp32(check, node))
    else:
        check.report(node, TOPK, f"`{op_name(node)}` of {_dtype(operand)} values that may pass 2^24")


def _sort(check: Checker, node: fx.Node) -> None:
    check_sort(check, node)
    _topk(check, node)


def _through_fp32(check: Checker, node: fx.Node) -> None:
    """Values in fp32, and back to integers; indices are what they were."""
    operand = node.args[0]
    assert isinstance(operand, fx.Node) and isinstance(node.target, torch._ops.OpOverload)
    dtype = operand.meta["val"].dtype
    with check.build.before(node):
        made = check.build.call(node.target, check.build.cast(operand, torch.float32), *node.args[1:], **node.kwargs)
        readers = items(node)
        if not isinstance(node.meta["val"], (list, tuple)):
            node.replace_all_uses_with(made)
        else:
            for index, reader in readers or []:
                item = check.build.call(operator.getitem, made, index)
                reader.replace_all_uses_with(check.build.cast(item, dtype) if index == 0 else item)
                reader.graph.erase_node(reader)
    check.rewritten(node, "topk-fp32", f"{op_name(node)} of {_dtype(operand)}", "of float32, exact below 2^24")


def _scatter_reduce(check: Checker, node: fx.Node) -> None:
    """``scatter_reduce(self, dim, index, src, reduce)`` or ``index_reduce`` (the same) of integers or bools."""
    dtype = meta.dtype_of(node)
    if not dtype_rules.is_integral(dtype):
        return
    if _reduces_exactly(check, node):
        check.later(lambda: _reduce_in_fp32(check, node))
    else:
        check.report(node, SCATTER_REDUCE, f"`{op_name(node)}` ({node.args[4]}) of {_dtype(node)} values that may pass 2^24 on the way")


def _reduces_exactly(check: Checker, node: fx.Node) -> bool:
    """Whether every partial result, in whatever order, is an integer that fp32 holds."""
    base, dim, index, source, reduce = node.args[:5]
    if not (check.within(base) and check.within(source)):
        return False
    if reduce in ("amax", "amin"):
        return True
    if reduce != "sum" or meta.dtype_of(node) is torch.bool or not (isinstance(index, fx.Node) and isinstance(dim, int)):
        return False
    shape = index.meta["val"].shape
    times = shape[dim] if shape else 1
    most = [max(map(abs, check.ranges.proved(n) or (LIMIT, LIMIT))) for n in (base, source) if isinstance(n, fx.Node)]
    return isinstance(times, int) and most[0] + times * most[-1] <= LIMIT


def _reduce_in_fp32(check: Checker, node: fx.Node) -> None:
    base, dim, index, source, reduce = node.args[:5]
    assert isinstance(base, fx.Node) and isinstance(source, fx.Node) and isinstance(node.target, torch._ops.OpOverload)
    with check.build.before(node):
        operands = check.build.cast(base, torch.float32), dim, index, check.build.cast(source, torch.float32)
        made = check.build.call(node.target, *operands, reduce, *node.args[5:], **node.kwargs)
        node.replace_all_uses_with(check.build.cast(made, node.meta["val"].dtype))
    check.rewritten(node, "scatter-reduce-fp32", f"{reduce} of {_dtype(node)}", "of float32, exact below 2^24")


# --- shifts ----------------------------------------------------------------------------------------------------------


def _shift(check: Checker, node: fx.Node) -> None:
    """``a >> b``. What is shifted into is the sign either way: int32 gives the 8-bit or 16-bit result for every amount."""
    dtype = meta.dtype_of(node)
    if dtype is torch.int64 and not check.within(node.args[0], INT32):
        check.report(node, SHIFT, f"`{op_name(node)}` of int64 values that may not fit 32 bits", Severity.WARNING)
    if dtype not in (torch.int8, torch.int16):
        return
    low, high = dtype_rules.integer_bounds(dtype)
    numbers = [a for a in node.args if not isinstance(a, fx.Node)]
    if all(isinstance(n, int) and low <= n <= high for n in numbers):
        check.later(lambda: _shift_in_int32(check, node))
    else:
        check.report(node, SHIFT, f"`{op_name(node)}` of {_dtype(node)} values by an amount that its dtype does not hold")


def _shift_in_int32(check: Checker, node: fx.Node) -> None:
    assert isinstance(node.target, torch._ops.OpOverload)
    with check.build.before(node):
        wide = [check.build.cast(a, torch.int32) if isinstance(a, fx.Node) else a for a in node.args]
        made = check.build.call(node.target, *wide, **node.kwargs)
        node.replace_all_uses_with(check.build.cast(made, node.meta["val"].dtype))
    check.rewritten(node, "shift-int32", f"shift of {_dtype(node)}", "of int32")


def _dtype(node: Any) -> str:
    return str(meta.dtype_of(node)).removeprefix("torch.")


RULES: dict[Any, Rule] = {
    aten.topk.default: _topk,
    **dict.fromkeys(overloads("sort", "argsort", "kthvalue", "msort"), _sort),
    aten.scatter_reduce.two: _scatter_reduce,
    aten.index_reduce.default: _scatter_reduce,
    **dict.fromkeys(overloads("__rshift__", "bitwise_right_shift"), _shift),
}
