"""Tensor-valued slice bounds as masks: ``arange`` comparisons that mean what Python's slice means."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._python_dispatch import _disable_current_modes

from nxfx.capture import symbols, trace
from nxfx.capture.session import Session
from nxfx.report.findings import Severity
from nxfx.report.rewrites import Kind

_SMALL = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32)
_COUNTING = (torch.int32, torch.int64)
_UNSIGNED = (torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64)


@dataclass(frozen=True, eq=False)
class Axis:
    """One dimension of a tensor of which only a part, known at run time, is meant.

    Attributes:
        dim: counted from the right (negative), so that broadcasting does not move it.
        size: the dimension's full size.
        start, stop, step: as the user wrote them. ``step`` 0 stands for one element, ``x[start]``.
        mask: bool of shape ``(size,)``: which elements are meant.
        first: the first element's position; a tensor or a number.
        versions: of the tensors among the bounds when the mask was made.
    """

    dim: int
    size: Any
    start: Any
    stop: Any
    step: int
    mask: torch.Tensor
    first: Any
    versions: tuple[object, object]

    def at(self, dim: int) -> Axis:
        return dataclasses.replace(self, dim=dim)

    @property
    def is_select(self) -> bool:
        return self.step == 0

    @property
    def is_prefix(self) -> bool:
        """Whether position in the part and in the whole are the same."""
        return self.step == 1 and type(self.first) is int and self.first == 0

    def __str__(self) -> str:
        names = ["" if b is None else str(b) if isinstance(b, int) else "n" for b in (self.start, self.stop)]
        return names[0] if self.is_select else ":".join(names) + (f":{self.step}" if self.step > 1 else "")


def make_axis(session: Session, dim: int, size: Any, index: Any, device: torch.device) -> Axis:
    """The mask of ``index`` (a slice, or a 0-d tensor that selects one element) on a dimension of ``size`` elements.

    As in ``aten.slice``: negative bounds count from the end, then everything is clamped to the dimension; an empty or
    reversed range means nothing. Clamping needs no node: positions outside the dimension compare false by themselves.

    Raises:
        TypeError: a bound is a tensor of another kind than one integer, as in eager.
    """
    start, stop, step = (index.start, index.stop, index.step) if isinstance(index, slice) else (index, None, 0)
    bounds = [symbols.as_tensor(session, b) if trace.is_unbacked(b) else b for b in (start, stop)]
    tensors = [b for b in bounds if isinstance(b, torch.Tensor)]
    for tensor in tensors:
        if tensor.numel() != 1 or tensor.dtype.is_floating_point or tensor.dtype.is_complex:
            raise TypeError("only integer tensors of a single element can be converted to an index")
    narrow = all(t.dtype in _SMALL for t in tensors) and isinstance(size, int) and size < 2**31
    dtype = torch.int32 if narrow else torch.int64
    positions = torch.arange(size, dtype=dtype, device=device)
    low, high = (_from_the_start(b, size, dtype, device) for b in bounds)
    versions = (_version(session, start), _version(session, stop))
    if not isinstance(index, slice):
        return Axis(dim, size, start, stop, 0, positions == low, low, versions)
    step = 1 if step is None else int(step)
    low = max(low, 0) if isinstance(low, int) else low
    parts = [positions >= low] if low is not None and not (isinstance(low, int) and low == 0) else []
    parts += [positions < high] if high is not None else []
    first = 0 if low is None else torch.sym_max(low, 0) if isinstance(low, (int, torch.SymInt)) else low.clamp(min=0)
    parts += [(positions - first) % step == 0] if step > 1 else []
    mask = parts[0]
    for part in parts[1:]:
        mask = mask & part
    return Axis(dim, size, start, stop, step, mask, first, versions)


def _version(session: Session, bound: Any) -> object:
    return session.trace.version(bound) if isinstance(bound, torch.Tensor) else 0


def _from_the_start(bound: Any, size: Any, dtype: torch.dtype, device: torch.device) -> Any:
    if bound is None:
        return None
    if not isinstance(bound, torch.Tensor):
        return bound + size if bound < 0 else bound
    unsigned = bound.dtype in _UNSIGNED
    bound = bound.reshape(()) if bound.ndim else bound
    if bound.dtype != dtype or bound.device != device:
        bound = bound.to(device=device, dtype=dtype)
    return bound if unsigned else torch.where(bound < 0, bound + size, bound)


def is_current(session: Session, axes: Iterable[Axis]) -> bool:
    """Whether no bound was written since its mask was made."""
    return all((_version(session, a.start), _version(session, a.stop)) == a.versions for a in axes)


def joint(axes: Iterable[Axis]) -> torch.Tensor:
    """One mask for all axes, of shape that broadcasts over the tensor they belong to."""
    masks = [a.mask.reshape(a.mask.shape + (1,) * (-a.dim - 1)) if a.dim < -1 else a.mask for a in axes]
    result = masks[0]
    for mask in masks[1:]:
        result = result & mask
    return result


def same(session: Session, a: Axis, b: Axis) -> bool:
    """Whether both mean the same elements at every run-time value."""
    return (
        a.dim == b.dim
        and a.step == b.step
        and same_size(a.size, b.size)
        and _same_bound(session, a.start, b.start, a.versions[0], b.versions[0])
        and _same_bound(session, a.stop, b.stop, a.versions[1], b.versions[1])
    )


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are known to be equal, without adding a guard."""
    return bool(a == b) if isinstance(a, int) and isinstance(b, int) else bool(statically_known_true(a == b))


