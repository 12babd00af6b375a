"""Which construct reads a value: told from the torch function that runs, the operator below it, and the user's syntax.

A torch function says what is done (``Tensor.__index__``), the operator what it costs (``_local_scalar_dense``: the host waits), the
running instruction and the source how it is written (``range(t)``). The advice comes from the one table in
:mod:`nxfx.report.advice`, the kinds of operators from :mod:`nxfx.analysis.value_ops`.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch

from nxfx.analysis import value_ops
from nxfx.capture import statements
from nxfx.report import advice
from nxfx.report.advice import Advice
from nxfx.report.syntax import Construct, construct_at, place_of


@dataclass(frozen=True)
class Reading:
    """What one site is.

    Attributes:
        kind: as :class:`~nxfx.report.sites.ValueSite` has it.
        role: ``"branch"``, ``"check"``, ``"value"``, ``"text"``, ``"size"``, ``"bound"``, ``"position"``, ``"copy"``, ``"random"``,
            or ``"host op"``: decides what it becomes.
        advice: code and fix.
    """

    kind: str
    role: str
    advice: Advice


# --- torch functions that hand a value to Python ---------------------------------------------------------------------

_TRUTH = {torch.Tensor.__bool__, torch.Tensor.is_nonzero, torch.is_nonzero}
_EQUALITY = {torch.equal, torch.Tensor.equal, torch.allclose, torch.Tensor.allclose}
_NUMBERS = {
    torch.Tensor.item: ".item()",
    torch.Tensor.tolist: ".tolist()",
    torch.Tensor.numpy: ".numpy()",
    torch.Tensor.__array__: "numpy conversion",
    torch.Tensor.__int__: "int()",
    torch.Tensor.__float__: "float()",
    torch.Tensor.__complex__: "complex()",
    torch.Tensor.__index__: "Python integer",
}
_TEXT = {torch.Tensor.__format__, torch.Tensor.__repr__, torch.Tensor.__str__}
LITERALS = {torch.tensor, torch.as_tensor, torch.Tensor.new_tensor, torch.asarray}
_COPIES = {torch.Tensor.cpu, torch.Tensor.to}
_ASKING = frozenset({"min", "max", "sorted", "bool", "is_nonzero"})  # builtins and functions that ask for a truth value
_INTEGER_CALLS = frozenset({"range", "int", "bin", "hex", "oct", "chr"})
_SPLITS = {torch.tensor_split, torch.Tensor.tensor_split}
LOOKED_AT: frozenset[Any] = frozenset(
    {*_TRUTH, *_EQUALITY, *_NUMBERS, *_TEXT, *_COPIES, *LITERALS, *_SPLITS, torch.Tensor.__contains__, torch._assert}
)
TEXT_OR_COPY = frozenset({*_TEXT, *_COPIES})
TOLD = object()  # stands for a function whose reading is on record: its operators add nothing


def of_function(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], frames: list[FrameType]) -> Reading | None:
    """The reading that ``function``, called with these arguments, is by itself; None where its operators must tell."""
    if function in _TRUTH:
        return _truth(frames)
    if function in _EQUALITY:
        name = function.__name__
        return _checked(Reading(f"torch.{name}", "branch", advice.CALLS[name]), frames)
    if function is torch.Tensor.__contains__:
        return _checked(Reading("in", "branch", advice.SYNTAX["in"]), frames)
    if function is torch._assert:
        return Reading("torch._assert", "check", advice.SYNTAX["assert"])
    if function in _NUMBERS:
        return _number(_NUMBERS[function], function, frames)
    if function in _TEXT:
        construct = _construct(frames)
        return Reading("f-string" if construct.kind == "format" else _called(construct, "text"), "text", advice.SYNTAX["format"])
    if function is torch.Tensor.cpu or function is torch.Tensor.to and _says_cpu((*args[1:], *kwargs.values())):
        return Reading(".cpu()", "copy", advice.HOST_COPY)
    return _of_memory(function, args, kwargs)


def _says_cpu(given: tuple[Any, ...]) -> bool:
    """``.to("cpu")`` in so many words: the device of a model that stands on a CPU says nothing."""
    return any(isinstance(value, str) and value == "cpu" for value in given)


def _of_memory(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Reading | None:
    """Functions that read a tensor's memory without an operator that says so."""
    if function in LITERALS:
        given = (*args, *kwargs.values())
        if any(isinstance(item, torch.Tensor) for value in given if isinstance(value, (list, tuple)) for item in _flat(value)):
            return Reading("torch.tensor of tensors", "value", advice.LITERAL)
    if function in _SPLITS and any(isinstance(value, torch.Tensor) for value in (*args[1:], *kwargs.values())):
        return Reading("size", "size", advice.CALLS["tensor_split"])
    return None


