"""``torch.compile(model, backend="nxfx")`` against eager: values, gradients, effects, refusals, and the report."""

from __future__ import annotations

import copy
import importlib.metadata
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

import nxfx
from nxfx.capture import dynamo
from nxfx.capture.dynamo import nxfx_backend, reports
from nxfx.pipeline import Pass, PassContext, PassResult, Pipeline
from nxfx.report import Report
from nxfx.verification.equivalence import compare


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    dynamo._reports.clear()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Recorder:
    """An inner compiler that keeps the graphs it is handed and runs them as they are."""

    def __init__(self) -> None:
        self.graphs: list[fx.GraphModule] = []
        self.inputs: list[list[Any]] = []

    def __call__(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        self.graphs.append(gm)
        self.inputs.append(example_inputs)
        return gm.forward

    def dtypes(self, graph: int = -1) -> list[torch.dtype]:
        return [t.dtype for t in self.inputs[graph] if isinstance(t, torch.Tensor)]


def compiled(model: Any, **options: Any) -> Any:
    keywords = {k: options.pop(k) for k in ("dynamic", "fullgraph") if k in options}
    return torch.compile(model, backend=nxfx_backend, options={"verify_each": True, **options}, **keywords)


def assert_same(expected: Any, actual: Any, what: str = "") -> None:
    outcome = compare(expected, actual)
    assert outcome.ok, f"{what}: {outcome.mismatches}"


def loss_of(outputs: Any) -> torch.Tensor:
    tensors = [t for t in torch.utils._pytree.tree_leaves(outputs) if isinstance(t, torch.Tensor) and t.requires_grad]
    total: torch.Tensor = sum((t.float() * torch.linspace(-1, 1, t.numel()).view(t.shape)).sum() for t in tensors)  # type: ignore[assignment]
    return total


def assert_trains_alike(model: nn.Module, *args: Any, steps: int = 2, **kwargs: Any) -> Any:
    """Outputs, gradients and buffers of ``steps`` SGD steps, compiled and by ``reference``, bit for bit."""
    options = {k: kwargs.pop(k) for k in ("inner", "dynamic", "fullgraph", "pipeline") if k in kwargs}
    reference, twin = kwargs.pop("reference", "eager"), copy.deepcopy(model)
    fast = compiled(model, **options)
    slow = torch.compile(twin, backend=reference)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, twin)]
    for step in range(steps):
        torch.manual_seed(step)
        actual = fast(*copy.deepcopy(args), **copy.deepcopy(kwargs))
        torch.manual_seed(step)
        expected = slow(*copy.deepcopy(args), **copy.deepcopy(kwargs))
        assert_same(expected, actual, "outputs")
        for optimizer, outputs in zip(optimizers, (actual, expected), strict=True):
            optimizer.zero_grad()
            loss_of(outputs).backward()
        for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), name
            if p.grad is not None:
                assert_same(q.grad, p.grad, f"gradient of {name}")
        for optimizer in optimizers:
            optimizer.step()
        assert_same(dict(twin.named_buffers()), dict(model.named_buffers()), "buffers")
    return fast


