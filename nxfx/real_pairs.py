"""Complex values as pairs of real ones: what each op makes of real and imaginary parts. Neuron has no complex numbers (NCC_EVRF004).

A part that is exactly zero everywhere (a real number made complex) is None: nothing is computed with it. Products are the four of the
definition; sums of two of them round as the complex kernels do, up to the order of fused operations. An infinity or nan in
one part times the zero of a real number makes nan of the other part too in a complex kernel, not here; no other nan is made.

Every real operand is first converted to the real dtype of the complex result, as the complex op converts it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import fx

from nxfx.analysis.intervals import arg
from nxfx.analysis.range_rules import PRESERVING_VIEWS, overloads
from nxfx.analysis.uniform import UniformValues
from nxfx.graph import meta
from nxfx.graph.builder import NodeBuilder

aten = torch.ops.aten

Part: TypeAlias = "fx.Node | float | None"
Pair: TypeAlias = "tuple[Part, Part]"
REAL = {torch.complex64: torch.float32, torch.complex128: torch.float64}


def is_complex(value: Any) -> bool:
    """Whether ``value`` is a node of a complex dtype, or of outputs that are."""
    held = value.meta.get("val") if isinstance(value, fx.Node) else None
    parts = held if isinstance(held, (list, tuple)) else (held,)
    return any(isinstance(part, torch.Tensor) and part.dtype.is_complex for part in parts)


def crosses_as_pairs(node: fx.Node) -> bool:
    """Whether a complex buffer is read as real numbers only: the boundary then hands it to the graph as such."""
    only = all(user.target is aten.view_as_real.default for user in node.users)
    return node.op == "get_attr" and meta.dtype_of(node) in REAL and bool(node.users) and only


class RealPairs:
    """The pairs of one graph's complex nodes; each rule builds at the place that is open in ``build``."""

    def __init__(self, build: NodeBuilder, uniform: UniformValues) -> None:
        self.build, self.uniform = build, uniform
        self.pairs: dict[fx.Node, Pair] = {}

    def of(self, value: Any, dtype: torch.dtype) -> Pair:
        """The pair of a complex node, a real node or a number, as an op of the complex ``dtype`` computes with it."""
        if isinstance(value, complex):
            return (value.real or None, value.imag or None)
        if isinstance(value, (int, float)):
            return (float(value) or None, None)
        real, imaginary = self.pairs.get(value, (value, None))
        return self._as(dtype, real), self._as(dtype, imaginary)

    def operands(self, node: fx.Node, count: int = 1) -> list[Pair]:
        """The pairs of the first ``count`` arguments of ``node``, which has a complex result."""
        return [self.of(value, meta.val(node).dtype) for value in node.args[:count]]

    def read(self, node: fx.Node, *positions: int) -> list[fx.Node]:
        """Those parts of the complex value that ``node`` reads, whole."""
        like = meta.val(node.args[0])  # type: ignore[arg-type]
        pair = self.of(node.args[0], like.dtype)
        return [self.whole(pair[position], like, like.dtype) for position in positions]

    def _as(self, dtype: torch.dtype, part: Part) -> Part:
        return self.build.cast(part, REAL[dtype]) if isinstance(part, fx.Node) else part

    # --- arithmetic on parts; None is an exact zero ------------------------------------------------------------------

    def times(self, a: Part, b: Part) -> Part:
        if a is None or b is None:
            return None
        if isinstance(a, float):
            a, b = b, a
        if isinstance(a, float):
            assert isinstance(b, float)
            return a * b
        if isinstance(b, float):
            return a if b == 1 else self.negative(a) if b == -1 else self.build.call(aten.mul.Tensor, a, b)
        return self.build.call(aten.mul.Tensor, a, b)

    def plus(self, a: Part, b: Part, op: Any = aten.add.Tensor) -> Part:
        if b is None:
            return a
        if a is None:
            return self.negative(b) if op is aten.sub.Tensor else b
        if isinstance(a, float):
            if isinstance(b, float):
                return a - b if op is aten.sub.Tensor else a + b
            return self.build.call(aten.rsub.Scalar, b, a) if op is aten.sub.Tensor else self.build.call(op, b, a)
        return self.build.call(op, a, b)

    def sum_of_products(self, a: Part, b: Part, c: Part, d: Part, sign: int) -> Part:
        """``a * b + sign * c * d``, of tensors fused where the kernel of complex products fuses: ``addcmul`` rounds once less."""
        if all(isinstance(part, fx.Node) for part in (a, b, c, d)):
            return self.build.call(aten.addcmul.default, self.times(a, b), c, d, value=sign)
        return self.plus(self.times(a, b), self.times(c, d), aten.add.Tensor if sign > 0 else aten.sub.Tensor)

    def negative(self, a: Part) -> Part:
        return None if a is None else -a if isinstance(a, float) else self.build.call(aten.neg.default, a)

    def each(self, op: Any, pair: Pair, *args: Any, **kwargs: Any) -> Pair:
        """``op`` of both parts."""
        done = [self.build.call(op, part, *args, **kwargs) if isinstance(part, fx.Node) else part for part in pair]
        return done[0], done[1]

    def whole(self, part: Part, like: torch.Tensor, dtype: torch.dtype) -> fx.Node:
        """A part of a value of the complex ``dtype`` as a tensor of the shape of ``like``."""
        number = part if isinstance(part, float) else 0.0
        if not isinstance(part, fx.Node):
            return self.build.call(aten.full.default, list(like.shape), number, dtype=REAL[dtype], device=like.device)
        if str(meta.val(part).shape) != str(like.shape):
            return self.build.call(aten.expand.default, part, list(like.shape))
        return part


