"""Windows: what ``x[a:b]`` gives while the bounds are tensors, so that the part has no size yet."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
import torch.nn.functional as F  # noqa: N812
from torch.utils import _pytree as pytree

from nxfx.capture import masks
from nxfx.capture.masks import Axis
from nxfx.capture.session import Session
from nxfx.report.findings import Severity
from nxfx.report.locations import Location
from nxfx.report.rewrites import Kind


def _words(text: str) -> list[str]:
    return text.split()


# Each element of the result comes from the same element of the operands, with IEEE arithmetic: layout does not matter.
_EXACT = _words(
    """
    abs neg negative sign sgn square floor ceil round trunc clamp clamp_min clamp_max clip relu relu6 threshold hardtanh
    isnan isinf isfinite isneginf isposinf signbit logical_not logical_and logical_or logical_xor
    bitwise_not bitwise_and bitwise_or bitwise_xor eq ne lt le gt ge maximum minimum fmax fmin where masked_fill
    add sub subtract mul multiply div divide true_divide floor_divide remainder fmod sqrt reciprocal
    nan_to_num clone zeros_like ones_like full_like
    __abs__ __neg__ __invert__ __add__ __radd__ __sub__ __rsub__ __mul__ __rmul__ __truediv__ __rtruediv__
    __div__ __rdiv__ __floordiv__ __rfloordiv__ __mod__ __rmod__ __and__ __rand__ __or__ __ror__ __xor__ __rxor__
    __eq__ __ne__ __lt__ __le__ __gt__ __ge__
    """
)
# As _EXACT, but CPU kernels use another polynomial for strided data: the last bit may differ.
_LAST_BIT = _words(
    """
    exp exp2 expm1 log log2 log10 log1p rsqrt sin cos tan tanh sigmoid logsigmoid silu gelu elu leaky_relu softplus
    erf erfc pow hardsigmoid hardswish mish __pow__ __rpow__
    """
)
# May return the very tensor they were given.
_CASTS = _words("to float double half bfloat16 long int short bool type_as detach contiguous")
_REDUCTIONS = _words("sum nansum prod mean any all max min amax amin argmax argmin logsumexp count_nonzero")
_DIVIDES = frozenset(_words("div divide floor_divide remainder fmod __floordiv__ __rfloordiv__ __mod__ __rmod__"))
_METADATA = frozenset(
    _words("dtype device layout ndim requires_grad is_cuda is_meta is_sparse is_quantized is_nested is_cpu itemsize")
)
_ASKS = frozenset(_words("dim ndimension is_floating_point is_complex element_size get_device is_signed"))
_WITH_INPLACE = frozenset(
    f for f in vars(F).values() if inspect.isfunction(f) and "inplace" in inspect.signature(f).parameters
)
_LAST_BIT_BOUND = "the last bit: CPU kernels round differently on strided data"
_ZERO_BOUND = "the sign of a zero, where zeros of both signs tie"
_SUM_BOUND = "a sum that also adds zeros: |error| <= length * eps * sum(|x|)"


class Window:
    """The part of ``value`` that ``axes`` mean. Reads and writes of it become masked reads and writes of the whole.

    Element-wise results are windows again (what they hold outside the mask is never looked at), reductions over the
    windowed dimensions fill the rest with their neutral element. Everything else is refused at the user's line; where
    the bounds came from ``.item()`` torch's own dynamic slice takes over instead.

    Not a tensor subclass: C code would take one for a tensor of the whole size, silently.

    Attributes:
        value: the whole tensor; an alias of the user's, so that writes and later changes are seen as through a view.
        axes: the dimensions of which a part is meant.
        origin: the base and the index it was taken with, to recognise ``x[:n] = x[:n]`` after ``x[:n] -= 1``.
        is_copy: whether eager would copy here depends on the bounds (``contiguous``), so writes cannot be followed.
    """

    def __init__(
        self, session: Session, value: torch.Tensor, axes: Sequence[Axis], origin: Any = None, is_copy: bool = False
    ) -> None:
        self._session = session
        self._value = value
        self._axes = tuple(axes)
        self._origin = origin
        self._is_copy = is_copy
        self._location = session.location()

    def __repr__(self) -> str:
        return f"Window({list(self._value.shape)}, [{', '.join(f'{a.dim}: {a}' for a in self._axes)}])"

    def __getattr__(self, name: str) -> Any:
        if name in _METADATA:
            return getattr(self._value, name)
        function = getattr(torch.Tensor, name, None)
        if function is None:
            raise AttributeError(f"'Tensor' object has no attribute {name!r}")
        if name in _ASKS:
            return getattr(self._value, name)
        if not callable(function):
            return getattr(self._tensor(f".{name}"), name)
        return functools.partial(_call, function, self)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})

    def __getitem__(self, index: Any) -> Any:
        from nxfx.capture import tensor_bounds

        return tensor_bounds.take_window(self, index)

    def __setitem__(self, index: Any, value: Any) -> None:
        part = self[index]
        if isinstance(part, Window):
            part._write(value)
        else:
            self._tensor("[...] = value")[index] = value

    def __len__(self) -> int:
        return len(self._tensor("len()"))

    def __iter__(self) -> Any:
        return iter(self._tensor("iteration"))

    def __bool__(self) -> bool:
        return bool(self._tensor("bool()"))

    __hash__ = object.__hash__

    def size(self, dim: int | None = None) -> Any:
        if dim is not None and (dim if dim < 0 else dim - self._value.ndim) not in {a.dim for a in self._axes}:
            return self._value.size(dim)
        return self._tensor(".size()").size() if dim is None else self._tensor(".size()").size(dim)

    @property
    def _is_numeric(self) -> bool:
        """Whether all bounds are numbers, out of ``.item()`` or not."""
        return not any(isinstance(b, torch.Tensor) for a in self._axes for b in (a.start, a.stop))

    def _tensor(self, use: str) -> torch.Tensor:
        """The part as a tensor of its own, for a use that masks do not reach: where its size is known after all."""
        lengths = [masks.length(self._session, a) for a in self._axes]
        if None not in lengths:
            return self._gathered([n for n in lengths if n is not None])
        if not self._is_numeric:
            _refuse(self._session, use, self)
        self._session.note(
            "NX403",
            Severity.WARNING,
            f"a slice whose bounds came from .item() is used as a whole ({use}): its size depends on data",
            "pad to a fixed size and mask, or pass the length as a Python int (one graph per bucket)",
        )
        index: list[Any] = [slice(None)] * self._value.ndim
        for axis in self._axes:
            index[axis.dim] = slice(axis.start, axis.stop, axis.step)
        with self._session.paused():
            return self._value[tuple(index)]

    def _gathered(self, lengths: Sequence[int]) -> torch.Tensor:
        """``x[n : n + 4]``: four elements from ``n`` on."""
        part = self._value
        for axis, count in zip(self._axes, lengths, strict=True):
            part = part.index_select(axis.dim, masks.positions(axis, count))
        self._session.rewrote("slice.tensor-offset-read", Kind.EXACT, "x[n : n + k]", "x.index_select(n + arange(k))")
        self._session.note(
            "NX404",
            Severity.WARNING,
            f"eager gives fewer than {' x '.join(map(str, lengths))} elements when the slice passes the end; "
            "the captured graph has a fixed size and an index out of range there",
            "declare a range for the bound that keeps the slice inside the tensor",
        )
        self._session.watch_copy(part, self._value, part, (self._value, None), [])
        return part

    def _operand(self) -> torch.Tensor:
        # In training what lies outside the mask must not reach the backward pass: its gradient is zero, but zero times
        # the infinite slope of sqrt or log there would be nan.
        if self._session.training and self._value.dtype.is_floating_point:
            return self._filled(1)
        return self._value

    def _filled(self, neutral: Any, axes: Sequence[Axis] | None = None) -> torch.Tensor:
        value = self._value
        return torch.where(
            masks.joint(axes or self._axes), value, torch.full((), neutral, dtype=value.dtype, device=value.device)
        )

    def _write(self, value: Any) -> None:
        """``window[...] = value``."""
        if self._is_copy:
            _refuse(self._session, "a write after contiguous(), which copies or does not,", self)
        self._session.rewrote("slice.tensor-bound", Kind.EXACT, "slice.op_(value)", "where(mask, value, base)")
        masks.assign(self._session, self._value, self._axes, self._unwrapped(value))

    def _unwrapped(self, value: Any) -> Any:
        return aligned(self._session, self._axes, value) if isinstance(value, Window) else value


def aligned(session: Session, axes: Sequence[Axis], value: Window) -> torch.Tensor:
    """``value``'s whole tensor, when it means the same elements as ``axes`` do (selected dimensions apart)."""
    selected = [a.dim for a in axes if a.is_select]
    wanted = [a.at(a.dim + sum(1 for s in selected if s > a.dim)) for a in axes if not a.is_select]
    given = {a.dim: a for a in value._axes}
    if len(wanted) == len(given) and all(a.dim in given and masks.same(session, a, given[a.dim]) for a in wanted):
        return value._value
    if value._is_numeric or all(masks.length(session, a) is not None for a in value._axes):
        return value._tensor("assignment to another slice")
    raise session.refuse(
        "NX201",
        "assignment between different slices",
        f"the slice {value!r} is assigned to another, {[str(a) for a in wanted]}: that sizes agree cannot be proved",
        "use the same bounds on tensors of equal size: a[:n] = b[:n], with a and b padded alike",
    )


