"""The boundary as TorchScript, so that a compiled graph is saved together with its checks and casts.

The source is generated from the boundary's rules: a traced boundary would keep the casts and lose the checks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from nxfx.analysis.dtype_rules import wide
from nxfx.capture.structure import Leaf
from nxfx.errors import PrepareError

if TYPE_CHECKING:
    from nxfx.handoff.neuron import CompiledCall


class _Holder(torch.nn.Module):
    def __init__(self, compiled: Sequence[torch.nn.Module]) -> None:
        super().__init__()
        for number, module in enumerate(compiled):
            self.add_module(f"bucket_{number}", module)


def scripted(buckets: Sequence[CompiledCall]) -> torch.jit.ScriptModule:
    """``forward(**flat tensors)`` over the compiled graphs: chooses the bucket by shape, checks ranges, narrows, restores dtypes.

    It returns the tensors of the model's result in order (the tensor itself where that is the whole result), and writes inputs
    that the model writes.

    Raises:
        PrepareError: the result depends on Python objects (an argument that ``forward`` adds to), the buckets have other inputs
            or results than each other, or a compiled graph is no TorchScript.
    """
    for bucket in buckets:
        if bucket.call.convention.arguments_after is not None:
            raise PrepareError("forward changes a list or dict among its arguments: TorchScript cannot; save the compiled graph instead")
        if not isinstance(bucket.compiled, torch.jit.ScriptModule):
            raise PrepareError(f"the compiled graph is a {type(bucket.compiled).__name__}, not a ScriptModule: it cannot be saved")
    names = [_names(bucket) for bucket in buckets]
    results = [_result_count(bucket) for bucket in buckets]
    if any(n != names[0] for n in names) or any(r != results[0] for r in results):
        raise PrepareError("the buckets differ in their inputs or results: save them one by one (.buckets[i].compiled)")
    class Holder(_Holder):  # a class for each module: torch.jit shares the methods of instances of one class
        pass

    module = torch.jit.script(Holder([bucket.compiled for bucket in buckets]))
    for number, bucket in enumerate(buckets):
        module.define(_fits(number, bucket))
        module.define(_run(number, bucket))
    module.define(_forward(names[0], buckets))
    scripted_module: torch.jit.ScriptModule = module
    return scripted_module


def _names(bucket: CompiledCall) -> list[str]:
    return [n for n in bucket.call.convention.input_names if n not in bucket.call.state_inputs]


def _result_count(bucket: CompiledCall) -> tuple[int, bool]:
    convention = bucket.call.convention
    return convention.output_count, isinstance(convention.output_spec, Leaf)


def _parameters(names: Sequence[str]) -> str:
    return ", ".join(f"{name}: Tensor" for name in names)


def _dtype(value: torch.Tensor, narrowed: torch.dtype | None) -> torch.dtype:
    """The caller's dtype of a placeholder."""
    return wide(narrowed) if narrowed is not None else value.dtype


def _fits(number: int, bucket: CompiledCall) -> str:
    call = bucket.call
    conditions = [
        f"{name}.dtype == {_dtype(value, rule.narrow)} and {name}.size() == {[int(n) for n in value.shape]}"
        if value.dim()
        else f"{name}.dtype == {_dtype(value, rule.narrow)} and {name}.dim() == 0"
        for name, rule, value in zip(_names(bucket), call.boundary.inputs, call.placeholders, strict=True)
    ]
    return f"def fits_{number}(self, {_parameters(_names(bucket))}) -> bool:\n    return {' and '.join(conditions)}\n"


