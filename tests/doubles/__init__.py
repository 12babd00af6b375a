"""Contract doubles of the Neuron packages, which cannot be installed here.

They are NOT Neuron: they take what the documented entry points take (:mod:`doubles.signatures`), refuse what those refuse, and
*execute* the graph on this machine, on torch-xla where it is installed and else on the CPU. A test that passes on them says that
nxfx keeps its side of the contract, and nothing of what neuronx-cc does with the graph.

Use::

    with doubles.installed("torch_neuronx"):
        nxfx.trace(...)
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch

_MODULES = {
    "torch_neuronx": {"torch_neuronx": "legacy"},
    "neuronx_distributed": {
        "torch_neuronx": "legacy",
        "neuronx_distributed": "nxd",
        "neuronx_distributed.trace": "nxd",
        "neuronx_distributed.trace.model_builder": "nxd",
    },
    "torchneuron": {"torch_neuronx": "native"},
}


@contextlib.contextmanager
def installed(package: str) -> Iterator[Any]:
    """``package`` importable while the block runs; gives the double."""
    before = dict(sys.modules)
    names = _MODULES[package]
    backends = set(torch._dynamo.list_backends(None))
    for name, double in names.items():
        module = importlib.import_module(f"doubles.{double}")
        shell = ModuleType(name)
        shell.__dict__.update({k: v for k, v in vars(module).items() if not k.startswith("__") or k == "__version__"})
        if name == "neuronx_distributed.trace.model_builder":
            shell.ModelBuilder = module._FirstGeneration  # type: ignore[attr-defined]
        shell.__spec__ = importlib.machinery.ModuleSpec(name, None)
        shell.__path__ = []
        sys.modules[name] = shell
    try:
        if package == "torchneuron":
            importlib.import_module("doubles.native").register()
        yield sys.modules[package if package in names else "torch_neuronx"]
    finally:
        for name in names:
            sys.modules.pop(name, None)
            if name in before:
                sys.modules[name] = before[name]
        for backend in set(torch._dynamo.list_backends(None)) - backends:
            _unregister(backend)


def _unregister(backend: str) -> None:
    from torch._dynamo.backends import registry

    registry._COMPILER_FNS.pop(backend, None)
    registry._BACKENDS.pop(backend, None)
