"""Tensors that a graph module owns itself, beside those that it shares with the model."""

from __future__ import annotations

import torch

# Holds the tensors that capture lifted from the model's code and those that passes computed.
CONSTANTS = "_constants"


def share_registries(module: torch.nn.Module, owner: torch.nn.Module) -> None:
    """Let ``module`` hold the very parameters, buffers and submodules of ``owner``: a weight that is replaced in one is in both."""
    for registry in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
        module.__dict__[registry] = owner.__dict__[registry]


def own_buffer(root: torch.nn.Module, name: str, value: torch.Tensor) -> None:
    """Give ``root`` a buffer under the dotted ``name`` that the model's registries do not share."""
    *path, leaf = name.split(".")
    module = root
    for step in path:
        child = module._modules.get(step)
        if child is None:
            child = module._modules[step] = torch.nn.Module()
        module = child
    module.__dict__["_buffers"] = {**module._buffers, leaf: value}
    if leaf not in module._non_persistent_buffers_set:
        module.__dict__["_non_persistent_buffers_set"] = {*module._non_persistent_buffers_set, leaf}


def new_constant(root: torch.nn.Module, value: torch.Tensor) -> str:
    """Give ``root`` a constant of its own; its name."""
    holder = root._modules.get(CONSTANTS)
    taken = holder._buffers if holder is not None else {}
    number = len(taken)
    while f"folded_{number}" in taken:
        number += 1
    own_buffer(root, name := f"{CONSTANTS}.folded_{number}", value)
    return name