def _run(number: int, bucket: CompiledCall) -> str:
    call, names = bucket.call, _names(bucket)
    lines = [f"def run_{number}(self, {_parameters(names)}):"]
    for name, rule in zip(names, call.boundary.inputs, strict=True):
        if rule.low is not None and rule.high is not None and call.check != "never":
            lines += _range_check(name, rule.name, rule.low, rule.high)
    passed = [
        _narrowed(name, rule.narrow) if rule.narrow is not None else name for name, rule in zip(names, call.boundary.inputs, strict=True)
    ]
    lines += [f"    out = self.bucket_{number}({', '.join(passed)})"]
    places = _places(bucket)
    restored = {i: f"{place}.to({dtype})" if dtype else place for (i, place), dtype in _with_dtypes(bucket, places)}
    for name, position in call.mutated_inputs.items():
        lines.append(f"    {name}.copy_({restored[position]})")
    results = [
        call.convention.input_names[call.convention.passed_through[i]] if i in call.convention.passed_through else restored[i]
        for i in range(call.convention.output_count)
        if i in restored or i in call.convention.passed_through
    ]
    count, single = _result_count(bucket)
    lines.append(f"    return {results[0]}" if single and results else f"    return ({', '.join(results)},)")
    return "\n".join(lines) + "\n"


def _narrowed(name: str, dtype: torch.dtype) -> str:
    """:func:`nxfx.boundary.narrowed` in words of TorchScript."""
    if not dtype.is_floating_point:
        return f"{name}.to({dtype})"
    end = torch.finfo(dtype).max
    return f"torch.where(torch.isfinite({name}), torch.clamp({name}, {-end!r}, {end!r}), {name}).to({dtype})"


def _range_check(name: str, told: str, low: int, high: int) -> list[str]:
    message = f"input '{told}': a value lies outside [{low}, {high}], found "
    return [
        f"    if {name}.numel() > 0:",
        f"        low, high = torch.aminmax({name}.to(torch.int64))",
        f"        if int(low) < {low} or int(high) > {high}:",
        f"            raise ValueError({message!r} + str(int(low)) + ' to ' + str(int(high)))",
    ]


def _places(bucket: CompiledCall) -> dict[int, str]:
    """Output position → where the compiled graph returns it."""
    count = len(bucket.call.boundary.outputs)
    (returned,) = (r.type for r in bucket.compiled.forward.schema.returns)
    if isinstance(returned, torch._C.TensorType):
        given, places = 1, ["out"]
    elif isinstance(returned, torch._C.TupleType):
        given = len(returned.elements())
        places = [f"out[{i}]" for i in range(given)]
    else:
        given = count - len(bucket.aliased)
        places = [f"out[{i}]" for i in range(given)]
    kept = [i for i in range(count) if given == count or i not in bucket.aliased]
    if len(kept) != given:
        raise PrepareError(f"the compiled graph returns {given} outputs, the graph has {count}, {len(bucket.aliased)} of them aliased")
    return dict(zip(kept, places, strict=True))


def _with_dtypes(bucket: CompiledCall, places: dict[int, str]) -> list[tuple[tuple[int, str], torch.dtype | None]]:
    return [((i, place), bucket.call.boundary.outputs[i]) for i, place in places.items()]


def _forward(names: Sequence[str], buckets: Sequence[CompiledCall]) -> str:
    lines = [f"def forward(self, {_parameters(names)}):"]
    arguments = ", ".join(names)
    for number in range(len(buckets)):
        keyword = "if" if number == 0 else "elif"
        lines += [f"    {keyword} self.fits_{number}({arguments}):", f"        return self.run_{number}({arguments})"]
    compiled_for = "; ".join(_told(bucket) for bucket in buckets)
    lines += ["    else:", f"        raise ValueError({f'compiled for {compiled_for}; this call has other dtypes or shapes'!r})"]
    return "\n".join(lines) + "\n"


def _told(bucket: CompiledCall) -> str:
    call = bucket.call
    return ", ".join(
        f"{name}: {str(_dtype(value, rule.narrow)).removeprefix('torch.')}{list(value.shape)}"
        for name, rule, value in zip(_names(bucket), call.boundary.inputs, call.placeholders, strict=True)
    )
