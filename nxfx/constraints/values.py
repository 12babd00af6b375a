"""Dtypes, sizes and constants that the compiler refuses, whatever is computed with them."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from nxfx.analysis import integer_ops
from nxfx.analysis.intervals import INT32, fits
from nxfx.analysis.provenance import Role
from nxfx.constraints.base import Checker, Constraint
from nxfx.graph import meta
from nxfx.report.findings import Severity

COMPLEX = Constraint(
    "NX502",
    "NCC_EVRF004",
    "complex numbers are not supported",
    "compute with real and imaginary parts: two real products for a rotation, x * cos + rotate_half(x) * sin",
)
COMPLEX_IN_PART = Constraint(
    COMPLEX.code, COMPLEX.error, "complex64 is supported in a list of operations only, and refused in the others", COMPLEX.fix
)
_TO_16_BITS = "convert it to bfloat16 or float16 before it is used"
FNUZ = Constraint("NX503", "NCC_EVRF005", "no generation has the fnuz formats", _TO_16_BITS)
E4M3FN = Constraint(
    "NX503",
    "NCC_EVRF051, in older compilers NCC_ESPP047",
    "float8_e4m3fn is Trn3's",
    f"{_TO_16_BITS}, or compile for trn3; --experimental-unsafe-fp8e4m3fn-as-fp8e4m3 takes its bits for another format",
)
ODD_FLOAT = Constraint("NX503", "NCC_ESPP004", "no code is generated for this dtype", _TO_16_BITS)
WIDE_CONSTANT = Constraint(
    "NX510",
    "NCC_ESFH002",
    "a 64-bit constant has to fit 32 bits",
    "keep the arithmetic within int32, or compile for trn2 or newer with SDK 2.32 or newer, which has native int64",
)
DYNAMIC = Constraint(
    "NX511",
    "NCC_EMOD025",
    "every size has to be known when the model is compiled",
    "prepare it once for each size (buckets), and pad inputs to the next one",
)

_FNUZ = frozenset({"float8_e4m3fnuz", "float8_e5m2fnuz"})
# One name a dtype: not every torch has all of them.
_SUB_BYTE = frozenset({"float4_e2m1fn_x2", "bits8", "bits16", "bits1x8", "bits2x4", "bits4x2", "quint8", "qint8", "qint32", "quint4x2"})


def _unusual() -> dict[torch.dtype, str]:
    """Dtypes that some generation or every one refuses → their names."""
    names = {"float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu"} | _FNUZ | _SUB_BYTE
    found = {getattr(torch, n): n for n in sorted(names) if isinstance(getattr(torch, n, None), torch.dtype)}
    found |= {d: str(d).removeprefix("torch.") for d in (torch.complex32, torch.complex64, torch.complex128)}
    return found


UNUSUAL = _unusual()


def dtypes_of(node: fx.Node) -> tuple[torch.dtype, ...]:
    """The unusual dtypes among the outputs of ``node``."""
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        return (value.dtype,) if value.dtype in UNUSUAL else ()
    if isinstance(value, (list, tuple)):
        return tuple({v.dtype for v in value if isinstance(v, torch.Tensor) and v.dtype in UNUSUAL})
    return ()


def check_dtype(check: Checker, node: fx.Node, dtype: torch.dtype) -> None:
    """Where a refused dtype comes into the graph; what is computed from it is the same fault."""
    if not node.users or any(dtypes_of(n) and _kind(dtype) in map(_kind, dtypes_of(n)) for n in node.all_input_nodes):
        return
    name = UNUSUAL[dtype]
    what = f"`{_name(check, node)}` is {name}"
    if dtype.is_complex:
        partly = check.target.complex64 and dtype is torch.complex64
        check.report(node, COMPLEX_IN_PART if partly else COMPLEX, what, Severity.WARNING if partly else Severity.ERROR)
    elif name in _FNUZ:
        check.report(node, FNUZ, what)
    elif name not in check.target.float8:
        check.report(node, E4M3FN if name == "float8_e4m3fn" else ODD_FLOAT, what)


def _kind(dtype: torch.dtype) -> Any:
    return "complex" if dtype.is_complex else dtype


def _name(check: Checker, node: fx.Node) -> str:
    if node.op == "call_function":
        return str(getattr(node.target, "__name__", node.target)).partition(".")[0]
    source = check.context.sources.get(node.name)
    return source.name if source is not None else node.name


def check_sizes(check: Checker, node: fx.Node) -> None:
    """An input with a dynamic size. On the legacy route it is traced with the example's sizes, on the native one it is refused."""
    value, source = meta.val(node), check.context.sources.get(node.name)
    if source is None or source.role is not Role.INPUT or not isinstance(value, torch.Tensor):
        return
    dims = [str(d) for d, size in enumerate(value.shape) if not isinstance(size, int)]
    if dims:
        what = f"`{source.name}` has a dynamic size in dimension{'s' if len(dims) > 1 else ''} {', '.join(dims)}"
        check.report(node, DYNAMIC, what, Severity.WARNING if check.target.legacy else Severity.ERROR)


def check_constants(check: Checker, node: fx.Node) -> None:
    """A number beyond int32 in 64-bit integer arithmetic; for a target without native int64."""
    if torch.int64 not in {meta.dtype_of(n) for n in (node, *node.all_input_nodes)}:
        return
    numbers = [n for n in integer_ops.python_numbers(node).values() if isinstance(n, int) and not fits((n, n), INT32)]
    if numbers:
        check.report(node, WIDE_CONSTANT, f"`{_name(check, node)}` computes with {numbers[0]}")


def check_held_constant(check: Checker, node: fx.Node) -> None:
    """A tensor that capture lifted as a constant and that holds values beyond int32; for a target without native int64."""
    source = check.context.sources.get(node.name)
    if source is None or source.role is not Role.CONSTANT or meta.dtype_of(node) is not torch.int64:
        return
    held = source.value
    if held is None or isinstance(held, meta.FakeTensor) or held.is_meta or not held.numel():
        return
    bounds = tuple(int(v) for v in torch.aminmax(held))
    if not fits((bounds[0], bounds[1]), INT32):
        check.report(node, WIDE_CONSTANT, f"a constant holds {max(bounds, key=abs)}")
