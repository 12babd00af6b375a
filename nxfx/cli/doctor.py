"""``nxfx doctor``: what is installed here, and what a cleaned graph can be handed to.

Found by feature, never by version: two different packages are called torch-neuronx, the legacy one (PyTorch/XLA, it
has ``torch_neuronx.trace``) and TorchNeuron (it registers the Dynamo backend ``neuron``). Nothing is imported that is
not there.
"""

from __future__ import annotations

import glob
import importlib.metadata
import json
import platform
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

import nxfx
from nxfx.cli import console
from nxfx.environment import INSTALL, imported, present
from nxfx.targets import Target
from nxfx.targets.facts import COMPILERS

OLDEST_TORCH = (2, 9)

# Distribution name → module: shown in this order.
_PACKAGES = {
    "transformers": "transformers",
    "torch-xla": "torch_xla",
    "torch-mlir": "torch_mlir",
    "ml_dtypes": "ml_dtypes",
    "torch-neuronx": "torch_neuronx",
    "neuronx-cc": "neuronxcc",
    "libneuronxla": "libneuronxla",
    "neuronx-distributed": "neuronx_distributed",
    "neuronx-distributed-inference": "neuronx_distributed_inference",
    "optimum-neuron": "optimum.neuron",
}


@dataclass
class Package:
    """One package: its version, None when it is not installed, and what it turned out to be."""

    name: str
    version: str | None
    note: str = ""


@dataclass
class HandOff:
    """One way to go on from a cleaned graph: how to use it here, or what it takes."""

    name: str
    available: bool
    use: str
    install: str


@dataclass
class Diagnosis:
    """Everything found, and what was asked about: the rows of the table that hold for the target."""

    packages: list[Package]
    hand_offs: list[HandOff]
    devices: int = 0
    problems: list[str] = field(default_factory=list)
    target: str = ""
    sdk: str = ""
    install: str = ""
    facts: dict[str, dict[str, str]] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps({"nxfx": 1, **asdict(self)}, indent=2)

    def __str__(self) -> str:
        width = max(len(p.name) for p in self.packages)
        lines = ["Packages"]
        for p in self.packages:
            lines.append(f"  {p.name.ljust(width)}  {p.version or 'not installed'}{f'  ({p.note})' if p.note else ''}")
        lines.append(f"  {'Neuron devices'.ljust(width)}  {self.devices or 'none'}")
        lines += ["", "Hand-offs"]
        for h in self.hand_offs:
            lines.append(f"  {'yes' if h.available else 'no ':<3}  {h.name}")
            lines.append(f"         {f'use: {h.use}' if h.available else f'needs: {h.install}'}")
        if self.target:
            lines += ["", f"Target {self.target}, SDK {self.sdk}", f"  install: {self.install}"]
            lines += [f"  {name.replace('_', ' ')}: {row['value']}  ({row['source']})" for name, row in self.facts.items()]
        if self.problems:
            lines += ["", "Problems", *(f"  {p}" for p in self.problems)]
        return "\n".join(lines)


def diagnose(target: Target | None = None) -> Diagnosis:
    """Look at this Python environment and this machine. Raises nothing: what breaks on import becomes a problem.

    Args:
        target: also tell what holds for it, and whether the compiler that is installed is of its SDK release.
    """
    found = Diagnosis([], [])
    with console.progress() as progress:
        progress("looking for packages")
        # What registers a Dynamo backend does so on import, so these come before the backends are listed.
        neuronx, xla = _import("torch_neuronx", found), _import("torch_xla", found)
        backends = set(torch._dynamo.list_backends(None))
        found.packages = [Package("nxfx", nxfx.__version__), Package("python", platform.python_version())]
        found.packages += [Package("torch", torch.__version__), *(_package(d, m) for d, m in _PACKAGES.items())]
        native = "neuron" in backends
        legacy = hasattr(neuronx, "trace")
        _name_torch_neuronx(found, installed=neuronx is not None, legacy=legacy, native=native)
        found.hand_offs = [
            _compile("nxfx" in backends, native),
            _native(native),
            _trace(legacy),
            _model_builder(found),
            _xla(xla is not None),
            _stablehlo(),
        ]
        found.devices = len(glob.glob("/dev/neuron[0-9]*"))
        if _torch_version() < OLDEST_TORCH:
            found.problems.append(f"torch {torch.__version__} is older than nxfx supports: 2.9 or newer is needed")
        if target is not None:
            _tell_target(found, target)
    return found


