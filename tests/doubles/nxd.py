"""Double of ``neuronx_distributed``'s ``ModelBuilder``: the first generation below ``trace.model_builder``, the second above it.

Both keep what the real ones document: weights are loaded by name *after* the trace (until then the double fills them with nan),
state starts at zero and is shared between buckets, aliased outputs are not returned, and the first generation makes the module
once more on the meta device to read its names.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from doubles.execution import _holding, _tensors, device, names_of


class BaseModelInstance:
    def __init__(self, module_cls: Any, input_output_aliases: Any) -> None:
        self.module_cls = module_cls
        self.module: Any = None
        self.input_output_aliases = [input_output_aliases]

    def load_module(self) -> None:
        self.module = self.module_cls()

    def get(self, bucket_rank: Any, **kwargs: Any) -> Any:
        return self.module, self.input_output_aliases[0]


class _OnDevice:
    """A traced module with tensors of its own: those a checkpoint will bring are not there yet, and hold nan."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module
        self.names = set(module.state_dict())
        self.tensors = {name: t.detach().clone() for name, t in _tensors(module).items()}
        for name in self.names:
            self.tensors[name].fill_(float("nan") if self.tensors[name].is_floating_point() else 1)

    def load(self, checkpoint: dict[str, torch.Tensor], state: Any) -> None:
        missing = self.names - set(state) - set(checkpoint)
        if missing:
            raise RuntimeError(f"not in the checkpoint: {sorted(missing)}")
        for name in self.names - set(state):
            if (checkpoint[name].dtype, checkpoint[name].shape) != (self.tensors[name].dtype, self.tensors[name].shape):
                raise RuntimeError(f"{name} in the checkpoint is {checkpoint[name].dtype} {tuple(checkpoint[name].shape)}")
            self.tensors[name] = checkpoint[name].clone()

    def run(self, *inputs: torch.Tensor, **named: torch.Tensor) -> tuple[list[torch.Tensor], set[str]]:
        """Flat results, and the tensors that it wrote in place."""
        where = device()
        moved = {name: tensor.to(where, copy=True) for name, tensor in self.tensors.items()}
        versions = {name: t._version for name, t in moved.items()}
        with torch.no_grad(), _holding(self.module, moved):
            result = self.module(*(t.to(where) for t in inputs), **{name: t.to(where) for name, t in named.items()})
        written = {name for name, t in moved.items() if t._version != versions[name]}
        for name in written:
            self.tensors[name] = moved[name].cpu()
        return [t.cpu() for t in ([result] if isinstance(result, torch.Tensor) else list(result))], written


class _FirstGeneration:
    """``neuronx_distributed.trace.model_builder.ModelBuilder``."""

    def __init__(
        self, router: Any, tp_degree: int, checkpoint_loader: Callable[[], dict[str, torch.Tensor]], start_rank_id: int = 0,
        pp_degree: int = 1, ep_degree: int = 1, local_ranks_size: Any = None, world_size: Any = None, compiler_workdir: Any = None,
        master_proc_env_vars: Any = None, debug: bool = False, num_cores_per_group: int = 1, init_custom_process_group_fn: Any = None,
        logical_neuron_cores: int = 1, weights_to_skip_layout_optimization: Any = frozenset(),
    ) -> None:  # fmt: skip
        self.checkpoint_loader = checkpoint_loader
        self.added: list[tuple[str, Any, Any, Any]] = []

    def add(
        self, key: str, model_instance: BaseModelInstance, example_inputs: Any, compiler_args: Any = None, bucket_config: Any = None,
        priority_model_idx: Any = None,
    ) -> _FirstGeneration:  # fmt: skip
        assert isinstance(model_instance, BaseModelInstance)
        assert isinstance(example_inputs, list) and all(isinstance(e, tuple) for e in example_inputs)
        self.added.append((key, model_instance, example_inputs, compiler_args))
        return self

    def trace(self, initialize_model_weights: bool = True) -> Any:
        buckets = []
        for _, instance, examples, _ in self.added:
            instance.load_module()
            for rank, example in enumerate(examples):
                module, aliases = instance.get(rank)
                recorded = _OnDevice(module)
                recorded.run(*example)
                buckets.append((example, recorded, names_of(module, aliases)))
        checkpoint = self.checkpoint_loader()
        with torch.device("meta"):
            self.added[0][1].load_module()
            self.added[0][1].get(0)
        names, state = set(self.added[0][1].module.state_dict()), {name for *_, aliased in buckets for name in aliased}
        if names != buckets[0][1].names:
            raise RuntimeError(f"the module has other names on the meta device: {sorted(names ^ buckets[0][1].names)}")
        shared: dict[str, torch.Tensor] = {}
        for _, recorded, aliased in buckets:
            recorded.load(checkpoint, state)
            for name in aliased:
                shared.setdefault(name, torch.zeros_like(recorded.tensors[name]))
        return _Executor(buckets, shared)


