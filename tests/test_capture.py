"""Models that capture could get silently wrong: each is called twice and compared with eager, state included."""

from __future__ import annotations

import collections
import contextlib
import copy
import pickle
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy
import pytest
import torch
from torch import nn

import nxfx
from nxfx.capture.export import capture
from nxfx.report import locate
from nxfx.verification.equivalence import compare

R = torch.randn


class Fn(nn.Module):
    """A function of ``(module, *args)`` as a module with the given attributes."""

    def __init__(self, fn: Callable[..., Any], **attributes: Any) -> None:
        super().__init__()
        self.fn = fn
        for name, value in attributes.items():
            if isinstance(value, torch.Tensor):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def forward(self, *args: Any) -> Any:
        return self.fn(self, *args)


def plain(module: nn.Module, **tensors: Any) -> nn.Module:
    module.__dict__.update(tensors)
    return module


def same(expected: Any, actual: Any) -> None:
    outcome = compare(expected, actual)
    assert outcome.ok, outcome.mismatches


def agree(make: Callable[[], nn.Module], *calls: Callable[[], tuple[Any, ...]], around: Any = contextlib.nullcontext) -> Any:
    """Eager and prepared twins on each call: results, arguments after, registered and plain state."""
    torch.manual_seed(0)
    eager = make()
    torch.manual_seed(0)
    model = make()
    prepared = nxfx.prepare(model)
    for number, call in enumerate(calls):
        outcomes = []
        for runner in (eager, prepared):
            torch.manual_seed(number)
            args = call()
            with torch.no_grad(), around():
                torch.manual_seed(7)
                outcomes.append((runner(*args), args))
        same(*outcomes)
        same(dict(eager.state_dict()), dict(model.state_dict()))
        same(*[{k: v for k, v in m.__dict__.items() if isinstance(v, (list, torch.Tensor, int, set))} for m in (eager, model)])
    return prepared


def v3() -> tuple[torch.Tensor]:
    return (R(3),)


def m34() -> tuple[torch.Tensor]:
    return (R(3, 4),)


# --- layouts and shared memory ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "later",
    [lambda: (R(4, 3).t(),), lambda: (R(3, 8)[:, ::2],), lambda: (R(1, 4).expand(3, 4),)],
    ids=["transposed", "gapped", "expanded"],
)
def test_strides_of_the_example_are_not_baked(later: Any) -> None:
    agree(lambda: Fn(lambda s, x: x.reshape(-1) + 1), m34, later, m34)
    agree(lambda: Fn(lambda s, x: x.reshape(-1) + 1), later, m34)


def test_written_input_of_other_strides() -> None:
    agree(lambda: Fn(lambda s, x: (x[0].add_(1), x.reshape(-1) * 2)[1]), m34, lambda: (R(4, 3).t(),))


def test_as_strided_reads_the_callers_memory() -> None:
    agree(lambda: Fn(lambda s, x: x.as_strided((2, 2), (1, 2)) + 1), m34, lambda: (R(4, 3).t(),))