Rule: TypeAlias = Callable[[RealPairs, fx.Node], "Pair | None"]


def _polar(pairs: RealPairs, node: fx.Node) -> Pair | None:
    size, angle = node.args[:2]
    held = pairs.uniform.value(size)
    scale: Any = float(held) if held is not None and float(held) == 1 else size
    cos, sin = pairs.build.call(aten.cos.default, angle), pairs.build.call(aten.sin.default, angle)
    return pairs.times(cos, scale), pairs.times(sin, scale)


def _parts(pairs: RealPairs, node: fx.Node) -> Pair | None:
    """``complex(re, im)``; a part that is a constant zero is none."""
    found = [None if (held := pairs.uniform.value(v)) is not None and float(held) == 0 else v for v in node.args[:2]]
    return (found[0], found[1]) if any(v is not None for v in found) else (node.args[0], None)  # type: ignore[return-value]


def _of_last_dim(pairs: RealPairs, node: fx.Node) -> Pair | None:
    real, imaginary = (pairs.build.call(aten.select.int, node.args[0], -1, i) for i in (0, 1))
    return real, imaginary


def _exponential(pairs: RealPairs, node: fx.Node) -> Pair | None:
    ((real, imaginary),) = pairs.operands(node)
    if (isinstance(real, float) and real) or not isinstance(imaginary, fx.Node):
        return None
    cos, sin = pairs.build.call(aten.cos.default, imaginary), pairs.build.call(aten.sin.default, imaginary)
    size = pairs.build.call(aten.exp.default, real) if isinstance(real, fx.Node) else None
    return (cos, sin) if size is None else (pairs.times(size, cos), pairs.times(size, sin))


def _product(pairs: RealPairs, node: fx.Node) -> Pair | None:
    (a, b), (c, d) = pairs.operands(node, 2)
    return pairs.sum_of_products(a, c, b, d, -1), pairs.sum_of_products(a, d, b, c, 1)


def _quotient(pairs: RealPairs, node: fx.Node) -> Pair | None:
    """By something real."""
    pair, (divisor, imaginary) = pairs.operands(node, 2)
    if imaginary is not None or divisor is None or any(isinstance(part, float) for part in pair):
        return None
    if isinstance(divisor, fx.Node):  # complex division takes the sign off a zero
        divisor = pairs.build.call(aten.add.Tensor, divisor, 0.0)
    return pairs.each(aten.div.Tensor, pair, divisor)


def _sum(op: Any, order: int = 1) -> Rule:
    def rule(pairs: RealPairs, node: fx.Node) -> Pair | None:
        if arg(node, 2, "alpha", 1) != 1:
            return None
        (a, b), (c, d) = pairs.operands(node, 2)[::order]
        return pairs.plus(a, c, op), pairs.plus(b, d, op)

    return rule


