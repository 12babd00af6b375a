"""Double of the legacy ``torch_neuronx``: ``trace`` executes ``func`` and gives a ScriptModule with state of its own."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from doubles.execution import Executable, names_of

__version__ = "2.9.0.double"
calls: list[dict[str, Any]] = []
returns_aliased = False


def trace(
    func: Any,
    example_inputs: Any,
    *_: Any,
    input_output_aliases: Any = {},  # noqa: B006  the documented default
    compiler_workdir: Any = None,
    compiler_args: Any = None,
    partitioner_config: Any = None,
    inline_weights_to_neff: bool = True,
    cpu_backend: bool = False,
) -> torch.jit.ScriptModule:
    inputs = (example_inputs,) if isinstance(example_inputs, torch.Tensor) else tuple(example_inputs)
    if not inputs or not all(isinstance(t, torch.Tensor) for t in inputs):
        raise TypeError("example_inputs: a tensor or a tuple of tensors")
    flags = compiler_args.split() if isinstance(compiler_args, str) else list(compiler_args or [])
    if cpu_backend and not any(flag.startswith("--target") for flag in flags):
        raise ValueError("cpu_backend=True needs --target in compiler_args")
    for index, tensor in enumerate(inputs):
        if tensor.dtype in (torch.int64, torch.float64):
            warnings.warn(f"64-bit input {index} is narrowed by the runtime", stacklevel=2)
    calls.append(
        {
            "func": func, "example_inputs": inputs, "compiler_args": flags, "compiler_workdir": compiler_workdir,
            "inline_weights_to_neff": inline_weights_to_neff, "cpu_backend": cpu_backend, "aliases": dict(input_output_aliases),
        }
    )  # fmt: skip
    executable = Executable(func, names_of(func, input_output_aliases), returns_aliased).eval()
    state = {name: t.clone() for name, t in executable.named_buffers()}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(executable, inputs, check_trace=False)
        for name, tensor in traced.named_buffers():
            tensor.copy_(state[name])  # tracing ran it; nothing has run yet on an instance
    return traced


def analyze(func: Any, example_inputs: Any, compiler_workdir: Any = None) -> dict[str, Any]:
    raise NotImplementedError("the double compiles nothing, so it cannot say which ops compile")