def _write_first(s: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    x.add_(1)
    return x.sum() + y.sum()


def _overlapping() -> tuple[torch.Tensor, ...]:
    memory = R(6)
    return memory[:4], memory[2:]


def test_inputs_that_share_memory_are_refused_when_one_is_written() -> None:
    prepared = nxfx.prepare(Fn(_write_first))
    prepared(R(4), R(4))
    with pytest.raises(nxfx.PrepareError, match="share memory"):
        prepared(*_overlapping())
    with pytest.raises(nxfx.CaptureError, match="share memory"):
        nxfx.prepare(Fn(_write_first), _overlapping())


def test_inputs_side_by_side_in_one_storage_are_fine() -> None:
    def columns() -> tuple[torch.Tensor, ...]:
        memory = R(6, 2)
        return memory[:, 0], memory[:, 1]

    agree(lambda: Fn(_write_first), lambda: (R(6), R(6)), columns)


def test_input_that_is_a_view_of_a_written_buffer_is_refused() -> None:
    model = Fn(lambda s, x: (s.b.add_(1), x.sum())[1], b=torch.zeros(3))
    prepared = nxfx.prepare(model)
    prepared(R(2))
    for given in (model.b[:2], model.b):
        with pytest.raises((nxfx.PrepareError, nxfx.CaptureError), match="share memory"):
            prepared(given)


def test_a_returned_buffer_is_the_models_own() -> None:
    model = Fn(lambda s, x: (s.b.add_(1), s.b), b=torch.zeros(3))
    prepared = nxfx.prepare(model)
    first = prepared(R(3))
    assert first[0] is model.b and first[1] is model.b
    prepared(R(3))
    assert first[0].tolist() == [2, 2, 2]


# --- registered tensors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "new", [lambda b: b + 0.5, lambda b: torch.cat([b, b]), lambda b: b[:1] + 1], ids=["dtype", "grown", "shrunk"]
)
def test_rebinding_a_buffer_to_another_kind_is_refused(new: Any) -> None:
    model = Fn(lambda s, x: (setattr(s, "b", new(s.b)), x + s.b.sum())[1], b=torch.zeros(3, dtype=torch.int64))
    with pytest.raises(nxfx.CaptureError, match="rebinds the registered tensor 'b' from int64"):
        nxfx.prepare(model, v3())
    assert model.b.tolist() == [0, 0, 0]


def test_rebinding_a_buffer_to_the_same_kind() -> None:
    agree(lambda: Fn(lambda s, x: (setattr(s, "b", s.b + 1), x + s.b)[1], b=torch.zeros(3)), v3, v3)


OVERWRITES: dict[str, Callable[[Any, torch.Tensor], Any]] = {
    "the buffer": lambda s, x: s.b.copy_(x * 1.1),
    "a number": lambda s, x: s.b.copy_(x[0] * 1.1),
    "in parts": lambda s, x: s.b[1:].copy_(x[1:] * 1.1),
    "through detach": lambda s, x: s.b.detach().copy_(x * 1.1),
    "read between": lambda s, x: s.b.copy_((s.b.copy_(x * 1.1) * 3).double() / 7),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64], ids=str)
@pytest.mark.parametrize("overwrite", OVERWRITES.values(), ids=OVERWRITES)
def test_what_overwrites_a_buffer_is_read_again_as_it_was_stored(overwrite: Any, dtype: torch.dtype) -> None:
    def forward(s: Any, x: torch.Tensor) -> torch.Tensor:
        overwrite(s, x)
        return s.b * 3

    agree(lambda: Fn(forward, b=torch.zeros(3, dtype=dtype)), v3, v3)


def test_an_overwritten_buffer_keeps_its_size_when_others_are_dynamic() -> None:
    model = Fn(lambda s, x: (s.b.copy_(x.sum(0)), x + s.b)[1], b=torch.zeros(4, dtype=torch.bfloat16))
    rows = torch.export.Dim("rows", min=2, max=9)
    prepared = nxfx.prepare(model, m34(), dynamic_shapes={"args": ({0: rows},)})
    for count in (3, 7):
        x = R(count, 4)
        same(copy.deepcopy(model)(x), prepared(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_longrope_of_transformers_in_any_precision(dtype: torch.dtype) -> None:
    """Its table of frequencies is overwritten by the long or the short one, computed in float32 or rounded with the model."""
    phi3 = pytest.importorskip("transformers.models.phi3.modeling_phi3")
    factors = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 2.3, 2.6, 2.9]}
    config = phi3.Phi3Config(
        hidden_size=64, num_attention_heads=8, original_max_position_embeddings=16, max_position_embeddings=64, pad_token_id=0,
        rope_scaling={"type": "longrope", **factors},
    )  # fmt: skip
    eager, model = (phi3.Phi3RotaryEmbedding(config).to(dtype) for _ in range(2))
    exact = nxfx.Pipeline.default().without("lift-int-casts")
    prepared = nxfx.prepare(model, (R(1, 8, 64).to(dtype), torch.arange(8)[None]), pipeline=exact, verify_each=True)
    for start in (0, 20, 3):
        args = R(1, 8, 64).to(dtype), torch.arange(8)[None] + start
        same(eager(*args), prepared(*args))
        same(eager.inv_freq, model.inv_freq)