class _Executor:
    def __init__(self, buckets: list[Any], state: dict[str, torch.Tensor]) -> None:
        self.buckets, self.state = buckets, state

    def __call__(self, *inputs: torch.Tensor) -> Any:
        for example, recorded, aliased in self.buckets:
            if [(t.dtype, t.shape) for t in example] == [(t.dtype, t.shape) for t in inputs]:
                recorded.tensors |= self.state
                leaves, _ = recorded.run(*inputs)
                for name, index in aliased.items():
                    self.state[name] = leaves[index].clone()
                kept = [t for i, t in enumerate(leaves) if i not in aliased.values()]
                return kept[0] if len(kept) == 1 else kept
        raise RuntimeError(f"no bucket takes {[(t.dtype, tuple(t.shape)) for t in inputs]}")


class ModelBuilder:
    """``neuronx_distributed.ModelBuilder``, second generation."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.traced: dict[str, dict[str, torch.Tensor]] = {}

    def trace(self, args: Any = None, kwargs: Any = None, tag: Any = None, spmd: bool = True) -> ModelBuilder:
        forward = self.model.forward if isinstance(self.model, torch.nn.Module) else self.model
        parameters = inspect.signature(forward).parameters
        if not parameters:
            raise ValueError("Model must have at least one parameter")
        if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters.values()):
            raise NotImplementedError("Methods with *args or **kwargs are not supported")
        for name, parameter in parameters.items():
            if parameter.default is not parameter.empty and parameter.default is not None:
                raise ValueError(f"Parameter {name!r} has a non-None default value: only None is allowed")
        args = (args,) if isinstance(args, torch.Tensor) else args or ()
        if not isinstance(args, tuple) or not all(isinstance(t, torch.Tensor) for t in args):
            raise ValueError("args must be either None, a single tensor, or a tuple of tensors")
        given = dict(zip(parameters, args, strict=False))
        for name, value in (kwargs or {}).items():
            if name not in parameters or name in given:
                raise ValueError(f"unexpected or duplicate key in kwargs: {name!r}")
            if not isinstance(value, torch.Tensor):
                raise ValueError(f"Value for key {name!r} must be a tensor")
            given[name] = value
        missing = [n for n, p in parameters.items() if p.default is p.empty and n not in given]
        if missing or not given:
            raise ValueError(f"Missing required parameters: {missing}")
        self.traced[tag or f"model_{len(self.traced)}"] = given
        return self

    def compile(
        self, priority_model_key: Any = None, compiler_workdir: Any = None, compiler_args: Any = None, max_workers: Any = None
    ) -> NxDModel:
        recorded = _OnDevice(self.model)
        state = set().union(*(recorded.run(**given)[1] for given in self.traced.values()))
        for name in state:
            recorded.tensors[name] = torch.zeros_like(recorded.tensors[name])
        return NxDModel(recorded, list(self.traced.values()), state)


class NxDModel:
    def __init__(self, recorded: _OnDevice, examples: list[dict[str, torch.Tensor]], state: set[str]) -> None:
        self.recorded, self.examples, self.state = recorded, examples, state
        self.loaded = False

    def set_weights(self, sharded_checkpoint: list[dict[str, torch.Tensor]]) -> None:
        self.recorded.load(sharded_checkpoint[0], self.state)

    def to_neuron(self) -> None:
        self.loaded = True

    def __call__(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> Any:
        if not self.loaded:
            raise RuntimeError("call to_neuron() first")
        given = {**dict(zip(self.examples[0], args, strict=False)), **kwargs}
        if not any({n: (t.dtype, t.shape) for n, t in e.items()} == {n: (t.dtype, t.shape) for n, t in given.items()} for e in self.examples):
            raise RuntimeError(f"no traced shapes fit {[(n, t.dtype, tuple(t.shape)) for n, t in given.items()]}")
        leaves, _ = self.recorded.run(**given)
        return leaves[0] if len(leaves) == 1 else leaves
