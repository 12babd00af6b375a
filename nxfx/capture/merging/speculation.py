"""What may run although its side is not taken: the operators of one side see the values of inputs that go the other way.

Nothing of it is seen (``where`` takes the other side bit by bit, nan or not), unless it raises, draws random numbers or reads a
value. Indices and integer divisors are replaced, on the side not taken, by ones that are always fine. In training a nan would come
back through the gradient, ``0 * inf``: what crosses into a side passes a ``where`` whose gradient is zero on the side not taken.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import fx

from nxfx.analysis import value_ops
from nxfx.capture.merging.explore import Unmergeable
from nxfx.capture.merging.selects import Selects, is_random
from nxfx.graph import meta
from nxfx.report.locations import locate

aten = torch.ops.aten

# Operator → its operands that are positions: any value outside the tensor raises.
_POSITIONS = {
    **dict.fromkeys(("index", "_unsafe_index", "index_put", "_unsafe_index_put"), "indices"),
    **dict.fromkeys(("gather", "index_select", "index_add", "index_copy", "index_fill", "index_reduce"), "index"),
    **dict.fromkeys(("scatter", "scatter_add", "scatter_reduce", "take", "put"), "index"),
    "embedding": "indices",
    "take_along_dim": "indices",
}  # fmt: skip
# Integer division by zero raises on a CPU.
_DIVISORS = frozenset({"div", "divide", "floor_divide", "remainder", "fmod"})
# These look at values and raise for some: infinite, unsorted, singular, out of a range that only they know.
_RAISING_NAMES = """
    bincount embedding_bag _embedding_bag _embedding_bag_forward_only embedding_renorm histc histogram histogramdd istft masked_scatter
    max_unpool2d max_unpool3d multi_margin_loss multilabel_margin_loss multilabel_margin_loss_forward nll_loss nll_loss2d nll_loss_nd
    nll_loss_forward nll_loss2d_forward cross_entropy_loss ctc_loss _ctc_loss one_hot quantile nanquantile repeat_interleave
    segment_reduce _segment_reduce inverse pinverse svd _linalg_svd qr eig geqrf ormqr logdet slogdet det lstsq
    normal binomial _pack_padded_sequence _pad_packed_sequence sparse_coo_tensor