def _conjugate(pairs: RealPairs, node: fx.Node) -> Pair | None:
    ((real, imaginary),) = pairs.operands(node)
    return real, -0.0 if imaginary is None else pairs.negative(imaginary)


def _negative(pairs: RealPairs, node: fx.Node) -> Pair | None:
    ((real, imaginary),) = pairs.operands(node)
    return pairs.negative(real), pairs.negative(imaginary)


def _cast(pairs: RealPairs, node: fx.Node) -> Pair | None:
    """To a complex dtype or another device."""
    if set(node.kwargs) - {"dtype", "device"}:
        return None
    (pair,) = pairs.operands(node)
    return pairs.each(aten._to_copy.default, pair, device=node.kwargs["device"]) if "device" in node.kwargs else pair


def _moved(pairs: RealPairs, node: fx.Node) -> Pair | None:
    """An op that rearranges its first argument."""
    (pair,) = pairs.operands(node)
    try:
        return pairs.each(node.target, pair, *node.args[1:], **node.kwargs)
    except RuntimeError:
        if node.target is not aten.view.default:
            raise
        return pairs.each(aten.reshape.default, pair, *node.args[1:])  # a part can be laid out otherwise


def _joined(pairs: RealPairs, node: fx.Node) -> Pair | None:
    joined: Any = node.args[0]
    dtype, op = meta.val(node).dtype, node.target
    wholes = [[pairs.whole(part, meta.val(n), dtype) for part in pairs.of(n, dtype)] for n in joined]
    real, imaginary = (pairs.build.call(op, list(parts), *node.args[1:], **node.kwargs) for parts in zip(*wholes, strict=True))  # type: ignore[arg-type]
    return real, imaginary


_MOVES = [
    *PRESERVING_VIEWS,
    *overloads("expand", "slice", "select", "narrow", "repeat", "index_select", "index", "gather", "repeat_interleave", "resolve_conj",
               "resolve_neg", "diagonal", "tile", "embedding"),
]  # fmt: skip
RULES: dict[Any, Rule] = {
    **dict.fromkeys(_MOVES, _moved),
    **dict.fromkeys(overloads("cat", "stack"), _joined),
    aten.polar.default: _polar,
    aten.complex.default: _parts,
    aten.view_as_complex.default: _of_last_dim,
    aten.exp.default: _exponential,
    **dict.fromkeys([aten.mul.Tensor, aten.mul.Scalar], _product),
    **dict.fromkeys([aten.div.Tensor, aten.div.Scalar], _quotient),
    **dict.fromkeys([aten.add.Tensor, aten.add.Scalar], _sum(aten.add.Tensor)),
    **dict.fromkeys([aten.sub.Tensor, aten.sub.Scalar], _sum(aten.sub.Tensor)),
    **dict.fromkeys([aten.rsub.Tensor, aten.rsub.Scalar], _sum(aten.sub.Tensor, order=-1)),
    **dict.fromkeys([aten._conj.default, aten.conj.default, aten.conj_physical.default, aten._conj_physical.default], _conjugate),
    aten.neg.default: _negative,
    aten._to_copy.default: _cast,
}
"""Ops with a complex result → the pair of its parts; None where this node cannot be one."""


def _as_real(pairs: RealPairs, node: fx.Node) -> fx.Node:
    return pairs.build.call(aten.stack.default, pairs.read(node, 0, 1), -1)


def _one_part(position: int) -> Callable[[RealPairs, fx.Node], fx.Node]:
    return lambda pairs, node: pairs.read(node, position)[0]


def _size(pairs: RealPairs, node: fx.Node) -> fx.Node:
    return pairs.build.call(aten.hypot.default, *pairs.read(node, 0, 1))


def _angle(pairs: RealPairs, node: fx.Node) -> fx.Node:
    return pairs.build.call(aten.atan2.default, *pairs.read(node, 1, 0))


READERS: dict[Any, Callable[[RealPairs, fx.Node], fx.Node]] = {
    aten.view_as_real.default: _as_real,
    aten.abs.default: _size,
    aten.angle.default: _angle,
    aten.real.default: _one_part(0),
    aten.imag.default: _one_part(1),
}
"""Ops that read a complex value and give a real one."""

SIZES = frozenset(overloads("sym_size", "sym_numel"))
"""Ops that ask a complex value for what its parts have as well."""