def _refuse(session: Session, use: str, window: Any, location: Location | None = None) -> NoReturn:
    raise session.refuse(
        "NX203",
        "a slice whose size depends on a tensor",
        f"{use} needs the size of {window}, which depends on a tensor's value; a Neuron graph has fixed shapes",
        "work at full size and mask: x.masked_fill(arange(x.shape[d]) >= n, neutral); "
        "or slice with a Python int (one graph per bucket)",
        location,
    )


# --- functions on windows --------------------------------------------------------------------------------------------

Rule = Callable[[Any, str, tuple[Any, ...], dict[str, Any]], Any]


def _call(function: Any, window: Window, *args: Any, **kwargs: Any) -> Any:
    return _dispatch(function, (window, *args), kwargs)


def _dispatch(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    windows = [a for a in pytree.tree_leaves((args, kwargs)) if isinstance(a, Window)]
    name, rule = _RULES.get(function, ("", None))
    if rule is not None and _is_simple(args, kwargs):
        return rule(function, name, args, kwargs)
    use = getattr(function, "__name__", str(function))
    native = {id(w): w._tensor(use) for w in windows}
    args, kwargs = pytree.tree_map(lambda a: native.get(id(a), a), (args, kwargs))
    return function(*args, **kwargs)


def _is_simple(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """No window inside a container, nothing written to ``out=``."""
    nested = pytree.tree_leaves([a for a in (*args, *kwargs.values()) if isinstance(a, (list, tuple, dict))])
    return kwargs.get("out") is None and not any(isinstance(a, Window) for a in nested)


def _elementwise(function: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    window: Window = next(a for a in (*args, *kwargs.values()) if isinstance(a, Window))
    session, axes = window._session, window._axes
    if kwargs.get("inplace") or function in _WITH_INPLACE and any(a is True for a in args):
        _refuse(session, f"{name}(inplace=True)", window)
    operands = [_operand(session, axes, name, a) for a in args]
    named = {k: _operand(session, axes, name, v) for k, v in kwargs.items()}
    if name in _DIVIDES:
        _keep_divisor_safe(session, axes, name, operands, named)
    result = function(*operands, **named)
    if name in _LAST_BIT or "alpha" in kwargs:  # x + alpha * y is one rounding or two
        session.rewrote(
            "slice.tensor-bound-read", Kind.REASSOCIATED, f"{name}(slice)", f"{name}(base), masked", _LAST_BIT_BOUND
        )
    return Window(session, result, axes)


def _cast(function: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    window, *rest = args
    if not isinstance(window, Window):  # type_as(window)
        return function(window, *[a._value if isinstance(a, Window) else a for a in rest], **kwargs)
    result = function(window._value, *[a._value if isinstance(a, Window) else a for a in rest], **kwargs)
    is_copy = window._is_copy or name == "contiguous"
    return (
        window
        if result is window._value and not is_copy
        else Window(window._session, result, window._axes, is_copy=is_copy)
    )


def _operand(session: Session, axes: Sequence[Axis], name: str, value: Any) -> Any:
    if isinstance(value, Window):
        given = {a.dim: a for a in value._axes}
        if len(given) != len(axes) or not all(a.dim in given and masks.same(session, a, given[a.dim]) for a in axes):
            _refuse(session, f"{name} of slices that differ", value)
        return value._operand()
    if isinstance(value, torch.Tensor):
        for axis in axes:
            if value.ndim < -axis.dim or masks.same_size(value.shape[axis.dim], 1):
                continue
            if masks.length(session, axis) != value.shape[axis.dim]:
                _refuse(session, f"{name} with a tensor of {list(value.shape)}", f"the slice [{axis}]")
            value = masks.placed(session, axis, value, value.shape[axis.dim])
    return value


def _keep_divisor_safe(
    session: Session, axes: Sequence[Axis], name: str, operands: list[Any], named: dict[str, Any]
) -> None:
    """Integer division by a zero that lies outside the slice would raise where eager does not."""
    at = 0 if name.startswith("__r") else 1
    divisor = operands[at] if len(operands) > at else named.get("other")
    if isinstance(divisor, torch.Tensor):
        if not divisor.dtype.is_floating_point and not divisor.dtype.is_complex:
            safe = torch.where(masks.joint(axes), divisor, torch.ones((), dtype=divisor.dtype, device=divisor.device))
            if len(operands) > at:
                operands[at] = safe
            else:
                named["other"] = safe
    elif type(divisor) is int and divisor == 0:
        raise session.refuse("NX201", "division by zero", "an integer slice is divided by zero")


def _in_place(function: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    window = args[0]
    if not isinstance(window, Window):
        other = next(a for a in args if isinstance(a, Window))
        _refuse(other._session, f"{name} on a whole tensor", other)
    session, base = window._session, window._value
    pure = f"__{name[3:]}" if name.startswith("__i") else name[:-1]
    result = _elementwise(getattr(torch.Tensor, pure), pure, args, kwargs)
    value = result._value
    if not torch.can_cast(value.dtype, base.dtype):
        raise RuntimeError(f"result type {value.dtype} can't be cast to the desired output type {base.dtype}")
    if len(value.shape) != base.ndim or not all(
        masks.same_size(a, b) for a, b in zip(value.shape, base.shape, strict=True)
    ):
        raise session.refuse(
            "NX201", "in-place operation", f"eager refuses {name}: the result has another shape than the slice"
        )
    window._write(Window(session, value, window._axes))
    return window


def _fill(function: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    window, *rest = args
    value = 0 if name == "zero_" else rest[0] if rest else kwargs.get("value", kwargs.get("src"))
    window._write(value)
    return window


def _neutral(name: str, dtype: torch.dtype) -> Any:
    if name in ("sum", "any", "count_nonzero", "nansum"):
        return 0
    if name in ("prod", "all"):
        return 1
    lowest = name in ("max", "amax", "argmax", "logsumexp", "softmax", "log_softmax")
    if dtype is torch.bool:
        return not lowest
    if dtype.is_floating_point:
        return float("-inf") if lowest else float("inf")
    return torch.iinfo(dtype).min if lowest else torch.iinfo(dtype).max


def _reduction(function: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    window, *rest = args
    if not isinstance(window, Window) or any(isinstance(a, Window) for a in rest):
        return _elementwise(function, name, args, kwargs)  # max(x, other)
    if rest and isinstance(rest[0], torch.Tensor) or isinstance(kwargs.get("other"), torch.Tensor):
        return _elementwise(function, name, args, kwargs)
    session, ndim = window._session, window._value.ndim
    dims, keep = _dims(name, ndim, rest, kwargs)
    inside = [a for a in window._axes if a.dim in dims]
    if name in ("max", "min") and (rest or "dim" in kwargs) or name in ("argmax", "argmin"):
        # Positions in the slice are those in the whole only when it starts at 0; the first of equals stays the first.
        if any(not a.is_prefix for a in inside) or len(inside) > 1:
            _refuse(session, f"{name} with positions", window)
        if name.startswith("arg") and inside and len(dims) == ndim and ndim > 1:
            _refuse(session, f"{name} over all dimensions", window)
    bound = _bound(name, window._value.dtype)
    session.rewrote(
        "slice.tensor-bound-read",
        Kind.REASSOCIATED if bound else Kind.EXACT,
        f"slice.{name}()",
        f"where(mask, base, {'0' if name == 'mean' else 'neutral'}).{name}()",
        bound,
    )
    if name == "mean":
        result = _mean(window, inside, dims, keep, kwargs)
    else:
        whole = window._filled(_neutral(name, window._value.dtype), inside) if inside else window._operand()
        result = function(whole, *rest, **kwargs)
    left = [a.at(_new_dim(a.dim, dims, keep)) for a in window._axes if a.dim not in dims]
    return pytree.tree_map(lambda t: Window(session, t, left), result) if left else result


def _bound(name: str, dtype: torch.dtype) -> str:
    """What may differ from eager's order of reduction; empty: nothing."""
    inexact = dtype.is_floating_point or dtype.is_complex
    if not inexact or name in ("any", "all", "count_nonzero", "argmax", "argmin"):
        return ""
    return _ZERO_BOUND if name in ("max", "min", "amax", "amin") else _SUM_BOUND


def _dims(name: str, ndim: int, rest: list[Any], kwargs: dict[str, Any]) -> tuple[set[int], bool]:
    given = rest[0] if rest else kwargs.get("dim", kwargs.get("axis"))
    keep = bool(rest[1] if len(rest) > 1 else kwargs.get("keepdim", kwargs.get("keepdims", False)))
    if given is None or isinstance(given, (list, tuple)) and not given:
        return set(range(-ndim, 0)), keep
    given = given if isinstance(given, (list, tuple)) else [given]
    return {d if d < 0 else d - ndim for d in given}, keep


def _new_dim(dim: int, reduced: set[int], keep: bool) -> int:
    return dim if keep else dim + sum(1 for d in reduced if d > dim)


def _mean(window: Window, inside: Sequence[Axis], dims: set[int], keep: bool, kwargs: dict[str, Any]) -> torch.Tensor:
    value = window._value
    dtype = kwargs.get("dtype") or value.dtype
    if not dtype.is_floating_point and not dtype.is_complex:
        raise RuntimeError(
            f"mean(): could not infer output dtype. Input dtype must be a floating point dtype. Got: {dtype}"
        )
    wide = torch.float32 if dtype.itemsize < 4 else dtype
    total = (window._filled(0, inside) if inside else window._operand()).sum(sorted(dims), keepdim=keep, dtype=wide)
    count: Any = 1
    for dim in dims:
        count = count * next((a.mask.sum() for a in inside if a.dim == dim), value.shape[dim])
    mean: torch.Tensor = (total / count).to(dtype)
    return mean


def _softmax(function: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    window, *rest = args
    dim = rest[0] if rest else kwargs.get("dim")
    if dim is None or not isinstance(window, Window):
        other = next(a for a in args if isinstance(a, Window))
        _refuse(other._session, f"{name} without dim", other)
    session, value = window._session, window._value
    inside = [a for a in window._axes if a.dim == (dim if dim < 0 else dim - value.ndim)]
    session.rewrote(
        "slice.tensor-bound-read", Kind.REASSOCIATED, f"{name}(slice)", f"{name}(where(mask, base, -inf))", _SUM_BOUND
    )
    whole = window._filled(float("-inf"), inside) if inside else window._operand()
    return Window(session, function(whole, *rest, **kwargs), window._axes)


def _in_place_names() -> list[str]:
    named = [f"{n}_" for n in (*_EXACT, *_LAST_BIT) if not n.startswith("__")]
    dunder = [
        f"__i{n[2:]}" for n in (*_EXACT, *_LAST_BIT) if n.startswith("__") and hasattr(torch.Tensor, f"__i{n[2:]}")
    ]
    return [*named, *dunder]


def _rules() -> dict[Any, tuple[str, Rule]]:
    table: list[tuple[Rule, Sequence[str]]] = [
        (_elementwise, [*_EXACT, *_LAST_BIT]),
        (_cast, _CASTS),
        (_in_place, _in_place_names()),
        (_fill, ["fill_", "zero_", "copy_"]),
        (_reduction, _REDUCTIONS),
        (_softmax, ["softmax", "log_softmax"]),
    ]
    rules: dict[Any, tuple[str, Rule]] = {}
    for rule, names in table:
        for name in names:
            for owner in (torch.Tensor, torch, F, torch.special):
                function = getattr(owner, name, None)
                if function is not None:
                    rules[function] = (name, rule)
    return rules


_RULES = _rules()


def _operator(name: str) -> Any:
    function = getattr(torch.Tensor, name)

    def operate(self: Window, *args: Any) -> Any:
        return _dispatch(function, (self, *args), {})

    operate.__name__ = name
    return operate


for _name in (
    *_EXACT,
    *_LAST_BIT,
    *_in_place_names(),
    "__matmul__",
    "__rmatmul__",
    "__float__",
    "__int__",
    "__index__",
    "__contains__",
):
    if _name.startswith("__") and hasattr(torch.Tensor, _name):
        setattr(Window, _name, _operator(_name))


def check_outputs(session: Session, outputs: Any) -> None:
    """Refuse a model that returns a window, or keeps one: its size depends on data.

    Raises:
        CaptureError: at the line that took the slice.
    """
    for value in pytree.tree_leaves(outputs):
        if isinstance(value, Window):
            _refuse(session, "an output", value, value._location)
