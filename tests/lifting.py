"""The common check of lift-int-casts.

`lifted` applies the pass to a captured function, checks invariants and idempotence, compares every value that became float32 with float64
(the captured graph with every float dtype, casts too, set to float64): error(lifted) <= error(eager) + half a unit in the last place of the
model's dtype. Outputs keep dtype and shape.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from harness import Captured, assert_invariants, golden, graph_of, run_passes
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from nxfx.passes.lift_int_casts import LiftIntCasts
from nxfx.pipeline import PassContext, PipelineResult
from nxfx.verification.equivalence import error_against

aten = torch.ops.aten
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
LOW = (BF16, FP16)
FACTORIES = ("full", "zeros", "ones", "arange", "eye", "scalar_tensor", "linspace")


class Recorder(fx.Interpreter):
    """Runs a graph and keeps the value of every node; ``double`` sets every float dtype to float64."""

    def __init__(self, gm: fx.GraphModule, double: bool = False) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.double = double
        self.values: dict[str, Any] = {}

    def run_node(self, node: fx.Node) -> Any:
        if self.double and node.op == "call_function":
            result = None if "_assert_tensor_metadata" in str(node.target) else self._widened(node)
        else:
            result = super().run_node(node)
        if self.double:
            result = pytree.tree_map(lambda v: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v, result)
        self.values[node.name] = result
        return result

    def _widened(self, node: fx.Node) -> Any:
        def widen(value: Any) -> Any:
            return FP64 if isinstance(value, torch.dtype) and value.is_floating_point else value

        args, kwargs = self.fetch_args_kwargs_from_env(node)
        kwargs = {k: widen(v) for k, v in kwargs.items()}
        is_float = isinstance(node.meta.get("val"), Tensor) and node.meta["val"].is_floating_point()
        if is_float and node.target.__name__.split(".")[0] in FACTORIES:
            kwargs["dtype"] = FP64
        return node.target(*map(widen, args), **kwargs)


@dataclass
class Lifted:
    """A graph before and after the pass."""

    before: Captured
    after: Captured
    result: PipelineResult

    @property
    def rules(self) -> list[str]:
        return [r.rule for r in self.result.rewrites]

    @property
    def codes(self) -> list[str]:
        return [f.code for f in self.result.findings]

    @property
    def added(self) -> int:
        return len(self.after.gm.graph.nodes) - len(self.before.gm.graph.nodes)

    def float32(self) -> list[str]:
        """Names of the nodes that were low precision before."""
        was = {n.name: n.meta["val"].dtype for n in self.before.gm.graph.nodes if isinstance(n.meta.get("val"), Tensor)}
        is_ = {n.name: n.meta["val"].dtype for n in self.after.gm.graph.nodes if isinstance(n.meta.get("val"), Tensor)}
        return [name for name, dtype in was.items() if dtype in LOW and is_.get(name) == FP32]

    def casts(self, dtype: torch.dtype) -> int:
        nodes = self.after.gm.graph.find_nodes(op="call_function", target=aten._to_copy.default)
        return sum(n.kwargs.get("dtype") == dtype for n in nodes)

    def values(self, inputs: Sequence[Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Every node's value: eager, lifted, float64."""
        runs = []
        for captured, double in ((self.before, False), (self.after, False), (self.before, True)):
            recorder, default = Recorder(captured.gm, double), torch.get_default_dtype()
            try:
                torch.set_default_dtype(FP64 if double else default)
                with torch.no_grad():
                    recorder.run(*captured.weights, *copy.deepcopy(list(inputs)))
            finally:
                torch.set_default_dtype(default)
            runs.append(recorder.values)
        return runs[0], runs[1], runs[2]

    def check(self, inputs: Sequence[Any]) -> None:
        eager, lifted, truth = self.values(inputs)
        for name in self.float32():
            allowed = (eager[name].double() - truth[name]).abs() + half_ulp(truth[name], eager[name].dtype)
            error = (lifted[name].double() - truth[name]).abs()
            # What eager turned into an infinity or nan cannot get worse.
            fine = (error <= allowed * (1 + 1e-9)) | ~truth[name].isfinite() | ~eager[name].isfinite()
            assert fine.all(), f"{name}: {int((~fine).sum())} of {fine.numel()} elements got worse"
        for before, after in zip(outputs(eager), outputs(lifted), strict=True):
            assert before.dtype == after.dtype and before.shape == after.shape


