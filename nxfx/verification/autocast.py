"""An emulation, on the CPU, of what neuronx-cc documents ``--auto-cast`` to do to float32.

Nothing here ran on a device: the rules are those of the documentation, and where it is silent the ones below. For finding out what an
auto-cast would cost a graph before it is compiled, not for predicting bits.

- ``matmult``: both operands of every float32 matrix product and convolution are rounded to the cast type; products are summed in float32
  and the result is float32. A bias is added in float32. Attention is two products with a softmax in float32 between them.
- ``all``: the operands of every float32 operator, numbers and constants included, are rounded, and so is its result; inside an operator
  (a sum, a softmax, a layer norm) the arithmetic is float32.
- ``none``: nothing is rounded.

Only float32 is touched ("cast FP32 operations"). Rounding is to nearest, ties to even. Overflow gives an infinity, which is what
IEEE 754 has for that rounding; the documentation asks for values "representable within the 8-bit data range". ``fp8_e4m3`` has 4 bits of
exponent, 3 of mantissa, infinities and 240 as its largest number: XLA's F8E4M3, which AWS's error codes tell apart from Trn3's F8E4M3FN.
``tf32`` has float32's exponent and 10 bits of mantissa.

Sources: Neuron Compiler CLI Reference Guide (``--auto-cast``, ``--auto-cast-type``); Mixed Precision and Performance-accuracy Tuning
(neuronx-cc): "accumulations using FP32"; release notes of neuronx-cc 2.5.0 (fp8_e4m3).

Private torch API used here: ``torch.utils._python_dispatch.TorchDispatchMode``, tested on torch 2.9 and 2.13.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from nxfx.errors import UsageError

__all__ = ["AutoCast", "CastType", "Emulated", "Emulation", "emulate", "round_to"]

AutoCast = Literal["none", "matmult", "all"]
CastType = Literal["bf16", "fp16", "tf32", "fp8_e4m3"]

aten = torch.ops.aten

# Where the factors of a matrix product stand. Composite ops (linear, matmul, einsum, lstm) arrive here as these.
_FACTORS: dict[Any, tuple[int, ...]] = {
    **dict.fromkeys([aten.mm.default, aten.bmm.default, aten.mv.default, aten.dot.default, aten.vdot.default], (0, 1)),
    **dict.fromkeys([aten.addmm.default, aten.baddbmm.default, aten.addbmm.default, aten.addmv.default], (1, 2)),
    **dict.fromkeys([aten._addmm_activation.default, aten.addmm_.default, aten.baddbmm_.default], (1, 2)),
    **dict.fromkeys([aten.convolution.default, aten._convolution.default, aten.convolution_overrideable.default], (0, 1)),
    aten.convolution_backward.default: (0, 1, 2),
}
_FUSED_ATTENTION = aten._scaled_dot_product_flash_attention_for_cpu.default
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
        super().__init__()  # type: ignore[no-untyped-call]  # torch's modes have no annotations
        _one_of("autocast", autocast, AutoCast)
        _one_of("cast_type", cast_type, CastType)
        self.autocast, self.cast_type = autocast, cast_type
        self.rounded: Counter[str] = Counter()
        self.overflowed: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if isinstance(func, torch._ops.HigherOrderOperator):
            return func(*pytree.tree_map(self._body, list(args)), **pytree.tree_map(self._body, kwargs))
        if self.autocast == "none":
            return func(*args, **kwargs)
        if func._can_decompose():  # in inference mode composite ops arrive whole
            with self:
                return func.decompose(*args, **kwargs)
        if func is _FUSED_ATTENTION and args[0].dtype == torch.float32:
            return self._attention(*args, **kwargs)
        return self._run(func, args, kwargs)

    def _run(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        factors = _FACTORS.get(func, ())
        everything = self.autocast == "all" and func.namespace in ("aten", "prims") and not func.is_view
        if everything:
            cast = functools.partial(self._operand, func, numbers=torch.Tag.pointwise in func.tags)
            written = {i for i, a in enumerate(func._schema.arguments) if a.alias_info is not None and a.alias_info.is_write}
            result = func(*(a if i in written and not factors else pytree.tree_map(cast, a) for i, a in enumerate(args)), **kwargs)
            for position in written:
                args[position].copy_(self._result(func, args[position]))
            return args[0] if written else pytree.tree_map(functools.partial(self._result, func), result)
        return func(*(self._operand(func, a) if i in factors else a for i, a in enumerate(args)), **kwargs)

    def _attention(self, query: Any, key: Any, value: Any, dropout: float = 0.0, causal: bool = False, **options: Any) -> Any:
        """The fused kernel as the two products that it is."""
        mask, scale = options.get("attn_mask"), options.get("scale")
        with self:
            found = aten._scaled_dot_product_attention_math.default(query, key, value, mask, dropout, causal, scale=scale)[0]
        return found, _FUSED_ATTENTION(query, key, value, dropout, causal, **options)[1]

    def _operand(self, func: Any, value: Any, *, numbers: bool = False) -> Any:
        if numbers and type(value) is float:
            return round_to(torch.tensor(value, dtype=torch.float32), self.cast_type).item()
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
        if not isinstance(value, torch.nn.Module):
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
        with torch.no_grad(), _without_onednn(), self.emulation:
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


def _without_onednn() -> contextlib.AbstractContextManager[None]:
    """oneDNN hides the products of an lstm, and runs float32 ones in bf16 where torch.set_float32_matmul_precision says so."""
    off: contextlib.AbstractContextManager[None] = torch.backends.mkldnn.flags(enabled=False)
    return off


def _is_float32(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype == torch.float32


def _one_of(what: str, given: Any, choices: Any) -> None:
    if given not in get_args(choices):
        raise UsageError(f"{what} is one of {', '.join(get_args(choices))}, not {given!r}")