def _same_bound(session: Session, a: Any, b: Any, version_a: object, version_b: object) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        if a is b:
            return version_a == version_b
        known = session.trace.affine(a)
        return known is not None and a.dtype == b.dtype and known == session.trace.affine(b)
    if isinstance(a, torch.SymInt) and isinstance(b, torch.SymInt):
        return bool(a.node.expr == b.node.expr)
    return type(a) is type(b) and bool(a == b)


def length(session: Session, axis: Axis) -> int | None:
    """How many elements the axis means when nothing is clamped, where that is the same at every run-time value."""
    if axis.is_select:
        return 1
    tensors = [symbols.as_tensor(session, b) if trace.is_unbacked(b) else b for b in (axis.start, axis.stop)]
    known = [session.trace.affine(t) for t in tensors if isinstance(t, torch.Tensor) and t.dtype in _COUNTING]
    if len(known) < 2 or known[0] is None or known[1] is None or known[0][0] != known[1][0]:
        return None
    return max(0, -(-(known[1][1] - known[0][1]) // axis.step))


def positions(axis: Axis, count: int) -> torch.Tensor:
    """Where the ``count`` elements of ``axis`` stand; out of range, all of them, when the slice has another length."""
    index = axis.first + axis.step * torch.arange(count, dtype=axis.first.dtype, device=axis.mask.device)
    return torch.where(axis.mask.sum() == count, index, axis.size)


def assign(session: Session, view: torch.Tensor, axes: Sequence[Axis], value: Any) -> None:
    """``view[axes] = value`` in place, as one ``where``; numbers, tensors of every shape that eager takes.

    ``value``'s dimensions are those of ``view`` less the selected ones. It is cast to ``view``'s dtype before the
    select, as ``copy_`` does (``where(m, 0.5, int64_base)`` would promote and lose integers beyond 2**53).
    """
    if isinstance(value, torch.Tensor):
        if len(axes) == 1 and is_run(session, axes[0], value):
            _put_run(session, view, axes[0], value)
            return
        value = _fitted(session, view, axes, value)
    else:
        value = number_like(session, view, value)
    view.copy_(torch.where(joint(axes), value, view))


def is_run(session: Session, axis: Axis, value: torch.Tensor) -> bool:
    """Whether ``value`` holds one element for each position of ``axis``, as many at every run-time value: ``x[i:i + 4] = v``."""
    count = value.shape[axis.dim] if value.ndim >= -axis.dim else 1
    return axis.step == 1 and isinstance(count, int) and count > 1 and length(session, axis) == count


def _put_run(session: Session, view: torch.Tensor, axis: Axis, value: torch.Tensor) -> None:
    """``view[i:i + count] = value`` as ``index_put_``: the pass has the mask, its cost and the range of ``i``."""
    count = value.shape[axis.dim]
    session.note(
        "NX404",
        Severity.INFO,
        f"eager raises when the slice does not hold exactly {count} elements; the captured graph writes at {count} positions from the "
        "start on, where they are inside",
        "declare a range for the bound that keeps the slice inside the tensor",
    )
    start = symbols.as_tensor(session, axis.start) if trace.is_unbacked(axis.start) else axis.start
    start = start.reshape(()) if start.dtype == torch.int64 else start.reshape(()).to(torch.int64)
    index = start + torch.arange(count, device=view.device)
    sizes = [count if dim == axis.dim + view.ndim else size for dim, size in enumerate(view.shape)]
    before: list[torch.Tensor | None] = [None] * (axis.dim + view.ndim)
    torch.ops.aten.index_put_.default(view, [*before, index], fitted(session, view, value, sizes))


def number_like(session: Session, view: torch.Tensor, value: Any) -> torch.Tensor:
    """A Python number as a 0-d tensor of ``view``'s dtype, as an assignment converts it."""
    if not isinstance(value, (bool, int, float, complex, torch.SymInt, torch.SymFloat, torch.SymBool)):
        raise TypeError(f"can't assign a {type(value).__name__} to a torch.Tensor")
    if isinstance(value, (bool, int, float, complex)):
        try:
            with _disable_current_modes():
                torch.full((), value, dtype=view.dtype)
        except RuntimeError as error:  # as eager would: value cannot be converted to ... without overflow
            raise session.refuse("NX201", "slice assignment", f"eager refuses this assignment: {error}") from error
    number: Any = value  # torch.full takes symbolic numbers, which its stub does not know
    return torch.full((), number, dtype=view.dtype, device=view.device)


def _fitted(session: Session, view: torch.Tensor, axes: Sequence[Axis], value: torch.Tensor) -> torch.Tensor:
    selected = sorted((a.dim for a in axes if a.is_select), reverse=True)
    value = _stripped(session, view, value, view.ndim - len(selected))
    for dim in selected:
        if value.ndim >= -dim:
            value = value.unsqueeze(value.ndim + dim + 1)
    by_dim = {a.dim: a for a in axes}
    for dim in range(-value.ndim, 0):
        have, want = value.shape[dim], view.shape[dim]
        if same_size(have, 1) or same_size(have, want):
            continue
        if dim not in by_dim:
            raise _mismatch(session, view, value.shape)
        value = placed(session, by_dim[dim], value, have)
    return value


def fitted(session: Session, view: torch.Tensor, value: torch.Tensor, sizes: Sequence[Any]) -> torch.Tensor:
    """``value`` as ``copy_`` writes it into a part of ``view`` of these ``sizes``: in its dtype, fit to be broadcast."""
    value = _stripped(session, view, value, len(sizes))
    for have, want in zip(reversed(value.shape), reversed(sizes), strict=False):
        if not same_size(have, 1) and not same_size(have, want):
            raise _mismatch(session, view, value.shape)
    return value


def _stripped(session: Session, view: torch.Tensor, value: torch.Tensor, ndim: int) -> torch.Tensor:
    """``value`` in ``view``'s dtype, without the leading dimensions of size 1 that an assignment ignores."""
    given = value.shape
    if value.dtype != view.dtype or value.device != view.device:
        value = value.to(device=view.device, dtype=view.dtype)
    while value.ndim > ndim and same_size(value.shape[0], 1):
        value = value.squeeze(0)
    if value.ndim > ndim:
        raise _mismatch(session, view, given)
    return value


def placed(session: Session, axis: Axis, value: torch.Tensor, count: Any) -> torch.Tensor:
    """``value`` moved along ``axis`` to where the slice stands: element ``j`` of the base takes ``j - start``."""
    if trace.is_unbacked(count):
        raise session.refuse(
            "NX201",
            "assignment of a dynamic-size tensor",
            "the size of the assigned tensor depends on data, so it cannot be aligned with the slice",
            "compute the value at full size and assign the same slice of it: x[:n] = value[:n]",
        )
    expected = length(session, axis)
    if expected is not None and isinstance(count, int) and expected != count:
        raise session.refuse(
            "NX201",
            "slice assignment",
            f"eager refuses this assignment: {count} elements do not fit a slice of {expected}",
        )
    session.note(
        "NX404",
        Severity.INFO if expected is not None else Severity.WARNING,
        f"eager raises when the slice does not hold exactly {count} elements"
        + (" (it reaches past the end)" if expected is not None else "")
        + "; the captured graph writes those that fit",
        "declare a range for the bound that keeps the slice inside the tensor",
    )
    session.rewrote(
        "slice.tensor-offset", Kind.EXACT, f"[{axis}] = value", "value.index_select(arange - start) under the mask"
    )
    positions = torch.arange(
        axis.size, device=value.device, dtype=axis.first.dtype if isinstance(axis.first, torch.Tensor) else torch.int64
    )
    index = positions - axis.first
    index = (index if axis.step == 1 else index // axis.step).clamp(0, count - 1)
    return value.index_select(axis.dim, index)


def _mismatch(session: Session, view: torch.Tensor, given: Sequence[Any]) -> Exception:
    return session.refuse(
        "NX201",
        "slice assignment",
        f"eager refuses this assignment: shape {list(given)} cannot be broadcast into {list(view.shape)}",
    )
