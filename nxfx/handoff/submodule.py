"""A prepared submodule inside a model that another tool traces whole, as NxD Inference does; ``state_dict`` names stay."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from typing import Any

import torch

from nxfx import device as devices
from nxfx.capture.shell import bind
from nxfx.capture.structure import flatten
from nxfx.captured_call import CapturedCall
from nxfx.errors import PrepareError, UsageError
from nxfx.graph.attributes import share_registries
from nxfx.handoff.legalise import legalise
from nxfx.handoff.lowered import admitted
from nxfx.handoff.neuron import examples_of, prepared_call
from nxfx.handoff.state import Arguments, NamesOnly, is_meta
from nxfx.report import Finding, Report, Severity
from nxfx.targets import Target, get_target


def prepare_submodule(
    model: torch.nn.Module, path: str, args: Any = None, kwargs: Any = None, *, target: str | Target, **prepare_options: Any
) -> PreparedSubmodule:
    """Put a prepared graph in the place of ``model.get_submodule(path)``; parameters, buffers and their names stay what they are.

    Args:
        model: changed in place: the submodule is replaced.
        path: dotted path of the submodule, e.g. ``"layers.0.self_attn.rotary_emb"``.
        args, kwargs: example arguments *of the submodule*, or lists of them for several shapes.
        prepare_options: everything else that :func:`nxfx.prepare` takes.

    Inside somebody else's trace there is no boundary: ranges cannot be checked there, and the report says what is taken for granted
    (NX303).

    Raises:
        UsageError: no such submodule.
        PrepareError: the submodule writes state, which only the outer trace can alias.
    """
    parent_path, _, leaf = path.rpartition(".")
    try:
        original, parent = model.get_submodule(path), model.get_submodule(parent_path)
    except AttributeError as error:
        raise UsageError(f"no submodule {path!r}: {error}") from None
    if not path:
        raise UsageError("path names a submodule; to prepare the whole model use nxfx.handoff.modelbuilder")
    prepare_options.setdefault("final_weights", False)
    calls = [prepared_call(original, arguments, get_target(target), prepare_options) for arguments in examples_of(args, kwargs)]
    prepared = PreparedSubmodule(original, calls, examples_of(args, kwargs))
    parent._modules[leaf] = prepared
    return prepared


def prepare_on_load(instance: Any, submodules: Mapping[str, Any], *, target: str | Target, **prepare_options: Any) -> Any:
    """Let ``instance.load_module()`` (a ``DecoderModelInstance``, any ``BaseModelInstance``) end with prepared submodules.

    Args:
        instance: changed in place, and given back.
        submodules: path → example arguments of that submodule: a tuple, or a dict of keyword arguments.
        prepare_options: as for :func:`prepare_submodule`.

    ``load_module`` of NxD Inference casts *every* float parameter and buffer to the model's dtype first (``cast_type="config"``);
    an ``inv_freq`` that was rounded there is an NX102 finding here. ``cast_type="as-declared"`` does not round it.
    """
    load: Callable[[], None] = instance.load_module

    def load_module(self: Any) -> None:
        load()
        for path, example in submodules.items():
            if is_meta(self.module):
                _replace_by_names(self.module, path)
                continue
            args, kwargs = ((), example) if isinstance(example, dict) else (example, None)
            prepare_submodule(self.module, path, args, kwargs, target=target, **prepare_options)

    instance.load_module = types.MethodType(load_module, instance)
    return instance


def _replace_by_names(model: torch.nn.Module, path: str) -> None:
    parent_path, _, leaf = path.rpartition(".")
    model.get_submodule(parent_path)._modules[leaf] = NamesOnly(model.get_submodule(path))


class PreparedSubmodule(torch.nn.Module):
    """A submodule that runs its cleaned graph wherever it is moved to. Made by :func:`prepare_submodule`."""

    _original: torch.nn.Module
    _dtypes: list[torch.dtype]
    _by_key: dict[Any, CapturedCall]

    def __init__(self, original: torch.nn.Module, calls: list[CapturedCall], examples: list[Arguments]) -> None:
        super().__init__()
        share_registries(self, original)
        own = self.__dict__
        own["training"] = original.training
        own["_original"] = original
        own["_dtypes"] = [t.dtype for t in (*original.parameters(), *original.buffers())]
        own["_by_key"] = {}
        for call, arguments in zip(calls, examples, strict=True):
            if call.mutated_buffers:
                raise PrepareError(f"the submodule writes {', '.join(call.mutated_buffers)}: prepare the whole model instead", call.report)
            call.report.add([], _taken_for_granted(call))
            flat = flatten(bind(original, *arguments)[:2])
            self._by_key[flat.spec, _shapes(flat.leaves)] = call
            inputs = [n.name for n in call.graph_module.graph.find_nodes(op="placeholder")]
            legalise(call.graph_module, dict(zip(inputs, admitted(call, inputs), strict=True)))
            devices.follow_inputs(call.graph_module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs, _ = bind(self._original, args, kwargs)
        flat = flatten((args, kwargs))
        call: CapturedCall | None = self._by_key.get((flat.spec, _shapes(flat.leaves)))
        if call is None:
            there = "; ".join(str(shapes) for _, shapes in self._by_key)
            raise UsageError(f"prepared for {there}, called with {_shapes(flat.leaves)}: give an example of these shapes")
        outputs = call.boundary.restore(call.graph_module(*call.boundary.narrow(flat.leaves)))
        return call.rebuilt(call.conclude(outputs, flat.leaves, (args, kwargs)), (args, kwargs))

    @property
    def reports(self) -> tuple[Report, ...]:
        """One report for each example."""
        return tuple(call.report for call in self._by_key.values())

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_original"], name)

    def _apply(self, fn: Any, recurse: bool = True) -> PreparedSubmodule:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if [t.dtype for t in (*self.parameters(), *self.buffers())] != self._dtypes:
            raise PrepareError("the dtypes of a prepared submodule changed: cast the model first, then prepare")
        for call in self._by_key.values():
            call.move_own(fn)
        return self


def _shapes(leaves: list[Any]) -> tuple[Any, ...]:
    return tuple((t.dtype, tuple(t.shape)) for t in leaves)


def _taken_for_granted(call: CapturedCall) -> list[Finding]:
    """What a boundary would enforce, and nothing enforces inside another trace."""
    return [
        Finding(
            "NX303",
            Severity.WARNING,
            f"`{rule.name}` is taken to lie in [{rule.low}, {rule.high}], and inside another trace nothing checks it",
            fix="make sure of it where the model is called",
        )
        for rule in call.boundary.inputs
        if rule.low is not None and rule.high is not None
    ]
