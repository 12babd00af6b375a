"""Complex values as pairs of real ones: what each op makes of real and imaginary parts. Neuron has no complex numbers (NCC_EVRF004).

A part that is exactly zero everywhere (a real number made complex) is None: nothing is computed with it. Products are the four of the
definition; sums of two of them round as the complex kernels do, up to the order of fused operations. An infinity or nan in
one part times the zero of a real number makes nan of the other part too in a complex kernel, not here; no other nan is made.

A quotient is Smith's, and an exponential splits what overflows, as the complex kernels do: infinities, nan and rounding are theirs.
Where both products of a product overflow, the sign of the infinity that is left is that of one of them; in eager the layout says which.

Every real operand is first converted to the real dtype of the complex result, as the complex op converts it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import fx

from nxfx.analysis.float_ops import FILLS
from nxfx.analysis.intervals import arg
from nxfx.analysis.range_rules import PRESERVING_VIEWS, overloads
from nxfx.analysis.uniform import UniformValues
from nxfx.graph import meta, outer_products
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
        source: Any = node.args[0]
        pair = self.of(source, meta.val(source).dtype)
        return [self.whole(pair[position], source, meta.val(source).dtype) for position in positions]

    def tensor(self, part: Part, value: Any, node: fx.Node) -> fx.Node:
        """A part of the argument ``value`` of ``node`` as a tensor: of its shape, of a number without one."""
        like = meta.val(node)
        if isinstance(value, fx.Node):
            return self.whole(part, value, like.dtype)
        return self.build.scalar(0.0 if part is None else part, REAL[like.dtype], like.device)  # type: ignore[arg-type]

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

    def whole(self, part: Part, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        """A part of ``node``, as an op of the complex ``dtype`` reads it, as a tensor of the shape of ``node``."""
        like = meta.val(node)
        if isinstance(part, fx.Node) and str(meta.val(part).shape) == str(like.shape):
            return part
        sizes = [size if isinstance(size, int) else self._size(node, size) for size in like.shape]
        if isinstance(part, fx.Node):
            return self.build.call(aten.expand.default, part, sizes)
        return self.build.call(aten.full.default, sizes, 0.0 if part is None else part, dtype=REAL[dtype], device=like.device)

    def knows_sizes(self, node: fx.Node) -> bool:
        """Whether each dynamic size of ``node`` is one of something that it is made of."""
        return all(isinstance(size, int) or self._donor(node, size) is not None for size in meta.val(node).shape)

    def _donor(self, node: fx.Node, size: torch.SymInt) -> fx.Node | None:
        sources = [node, *node.all_input_nodes]
        real = [
            part for source in sources for part in self.pairs.get(source, (source,)) if isinstance(part, fx.Node) and not is_complex(part)
        ]
        return next((n for n in real if str(size) in map(str, getattr(meta.val(n), "shape", (meta.val(n),)))), None)

    def _size(self, node: fx.Node, size: torch.SymInt) -> fx.Node:
        donor = self._donor(node, size)
        assert donor is not None
        if not meta.is_tensor(donor):
            return donor
        return self.build.call(aten.sym_size.int, donor, [str(s) for s in meta.val(donor).shape].index(str(size)))


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


# Where exp(x) alone overflows: the exponents that the complex kernel splits, so that a small sine makes a number of it.
_SPLIT = {torch.complex64: 88.0, torch.complex128: 709.0}


def _exponential(pairs: RealPairs, node: fx.Node) -> Pair | None:
    ((real, angle),) = pairs.operands(node)
    if isinstance(real, float) or isinstance(angle, float):
        return None
    call = pairs.build.call
    if angle is None:
        return (None if real is None else call(aten.exp.default, real)), None
    if real is None:
        return call(aten.cos.default, angle), call(aten.sin.default, angle)
    # exp(-inf + iy) is zero and exp(inf + iy) infinite even where there is no cosine of y
    angle_or_zero = call(aten.nan_to_num.default, angle, 0.0, 0.0, -0.0)
    turn = call(aten.where.self, call(aten.isinf.default, real), angle_or_zero, angle)
    split = _SPLIT[meta.val(node).dtype]
    size = call(aten.exp.default, call(aten.clamp.default, real, None, split))
    rest = call(aten.exp.default, call(aten.relu.default, call(aten.sub.Tensor, real, split)))
    parts = [call(aten.mul.Tensor, call(aten.mul.Tensor, size, call(op, turn)), rest) for op in (aten.cos.default, aten.sin.default)]
    # of a real number it is real, whatever the size
    return parts[0], call(aten.where.self, call(aten.eq.Scalar, angle, 0), angle, parts[1])


def _product(pairs: RealPairs, node: fx.Node) -> Pair | None:
    return _times(pairs, *pairs.operands(node, 2))


def _times(pairs: RealPairs, z: Pair, w: Pair) -> Pair:
    (a, b), (c, d) = z, w
    return pairs.sum_of_products(a, c, b, d, -1), pairs.sum_of_products(a, d, b, c, 1)


def _fused(pairs: RealPairs, z: Pair, w: Pair) -> Pair:
    """As the kernels multiply that take one number at a time: the first product is the exact one, and decides where both overflow."""
    (a, b), (c, d) = z, w
    return pairs.sum_of_products(pairs.negative(b), d, a, c, 1), pairs.sum_of_products(a, d, b, c, 1)


def _power(pairs: RealPairs, node: fx.Node) -> Pair | None:
    """Squares and cubes, which the complex kernel multiplies too."""
    if (exponent := arg(node, 1, "exponent", 2)) not in (2, 3):
        return None
    (z,) = pairs.operands(node)
    square = _fused(pairs, z, z)
    return square if exponent == 2 else _fused(pairs, square, z)


def _outer(pairs: RealPairs, node: fx.Node) -> Pair | None:
    """An ``outer``, or an einsum that sums over nothing: a product of what is broadcast."""
    is_einsum = node.target is aten.einsum.default
    labels = outer_products.labels_of(node) if is_einsum else ("i", "j", "ij")
    if labels is None:
        return None
    factors: Any = node.args[1] if is_einsum else node.args
    dtype = meta.val(node).dtype

    def aligned(part: Part, own: str) -> Part:
        return outer_products.aligned(pairs.build, part, own, labels[2]) if isinstance(part, fx.Node) else part

    z, w = ([aligned(part, own) for part in pairs.of(factor, dtype)] for factor, own in zip(factors, labels[:2], strict=True))
    return _times(pairs, (z[0], z[1]), (w[0], w[1]))


def _quotient(pairs: RealPairs, node: fx.Node) -> Pair | None:
    dtype = meta.val(node).dtype
    divided, divisor = (1.0, node.args[0]) if node.target is aten.reciprocal.default else node.args[:2]
    pair, (real, imaginary) = pairs.of(divided, dtype), pairs.of(divisor, dtype)
    if imaginary is not None or real is None:
        a, b, c, d = (pairs.tensor(p, v, node) for v, parts in ((divided, pair), (divisor, (real, imaginary))) for p in parts)
        return _complex_quotient(pairs, a, b, c, d)
    if isinstance(real, fx.Node):  # complex division takes the sign off a zero
        real = pairs.build.call(aten.add.Tensor, real, 0.0)
    whole = [pairs.tensor(part, divided, node) if isinstance(part, float) else part for part in pair]
    return pairs.each(aten.div.Tensor, (whole[0], whole[1]), real)


def _complex_quotient(pairs: RealPairs, a: fx.Node, b: fx.Node, c: fx.Node, d: fx.Node) -> Pair:
    """Smith's, by the larger part of the divisor first, so that no square of it overflows: the complex kernel's, step by step."""
    call = pairs.build.call

    def choose(which: fx.Node, one: fx.Node, other: fx.Node) -> fx.Node:
        return call(aten.where.self, which, one, other)

    size = call(aten.abs.default, c)
    turned = call(aten.lt.Tensor, size, call(aten.abs.default, d))
    large, small = choose(turned, d, c), choose(turned, c, d)
    first, second = choose(turned, b, a), choose(turned, a, b)
    ratio = call(aten.div.Tensor, small, large)
    scale = call(aten.reciprocal.default, call(aten.addcmul.default, large, small, ratio))
    real = call(aten.mul.Tensor, call(aten.addcmul.default, first, second, ratio), scale)
    minuend, factor = choose(turned, call(aten.neg.default, second), second), choose(turned, ratio, call(aten.neg.default, ratio))
    imaginary = call(aten.mul.Tensor, call(aten.addcmul.default, minuend, first, factor), scale)
    zero = call(aten.eq.Scalar, large, 0)  # and then both are
    return choose(zero, call(aten.div.Tensor, a, size), real), choose(zero, call(aten.div.Tensor, b, size), imaginary)


def _sum(op: Any, order: int = 1) -> Rule:
    def rule(pairs: RealPairs, node: fx.Node) -> Pair | None:
        (a, b), second = pairs.operands(node, 2)[::order]
        if (alpha := arg(node, 2, "alpha", 1)) != 1:
            second = _times(pairs, second, pairs.of(alpha, meta.val(node).dtype))
        c, d = second
        return pairs.plus(a, c, op), pairs.plus(b, d, op)

    return rule


def _reduced(pairs: RealPairs, node: fx.Node) -> Pair | None:
    """A sum or mean over dimensions."""
    source, dtype = node.args[0], meta.val(node).dtype
    done = []
    for part in pairs.of(source, dtype):
        whole = pairs.whole(part, source, dtype) if part is not None else None  # type: ignore[arg-type]
        done.append(None if whole is None else pairs.build.call(node.target, whole, *node.args[1:]))  # type: ignore[arg-type]
    return done[0], done[1]


def _fill(value: complex | None, position: int = 0) -> Rule:
    """A constant: ``value``, or the argument at ``position``."""

    def rule(pairs: RealPairs, node: fx.Node) -> Pair | None:
        held: Any = value if value is not None else node.args[position]
        return _exactly(held) if isinstance(held, (int, float, complex)) else None

    return rule


def _exactly(value: complex) -> Pair:
    """A number with the signs of its zeros."""
    real, imaginary = (None if str(part) == "0.0" else part for part in (complex(value).real, complex(value).imag))
    return real, imaginary


def _overwritten(pairs: RealPairs, node: fx.Node) -> Pair | None:
    """``copy`` and ``fill``: nothing is left of the first argument."""
    value: Any = node.args[1]
    return pairs.of(value, meta.val(node).dtype) if isinstance(value, fx.Node) else _exactly(value)


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


# The arguments of an op that its result takes elements from, by the names that schemas give them.
_ELEMENTS = frozenset(["self", "tensors", "src", "source", "values", "value", "other", "weight"])


def _moved(pairs: RealPairs, node: fx.Node) -> Pair | None:
    """An op that rearranges, joins or chooses among elements does so with those of each part."""
    if _ELEMENTS & node.kwargs.keys():
        return None
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    held = [i for i, (name, value) in enumerate(zip(names, node.args, strict=False)) if name in _ELEMENTS and value is not None]
    values = {i: _listed(node.args[i]) for i in held}
    dtype = _listed(meta.val(node))[0].dtype
    found = {i: [pairs.of(v, dtype) if isinstance(v, fx.Node) else _exactly(v) for v in listed] for i, listed in values.items()}

    def moved(position: int) -> Part:
        parts = [pair[position] for listed in found.values() for pair in listed]
        if all(part is None for part in parts) or (len(parts) == 1 and isinstance(parts[0], float) and node.target not in _PADS):
            return parts[0]
        args: list[Any] = list(node.args)
        for i, listed in values.items():
            own = [_whole_or_number(pairs, pair[position], v, dtype) for v, pair in zip(listed, found[i], strict=True)]
            args[i] = own if isinstance(args[i], (list, tuple)) else own[0]
        return _called(pairs, node, args)

    return moved(0), moved(1)


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _whole_or_number(pairs: RealPairs, part: Part, value: Any, dtype: torch.dtype) -> Any:
    return pairs.whole(part, value, dtype) if isinstance(value, fx.Node) else 0.0 if part is None else part


def _called(pairs: RealPairs, node: fx.Node, args: list[Any]) -> fx.Node:
    try:
        return pairs.build.call(node.target, *args, **node.kwargs)  # type: ignore[arg-type]
    except RuntimeError:
        if node.target is not aten.view.default:
            raise
        return pairs.build.call(aten.reshape.default, *args)  # a part can be laid out otherwise


def _item(pairs: RealPairs, node: fx.Node) -> Pair | None:
    """One of several results."""
    real, imaginary = pairs.pairs[node.args[0]]  # type: ignore[index]
    return pairs.each(operator.getitem, (real, imaginary), node.args[1])


def _adjoint(pairs: RealPairs, node: fx.Node) -> Pair | None:
    (pair,) = pairs.operands(node)
    real, imaginary = pairs.each(aten.transpose.int, pair, -2, -1)
    return real, -0.0 if imaginary is None else pairs.negative(imaginary)


# These add elements of their own, zeros.
_PADS = frozenset(overloads("pad", "constant_pad_nd", "tril", "triu"))
_MOVES = [
    *PRESERVING_VIEWS, *_PADS,
    *overloads("expand", "slice", "select", "narrow", "repeat", "index_select", "index", "gather", "repeat_interleave", "resolve_conj",
               "resolve_neg", "diagonal", "tile", "embedding", "split", "split_with_sizes", "chunk", "unbind", "tensor_split", "unfold",
               "cat", "concat", "concatenate", "stack", "hstack", "vstack", "where", "masked_fill", "slice_scatter", "select_scatter",
               "diagonal_scatter", "index_put", "index_copy"),
]  # fmt: skip
RULES: dict[Any, Rule] = {
    **dict.fromkeys(_MOVES, _moved),
    **dict.fromkeys(overloads("copy", "fill"), _overwritten),
    operator.getitem: _item,
    aten.adjoint.default: _adjoint,
    **dict.fromkeys(overloads("zeros", "zeros_like", "new_zeros", "empty", "empty_like", "new_empty"), _fill(0)),
    **dict.fromkeys(overloads("ones", "ones_like", "new_ones"), _fill(1)),
    **{op: _fill(None, position) for op, position in FILLS.items()},
    aten.polar.default: _polar,
    aten.complex.default: _parts,
    aten.view_as_complex.default: _of_last_dim,
    aten.exp.default: _exponential,
    **dict.fromkeys([aten.mul.Tensor, aten.mul.Scalar], _product),
    **dict.fromkeys([aten.outer.default, aten.einsum.default], _outer),
    **dict.fromkeys([aten.pow.Tensor_Scalar, aten.square.default], _power),
    **dict.fromkeys([aten.div.Tensor, aten.div.Scalar, aten.reciprocal.default], _quotient),
    **dict.fromkeys([aten.sum.default, aten.sum.dim_IntList, aten.mean.default, aten.mean.dim], _reduced),
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
