"""PreparedModule's contract (DESIGN): called like the model, changes what the model changes, shares what is the model's."""

from __future__ import annotations

import copy
import pickle
import threading
from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

import nxfx
from nxfx.verification.equivalence import compare


def same(expected: Any, actual: Any) -> None:
    outcome = compare(expected, actual)
    assert outcome.ok, outcome.mismatches


class Tiny(nn.Module):
    """A bit of everything: parameters, a written buffer, an int64 non-persistent buffer, an unused and a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.tied = nn.Linear(4, 4, bias=False)
        self.tied.weight = self.inner.weight
        self.unused = nn.Parameter(torch.ones(2))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("offsets", torch.arange(4), persistent=False)
        self.name = "tiny"

    def forward(self, x: torch.Tensor, positions: torch.Tensor, scale: float = 1.0, *, flip: bool = False) -> dict[str, torch.Tensor]:
        self.steps += 1
        y = self.tied(self.inner(x)) * scale
        if flip:
            y = y.flip(0)
        return {"y": y, "positions": positions + self.offsets, "steps": self.steps}


def tiny_args() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(4, 4), torch.arange(4)


def test_call_is_like_the_model_with_kwargs_and_defaults() -> None:
    model = Tiny()
    eager = copy.deepcopy(model)
    prepared = nxfx.prepare(model, tiny_args())
    for i in range(3):
        x, positions = torch.randn(4, 4), torch.arange(4) + i
        same(eager(x, positions), prepared(x, positions=positions))
        same(eager.steps, model.steps)
    assert len(prepared.captures) == 1


def test_static_arguments_make_captures_of_their_own() -> None:
    model = Tiny()
    eager = copy.deepcopy(model)
    prepared = nxfx.prepare(model)
    args = tiny_args()
    for kwargs in ({}, {"flip": True}, {"scale": 2.0}, {"scale": 2}, {"flip": False}):
        same(eager(*args, **kwargs), prepared(*args, **kwargs))
    assert len(prepared.captures) == 4  # {} and flip=False are one call; 2 and 2.0 are two


def test_graph_module_is_flat_and_named_after_the_model() -> None:
    model = Tiny()
    prepared = nxfx.prepare(model, tiny_args())
    graph_module = prepared.graph_module
    assert [n.target for n in graph_module.graph.find_nodes(op="placeholder")] == ["x", "positions"]
    outputs = graph_module(*prepared.example_inputs)
    assert isinstance(outputs, tuple)
    assert len(outputs) == 4  # three of the user, then the mutated buffer
    aliases = prepared.input_output_aliases
    assert list(aliases.values()) == [3]
    assert next(iter(aliases)) is graph_module.get_buffer("steps")


def test_tensors_are_the_models_own_objects_under_their_names() -> None:
    model = Tiny()
    prepared = nxfx.prepare(model, tiny_args())
    assert prepared.state_dict().keys() == model.state_dict().keys()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        assert prepared.get_parameter(name) is parameter
        assert prepared.graph_module.get_parameter(name) is parameter
    assert prepared.graph_module.inner.weight is prepared.graph_module.tied.weight


def test_weight_replacement_reaches_the_graph() -> None:
    model = Tiny()
    eager = copy.deepcopy(model)
    prepared = nxfx.prepare(model, tiny_args())
    new = nn.Parameter(torch.randn(4, 4))
    for m in (model, eager):
        m.inner.weight = new
        m.tied.weight = new
        m.load_state_dict({**m.state_dict(), "inner.bias": torch.arange(4.0)})
    args = tiny_args()
    same(eager(*args), prepared(*args))


def test_narrowed_buffer_is_a_twin_that_follows_the_model() -> None:
    """The model's int64 buffer stays its own; the graph's 32-bit twin is refreshed when `_version` changes, checked."""
    model = Tiny()
    eager = copy.deepcopy(model)
    prepared = nxfx.prepare(model, tiny_args())
    assert model.offsets.dtype == torch.int64
    assert prepared.graph_module.get_buffer("offsets").dtype == torch.int32
    args = tiny_args()
    prepared(*args)
    eager(*args)
    for m in (model, eager):
        m.offsets.copy_(torch.tensor([3, 2, 1, 0]))
    same(eager(*args), prepared(*args))
    model.offsets[0] = 2**40
    with pytest.raises((nxfx.RangeError, nxfx.PrepareError), match="offsets"):
        prepared(*args)


def test_written_int64_buffer_is_written_back() -> None:
    model = Tiny()
    prepared = nxfx.prepare(model, tiny_args())
    steps = model.steps
    prepared(*tiny_args())
    assert model.steps is steps
    assert (steps.dtype, int(steps)) == (torch.int64, 1)


def test_prepare_changes_nothing_in_the_model() -> None:
    model = Tiny()
    calls = []
    model.register_forward_hook(lambda *a: calls.append(1))
    before = {k: (id(v), v._version, v.clone()) for k, v in (*model.named_parameters(), *model.named_buffers())}
    attributes = dict(model.__dict__)
    nxfx.prepare(model, tiny_args())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        assert (id(tensor), tensor._version) == before[name][:2]
        assert torch.equal(tensor, before[name][2])
    assert model.__dict__ == attributes
    assert model.training


@pytest.mark.parametrize("bad", [2**31, -(2**31) - 1, 2**40, torch.iinfo(torch.int64).min])
def test_int64_outside_int32_raises_before_anything_runs(bad: int) -> None:
    model = Tiny()
    prepared = nxfx.prepare(model, tiny_args())
    x, positions = tiny_args()
    positions[2] = bad
    with pytest.raises(nxfx.RangeError) as caught:
        prepared(x, positions)
    error = caught.value
    assert (error.argument, error.value, error.position, error.flat_position) == ("positions", bad, (2,), 2)
    assert isinstance(error, ValueError)
    assert int(model.steps) == 0


def test_declared_range_is_enforced_and_reported() -> None:
    prepared = nxfx.prepare(Tiny(), tiny_args(), ranges={"positions": (0, 100)})
    x, positions = tiny_args()
    prepared(x, positions + 97)
    with pytest.raises(nxfx.RangeError, match=r"positions.*\[0, 100\].*declared"):
        prepared(x, positions + 98)
    assert prepared.report.requirements["positions"] == (0, 100)


def test_range_implied_by_an_embedding_is_enforced() -> None:
    class Embed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(10, 4)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.table(ids) * ids.unsqueeze(-1)

    prepared = nxfx.prepare(Embed(), (torch.tensor([1, 2]),))
    same(prepared._model(torch.tensor([9, 0])), prepared(torch.tensor([9, 0])))
    with pytest.raises(nxfx.RangeError, match=r"\[0, 9\]"):
        prepared(torch.tensor([3, 10]))


@pytest.mark.parametrize(("ranges", "message"), [({"postions": (0, 1)}, "positions"), ({"positions": (5, 1)}, "positions")])
def test_unknown_or_contradictory_ranges_are_refused(ranges: dict[str, Any], message: str) -> None:
    with pytest.raises(nxfx.UsageError, match=message):
        nxfx.prepare(Tiny(), tiny_args(), ranges=ranges)


Pair = namedtuple("Pair", "a b")


@dataclass
class Record:
    hidden: torch.Tensor
    extra: Any = None
    tag: str = "t"


class Cache:
    """Like a library's cache: not a pytree node, mutated in place and by rebinding."""

    def __init__(self) -> None:
        self.keys: torch.Tensor | None = None
        self.slots = torch.zeros(2, 3)
        self.seen = 0
        self.history: list[torch.Tensor] = []


