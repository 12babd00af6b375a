"""NxD's ``ModelBuilder`` (both generations) and NxD Inference: prepared graphs under the contract of each.

All three load the weights later, by name: so the modules made here keep the model's ``state_dict`` names, no proof rests on the
values of what is in it, and state starts at zero, as NxD starts it on the device.

Sources: ``neuronx_distributed.trace.model_builder`` and ``neuronx_distributed.trace.functions``, public source of release 0.15.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from nxfx.capture.shell import bind
from nxfx.capture.structure import flatten
from nxfx.captured_call import CapturedCall
from nxfx.environment import neuronx_distributed
from nxfx.errors import PrepareError, UsageError
from nxfx.handoff.neuron import CompiledCall, TracedModule, examples_of, prepared_call
from nxfx.handoff.state import Aliases, Arguments, NamesOnly, StateArguments, is_meta, merged_aliases
from nxfx.handoff.tracing import traceable
from nxfx.targets import Target, get_target

AliasesOf = Callable[[torch.nn.Module], Mapping[torch.Tensor, int]]


class _Buckets:
    """The captures of one model for some example arguments, and how calls of the model reach what was compiled of them."""

    def __init__(self, model: torch.nn.Module, examples: list[Arguments], target: str | Target, options: dict[str, Any]) -> None:
        self.model, self.examples = model, examples
        options.setdefault("final_weights", False)
        self.calls = [prepared_call(model, arguments, get_target(target), options) for arguments in examples]
        for call in self.calls:
            refuse_initial_state(call, call.state_tensors)
        self.names = [[n for n in call.convention.input_names if n not in call.state_inputs] for call in self.calls]
        self.state = StateArguments(model, self.calls[0], examples[0])

    def bound(self, runs: Sequence[Callable[..., Any]], aliased: Sequence[frozenset[int]]) -> TracedModule:
        """The model's own calling convention around what runs each bucket."""
        compiled = [
            CompiledCall(call, run, outputs, list(call.report.compiler_args))
            for call, run, outputs in zip(self.calls, runs, aliased, strict=True)
        ]
        return TracedModule(self.model, compiled, self.state, self.examples)


def refuse_initial_state(call: CapturedCall, state: Mapping[str, torch.Tensor]) -> None:
    """NxD makes state on the device from its shape and dtype: it starts at zero there, whatever the model's buffer holds.

    Raises:
        PrepareError: a tensor that is state holds something else.
    """
    for name, value in state.items():
        if not value.is_meta and value.count_nonzero():
            raise PrepareError(
                f"{name!r} is state and does not start at zero: ModelBuilder starts state at zero on the device. Let it start at zero "
                "in the model, or use nxfx.trace, which keeps what it holds",
                call.report,
            )


# -- ModelBuilder, first generation ---------------------------------------------------------------------------------------------


def model_instance(
    module_cls: Callable[[], torch.nn.Module],
    args: Any = None,
    kwargs: Any = None,
    *,
    target: str | Target,
    input_output_aliases: AliasesOf | None = None,
    **prepare_options: Any,
) -> Any:
    """A ``BaseModelInstance`` for ``ModelBuilder.add`` whose ``load_module()`` makes the module and prepares it.

    Args:
        module_cls: makes the model; called by ``load_module()``, where the builder has set up its parallel state.
        args, kwargs: example arguments of the model, or lists of them for buckets (in the order of the ``bucket_config``).
        input_output_aliases: given the loaded model, parameter or buffer → output index, beside what ``forward`` writes.
        prepare_options: as for :func:`nxfx.trace`, ``state_inputs`` included.

    The instance has ``example_inputs``, the list to give to ``add`` (reading it loads the module), ``compiler_args`` likewise, and
    ``bind(traced)``: what ``ModelBuilder.trace()`` gives, called like the model.

    Raises:
        NeuronNotFound: no ``neuronx_distributed`` here.
    """
    base = neuronx_distributed("trace.model_builder").BaseModelInstance
    cls = types.new_class("PreparedModelInstance", (_PreparedInstance, base))
    return cls(module_cls, examples_of(args, kwargs), target, input_output_aliases, prepare_options)


