"""NxD's ModelBuilder (both generations) and NxD Inference, on contract doubles that execute the graph."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import doubles
import pytest
import torch
from doubles import nxd
from doubles.execution import HAS_XLA
from torch import nn

import nxfx
from nxfx.handoff.modelbuilder import builder_module, model_instance
from nxfx.handoff.submodule import prepare_on_load, prepare_submodule
from nxfx.verification.equivalence import compare


@pytest.fixture(autouse=True)
def neuronx_distributed() -> Iterator[Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with doubles.installed("neuronx_distributed") as double, torch.no_grad():
        yield double
    torch.set_num_threads(threads)


def assert_same(expected: Any, actual: Any) -> None:
    outcome = compare(expected, actual, **({"kind": "close", "max_abs": 1e-5, "signed_zeros": False} if HAS_XLA else {"kind": "exact"}))
    assert outcome, str(outcome)


class Step(nn.Module):
    """A cache of fixed length, ids of two shapes (prompt and token), an int64 table in the state_dict."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(50, 8)
        self.register_buffer("cache", torch.zeros(2, 16, 8))
        self.register_buffer("offsets", torch.arange(16))
        self.register_buffer("scale", torch.tensor([0.5, 2.0]), persistent=False)

    def forward(self, ids: torch.Tensor, position: torch.Tensor, mask: torch.Tensor | None = None, factor: float = 1.0) -> torch.Tensor:
        found = self.embed(ids) * self.scale[1] * factor
        self.cache[:, position : position + ids.shape[1]] = found
        total = self.cache.sum(-1) * self.offsets
        return total if mask is None else total * mask


PROMPT = (torch.randint(50, (2, 4)), torch.tensor(0))
TOKEN = (torch.randint(50, (2, 1)), torch.tensor(4))


def serve_steps(serve: Any, eager: nn.Module) -> None:
    ids = torch.randint(50, (2, 4))
    assert_same(eager(ids, torch.tensor(0)), serve(ids, torch.tensor(0)))
    for position in range(4, 14):
        ids = torch.randint(50, (2, 1))
        assert_same(eager(ids, torch.tensor(position)), serve(ids, position=torch.tensor(position)))


def trained() -> Step:
    """What the checkpoint holds differs from a fresh model, the table of integers too."""
    model = Step()
    model.embed.weight.mul_(3)
    model.offsets.mul_(100)
    return model


def test_first_generation_two_buckets_share_weights_by_name_and_state() -> None:
    from neuronx_distributed.trace.model_builder import ModelBuilder

    instance = model_instance(Step, [PROMPT, TOKEN], target="trn1", ranges={"position": (0, 15)})
    assert isinstance(instance, nxd.BaseModelInstance)
    builder = ModelBuilder(router=None, tp_degree=1, checkpoint_loader=lambda: trained().state_dict())
    builder.add("model", instance, instance.example_inputs, compiler_args=instance.compiler_args)
    assert {t.dtype for example in instance.example_inputs for t in example} == {torch.int32}
    serve_steps(instance.bind(builder.trace()), trained())


def test_second_generation_two_buckets_share_weights_by_name_and_state(neuronx_distributed: Any) -> None:
    module = builder_module(Step(), [PROMPT, TOKEN], target="trn1", ranges={"position": (0, 15)})
    assert set(module.state_dict()) == set(Step().state_dict())
    builder = neuronx_distributed.ModelBuilder(module)
    for example in module.examples:
        builder.trace(kwargs=example)
    compiled = builder.compile(compiler_args=module.compiler_args)
    compiled.set_weights([trained().state_dict()])
    compiled.to_neuron()
    assert compiled.state == {"cache"}
    serve_steps(module.bind(compiled), trained())
    with pytest.raises(nxfx.RangeError):
        module.bind(compiled)(torch.full((2, 1), 50), torch.tensor(3))


def test_no_proof_rests_on_what_a_checkpoint_will_bring() -> None:
    module = builder_module(Step(), TOKEN, target="trn1")
    assert "offsets" not in {p.source for report in module.reports for p in report.premises}
    assert dict(module.named_buffers())["offsets"].dtype == torch.int64