class Structures(nn.Module):
    def forward(self, nested: dict[str, Any], pair: Pair, cache: Cache, *rest: torch.Tensor, **named: torch.Tensor) -> Any:
        cache.keys = pair.a if cache.keys is None else torch.cat([cache.keys, pair.a])
        cache.slots[:, 0] += pair.b.sum()
        cache.seen += pair.a.shape[0]
        cache.history.append(pair.b * 2)
        total = nested["x"][0] + nested["x"][1] + sum(rest) + named["last"]
        return Record(total, (cache, Pair(pair.b, None)), "out"), [named["last"], 3, "s", None], cache.keys


def structure_args() -> tuple[tuple[Any, ...], dict[str, torch.Tensor]]:
    torch.manual_seed(3)
    cache = Cache()
    args = ({"x": [torch.randn(3), torch.randn(3)], "n": 1}, Pair(torch.randn(2, 3), torch.randn(3)), cache, torch.randn(3), torch.randn(3))
    return args, {"last": torch.randn(3)}


def test_structures_caches_and_objects_go_through_like_in_eager() -> None:
    """Trap 27; arguments that are mutated, rebound and returned keep their identity and their content."""
    model = Structures()
    prepared = nxfx.prepare(model)
    (eager_args, eager_kwargs), (args, kwargs) = structure_args(), structure_args()
    for _ in range(3):
        expected = model(*eager_args, **eager_kwargs)
        actual = prepared(*args, **kwargs)
        same((expected, eager_args), (actual, args))
        assert actual[0].extra[0] is args[2]
        assert actual[1][0] is kwargs["last"]
        assert type(actual[0]) is Record and type(actual[0].extra[1]) is Pair
    assert args[2].seen == 6 and len(args[2].history) == 3


