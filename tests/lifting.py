"""The common check of lift-int-casts.

`lifted` applies the pass to a captured function, checks invariants and idempotence, compares every value that became float32 with float64
(the captured graph with every float dtype, casts too, set to float64): error(lifted) <= max(error(eager), error(float32)) + half a unit in
the last place of the model's dtype, where float32 is the captured graph with every narrower float dtype set to float32. It is there because
eager can be exact by luck: float16 has 0.3 * 3220 = 966.0 to the last bit, float32 has 966.00006, and their cosines are 6e-5 apart, while
what is computed in float32 cannot be better than float32. Not to be worse is not enough, since a rounding too many can repeat eager's:
a float32 value all of whose operands are what they are in float32 has to be what it is there. Outputs keep dtype and shape.
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

from nxfx.analysis.float_ops import dtype_of
from nxfx.passes.lift_int_casts import LiftIntCasts
from nxfx.pipeline import PassContext, PipelineResult
from nxfx.verification.equivalence import error_against
from nxfx.verification.measures import widen
from nxfx.verification.precision import as_captured

aten = torch.ops.aten
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
LOW = (BF16, FP16)
FACTORIES = ("full", "zeros", "ones", "arange", "eye", "scalar_tensor", "linspace")


class Recorder(fx.Interpreter):
    """Runs a graph and keeps the value of every node.

    Args:
        wide: stands for every float dtype narrower than it.
        region: the names of the nodes where it does; everywhere, when None. Who is outside is given what its operands are rounded to.
    """

    def __init__(self, gm: fx.GraphModule, wide: torch.dtype | None = None, region: set[str] | None = None) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.wide, self.region = wide, region
        self.values: dict[str, Any] = {}

    def run_node(self, node: fx.Node) -> Any:
        is_wide = self.wide is not None and (self.region is None or node.name in self.region)
        if is_wide and node.op == "call_function":
            result = None if "_assert_tensor_metadata" in str(node.target) else self._widened(node)
        else:
            result = super().run_node(node)
        if is_wide:
            result = pytree.tree_map(lambda v: v.to(self._wider(v.dtype)) if isinstance(v, Tensor) else v, result)
        self.values[node.name] = result
        return result

    def fetch_args_kwargs_from_env(self, node: fx.Node) -> Any:
        args, kwargs = super().fetch_args_kwargs_from_env(node)
        if self.region is None or node.name in self.region:
            return args, kwargs
        return as_captured(node, args, kwargs)

    def _wider(self, dtype: torch.dtype) -> torch.dtype:
        return self.wide if self.wide is not None and dtype.is_floating_point and dtype.itemsize < self.wide.itemsize else dtype

    def _widened(self, node: fx.Node) -> Any:
        def widened(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.to(self._wider(value.dtype))
            return self._wider(value) if isinstance(value, torch.dtype) else value

        args, kwargs = pytree.tree_map(widened, self.fetch_args_kwargs_from_env(node))
        is_float = isinstance(node.meta.get("val"), Tensor) and node.meta["val"].is_floating_point()
        if is_float and node.target.__name__.split(".")[0] in FACTORIES:
            kwargs = {**kwargs, "dtype": self._wider(node.meta["val"].dtype)}
        return node.target(*args, **kwargs)


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
        return recorded(self.before, inputs), recorded(self.after, inputs), recorded(self.before, inputs, FP64)

    def check(self, inputs: Sequence[Any]) -> None:
        eager, lifted, truth = self.values(inputs)
        single = recorded(self.before, inputs, FP32)
        for name in self.float32():
            off, off_single, error = ((run[name].double() - truth[name]).abs() for run in (eager, single, lifted))
            allowed = torch.where(off_single.isfinite() & (off_single > off), off_single, off) + half_ulp(truth[name], eager[name].dtype)
            # What eager turned into an infinity or nan cannot get worse, unless a nan is new.
            fine = (error <= allowed * (1 + 1e-9)) | ~truth[name].isfinite() | ~eager[name].isfinite()
            fine |= off_single > 0.1 * truth[name].abs().amax() if truth[name].numel() else False  # a cosine of 2**30: luck decides
            fine &= ~lifted[name].isnan() | eager[name].isnan() | truth[name].isnan()
            assert fine.all(), f"{name}: {int((~fine).sum())} of {fine.numel()} elements got worse"
        assert not (rounded := self.rounded_again(lifted, single)), f"{rounded} is not what float32 makes of its operands"
        for before, after in zip(outputs(eager), outputs(lifted), strict=True):
            assert before.dtype == after.dtype and before.shape == after.shape


    def members(self) -> set[str]:
        """Names of the values that are made of integers and constants alone."""
        return {n.name for n in LiftIntCasts._origins(self.before.gm, self.before.context).members}

    def ideal(self, inputs: Sequence[Any]) -> dict[str, Any]:
        """Every node's value where what is lifted is computed without any error, and rounded for those who take it: the best that can be."""
        origins = LiftIntCasts._origins(self.before.gm, self.before.context)
        is_ = {n.name: dtype_of(n) for n in self.after.gm.graph.nodes}
        lifted = {n.name for n in (*origins.members, *origins.sinks) if is_.get(n.name) not in LOW}
        return recorded(self.before, inputs, FP64, lifted)

    def rounded_again(self, lifted: dict[str, Any], single: dict[str, Any]) -> str:
        """The first float32 value that differs from that of ``single`` while its operands do not; empty: there is none.

        Neither what activations take part in is asked nor what is given the model's dtype: it comes back there.
        """
        same: dict[fx.Node, bool] = {}
        members = self.members() - {n.name for n in self.after.gm.graph.nodes if any(dtype_of(v) in LOW for v in n.all_input_nodes)}
        for node in self.before.gm.graph.nodes:
            operands = [same.get(operand, False) for operand in node.all_input_nodes]
            if node.name not in lifted:  # a cast that lost its users
                same[node] = all(operands)
                continue
            value = lifted[node.name]
            same[node] = close(value, single[node.name], 0)
            if node.name in members and all(operands) and getattr(value, "dtype", None) is FP32 and not close(value, single[node.name]):
                return str(node.name)
        return ""


def close(value: Any, other: Any, share: float = 2**-20) -> bool:
    """Equal but for a share of the largest: kernels of float32 differ when memory is laid out otherwise, half precision rounds far more."""
    if not isinstance(value, Tensor):
        pairs = zip(pytree.tree_leaves(value), pytree.tree_leaves(other), strict=True)
        return all(close(v, o, share) if isinstance(v, Tensor) else v == o for v, o in pairs)
    if value.shape != other.shape:
        return False
    value, other = widen(value), widen(other)
    largest = float(other[other.isfinite()].abs().max()) if other.isfinite().any() else 0.0
    return bool(((value == other) | (value.isnan() & other.isnan()) | ((value - other).abs() <= share * largest)).all())


def recorded(
    captured: Captured, inputs: Sequence[Any], wide: torch.dtype | None = None, region: set[str] | None = None
) -> dict[str, Any]:
    """Every node's value, with ``wide`` in the place of every narrower float dtype, everywhere or in a region."""
    recorder, default = Recorder(captured.gm, wide, region), torch.get_default_dtype()
    try:
        torch.set_default_dtype(wide if wide is not None and region is None else default)
        with torch.no_grad():
            recorder.run(*captured.weights, *copy.deepcopy(list(inputs)))
    finally:
        torch.set_default_dtype(default)
    return recorder.values


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
