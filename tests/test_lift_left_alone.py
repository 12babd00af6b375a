"""lift-int-casts: what is left alone, and where values are cast back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import corpus
import pytest
import torch
from lifting import (
    BF16,
    FP16,
    FP32,
    HIDDEN,
    POSITIONS,
    applied,
    aten,
    errors,
    lifted,
    untouched,
)
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import _extract_tensor_metadata

from nxfx.analysis.provenance import Role, Source
from nxfx.graph import invariants
from nxfx.passes.lift_int_casts import LiftIntCasts
from nxfx.pipeline import PassContext, Pipeline
from nxfx.report.findings import Severity
from nxfx.verification.equivalence import error_against

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


def test_roundings_that_cancel_stay_and_what_does_not_is_lifted() -> None:
    """Found by fuzzing (seed 264): the rounded positions that are taken from an activation are added to it again."""

    def table() -> Tensor:
        return torch.linspace(0.3, 2.9, 64).to(BF16)

    def model(p: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        low = p[:, None].to(BF16)
        return (h - p.to(BF16)[:, None]) * 2 + (low * 2 + table()), h * (low * 0.3).cos()

    args = (POSITIONS[0], HIDDEN[0, 0])
    found = lifted(model, args)
    assert torch.equal(found.before(*args)[0], found.after(*args)[0]), "half a lift would be off by what bf16 rounds the positions by"
    before, after = errors(found, args, 1)
    assert after < before / 50
    assert "NX101" in found.codes
    same = lifted(lambda p, h: h + (p[:, None].to(BF16) + table()) - p.to(BF16)[:, None], args)
    assert torch.equal(same.before(*args)[0], same.after(*args)[0])
    for separate in (
        lambda p, h: h * 2 + (p[:, None].to(BF16) - 30000 + table()),
        lambda p, h: h - p[:, None].to(BF16) + (p[:, None].to(BF16) * table()).cos(),
    ):
        assert lifted(separate, args).result.changed


@pytest.mark.parametrize(
    "model",
    [
        lambda h, p: (h.float() - p.to(BF16).float()) + p.to(BF16),
        lambda h, p: (h.float() - (low := p.to(BF16)).float()) + low,
        lambda h, p: (h.float() - (low := p.to(BF16)).float() * 0.5) + low * 0.5,
        lambda h, p: ((h.float() - (low := p.to(BF16)).float()) * 2 + low * 2, low.float() * 0.3 * h.float()),
        lambda h, p: ((h.float() - (low := p.to(BF16)).float()) + low, low.float().sin()),
        lambda h, p: (h - (low := p.to(BF16))).float() + low.float(),
        lambda h, p: (h.float() - (low := p.to(BF16))) + (h + low).float(),
        lambda h, p: (h.float() - (scaled := p.to(BF16) * 0.3)) + (h + scaled).float(),
    ],
)  # fmt: skip
def test_a_rounding_that_cancels_in_float32_stays_too(model: Any) -> None:
    args = (HIDDEN[0, 0, :, 0].clone(), POSITIONS[0])
    found = lifted(model, args)
    assert torch.equal(found.before(*args)[0], found.after(*args)[0]), "the widened side would be unrounded, and the other would not"


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


def test_who_takes_float32_is_given_it_unrounded() -> None:
    """``angles.float()`` in a low-precision model says that float32 is wanted there; the low-precision value next to it stays what it was."""

    def model(position_ids: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        angles = position_ids.to(BF16) * 0.3
        wide = angles.float()
        return hidden.float() * wide, torch.cat([hidden, angles, wide]), wide

    args = (POSITIONS[0], HIDDEN[0, 0, :, 0])
    found = lifted(model, args)
    assert found.casts(BF16) == 1
    product, parts, wide = found.after(*args)
    assert torch.equal(wide, POSITIONS[0].float() * 0.3) and torch.equal(product, HIDDEN[0, 0, :, 0].float() * wide)
    assert torch.equal(parts[16:32], wide.to(BF16).float()) and torch.equal(parts[32:], wide)


@pytest.mark.parametrize(
    "model",
    [
        lambda h, p: h.float() * p.to(BF16),
        lambda h, p: h.float() + (p.to(BF16) * 0.3),
        lambda h, p: torch.where(p > 30003, p.to(BF16), h.float()),
        lambda h, p: torch.cat([h.float(), p.to(BF16) * 0.3]),
    ],
)
def test_an_activation_in_float32_is_given_positions_unrounded(model: Any) -> None:
    """It promotes what it meets, so that costs no cast."""
    args = (HIDDEN[0, 0, :, 0].clone(), POSITIONS[0])
    found = lifted(model, args, ranges={"p": (0, 131071)})
    before, after = errors(found, args)
    assert after < before / 50 and found.added <= 0 and not found.codes


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


