"""An emulation, on the CPU, of what neuronx-cc documents ``--auto-cast`` to do to float32.

Nothing here ran on a device: the rules are those of the documentation, and where it is silent the ones below. For finding out what an
auto-cast would cost a graph before it is compiled, not for predicting bits.

- ``matmult``: both operands of every float32 matrix product and convolution are rounded to the cast type; products are summed in float32
  and the result is float32. A bias is added in float32. Attention is two products with a softmax in float32 between them.
- ``all``: the operands of every float32 operator, numbers and constants included, are rounded, and so is its result; inside an operator
  (a sum, a softmax, a layer norm) the arithmetic is float32. An operator is float32 when an operand or its result is.
- ``none``: nothing is rounded.

Only float32 is touched ("cast FP32 operations"). Rounding is to nearest, ties to even. Overflow gives an infinity, which is what
IEEE 754 has for that rounding; the documentation asks for values "representable within the 8-bit data range". ``fp8_e4m3`` has 4 bits of
exponent, 3 of mantissa, infinities and 240 as its largest number: XLA's F8E4M3, which AWS's error codes tell apart from Trn3's F8E4M3FN.
``tf32`` has float32's exponent and 10 bits of mantissa.

Sources: Neuron Compiler CLI Reference Guide (``--auto-cast``, ``--auto-cast-type``); Mixed Precision and Performance-accuracy Tuning
(neuronx-cc): "accumulations using FP32"; release notes of neuronx-cc 2.5.0 (fp8_e4m3).

Private torch API used here: ``torch.utils._python_dispatch.TorchDispatchMode``, ``torch._decomp``, tested on torch 2.9 and 2.13.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import fx
from torch._decomp import decomposition_table
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from nxfx.errors import UsageError
from nxfx.graph import matrix_products

__all__ = ["AutoCast", "CastType", "Emulated", "Emulation", "emulate", "round_to"]

AutoCast = Literal["none", "matmult", "all"]
CastType = Literal["bf16", "fp16", "tf32", "fp8_e4m3"]

aten = torch.ops.aten

_FUSED_ATTENTION = aten._scaled_dot_product_flash_attention_for_cpu.default
_DISTANCES = aten._euclidean_dist.default  # a product of coordinates beside their squared norms
# What these write they do not read; nor do random ops, which torch tags.
_OVERWRITES = frozenset([aten.copy_.default, aten.fill_.Scalar, aten.fill_.Tensor, aten.zero_.default])
_FORMATS = {"tf32": (10, -126, math.inf), "fp8_e4m3": (3, -6, 240.0)}  # bits of mantissa, smallest exponent, largest number


def round_to(value: torch.Tensor, cast_type: CastType) -> torch.Tensor:
    """``value`` (float32, any shape) rounded to what ``cast_type`` holds, as float32. nan stays nan, zeros keep their sign.

    torch's own ``float8_e4m3fn`` does not serve for ``fp8_e4m3``: it is another format, and torch 2.9 makes nan of an overflow where
    torch 2.13 saturates.
    """
    _one_of("cast_type", cast_type, CastType)
    if cast_type in ("bf16", "fp16"):
        return value.to(torch.bfloat16 if cast_type == "bf16" else torch.float16).to(value.dtype)
    mantissa, smallest, largest = _FORMATS[cast_type]
    wide = value.double()
    exponent = (torch.frexp(wide)[1] - 1).clamp(min=smallest) - mantissa
    step = torch.ldexp(torch.ones_like(wide), exponent)
    rounded = torch.copysign((wide / step).round() * step, wide)
    rounded = torch.where(wide.isfinite(), rounded, wide)
    return torch.where(rounded.abs() > largest, torch.copysign(torch.full_like(wide, math.inf), wide), rounded).to(value.dtype)


class Emulation(TorchDispatchMode):
    """Whatever runs inside ``with Emulation("matmult", "bf16"):`` runs as under that auto-cast: an eager model, an FX interpreter.

    Attributes:
        rounded: op → how many of its float32 operands were rounded so far.
        overflowed: op → how many of its operands and results held a number that the cast type has none for, and became infinite.

    Raises:
        UsageError: no such auto-cast or cast type.
    """

    supports_higher_order_operators = True

    def __init__(self, autocast: AutoCast = "matmult", cast_type: CastType = "bf16") -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's modes have no annotations, here and below
        _one_of("autocast", autocast, AutoCast)
        _one_of("cast_type", cast_type, CastType)
        self.autocast, self.cast_type = autocast, cast_type
        self.rounded: Counter[str] = Counter()
        self.overflowed: Counter[str] = Counter()
        self._outside: list[contextlib.AbstractContextManager[None]] = []

    def __enter__(self) -> Any:
        if self.autocast == "none":
            return self
        self._outside.append(contextlib.nullcontext() if self._outside else _products_in_sight())
        self._outside[-1].__enter__()
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *raised: Any) -> None:
        if self.autocast != "none":
            super().__exit__(*raised)  # type: ignore[no-untyped-call]
            self._outside.pop().__exit__(*raised)

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if isinstance(func, torch._ops.HigherOrderOperator):
            return func(*pytree.tree_map(self._body, list(args)), **pytree.tree_map(self._body, kwargs))
        is_float32 = bool(args) and _is_float32(args[0])
        if func._can_decompose() or (func is _DISTANCES and is_float32):  # in inference mode composite ops arrive whole
            with self:
                return (func.decompose if func is not _DISTANCES else decomposition_table[func])(*args, **kwargs)
        if func is _FUSED_ATTENTION and is_float32:
            return self._attention(*args, **kwargs)
        if self.autocast == "all" and func.namespace in ("aten", "prims") and not func.is_view and torch.Tag.inplace_view not in func.tags:
            return self._everything(func, args, kwargs)
        factors = matrix_products.factor_positions(func)
        return func(*(self._rounded(func, a) if i in factors else a for i, a in enumerate(args)), **kwargs)

    def _everything(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """One op with what it reads, makes and writes rounded."""
        if func is aten.native_batch_norm.default and args[5] and args[3] is not None:
            func = aten._native_batch_norm_legit.default  # the same, and says that it writes the running statistics
        arguments = {a.name: a for a in func._schema.arguments}
        given = dict(zip(arguments, args, strict=False)) | kwargs
        written = {n: v for n, v in given.items() if (alias := arguments[n].alias_info) is not None and alias.is_write}
        read = {n: v for n, v in given.items() if n not in written or not arguments[n].kwarg_only}
        numbers = _has_float32(read)
        if not numbers and torch.Tag.pointwise in func.tags:
            numbers = _has_float32(written or func(*args, **kwargs))
        for name, value in read.items():
            if name not in written:
                given[name] = self._rounded(func, value, numbers=numbers and _is_data(arguments[name]))
            elif func not in _OVERWRITES and torch.Tag.nondeterministic_seeded not in func.tags:
                _in_place(value, functools.partial(self._operand, func))
        result = func(*list(given.values())[: len(args)], **dict(list(given.items())[len(args) :]))
        _in_place(written, functools.partial(self._result, func))
        tensors = {id(t) for t in pytree.tree_leaves(written)}
        return pytree.tree_map(lambda r: r if id(r) in tensors else self._result(func, r), result)

    def _attention(self, query: Any, key: Any, value: Any, dropout: float = 0.0, causal: bool = False, **options: Any) -> Any:
        """The fused kernel as the two products that it is."""
        mask, scale = options.get("attn_mask"), options.get("scale")
        alone = causal and mask is None
        if causal and mask is not None:  # the kernel takes both, what it stands for takes one
            visible = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
            mask = mask.masked_fill(~visible, -math.inf)
        grouped = query.shape[1] != key.shape[1]
        with self:
            products = aten._scaled_dot_product_attention_math.default
            found = products(query, key, value, mask, dropout, alone, scale=scale, enable_gqa=grouped)[0]
        return found, _FUSED_ATTENTION(query, key, value, dropout, causal, **options)[1]

    def _rounded(self, func: Any, value: Any, *, numbers: bool = False) -> Any:
        return pytree.tree_map(functools.partial(self._operand, func, numbers=numbers), value)

    def _operand(self, func: Any, value: Any, *, numbers: bool = False) -> Any:
        if numbers and type(value) in (int, float):
            number = round_to(torch.tensor(value, dtype=torch.float32), self.cast_type).item()
            return type(value)(number) if math.isfinite(number) else number
        if not _is_float32(value):
            return value
        self.rounded[func.name()] += 1
        return self._round(func, value)

    def _result(self, func: Any, value: Any) -> Any:
        return self._round(func, value) if _is_float32(value) else value

    def _round(self, func: Any, value: torch.Tensor) -> torch.Tensor:
        rounded = round_to(value, self.cast_type)
        if bool((rounded.isinf() & value.isfinite()).any()):
            self.overflowed[func.name()] += 1
        return rounded

    def _body(self, value: Any) -> Any:
        """A body of a higher-order op, run under the same rules."""
        if not callable(value):
            return value

        def body(*operands: Any) -> Any:
            with self:
                return value(*operands)

        return body


class Emulated(torch.nn.Module):
    """A module that runs under an :class:`Emulation` and is called like the one it was made from.

    Attributes:
        module: that one; its tensors are not copied.
        emulation: counts what is rounded.
    """

    def __init__(self, module: Callable[..., Any], emulation: Emulation) -> None:
        super().__init__()
        self.module, self.emulation = module, emulation

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad(), self.emulation:
            return self.module(*args, **kwargs)


def emulate(graph_module: fx.GraphModule | torch.nn.Module, autocast: AutoCast = "matmult", cast_type: CastType = "bf16") -> Emulated:
    """A module called like ``graph_module`` that computes what neuronx-cc's ``--auto-cast`` is documented to make of it.

    Args:
        graph_module: a captured or prepared graph (or any module: a model in eager). It is left as it is.
        autocast: ``"none"``, ``"matmult"`` or ``"all"``.
        cast_type: ``"bf16"``, ``"fp16"``, ``"tf32"`` or ``"fp8_e4m3"``.

    Raises:
        UsageError: no such auto-cast or cast type.
    """
    return Emulated(graph_module, Emulation(autocast, cast_type))


@contextlib.contextmanager
def _products_in_sight() -> Iterator[None]:
    """Nothing that runs ops where a mode does not see them.

    oneDNN hides the products of an lstm, and runs float32 ones in bf16 where torch.set_float32_matmul_precision says so; a fused encoder
    layer hides all of its own; torch.compile, which eager higher-order ops call, leaves the mode outside what it compiled before.
    """
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.backends.mkldnn.flags(enabled=False), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def _is_float32(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype == torch.float32


def _in_place(values: Any, rounding: Callable[[torch.Tensor], torch.Tensor]) -> None:
    for tensor in filter(_is_float32, pytree.tree_leaves(values)):
        tensor.copy_(rounding(tensor))


def _has_float32(values: Any) -> bool:
    return any(map(_is_float32, pytree.tree_leaves(values)))


def _is_data(argument: Any) -> bool:
    """Whether a number given for ``argument`` is computed with, as a tensor would be: no size, probability or epsilon."""
    return any(kind in str(argument.type) for kind in ("number", "Tensor"))


def _one_of(what: str, given: Any, choices: Any) -> None:
    if given not in get_args(choices):
        raise UsageError(f"{what} is one of {', '.join(get_args(choices))}, not {given!r}")
