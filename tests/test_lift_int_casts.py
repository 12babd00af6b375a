"""lift-int-casts: what is lifted, what is left alone, and that nothing gets worse against float64.

`lifted` is the common check: it applies the pass to a captured function, checks invariants and idempotence, compares
every value that became float32 with float64 (the captured graph with every float dtype, casts too, set to float64):
error(lifted) <= error(eager) + half a unit in the last place of the model's dtype. Outputs keep dtype and shape.
"""

from __future__ import annotations

import copy
import cProfile
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import corpus
import pytest
import torch
from expecttest import assert_expected_inline
from harness import Captured, assert_invariants, golden, graph_of, run_passes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import _extract_tensor_metadata
from torch.utils import _pytree as pytree

from nxfx.analysis.provenance import Role, Source
from nxfx.graph import invariants
from nxfx.passes.lift_int_casts import LiftIntCasts
from nxfx.pipeline import PassContext, Pipeline, PipelineResult
from nxfx.report.findings import Severity
from nxfx.report.rewrites import Kind
from nxfx.verification.equivalence import compare, error_against

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


# --- what is rewritten ------------------------------------------------------------------------------------------------


def test_given_result() -> None:
    class Model(nn.Module):
        def forward(self, position_ids: Tensor, hidden: Tensor) -> Tensor:
            return hidden * (position_ids.to(BF16)[:, :, None] * 0.25).cos()

    found = lifted(Model(), (torch.arange(4)[None], torch.ones(1, 4, 1, dtype=BF16)), ranges=FAR)
    assert_expected_inline(
        "\n".join(line for line in golden(found.before).split("\n") if "assert" not in line),
        """\
%position_ids : int64[1, 4] = placeholder[position_ids]
%hidden : bfloat16[1, 4, 1] = placeholder[hidden]
%_to_copy : bfloat16[1, 4] = aten._to_copy.default(position_ids, dtype=torch.bfloat16)
%unsqueeze : bfloat16[1, 4, 1] = aten.unsqueeze.default(_to_copy, 2)
%mul : bfloat16[1, 4, 1] = aten.mul.Tensor(unsqueeze, 0.25)
%cos : bfloat16[1, 4, 1] = aten.cos.default(mul)
%mul_1 : bfloat16[1, 4, 1] = aten.mul.Tensor(hidden, cos)
return (mul_1,)""",
    )
    assert_expected_inline(
        "\n".join(line for line in golden(found.after).split("\n") if "assert" not in line),
        """\
%position_ids : int64[1, 4] = placeholder[position_ids]
%hidden : bfloat16[1, 4, 1] = placeholder[hidden]
%_to_copy_default : float32[1, 4] = aten._to_copy.default(position_ids, dtype=torch.float32)
%unsqueeze : float32[1, 4, 1] = aten.unsqueeze.default(_to_copy_default, 2)
%mul : float32[1, 4, 1] = aten.mul.Tensor(unsqueeze, 0.25)
%cos : float32[1, 4, 1] = aten.cos.default(mul)
%_to_copy_default_1 : bfloat16[1, 4, 1] = aten._to_copy.default(cos, dtype=torch.bfloat16)
%mul_1 : bfloat16[1, 4, 1] = aten.mul.Tensor(hidden, _to_copy_default_1)
return (mul_1,)""",
    )
    (rewrite,) = found.result.rewrites
    assert (rewrite.rule, rewrite.kind) == ("lift.cast", Kind.REFINES)
    assert rewrite.before == "int64 up to 131071 → bfloat16, which rounds above 256"
    assert rewrite.location.source == "return hidden * (position_ids.to(BF16)[:, :, None] * 0.25).cos()"


SPELLINGS = ["half-split", "interleaved", "partial", "matmul", "einsum", "outer", "promoted", "complex"]


@pytest.mark.parametrize(
    ("spelling", "dtype"),
    [(s, BF16) for s in SPELLINGS] + [("half-split", FP16), ("complex", FP16)],
    ids=lambda v: str(v).removeprefix("torch."),
)
def test_rotary_in_every_spelling(spelling: str, dtype: torch.dtype) -> None:
    """FX.md trap 21: positions alias above 256."""
    args = (POSITIONS, HIDDEN.to(dtype))
    found = lifted(Rotary(spelling, dtype), args, (torch.arange(16)[None], HIDDEN.to(dtype)), ranges=FAR)
    eager, after = errors(found, args)
    assert after < eager / 50 and after < 0.01
    assert found.casts(dtype) == (1 if spelling == "complex" else 2), "cos and sin are cast back once each"
    product = {"matmul": "lift.outer-product", "einsum": "lift.outer-product"}
    assert ("lift.promotion" if spelling == "promoted" else "lift.cast") in found.rules
    assert spelling not in product or product[spelling] in found.rules


@pytest.mark.parametrize("core_aten", [False, True], ids=["training-ir", "core-aten"])
def test_forms_that_the_same_program_arrives_in(core_aten: bool) -> None:
    found = lifted(Rotary("matmul"), (POSITIONS, HIDDEN), core_aten=core_aten)
    eager, after = errors(found, (POSITIONS, HIDDEN))
    assert after < eager / 50


