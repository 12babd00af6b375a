"""How the doubles run a module: on torch-xla where it is installed, else on the CPU."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils import _pytree as pytree

HAS_XLA = importlib.util.find_spec("torch_xla") is not None


def device() -> torch.device:
    if not HAS_XLA:
        return torch.device("cpu")
    os.environ.setdefault("PJRT_DEVICE", "CPU")
    import torch_xla

    found: torch.device = torch_xla.device()
    return found


class Executable(torch.nn.Module):
    """``func`` with weights and state of its own, moved to the device for each call; state is updated through aliases.

    Weights are copies: whatever happens here, the module that was traced keeps its own, as it does on an instance.
    """

    def __init__(self, func: torch.nn.Module, aliases: dict[str, int], returns_aliased: bool = False) -> None:
        super().__init__()
        self.func = copy.deepcopy(func)
        self.aliases = aliases
        self.returns_aliased = returns_aliased
        self.func.requires_grad_(False)

    def forward(self, *inputs: torch.Tensor) -> Any:
        where = device()
        held = _tensors(self.func)
        moved = {name: tensor.to(where) for name, tensor in held.items()}
        with _holding(self.func, moved):
            outputs = self.func(*(t.to(where) for t in inputs))
        single = isinstance(outputs, torch.Tensor)
        leaves = [t.cpu() for t in pytree.tree_leaves(outputs)]
        for name, index in self.aliases.items():
            assert (held[name].dtype, held[name].shape) == (leaves[index].dtype, leaves[index].shape), f"alias of {name} does not fit"
        for name, index in self.aliases.items():
            held[name].copy_(leaves[index])
        if single:
            return leaves[0]
        dropped = set() if self.returns_aliased else set(self.aliases.values())
        return tuple(t for i, t in enumerate(leaves) if i not in dropped)


@contextlib.contextmanager
def _holding(module: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> Iterator[None]:
    """``module`` with other tensors in its registries; functional_call refuses modules that are being traced."""
    before = [(m, dict(m._parameters), dict(m._buffers)) for m in module.modules()]
    try:
        for path, part in module.named_modules():
            for registry in (part._parameters, part._buffers):
                for leaf in list(registry):
                    moved = tensors.get(f"{path}.{leaf}".lstrip("."))
                    if moved is not None:
                        registry[leaf] = moved
        yield
    finally:
        for part, parameters, buffers in before:
            part._parameters.update(parameters)
            part._buffers.update(buffers)


def _tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every name, tied tensors under each of theirs."""
    return {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers(remove_duplicate=False))}


def names_of(func: torch.nn.Module, aliases: dict[torch.Tensor, int]) -> dict[str, int]:
    """Alias keys are matched by identity, as documented.

    Raises:
        ValueError: a key is no parameter or buffer of ``func``.
    """
    names = {id(tensor): name for name, tensor in _tensors(func).items()}
    missing = [tuple(t.shape) for t in aliases if id(t) not in names]
    if missing:
        raise ValueError(f"input_output_aliases: no parameter or buffer of the module, by identity: {missing}")
    return {names[id(tensor)]: index for tensor, index in aliases.items()}