def outputs(values: dict[str, Any]) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(values["output"]) if isinstance(leaf, Tensor)]


def half_ulp(value: Tensor, dtype: torch.dtype) -> Tensor:
    bits = {BF16: 8, FP16: 11}[dtype]
    exponent = torch.frexp(value.abs().clamp(min=torch.finfo(dtype).tiny))[1]
    return torch.exp2((exponent - bits - 1).double())


def applied(model: Any, args: Sequence[Any], **capture: Any) -> Lifted:
    before = graph_of(model, args, **capture)
    after = Captured(copy.deepcopy(before.gm), PassContext(sources=before.context.sources), before.weights)
    found = Lifted(before, after, run_passes(after, LiftIntCasts()))
    assert_invariants(after)
    return found


def lifted(model: Any, args: Sequence[Any], *more: Sequence[Any], **capture: Any) -> Lifted:
    found = applied(model, args, **capture)
    names = [n.name for n in found.after.gm.graph.nodes]
    again = run_passes(found.after, LiftIntCasts())
    assert not again.changed and names == [n.name for n in found.after.gm.graph.nodes], again.rewrites
    for inputs in (args, *more):
        found.check(inputs)
    return found


def untouched(model: Any, args: Sequence[Any], *more: Sequence[Any], **capture: Any) -> Lifted:
    """The same, for what must be left alone: not a node changes."""
    found = lifted(model, args, *more, **capture)
    assert not found.result.changed, found.rules
    assert golden(found.before) == golden(found.after)
    return found


def errors(found: Lifted, inputs: Sequence[Any], output: int = 0) -> tuple[float, float]:
    """Mean error of an output against float64: eager and lifted."""
    eager, after, truth = (outputs(v)[output] for v in found.values(inputs))
    return error_against(truth, eager).mean, error_against(truth, after).mean


def inv_freq(dim: int = 64, base: float = 10000.0) -> Tensor:
    return 1.0 / (base ** (torch.arange(0, dim, 2) / dim))


POSITIONS = torch.arange(30000, 30016)[None]
HIDDEN = torch.randn(1, 2, 16, 64, generator=torch.Generator().manual_seed(0)).to(BF16)
FAR = {"position_ids": (0, 131071)}


class Rotary(nn.Module):
    """A rotary embedding that casts position ids to the model's dtype, in one of its spellings."""

    def __init__(self, spelling: str, dtype: torch.dtype = BF16, table: torch.dtype = FP32) -> None:
        super().__init__()
        self.spelling, self.dtype = spelling, dtype
        self.register_buffer("inv_freq", inv_freq().to(table), persistent=False)

    def angles(self, position_ids: Tensor) -> Tensor:
        positions, table = position_ids.to(self.dtype), self.inv_freq.to(self.dtype)
        if self.spelling == "matmul":
            return (table[None, :, None].expand(1, -1, 1) @ positions[:, None, :]).transpose(1, 2)
        if self.spelling == "einsum":
            return torch.einsum("i,j->ij", positions[0], table)[None]
        if self.spelling == "outer":
            return torch.outer(positions[0], table)[None]
        if self.spelling == "promoted":
            return position_ids[:, :, None] * table
        return positions[:, :, None] * table

    def forward(self, position_ids: Tensor, hidden: Tensor) -> Tensor:
        angles = self.angles(position_ids)
        if self.spelling == "complex":
            turn = torch.polar(torch.ones_like(angles, dtype=FP32), angles.float())
            pairs = torch.view_as_complex(hidden.float().unflatten(-1, (-1, 2)))
            return torch.view_as_real(pairs * turn[:, None]).flatten(-2).to(hidden.dtype)
        if self.spelling == "interleaved":
            cos, sin = angles.cos().repeat_interleave(2, -1), angles.sin().repeat_interleave(2, -1)
            rotated = torch.stack([-hidden[..., 1::2], hidden[..., ::2]], -1).flatten(-2)
        elif self.spelling == "partial":
            cos = torch.cat([angles[..., :16].cos().repeat(1, 1, 2), torch.ones_like(angles)], -1)
            sin = torch.cat([angles[..., :16].sin().repeat(1, 1, 2), torch.zeros_like(angles)], -1)
            rotated = hidden.flip(-1)
        else:
            both = torch.cat([angles, angles], -1)
            cos, sin = both.cos(), both.sin()
            rotated = torch.cat([-hidden[..., 32:], hidden[..., :32]], -1)
        return hidden * cos[:, None] + rotated * sin[:, None]