class _PreparedInstance:
    """What :func:`model_instance` adds to ``BaseModelInstance``."""

    def __init__(
        self,
        module_cls: Callable[[], torch.nn.Module],
        examples: list[Arguments],
        target: str | Target,
        aliases_of: AliasesOf | None,
        options: dict[str, Any],
    ) -> None:
        super().__init__(module_cls, {})  # type: ignore[call-arg]
        self._examples, self._target, self._aliases_of, self._options = examples, target, aliases_of, options
        self._buckets: _Buckets | None = None
        self._graphs: list[fx.GraphModule] = []
        self._aliases: list[Aliases] = []

    def load_module(self) -> None:
        """Make the module and prepare it for every bucket. On the meta device, where the builder only reads names, they are kept."""
        model = self.module_cls()  # type: ignore[attr-defined]
        model.eval()
        if is_meta(model):
            self.module: Any = NamesOnly(model)
            return
        self._buckets = buckets = _Buckets(model, self._examples, self._target, dict(self._options))
        wanted = self._aliases_of(model) if self._aliases_of is not None else None
        self._graphs, self._aliases = [], []
        for call, arguments in zip(buckets.calls, buckets.examples, strict=True):
            aliases, conflicts = merged_aliases(call, arguments, wanted)
            call.report.add([], conflicts)
            graph = traceable(call)
            own = {**dict(graph.named_parameters(remove_duplicate=False)), **dict(graph.named_buffers(remove_duplicate=False))}
            refuse_initial_state(call, {name: t for name, t in own.items() if any(t is key for key in aliases)})
            self._graphs.append(graph)
            self._aliases.append(aliases)
        self.module = self._graphs[0]

    def get(self, bucket_rank: int | None, **kwargs: Any) -> tuple[Any, Aliases]:
        """``(module, aliases)`` of a bucket: the module takes and gives flat tensors."""
        if isinstance(self.module, NamesOnly):
            return self.module, {}
        self._loaded()
        rank = bucket_rank or 0
        return self._graphs[rank], self._aliases[rank]

    def _loaded(self) -> _Buckets:
        if self._buckets is None:
            self.load_module()
        if self._buckets is None:
            raise PrepareError("the module was made on the meta device, so there is no graph: make it on the CPU")
        return self._buckets

    @property
    def example_inputs(self) -> list[tuple[torch.Tensor, ...]]:
        """What the graphs take, narrowed: for ``ModelBuilder.add(key, instance, instance.example_inputs)``."""
        return [call.example_inputs for call in self._loaded().calls]

    @property
    def compiler_args(self) -> str:
        """The flags that the graphs need, for ``ModelBuilder.add(..., compiler_args=...)``, which replaces the builder's own."""
        return " ".join(dict.fromkeys(flag for call in self._loaded().calls for flag in call.report.compiler_args))

    @property
    def reports(self) -> tuple[Any, ...]:
        """One report for each bucket."""
        return tuple(call.report for call in self._loaded().calls)

    def bind(self, traced: Callable[..., Any]) -> TracedModule:
        """What ``ModelBuilder.trace()`` gave, called like the model: its arguments, checked ranges, its result and dtypes."""
        buckets = self._loaded()
        return buckets.bound([traced] * len(buckets.calls), [frozenset(a.values()) for a in self._aliases])


# -- ModelBuilder, second generation --------------------------------------------------------------------------------------------


def builder_module(
    model: torch.nn.Module, args: Any = None, kwargs: Any = None, *, target: str | Target, **prepare_options: Any
) -> BuilderModule:
    """``model`` as ``ModelBuilder(model)`` of the second generation wants it.

    Its signature checks refuse ``*args`` and ``**kwargs``, defaults other than None, and arguments that are no tensors. The result
    has one parameter for each tensor of the example, under the model's own names (a tensor inside a list or dict gets the name
    of the argument and its place, ``batch_ids``), and None for what may be left out. Other Python values are baked.

    Args:
        args, kwargs: example arguments, or lists of them: one ``trace`` each.
        prepare_options: as for :func:`nxfx.trace`.

    Use::

        module = builder_module(model, [(ids_128,), (ids_512,)], target="trn2")
        builder = ModelBuilder(module)
        for example in module.examples:
            builder.trace(kwargs=example)
        serve = module.bind(builder.compile(compiler_args=module.compiler_args))
    """
    return BuilderModule(_Buckets(model, examples_of(args, kwargs), target, prepare_options))