def _flat(value: Any, depth: int = 4) -> list[Any]:
    if isinstance(value, (list, tuple)) and depth:
        return [leaf for item in value for leaf in _flat(item, depth - 1)]
    return [value]


def _construct(frames: list[FrameType]) -> Construct:
    return construct_at(place_of(frames[0])) if frames else Construct()


def _called(construct: Construct, otherwise: str) -> str:
    return f"{construct.base}()" if construct.kind == "call" and construct.base else otherwise


def _truth(frames: list[FrameType]) -> Reading:
    construct = _construct(frames)
    if construct.kind == "call" and construct.base == "_assert":  # torch._assert itself asks only for tensor subclasses
        return Reading("torch._assert", "check", advice.SYNTAX["assert"])
    if construct.kind == "call" and construct.base in _ASKING:
        return _checked(Reading(f"{construct.base}()", "branch", Advice("NX401", advice.BRANCH, advice.CALLS[construct.base].fix)), frames)
    kind = construct.test or construct.kind if construct.kind in ("call", "") else construct.kind
    if kind not in advice.SYNTAX:
        return _checked(Reading("bool()", "branch", advice.CALLS["bool"]), frames)
    label = {"and-or": "and/or", "conditional": "conditional expression"}.get(kind, kind)
    return _checked(Reading(label, "branch", advice.SYNTAX[kind]), frames)


def _checked(reading: Reading, frames: list[FrameType]) -> Reading:
    """A check where the statement around it does nothing but raise."""
    if not frames or statements.asking(frames[0])[1] is None or statements.may_be_caught(frames):
        return reading
    return Reading("assert" if reading.kind == "assert" else "check that raises", "check", advice.SYNTAX["assert"])


def _number(spelled: str, function: Any, frames: list[FrameType]) -> Reading:
    construct = _construct(frames)
    if function is torch.Tensor.__index__:
        if construct.kind in ("read", "write"):
            return Reading("list index", "value", advice.SYNTAX["read"])
        name = construct.base if construct.kind == "call" and construct.name in _INTEGER_CALLS else ""
        return Reading(f"{name}()" if name else spelled, "value", advice.CALLS["range" if name == "range" else "index"])
    name = function.__name__.strip("_")
    return Reading(spelled, "value", advice.CALLS.get(name, advice.DATA_VALUE))


# --- operators -------------------------------------------------------------------------------------------------------

# What asks for an integer in a schema where the user can pass a 0-d tensor, by the function's name.
_COUNTS = {"topk": "k", "kthvalue": "k", "repeat_interleave": "repeats", "one_hot": "one_hot classes"}
_BOUNDS = frozenset({"narrow", "select", "slice"})
_SIZES = frozenset(
    {
        *("zeros", "ones", "empty", "full", "rand", "randn", "randint", "randperm", "arange", "linspace", "logspace", "range", "eye"),
        *("new_zeros", "new_ones", "new_empty", "new_full", "view", "reshape", "expand", "broadcast_to", "repeat", "tile", "unflatten"),
        *("split", "split_with_sizes", "chunk", "tensor_split", "as_strided", "unfold", "resize_", "pad", "interpolate", "tril_indices"),
    }
)  # fmt: skip
_NAMED = {"nonzero": "nonzero", "argwhere": "argwhere", "masked_select": "masked_select", "bincount": "bincount"}
_DROPOUTS = ("dropout", "scaled_dot_product", "attention", "lstm", "gru", "rnn", "rrelu")


