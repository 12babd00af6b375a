"""What of Neuron is installed here, found by feature, and what to install otherwise.

Two packages are called torch-neuronx. The legacy one, on PyTorch/XLA, has ``torch_neuronx.trace``; TorchNeuron registers the
Dynamo backend ``neuron``. Nothing is imported before somebody asks.
"""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType
from typing import Any

import torch

from nxfx.errors import NeuronNotFound

NEURON_INDEX = "--extra-index-url https://pip.repos.neuron.amazonaws.com"

# Neuron SDK 2.31 and 2.33 release notes: which package serves which silicon, torch and Python.
INSTALL = {
    "legacy": f"torch 2.8 or 2.9, Python 3.10 to 3.12, pip install 'torch-neuronx<2.10' neuronx-cc {NEURON_INDEX}",
    "native": f"torch 2.13 or newer, Python 3.12 or newer, pip install torch-neuronx neuronx-cc {NEURON_INDEX}",
    "nxd": f"the legacy torch-neuronx, and pip install neuronx-distributed {NEURON_INDEX}",
}
LEGACY_TARGETS = ("inf2", "trn1", "trn2")
NATIVE_TARGETS = ("trn2", "trn3")
HERE = (
    "Without Neuron you can still see what it would be given: `nxfx check SPEC` for the report, `nxfx dump SPEC` for the graph, "
    "`nxfx lower SPEC` for HLO or StableHLO; nxfx.prepare(model, args) runs the cleaned graph as it is."
)


def legacy_torch_neuronx(target: str) -> Any:
    """The legacy ``torch_neuronx``, the one with ``trace``.

    Raises:
        NeuronNotFound: there is none, or ``torch_neuronx`` here is TorchNeuron; tells what to install for ``target``.
    """
    module, problem = imported("torch_neuronx")
    if module is not None and hasattr(module, "trace"):
        return module
    if target not in LEGACY_TARGETS:
        raise NeuronNotFound(f"nothing traces for {target!r} ahead of time: {_native_route(target)}. {HERE}")
    if module is None:
        raise NeuronNotFound(f"torch_neuronx.trace is not there: {problem}. For {target}: {INSTALL['legacy']}.{_or_native(target)} {HERE}")
    what = "TorchNeuron, which registers the Dynamo backend 'neuron'" if native_registered() else "a package"
    raise NeuronNotFound(
        f"the torch_neuronx installed here is {what} and has no trace. For {target} with trace: an environment of its own with "
        f"{INSTALL['legacy']}.{_or_native(target)}"
    )


def native_backend(target: str) -> str:
    """The name of TorchNeuron's Dynamo backend, ``"neuron"``.

    Raises:
        NeuronNotFound: it is not registered; tells what to install for ``target``.
    """
    if native_registered():
        return "neuron"
    module, problem = imported("torch_neuronx")
    if target not in NATIVE_TARGETS:
        raise NeuronNotFound(f"the backend 'neuron' does not serve {target!r}: use nxfx.trace, with {INSTALL['legacy']}. {HERE}")
    if module is not None and hasattr(module, "trace"):
        problem = "the torch_neuronx installed here is the legacy one, on PyTorch/XLA, which has trace and no Dynamo backend"
    elif module is not None:
        problem = "the torch_neuronx installed here registers none"
    raise NeuronNotFound(f"no Dynamo backend 'neuron' is registered: {problem}. For {target}: {INSTALL['native']}. {HERE}")


def native_registered() -> bool:
    """Whether TorchNeuron's Dynamo backend is there. Its package may have to be imported to register it."""
    if "neuron" not in torch._dynamo.list_backends(None):
        imported("torch_neuronx")
    return "neuron" in torch._dynamo.list_backends(None)


def neuronx_distributed(part: str = "") -> Any:
    """The module ``neuronx_distributed``, or its ``part``.

    Raises:
        NeuronNotFound: it cannot be imported; tells what to install.
    """
    module, problem = imported(f"neuronx_distributed.{part}".rstrip("."))
    if module is None:
        raise NeuronNotFound(f"neuronx_distributed is not there: {problem}. It needs {INSTALL['nxd']}. {HERE}")
    return module


def present(module: str) -> bool:
    """Whether ``module`` could be imported, as far as can be told without doing so."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError, AttributeError):
        return False


def imported(name: str) -> tuple[ModuleType | None, str]:
    """``(module, "")``, or ``(None, why not)``: a package for another torch or another machine may raise anything."""
    if not present(name):
        return None, f"{name} is not installed"
    try:
        return importlib.import_module(name), ""
    except (Exception, SystemExit) as error:
        return None, f"{name} is installed but does not import: {type(error).__name__}: {' '.join(str(error).split())}"


def _native_route(target: str) -> str:
    return f"{target} is served by TorchNeuron, torch.compile(model, backend='nxfx') with {INSTALL['native']}"


def _or_native(target: str) -> str:
    return " Or torch.compile(model, backend='nxfx'), which hands on to TorchNeuron." if target in NATIVE_TARGETS else ""