def test_a_written_parameter() -> None:
    agree(lambda: nn.Embedding(5, 3, max_norm=0.5), lambda: (torch.tensor([1, 2, 1]),), lambda: (torch.tensor([4, 2, 0]),))


@pytest.mark.parametrize("make", [lambda: nn.LSTM(4, 3, batch_first=True), lambda: nn.GRU(4, 3)], ids=["lstm", "gru"])
def test_recurrent_modules_keep_their_second_registry(make: Any) -> None:
    model = make()
    prepared = nxfx.prepare(model)
    for _ in range(2):
        x = R(2, 3, 4)
        with torch.no_grad():
            same(model(x), prepared(x))
    assert model._flat_weights[0] is model.weight_ih_l0


def _linear() -> nn.Linear:
    return nn.Linear(3, 3)


def _tied() -> nn.Module:
    model = nn.Sequential(_linear(), _linear())
    model[1].weight = model[0].weight
    return model


def _untie(m: Any) -> None:
    m[1].weight = nn.Parameter(R(3, 3))


def _reshape(m: Any) -> None:
    m[0] = nn.Linear(3, 5)
    m[1].weight = nn.Parameter(R(2, 5))
    m[1].bias = nn.Parameter(R(2))


@pytest.mark.parametrize(
    "change",
    [
        _untie,
        _reshape,
        lambda m: m.__setitem__(1, nn.Sigmoid()),
        lambda m: m[0].register_forward_hook(lambda module, args, out: out * 2),
        lambda m: m[0].register_forward_pre_hook(lambda module, args: (args[0] + 1,)),
        lambda m: m.load_state_dict({k: R(v.shape) for k, v in m.state_dict().items()}, assign=True),
    ],
    ids=["untied", "other-shapes", "submodule", "hook", "pre-hook", "assigned"],
)
def test_changes_of_the_model_after_capture_are_seen(change: Any) -> None:
    model, x = _tied(), R(2, 3)
    prepared = nxfx.prepare(model, (x,))
    with torch.no_grad():
        same(model(x), prepared(x))
        change(model)
        same(model(x), prepared(x))


def test_mode_of_a_submodule_and_a_plain_attribute_are_seen() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.scale = nn.BatchNorm1d(3), 2.0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(x) * self.scale

    model, x = Scaled(), R(4, 3)
    prepared = nxfx.prepare(model, (x,))
    model.norm.eval()
    with torch.no_grad():
        same(model(x), prepared(x))
        model.scale = 3.0
        same(model(x), prepared(x))


@pytest.mark.parametrize("on", ["model", "prepared"])
def test_another_dtype_of_the_weights_is_seen(on: str) -> None:
    """The inputs are integers: nothing in the call tells."""
    model, ids = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4)), torch.tensor([1, 2])
    prepared = nxfx.prepare(model, (ids,))
    for dtype in (torch.bfloat16, torch.float64, torch.float32):
        (model if on == "model" else prepared).to(dtype=dtype)
        with torch.no_grad():
            same(model(ids), prepared(ids))


# --- Python state ----------------------------------------------------------------------------------------------------------------


def _append(s: Any, x: torch.Tensor) -> torch.Tensor:
    s.items.append(x * 2)
    return x + sum(t.sum() for t in s.items)


def _swap(s: Any, x: torch.Tensor) -> torch.Tensor:
    s.items[0], s.items[1] = s.items[1], s.items[0]
    return x + s.items[0] * 2


def _pop(s: Any, x: torch.Tensor) -> torch.Tensor:
    first = s.items.pop(0)
    s.items.pop()
    s.items.pop()
    return x + first


class ListLike(list):  # type: ignore[type-arg]
    pass


@pytest.mark.parametrize("kind", [list, ListLike, collections.deque])
@pytest.mark.parametrize("fn", [_append, _swap])
def test_lists_of_tensors_that_forward_changes(kind: Any, fn: Any) -> None:
    agree(lambda: plain(Fn(fn), items=kind([torch.ones(3), torch.zeros(3)])), v3, v3, v3)