class Rotary(nn.Module):
    """An embedding and a rotary turn by integer positions, with an integer index that the backward needs too."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 8, dtype=dtype)
        self.register_buffer("inv_freq", 1.0 / 10000 ** (torch.arange(0, 4) / 4), persistent=False)

    def forward(self, ids: torch.Tensor, positions: torch.Tensor | None = None, *, scale: float = 1.0) -> torch.Tensor:
        if positions is None:
            positions = torch.arange(ids.shape[1])
        angles = positions[:, None].float() * self.inv_freq
        cos, sin = angles.cos(), angles.sin()
        left, right = self.embed(ids).chunk(2, -1)
        return torch.cat([left * cos - right * sin, right * cos + left * sin], -1) * scale


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.lin(x).transpose(1, 2)).transpose(1, 2)


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        y = self.lin(x)
        if ids[0] == 1:  # the break
            y = y * 2
        return y + ids


# -- training --------------------------------------------------------------------------------------------------------


def test_mlp_trains_like_eager() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.3), nn.LayerNorm(16), nn.Linear(16, 4))
    assert_trains_alike(model, torch.randn(5, 8))


def test_convolution_trains_like_eager() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    assert_trains_alike(model, torch.randn(2, 3, 16, 16))


@pytest.mark.parametrize("inner", [None, "eager", "aot_eager"])
def test_rotary_with_integer_positions_trains_like_eager(inner: str | None) -> None:
    assert_trains_alike(Rotary(), torch.randint(0, 32, (3, 7)), torch.arange(7) + 3, inner=inner)


def test_batch_norm_updates_its_buffers_like_eager() -> None:
    """Also: native_batch_norm_backward gives other strides than its fake, on which the aot_eager backend fails."""
    assert_trains_alike(Norm(), torch.randn(3, 5, 4), steps=3)


def test_both_halves_agree_on_the_dtype_of_a_saved_index() -> None:
    """The joint graph was cleaned before the split: the index travels from forward to backward as int32."""
    seen = Recorder()
    assert_trains_alike(Rotary(), torch.randint(0, 32, (3, 7)), torch.arange(7), steps=1, inner=seen)
    forward, backward = seen.graphs
    saved = {n.name: n.meta["val"].dtype for n in forward.graph.find_nodes(op="output")[0].args[0]}
    given = {n.name: n.meta["val"].dtype for n in backward.graph.find_nodes(op="placeholder")}
    assert all(saved[name] == dtype for name, dtype in given.items() if name in saved)
    assert torch.int64 not in [*saved.values(), *given.values(), *seen.dtypes(0)]
    assert torch.int32 in given.values()


class Indexed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 5))

    def forward(self, index: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, ...]:
        rows = torch.utils.checkpoint.checkpoint(lambda i: self.w[i[:, 0]].tanh(), index, use_reentrant=False)
        loss = self.w.gather(0, index).sum() + nn.functional.cross_entropy(rows, target)
        masked = self.w * 1
        masked[:3, :2] = 0
        return loss, masked, loss.detach() + self.w.argmax(1), torch.topk(self.w, 2).indices


def test_indices_that_demand_int64_and_a_checkpoint_train_like_eager() -> None:
    """gather, index, cross_entropy's target (int64 only), argmax, topk; the recomputation reads the index again."""
    assert_trains_alike(Indexed(), torch.randint(0, 6, (4, 5)), torch.randint(0, 5, (4,)))