@pytest.mark.parametrize("length", [512, 4096])
def test_the_error_table_of_the_cosines(length: int) -> None:
    """NEURON.md: bf16 positions give a mean error of 0.018 at 512 and 0.14 at 4096."""

    def cosines(position_ids: Tensor) -> Tensor:
        return (position_ids.to(BF16)[:, None] * inv_freq(128)).cos()

    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("inv_freq", inv_freq(128))

        def forward(self, position_ids: Tensor) -> Tensor:
            return (position_ids.to(BF16)[:, None] * self.inv_freq).cos()

    inputs = (torch.arange(length),)
    eager, after = errors(lifted(Table(), inputs), inputs)
    assert eager == pytest.approx({512: 0.018, 4096: 0.14}[length], rel=0.1)
    assert after < 1e-4


def timestep_embedding(timesteps: Tensor, hidden: Tensor) -> Tensor:
    half = hidden.shape[-1] // 2
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(half, dtype=BF16) / half)
    angles = timesteps[:, None].to(BF16) * frequencies[None]
    return hidden + torch.cat([angles.sin(), angles.cos()], -1)


def sinusoidal_table(hidden: Tensor) -> Tensor:
    """The textbook table, filled by slice writes into a low-precision tensor."""
    length, width = hidden.shape[-2:]
    position = torch.arange(length, dtype=BF16)[:, None]
    scale = torch.exp(torch.arange(0, width, 2).to(BF16) * (-math.log(10000.0) / width))
    table = torch.zeros(length, width, dtype=BF16)
    table[:, 0::2] = torch.sin(position * scale)
    table[:, 1::2] = torch.cos(position * scale)
    return hidden + table


def alibi(attention_mask: Tensor, scores: Tensor) -> Tensor:
    """Bloom's and Falcon's: low-precision slopes times integer positions, promoted by the product."""
    slopes = torch.pow(torch.tensor(0.25), torch.arange(1, 1 + scores.shape[1], dtype=torch.int32)).to(scores.dtype)
    positions = ((attention_mask.cumsum(-1) - 1) * attention_mask)[:, None, :]
    return torch.softmax(scores + (slopes[:, None] * positions)[:, :, None], -1)


def t5_buckets(relative: Tensor, weight: Tensor) -> Tensor:
    distance = relative.abs()
    large = 8 + (torch.log(distance.to(BF16) / 8) / math.log(128 / 8) * 8).to(torch.int64)
    bucket = torch.where(distance < 8, distance, torch.clamp(large, 0, 15))
    return torch.nn.functional.embedding(bucket, weight)


def deberta_buckets(relative: Tensor, weight: Tensor) -> Tensor:
    middle, sign = 128, torch.sign(relative)
    clipped = torch.where((relative < middle) & (relative > -middle), torch.tensor(middle - 1), relative.abs())
    steps = torch.ceil(torch.log(clipped.to(BF16) / middle) / math.log(511 / middle) * (middle - 1)) + middle
    bucket = torch.where(clipped <= middle, relative, (steps * sign).to(torch.int64))
    return torch.nn.functional.embedding(bucket.clamp(-255, 255) + 256, weight)


def interpolated_grid(hidden: Tensor) -> Tensor:
    """Pixel coordinates from a low-precision linspace, scaled and floored."""
    grid = torch.linspace(-1, 1, 40, dtype=BF16)
    return hidden[:, torch.floor((grid + 1) / 2 * (hidden.shape[1] - 4)).to(torch.int64)]


def masked_mean_positions(image_mask: Tensor, hidden: Tensor) -> Tensor:
    """DETR's sine embedding in bf16: exact 0/1 casts, but prefix sums, quotients and powers rounded before the sine."""
    rows = image_mask.to(BF16).cumsum(1)
    rows = rows / (rows[:, -1:] + 1e-6) * (2 * math.pi)
    powers = 10000 ** (torch.arange(8).to(BF16) / 8)
    return hidden + (rows[..., None] / powers).sin()


SCENES: dict[str, tuple[Callable[..., Tensor], Callable[[], tuple[Any, ...]], float]] = {
    "timestep": (timestep_embedding, lambda: (torch.arange(900, 916), torch.randn(16, 64).to(BF16)), 0.2),
    "sinusoidal": (sinusoidal_table, lambda: (torch.zeros(1, 600, 32, dtype=BF16),), 0.2),
    "alibi": (alibi, lambda: (torch.ones(1, 600, dtype=torch.int64), torch.zeros(1, 4, 1, 600, dtype=BF16)), 1.02),
    "t5-buckets": (t5_buckets, lambda: (torch.arange(-600, 600), torch.arange(16.0)[:, None]), 0.5),
    "deberta-buckets": (deberta_buckets, lambda: (torch.arange(-500, 500), torch.arange(520.0)[:, None]), 0.2),
    "grid": (interpolated_grid, lambda: (torch.arange(800.0)[None],), 0.5),
    "detr-sine": (
        masked_mean_positions,
        lambda: (torch.ones(2, 40, dtype=torch.bool), torch.zeros(2, 40, 8, dtype=BF16)),
        0.5,
    ),
}


