"""The thin shell that is exported instead of the model.

It takes one tensor per input leaf and returns a flat list of tensors, shares the model's own registries (so names and
tensor objects stay the model's), lends it its plain tensors as buffers, and notes, outside the module, what ``torch.export``
cannot carry: the calling convention and what ``forward`` did to its arguments and to the model's Python state.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from nxfx.capture.counters import Count
from nxfx.capture.rebinding import rebound, views
from nxfx.capture.state import Change, CounterSlot, Holder, ModuleState, Place, Slot, writing_line
from nxfx.capture.structure import Path, flatten, static_values, unflatten
from nxfx.errors import CaptureError
from nxfx.report import Finding, Report, Severity

PLAIN = "_nxfx_plain"


@dataclass
class Assigned:
    """A value that ``forward`` left somewhere: its structure, and for each leaf where it comes from.

    Attributes:
        spec: structure of the value.
        leaves: ``("input", i)``: the i-th input leaf (after its mutation); ``("output", j)``: the j-th flat output;
            ``("state", name)``: the plain tensor of that name.
    """

    spec: Any
    leaves: list[tuple[str, Any]]


@dataclass
class StateWrite:
    """``forward`` changed a plain attribute: ``holder``'s entry ``key`` became ``value`` (None: it was removed)."""

    holder: Holder
    key: Any
    path: str
    value: Assigned | None


@dataclass
class StateGuard:
    """The capture holds only while ``holder``'s entry ``key`` looks like this."""

    holder: Holder
    key: Any
    path: str
    before: Any  # spec, or MISSING

    def holds(self) -> bool:
        now = self.holder.now()
        return bool((flatten(now[self.key]).spec if self.key in now else MISSING) == self.before)


MISSING = "<missing>"


@dataclass
class Convention:
    """How flat tensors become the model's call and its results.

    Attributes:
        input_spec: structure of ``(args, kwargs)``.
        input_names: one name per input leaf.
        output_spec: structure of the result.
        output_count: number of flat user outputs.
        passed_through: output leaf → input leaf, where the result *is* the caller's tensor.
        returned_state: output leaf → name of the model's tensor that the result *is*.
        arguments_after: what the argument containers hold after the call, None when untouched.
        state_writes, state_guards: Python state of the model that the call changes, and rests on.
        rebound: plain tensors of the model that the call replaces; the graph writes their buffers.
        views: attributes that the call leaves a part of another tensor in.
    """

    input_spec: Any
    input_names: list[str]
    output_spec: Any = None
    output_count: int = 0
    passed_through: dict[int, int] = field(default_factory=dict)
    returned_state: dict[int, str] = field(default_factory=dict)
    arguments_after: Assigned | None = None
    state_writes: list[StateWrite] = field(default_factory=list)
    state_guards: list[StateGuard] = field(default_factory=list)
    state_changes: list[Change] = field(default_factory=list)
    rebound: list[Change] = field(default_factory=list)
    views: list[str] = field(default_factory=list)

    def counted_arguments(self) -> Iterator[tuple[Path, Any, Any]]:
        """Numbers that the call changes in the Python state of its arguments: where, before, after."""
        after = dict(static_values(self.arguments_after.spec)) if self.arguments_after is not None else {}
        for path, was in static_values(self.input_spec) if after else ():
            now = after.get(path)
            if type(was) in (int, float) and type(now) is type(was) and now != was:
                yield path, was, now