class Free(nn.Module):
    def forward(self, *parts: torch.Tensor, **more: Any) -> torch.Tensor:
        return torch.stack(parts).sum(0) * more["weight"]


class Nest(nn.Module):
    def forward(self, batch: dict[str, torch.Tensor], pair: list[torch.Tensor], mode: str = "sum", extra: torch.Tensor | None = None) -> Any:
        total = batch["ids"] + pair[0].long() * pair[1].long()
        return {"total": total if mode == "sum" else -total, "extra": extra}


class Defaults(nn.Module):
    def forward(self, x: torch.Tensor, scale: Any = 2.0, shift: torch.Tensor | None = None, *, bias: Any = 1) -> torch.Tensor:
        result = x * scale + bias
        return result if shift is None else result + shift


def v(*shape: int) -> torch.Tensor:
    return torch.randint(-9, 9, shape or (3,))


CASES = {
    "var-arguments": (Free(), ((v(), v()), {"weight": v()}), "(parts_0, parts_1, weight)"),
    "nested": (Nest(), (({"ids": v()}, [v(), v()]), {"mode": "neg"}), "(batch_ids, pair_0, pair_1, extra=None)"),
    "defaults": (Defaults(), ((v(),), {}), "(x, shift=None)"),
    "default-given-a-tensor": (Defaults(), ((v(), v()), {"bias": v()}), "(x, scale=None, bias=None, shift=None)"),
    "keywords-only": (Defaults(), ((), {"x": v(), "shift": v()}), "(x, shift=None)"),
}


@pytest.mark.parametrize("case", CASES)
def test_signature_checks_of_the_second_generation_pass(case: str, neuronx_distributed: Any) -> None:
    model, (args, kwargs), signature = CASES[case]
    with pytest.raises((ValueError, NotImplementedError)):
        if case == "keywords-only":
            raise ValueError  # the model itself would fail on its default of 2.0
        neuronx_distributed.ModelBuilder(model).trace(args=args, kwargs=kwargs)
    module = builder_module(model, args, kwargs, target="trn1")
    names = inspect.signature(module.forward).parameters
    wanted = set(signature.strip("()").replace("=None", "").split(", "))
    assert set(names) == wanted
    assert all(p.default in (None, inspect.Parameter.empty) for p in names.values())
    compiled = neuronx_distributed.ModelBuilder(module).trace(kwargs=module.examples[0]).compile()
    compiled.set_weights([model.state_dict()])
    compiled.to_neuron()
    assert_same(model(*args, **kwargs), module.bind(compiled)(*args, **kwargs))


def test_other_shapes_are_refused_with_the_prepared_ones() -> None:
    module = builder_module(Defaults(), (v(),), target="trn1")
    assert module.baked == {}
    with pytest.raises(nxfx.UsageError, match=r"prepared for x: int32\[3\]; this call has x: int32\[4\]"):
        module(x=torch.arange(4, dtype=torch.int32))