@pytest.mark.parametrize("scene", SCENES)
def test_position_encodings_get_closer_to_float64(scene: str) -> None:
    model, make, factor = SCENES[scene]
    found = applied(model, make())
    assert found.result.changed
    eager, refined = errors(found, make())
    assert refined <= factor * eager, (eager, refined)
    if "buckets" not in scene and scene != "grid":  # a step may go the other way at a single element
        found.check(make())


HIDDEN_CASTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": lambda p, t: p + t,
    "mul": lambda p, t: p * t,
    "sub": lambda p, t: p - t,
    "rsub": lambda p, t: t - p,
    "div": lambda p, t: p / t,
    "pow": lambda p, t: torch.pow(p, t * 0.1),
    "minimum": lambda p, t: torch.minimum(p, t * 40000) * 0.5,
    "where": lambda p, t: torch.where(p > 30005, p, t) * 0.5,
    "cat": lambda p, t: torch.cat([p, t]) * 0.5,
    "copy": lambda p, t: t.clone().copy_(p) * 0.5,
    "slice-write": lambda p, t: torch.zeros(32, dtype=t.dtype).slice_scatter(p.to(t.dtype), 0, 8, 24) * 0.5,
    "full_like": lambda p, t: torch.full_like(t, 30001) - p,
    "arange": lambda p, t: torch.arange(30000, 30016, dtype=t.dtype) * t,
    "arange-step": lambda p, t: torch.arange(0, 4.0, 0.25, dtype=t.dtype) * 1.3,
    "linspace": lambda p, t: torch.linspace(0, 1000, 16, dtype=t.dtype) * t,
    "cumsum": lambda p, t: torch.cumsum(p, 0, dtype=t.dtype) * t,
    "sum": lambda p, t: torch.sum(p, dtype=t.dtype) * t,
    "fill": lambda p, t: torch.full((16,), 30001, dtype=t.dtype) * t,
    "type_as": lambda p, t: p.type_as(t) * t,
    "stack": lambda p, t: torch.stack([p.to(t.dtype), t]) * 0.3,
    "split": lambda p, t: torch.cat([x * 0.3 for x in p.to(t.dtype).split(5)]),
    "masked_fill": lambda p, t: (p.to(t.dtype) * 0.1).masked_fill(p > 30005, 1.5) * t,
    "clamp": lambda p, t: (p.to(t.dtype) * 0.1).clamp(0, 3000.3) * t,
    "index": lambda p, t: (p.to(t.dtype) * 0.1)[torch.arange(15, -1, -1)] * t,
    "bf16-to-fp32": lambda p, t: p.to(t.dtype).float() * 0.3,
    "strides": lambda p, t: (p[None].expand(4, 16).to(t.dtype) * t).view(64),
}


FP16_TOO = ("mul", "where", "cumsum", "copy", "arange", "bf16-to-fp32")