class Shell(torch.nn.Module):
    """See the module's docstring. ``convention`` is complete once ``forward`` has been traced.

    Args:
        around: given the leaves, the context in which ``forward`` runs.
        marks: gives tensors that the graph returns after everything else, once ``forward`` has run.
        counters: where the model keeps integers that the graph has as buffers.
        count: makes what stands for such an integer, of its buffer and its name.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        convention: Convention,
        state: ModuleState,
        around: Callable[[Sequence[Any]], contextlib.AbstractContextManager[Any]],
        marks: Callable[[], list[torch.Tensor]] = list,
        counters: Collection[Place] = (),
        count: Callable[[torch.Tensor, str], Count] | None = None,
    ) -> None:
        super().__init__()
        own = self.__dict__
        own["training"] = model.training
        own["_parameters"] = model._parameters
        own["_buffers"] = model._buffers
        own["_non_persistent_buffers_set"] = model._non_persistent_buffers_set
        own["_modules"] = dict(model._modules)
        own["_nxfx"] = (model, convention, state, around, marks, count)
        self.slots: dict[str, Slot] = {}
        plain = torch.nn.Module()
        for number, slot in enumerate([*state.slots(), *state.counters(counters)]):
            plain.register_buffer(f"plain_{number}", slot.tensor, persistent=False)
            self.slots[f"{PLAIN}.plain_{number}"] = slot
        if self.slots:
            own["_modules"][PLAIN] = plain
        # Export names placeholders after the parameters of `forward`.
        names = convention.input_names
        namespace: dict[str, Any] = {}
        exec(f"def forward(self, {', '.join(names)}):\n    return self._run([{', '.join(names)}])", namespace)
        own["forward"] = types.MethodType(namespace["forward"], self)

    def _run(self, leaves: Sequence[torch.Tensor]) -> list[Any]:
        model, convention, state, around, marks, count = self.__dict__["_nxfx"]
        args, kwargs = arguments = unflatten(convention.input_spec, leaves)
        before = flatten(arguments, share=True)
        with self._lend_plain_tensors(state, count) as (lent, places), around(leaves):
            before_call = state.registered_now()
            result = model(*args, **kwargs)
            _refuse_misfits(model, before_call, state.registered_now())
            self._take_counters(places)
            for name, tensor in model.named_buffers():
                lent.setdefault(id(tensor), name)
            changes = [c for c in state.changes() if c.removed or places.get((id(c.holder.container), c.key)) is not c.after]
            buffers = {(id(s.holder.container), s.key): (s, self.get_buffer(name)) for name, s in self.slots.items()}
            kept = [*flatten(result).leaves, *flatten(arguments, share=True).leaves]
            own = [*leaves, *model.parameters(), *model.buffers(), *(tensor for _, tensor in buffers.values())]
            convention.rebound = rebound(changes, buffers, kept, own)
            convention.views = views(changes, own)
        return [*self._conclude(convention, before, arguments, result, changes, leaves, lent), *marks()]

    @contextlib.contextmanager
    def _lend_plain_tensors(
        self, state: ModuleState, count: Callable[[torch.Tensor, str], Count] | None
    ) -> Iterator[tuple[dict[int, str], dict[Any, Any]]]:
        """id of each lent tensor → its name, and where it was put."""
        lent: dict[int, str] = {}
        places: dict[Any, Any] = {}
        for name, slot in self.slots.items():
            tensor = self.get_buffer(name)
            if isinstance(slot, CounterSlot) and count is not None:
                places[id(slot.holder.container), slot.key] = counter = count(tensor, slot.name)
                slot.holder.set(slot.key, counter)
                continue
            lent[id(tensor)] = slot.name
            for holder, key in slot.aliases:
                holder.set(key, tensor)
                places[id(holder.container), key] = tensor
        for holder, key, tensor, name in state.registered_aliases():
            holder.set(key, tensor)
            lent[id(tensor)] = name
            places[id(holder.container), key] = tensor
        yield lent, places

    def _take_counters(self, places: dict[Any, Any]) -> None:
        """What ``forward`` left in each counter goes into its buffer."""
        slots = [(name, slot) for name, slot in self.slots.items() if isinstance(slot, CounterSlot)]
        left = [places[id(slot.holder.container), slot.key].left(slot.holder.now().get(slot.key)) for _, slot in slots]
        for (name, slot), value in zip(slots, left, strict=True):
            if value is not None:
                self.get_buffer(name).copy_(value)
            slot.holder.set(slot.key, places[id(slot.holder.container), slot.key])

    @staticmethod
    def _conclude(
        convention: Convention,
        before: Any,
        arguments: Any,
        result: Any,
        changes: list[Change],
        leaves: Sequence[torch.Tensor],
        lent: dict[int, str],
    ) -> list[Any]:
        index_of = {id(leaf): i for i, leaf in enumerate(leaves)}
        outputs: list[Any] = []

        def assigned(flat: Any) -> Assigned:
            origins: list[tuple[str, Any]] = []
            for leaf in flat.leaves:
                if id(leaf) in index_of:
                    origins.append(("input", index_of[id(leaf)]))
                elif id(leaf) in lent:
                    origins.append(("state", lent[id(leaf)]))
                else:
                    origins.append(("output", len(outputs)))
                    outputs.append(leaf)
            return Assigned(flat.spec, origins)

        same: dict[int, Path] = {}
        for identity, path in before.mutable.items():
            same[identity] = path
        flat = flatten(result, same=same)
        convention.output_spec, convention.output_count = flat.spec, len(flat.leaves)
        convention.passed_through = {i: index_of[id(leaf)] for i, leaf in enumerate(flat.leaves) if id(leaf) in index_of}
        convention.returned_state = {i: lent[id(leaf)] for i, leaf in enumerate(flat.leaves) if id(leaf) in lent}
        outputs.extend(flat.leaves)

        after = flatten(arguments, share=True)
        if after.spec != before.spec or [id(x) for x in after.leaves] != [id(x) for x in before.leaves]:
            convention.arguments_after = assigned(after)
        convention.state_changes = changes
        convention.state_writes = [
            StateWrite(c.holder, c.key, c.path, None if c.removed else assigned(flatten(c.after))) for c in changes
        ]
        convention.state_guards = [
            StateGuard(c.holder, c.key, c.path, flatten(c.before).spec if c.key in c.holder.content else MISSING) for c in changes
        ]
        return outputs


def _refuse_misfits(model: torch.nn.Module, before: list[Change], after: list[Change]) -> None:
    """A registered tensor that forward replaces must keep dtype and shape: the new value is copied into the old one."""
    for was, now in zip(before, after, strict=False):
        if was.path == now.path and _kind(was.after) == _kind(now.after):
            continue
        verb = f"from {_kind(was.after)} to {_kind(now.after)}" if was.path == now.path else "(added or removed)"
        what = now.path if was.path == now.path else min(was.path, now.path)
        raise _misfit(model, now, what, verb)
    if len(before) != len(after):
        raise _misfit(model, last := max(before, after, key=len)[-1], last.path, "(added or removed)")


def _kind(tensor: Any) -> str:
    return "None" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


class RegisteredMisfit(CaptureError):
    """A registered tensor changes dtype or shape: no other way of capturing helps."""


def _misfit(model: torch.nn.Module, change: Change, what: str, verb: str) -> RegisteredMisfit:
    location = writing_line(model, change)
    message = f"forward rebinds the registered tensor {what!r} {verb}"
    fix = "keep its dtype and shape and write it in place (self.name.copy_(value)), or pass it in and return it"
    return RegisteredMisfit(
        f"{type(model).__name__} cannot be captured: {message}\n  {location}: {location.source}\n  Write instead: {fix}",
        construct="a registered tensor that changes dtype or shape",
        report=Report(findings=[Finding("NX406", Severity.ERROR, message, location, "", fix)]),
    )


@functools.lru_cache(maxsize=256)
def _signature(function: Any) -> inspect.Signature | None:
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):
        return None


def parameter_names(model: torch.nn.Module) -> list[str]:
    """The names of ``forward``'s parameters."""
    signature = _signature(model.forward)
    return list(signature.parameters) if signature else []


