"""What is compared: a model, a candidate of any kind, and one run of each on copies of the same inputs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import fx

from nxfx.capture.export import without_autocast
from nxfx.capture.shell import bind
from nxfx.capture.state import ModuleState
from nxfx.capture.structure import Flat, flatten
from nxfx.captured_call import CapturedCall
from nxfx.errors import UsageError
from nxfx.observe.variations import duplicate
from nxfx.prepared import PreparedModule
from nxfx.verification.precision import HigherPrecision, Precision

Call = tuple[tuple[Any, ...], dict[str, Any]]
_SEED = 0


@dataclass
class Outcome:
    """What one call gave, and what it left behind.

    Attributes:
        value: the result, in the caller's structure.
        left: ``state.NAME`` and ``argument.NAME`` → tensor that the call changed.
    """

    value: Any
    left: dict[str, torch.Tensor] = field(default_factory=dict)


class Function(torch.nn.Module):
    """A plain function as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.__dict__["function"] = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["function"](*args, **kwargs)


def as_call(inputs: Any, kwargs: dict[str, Any] | None) -> Call:
    """``inputs`` as arguments: a tuple or list of positional ones, a dict of keyword ones, or one tensor."""
    if isinstance(inputs, dict):
        return (), {**inputs, **(kwargs or {})}
    if isinstance(inputs, (tuple, list)):
        return tuple(inputs), dict(kwargs or {})
    if isinstance(inputs, torch.Tensor):
        return (inputs,), dict(kwargs or {})
    raise UsageError(f"inputs are a tuple of arguments, a dict of keyword arguments or a tensor, not {type(inputs).__name__}")


def model_of(model: Any) -> torch.nn.Module:
    """The user's own module behind what was passed as the model."""
    if isinstance(model, PreparedModule):
        inner: torch.nn.Module = model.__dict__["_model"]
        return inner
    if isinstance(model, torch.nn.Module):
        return model
    if callable(model):
        return Function(model)
    raise UsageError(f"the model is an nn.Module or a function, not {type(model).__name__}")


@contextlib.contextmanager
def kept(module: Any) -> Iterator[dict[str, torch.Tensor]]:
    """A block after which the module's buffers and Python state are what they were; gives copies of the buffers as they are now.

    Parameters are not copied: a model that fits in memory once must be verifiable.
    """
    model = model_of(module)
    state = ModuleState(model)
    tensors = {**dict(model.named_buffers()), **{f"plain {i}": s.tensor for i, s in enumerate(state.slots())}}
    held = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    try:
        yield held
    finally:
        state.restore()
        with torch.no_grad():
            for name, tensor in tensors.items():
                if not tensor.is_meta and not _same_bits(tensor, held[name]):
                    tensor.copy_(held[name])


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a, b) or (a.is_floating_point() and bool(((a == b) | (a.isnan() & b.isnan())).all()))


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(_SEED)
        yield


def copies(call: Call) -> tuple[Call, Flat]:
    """Copies of the arguments, and their leaves."""
    fresh = duplicate(call, flatten(call, share=True))
    return fresh, flatten(fresh, share=True)


def run(function: Callable[..., Any], call: Call, precision: Precision | None = None) -> Outcome:
    """Call ``function`` on copies of the arguments; a module's state is put back. Every run draws the same random numbers.

    Args:
        precision: run it in a higher precision (weights are widened as they are used).
    """
    (args, kwargs), flat = copies(call)
    versions = [_version(leaf) for leaf in flat.leaves]
    module = function if isinstance(function, torch.nn.Module) else None
    with contextlib.ExitStack() as stack:
        before = stack.enter_context(kept(module)) if module is not None else {}
        stack.enter_context(_seeded())
        if precision is not None:
            stack.enter_context(without_autocast())
            stack.enter_context(HigherPrecision(precision))
        value = function(*args, **kwargs)
        left = {}
        if module is not None:
            now = dict(model_of(module).named_buffers())
            left = {f"state.{n}": t.detach().clone() for n, t in now.items() if n in before and not _same_bits(t, before[n])}
        for name, leaf, version in zip(leaf_names(flat), flat.leaves, versions, strict=True):
            if isinstance(leaf, torch.Tensor) and _version(leaf) != version:
                left[f"argument.{name}"] = leaf
        value = detached(value) if left else value
    return Outcome(value, left)


def leaf_names(flat: Flat) -> list[str]:
    """Where each argument stands, in words: ``0``, ``past.key``."""
    return [".".join(map(str, path[1:])) for path in flat.paths]


def _version(leaf: Any) -> int:
    return leaf._version if isinstance(leaf, torch.Tensor) and not leaf.is_inference() else 0


def detached(value: Any) -> Any:
    """``value`` with copies of its tensors: state that it shares with the model is about to be put back."""
    flat = flatten(value)
    return duplicate(((value,), {}), flat)[0][0]


RunGraph = Callable[[fx.GraphModule, Sequence[Any]], Sequence[Any]]


def through(call: CapturedCall, arguments: Call, run_graph: RunGraph, precision: Precision | None = None) -> Outcome:
    """What ``call`` gives when ``run_graph`` runs its graph; the model's state stays as it is.

    Args:
        precision: outputs are in this precision: do not bring them back to the model's dtypes.
    """
    model = call.model
    args, kwargs, _ = bind(model, *duplicate(arguments, flatten(arguments, share=True)))
    given = (args, kwargs)
    flat = flatten(given, share=True)
    with kept(model), _seeded(), without_autocast():
        call._sync()
        outputs = list(run_graph(call.graph_module, call.admit(flat)))
        outputs = outputs if precision is not None else call.boundary.restore(outputs)
        left = {f"state.{n}": outputs[i] for n, i in call.mutated_buffers.items() if n not in call.state_inputs.values()}
        names = dict(zip(call.convention.input_names, leaf_names(flat), strict=True))
        left |= {f"argument.{names[n]}": outputs[i] for n, i in call.mutated_inputs.items()}
        if precision is not None:  # so that what the call writes into its arguments keeps the precision
            flat.leaves[:] = [precision.widen(leaf) for leaf in flat.leaves]
            given = duplicate(given, flatten(given, share=True), flat.leaves)
        leaves = call.conclude(outputs, flat.leaves, given)
        for output, name in call.convention.returned_state.items():
            index = call.mutated_buffers.get(name)
            leaves[output] = call.model_buffer(name).clone() if index is None else outputs[index]
        return Outcome(call.rebuilt(leaves, given), left)


def load_outputs(path: str | Path) -> Any:
    """Outputs that were saved with ``torch.save`` (``.pt``, ``.pth``) or ``numpy.savez`` (``.npz``, ``.npy``).

    Raises:
        UsageError: no such file, or not one of these.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"no such file: {path}")
    try:
        if path.suffix == ".npz":
            with numpy.load(path, allow_pickle=False) as archive:
                return {name: torch.from_numpy(archive[name].copy()) for name in archive.files}
        if path.suffix == ".npy":
            return torch.from_numpy(numpy.load(path, allow_pickle=False))
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(f"cannot read outputs from {path}: {why}") from error