def test_the_same_tensor_twice_is_one_input() -> None:
    class Twice(nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            a.add_(1)
            return a + b

    model = Twice()
    prepared = nxfx.prepare(model)
    x, y = torch.ones(3), torch.ones(3)
    same(model(x, x), prepared(y, y))
    same(x, y)
    same(model(x, torch.zeros(3)), prepared(y, torch.zeros(3)))
    assert len(prepared.captures) == 2


class PlainState(nn.Module):
    """Tensors kept as plain attributes and in lists: a static KV cache of the careless kind."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = torch.zeros(4, 3)
        self.caches = [torch.zeros(3), torch.ones(3)]
        self.lookup = {"table": torch.arange(4)}

    def forward(self, x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        self.cache[position] = x
        self.caches[0].add_(x)
        return self.cache.sum(0) + self.caches[0] + self.lookup["table"][position]


def test_written_plain_tensors_are_the_models_own() -> None:
    model = PlainState()
    eager = copy.deepcopy(model)
    prepared = nxfx.prepare(model, (torch.randn(3), torch.tensor(0)))
    cache, first = model.cache, model.caches[0]
    for i in range(4):
        x, position = torch.randn(3), torch.tensor(i)
        same(eager(x, position), prepared(x, position))
        same((eager.cache, eager.caches), (model.cache, model.caches))
    assert model.cache is cache and model.caches[0] is first
    assert set(prepared.input_output_aliases.values()) == {1, 2}


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.last: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        y = x * float(self.calls)
        if self.last is not None:
            y = y + self.last
        self.last = y
        return y


def test_python_state_is_never_silently_baked() -> None:
    """FX.md: a Python counter changed in forward is right on the first call and wrong from the second on."""
    model = Counter()
    eager = copy.deepcopy(model)
    prepared = nxfx.prepare(model, (torch.ones(2),))
    assert model.calls == 0 and model.last is None
    finding = next(f for f in prepared.report.errors if f.code == "NX406" and "calls" in f.message)
    assert finding.location.source == "self.calls += 1"
    for _ in range(4):
        same(eager(torch.ones(2)), prepared(torch.ones(2)))
    assert model.calls == 4


def test_passthrough_output_duplicates_and_views_keep_their_number() -> None:
    class Outputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("b", torch.zeros(3))

        def forward(self, x: torch.Tensor) -> tuple[Any, ...]:
            self.b.add_(x)
            y = x + 1
            return y, y, x, self.b, y[:1], x.long(), None

    model = Outputs()
    eager = copy.deepcopy(model)
    prepared = nxfx.prepare(model, (torch.randn(3),))
    x = torch.randn(3)
    expected, actual = eager(x), prepared(x)
    same(expected, actual)
    assert actual[2] is x
    assert actual[5].dtype == torch.int64


def test_attributes_the_module_lacks_are_the_models() -> None:
    prepared = nxfx.prepare(Tiny(), tiny_args())
    assert prepared.name == "tiny"
    with pytest.raises(AttributeError, match="no_such"):
        _ = prepared.no_such


def test_methods_that_call_self_run_the_prepared_graph() -> None:
    class Loop(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2

        def generate(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(3):
                x = self(x)
            return x

    prepared = nxfx.prepare(Loop())
    same(Loop().generate(torch.ones(2)), prepared.generate(torch.ones(2)))
    assert len(prepared.captures) == 1


def test_properties_need_exactly_one_capture() -> None:
    prepared = nxfx.prepare(Tiny())
    with pytest.raises(nxfx.PrepareError, match="nothing is captured"):
        _ = prepared.graph_module
    prepared(torch.randn(4, 4), torch.arange(4))
    assert prepared.graph_module is not None
    prepared(torch.randn(2, 4), torch.arange(4))
    with pytest.raises(nxfx.PrepareError, match=r"float32\[4, 4\].*float32\[2, 4\]"):
        _ = prepared.report


def test_lazy_captures_are_thread_safe() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    prepared = nxfx.prepare(model)
    x, results = torch.randn(2, 4), []

    def work() -> None:
        results.append(prepared(x))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(prepared.captures) == 1
    assert len(results) == 4
    with torch.no_grad():
        for r in results:
            same(model(x), r)


def test_train_and_eval_are_different_captures_and_one_mode() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    prepared = nxfx.prepare(model)
    x = torch.randn(3, 4)
    model.eval()
    with torch.no_grad():
        same(model(x), prepared(x))
    prepared.train()
    assert model.training
    torch.manual_seed(5)
    expected = model(x).detach()
    torch.manual_seed(5)
    same(expected, prepared(x))
    assert len(prepared.captures) == 2


def test_without_training_a_backward_fails_at_once() -> None:
    prepared = nxfx.prepare(nn.Linear(4, 4), (torch.randn(2, 4),))
    with pytest.raises(RuntimeError, match="does not require grad"):
        prepared(torch.randn(2, 4)).sum().backward()


def test_training_keeps_gradients_and_no_grad_regions_detach() -> None:
    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                frozen = self.a(x)
            return self.b(x) * frozen

    model = Partly()
    eager = copy.deepcopy(model)
    prepared = nxfx.prepare(model, (torch.randn(2, 4),), training=True)
    x = torch.randn(2, 4)
    same(eager(x).detach(), prepared(x).detach())
    eager(x).sum().backward()
    prepared(x).sum().backward()
    assert model.a.weight.grad is None and eager.a.weight.grad is None
    same(eager.b.weight.grad, model.b.weight.grad)


def test_share_state_false_leaves_the_model_alone() -> None:
    model = Tiny()
    prepared = nxfx.prepare(model, tiny_args(), share_state=False)
    prepared(*tiny_args())
    assert int(model.steps) == 0


def test_moves_to_another_device_without_baked_cpu() -> None:
    class Devices(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("b", torch.arange(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            mask = torch.ones(3, device=x.device)
            mask[1:] = 0
            return x * mask + torch.arange(3, device=x.device) + torch.tensor([1.0, 2.0, 3.0], device=x.device) + self.b

    prepared = nxfx.prepare(Devices(), (torch.randn(3),))
    prepared.to("meta")
    moved = prepared(torch.empty(3, device="meta"))
    assert (moved.device.type, moved.shape, moved.dtype) == ("meta", (3,), torch.float32)
    assert len(prepared.captures) == 1


def test_deep_copy_is_independent() -> None:
    model = Tiny()
    prepared = nxfx.prepare(model, tiny_args())
    report = pickle.loads(pickle.dumps(prepared.report))
    assert report.to_dict() == prepared.report.to_dict()


def test_dynamic_shapes_serve_other_sizes_and_refuse_contradictions() -> None:
    class Cat(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, int]:
            return torch.cat([x, y], 1) * x.shape[0], x.shape[0]

    batch = torch.export.Dim("batch", min=2, max=16)
    prepared = nxfx.prepare(Cat(), (torch.randn(3, 4), torch.randn(3, 5)), dynamic_shapes={"x": {0: batch}, "y": {0: batch}})
    for n in (2, 7, 16):
        args = (torch.randn(n, 4), torch.randn(n, 5))
        same(Cat()(*args), prepared(*args))
    assert len(prepared.captures) == 1
    for rows in ((7, 6), (17, 17)):
        with pytest.raises(nxfx.PrepareError, match="size"):
            prepared(torch.randn(rows[0], 4), torch.randn(rows[1], 5))


def test_state_inputs_become_buffers_that_can_be_aliased() -> None:
    class Decode(nn.Module):
        def forward(self, x: torch.Tensor, position: torch.Tensor, cache: dict[str, torch.Tensor]) -> torch.Tensor:
            cache["k"][:, position] = x
            return cache["k"].sum(1)

    def args() -> tuple[Any, ...]:
        torch.manual_seed(0)
        return torch.randn(2, 1, 4), torch.tensor([1]), {"k": torch.zeros(2, 8, 4)}

    model = Decode()
    prepared = nxfx.prepare(model, args(), state_inputs=["cache"])
    assert [n.target for n in prepared.graph_module.graph.find_nodes(op="placeholder")] == ["x", "position"]
    assert list(prepared.input_output_aliases.values()) == [1]
    assert prepared.mutated_inputs == {}
    mine, theirs = args(), args()
    for i in range(3):
        same(model(theirs[0], torch.tensor([i]), theirs[2]), prepared(mine[0], torch.tensor([i]), mine[2]))
        same(theirs, mine)
    with pytest.raises(nxfx.UsageError, match="cache"):
        nxfx.prepare(model, args(), state_inputs=["cahce"])


def test_save_and_load_without_the_model(tmp_path: Any) -> None:
    model = Tiny()
    prepared = nxfx.prepare(model, tiny_args())
    prepared(*tiny_args())
    prepared.save(tmp_path / "tiny.pt2")
    loaded = nxfx.load(tmp_path / "tiny.pt2")
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert loaded.report.to_dict() == prepared.report.to_dict()
    for _ in range(2):
        args = tiny_args()
        same(prepared(*args), loaded(*args))
    with pytest.raises(nxfx.RangeError, match="positions"):
        loaded(torch.randn(4, 4), torch.arange(4) + 2**33)
    with pytest.raises(nxfx.PrepareError, match="one capture"):
        loaded(torch.randn(2, 4), torch.arange(4))


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04garbage"])
def test_load_refuses_what_nxfx_did_not_write(tmp_path: Any, content: bytes) -> None:
    path = tmp_path / "bad.pt2"
    path.write_bytes(content)
    with pytest.raises(nxfx.UsageError, match="bad.pt2"):
        nxfx.load(path)
    with pytest.raises(nxfx.UsageError, match="no such file"):
        nxfx.load(tmp_path / "missing.pt2")


def test_strict_raises_with_the_report() -> None:
    with pytest.raises(nxfx.PrepareError, match="NX406") as caught:
        nxfx.prepare(Counter(), (torch.ones(2),), strict=True)
    assert caught.value.report is not None and caught.value.report.errors


def test_check_raises_for_no_hazard_and_changes_nothing() -> None:
    class Branch(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x[0] == 1:
                return x
            return x[:1]  # no graph has either shape

    report = nxfx.check(Branch(), (torch.ones(2),))
    (finding,) = [f for f in report.findings if f.code == "NX401"]
    assert finding.location.source == "if x[0] == 1:"
    assert finding.location.file == __file__
    with pytest.raises(nxfx.CaptureError, match=r"if x\[0\] == 1:"):
        nxfx.prepare(Branch(), (torch.ones(2),))


def test_verify_compares_with_eager() -> None:
    nxfx.prepare(Tiny(), tiny_args(), verify=True)


class _Broken(nxfx.Pass):
    name = "broken"

    def run(self, graph_module: Any, context: Any) -> nxfx.PassResult:
        for node in graph_module.graph.find_nodes(op="call_function", target=torch.ops.aten.mul.Tensor):
            node.args = (node.args[0], 3.0)
        return nxfx.PassResult(True)


def test_verify_finds_a_wrong_rewrite() -> None:
    with pytest.raises(nxfx.PrepareError, match="differs"):
        nxfx.prepare(Tiny(), tiny_args(), pipeline=nxfx.Pipeline.default().with_pass(_Broken()), verify=True)


def test_a_model_that_returns_no_tensor_is_told_so() -> None:
    class Nothing(nn.Module):
        def forward(self, x: torch.Tensor) -> None:
            return None

    with pytest.raises(nxfx.CaptureError, match="no tensor"):
        nxfx.prepare(Nothing(), (torch.ones(1),))


def test_wrong_arguments_raise_pythons_own_error() -> None:
    with pytest.raises(TypeError, match="Tiny.forward.*positions"):
        nxfx.prepare(Tiny(), (torch.ones(4, 4),))


@pytest.mark.parametrize("through_views", [False, True])
def test_as_strided_reads_the_callers_memory_not_a_packed_copy(through_views: bool) -> None:
    """A cast at the boundary would pack a tensor with gaps: what `as_strided` looks through stays as it is."""

    class Strided(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            view = x[:3].t() if through_views else x
            return view.as_strided((3, 2), (1, 4)) + 1, x * 2

    base = torch.arange(40).view(5, 8)
    prepared = nxfx.prepare(Strided())
    for x in (base[:, :4].contiguous(), base[:, ::2], base[1:, 1:5], base[:4, :5].t()):
        same(Strided()(x), prepared(x))
    assert all(any(f.code == "NX301" for f in c.report.findings) for c in prepared.captures.values())
