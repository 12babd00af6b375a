"""PreparedModule: called exactly like the model, computes with the cleaned graph."""

from __future__ import annotations

import copy
import inspect
import threading
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

import torch
from torch import fx

from nxfx.capture.path import autocast_state
from nxfx.capture.shell import bind
from nxfx.capture.structure import Flat, flatten
from nxfx.captured_call import CapturedCall
from nxfx.errors import CaptureError, PrepareError
from nxfx.graph.attributes import share_registries
from nxfx.report import Report


@dataclass(frozen=True)
class Signature:
    """What one capture serves: everything about a call but the values of its tensors.

    Attributes:
        structure: containers, static Python values and their types.
        tensors: per input leaf ``(dtype, shape with None for dynamic dims, device, layout)``.
        training, grad: the model's mode, and whether gradients are recorded.
        autocast: ``(device type, dtype)`` of the active autocast, or None.
    """

    structure: Any
    tensors: tuple[tuple[torch.dtype, tuple[int | None, ...], str], ...]
    training: bool
    grad: bool
    autocast: tuple[str, torch.dtype] | None

    def __str__(self) -> str:
        tensors = ", ".join(
            f"{str(d).removeprefix('torch.')}[{', '.join('*' if s is None else str(s) for s in shape)}]" for d, shape, _ in self.tensors
        )
        return f"({tensors}){' training' if self.training else ''}"


def _refuse_layouts(flat: Flat) -> None:
    for leaf, path in zip(flat.leaves, flat.paths, strict=True):
        if isinstance(leaf, torch.Tensor) and (leaf.is_nested or leaf.layout is not torch.strided):
            kind = "nested" if leaf.is_nested else str(leaf.layout).removeprefix("torch.")
            raise CaptureError(
                f"argument {'.'.join(map(str, path[1:]))} is a {kind} tensor: Neuron takes dense tensors only. "
                "Pass it padded (torch.nested.to_padded_tensor) or dense (to_dense()).",
                construct=f"a {kind} tensor as input",
            )


Capturer = Callable[[torch.nn.Module, tuple[Any, ...], dict[str, Any]], CapturedCall]


