"""Operators that the compiler refuses, or refuses with some of their arguments. Nothing here is rewritten."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from nxfx.analysis.intervals import arg
from nxfx.analysis.provenance import Role
from nxfx.analysis.range_rules import overloads
from nxfx.constraints.base import Checker, Constraint, Rule
from nxfx.graph import meta
from nxfx.report.findings import Severity

aten = torch.ops.aten

UNSUPPORTED = Constraint(
    "NX501", "NCC_EUOC002, NCC_EVRF001", "the compiler does not have this operator", "multiply by torch.inverse(A), or run it on the host"
)
UNLISTED = Constraint(
    "NX501",
    "NCC_EUOC002, NCC_EVRF001",
    "what it lowers to is not in the compiler's list of operators",
    "run it on the host, or once before the model is compiled; `neuronx-cc list-operators --framework XLA` has the list",
)
SORT = Constraint(
    "NX506",
    "NCC_EVRF029",
    "Trn2 and later have no sort, only top-k",
    "take what is needed with torch.topk(x, k), or rank by counting: (x[..., None, :] < x[..., None]).sum(-1)",
)
DILATED_TWICE = Constraint(
    "NX504",
    "NCC_EVRF010",
    "a transposed (or backward) convolution with a stride dilates its input, and input and kernel cannot both be dilated",
    "dilate the kernel by hand (zeros between its elements) and use dilation=1, or stride=1",
)
GATHER = Constraint(
    "NX509", "NCC_EVRF056", "the compiler refuses a gather from beyond the operand", "make the table as long as the positions"
)
SCATTER = Constraint(
    "NX509", "NCC_EVRF031", "the compiler refuses a scatter to beyond the operand", "make the operand as long as the positions"
)


# --- operators it does not have --------------------------------------------------------------------------------------

_UNLISTED = (
    "cholesky", "linalg_cholesky", "linalg_cholesky_ex", "cholesky_solve", "cholesky_inverse", "linalg_qr", "geqrf", "linalg_svd",
    "_linalg_svd", "linalg_eigh", "_linalg_eigh", "linalg_eig", "linalg_lu", "linalg_lu_factor", "linalg_lu_factor_ex", "linalg_lstsq",
    "linalg_solve", "_linalg_solve_ex", "linalg_det", "_linalg_det", "linalg_slogdet", "_linalg_slogdet", "linalg_ldl_factor_ex",
)  # fmt: skip


def _unsupported(check: Checker, node: fx.Node) -> None:
    check.report(node, UNSUPPORTED, f"`{op_name(node)}`")


def _unlisted(check: Checker, node: fx.Node) -> None:
    check.report(node, UNLISTED, f"`{op_name(node)}`", Severity.WARNING)


def check_sort(check: Checker, node: fx.Node) -> None:
    """A whole axis put in order."""
    if not check.target.sort:
        check.report(node, SORT, f"`{op_name(node)}`", Severity.WARNING)


# --- dilated convolutions --------------------------------------------------------------------------------------------


def _transposed(check: Checker, node: fx.Node) -> None:
    """``conv_transpose*d(input, weight, bias, stride, padding, output_padding, groups, dilation)``."""
    if _beyond_one(arg(node, 3, "stride", 1)) and _beyond_one(arg(node, 7, "dilation", 1)):
        check.report(node, DILATED_TWICE, f"`{op_name(node)}` with a stride and a dilation")


def _convolution(check: Checker, node: fx.Node) -> None:
    """``convolution(input, weight, bias, stride, padding, dilation, transposed, output_padding, groups)``."""
    if node.args[6] and _beyond_one(node.args[3]) and _beyond_one(node.args[5]):
        check.report(node, DILATED_TWICE, "a transposed convolution with a stride and a dilation")


def _convolution_backward(check: Checker, node: fx.Node) -> None:
    """``convolution_backward(grad_output, input, weight, bias_sizes, stride, padding, dilation, transposed, …, output_mask)``."""
    wanted = node.args[10]
    if wanted[0] and not node.args[7] and _beyond_one(node.args[4]) and _beyond_one(node.args[6]):  # type: ignore[index]
        check.report(node, DILATED_TWICE, "the input gradient of a convolution with a stride and a dilation")


def _beyond_one(sizes: Any) -> bool:
    return any(s != 1 for s in sizes) if isinstance(sizes, (list, tuple)) else sizes != 1


# --- positions beyond the operand ------------------------------------------------------------------------------------

_MOVES = frozenset(
    overloads("view", "_unsafe_view", "reshape", "unsqueeze", "squeeze", "expand", "permute", "transpose", "repeat", "clone", "_to_copy",
              "t", "alias", "lift_fresh_copy")
)  # fmt: skip
_SHIFTS = frozenset([aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.add.Scalar, aten.sub.Scalar, aten.mul.Scalar])


def _along_dim(constraint: Constraint) -> Rule:
    def rule(check: Checker, node: fx.Node) -> None:
        """``op(self, dim, index, …)``: positions count from the front only."""
        operand, dim, index = node.args[:3]
        if isinstance(dim, int):
            _positions(check, node, constraint, operand, dim, index, wraps=False)

    return rule


def _embedding(check: Checker, node: fx.Node) -> None:
    _positions(check, node, GATHER, node.args[0], 0, node.args[1], wraps=False)


def _indexed(constraint: Constraint) -> Rule:
    def rule(check: Checker, node: fx.Node) -> None:
        """``index(self, [indices])``: negative positions count from the end."""
        for dim, index in enumerate(node.args[1]):  # type: ignore[arg-type]
            _positions(check, node, constraint, node.args[0], dim, index, wraps=True)

    return rule


def _positions(check: Checker, node: fx.Node, constraint: Constraint, operand: Any, dim: int, index: Any, *, wraps: bool) -> None:
    """Certainly out of bounds: ``index`` is made of consecutive numbers, and the first or last of them is beyond the operand."""
    value = operand.meta["val"] if meta.is_tensor(operand) else None
    size = value.shape[dim] if value is not None and value.dim() else None
    if type(size) is not int or meta.dtype_of(index) in (None, torch.bool, torch.uint8) or not _holds_its_bounds(check, index):
        return
    bounds = check.ranges.proved(index)
    if bounds is not None and (bounds[1] >= size or bounds[0] < (-size if wraps else 0)):
        reached = bounds[1] if bounds[1] >= size else bounds[0]
        check.report(node, constraint, f"`{op_name(node)}` reaches position {reached} of an axis of {size}")


def _holds_its_bounds(check: Checker, node: fx.Node) -> bool:
    """Whether the smallest and largest value that ``node`` can hold do occur in it: an iota or a constant, moved or shifted."""
    while isinstance(node, fx.Node):
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or any(not isinstance(n, int) for n in value.shape) or 0 in value.shape:
            return False
        if node.op != "call_function":
            source = check.context.sources.get(node.name)
            return source is not None and source.role is Role.CONSTANT and source.is_known
        if node.target in ARANGES:
            return True
        if node.target not in _MOVES and not (node.target in _SHIFTS and isinstance(node.args[1], int)):
            return False
        node = node.args[0]  # type: ignore[assignment]
    return False


ARANGES = frozenset(overloads("arange"))


def op_name(node: fx.Node) -> str:
    """The operator's name without namespace and overload."""
    return str(node.target._schema.name).partition("::")[2] if isinstance(node.target, torch._ops.OpOverload) else str(node.target)


RULES: dict[Any, Rule] = {
    **dict.fromkeys(overloads("triangular_solve", "linalg_solve_triangular"), _unsupported),
    **dict.fromkeys(overloads(*_UNLISTED), _unlisted),
    **dict.fromkeys(overloads("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _transposed),
    aten.convolution.default: _convolution,
    aten.convolution_backward.default: _convolution_backward,
    aten.embedding.default: _embedding,
    **dict.fromkeys([aten.gather.default, aten.index_select.default], _along_dim(GATHER)),
    **dict.fromkeys(overloads("scatter", "scatter_add", "scatter_reduce", "index_add", "index_copy", "index_fill"), _along_dim(SCATTER)),
    **dict.fromkeys([aten.index.Tensor, aten._unsafe_index.Tensor], _indexed(GATHER)),
    **dict.fromkeys([aten.index_put.default, aten._unsafe_index_put.default], _indexed(SCATTER)),
}
