"""``x[index]`` and ``x[index] = value`` with tensors among the slice bounds, and with 0-d tensors as positions.

Python hands ``slice(None, n)`` to torch, which asks the tensor ``n`` for its number: at capture that freezes the
example's value or fails. Here the write becomes a mask made of ``arange`` comparisons and one ``where``, and the read a
:class:`~nxfx.capture.windows.Window`. One capture serves every run-time value, out-of-range ones included.
"""

from __future__ import annotations

from typing import Any

import torch

from nxfx.capture import found_positions, masks, symbols, trace
from nxfx.capture.masks import Axis
from nxfx.capture.session import Copied, Session
from nxfx.capture.windows import Window, aligned
from nxfx.report.findings import Severity
from nxfx.report.rewrites import Kind

_FULL = slice(None)
# A 0-d tensor of these is a mask, not a position.
_MASKS = (torch.bool, torch.uint8)


def is_position(item: Any) -> bool:
    """A 0-d integer tensor, or a number that came out of a tensor: ``x[i]`` takes one element."""
    if isinstance(item, torch.Tensor):
        return (
            item.ndim == 0
            and item.dtype not in _MASKS
            and not item.dtype.is_floating_point
            and not item.dtype.is_complex
        )
    return trace.is_unbacked(item)


def is_dynamic_slice(item: Any) -> bool:
    """A slice with a tensor, or a number that came out of one, on either end (or as a step, which is refused)."""
    if type(item) is not slice:
        return False
    return any(isinstance(b, torch.Tensor) or trace.is_unbacked(b) for b in (item.start, item.stop, item.step))


def needs_interception(index: Any) -> bool:
    """Whether torch would ask a tensor for its value."""
    items = index if type(index) is tuple else (index,)
    return any(is_dynamic_slice(i) or is_position(i) for i in items)