class Full(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("state", torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.state += x
        return self.state * 2


def test_state_that_does_not_start_at_zero_is_refused() -> None:
    with pytest.raises(nxfx.PrepareError, match="'state' is state and does not start at zero"):
        builder_module(Full(), (torch.ones(3),), target="trn1")
    with pytest.raises(nxfx.PrepareError, match="'state' is state and does not start at zero"):
        model_instance(Full, (torch.ones(3),), target="trn1").load_module()


def test_on_the_meta_device_names_are_kept_and_nothing_runs() -> None:
    instance = model_instance(Step, TOKEN, target="trn1")
    with torch.device("meta"):
        instance.load_module()
    module, aliases = instance.get(0)
    assert set(module.state_dict()) == set(Step().state_dict()) and aliases == {}
    with pytest.raises(nxfx.PrepareError, match="meta device"):
        module(*TOKEN)


# -- NxD Inference: a submodule inside somebody else's trace -------------------------------------------------------------------


class Rotary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("inv_freq", 1 / 100 ** (torch.arange(4) / 4), persistent=False)
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = positions[..., None].to(x.dtype) * self.inv_freq
        return angles.cos().to(x.dtype) * self.weight, angles.sin().to(x.dtype)


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rotary = Rotary()
        self.project = nn.Linear(4, 4).bfloat16()

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        cos, sin = self.rotary(x, positions)
        return self.project((x * cos + x * sin).to(torch.bfloat16))


class DecoderModelInstance(nxd.BaseModelInstance):
    """As in NxD Inference: makes the module, aliases nothing."""

    def __init__(self) -> None:
        self.module: Any = None

    def load_module(self) -> None:
        self.module = Decoder().eval()

    def get(self, bucket_rank: Any, **kwargs: Any) -> Any:
        return self.module, {}


X, POSITIONS = torch.randn(1, 6, 4).bfloat16(), torch.arange(5000, 5006, dtype=torch.int32)[None]


def test_a_prepared_submodule_keeps_names_and_restores_the_positions() -> None:
    from neuronx_distributed.trace.model_builder import ModelBuilder

    instance = prepare_on_load(DecoderModelInstance(), {"rotary": (X, POSITIONS)}, target="trn1")
    builder = ModelBuilder(None, 1, lambda: Decoder().state_dict()).add("decoder", instance, [(X, POSITIONS)])
    compiled = builder.trace()
    naive = Decoder()
    exact = naive.rotary.inv_freq * POSITIONS[..., None].double()
    expected = naive.project((X * exact.cos().bfloat16() + X * exact.sin().bfloat16()).bfloat16())
    actual = compiled(X, POSITIONS)
    assert (actual - expected).abs().max() < 0.05 < (naive(X, POSITIONS) - expected).abs().max()


def test_a_prepared_submodule_moves_with_the_model_and_says_what_it_takes_for_granted() -> None:
    model = Decoder()
    names = list(model.state_dict())
    prepared = prepare_submodule(model, "rotary", (X, POSITIONS.long()), target="trn1")
    assert list(model.state_dict()) == names and model.rotary is prepared
    assert any(f.code == "NX303" and "nothing checks it" in f.message for report in prepared.reports for f in report.findings)
    model.load_state_dict({**model.state_dict(), "rotary.weight": torch.full((1,), 3.0)})
    fresh = Rotary()
    fresh.weight.fill_(3.0)
    near = torch.arange(6)[None]
    assert_same(fresh(X, near), model.rotary(X, near))
    moved = model.to("meta")
    assert moved(X.to("meta"), POSITIONS.long().to("meta")).device.type == "meta"
    with pytest.raises(nxfx.UsageError, match="give an example of these shapes"):
        model.rotary(X[:, :2], near[:, :2])
    with pytest.raises(nxfx.PrepareError, match="cast the model first"):
        model.double()
    with pytest.raises(nxfx.UsageError, match="no submodule 'rotari'"):
        prepare_submodule(Decoder(), "rotari", (X, POSITIONS), target="trn1")


def test_the_doubles_take_what_the_documentation_says() -> None:
    """NEURON.md, "Entry points"."""
    names = lambda f: [p for p in inspect.signature(f).parameters if p != "self"]  # noqa: E731
    assert names(nxd._FirstGeneration.__init__)[:3] == ["router", "tp_degree", "checkpoint_loader"]
    assert names(nxd._FirstGeneration.add)[:4] == ["key", "model_instance", "example_inputs", "compiler_args"]
    assert names(nxd.BaseModelInstance.__init__) == ["module_cls", "input_output_aliases"]
    assert names(nxd.BaseModelInstance.get) == ["bucket_rank", "kwargs"]
    assert names(nxd.ModelBuilder.__init__) == ["model"]
    assert str(inspect.signature(nxd.ModelBuilder.trace)).startswith("(self, args: 'Any' = None, kwargs: 'Any' = None, tag: 'Any' = None, spmd: 'bool' = True)")
    assert names(nxd.ModelBuilder.compile) == ["priority_model_key", "compiler_workdir", "compiler_args", "max_workers"]


def test_without_neuronx_distributed_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    for name in [n for n in sys.modules if n.startswith("neuronx_distributed")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(nxfx.NeuronNotFound, match=r"(?s)neuronx-distributed.*nxfx lower"):
        model_instance(Step, TOKEN, target="trn1")
