"""Runs a StableHLO program on the CPU, as IREE compiles it: the lowered program itself, executed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from nxfx.handoff.lowered import Lowered

INSTALLED = True
try:
    import iree.compiler
    import iree.runtime
    import ml_dtypes
except ImportError:
    INSTALLED = False


def _to_numpy(tensor: torch.Tensor) -> Any:
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _to_torch(array: Any) -> torch.Tensor:
    array = np.asarray(array)
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.copy().view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


class Program:
    """A lowered program (its text, or ``program``: its bytecode), compiled once.

    Raises:
        iree.compiler.CompilerToolError: IREE refuses the program.
    """

    def __init__(self, lowered: Lowered, program: bytes = b"") -> None:
        self.weights = [_to_numpy(w) for w in lowered.weights]
        binary = iree.compiler.compile_str(
            program or lowered.text,
            input_type="stablehlo",
            target_backends=["llvm-cpu"],
            extra_args=["--iree-llvmcpu-target-cpu=generic", "--iree-opt-level=O0", "--iree-input-demote-f64-to-f32=false"],
        )
        context = iree.runtime.SystemContext(config=iree.runtime.Config("local-sync"))
        context.add_vm_module(iree.runtime.VmModule.copy_buffer(context.instance, binary))
        (self._main,) = (module["main"] for name, module in context.modules.items() if name != "hal")

    def __call__(self, *inputs: torch.Tensor, weights: Sequence[torch.Tensor] | None = None) -> list[torch.Tensor]:
        held = self.weights if weights is None else [_to_numpy(w) for w in weights]
        results = self._main(*held, *(_to_numpy(t) for t in inputs))
        return [_to_torch(r) for r in (results if isinstance(results, (list, tuple)) else [results])]