def transformer(name: str) -> tuple[nn.Module, dict[str, Any]]:
    transformers = pytest.importorskip("transformers")
    common = {
        "vocab_size": 50,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    ids = torch.randint(1, 50, (2, 6))
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    if name == "llama":
        config = transformers.LlamaConfig(**common, num_key_value_heads=1, use_cache=False)
        return transformers.LlamaForCausalLM(config), {"input_ids": ids, "attention_mask": mask, "labels": ids}
    config = transformers.BertConfig(**common, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return transformers.BertForMaskedLM(config), {"input_ids": ids, "attention_mask": mask, "labels": ids}


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_transformer_trains_like_eager(name: str) -> None:
    """Bit for bit like ``aot_eager``: on torch 2.9 AOTAutograd's own backward of SDPA rounds otherwise than eager's."""
    model, kwargs = transformer(name)
    assert_trains_alike(model, **kwargs, steps=1, reference="aot_eager")
    assert any("input_ids" in report.requirements for report in reports())


# -- inference -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_grad_modes_and_keyword_arguments(mode: Callable[[], Any]) -> None:
    model, ids = Rotary(), torch.randint(0, 32, (2, 5))
    with mode():
        fast = compiled(model)
        assert_same(model(ids, scale=2.0), fast(ids, scale=2.0))
        assert_same(model(ids=ids, positions=torch.arange(5) * 7), fast(ids=ids, positions=torch.arange(5) * 7))
        assert fast(ids).is_inference() == model(ids).is_inference()


def test_a_nested_keyword_argument_has_a_readable_name() -> None:
    def f(*args: Any, **kwargs: Any) -> torch.Tensor:
        return kwargs["batch"]["ids"] + kwargs["shift"] + args[0]

    batch = {"ids": torch.tensor([1, 2])}
    fast = compiled(f)
    assert_same(torch.tensor([5, 6]), fast(torch.tensor(1), batch=batch, shift=torch.tensor(3)))
    assert set(reports()[-1].requirements) == {"batch_ids", "shift", "args_0"}


def test_another_batch_size_compiles_again_once_and_is_right() -> None:
    model = Rotary()
    fast = compiled(model)
    for batch, length in ((2, 5), (3, 6), (4, 9), (7, 11)):
        ids = torch.randint(0, 32, (batch, length))
        assert_same(model(ids), fast(ids), f"{batch}x{length}")
    assert len(reports()) == 2  # static, then dynamic


@pytest.mark.parametrize("inner", [None, "aot_eager"])
def test_dynamic_dims_and_integers_from_the_start(inner: str | None) -> None:
    def f(x: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        return x[:, 1:] * n + torch.arange(x.shape[1] - 1), x.sum(0)

    fast = compiled(f, dynamic=True, inner=inner)
    for shape, n in (((2, 3), 5), ((4, 7), -9)):
        x = torch.randint(-9, 9, shape)
        assert_same(f(x, n), fast(x, n))
    assert len(reports()) == 1


def test_a_python_integer_beyond_int32_is_never_wrapped() -> None:
    def f(x: torch.Tensor, n: int) -> torch.Tensor:
        return x * n if n > 4 else x

    fast = compiled(f, dynamic=True)
    x = torch.tensor([1, -2, 3])
    assert_same(f(x, 9), fast(x, 9))
    for n in (2**31 - 1, 2**31, 2**40):
        try:
            assert_same(f(x, n), fast(x, n))
        except nxfx.RangeError as error:
            assert error.argument == "n" and n > 2**31 - 1


def test_a_python_integer_that_nothing_rests_on_may_be_large() -> None:
    def f(x: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        return x.float() * n, x + 1

    fast = compiled(f, dynamic=True)
    for n in (9, 2**40, -(2**40)):
        assert_same(f(torch.arange(4), n), fast(torch.arange(4), n))


def test_fullgraph_refuses_a_break_and_passes_without() -> None:
    model, ids = Rotary(), torch.randint(0, 32, (2, 5))
    assert_same(model(ids), compiled(model, fullgraph=True)(ids))
    with pytest.raises(torch._dynamo.exc.Unsupported):
        compiled(Branches(), fullgraph=True)(torch.randn(2, 4), torch.tensor([1, 0, 0, 0]))


def test_a_higher_order_op_with_integer_operands() -> None:
    def f(x: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = torch.cond(i.sum() > 3, lambda a, j: a + j, lambda a, j: a * 2 + j * 3, (x, i))
        return result

    fast = compiled(f)
    for i in (torch.tensor([1, 2, 3, 4]), torch.tensor([0, 0, 0, 1])):
        assert_same(f(torch.ones(2, 4), i), fast(torch.ones(2, 4), i))


# -- aliasing and mutation -------------------------------------------------------------------------------------------


def test_mutated_inputs() -> None:
    def f(x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        x.mul_(2)
        ids.add_(1)
        x[1:3, :2] = 7
        return x + ids.sum()

    arguments = (torch.randn(4, 4), torch.arange(5))
    twins = copy.deepcopy(arguments)
    assert_same(f(*twins), compiled(f)(*arguments))
    assert_same(twins, arguments)


def test_mutated_inputs_that_share_storage() -> None:
    def f(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x.add_(1)
        y.mul_(2)
        return x + y

    for dtype in (torch.float32, torch.int64):
        base, twin = torch.arange(10).to(dtype), torch.arange(10).to(dtype)
        assert_same(f(twin[:5], twin[3:8]), compiled(f)(base[:5], base[3:8]))
        assert_same(twin, base)


def test_outputs_that_alias_inputs_and_each_other() -> None:
    def f(x: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = ids * 3
        return x, ids, ids.t(), ids[1:], y, y[:, ::2], y.view(-1), x

    x, ids = torch.randn(2, 3), torch.arange(6).view(2, 3)
    actual, expected = compiled(f)(x, ids), f(x, ids)
    assert_same(expected, actual)
    assert actual[0] is actual[7] and actual[1].data_ptr() == ids.data_ptr() == actual[2].data_ptr()
    actual[4].add_(1)
    expected[4].add_(1)
    assert_same(expected, actual, "after a write to the output that others view")


@pytest.mark.parametrize("inner", [None, "aot_eager"])
def test_inputs_that_are_not_dense(inner: str | None) -> None:
    """A narrowed copy of such an input is dense: the strides of everything behind it change."""

    def f(ids: torch.Tensor, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        shifted = ids.t() + 1
        return table[shifted].relu(), shifted.reshape(-1)

    base = torch.arange(24).view(4, 6) % 7
    for ids in (base[:, ::2], base[:1].expand(4, 6), base.t()[1:3]):
        table = torch.randn(8, 3, requires_grad=True)
        twin = table.detach().clone().requires_grad_()
        actual, expected = compiled(f, inner=inner)(ids, table), f(ids, twin)
        assert_same(expected, actual)
        loss_of(actual).backward()
        loss_of(expected).backward()
        assert_same(twin.grad, table.grad)


def test_as_strided_reads_the_callers_memory() -> None:
    """A narrowed copy of a tensor that is not dense has no gaps: what as_strided would read there is gone."""
    seen = Recorder()
    base = torch.arange(40).view(5, 8)
    for x in (base, base.t(), base[:, ::2], base[:, 1:3].t()):
        torch._dynamo.reset()
        assert_same(
            x.as_strided((3, 2), (1, 4)) + 1, compiled(lambda x: x.as_strided((3, 2), (1, 4)) + 1, inner=seen)(x)
        )
    assert seen.dtypes(2) == [torch.int64]
    assert any("as_strided" in f.message for f in reports()[-1].findings)


def test_a_constant_tensor_in_the_graph_is_narrowed_beside_the_model() -> None:
    seen = Recorder()

    def f(x: torch.Tensor) -> torch.Tensor:
        return x + torch.tensor([1, 2**30, 3])

    assert_same(f(torch.arange(3)), compiled(f, inner=seen)(torch.arange(3)))
    assert seen.dtypes() == [torch.int32]
    big = compiled(lambda x: x + torch.tensor([1, 2**40, 3]))
    assert_same(torch.tensor([1, 2**40 + 1, 5]), big(torch.arange(3)))


# -- the boundary ----------------------------------------------------------------------------------------------------


def test_an_index_out_of_range_is_refused_by_name() -> None:
    fast = compiled(Rotary())
    ids = torch.randint(0, 32, (2, 5))
    fast(ids)
    bad = ids.clone()
    bad[1, 2] = 2**32
    for grad in (True, False):
        with (
            torch.set_grad_enabled(grad),
            pytest.raises(nxfx.RangeError, match="input 'ids': value 4294967296 at") as caught,
        ):
            fast(bad)
        assert caught.value.position == (1, 2) and caught.value.range == (0, 31)


def test_declared_ranges_are_enforced_and_unknown_ones_told() -> None:
    fast = compiled(lambda x: x * 3, ranges={"x": (0, 9), "y": (0, 1)})
    assert_same(torch.tensor([27]), fast(torch.tensor([9])))
    with pytest.raises(nxfx.RangeError, match="declared"):
        fast(torch.tensor([10]))
    assert any("'y'" in f.message for f in reports()[-1].findings)


def test_an_integer_buffer_is_checked_on_each_call() -> None:
    """No proof rests on its present value, which Dynamo does not guard."""

    class Offsets(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("offsets", torch.arange(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.offsets

    model = Offsets()
    fast = compiled(model)
    assert_same(model(torch.arange(4)), fast(torch.arange(4)))
    model.offsets.add_(5)
    assert_same(model(torch.arange(4)), fast(torch.arange(4)))
    model.offsets.fill_(2**33)
    with pytest.raises(nxfx.RangeError, match="input 'offsets'"):
        fast(torch.arange(4))


def test_check_never_does_not_check() -> None:
    fast = compiled(lambda x: x.float(), check="never")
    fast(torch.tensor([2**40]))


# -- inner compilers -------------------------------------------------------------------------------------------------


def test_the_inner_compiler_gets_32_bit_inputs_and_the_user_gets_64_bit_outputs() -> None:
    seen = Recorder()
    model, ids = Rotary(), torch.randint(0, 32, (2, 5))

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.inner(ids), ids + 1

    with torch.no_grad():
        outputs = compiled(Both(), inner=seen)(ids)
    assert_same((model(ids).detach(), ids + 1), outputs)
    assert torch.int64 not in seen.dtypes()
    results = seen.graphs[0].graph.find_nodes(op="output")[0].args[0]
    assert [r.meta["val"].dtype for r in results] == [torch.float32, torch.int32]


@pytest.mark.parametrize("training", [False, True])
def test_inductor_as_inner(training: bool) -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        pytest.skip("no C++ compiler")
    model, ids = Rotary(), torch.randint(0, 32, (2, 5))
    twin = copy.deepcopy(model)
    with torch.set_grad_enabled(training):
        actual, expected = compiled(model, inner="inductor")(ids), twin(ids)
    torch.testing.assert_close(actual, expected)
    if training:
        loss_of(actual).backward()
        loss_of(expected).backward()
        torch.testing.assert_close(model.embed.weight.grad, twin.embed.weight.grad)


@pytest.mark.xla
def test_openxla_as_inner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PJRT_DEVICE", "CPU")
    pytest.importorskip("torch_xla")
    model, ids = Rotary(), torch.randint(0, 32, (2, 5))
    with torch.no_grad():
        torch.testing.assert_close(compiled(model, inner="openxla")(ids), model(ids))


def test_an_inner_compiler_that_fails_is_named_with_its_graph() -> None:
    def picky(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        raise NotImplementedError("no sin here")

    with (
        torch.no_grad(),
        pytest.raises(nxfx.NxfxError, match="inner compiler 'picky' failed on the inference graph: .*no sin here"),
    ):
        compiled(Rotary(), inner=picky)(torch.zeros(1, 2, dtype=torch.int64))
    with pytest.raises(nxfx.NxfxError, match=r"failed on the forward graph(.|\n)*may serve inference only"):
        compiled(Rotary(), inner=picky)(torch.zeros(1, 2, dtype=torch.int64))


# -- graph breaks ----------------------------------------------------------------------------------------------------


def test_a_graph_break_is_right_and_told_with_its_line() -> None:
    model = Branches()
    fast = compiled(model)
    for first in (1, 0):
        x, ids = torch.randn(2, 4), torch.tensor([first, 2, 3, 4])
        assert_same(model(x, ids), fast(x, ids))
    told = [f for report in reports() for f in report.findings if f.code == "NX408"]
    assert [f.location.source for f in told] == ["if ids[0] == 1:  # the break"]
    assert told[0].location.file == __file__ and "branches on a tensor" in told[0].message


def test_a_break_before_the_first_op_is_told_by_the_graph_that_resumes(capsys: pytest.CaptureFixture[str]) -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        print("hello")  # the break
        return x + 1

    assert_same(torch.tensor([2]), compiled(f)(torch.tensor([1])))
    (told,) = [f for report in reports() for f in report.findings if f.code == "NX408"]
    assert (
        told.location.source.endswith("# the break")
        and "print" in told.message
        and "resume" not in told.location.function
    )
    assert capsys.readouterr().out == "hello\n"


def test_a_branch_break_trains_like_eager() -> None:
    assert_trains_alike(Branches(), torch.randn(2, 4), torch.tensor([1, 0, 0, 0]))


def test_tensor_bounds_with_captured_scalars_are_never_silently_wrong() -> None:
    def f(x: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        y = torch.ones_like(x)
        y[:n] = 0
        return y * x

    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        fast = compiled(f)
        for n in (1, 3, 0, 5):
            assert_same(f(torch.arange(5.0), torch.tensor(n)), fast(torch.arange(5.0), torch.tensor(n)))


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"iner": "eager"}, "no option 'iner'. Did you mean 'inner'?"),
        ({"inner": "inductr"}, "no inner compiler 'inductr'.*Did you mean 'inductor'?"),
        ({"inner": "nxfx"}, "cannot be 'nxfx' itself"),
        ({"target": "trn9"}, "unknown target 'trn9'"),
        ({"pipeline": "narow-64bit"}, "unknown pass 'narow-64bit'. Did you mean 'narrow-64bit'?"),
        ({"check": "sometimes"}, "'check' is one of"),
        ({"ranges": {"x": 3}}, r"'x' wants \(low, high\)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_a_usage_error_reaches_the_user_as_it_is(options: dict[str, Any], message: str) -> None:
    with pytest.raises(nxfx.UsageError, match=message):
        torch.compile(lambda x: x + 1, backend=nxfx_backend, options=options)(torch.ones(2))


def test_a_mode_is_refused() -> None:
    with pytest.raises(nxfx.UsageError, match="no mode 'reduce-overhead'"):
        torch.compile(lambda x: x + 1, backend=nxfx_backend, mode="reduce-overhead")(torch.ones(2))


class Broken(Pass):
    name = "broken"

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> PassResult:
        raise KeyError("oops")


@pytest.mark.parametrize("training", [False, True])
def test_a_pass_that_raises_reaches_the_user_as_it_is_with_a_reproducer(training: bool) -> None:
    fast = compiled(nn.Linear(2, 2), pipeline=Pipeline([Broken]))
    with (
        torch.set_grad_enabled(training),
        pytest.raises(nxfx.PassError, match="pass 'broken' failed: KeyError: 'oops'") as caught,
    ):
        fast(torch.ones(1, 2))
    assert caught.value.reproducer and Path(caught.value.reproducer).exists()


def test_the_pipeline_option_takes_text() -> None:
    seen = Recorder()
    compiled(lambda x: x + 1, pipeline="flag-value-dependence", inner=seen)(torch.arange(3))
    assert seen.dtypes() == [torch.int64] and reports()[-1].pipeline == "flag-value-dependence"


def test_a_report_is_one_per_graph_and_picklable() -> None:
    compiled(Rotary())(torch.randint(0, 32, (2, 5)))
    (report,) = reports()
    assert (
        report.captured_by == "dynamo" and report.wide_edges["after"] <= report.wide_edges["before"] and report.rewrites
    )
    assert Report.from_dict(report.to_dict()) == report


def test_a_report_carries_the_flags_that_the_inner_compiler_needs() -> None:
    weight = torch.randn(4, 4, requires_grad=True)
    compiled(lambda x: x @ weight, sdk="2.26")(torch.randn(2, 4)).sum().backward()
    assert "--auto-cast=none" in reports()[-1].compiler_args
    compiled(lambda x: x @ weight + 1)(torch.randn(2, 4)).sum().backward()
    assert "--native-int64=disabled" in reports()[-1].compiler_args
    compiled(lambda p: nn.functional.linear(p.float(), weight.detach()))(torch.arange(3000, 3004))
    assert "`mm`" in reports()[-1].compiler_args["--auto-cast=none"]
    compiled(lambda x: x * 2**40 + 1)(torch.tensor([3]))
    assert reports()[-1].compiler_args.keys() & {"--native-int64=enabled", "--native-int64=disabled"} == {"--native-int64=enabled"}


# -- nxfx.compile ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", [None, "aot_eager"])
def test_nxfx_compile_is_called_like_the_model(inner: str | None) -> None:
    model = Rotary().eval()
    fast = nxfx.compile(model, inner=inner)
    with torch.no_grad():
        for length in (5, 6):
            ids = torch.randint(0, 32, (2, length))
            assert_same(model(ids, scale=3.0), fast(ids, scale=3.0))
        model.embed.weight.mul_(2)
        model.embed.weight = nn.Parameter(model.embed.weight + 1)  # a replaced weight is seen
        assert_same(model(ids, scale=3.0), fast(ids, scale=3.0))
    with pytest.raises(nxfx.RangeError):
        fast(ids + 2**40)


def test_nxfx_compile_with_dynamic_shapes_and_a_buffer() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(2, dtype=torch.int64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.count += x.sum(0)
            return x + self.count

    seen = Recorder()
    model = Counter()
    twin = copy.deepcopy(model)
    rows = torch.export.Dim("rows", min=1, max=64)
    fast = nxfx.compile(model, inner=seen, args=(torch.ones(3, 2, dtype=torch.int64),), dynamic_shapes={"x": {0: rows}})
    for count in (3, 5, 9):
        x = torch.arange(2 * count).view(count, 2)
        assert_same(twin(x), fast(x))
        assert_same(twin.count, model.count)
    assert seen.graphs


# -- as users meet it ------------------------------------------------------------------------------------------------


def _is_installed() -> bool:
    return any(e.name == "nxfx" for e in importlib.metadata.entry_points(group="torch_dynamo_backends"))


@pytest.mark.skipif(not _is_installed(), reason="the nxfx distribution is not installed")
def test_the_backend_is_found_by_name_without_importing_nxfx(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys
            import torch

            model = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Linear(4, 2))
            ids = torch.tensor([[1, 8]])
            expected = model(ids)
            assert "nxfx" not in sys.modules
            actual = torch.compile(model, backend="nxfx")(ids)
            assert torch.equal(actual, expected)
            grads = [torch.autograd.grad(y.sum(), list(model.parameters())) for y in (actual, expected)]
            assert all(map(torch.equal, *grads))
            try:
                torch.compile(model, backend="nxfx", options={"iner": 1})(ids + 0)
            except ValueError as error:
                print(type(error).__name__, error)
            """
        )
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert "UsageError backend 'nxfx' has no option 'iner'. Did you mean 'inner'?" in done.stdout