def on_getitem(session: Session, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``Tensor.__getitem__``."""
    base, index = args
    if session.found:
        index = found_positions.as_masks(session, index)
        result = _read(session, function, base, index)
        found_positions.column(session, base, index, result)
        return result
    return _read(session, function, base, index)


def _read(session: Session, function: Any, base: Any, index: Any) -> Any:
    if not needs_interception(index) or not trace.is_tracing(base):
        return function(base, index)
    items = _expanded(_with_literals(index), base.ndim)
    if not needs_interception(tuple(items)):
        return function(base, tuple(items))
    part, rest = _gather(session, base, items)
    result = _take(session, part, rest, (), (base, index) if part is base else None)
    if part is not base:
        positions = [i for i in (index if type(index) is tuple else (index,)) if isinstance(i, torch.Tensor)]
        versions = [(p, session.trace.version(p)) for p in positions]
        session.watch_copy(part, base, result, (base, index), versions)
    return result


def on_setitem(session: Session, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``Tensor.__setitem__``."""
    base, index, value = args
    index = found_positions.as_masks(session, index) if session.found else index
    if isinstance(value, Window) and not needs_interception(index):
        return function(base, index, value._tensor("assignment to a slice of fixed size"))
    if not needs_interception(index) or not trace.is_tracing(base):
        return function(base, index, value)
    items = _expanded(_with_literals(index), base.ndim)
    if not needs_interception(tuple(items)):
        return function(base, tuple(items), value)
    if (
        isinstance(value, Window)
        and value._origin is not None
        and _same_place(value._origin, (base, index))
        and masks.is_current(session, value._axes)
    ):
        return None  # x[:n] -= 5: the subtraction has already written through the window
    if any(map(_is_advanced, items)):
        return _set_advanced(session, function, base, items, value)
    kept = [_FULL if is_dynamic_slice(i) or is_position(i) else i for i in items]
    view = base if _is_whole(kept) else base[tuple(kept)]
    if not any(map(is_dynamic_slice, items)):
        copied = _put_back(session, base, index, value)
        _put(session, view, items, value)
    else:
        axes = _axes(session, view, items)
        session.rewrote("slice.tensor-bound", Kind.EXACT, f"x[{_text(axes)}] = value", "where(mask, value, x)")
        _note_positions(session, axes)
        copied = _put_back(session, base, index, value)
        masks.assign(session, view, axes, aligned(session, axes, value) if isinstance(value, Window) else value)
    if copied is not None:
        copied.since = copied.copy.graph._root.prev
    return None


def _put(session: Session, view: torch.Tensor, items: list[Any], value: Any) -> None:
    """``view[i] = value``, ``i`` 0-d tensors, as ``index_put_``: the pass has the mask, its cost and the range of ``i``."""
    indices: list[torch.Tensor | None] = []
    for item in items:
        if is_position(item):
            indices.append(_position(session, item))
        elif item is None or type(item) is slice:
            indices.append(None)
    if isinstance(value, Window):
        value = value._tensor("assignment to one position")
    value = masks.number_like(session, view, value) if not isinstance(value, torch.Tensor) else value
    wanted = [size for size, index in zip(view.shape, indices, strict=True) if index is None]
    torch.ops.aten.index_put_.default(view, indices, masks.fitted(session, view, value, wanted))
    session.rewrote("slice.tensor-index-write", Kind.EXACT, "x[i] = value", "index_put(x, i, value)")


def _position(session: Session, item: Any) -> torch.Tensor:
    """A position as an index tensor."""
    position = symbols.as_tensor(session, item) if trace.is_unbacked(item) else item
    return position if position.dtype in (torch.int64, torch.int32) else position.to(torch.int64)


def take_window(window: Window, index: Any) -> Any:
    """``window[index]``: static on the other dimensions, and more tensor bounds there."""
    session, value = window._session, window._value
    items = _expanded(_with_literals(index), value.ndim)
    dims = {a.dim + value.ndim: a for a in window._axes}
    at, kept = 0, {}
    for position, item in enumerate(items):
        if item is None:
            continue
        if _is_advanced(item) or is_position(item) or at in dims and not (type(item) is slice and _is_whole([item])):
            return window._tensor(f"indexing with [{_show(item)}]")[index]
        if at in dims:
            kept[position] = dims[at]
        at += 1
    ndim = sum(1 for i in items if i is None or type(i) is slice)
    axes = [a.at(sum(1 for i in items[:p] if i is None or type(i) is slice) - ndim) for p, a in kept.items()]
    return _take(session, value, items, tuple(axes), None, window._is_copy)


def _take(
    session: Session, base: torch.Tensor, items: list[Any], axes: tuple[Axis, ...], origin: Any, is_copy: bool = False
) -> Any:
    """``base[items]``: a tensor, or a window where bounds are dynamic or ``axes`` (of the result) were there before."""
    dynamic = any(map(is_dynamic_slice, items))
    if dynamic and any(map(_is_advanced, items)):
        raise _mixed(session)
    kept = [_FULL if is_dynamic_slice(i) else i for i in items]
    view = base if _is_whole(kept) else base[tuple(kept)]
    if not dynamic and not axes:
        return view
    return Window(session, view, (*axes, *_axes(session, view, items)), origin, is_copy)


def _with_literals(index: Any) -> Any:
    """``index`` with tensors whose number the trace knows (``torch.tensor(3)`` in the model) replaced by it."""

    def number(bound: Any) -> Any:
        return trace.literal(bound) if isinstance(bound, torch.Tensor) and bound.numel() == 1 else bound

    def one(item: Any) -> Any:
        if is_dynamic_slice(item):
            return slice(number(item.start), number(item.stop), number(item.step))
        return number(item) if is_position(item) else item

    return tuple(map(one, index)) if type(index) is tuple else one(index)


def _expanded(index: Any, ndim: int) -> list[Any]:
    """``index`` as a list that covers every dimension, ``...`` written out.

    Raises:
        IndexError: as eager does.
    """
    items = list(index) if type(index) is tuple else [index]
    used = sum(map(_consumes, items))
    if ndim == 0 and used:
        raise IndexError("slice() cannot be applied to a 0-dim tensor.")
    if used > ndim:
        raise IndexError(f"too many indices for tensor of dimension {ndim}")
    at = next((i for i, item in enumerate(items) if item is Ellipsis), None)
    rest = [_FULL] * (ndim - used)
    items = [*items, *rest] if at is None else [*items[:at], *rest, *items[at + 1 :]]
    return [_FULL if i is Ellipsis else i for i in items]


def _consumes(item: Any) -> int:
    if item is None or item is Ellipsis or isinstance(item, bool):
        return 0
    return item.ndim if isinstance(item, torch.Tensor) and item.dtype in _MASKS else 1


def _is_advanced(item: Any) -> bool:
    if item is None or isinstance(item, slice):
        return False
    return (
        isinstance(item, (bool, list, tuple, range))
        or getattr(item, "ndim", 0) > 0
        or isinstance(item, torch.Tensor)
        and not is_position(item)
    )


def _is_whole(items: list[Any]) -> bool:
    return all(type(i) is slice and i.start in (None, 0) and i.stop is None and i.step in (None, 1) for i in items)


def _axes(session: Session, view: torch.Tensor, items: list[Any]) -> list[Axis]:
    """The dynamic dimensions of ``view``, which is the base indexed with all the rest of ``items``."""
    axes, dim = [], 0
    for item in items:
        if is_dynamic_slice(item) or is_position(item):
            if type(item) is slice:
                _check_step(session, item.step)
            axes.append(masks.make_axis(session, dim - view.ndim, view.shape[dim], item, view.device))
        dim += item is None or isinstance(item, slice) or is_position(item)
    return axes


def _check_step(session: Session, step: Any) -> None:
    if isinstance(step, torch.Tensor) or trace.is_unbacked(step):
        raise session.refuse(
            "NX404",
            "a tensor as slice step",
            "the step of a slice is a tensor",
            "use a Python int as step, or build the mask",
        )
    if step is not None and step <= 0:
        raise ValueError("slice step cannot be zero" if step == 0 else "step must be greater than zero")


def _gather(session: Session, base: torch.Tensor, items: list[Any]) -> tuple[torch.Tensor, list[Any]]:
    """Take the elements at tensor positions, which eager does first, with ``aten.index``: no value reaches Python.

    Eager gives a view there, this is a copy. The difference shows only when one is written while the other is in use:
    :func:`check_copies` looks for that when the model has run.
    """
    part, rest = base, list(items)
    for at in reversed([i for i, item in enumerate(items) if is_position(item)]):
        before = [None] * sum(map(_consumes, items[:at]))
        part = torch.ops.aten.index.Tensor(part, [*before, _position(session, items[at])])
        del rest[at]
    if part is not base:
        session.rewrote("slice.tensor-index-read", Kind.EXACT, "x[i]", "aten.index(x, i)")
    return part, rest


def _set_advanced(session: Session, function: Any, base: torch.Tensor, items: list[Any], value: Any) -> None:
    """``x[rows, i] = v``: take ``x[:, i]``, write the rows there, and put it back."""
    if any(map(is_dynamic_slice, items)):
        raise _mixed(session)
    part, rest = _gather(session, base, items)
    function(part, tuple(rest), value)
    back = [i if is_position(i) else _FULL for i in items for _ in range(_consumes(i))]
    axes = _axes(session, base, back)
    session.rewrote("slice.tensor-bound", Kind.EXACT, f"x[{_text(axes)}, rows] = value", "where(mask, value, x)")
    _note_positions(session, axes)
    masks.assign(session, base, axes, part)


def _mixed(session: Session) -> Exception:
    return session.refuse(
        "NX201",
        "tensor bounds together with advanced indices",
        "a slice with tensor bounds stands beside a list, array or mask index",
        "index in two steps: x[rows][:, :n], or write with torch.where and a mask",
    )


def _note_positions(session: Session, axes: list[Axis]) -> None:
    if any(a.is_select for a in axes):
        session.note(
            "NX404",
            Severity.INFO,
            "eager raises when the position lies outside the tensor; the captured graph writes nothing",
            "declare a range for the position",
        )


def _same_place(one: tuple[Any, Any], other: tuple[Any, Any]) -> bool:
    """The same base object under the very same index objects, as Python evaluates them once for ``x[i] op= v``."""
    (base, index), (base2, index2) = one, other
    a, b = (i if type(i) is tuple else (i,) for i in (index, index2))
    return base is base2 and len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))