@pytest.mark.parametrize(
    ("cast", "dtype"), [(c, BF16) for c in HIDDEN_CASTS] + [(c, FP16) for c in FP16_TOO], ids=lambda v: str(v).removeprefix("torch.")
)
def test_casts_that_are_written_or_hidden(cast: str, dtype: torch.dtype) -> None:
    """Traps 23 and 24: promotion and cat when casts move."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.linspace(0.3, 2.9, 16).to(dtype))

        def forward(self, position_ids: Tensor) -> Tensor:
            return HIDDEN_CASTS[cast](position_ids, self.table)

    found = lifted(Model(), (POSITIONS[0],), (torch.arange(16),), (torch.arange(-70000, -69984),))
    assert found.result.changed


def test_an_early_rounding_of_an_fp32_value_is_skipped() -> None:
    """int → fp32 → bf16 → cos: the cast to bf16 goes, nothing is added but the cast back."""

    def model(position_ids: Tensor, hidden: Tensor) -> Tensor:
        return hidden * (position_ids.float() * 0.3).to(BF16).cos()

    found = lifted(model, (POSITIONS[0], HIDDEN[0, 0, :, 0]))
    assert found.rules == ["lift.sensitive-use"] and found.added == 0
    assert errors(found, (POSITIONS[0], torch.ones(16, dtype=BF16)))[1] < 0.002


def test_autocast_rounds_an_outer_product_and_its_cosine() -> None:
    def model(position_ids: Tensor, hidden: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=BF16):
            angles = inv_freq(128)[None, :, None] @ position_ids[:, None, :].float()
            cos = angles.transpose(1, 2).cos()
        return hidden * cos

    found = lifted(model, (POSITIONS, HIDDEN[0, :1].float()))
    assert "lift.outer-product" in found.rules
    eager, after = errors(found, (POSITIONS, HIDDEN[0, :1].float()))
    assert after < eager / 50


def test_fp8_and_a_low_default_dtype() -> None:
    lifted(lambda p: p.to(torch.float8_e4m3fn).to(BF16) * 0.5, (torch.arange(16, 40),))
    torch.set_default_dtype(BF16)
    try:
        found = lifted(lambda p: (p * 0.3).cos(), (POSITIONS[0],))
    finally:
        torch.set_default_dtype(FP32)
    assert found.rules == ["lift.promotion"]


def test_fp16_overflow_is_no_longer_an_infinity() -> None:
    found = lifted(lambda position_ids: position_ids.to(FP16) / 1000, (torch.tensor([70000, 5]),))
    assert found.after(torch.tensor([70000, 5]))[0].tolist() == [70.0, torch.tensor(0.005).half().item()]


def test_a_round_trip_through_low_precision_keeps_integers() -> None:
    """Eager looks up row 300 for 299, and fails where there is none."""
    weight = torch.randn(301, 2)
    found = lifted(lambda ids, table: table[ids.to(BF16).to(torch.int64)], (torch.arange(300), weight))
    assert torch.equal(found.after(torch.arange(300), weight)[0], weight[:300])


# --- what is left alone -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma", "gpt_neox", "qwen2"])
def test_rotary_that_rounds_after_the_cosine_costs_nothing(name: str) -> None:
    """int → fp32 → cos → bf16, as transformers writes it."""
    model, kwargs = corpus.BY_NAME[name].build(BF16)
    kwargs["position_ids"] = (30000 + torch.arange(corpus.LENGTH)).expand(corpus.BATCH, -1)
    program = torch.export.export(model, (), kwargs, strict=False).run_decompositions({})
    before = program.graph_module.code
    result = Pipeline(["lift-int-casts"]).run(program.graph_module, PassContext(sources=sources_of(program)))
    program.graph_module.recompile()
    assert not result.changed and not result.rewrites and program.graph_module.code == before


def sources_of(program: Any) -> dict[str, Source]:
    roles = {"PARAMETER": Role.PARAMETER, "BUFFER": Role.BUFFER, "USER_INPUT": Role.INPUT}
    state = {**program.state_dict, **program.constants}
    return {
        s.arg.name: Source(str(s.target or s.arg.name), roles.get(s.kind.name, Role.CONSTANT), state.get(s.target))
        for s in program.graph_signature.input_specs
    }


EXACT: dict[str, tuple[Callable[..., Any], tuple[Any, ...], dict[str, tuple[int, int]]]] = {
    "bool-mask": (lambda h, m: h + (1.0 - m.to(BF16)) * -1e9, (HIDDEN[0, 0], torch.ones(64, dtype=torch.bool)), {}),
    "declared-mask": (
        lambda h, m: h + (1.0 - m.to(BF16)) * torch.finfo(BF16).min,
        (HIDDEN[0, 0], torch.ones(64, dtype=torch.int64)),
        {"args_1": (0, 1)},
    ),
    "small-ids": (lambda h, i: h * (i.to(BF16) * 0.5), (HIDDEN[0, 0], torch.arange(64)), {"args_1": (-256, 256)}),
    "one-hot": (
        lambda h, i: torch.nn.functional.one_hot(i, 16).to(BF16).t() @ h,
        (HIDDEN[0, 0], torch.arange(16)),
        {"args_1": (0, 15)},
    ),
    "int8-weights": (lambda h, w: h @ (w.to(BF16) * 0.01), (HIDDEN[0, 0], torch.ones(64, 3, dtype=torch.int8)), {}),
    "fp16-2048": (lambda h, i: h.half() * (i.to(FP16) * 0.5), (HIDDEN[0, 0], torch.arange(64)), {"args_1": (0, 2048)}),
    "window-mask": (
        lambda h, i: h.masked_fill((i.to(BF16)[None] - i.to(BF16)[:, None]) != 0, -100.0),
        (HIDDEN[0, 0, :, :16], torch.arange(16) // 4),
        {"args_1": (0, 8)},
    ),
    "comparison-of-exact": (lambda h, i: h * (i.to(BF16) > 3), (HIDDEN[0, 0], torch.arange(64)), {"args_1": (0, 200)}),
    "fp32-model": (lambda h, i: h.float() * (i.float() * 0.1).cos(), (HIDDEN[0, 0], torch.arange(64)), {}),
    "no-integers": (lambda h, g: (h * g).cos() + h.exp(), (HIDDEN[0, 0], HIDDEN[0, 0]), {}),
}


@pytest.mark.parametrize("case", EXACT)
def test_what_low_precision_holds_exactly_costs_nothing(case: str) -> None:
    model, args, ranges = EXACT[case]
    found = untouched(model, args, ranges=ranges)
    assert not found.codes


UNDECLARED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "one-minus": lambda h, m: h + (1.0 - m[:, None].to(BF16)) * -10000.0,
    "one-minus-in-fp32": lambda h, m: h + ((1.0 - m[:, None]) * torch.finfo(BF16).min).to(BF16),
    "repeated": lambda h, m: h + (1 - m[:, None].to(BF16).repeat(1, 64)) * -10000.0,
    "greater-than-zero": lambda h, m: h.masked_fill(m[:, None].to(BF16) > 0, 0.0),
    "times-hidden": lambda h, m: h * m[:, None],
    "cast-times-hidden": lambda h, m: h * m[:, None].to(BF16),
    "written": lambda h, m: torch.where(h > 0, h, m[:, None]),
}


@pytest.mark.parametrize("case", UNDECLARED)
def test_undeclared_masks_cost_nothing_and_are_told(case: str) -> None:
    """Mamba multiplies hidden states by an int64 mask without a cast: NX101 says how to prove it exact."""
    args = (HIDDEN[0, 0], torch.randint(0, 2, (16,)))
    found = untouched(UNDECLARED[case], args)
    if case != "one-minus-in-fp32":  # float32 holds what a mask can sensibly be
        assert set(found.codes) == {"NX101"}
        assert all(f.severity is Severity.INFO and "'args_1': (0, 1)" in f.fix for f in found.result.findings)
    assert not untouched(UNDECLARED[case], args, ranges={"args_1": (0, 1)}).codes


def test_integers_proved_too_large_for_an_activation_are_a_warning() -> None:
    found = untouched(lambda h, p: h + p[:, None], (HIDDEN[0, 0], POSITIONS[0]), ranges={"args_1": (0, 131071)})
    (finding,) = found.result.findings
    assert (finding.code, finding.severity) == ("NX101", Severity.WARNING)
    assert "int64 up to 131071 is rounded to bfloat16 as add promotes it" in finding.message


# --- boundaries -------------------------------------------------------------------------------------------------------


def test_each_value_is_cast_back_once_for_all_who_want_it_rounded() -> None:
    def model(position_ids: Tensor, hidden: Tensor) -> tuple[Tensor, ...]:
        cos = (position_ids.to(BF16) * 0.3).cos()
        return hidden * cos, hidden + cos, cos, cos.float() * 2, cos[None] @ cos[:, None]

    args = (POSITIONS[0], HIDDEN[0, 0, :, 0])
    found = lifted(model, args)
    assert found.casts(BF16) == 1
    assert torch.equal(found.after(*args)[2], found.values(args)[1]["cos"].to(BF16))


def test_trailing_views_are_taken_of_the_rounded_value() -> None:
    """A cast before the views is one cast; after them it would be one for each layer."""

    def model(position_ids: Tensor, hidden: Tensor) -> Tensor:
        cos = (position_ids.to(BF16) * 0.3).cos()
        for _ in range(4):
            hidden = hidden * cos[None, :, None].expand(2, 16, 64)
        return hidden

    found = lifted(model, (POSITIONS[0], HIDDEN[0]))
    assert found.casts(BF16) == 1 and found.added == 1


def test_a_cast_used_by_region_and_activation_serves_both() -> None:
    args = (POSITIONS[0], HIDDEN[0, 0, :, 0])
    found = lifted(lambda p, h: (h * p.to(BF16), (p.to(BF16) * 0.3).cos()), args)
    both = lifted(lambda p, h: (lambda low: (h * low, (low * 0.3).cos()))(p.to(BF16)), args)
    assert torch.equal(found.after(*args)[1], both.after(*args)[1])
    assert torch.equal(both.before(*args)[0], both.after(*args)[0]), "the activation meets what it met before"
    assert "NX101" in both.codes


def test_outputs_buffers_and_aliases_keep_their_dtype() -> None:
    """Trap 27: a mutated buffer is an output."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("last", torch.zeros(16, dtype=BF16))

        def forward(self, position_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            scaled = position_ids.to(BF16) * 0.3
            self.last.copy_(scaled)
            return scaled, scaled[None], position_ids.to(BF16)

    found = lifted(Model(), (POSITIONS[0],))
    assert [o.dtype for o in found.after(POSITIONS[0])] == [BF16] * 4


def test_metadata_assertions_follow_the_dtype() -> None:
    def model(position_ids: Tensor) -> Tensor:
        return (position_ids.to(BF16) * 0.3).to(FP32).cos()

    found = lifted(model, (POSITIONS[0],))
    checks = found.after.gm.graph.find_nodes(op="call_function", target=aten._assert_tensor_metadata.default)
    assert FP32 in [n.args[3] for n in checks] and BF16 not in [n.args[3] for n in checks]
    found.after(POSITIONS[0])


def test_like_factories_keep_their_dtype() -> None:
    def model(position_ids: Tensor, hidden: Tensor) -> Tensor:
        scaled = position_ids.to(BF16) * 0.3
        return hidden + scaled.cos() + torch.ones_like(scaled)

    lifted(model, (POSITIONS[0], HIDDEN[0, 0, :, 0]))


def test_outputs_of_several_dtypes_are_activations() -> None:
    """The first output is a bool, the second is not one for all that."""

    def model(flag: Tensor, hidden: Tensor) -> Tensor:
        def body(h: Tensor) -> tuple[Tensor, Tensor]:
            return h > 0, h * 3

        positive, scaled = torch.cond(flag, body, body, (hidden,))
        return (scaled * 0.1).cos() * (POSITIONS[0].to(BF16) * 0.3).cos() * positive

    found = lifted(model, (torch.tensor(True), HIDDEN[0, 0, :, 0]))
    assert set(found.float32()) <= {"_to_copy", "mul_1", "cos_1"}


def test_scalars_empty_tensors_and_negative_dims() -> None:
    lifted(lambda p: (p.to(BF16) * 0.3).cos(), (torch.tensor(30001),))
    lifted(
        lambda p: (p.to(BF16)[..., None] * torch.ones(3, dtype=BF16)).sin().sum(-1),
        (torch.zeros(0, 4, dtype=torch.int64),),
    )
    lifted(lambda p: torch.cat([p.to(BF16), p.to(BF16) * 2], -1).flip(-1).cumsum(-1), (POSITIONS,))


def test_casts_that_also_change_the_memory_format() -> None:
    def model(pixels: Tensor) -> Tensor:
        return pixels.to(BF16, memory_format=torch.channels_last) * 0.3

    found = lifted(model, (torch.randint(0, 60000, (1, 3, 4, 4)),))
    assert found.after(torch.randint(0, 60000, (1, 3, 4, 4)))[0].is_contiguous(memory_format=torch.channels_last)


def test_dynamic_shapes() -> None:
    length = torch.export.Dim("length", min=2, max=8192)

    class Model(nn.Module):
        def forward(self, hidden: Tensor) -> Tensor:
            positions = torch.arange(hidden.shape[0]).to(BF16) * 0.3
            return hidden * positions.cos() + hidden.shape[0] * positions.sin()

    found = lifted(Model(), (torch.ones(600, dtype=BF16),), (torch.ones(7, dtype=BF16),), dynamic_shapes={"hidden": {0: length}})
    assert found.result.changed


def test_bodies_of_higher_order_ops_are_lifted() -> None:
    """Trap 29."""

    def model(flag: Tensor, position_ids: Tensor, hidden: Tensor) -> Tensor:
        def far(p: Tensor, h: Tensor) -> Tensor:
            return h * (p.to(BF16) * 0.3).cos()

        def near(p: Tensor, h: Tensor) -> Tensor:
            return h * (p.to(BF16) * 0.7).sin()

        return torch.cond(flag, far, near, (position_ids, hidden))

    args = (torch.tensor(True), POSITIONS[0], torch.ones(16, dtype=BF16))
    found = applied(model, args)
    assert found.rules == ["lift.cast", "lift.cast"]
    truth = (POSITIONS[0].double() * 0.3).cos()
    assert error_against(truth, found.after(*args)[0]).mean < error_against(truth, found.before(*args)[0]).mean / 50


def test_joint_graphs_of_training() -> None:
    """Forward and backward are rewritten before they are split, so that both agree on what is saved."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import default_partition

    rules: list[str] = []

    def partition(joint: fx.GraphModule, inputs: Any, **kwargs: Any) -> Any:
        result = Pipeline([LiftIntCasts()]).run(joint, PassContext(training=True))
        assert not invariants.check(joint)
        for node in joint.graph.nodes:  # torch 2.9 takes a node without it for one with several outputs
            if isinstance(node.meta.get("val"), Tensor):
                node.meta["tensor_meta"] = _extract_tensor_metadata(node.meta["val"])
        rules.extend(r.rule for r in result.rewrites)
        return default_partition(joint, inputs, **kwargs)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=lambda gm, _: gm, bw_compiler=lambda gm, _: gm, partition_fn=partition)
    weight = torch.randn(64, 64).to(BF16).requires_grad_()

    def loss(position_ids: Tensor, hidden: Tensor) -> Tensor:
        frequencies = 1.0 / 10000 ** (torch.arange(64).to(BF16) / 64)
        cos = (position_ids.to(BF16)[:, :, None] * frequencies).cos()
        return (hidden @ weight * cos[:, None]).float().square().sum()

    (eager,) = torch.autograd.grad(loss(torch.arange(16)[None], HIDDEN), weight)
    compiled = torch.compile(loss, backend=backend)
    (near,) = torch.autograd.grad(compiled(torch.arange(16)[None], HIDDEN), weight)
    assert "lift.cast" in rules
    assert (near - eager).abs().max() < 0.05 * eager.abs().max()


# --- broadcast products -----------------------------------------------------------------------------------------------


class Products(nn.Module):
    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.register_buffer("table", table)

    def forward(self, position_ids: Tensor) -> tuple[Tensor, ...]:
        positions = position_ids.to(self.table.dtype)
        return (
            (self.table[None, :, None] @ positions[:, None, :]).transpose(1, 2),
            torch.mm(self.table[:, None], positions[:1]),
            torch.bmm(positions[:, :, None], self.table[None, None, :].expand(positions.shape[0], 1, -1)),
            torch.einsum("i,bj->bji", self.table, positions),
        )


@pytest.mark.parametrize("core_aten", [False, True], ids=["training-ir", "core-aten"])
def test_products_with_one_term_a_sum_are_bit_equal_broadcasts(core_aten: bool) -> None:
    args = (torch.randint(0, 131072, (2, 40)),)
    found = applied(Products(inv_freq()), args, ranges=FAR, core_aten=core_aten)
    assert {(r.rule, r.kind) for r in found.result.rewrites} == {("lift.outer-product", Kind.EXACT)}
    assert compare(found.before(*args), found.after(*args), kind="exact").ok
    products = {aten.mm.default, aten.bmm.default, aten.matmul.default, aten.einsum.default}
    assert not products & {n.target for n in found.after.gm.graph.nodes}
    assert {p.source for p in found.after.context.premises} == {"table"}


def test_products_that_can_give_a_signed_zero_only_refine() -> None:
    """Matrix kernels sign ``-1 * 0`` as they please: +0 for small shapes, -0 for large ones."""
    found = lifted(Products(inv_freq()), (torch.arange(-3, 3)[None].expand(2, 6).contiguous(),))
    assert {r.kind for r in found.result.rewrites} == {Kind.REFINES}
    args = (torch.arange(-3, 3)[None].expand(2, 6).contiguous(),)
    assert all(torch.equal(a, b) for a, b in zip(found.before(*args), found.after(*args), strict=True))


def test_products_that_stay() -> None:
    untouched(lambda p, w: p.float() @ w, (torch.arange(12).view(3, 4), torch.randn(4, 5)))
    untouched(lambda h, w: h[:, None] @ w[None], (torch.randn(4), torch.randn(5)))
    mask = torch.ones(4, 6, dtype=torch.bool)
    untouched(lambda m: (1 - m.float())[..., None] @ (1 - m.float())[:, None], (mask,))


def test_outer_products_can_be_kept() -> None:
    captured = graph_of(Products(inv_freq()), (torch.arange(6)[None],))
    assert not Pipeline.parse("lift-int-casts{outer_products=off}").run(captured.gm, captured.context).changed


# --- comparisons ------------------------------------------------------------------------------------------------------


def test_integers_are_compared_exactly_with_low_precision_floats() -> None:
    """A padding mask from lengths that are a bf16 input: eager rounds 4095 to 4096."""
    args = (torch.tensor([4096.0, 300.0, 7.0], dtype=BF16),)
    found = lifted(lambda lengths: torch.arange(4100) < lengths[:, None], args)
    assert found.rules == ["lift.comparison"]
    assert found.after(*args)[0].sum(-1).tolist() == [4096, 300, 7]
    assert found.before(*args)[0].sum(-1).tolist() != [4096, 300, 7]


def test_two_roundings_that_belong_together_stay_together() -> None:
    """The activation is made of the same integers, rounded: an exact comparison would tell them apart."""
    args = (torch.arange(300, 400), HIDDEN[0, 0, 0])
    found = untouched(lambda p, h: p[:, None] == (p.to(BF16)[:, None] + h * 0), args)
    assert "NX101" in found.codes


# --- tables -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["bf16", "fp16", "fp32-with-bf16-values"])
def test_a_rounded_table_is_reported_with_its_error(how: str) -> None:
    low = FP16 if how == "fp16" else BF16

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("inv_freq", inv_freq(128).to(low).to(FP32 if "fp32" in how else low), persistent=False)

        def forward(self, position_ids: Tensor) -> Tensor:
            return (self.inv_freq[None, :].float() * position_ids[:, None].float()).cos()

    found = untouched(Model(), (torch.arange(64),), ranges={"position_ids": (0, 4095)})
    (finding,) = found.result.findings
    assert finding.code == "NX102" and "'inv_freq' was rounded to" in finding.message
    told = float(finding.message.rsplit(" ", 1)[1])
    rounded = inv_freq(128).to(low).double()
    positions = torch.arange(4096).double()[:, None]
    measured = ((positions * rounded).cos() - (positions * inv_freq(128).double()).cos()).abs().max().item()
    assert measured <= told * 1.01 and told <= 2
    assert finding.severity is Severity.WARNING


def test_a_table_of_rounded_positions_is_reported() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("positions", torch.arange(600).to(BF16))
            self.register_buffer("inv_freq", inv_freq())

        def forward(self, hidden: Tensor) -> Tensor:
            return hidden * (self.positions[:, None].float() * self.inv_freq).cos()

    (finding,) = untouched(Model(), (torch.ones(600, 32),)).result.findings
    assert "'positions' was rounded to bfloat16" in finding.message


def test_the_error_of_a_table_shrinks_with_the_range() -> None:
    model = Rotary("half-split", table=BF16)
    near = lifted(model, (POSITIONS, HIDDEN), ranges={"position_ids": (0, 3)})
    far = lifted(model, (POSITIONS, HIDDEN), ranges=FAR)
    told = [float(f.message.rsplit(" ", 1)[1]) for x in (near, far) for f in x.result.findings if f.code == "NX102"]
    assert told[0] < 0.02 and told[1] == 2


EXACT_TABLES = {
    "powers": 2.0 ** -torch.arange(8),
    "integers": torch.arange(256.0),
    "bf16-integers": torch.arange(256).to(BF16),
    "even-steps": torch.arange(128) / 128,
    "fp32": inv_freq(),
}


@pytest.mark.parametrize("name", EXACT_TABLES)
def test_tables_that_were_not_rounded_are_not_reported(name: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", EXACT_TABLES[name])

        def forward(self, position_ids: Tensor) -> Tensor:
            return (self.table.float() * position_ids[:, None].float()).sin()

    assert not untouched(Model(), (torch.arange(16),)).codes


def test_a_table_in_a_region_is_converted_once() -> None:
    found = lifted(Rotary("half-split", table=BF16), (POSITIONS, HIDDEN), ranges=FAR)
    eager, after = errors(found, (POSITIONS, HIDDEN))
    assert after < eager / 50
    assert found.casts(FP32) == 2, "positions and the table"


def test_positions_rounded_as_they_meet_an_activation_before_a_sine() -> None:
    """NX103: a bf16 timestep input times frequencies cannot be lifted without widening the activation."""

    def model(timestep: Tensor) -> Tensor:
        frequencies = torch.exp(torch.arange(320, dtype=BF16) * -0.03)
        return (timestep[:, None] * frequencies).sin()

    found = lifted(model, (torch.tensor([999.0, 3.0], dtype=BF16),))
    assert "NX103" in found.codes


# --- everything at once -----------------------------------------------------------------------------------------------


def test_work_is_linear_in_nodes() -> None:
    """Trap 34. Calls are counted, since times vary."""

    def calls(layers: int) -> int:
        def model(position_ids: Tensor, hidden: Tensor) -> Tensor:
            for layer in range(layers):
                hidden = hidden * (position_ids.to(BF16) * (0.1 + layer)).cos() + hidden
            return hidden

        captured = graph_of(model, (POSITIONS[0], HIDDEN[0, 0, :, 0]))
        profile = cProfile.Profile()
        profile.runcall(LiftIntCasts().run, captured.gm, captured.context)
        return sum(entry.callcount for entry in profile.getstats())

    assert calls(60) / calls(15) < 4.6


N = 24
UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "sin": torch.sin,
    "cos": torch.cos,
    "neg": torch.neg,
    "exp": lambda a: (a * 0.001).exp(),
    "log": lambda a: (a.abs() + 1).log(),
    "reciprocal": lambda a: (a.abs() + 1).reciprocal(),
    "tanh": torch.tanh,
    "flip": lambda a: a.flip(0),
    "view": lambda a: a.view(4, -1).t().reshape(-1),
    "expand": lambda a: a[None].expand(3, N)[1],
    "chunks": lambda a: torch.cat(a.chunk(3)[::-1]),
    "scale": lambda a: a * 0.3,
    "from": lambda a: 1000 - a,
    "power": lambda a: torch.pow(2.0, a * 1e-3),
    "clamp": lambda a: a.clamp(-500, 500.5),
    "cumsum": lambda a: a.cumsum(0) * 0.01,
    "up-and-down": lambda a: (a.float() * 0.5).to(a.dtype),
    "through-int": lambda a: a.clamp(-60000, 60000).to(torch.int64).to(a.dtype),
}
BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": lambda a, b: a * b * 0.01,
    "div": lambda a, b: a / (b.abs() + 1),
    "where": lambda a, b: torch.where(a > 5, a, b),
    "stack": lambda a, b: torch.stack([a, b], -1).reshape(-1)[:N],
    "write": lambda a, b: a.slice_scatter(b.to(a.dtype)[3:9], 0, 3, 9),
    "product": lambda a, b: (a[:4, None] @ b[None, :6].to(a.dtype)).reshape(-1) * 0.001,
}


class Program(nn.Module):
    """A random program over integers, low-precision tables and activations."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.rng, self.seed, self.dtype = random.Random(seed), seed, dtype
        self.register_buffer("table", inv_freq(2 * N).to(dtype))

    def forward(self, positions: Tensor, ids: Tensor, hidden: Tensor) -> tuple[Tensor, ...]:
        rng = random.Random(self.seed)
        low = [positions.to(self.dtype), self.table, torch.arange(0, 17 * N, 17, dtype=self.dtype)]
        integers, mixed = [positions, ids], [hidden]
        for _ in range(rng.randint(4, 12)):
            kind = rng.choice(["unary"] * 4 + ["binary"] * 3 + ["promoted", "mixed"])
            a = rng.choice(low[-4:])
            if kind == "unary":
                low.append(rng.choice(list(UNARY.values()))(a))
            elif kind == "binary":
                low.append(rng.choice(list(BINARY.values()))(a, rng.choice(low)))
            elif kind == "promoted":
                low.append(rng.choice([torch.add, torch.mul, torch.minimum])(rng.choice(integers), a))
            else:
                mixed.append(rng.choice([torch.add, torch.mul, torch.sub])(rng.choice(mixed), a))
        return low[-1], mixed[-1]


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 10**6), dtype=st.sampled_from(LOW), declared=st.booleans())
def test_random_programs_never_get_worse(seed: int, dtype: torch.dtype, declared: bool) -> None:
    """Mean and 99.9th percentile of the outputs' errors over 32 inputs are at most 1.02 times eager's."""

    def inputs(case: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(case)
        start = (0, 100, 3000, 30000)[case % 4]
        positions = (start + torch.randint(0, 600, (N,), generator=generator)).sort().values
        ids = torch.randint(-300, 300, (N,), generator=generator)
        return positions, ids, torch.randn(N, generator=generator).to(dtype)

    found = lifted(Program(seed, dtype), inputs(3), ranges={"positions": (0, 40000)} if declared else None)
    collected: list[list[list[Tensor]]] = [[], [], []]
    for case in range(32):
        for kept, values in zip(collected, found.values(inputs(case)), strict=True):
            kept.append(outputs(values))
    for eager, after, truth in zip(*(map(torch.cat, zip(*runs, strict=True)) for runs in collected), strict=True):
        finite = eager.isfinite() & truth.isfinite()
        assert after[finite].isfinite().all()
        was, is_ = error_against(truth[finite], eager[finite]), error_against(truth[finite], after[finite])
        assert is_.mean <= 1.02 * was.mean and is_.p999 <= 1.02 * was.p999