def of_operator(operator: Any, kind: str, function: Any, call: tuple[Any, ...]) -> Reading | None:
    """The reading that ``operator`` of ``kind`` is, run by the torch function ``function`` with the arguments ``call``."""
    name = getattr(function, "__name__", "") or ""
    op = value_ops.name_of(operator)
    if kind == "value":
        return _argument(name, call) if op == "_local_scalar_dense" else _answer(op)
    if kind == "size":
        return _sized(op, name)
    if kind == "random":
        return _random(op, name)
    if kind == "assert":
        return Reading("assert", "check", advice.SYNTAX["assert"])
    return Reading(op, "host op", Advice("NX411", advice.HOST, advice.HOST_FIXES[op])) if kind == "host" else None


def _answer(op: str) -> Reading:
    return Reading(f"torch.{op}", "branch", advice.CALLS.get(op, advice.CALLS["bool"]))


def _argument(name: str, call: tuple[Any, ...]) -> Reading | None:
    """A 0-d tensor where a Python number is wanted."""
    if name in ("__getitem__", "__setitem__"):
        return _subscript(name, call[1] if len(call) > 1 else None)
    if name == "one_hot":
        classes = call[1] if len(call) > 1 else -1
        if isinstance(classes, int) and classes > 0:  # a check of the CPU's alone
            return None
        return Reading("one_hot", "size", advice.CALLS["one_hot"])
    if name in _COUNTS:
        return Reading(_COUNTS[name], "size", advice.CALLS[name])
    if name in _BOUNDS:
        return Reading(f"{name} bound", "bound", advice.CALLS.get(name, advice.SYNTAX["slice"]))
    if name in ("full", "new_full") and not any(isinstance(i, torch.Tensor) for i in _flat(call[name == "new_full" :][:1])):
        return Reading("number argument", "value", advice.OPERAND)  # the value to fill with
    if name in _SIZES:
        return Reading("size", "size", advice.CALLS.get(name, advice.DATA_SIZE))
    return Reading("number argument", "value", advice.OPERAND)


def _subscript(name: str, index: Any) -> Reading:
    parts = index if isinstance(index, tuple) else (index,)
    slices = any(isinstance(b, torch.Tensor) for p in parts if isinstance(p, slice) for b in (p.start, p.stop, p.step))
    if slices:
        return Reading("slice bound", "bound", advice.SYNTAX["write" if name == "__setitem__" else "slice"])
    return Reading("tensor index", "position", advice.SYNTAX["read"])


def _sized(op: str, name: str) -> Reading:
    if op.startswith(("index_put", "_unsafe_index_put", "_index_put")):
        return Reading("boolean write", "size", advice.WRITE_MASK)
    if op.startswith(("index", "_unsafe_index")):
        return Reading("boolean read", "size", advice.READ_MASK)
    if "unique" in op:
        return Reading("unique", "size", advice.CALLS["unique"])
    if op in ("nonzero", "nonzero_numpy") and name == "where":
        return Reading("where(condition)", "size", advice.CALLS["where"])
    if op.startswith("repeat_interleave"):
        return Reading("repeats", "size", advice.CALLS["repeat_interleave"])
    named = name if name in advice.CALLS else _NAMED.get(op, op)
    return Reading(named, "size", advice.CALLS.get(named, advice.DATA_SIZE))


def _random(op: str, name: str) -> Reading:
    if op == "multinomial":
        return Reading("multinomial", "random", advice.MULTINOMIAL)
    if any(part in text for part in _DROPOUTS for text in (op, name)):
        return Reading("dropout", "random", advice.DROPOUT)
    return Reading(name or op.rstrip("_"), "random", advice.DRAW)