"""
_RAISING = frozenset(_RAISING_NAMES.split())
_RAISING_FAMILIES = (
    "linalg_", "_linalg_", "cholesky", "lu_", "triangular_solve", "fake_quantize", "_fake_quantize", "quantize_", "sparse_", "_sparse",
    "_assert", "sym_constrain",
)  # fmt: skip
# Of those families, and yet a sum like others.
_NEVER_RAISING = frozenset({"linalg_vector_norm"})
_KINDS = {"value": "reads a tensor's value", "size": "gives a size that depends on data", "body": "runs another program"}


def make_safe(selects: Selects, training: bool) -> None:
    """Let what runs on one side only run always.

    Raises:
        Unmergeable: something on one side can raise, or has an effect, and cannot be made safe.
    """
    for node in list(selects.graph.nodes):
        guard = selects.guards.get(node, True)
        if guard is True or node.op != "call_function" or node in selects.chosen:
            continue
        if node.target is aten._assert_tensor_metadata.default:
            selects.graph.erase_node(node)  # it holds: the node was evaluated when it was placed
            continue
        _refuse_effects(selects, node, guard)
        _replace_dangerous(selects, node, guard)
        if training:
            _stop_gradients(selects, node, guard)


def _refuse_effects(selects: Selects, node: fx.Node, guard: Any) -> None:
    name, target = value_ops.name_of(node.target), node.target
    if getattr(target, "__module__", "") == "_operator" and meta.is_tensor(node):
        return  # getitem
    if is_random(node):
        raise _refused(selects, node, guard, f"one side draws random numbers ({name})")
    kind = value_ops.kind_of(target).partition("?")[0]
    depends = value_ops.depends(value_ops.kind_of(target), target, node.args, node.kwargs, meta.dtype_of)
    if kind in _KINDS and depends and not _fills_by_mask(node):
        raise _refused(selects, node, guard, f"one side {_KINDS[kind]} ({name})")
    if not isinstance(target, torch._ops.OpOverload):
        if isinstance(meta.val(node), (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool)):
            return  # arithmetic on sizes
        raise _refused(selects, node, guard, f"one side runs {name}, of which nothing is known")
    if target.namespace not in ("aten", "prims"):
        raise _refused(selects, node, guard, f"one side runs the operator {target}, which may raise")
    raises = name in _RAISING or name.startswith(_RAISING_FAMILIES) and name not in _NEVER_RAISING
    if raises or target._schema.is_mutable:
        raise _refused(selects, node, guard, f"one side runs {name}, which raises for some values")


def _fills_by_mask(node: fx.Node) -> bool:
    """Whether ``node`` is ``x[mask] = value`` with a value that fits however many elements the mask takes."""
    if value_ops.name_of(node.target) not in ("index_put", "_unsafe_index_put"):
        return False
    base, indices, values = cast("tuple[fx.Node, list[fx.Node | None], fx.Node]", node.args[:3])
    (place, mask), *others = [(place, index) for place, index in enumerate(indices) if index is not None]
    if others or meta.dtype_of(mask) not in (torch.bool, torch.uint8):
        return False
    behind = meta.val(base).ndim - place - meta.val(mask).ndim  # dimensions after the one that counts the elements
    shape = meta.val(values).shape
    return len(shape) <= behind or bool(shape[-behind - 1] == 1)


def _refused(selects: Selects, node: fx.Node, guard: Any, reason: str) -> Unmergeable:
    location = locate(node)
    where = f" at {location}" if location.file else ""
    return Unmergeable(f"{reason}{where}", selects.sites.get(guard.branch))


def is_dangerous(node: fx.Node) -> bool:
    """Whether an operand of ``node`` must be replaced where ``node`` is not meant to run."""
    name = value_ops.name_of(node.target)
    return name in _POSITIONS or _divides_integers(node)


def _divides_integers(node: fx.Node) -> bool:
    if value_ops.name_of(node.target) not in _DIVISORS:
        return False
    dtype = meta.dtype_of(node)
    return dtype is not None and not dtype.is_floating_point and not dtype.is_complex


def _replace_dangerous(selects: Selects, node: fx.Node, guard: Any) -> None:
    name = value_ops.name_of(node.target)
    if name in _POSITIONS:
        _rewrite(selects, node, _POSITIONS[name], lambda index: _instead(selects, node, index, guard, 0))
    elif _divides_integers(node):
        _rewrite(selects, node, "other", lambda divisor: _instead(selects, node, divisor, guard, 1))


def _rewrite(selects: Selects, node: fx.Node, argument: str, new: Any) -> None:
    """Give ``node`` other operands for its ``argument``."""
    assert isinstance(node.target, torch._ops.OpOverload)
    names = [a.name for a in node.target._schema.arguments]
    position = names.index(argument)
    value = node.args[position] if position < len(node.args) else node.kwargs.get(argument)
    if isinstance(value, (list, tuple)):
        value = [new(v) if isinstance(v, fx.Node) else v for v in value]
    elif isinstance(value, fx.Node):
        value = new(value)
    if position < len(node.args):
        node.update_arg(position, value)
    else:
        node.update_kwarg(argument, value)


def _instead(selects: Selects, node: fx.Node, operand: fx.Node, guard: Any, fine: int) -> fx.Node:
    """``operand`` where ``node`` is meant to run, ``fine`` elsewhere."""
    value = meta.val(operand)
    if value.dtype in (torch.bool, torch.uint8) and fine == 0:
        return operand  # a mask
    other = selects.call(aten.full.default, [], fine, origin=node, dtype=value.dtype, device=value.device)
    made = selects.call(aten.where.self, selects.predicate(guard, node), operand, other, origin=node)
    selects.safe[made] = operand
    return made


def _stop_gradients(selects: Selects, node: fx.Node, guard: Any) -> None:
    """What flows into the side from outside goes through a ``where`` that passes no gradient while the side is not taken."""

    def gate(operand: fx.Node) -> fx.Node:
        value = meta.val(operand)
        outside = selects.guards.get(operand, True) is not guard and operand not in selects.safe
        if not outside or not isinstance(value, torch.Tensor) or not (value.is_floating_point() or value.is_complex()):
            return operand
        key = (operand, id(guard))
        if key not in selects.gates:
            still = selects.call(aten.detach.default, operand, origin=node)
            made = selects.where(selects.predicate(guard, node), operand, still)
            selects.safe[made] = operand
            selects.gates[key] = made
        return selects.gates[key]

    if isinstance(meta.val(node), (torch.Tensor, tuple, list)):
        node.args, node.kwargs = fx.node.map_arg((node.args, node.kwargs), gate)