class BuilderModule(torch.nn.Module):
    """Made by :func:`builder_module`; its ``state_dict`` is the model's.

    Attributes:
        baked: parameters of the model's ``forward`` that are not passed any more → the Python value in the graph.
    """

    _buckets: _Buckets
    _graphs: list[fx.GraphModule]
    _by_key: dict[Any, int]

    def __init__(self, buckets: _Buckets) -> None:
        super().__init__()
        own = self.__dict__
        own["_buckets"] = buckets
        graphs: list[fx.GraphModule] = []
        for call in buckets.calls:
            graphs.append(traceable(call, graphs[0] if graphs else None))
        own["_graphs"] = graphs
        for registry in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            for module in (self, *graphs):  # one set of tensors: what is moved or loaded here is so for every graph
                module.__dict__[registry] = graphs[0].__dict__[registry]
        self.train(buckets.model.training)
        self.baked = _baked(buckets)
        own["_by_key"] = {}
        for number, (names, call) in enumerate(zip(buckets.names, buckets.calls, strict=True)):
            if self._by_key.setdefault(_key(dict(zip(names, call.example_inputs, strict=True))), number) != number:
                raise UsageError(f"bucket {number} has the shapes of an earlier one")
        own["forward"] = self._explicit_forward(_parameters(buckets))

    def _explicit_forward(self, names: dict[str, bool]) -> Any:
        for name in names:
            if not name.isidentifier():
                raise UsageError(f"argument {name!r} is no Python name: pass it under another")
        spelled = ", ".join(name if required else f"{name}=None" for name, required in names.items())
        passed = ", ".join(f"{name!r}: {name}" for name in names)
        namespace: dict[str, Any] = {}
        exec(f"def forward(self, {spelled}):\n    return self._run({{{passed}}})", namespace)
        return types.MethodType(namespace["forward"], self)

    def _run(self, given: dict[str, torch.Tensor | None]) -> Any:
        present = {name: value for name, value in given.items() if value is not None}
        number = self._by_key.get(_key(present))
        if number is None:
            there = "; ".join(map(_told, self.examples))
            raise UsageError(f"prepared for {there}; this call has {_told(present)}: pass .examples, or prepare for these shapes too")
        call, graph = self._buckets.calls[number], self._graphs[number]
        with torch.no_grad():
            outputs = graph(*(present[name] for name in self._buckets.names[number]))
            # In place, which is how the second generation finds what to alias.
            for name, position in call.mutated_buffers.items():
                _buffer(graph, name).copy_(outputs[position])
        kept = [v for i, v in enumerate(outputs) if i not in set(call.mutated_buffers.values())]
        return kept[0] if len(kept) == 1 else tuple(kept)

    @property
    def examples(self) -> list[dict[str, torch.Tensor]]:
        """Keyword arguments for ``ModelBuilder.trace(kwargs=...)``, one dict for each bucket, after narrowing."""
        buckets = zip(self._buckets.names, self._buckets.calls, strict=True)
        return [dict(zip(names, call.example_inputs, strict=True)) for names, call in buckets]

    @property
    def compiler_args(self) -> str:
        """The flags that the graphs need, for ``ModelBuilder.compile(compiler_args=...)``."""
        return " ".join(dict.fromkeys(flag for call in self._buckets.calls for flag in call.report.compiler_args))

    @property
    def reports(self) -> tuple[Any, ...]:
        """One report for each bucket."""
        return tuple(call.report for call in self._buckets.calls)

    def bind(self, compiled: Callable[..., Any]) -> TracedModule:
        """What ``ModelBuilder.compile()`` gave, called like the model."""
        runs = [_by_name(compiled, names) for names in self._buckets.names]
        return self._buckets.bound(runs, [frozenset(call.mutated_buffers.values()) for call in self._buckets.calls])


def _by_name(compiled: Callable[..., Any], names: Sequence[str]) -> Callable[..., Any]:
    return lambda *values: compiled(**dict(zip(names, values, strict=True)))


def _parameters(buckets: _Buckets) -> dict[str, bool]:
    """Name → whether it must be given, the required ones first."""
    signature = inspect.signature(buckets.model.forward).parameters
    first = {name: name in signature and signature[name].default is not inspect.Parameter.empty for name in signature}
    names = dict.fromkeys(name for bucket in buckets.names for name in bucket)
    everywhere = {name for name in names if all(name in bucket for bucket in buckets.names)}
    required = {name: name in everywhere and not first.get(name, False) for name in names}
    gone = {*names, *buckets.state.values, *_baked(buckets)}
    unused = [n for n, p in signature.items() if p.default is None and n not in gone]
    required |= dict.fromkeys(unused, False)
    order = [*signature, *names]
    return dict(sorted(required.items(), key=lambda item: (not item[1], order.index(item[0]))))


def _baked(buckets: _Buckets) -> dict[str, Any]:
    """Arguments of the first example without a tensor in them, None aside."""
    args, kwargs, positional = bind(buckets.model, *buckets.examples[0])
    given = {**dict(zip(positional, args, strict=False)), **kwargs}
    return {name: value for name, value in given.items() if value is not None and not flatten(value).leaves}


def _key(tensors: Mapping[str, torch.Tensor]) -> tuple[Any, ...]:
    return tuple(sorted((name, str(t.dtype), tuple(t.shape)) for name, t in tensors.items()))


def _told(tensors: Mapping[str, torch.Tensor]) -> str:
    return ", ".join(f"{name}: {str(t.dtype).removeprefix('torch.')}{list(t.shape)}" for name, t in tensors.items())


def _buffer(module: torch.nn.Module, name: str) -> torch.Tensor:
    try:
        return module.get_buffer(name)
    except AttributeError:
        return module.get_parameter(name)