def test_a_list_that_shrinks_from_both_ends() -> None:
    agree(lambda: plain(Fn(_pop), items=[torch.full((3,), float(i)) for i in range(8)]), v3, v3)


def test_registered_tensors_in_a_list_are_the_registered_ones() -> None:
    def make() -> nn.Module:
        model = Fn(lambda s, x: (s.items[0].add_(1), x + s.b)[1], b=torch.zeros(3))
        return plain(model, items=[model.b])

    agree(make, v3, v3)


def test_aliases_among_plain_tensors_are_part_of_the_capture() -> None:
    model, x = plain(Fn(lambda s, x: (s.a.add_(1), x + s.b)[1]), a=torch.ones(3), b=torch.zeros(3)), R(3)
    eager = copy.deepcopy(model)
    prepared = nxfx.prepare(model, (x,))
    same(eager(x), prepared(x))
    for m in (eager, model):
        m.b = m.a
    same(eager(x), prepared(x))
    for m in (eager, model):
        m.b = torch.ones(3)
    same(eager(x), prepared(x))


def _count_set(s: Any, x: torch.Tensor) -> torch.Tensor:
    s.seen.add(len(s.seen))
    return x * len(s.seen)


def _count_bytes(s: Any, x: torch.Tensor) -> torch.Tensor:
    s.seen[0] += 1
    return x * int(s.seen[0])


@pytest.mark.parametrize(
    ("fn", "start"), [(_count_set, set), (_count_bytes, lambda: bytearray(2)), (_count_bytes, lambda: numpy.zeros(2))],
    ids=["set", "bytearray", "numpy"],
)  # fmt: skip
def test_counters_in_values_without_entries(fn: Any, start: Any) -> None:
    agree(lambda: plain(Fn(fn), seen=start()), v3, v3, v3)


TABLE = torch.ones(3)


def _seeding(model: Any, x: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(0)  # so that eager gives the same numbers on every call
    return x + torch.rand(3)


class Counted(nn.Module):
    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        type(self).calls += 1
        return x * type(self).calls


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (Counted, "class attribute Counted.calls"),
        (lambda: Fn(lambda s, x: x * random.random()), "Python's random"),
        (lambda: Fn(lambda s, x: x * float(numpy.random.rand())), "numpy.random"),
        (lambda: Fn(_seeding), "forward seeds torch's generator (0)"),
        (lambda: Fn(lambda s, x: x + TABLE), "neither an argument nor the model's own"),
    ],
    ids=["class-attribute", "random", "numpy", "seed", "global-tensor"],
)
def test_what_is_baked_from_outside_the_model_is_reported(make: Any, words: str) -> None:
    model, args = make(), v3()
    before, torch_before = random.getstate(), torch.get_rng_state()
    report = nxfx.prepare(model, args).report
    assert any(f.code == "NX406" and words in f.message for f in report.findings)
    assert random.getstate() == before and Counted.calls == 0 and torch.equal(torch.get_rng_state(), torch_before)


def test_tensor_literals_are_not_reported() -> None:
    report = nxfx.prepare(Fn(lambda s, x: x + torch.tensor([1.0, 2.0, 3.0])), v3()).report
    assert not [f for f in report.findings if f.code == "NX406"]


# --- arguments -------------------------------------------------------------------------------------------------------------------


class Valued:
    """An object with an equality of its own that holds a tensor."""

    def __init__(self, t: torch.Tensor) -> None:
        self.t = t

    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 1


@dataclass(frozen=True)
class Frozen:
    a: Any
    b: Any = None


class Cyclic:
    def __init__(self) -> None:
        self.k = torch.zeros(3)
        self.me = self


def _cyclic(s: Any, x: torch.Tensor, c: Cyclic) -> Any:
    c.k = c.k + x
    return c, {"c": c, "k": c.k}, c.k


def test_an_object_with_its_own_equality_is_opened() -> None:
    prepared = nxfx.prepare(Fn(lambda s, o: o.t * 2))
    for _ in range(2):
        x = R(3)
        same(x * 2, prepared(Valued(x)))