def bind(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any], list[str]]:
    """Canonical ``(args, kwargs)`` and the names of the positional ones.

    However a call is spelled, it is bound the same way: positional where the signature allows, explicit defaults left out.

    Raises:
        TypeError: the arguments do not fit the signature of ``forward``; the message is Python's own.
    """
    signature = _signature(model.forward)
    if signature is None or isinstance(model, torch.fx.GraphModule):  # an exported module insists on the spelling of its example
        return args, kwargs, (parameter_names(model) + [f"arg_{i}" for i in range(len(args))])[: len(args)]
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"{type(model).__name__}.forward() {error}") from None
    variadic = any(p.kind is p.VAR_POSITIONAL for p in signature.parameters.values())
    for name, parameter in signature.parameters.items():
        droppable = parameter.kind is not parameter.POSITIONAL_ONLY and not variadic
        if droppable and name in bound.arguments and bound.arguments[name] is parameter.default:
            del bound.arguments[name]
    names: list[str] = []
    args = bound.args
    for name, parameter in signature.parameters.items():
        if len(names) == len(args):
            break
        if parameter.kind is parameter.VAR_POSITIONAL:
            names += [f"{name}_{i}" for i in range(len(bound.arguments.get(name, ())))]
        else:
            names.append(name)
    return args, bound.kwargs, names
