"""One capture after the pipeline, and how it runs on behalf of the model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from nxfx import device as devices
from nxfx.analysis.dtype_rules import integer_bounds, is_integral
from nxfx.boundary import Boundary, Check, InputRule, ShapeGuard, narrowed, twin_dtype
from nxfx.capture.export import Capture, without_autocast
from nxfx.capture.shell import Assigned
from nxfx.capture.standing import Standing
from nxfx.capture.structure import Flat, at, unflatten, update
from nxfx.capture.unlift import STATE
from nxfx.errors import PrepareError
from nxfx.graph import meta
from nxfx.graph.attributes import CONSTANTS, own_buffer
from nxfx.layouts import InputLayouts, overlap
from nxfx.pipeline import Pipeline
from nxfx.premises import check_premises, stamp_of
from nxfx.report import Report
from nxfx.targets import Target


@dataclass(frozen=True)
class Recipe:
    """How a cleaned graph was made: what is needed to make it again, pass by pass.

    Attributes:
        capture: captures the model anew.
        pipeline, target, training: what ran on the capture, and for what.
    """

    capture: Callable[[], Capture]
    pipeline: Pipeline
    target: Target
    training: bool = False


class CapturedCall:
    """One capture after the pipeline: the cleaned graph, its boundary, and how to run it on behalf of the model.

    Attributes:
        compiled: what an inner compiler made of the graph (:func:`nxfx.compile`); without it the graph itself runs.
        recipe: how the graph was made; None when it came from a file.
    """

    compiled: Callable[..., Any] | None = None
    recipe: Recipe | None = None

    def __init__(
        self, model: torch.nn.Module, capture: Capture, boundary: Boundary, report: Report, *, check: Check, training: bool
    ) -> None:
        self.model = model
        self.graph_module = capture.graph_module
        self.convention = capture.convention
        self.boundary = boundary
        self.report = report
        self.check: Check = check
        self.training = training
        self.mutated_buffers = capture.mutated_buffers
        self.mutated_inputs = capture.mutated_inputs
        self.sources = capture.sources
        self.plain = capture.plain_tensors
        self.state_inputs = capture.state_inputs
        self.shapes = ShapeGuard(self.graph_module, boundary.largest_size)
        names = self.convention.input_names
        self._passed = [i for i, n in enumerate(names) if n not in self.state_inputs]
        self.placeholders = [meta.val(n) for n in self.graph_module.graph.find_nodes(op="placeholder")]
        self._rebound = {change.path for change in self.convention.rebound}
        self._twins: dict[str, tuple[int, int]] = {}
        self._premise_stamps: dict[str, tuple[int, int]] = {}
        for name, dtype in boundary.narrowed_buffers.items():
            own_buffer(self.graph_module, name, narrowed(self.model_buffer(name), twin_dtype(dtype)))
        owners = {name.rpartition(".")[0] for name in (*boundary.narrowed_buffers, *self.plain)}
        modules = dict(model.named_modules())
        self._owners = [path for path in owners if path in modules]
        self.standing = self._stand()
        self._sync()
        self.example_inputs = tuple(boundary.admit([capture.example_inputs[i] for i in self._passed], check))
        self.layouts = InputLayouts(self.graph_module, self.example_inputs)

    def _stand(self) -> Standing:
        carried = [*self.convention.state_changes, *self.plain.values()]
        return Standing(self.model, [(id(c.holder.container), c.key) for c in carried])

    # -- the model's tensors ------------------------------------------------------------------------------------------------

    def model_buffer(self, name: str) -> torch.Tensor:
        """The model's own tensor called ``name``: a buffer, a plain attribute, a constant that capture lifted."""
        if name in self.plain:
            tensor: torch.Tensor = self.plain[name].tensor
            return tensor
        for root in (self.model, self.graph_module):  # the graph holds constants that capture lifted
            try:
                return root.get_buffer(name)
            except AttributeError:
                continue
        return self.model.get_parameter(name)  # one that forward writes

    def _sync(self) -> None:
        """Bring the graph's own copies up to date with the model's: plain tensors by identity, 32-bit twins by version."""
        self._share_replaced()
        for name in self.plain:
            tensor = self.model_buffer(name)
            if name not in self.boundary.narrowed_buffers and self.graph_module.get_buffer(name) is not tensor:
                own_buffer(self.graph_module, name, tensor)
        for name in self.boundary.narrowed_buffers:
            wide = self.model_buffer(name)
            stamp = stamp_of(wide)
            if self._twins.get(name) == stamp:
                continue
            twin = self.graph_module.get_buffer(name)
            if wide is twin:
                continue
            if is_integral(wide.dtype):
                InputRule(name, twin.dtype, *integer_bounds(twin.dtype), "int32").enforce(wide, "always")
            with torch.inference_mode(False):  # the twin outlives this call
                fresh = narrowed(wide, twin.dtype)
            if twin.shape == fresh.shape and twin.device == fresh.device:
                with torch.no_grad():
                    twin.copy_(fresh)
            else:
                own_buffer(self.graph_module, name, fresh)
            self._twins[name] = stamp
        check_premises(self.report.premises, self.model_buffer, self._premise_stamps)

    def _share_replaced(self) -> None:
        """Modules of the graph that hold a buffer of their own have a copy of the registry: buffers replaced in the model follow."""
        for path in self._owners:
            own, theirs = self.graph_module.get_submodule(path)._buffers, self.model.get_submodule(path)._buffers
            for leaf, tensor in theirs.items():
                if own.get(leaf) is not tensor and f"{path}.{leaf}".lstrip(".") not in self.boundary.narrowed_buffers:
                    own[leaf] = tensor

    # -- the call -----------------------------------------------------------------------------------------------------------

    def holds(self) -> bool:
        """Whether the model's Python state still is what the capture rests on."""
        return (
            self.standing.holds()
            and all(guard.holds() for guard in self.convention.state_guards)
            and all(slot.fits() for slot in self.plain.values())
            and len({id(slot.tensor) for slot in self.plain.values()}) == len(self.plain)
        )

    def __call__(self, flat: Flat, arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
        admitted = self.admit(flat)
        self._sync()
        self._load_state(flat.leaves)
        run = self.graph_module if self.compiled is None else self.compiled
        # Autocast is in the graph; around it, it would cast once more what the model keeps out of it.
        with without_autocast(), contextlib.nullcontext() if self.training else torch.no_grad():
            results = run(*admitted)
        outputs = self.boundary.restore(results)
        returned = {output: self.model_buffer(name) for output, name in self.convention.returned_state.items()}  # before it is replaced
        self._write_buffers(outputs, flat.leaves)
        leaves = self.conclude(outputs, flat.leaves, arguments)
        for output, tensor in returned.items():
            leaves[output] = tensor
        return self.rebuilt(leaves, arguments)

    def admit(self, flat: Flat) -> list[torch.Tensor]:
        """What the graph takes for these arguments: checked, narrowed, laid out as it expects. Nothing has run when it raises."""
        passed = [flat.leaves[i] for i in self._passed]
        self.shapes.enforce(passed, [rule.name for rule in self.boundary.inputs])
        admitted = self.boundary.admit(passed, self.check)
        self._refuse_overlaps(flat.leaves)
        return self.layouts.arrange(admitted)

    def _refuse_overlaps(self, leaves: list[Any]) -> None:
        """A write through one of two tensors that share memory shows in the other; the functional graph has no such thing."""
        names = self.convention.input_names
        state = [n for n, buffer in self.state_inputs.items() if buffer in self.mutated_buffers]
        inputs = {n: leaves[names.index(n)] for n in (*self.mutated_inputs, *state)}
        buffers = [(n, self.model_buffer(n)) for n in self.mutated_buffers if n not in self.state_inputs.values()]
        if not inputs and not (buffers and leaves):
            return
        given = [(n, t) for n, t in zip(names, leaves, strict=True) if isinstance(t, torch.Tensor) and not t.is_meta and t.numel()]
        owned = [*self.model.named_parameters(), *self.model.named_buffers(), *((n, self.model_buffer(n)) for n in self.plain)]
        by_storage: dict[int, list[tuple[str, torch.Tensor]]] = {}
        for name, tensor in given:
            by_storage.setdefault(tensor.untyped_storage()._cdata, []).append((name, tensor))
        pairs = [(n, t, other) for n, t in inputs.items() for other in by_storage.get(t.untyped_storage()._cdata, ()) if other[1] is not t]
        for name, tensor in owned if inputs else buffers:
            pairs += [(name, tensor, o) for o in by_storage.get(tensor.untyped_storage()._cdata, ()) if o[0] in inputs or not inputs]
        for name, tensor in buffers if inputs else ():
            pairs += [(name, tensor, o) for o in by_storage.get(tensor.untyped_storage()._cdata, ())]
        for name, tensor, (other, second) in pairs:
            if overlap(tensor, second):
                raise PrepareError(f"{name!r} and {other!r} share memory, and the model writes one of them: pass a clone() of the other")

    def _load_state(self, leaves: list[Any]) -> None:
        names = self.convention.input_names
        with torch.no_grad():
            for name, buffer in self.state_inputs.items():
                self.graph_module.get_buffer(buffer).copy_(leaves[names.index(name)])

    def _write_buffers(self, outputs: list[Any], inputs: list[torch.Tensor]) -> None:
        """What the graph made of the model's buffers, and of inputs that became buffers."""
        names = self.convention.input_names
        with torch.no_grad():
            for name, position in self.mutated_buffers.items():
                self._write_buffer(name, outputs[position])
            for name, buffer in self.state_inputs.items():
                if buffer in self.mutated_buffers:
                    inputs[names.index(name)].copy_(outputs[self.mutated_buffers[buffer]])

    def conclude(self, outputs: list[Any], inputs: list[torch.Tensor], arguments: Any) -> list[Any]:
        """Do to the arguments and to Python state what the call does; the leaves of its result."""
        convention = self.convention
        names = convention.input_names
        with torch.no_grad():
            for name, position in self.mutated_inputs.items():
                inputs[names.index(name)].copy_(outputs[position])
        if convention.arguments_after is not None:
            after = convention.arguments_after
            update(arguments, after.spec, self._resolve(after, outputs, inputs), lambda path: at(arguments, path))
        # All values before any write: a value may stand where another write goes.
        values = [
            None if w.value is None else unflatten(w.value.spec, self._resolve(w.value, outputs, inputs)) for w in convention.state_writes
        ]
        for state_write, value in zip(convention.state_writes, values, strict=True):
            if state_write.value is None:
                state_write.holder.delete(state_write.key)
            else:
                state_write.holder.set(state_write.key, value)
        leaves = list(outputs[: convention.output_count])
        for output, source in convention.passed_through.items():
            leaves[output] = inputs[source]
        return leaves

    def rebuilt(self, leaves: list[Any], arguments: Any) -> Any:
        """The model's result, made of its leaves."""
        return unflatten(self.convention.output_spec, leaves, lambda path: at(arguments, path))

    def _write_buffer(self, name: str, value: torch.Tensor) -> None:
        if name in self._rebound:
            self.plain[name].rebind(value)
            if name not in self.boundary.narrowed_buffers:
                own_buffer(self.graph_module, name, self.model_buffer(name))
        elif name in self.plain:
            self.plain[name].put(value)
        else:
            self.model_buffer(name).copy_(value)
        if name in self.boundary.narrowed_buffers:
            wide = self.model_buffer(name)
            self.graph_module.get_buffer(name).copy_(value)
            self._twins[name] = stamp_of(wide)

    def _resolve(self, assigned: Assigned, outputs: list[Any], inputs: list[torch.Tensor]) -> list[Any]:
        found: dict[str, Callable[[Any], Any]] = {"input": inputs.__getitem__, "output": outputs.__getitem__, "state": self.model_buffer}
        return [found[kind](key) for kind, key in assigned.leaves]

    # -- for compilers ------------------------------------------------------------------------------------------------------

    @property
    def input_output_aliases(self) -> dict[torch.Tensor, int]:
        return {tensor: self.mutated_buffers[name] for name, tensor in self.state_tensors.items()}

    @property
    def state_tensors(self) -> dict[str, torch.Tensor]:
        """Name → the graph's tensor of each buffer that the graph writes."""
        held = {**dict(self.graph_module.named_buffers()), **dict(self.graph_module.named_parameters())}
        return {name: held.get(name, self.model_buffer(name)) for name in self.mutated_buffers}

    def move(self, device: torch.device, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Follow the model to ``device``: the graph's own tensors and every device it names."""
        self.move_own(fn)
        self._twins.clear()
        self.standing = self._stand()
        devices.retarget(self.graph_module, device)
        self.example_inputs = tuple(fn(t) for t in self.example_inputs)

    def move_own(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Apply ``fn`` to the tensors that only the graph holds, after the model's own were moved."""
        self._share_replaced()
        for slot in self.plain.values():
            slot.move(fn)
        for name in dict.fromkeys((*self.boundary.narrowed_buffers, *self._owned(), *self.plain)):
            own_buffer(self.graph_module, name, fn(self.graph_module.get_buffer(name)))

    def _owned(self) -> list[str]:
        """Names of the tensors that only the graph holds: lifted constants and state inputs."""
        found = []
        for holder in (CONSTANTS, STATE):
            module = self.graph_module._modules.get(holder)
            if module is not None:
                found += [f"{holder}.{name}" for name in module._buffers]
        return found