class PreparedModule(torch.nn.Module):
    """A model whose graph nxfx has cleaned. Made by :func:`nxfx.prepare`.

    It is called exactly like the model and gives what the model gives: same structure, dtypes, and effects on arguments,
    buffers and attributes. It shares the model's registries: the same parameter and buffer objects under the same names, so
    ``state_dict``, ``load_state_dict`` and weight replacement on either serve both. Attributes it does not have are the model's.
    """

    def __init__(self, model: torch.nn.Module, capturer: Capturer, *, training: bool = False) -> None:
        super().__init__()
        share_registries(self, model)
        own = self.__dict__
        own["training"] = model.training
        own["_model"] = model
        own["_capturer"] = capturer
        own["_allow_grad"] = training
        own["_captures"] = {}
        own["_dynamic"] = {}
        own["_lock"] = threading.RLock()

    # -- calling ------------------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs, _ = bind(self._model, args, kwargs)
        arguments = (args, kwargs)
        flat = flatten(arguments, share=True)
        return self._captured(flat, arguments)(flat, arguments)

    def capture(self, *args: Any, **kwargs: Any) -> CapturedCall:
        """Capture for these arguments without running anything; a call that fits an existing capture returns that."""
        args, kwargs, _ = bind(self._model, args, kwargs)
        arguments = (args, kwargs)
        return self._captured(flatten(arguments, share=True), arguments)

    def _captured(self, flat: Flat, arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> CapturedCall:
        _refuse_layouts(flat)
        signature = self._signature(flat)
        found: CapturedCall | None = self._captures.get(signature)
        if found is None or not found.holds():
            with self._lock:
                found = self._captures.get(signature)
                if found is None or not found.holds():
                    with torch.inference_mode(False):  # tensors made here serve other calls
                        found = self._capturer(self._model, *arguments)
                    self._learn_dynamic_dims(flat, found)
                    self._captures[self._signature(flat)] = found
        return found

    def _signature(self, flat: Flat) -> Signature:
        dynamic = self._dynamic.get(flat.spec, {})
        tensors = tuple(
            (leaf.dtype, tuple(None if (i, d) in dynamic else n for d, n in enumerate(leaf.shape)), str(leaf.device))
            for i, leaf in enumerate(flat.leaves)
            if isinstance(leaf, torch.Tensor)
        )
        grad = self._allow_grad and torch.is_grad_enabled()
        return Signature(flat.spec, tensors, self._model.training, grad, autocast_state())

    def _learn_dynamic_dims(self, flat: Flat, found: CapturedCall) -> None:
        self._dynamic[flat.spec] = {
            (i, d): True
            for i, value in enumerate(found.placeholders)
            for d, size in enumerate(value.shape)
            if not isinstance(size, int)
        }

    # -- what was captured --------------------------------------------------------------------------------------------------

    @property
    def captures(self) -> dict[Signature, CapturedCall]:
        """Signature → capture, in order of capture."""
        return dict(self._captures)

    def _only(self) -> CapturedCall:
        if len(self._captures) == 1:
            only: CapturedCall = next(iter(self._captures.values()))
            return only
        if not self._captures:
            raise PrepareError("nothing is captured yet: call the prepared module once, or give prepare() example arguments")
        listed = "; ".join(map(str, self._captures))
        raise PrepareError(f"{len(self._captures)} captures exist, choose one from .captures: {listed}")

    @property
    def graph_module(self) -> fx.GraphModule:
        """The cleaned graph: flat tensors in and out, as it goes to the compiler."""
        return self._only().graph_module

    @property
    def example_inputs(self) -> tuple[torch.Tensor, ...]:
        """The example after the boundary: ready for ``torch_neuronx.trace(p.graph_module, p.example_inputs)``."""
        return self._only().example_inputs

    @property
    def input_output_aliases(self) -> dict[torch.Tensor, int]:
        """The graph's buffer that each output updates in place: ``{buffer tensor: output index}``."""
        return self._only().input_output_aliases

    @property
    def mutated_inputs(self) -> dict[str, int]:
        """Inputs that the model writes: ``{input name: output index}``."""
        return dict(self._only().mutated_inputs)

    @property
    def report(self) -> Report:
        """What was rewritten, found and assumed."""
        return self._only().report

    @property
    def compiler_args(self) -> list[str]:
        """The neuronx-cc flags that this graph needs on its target; each is explained in the report."""
        return list(self._only().report.compiler_args)

    # -- being the model ----------------------------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            value = getattr(self.__dict__["_model"], name)
        if isinstance(value, types.MethodType) and value.__self__ is self.__dict__["_model"]:
            # `generate` and its helpers call `self(...)`: let that be the prepared module. Methods that use super() cannot move.
            function = inspect.unwrap(value.__func__)
            if "__class__" not in getattr(function, "__code__", types.SimpleNamespace(co_freevars=("__class__",))).co_freevars:
                return types.MethodType(value.__func__, self)
        return value

    def train(self, mode: bool = True) -> PreparedModule:
        """Sets the model's mode too: prepared and model are one."""
        self._model.train(mode)
        self.__dict__["training"] = mode
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> PreparedModule:
        before = {id(t): t for t in (*self.parameters(), *self.buffers())}
        dtypes = self._dtypes()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        with self._lock:
            if dtypes != self._dtypes():
                self._captures.clear()  # the graphs were made for other dtypes
                return self
            for signature, found in list(self._captures.items()):
                old = next((t.device for t in found.example_inputs), None) or next((t.device for t in before.values()), None)
                device = fn(torch.empty(0, device=old)).device
                if device != old:
                    self._captures.pop(signature)
                    found.move(device, fn)
                    tensors = tuple((d, s, str(device)) for d, s, _ in signature.tensors)
                    moved = Signature(signature.structure, tensors, signature.training, signature.grad, signature.autocast)
                    self._captures[moved] = found
        return self

    def _dtypes(self) -> list[torch.dtype]:
        """Of every entry of every registry: a move may make two tensors of one that is registered twice (torch-xla does)."""
        registries = [registry for module in self.modules() for registry in (module._parameters, module._buffers)]
        return [t.dtype for registry in registries for t in registry.values() if t is not None]

    def __deepcopy__(self, memo: dict[int, Any]) -> PreparedModule:
        """A prepared copy of the model; it captures anew on its first call."""
        return PreparedModule(copy.deepcopy(self._model, memo), self._capturer, training=self._allow_grad)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise PrepareError("a prepared module cannot be pickled: use .save(path) and nxfx.load(path)")

    def warmup(self, iterations: int = 3) -> Any:
        """Send each capture's example until latencies settle (:func:`nxfx.warmup`); the model's state is put back afterwards.

        Raises:
            PrepareError: nothing is captured yet.
        """
        from nxfx.latency import warmup_captures

        return warmup_captures(self, iterations)

    def save(self, path: str | FilePath) -> None:
        """Write graph, weights, boundary and report to one file; :func:`nxfx.load` reads it back."""
        from nxfx.storage import save

        save(self, path)

    def extra_repr(self) -> str:
        return f"captures={len(self._captures)}"