def _put_back(session: Session, base: torch.Tensor, index: Any, value: Any) -> Copied | None:
    """The copy that ``x[i] += v`` read, changed and is about to write back to where it came from."""
    for copied in reversed(session.copies):
        if value is copied.result and _same_place(copied.place, (base, index)):
            aliases = session.trace.aliases(copied.copy.graph)
            untouched = aliases.first_write(aliases.root(copied.base), copied.since) is None
            return copied if untouched and all(session.trace.version(p) == v for p, v in copied.versions) else None
    return None


def check_copies(session: Session) -> None:
    """Refuse where ``x[i]`` had to be a view: it was written, or ``x`` was written while it was in use."""
    for copied in session.copies:
        aliases = session.trace.aliases(copied.copy.graph)
        written = aliases.first_write(aliases.root(copied.base), copied.since)
        stale = written is not None and aliases.is_used_after(copied.copy, written)
        if stale or aliases.first_write(copied.copy, copied.since) is not None:
            raise session.refuse(
                "NX201",
                "x[i] with a tensor i, used as a view",
                "x[i], i a tensor, and then it or x is written in place: in the graph they are no longer one memory",
                "write through the base, x[i] = value, or take a copy that nobody writes: x[i].clone()",
                copied.location,
            )


def _text(axes: list[Axis]) -> str:
    return ", ".join(map(str, axes))


def _show(item: Any) -> str:
    return "tensor" if isinstance(item, torch.Tensor) else str(item)