@pytest.mark.parametrize("kind", [ListLike, type("TupleLike", (tuple,), {}), collections.deque])
def test_sequences_of_any_class_are_opened(kind: Any) -> None:
    prepared = agree(lambda: Fn(lambda s, t: (t[0] * 2, t[1])), lambda: (kind([R(3), R(3)]),), lambda: (kind([R(3), R(3)]),))
    assert len(prepared.captures) == 1


def test_named_results_of_torch_frozen_dataclasses_and_cycles() -> None:
    agree(lambda: Fn(lambda s, x: x.max(0)), m34, m34)
    agree(lambda: Fn(lambda s, t: t.values * 2 + t[1]), lambda: (R(3, 4).max(0),), lambda: (R(3, 4).max(0),))
    agree(lambda: Fn(lambda s, d: Frozen(d.a * 2, d.b)), lambda: (Frozen(R(3)),), lambda: (Frozen(R(3), 1),))
    model = Fn(_cyclic)
    prepared, theirs, mine, x = nxfx.prepare(model), Cyclic(), Cyclic(), R(3)
    for _ in range(2):
        expected, actual = model(x, theirs), prepared(x, mine)
        assert actual[0] is mine and actual[1]["c"] is mine and mine.me is mine
        same((expected[1]["k"], expected[2], theirs.k), (actual[1]["k"], actual[2], mine.k))


def test_tensors_in_a_set_are_refused() -> None:
    with pytest.raises(nxfx.CaptureError, match="holds tensors in a set"):
        nxfx.prepare(Fn(lambda s, t: sum(t)), ({R(3)},))


def test_functions_and_modules_as_arguments_are_told_apart_by_what_they_hold() -> None:
    model, x, layer = Fn(lambda s, f, x: f(x)), R(3), _linear()
    prepared = nxfx.prepare(model)
    offset = R(3)

    def add(x: torch.Tensor) -> torch.Tensor:
        return x + offset

    for _ in range(2):
        same(model(add, x), prepared(add, x))
        offset = R(3)
        with torch.no_grad():
            same(model(layer, x), prepared(layer, x))
        layer.weight = nn.Parameter(R(3, 3))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: torch.eye(3).to_sparse(), "sparse_coo"),
        (lambda: torch.nested.nested_tensor([R(2), R(3)], layout=torch.jagged), "nested"),
    ],
    ids=["sparse", "nested"],
)
def test_tensors_that_are_not_dense_are_refused(make: Any, words: str) -> None:
    with pytest.raises(nxfx.CaptureError, match=words):
        nxfx.prepare(Fn(lambda s, x: x * 2), (make(),))


def test_torchscript_is_refused() -> None:
    model = nn.Sequential(torch.jit.script(nn.ReLU()))
    with pytest.raises(nxfx.CaptureError, match="'0' is a TorchScript module"):
        nxfx.prepare(model, m34())


# --- modes of the caller ---------------------------------------------------------------------------------------------------------


def _regions(s: Any, x: torch.Tensor) -> Any:
    with torch.autocast("cpu", enabled=False):
        full = x @ x.t()
    with torch.autocast("cpu", torch.float16):
        half = x @ x.t()
    return full, half, x @ x.t()


@pytest.mark.parametrize("around", [contextlib.nullcontext, lambda: torch.autocast("cpu", torch.bfloat16)], ids=["none", "bf16"])
def test_autocast_of_the_caller_and_of_the_model(around: Any) -> None:
    agree(lambda: Fn(_regions), m34, m34, around=around)