def _tell_target(found: Diagnosis, target: Target) -> None:
    found.target, found.sdk = target.name, target.sdk
    found.install = (_trace(False) if target.legacy else _native(False)).install
    for row in target.facts:
        value = ", ".join(sorted(row.value)) if isinstance(row.value, frozenset) else str(row.value)
        found.facts[row.name] = {"value": value, "source": row.source}
    (compiler,) = (p for p in found.packages if p.name == "neuronx-cc")
    installed = COMPILERS.get(".".join((compiler.version or "").split(".")[:2]))
    if installed is not None and installed != target.sdk:
        told = f"neuronx-cc {compiler.version} is of SDK {installed}"
        found.problems.append(f"{told}: say sdk={installed!r}, or install that of {target.sdk}")


def _torch_version() -> tuple[int, ...]:
    return tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])


def _import(module: str, found: Diagnosis) -> Any:
    package, problem = imported(module)
    if package is None and present(module):
        found.problems.append(console.one_line(problem))
    return package


def _package(distribution: str, module: str) -> Package:
    try:
        return Package(distribution, importlib.metadata.version(distribution))
    except importlib.metadata.PackageNotFoundError:
        return Package(distribution, "unknown version" if present(module) else None)


def _name_torch_neuronx(found: Diagnosis, *, installed: bool, legacy: bool, native: bool) -> None:
    """Say which of the two packages called torch-neuronx this one is."""
    (package,) = (p for p in found.packages if p.name == "torch-neuronx")
    if native:
        package.note = "TorchNeuron: registers the Dynamo backend 'neuron'"
    elif legacy:
        package.note = "legacy, on PyTorch/XLA: has torch_neuronx.trace"
    elif installed:
        package.note = "neither torch_neuronx.trace nor a Dynamo backend 'neuron' found"


def _compile(registered: bool, native: bool) -> HandOff:
    inner = "the cleaned graph then goes to 'neuron'" if native else "without 'neuron' the cleaned graph runs as it is"
    return HandOff(
        "torch.compile with nxfx",
        registered,
        f'torch.compile(model, backend="nxfx"); {inner}',
        "nxfx installed as a package (pip install nxfx): its entry point registers the backend",
    )


def _native(available: bool) -> HandOff:
    return HandOff(
        "TorchNeuron, native (Trn2, Trn3)",
        available,
        'torch.compile(model, backend="nxfx") on device "neuron"',
        INSTALL["native"],
    )


def _trace(available: bool) -> HandOff:
    return HandOff(
        "torch_neuronx.trace, legacy (Inf2, Trn1)",
        available,
        'nxfx.trace(model, args, target="trn1")',
        INSTALL["legacy"],
    )


def _model_builder(found: Diagnosis) -> HandOff:
    package = _import("neuronx_distributed", found)
    available = hasattr(package, "ModelBuilder") or (
        package is not None and present("neuronx_distributed.trace.model_builder")
    )
    return HandOff(
        "NxD ModelBuilder (neuronx-distributed)",
        available,
        "nxfx.handoff.modelbuilder: builder_module(model, args, target=...) for ModelBuilder, model_instance(...) for its first generation",
        INSTALL["nxd"],
    )


def _xla(available: bool) -> HandOff:
    return HandOff(
        "torch-xla (HLO, StableHLO; no Neuron hardware)",
        available,
        'nxfx lower SPEC --to hlo; nxfx.prepare(model, args).to("xla")',
        "pip install 'nxfx[xla]' (torch 2.9, the last with PyTorch/XLA)",
    )


def _stablehlo() -> HandOff:
    missing = [name for name in ("torch_mlir", "ml_dtypes") if not present(name)]
    return HandOff(
        "torch-mlir (StableHLO, what TorchNeuron lowers to; no Neuron hardware)",
        not missing and present("torch_mlir.fx"),
        'nxfx lower SPEC --to stablehlo; nxfx.handoff.stablehlo.lower(nxfx.prepare(model, args))',
        f"pip install 'nxfx[stablehlo]'{' (missing: ' + ', '.join(missing) + ')' if missing else ''}",
    )