def test_a_region_keeps_the_lines_and_modules_of_its_ops() -> None:
    class Inner(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                product = x @ x.t()
                with torch.autocast("cpu", enabled=False):
                    bounded = product.tanh()
            with torch.enable_grad():
                raised = bounded.exp()
            with torch.no_grad():
                return raised.log()

    for training in (False, True):
        captured = capture(nn.Sequential(nn.Identity(), Inner()), m34(), training=training)
        found = {n.target: locate(n) for n in captured.graph_module.graph.nodes}
        for op in ("t", "matmul", "tanh", "exp", "log"):
            location = found[getattr(torch.ops.aten, op).default]
            assert (location.file, location.module) == (__file__, "1")
            assert ("@" if op == "matmul" else op) in location.source


def test_a_view_of_written_memory_has_a_line() -> None:
    """A retrace makes it anew at the end, where torch knows no line: it has that of the write."""

    def model(s: Any, x: torch.Tensor) -> Any:
        z = x.clone()
        z.mul_(2)
        return z.view(-1), z[0].unsqueeze(0)

    nodes = capture(Fn(model), m34()).graph_module.graph.find_nodes
    for op in (torch.ops.aten.view.default, torch.ops.aten.select.int, torch.ops.aten.unsqueeze.default):
        assert [locate(n).source for n in nodes(op="call_function", target=op)] == ["z.mul_(2)"]


ROWS: dict[str, Callable[..., Any]] = {
    "cast": lambda s, x: torch.vmap(lambda row: (row.to(torch.bfloat16) * s.scale.to(torch.bfloat16)).cos())(x),
    "promotion": lambda s, x: torch.vmap(lambda row: s.scale.to(torch.bfloat16) * row.long())(x),
    "views": lambda s, x: torch.vmap(lambda row: row.reshape(2, 2).t().contiguous().to(torch.float16))(x),
    "out-dim": lambda s, x: torch.vmap(lambda row: (row.reshape(2, 2).half(), row, row.sum()), out_dims=(-1, 1, 0))(x),
    "in-dim": lambda s, x: torch.vmap(lambda a, b: a @ b, in_dims=(1, None))(x, x[:, 0].float()),
    "nested": lambda s, x: torch.vmap(lambda row: torch.vmap(lambda one: one.to(torch.float16) * row.sum())(row))(x),
    "tuple": lambda s, x: torch.vmap(lambda row: (row.sum(), row.to(torch.int32)))(x),
    "chunks": lambda s, x: torch.vmap(lambda row: row.to(torch.float64).cumsum(0), chunk_size=2)(x),
    "index": lambda s, x: torch.vmap(lambda i, row: row[i].to(torch.bfloat16))(torch.tensor([[2, 0], [1, 1], [3, 0]]), x),
    "write": lambda s, x: torch.vmap(lambda row: row.clone().mul_(2).to(torch.bfloat16))(x),
}


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("verify_each", [False, True], ids=["", "verify-each"])
def test_vmap_is_in_the_graph(rows: str, verify_each: bool) -> None:
    model, (x,) = Fn(ROWS[rows], scale=torch.tensor([1.0, -0.0, torch.inf, torch.nan])), m34()
    prepared = nxfx.prepare(model, (x,), verify_each=verify_each)
    for around in (x, x[[2, 0, 1]] * 1e30, torch.full_like(x, -0.0), x.t().contiguous().t()):
        same(model(around), prepared(around))


def test_autocast_is_in_the_graph() -> None:
    """The compiler gets the graph only: no ambient autocast."""
    prepared = nxfx.prepare(_linear())
    with torch.autocast("cpu", torch.bfloat16):
        prepared(R(2, 3))
    assert prepared.graph_module(*prepared.example_inputs)[0].dtype == torch.bfloat16


def test_a_capture_under_inference_mode_serves_other_callers() -> None:
    model = nn.Sequential(_linear(), nn.BatchNorm1d(3))
    eager = copy.deepcopy(model)
    prepared = nxfx.prepare(model)
    for around in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        x = R(2, 3)
        with around():
            same(eager(x), prepared(x))
        same(dict(eager.state_dict()), dict(model.state_dict()))


def test_deep_copies_are_independent_and_pickling_is_refused() -> None:
    model, x = nn.BatchNorm1d(3), R(4, 3)
    prepared = nxfx.prepare(model, (x,))
    copy.deepcopy(prepared)(x)
    assert int(model.num_batches_tracked) == 0
    with pytest.raises(nxfx.PrepareError, match="save"):
        pickle.dumps(prepared)
