"""Nodes and their metadata, the boundary, premises, devices, reports and locations: what the passes stand on."""

from __future__ import annotations

import contextlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Captured, graph_of, run_passes
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import nxfx
from nxfx import device as devices
from nxfx.analysis.provenance import Premise, Role, Source
from nxfx.boundary import Boundary, InputRule, hoist
from nxfx.errors import PrepareError, RangeError
from nxfx.graph import invariants, meta
from nxfx.graph.builder import NodeBuilder
from nxfx.premises import check_premises, holds
from nxfx.report import Finding, Kind, Location, Report, Rewrite, Severity, locate
from nxfx.report.locations import frame_rank, locate_trace
from nxfx.verification.equivalence import compare

aten = torch.ops.aten
INT32 = (-(2**31), 2**31 - 1)


def named(gm: fx.GraphModule, op: Any) -> fx.Node:
    return next(iter(gm.graph.find_nodes(op="call_function", target=op)))


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x * self.scale)


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Scaled()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + 1


class Fn(nn.Module):
    """A function of tensors as a module."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, p: torch.Tensor, mask: torch.Tensor, h: torch.Tensor, n: torch.Tensor) -> Any:
        return self.fn(p, mask, h, n)


# -- the builder ------------------------------------------------------------------------------------------------------


def test_trap_25_built_nodes_carry_value_line_module_and_maker() -> None:
    captured = graph_of(Outer(), (torch.ones(3, 4),))
    relu = named(captured.gm, aten.relu.default)
    build = NodeBuilder(captured.gm.graph, "maker")
    with build.before(relu):
        made = [
            build.call(aten.abs.default, relu.args[0]),
            build.known(meta.val(relu), aten.neg.default, relu.args[0]),
            build.cast(relu.args[0], torch.float16),
            build.scalar(2, torch.int32, torch.device("cpu")),
        ]
    for node in made:
        assert node.meta["stack_trace"] == relu.meta["stack_trace"]
        assert node.meta["nn_module_stack"] == relu.meta["nn_module_stack"]
        assert node.meta["nxfx"] == {"made_by": "maker", "origin": relu.name}
        assert locate(node).source == "return torch.relu(x * self.scale)" and locate(node).module == "inner"
    assert [str(meta.dtype_of(n)) for n in made] == ["torch.float32", "torch.float32", "torch.float16", "torch.int32"]
    assert list(meta.val(made[3]).shape) == [] and build.created == 4
    order = list(captured.gm.graph.nodes)
    assert [order.index(n) for n in made] == list(range(order.index(relu) - 4, order.index(relu)))
    with build.before(made[0]):
        again = build.cast(made[0], torch.float64)
    assert again.meta["nxfx"]["origin"] == relu.name  # the user's node, not the middleman
    assert build.cast(again, torch.float64) is again


def test_after_a_placeholder_is_after_the_last_one() -> None:
    captured = graph_of(Outer(), (torch.ones(3, 4),))
    weight, x = captured.gm.graph.find_nodes(op="placeholder")
    build = NodeBuilder(captured.gm.graph, "maker")
    with build.after(weight):
        first, second = build.cast(weight, torch.float16), build.cast(weight, torch.float64)
    assert list(captured.gm.graph.nodes)[1:4] == [x, first, second]
    relu = named(captured.gm, aten.relu.default)
    with build.after(relu):
        third, fourth = build.call(aten.abs.default, relu), build.call(aten.neg.default, relu)
    assert relu.next is third and third.next is fourth
    captured.gm.graph.lint()


def test_outside_a_place_the_builder_refuses() -> None:
    captured = graph_of(Outer(), (torch.ones(3, 4),))
    relu = named(captured.gm, aten.relu.default)
    build = NodeBuilder(captured.gm.graph, "maker")
    for make in (
        lambda: build.call(aten.abs.default, relu),
        lambda: build.known(meta.val(relu), aten.abs.default, relu),
        lambda: build.cast(relu, torch.float16),
    ):
        nodes = len(captured.gm.graph.nodes)
        with pytest.raises(RuntimeError, match="outside"):
            make()
        assert len(captured.gm.graph.nodes) == nodes


def test_what_the_op_refuses_is_raised_at_the_node_and_leaves_nothing() -> None:
    captured = graph_of(Outer(), (torch.ones(3, 4),))
    relu = named(captured.gm, aten.relu.default)
    nodes = len(captured.gm.graph.nodes)
    with pytest.raises(RuntimeError) as caught, NodeBuilder(captured.gm.graph, "m").before(relu) as build:
        build.call(aten.mm.default, relu.args[0], relu.args[0])
    assert caught.value.nxfx_node is relu and len(captured.gm.graph.nodes) == nodes  # type: ignore[attr-defined]


# -- values -----------------------------------------------------------------------------------------------------------

LAYOUTS: dict[str, Callable[[], torch.Tensor]] = {
    "contiguous": lambda: torch.zeros(3, 4, dtype=torch.int64),
    "transposed": lambda: torch.zeros(3, 4, dtype=torch.int64).t(),
    "permuted": lambda: torch.zeros(2, 3, 4, dtype=torch.int64).permute(1, 2, 0),
    "channels-last": lambda: torch.zeros(2, 3, 4, 5, dtype=torch.int64).to(memory_format=torch.channels_last),
    "one-sized dims": lambda: torch.zeros(2, 1, 3, dtype=torch.int64).transpose(0, 1),
    "0-d": lambda: torch.zeros((), dtype=torch.int64),
    "empty": lambda: torch.zeros(0, 3, dtype=torch.int64),
    "expanded": lambda: torch.zeros(3, 1, dtype=torch.int64).expand(3, 4),
    "expanded 0-d": lambda: torch.zeros((), dtype=torch.int64).expand(2, 3),
    "strided": lambda: torch.zeros(4, 6, dtype=torch.int64)[:, ::2],
    "strided transposed": lambda: torch.zeros(4, 6, dtype=torch.int64)[:, ::2].t(),
    "sliced rows": lambda: torch.zeros(4, 6, dtype=torch.int64)[1:3],
    "sliced columns": lambda: torch.zeros(4, 6, dtype=torch.int64)[:, 1:3],
    "empty expanded": lambda: torch.zeros(1, 0, dtype=torch.int64).expand(3, 0),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.float16], ids=str)
def test_values_of_casts_are_those_of_real_casts(layout: str, dtype: torch.dtype) -> None:
    real = LAYOUTS[layout]()
    with FakeTensorMode():
        fake = LAYOUTS[layout]()
    expected = real.to(dtype)
    cast, retyped = meta.cast(fake, dtype), meta.retype(fake, dtype)
    assert (cast.dtype, cast.shape, cast.stride(), cast.device) == (dtype, real.shape, expected.stride(), real.device)
    assert (retyped.dtype, retyped.shape, retyped.stride()) == (dtype, real.shape, real.stride())
    assert isinstance(cast, meta.FakeTensor) and cast.fake_mode is fake.fake_mode


@pytest.mark.parametrize("transpose", [False, True], ids=["contiguous", "transposed"])
def test_symbolic_sizes_are_kept_and_nothing_is_assumed_of_them(transpose: bool) -> None:
    dim = torch.export.Dim("n", min=2, max=64)

    class Cast(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x + 1
            return (y.t() if transpose else y).sum(0)

    captured = graph_of(Cast(), (torch.zeros(5, 3),), dynamic_shapes={"x": {0: dim}})
    node = named(captured.gm, aten.t.default if transpose else aten.add.Tensor)
    env: ShapeEnv = meta.val(node).fake_mode.shape_env
    guards = len(env.guards)
    with NodeBuilder(captured.gm.graph, "m").after(node) as build:
        made = build.cast(node, torch.float16)
    evaluated = meta.evaluate(build.mode, made.target, made.args, dict(made.kwargs))
    retyped = meta.retype(meta.val(node), torch.float16)
    for value in (meta.val(made), retyped):
        assert [str(n) for n in (*value.shape, *value.stride())] == [str(n) for n in (*evaluated.shape, *evaluated.stride())]
    assert len(env.guards) == guards


def test_invariants_hold_of_attributes_too() -> None:
    captured = graph_of(Outer(), (torch.ones(3, 4),))
    captured.gm.register_buffer("table", torch.ones(4))
    with captured.gm.graph.inserting_before(named(captured.gm, aten.relu.default)):
        node = captured.gm.graph.get_attr("table")
    add = named(captured.gm, aten.add.Tensor)
    add.update_arg(1, node)
    assert any(b.rule == "has-val" and b.node == node.name for b in invariants.check(captured.gm))


CHOSEN = (torch.arange(6), torch.tensor([True, False] * 3), torch.randn(3, 2), torch.tensor(3))


def _chosen(p: torch.Tensor, mask: torch.Tensor, h: torch.Tensor, n: torch.Tensor) -> Any:
    count = n.item()
    torch._check(count == 3)
    return h * p[mask][:, None] + torch.nonzero(mask) + torch.full((count, 1), 2.0), h[:count]


def test_a_size_that_data_decide_may_be_settled_by_a_later_op() -> None:
    captured = graph_of(_chosen, CHOSEN)
    assert any(n.target is aten.index.Tensor and list(meta.val(n).shape) == [3] for n in captured.gm.graph.nodes)
    assert invariants.check(captured.gm) == []
    prepared = nxfx.prepare(Fn(_chosen), CHOSEN, verify_each=True)
    outcome = compare(_chosen(*CHOSEN), prepared(*CHOSEN))
    assert outcome.ok, outcome.mismatches


@pytest.mark.parametrize(
    ("op", "shape"),
    [
        (aten.index.Tensor, [7]),  # of six elements
        (aten.index.Tensor, [3, 1]),
        (aten.unsqueeze.default, [4, 1]),  # of [3]
        (aten.nonzero.default, [3, 2]),
    ],
    ids=str,
)
def test_a_size_that_data_decide_excuses_no_other(op: Any, shape: list[int]) -> None:
    captured = graph_of(_chosen, CHOSEN)
    node = named(captured.gm, op)
    node.meta.pop("unbacked_bindings", None)
    node.meta["val"] = meta.contiguous(meta.val(node), shape, meta.val(node).dtype)
    assert ("val-is-true", node.name) in {(b.rule, b.node) for b in invariants.check(captured.gm)}


# -- the boundary -----------------------------------------------------------------------------------------------------


def hoisted(fn: Any, args: tuple[Any, ...], **keywords: Any) -> tuple[Captured, Boundary]:
    """``fn`` narrowed and hoisted, numbers compared with the graph before."""
    before, captured = graph_of(fn, args, **keywords), graph_of(fn, args, **keywords)
    run_passes(captured, "narrow-64bit")
    boundary = hoist(captured.gm, captured.context.sources, captured.context.requirements)
    captured.gm.graph.lint()
    captured.gm.recompile()
    rules = boundary.inputs
    weights = len(captured.weights)
    assert len(rules) == weights + len(args) and len(boundary.outputs) == len(captured.gm.graph.output_node().args[0])
    admitted = [r.admit(v, "always") for r, v in zip(rules, (*captured.weights, *args), strict=True)]
    outcome = compare(list(before(*args)), boundary.restore(captured.gm(*admitted)))
    assert outcome.ok, outcome.mismatches
    return captured, boundary


def dtypes(captured: Captured) -> list[torch.dtype | None]:
    return [meta.dtype_of(n) for n in captured.gm.graph.find_nodes(op="placeholder")]


def test_an_input_used_narrow_is_narrowed_and_enforced() -> None:
    captured, boundary = hoisted(lambda x: x * 2, (torch.arange(3),))
    assert dtypes(captured) == [torch.int32]
    (rule,) = boundary.inputs
    assert (rule.narrow, rule.low, rule.high, rule.why) == (torch.int32, *INT32, "int32")


def test_an_input_used_narrow_and_wide_stays_wide() -> None:
    gm = graph_of(lambda x: (x.to(torch.int32) * 2, x + 1), (torch.arange(3),)).gm
    for node in gm.graph.find_nodes(op="call_function", target=aten._assert_tensor_metadata.default):
        gm.graph.erase_node(node)
    (x,) = gm.graph.find_nodes(op="placeholder")
    boundary = hoist(gm, {x.name: Source("x", Role.INPUT)}, {})
    assert boundary.inputs[0].narrow is None and boundary.inputs[0].low is None
    assert meta.dtype_of(x) == torch.int64 and named(gm, aten._to_copy.default)


def test_an_unused_input_is_narrowed_and_never_refused() -> None:
    captured, boundary = hoisted(lambda x, unused: x + 1, (torch.ones(3), torch.tensor([2**40])))
    rule = boundary.inputs[1]
    assert rule.narrow is torch.int32 and rule.low is None
    declared = graph_of(lambda x, unused: x + 1, (torch.ones(3), torch.arange(2)), ranges={"args_1": (0, 5)})
    name = [n.name for n in declared.gm.graph.find_nodes(op="placeholder")][1]
    sources = {name: Source("unused", Role.INPUT, range=(0, 5))}
    rule = hoist(declared.gm, sources, {}).inputs[1]
    with pytest.raises(RangeError, match=r"'unused': value 6 .*\[0, 5\].*declared"):
        rule.enforce(torch.tensor([1, 6]), "always")


@pytest.mark.parametrize("value", [torch.tensor([2**40, -(2**62)]), torch.tensor(7)], ids=["large", "0-d"])
def test_a_passed_through_input_keeps_its_64_bits(value: torch.Tensor) -> None:
    captured, boundary = hoisted(lambda x, y: (x, y * 1, x), (value, torch.arange(2)))
    assert boundary.inputs[0].narrow is None and boundary.outputs[0] is boundary.outputs[2] is None


def test_the_same_output_twice_is_restored_twice() -> None:
    def fn(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = x.argmax(-1) + 1
        return y, x * 2, y

    captured, boundary = hoisted(fn, (torch.randn(3, 4),))
    assert boundary.outputs[0] == boundary.outputs[2] == torch.int64 and boundary.outputs[1] is None
    results = captured.gm.graph.output_node().args[0]
    assert results[0] is results[2] and meta.dtype_of(results[0]) == torch.int32


def test_outputs_to_keep_keep_their_cast() -> None:
    def fn(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = x.argmax(-1) + 1
        return y, y * 2

    for options, expected in (
        ({"keep_outputs": [0]}, [None, torch.int64]),
        ({"hoist_outputs": False}, [None, None]),
    ):
        captured = graph_of(fn, (torch.randn(3, 4),))
        run_passes(captured, "narrow-64bit")
        boundary = hoist(captured.gm, captured.context.sources, captured.context.requirements, **options)
        assert boundary.outputs == expected
        captured.gm.recompile()
        x = torch.randn(3, 4)
        assert compare(list(fn(x)), boundary.restore(captured(x))).ok


class Offsets(nn.Module):
    def __init__(self, top: int = 3) -> None:
        super().__init__()
        self.register_buffer("offsets", torch.tensor([0, 1, 2, top]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.offsets


def test_buffers_get_narrow_twins_only_when_they_fit() -> None:
    model = Offsets()
    prepared = nxfx.prepare(model, (torch.arange(4),), verify_each=True)
    (call,) = prepared.captures.values()
    assert call.boundary.narrowed_buffers == {"offsets": torch.int64}
    assert prepared.graph_module.get_buffer("offsets").dtype == torch.int32 and model.offsets.dtype == torch.int64
    model.offsets[3] = 2**31 - 5
    x = torch.tensor([1, 2, 3, 4])
    with contextlib.suppress(nxfx.NxfxError):  # told, or right: never wrapped
        assert compare(model(x), prepared(x)).ok
    large = Offsets(2**40)
    prepared = nxfx.prepare(large, (torch.arange(4),), verify_each=True)
    assert not next(iter(prepared.captures.values())).boundary.narrowed_buffers
    assert compare(large(x), prepared(x)).ok


def test_float64_inputs_keep_their_bits_unless_asked() -> None:
    x = torch.tensor([1 / 3, 1e300, -0.0, float("inf"), float("nan")], dtype=torch.float64)
    captured, boundary = hoisted(lambda x: (x * 2, x), (x,))
    assert boundary.inputs[0].narrow is None and boundary.inputs[0].low is None and dtypes(captured) == [torch.float64]


def test_a_narrowed_input_has_the_strides_its_cast_makes() -> None:
    captured = graph_of(lambda x: x.to(torch.int32) * 2, (torch.zeros(3, 1, dtype=torch.int64).expand(3, 4),))
    (x,) = captured.gm.graph.find_nodes(op="placeholder")
    for node in captured.gm.graph.find_nodes(op="call_function", target=aten._assert_tensor_metadata.default):
        captured.gm.graph.erase_node(node)
    boundary = hoist(captured.gm, captured.context.sources, {})
    assert boundary.inputs[0].narrow is torch.int32
    assert meta.val(x).stride() == torch.zeros(3, 1).expand(3, 4).to(torch.int32).stride()


# -- enforcement ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "found", "position", "flat"),
    [
        (torch.tensor(11), 11, (), 0),
        (torch.tensor([0, 11, 12]), 11, (1,), 1),
        (torch.tensor([[0, 1], [2, -6]]), -6, (1, 1), 3),
        (torch.tensor([[0, 11], [2, 3]]).t(), 11, (1, 0), 2),
        (torch.tensor([[11], [0]]).expand(2, 3), 11, (0, 0), 0),
        (torch.arange(24).reshape(2, 3, 4)[:, ::2, ::3], 11, (0, 2, 1), 3),
        (torch.tensor([3, 255, 251], dtype=torch.uint8), 255, (1,), 1),
        (torch.tensor([3, -100, 11], dtype=torch.int8), -100, (1,), 1),
        (torch.tensor([3, 60000], dtype=torch.uint16), 60000, (1,), 1),
        (torch.tensor([3, 2**32 - 1], dtype=torch.uint32), 2**32 - 1, (1,), 1),
        (torch.tensor([3, 2**62], dtype=torch.int64), 2**62, (1,), 1),
    ],
    ids=["0-d", "1-d", "below", "transposed", "expanded", "strided", "uint8", "int8", "uint16", "uint32", "int64"],
)
def test_the_first_value_outside_is_named(value: torch.Tensor, found: int, position: tuple[int, ...], flat: int) -> None:
    rule = InputRule("ids", low=-5, high=10, why="declared")
    if value.dim() == 3:
        flat, position, found = next(
            (i, tuple(int(n) for n in torch.unravel_index(torch.tensor(i), value.shape)), v)
            for i, v in enumerate(value.reshape(-1).tolist())
            if v > 10
        )
    with pytest.raises(RangeError) as caught:
        rule.enforce(value, "always")
    error = caught.value
    assert (error.argument, error.value, error.position, error.flat_position, error.range) == (
        "ids",
        found,
        position,
        flat,
        (-5, 10),
    )
    assert f"'ids': value {found} at {list(position)}" in str(error) and isinstance(error, ValueError)
    assert not rule.checked


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16], ids=str)
def test_values_inside_pass_in_every_dtype(dtype: torch.dtype) -> None:
    for value in (torch.ones(3), torch.zeros(0, 4), torch.ones(()), torch.ones(2, 3).t()):
        InputRule("ids", low=-(2**70), high=2**70).enforce(value.to(dtype), "always")
        InputRule("ids", low=0, high=1).enforce(value.to(dtype), "always")
    with pytest.raises(RangeError):
        InputRule("ids", low=2, high=5).enforce(torch.ones(3).to(dtype), "always")


def test_meta_and_fake_and_unranged_values_are_not_read() -> None:
    rule = InputRule("ids", low=0, high=1)
    rule.enforce(torch.empty(3, dtype=torch.int64, device="meta"), "always")
    with FakeTensorMode():
        rule.enforce(torch.zeros(3, dtype=torch.int64), "always")
    assert not rule.checked
    InputRule("ids").enforce(torch.tensor(2**40), "always")


def test_check_says_how_often() -> None:
    bad, good = torch.tensor([9]), torch.tensor([1])
    never, first, always = (InputRule("ids", low=0, high=1) for _ in range(3))
    never.enforce(bad, "never")
    first.enforce(torch.zeros(0, dtype=torch.int64), "first")  # an empty tensor is no first look
    with pytest.raises(RangeError):
        first.enforce(bad, "first")
    with pytest.raises(RangeError):
        first.enforce(bad, "first")
    first.enforce(good, "first")
    first.enforce(bad, "first")
    always.enforce(good, "always")
    with pytest.raises(RangeError):
        always.enforce(bad, "always")


def test_all_inputs_are_checked_before_any_is_cast() -> None:
    rules = [InputRule("a", torch.int32, 0, 5), InputRule("b"), InputRule("c", torch.int32, 0, 5)]
    boundary = Boundary(rules, [torch.int64, None])
    a, b = torch.arange(3), torch.randn(2)
    admitted = boundary.admit([a, b, a])
    assert [t.dtype for t in admitted] == [torch.int32, torch.float32, torch.int32] and admitted[1] is b
    with pytest.raises(RangeError, match="'c'"):
        boundary.admit([a, b, a + 9])
    with pytest.raises(ValueError):
        boundary.admit([a, b])
    restored = boundary.restore([admitted[0], b])
    assert restored[0].dtype == torch.int64 and restored[1] is b


# -- premises and devices ---------------------------------------------------------------------------------------------


def test_premises_are_checked_again_when_the_tensor_changes() -> None:
    table = torch.tensor([0, 1, 2])
    premises = [Premise("table", "range", (0, 2)), Premise("table", "finite-nonnegative")]
    stamps: dict[str, tuple[int, int]] = {}
    for _ in range(2):
        check_premises(premises, lambda name: table, stamps)
    table[0] = 2
    check_premises(premises, lambda name: table, stamps)
    table[0] = 3
    for _ in range(2):  # and it stays refused
        with pytest.raises(PrepareError, match=r"'table' changed .*range \[0, 2\].*prepare the model again"):
            check_premises(premises, lambda name: table, stamps)
    other = torch.tensor([1, 1, -1])
    with pytest.raises(PrepareError):
        check_premises(premises, lambda name: other, stamps)


@pytest.mark.parametrize(
    ("fact", "values", "expected"),
    [
        ("finite-nonnegative", [0.0, 1.0], True),
        ("finite-nonnegative", [0.0, -0.0], False),
        ("finite-nonnegative", [float("inf")], False),
        ("finite-nonnegative", [float("nan")], False),
        ("finite-nonnegative", [-1.0], False),
        ("finite-nonnegative", [], True),
        ("range", [0.0, 2.0], True),
        ("range", [0.0, 3.0], False),
        ("range", [float("nan")], False),
        ("range", [], True),
        ("unheard-of", [0.0], False),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_facts_of_present_values(fact: str, values: list[float], expected: bool, dtype: torch.dtype) -> None:
    premise = Premise("table", fact, (0, 2) if fact == "range" else None)
    assert holds(premise, torch.tensor(values, dtype=dtype)) is expected


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64], ids=str)
def test_facts_of_integer_tables(dtype: torch.dtype) -> None:
    assert holds(Premise("table", "range", (0, 1)), torch.ones(3).to(dtype))
    assert holds(Premise("table", "finite-nonnegative"), torch.ones(3).to(dtype))
    assert not holds(Premise("table", "range", (2, 5)), torch.ones(3).to(dtype))


class Factories(nn.Module):
    def forward(self, x: torch.Tensor, flag: torch.Tensor) -> torch.Tensor:
        def left(x: torch.Tensor) -> torch.Tensor:
            return x + torch.arange(3)

        values, indices = (x + torch.arange(3, device=x.device)).topk(2)
        return torch.cond(flag, left, lambda x: x * 2, (x,)).view(3).sum() + values.sum() + indices.sum()


def test_every_device_and_value_moves_bodies_and_tuples_included() -> None:
    captured = graph_of(Factories(), (torch.arange(3), torch.tensor(True)))
    assert devices.devices_of(captured.gm) == {torch.device("cpu")}
    target = torch.device("cuda", 0)
    assert devices.retarget(captured.gm, target)
    assert devices.devices_of(captured.gm) == {target}
    for node in captured.gm.graph.nodes:
        value = node.meta.get("val")
        for leaf in value if isinstance(value, (list, tuple)) else (value,):
            assert not isinstance(leaf, torch.Tensor) or leaf.device == target, node
    assert not devices.retarget(captured.gm, target)
    assert devices.retarget(captured.gm, torch.device("cpu"))
    x, flag = torch.tensor([5, 1, 2]), torch.tensor(True)
    (result,) = captured(x, flag)
    assert compare(Factories()(x, flag), result).ok


# -- the report -------------------------------------------------------------------------------------------------------

HERE = Location("model.py", 7, "x[:n] = 0", "layers.0", "forward")


def full_report() -> Report:
    report = Report("trn2", "narrow-64bit{mode=proved}", captured_by="non-strict", timings={"total": 0.5})
    report.add(
        [
            Rewrite("p", "p.rule", Kind.EXACT, HERE, "a", "b"),
            Rewrite("p", "p.sum", Kind.REASSOCIATED, HERE, "a", "b", 1, "≤ 2 ulp"),
        ],
        [
            Finding("NX301", Severity.WARNING, "kept", HERE, "add", "declare it"),
            Finding("NX202", Severity.ERROR, "kept too"),
        ],
    )
    report.premises = [Premise("table", "range", (0, 2)), Premise("mask", "finite-nonnegative")]
    report.requirements, report.compiler_args = {"ids": (0, 9)}, {"--flag": "why"}
    report.nodes, report.wide_edges = {"before": 9, "after": 7}, {"before": 4, "after": 1, "forced": 1}
    return report


@pytest.mark.parametrize("report", [Report(), full_report()], ids=["empty", "full"])
def test_report_round_trips(report: Report) -> None:
    for again in (
        Report.from_dict(report.to_dict()),
        Report.from_dict(json.loads(report.to_json())),
        Report.from_dict(json.loads(report.to_json(indent=None))),
        pickle.loads(pickle.dumps(report)),
    ):
        assert again == report and str(again) == str(report) and again.to_dict() == report.to_dict()
    assert Report.from_dict(report.to_dict()).premises == report.premises


def test_report_of_a_real_model_round_trips() -> None:
    report = nxfx.prepare(Offsets(), (torch.arange(4),)).report
    assert report.rewrites
    assert Report.from_dict(json.loads(report.to_json())) == report == pickle.loads(pickle.dumps(report))


def test_equal_records_merge_with_their_counts_and_the_callers_own_are_left_alone() -> None:
    rewrites = [Rewrite("p", "r", Kind.EXACT, HERE) for _ in range(3)] + [Rewrite("p", "r", Kind.REFINES, HERE)]
    findings = [Finding("NX301", Severity.WARNING, "kept", HERE, node) for node in ("a", "b")]
    findings.append(Finding("NX301", Severity.ERROR, "kept", HERE, "c"))
    first, second = Report(), Report()
    for report in (first, second):
        report.add(rewrites, findings)
        assert [r.count for r in report.rewrites] == [3, 1] and [f.count for f in report.findings] == [2, 1]
    first.add(rewrites, findings)
    assert [r.count for r in first.rewrites] == [6, 2] and [f.count for f in first.findings] == [4, 2]
    assert [r.count for r in second.rewrites] == [3, 1]
    assert all(r.count == 1 for r in (*rewrites, *findings))
    assert len(first.errors) == len(first.warnings) == 1


def test_codes_are_known() -> None:
    with pytest.raises(ValueError, match="NX999"):
        Finding("NX999", Severity.INFO, "no such code")


def test_text_holds_codes_lines_source_and_fixes() -> None:
    text = str(full_report())
    for part in (
        "target trn2: 1 exact, 1 reassociated rewrites; 1 error, 1 warning",
        "p.rule: a → b\n               model.py:7: x[:n] = 0",
        "[≤ 2 ulp]",
        "NX301 warning: kept\n        at model.py:7: x[:n] = 0\n        fix: declare it",
        "NX202 error: kept too\n        at unknown location",
        "ids in [0, 9]",
        "table: range [0, 2]",
        "mask: finite-nonnegative",
        "4 before, 1 after, 1 forced",
        "--flag: why",
    ):
        assert part in text, part
    assert "no rewrites; no findings" in str(Report("inf2"))
    many = Report()
    many.add([Rewrite("p", "r", Kind.EXACT, Location("m.py", n, "s")) for n in range(9)], [])
    assert "and 6 more lines" in str(many) and "×9" in str(many)


@pytest.mark.parametrize(
    "hostile",
    [
        "x = 1  # \x1b[2J\x1b]0;owned\x07",
        "s = '\u202e gnp.evil'",
        "{x} %s [bold]\\u0041",
        "a\rb",
        "\ud800",
        "\x00\x9b31m",
    ],
    ids=["escape", "bidi", "format", "return", "surrogate", "nul"],
)
def test_hostile_source_text_drives_no_terminal(hostile: str) -> None:
    report = Report("trn2")
    place = Location(f"{hostile}.py", 3, hostile)
    report.add(
        [Rewrite("p", "r", Kind.EXACT, place, hostile, hostile)],
        [Finding("NX301", Severity.INFO, hostile, place, fix=hostile)],
    )
    text = str(report)
    assert all(c.isprintable() or c == "\n" for c in text)
    text.encode()
    assert Report.from_dict(json.loads(report.to_json())) == report


# -- locations --------------------------------------------------------------------------------------------------------


def frame(file: str, line: int, function: str, source: str | None = None) -> str:
    return f'  File "{file}", line {line}, in {function}\n' + (f"    {source}\n" if source else "")


SYSTEM = "/usr/lib/python3/dist-packages/m.py"
QUOTED = "raise E('File \"evil.py\", line 3, in g')"
LIBRARY = "/opt/env/lib/python3.11/site-packages/models/attention.py"
TORCH = torch.nn.modules.module.__file__


@pytest.mark.parametrize(
    ("frames", "expected"),
    [
        ([("/u/model.py", 3, "forward", "a"), ("/u/h.py", 9, "rotate", "b")], ("/u/h.py", 9, "rotate", "b")),
        ([("/u/model.py", 3, "forward", "a"), (LIBRARY, 9, "rotate", "b")], ("/u/model.py", 3, "forward", "a")),
        ([(LIBRARY, 3, "forward", "a"), (LIBRARY, 9, "rotate", "b")], (LIBRARY, 9, "rotate", "b")),
        ([(SYSTEM, 3, "f", "a"), ("/u/m.py", 1, "g", "b"), (LIBRARY, 2, "h", "c")], ("/u/m.py", 1, "g", "b")),
        ([("/u/m.py", 3, "f", "a"), (SYSTEM, 9, "g", "b")], ("/u/m.py", 3, "f", "a")),
        ([("/u/model.py", 3, "forward", "a"), (TORCH, 9, "_call_impl", "b")], ("/u/model.py", 3, "forward", "a")),
        ([("/u/model.py", 3, "<lambda>", "a")], ("/u/model.py", 3, "<lambda>", "a")),
        ([("/u/model.py", 3, "forward", "a"), ("<string>", 1, "made", None)], ("/u/model.py", 3, "forward", "a")),
        ([("<string>", 1, "made", None), ("/u/model.py", 3, "forward", "a")], ("/u/model.py", 3, "forward", "a")),
        ([("/u/a.py", 1, "f", None), ("/u/b.py", 2, "g", None)], ("/u/b.py", 2, "g", "")),
        ([("/u/a b/ü.py", 1, "f", 'File "evil.py", line 3, in g')], ("/u/a b/ü.py", 1, "f", "")),
        ([("/u/a.py", 1, "f", QUOTED)], ("/u/a.py", 1, "f", QUOTED)),
        ([(TORCH, 9, "_call_impl", "b")], ("", 0, "", "")),
        ([], ("", 0, "", "")),
    ],
    ids=[
        "helper", "user over library", "library alone", "library outside", "dist-packages", "torch", "lambda",
        "exec inside", "exec outside", "no source", "odd path", "quoted frame", "torch alone", "nothing",
    ],
)  # fmt: skip
def test_trap_33_the_users_innermost_line(frames: list[Any], expected: tuple[str, int, str, str]) -> None:
    found = locate_trace("Traceback\n" + "".join(frame(*f) for f in frames))
    if expected[0].endswith("ü.py"):  # a source line that looks like a frame is no Python: only the file must be one of the two
        assert found.line in (1, 3)
        return
    assert (found.file, found.line, found.function, found.source) == expected
    assert str(found) == (f"{found.file}:{found.line}" if found.file else "unknown location")


def test_the_source_is_read_from_the_file_and_missing_files_are_no_error(tmp_path: Path) -> None:
    path = tmp_path / "written.py"
    path.write_text("first = 1\n    second = 2\n")
    assert locate_trace(frame(str(path), 2, "f", "as the trace had it")).source == "second = 2"
    assert locate_trace(frame(str(tmp_path / "gone.py"), 2, "f", "as the trace had it")).source == "as the trace had it"
    assert locate_trace(frame(str(path), 99, "f", "past the end")).source == "past the end"


def test_ranks() -> None:
    assert frame_rank(__file__) == 2 and frame_rank(LIBRARY) == 1
    for machinery in (TORCH, nxfx.__file__, json.__file__, "<eval_with_key>.3", "torch/fx/graph.py"):
        assert frame_rank(machinery) == 0


def helper(x: torch.Tensor) -> torch.Tensor:
    return torch.sin(x)


class Spread(nn.Module):
    def forward(self, x: torch.Tensor) -> Any:
        by_lambda = (lambda v: torch.cos(v))(x)
        made: dict[str, Any] = {"torch": torch}
        exec("def made(v):\n    return torch.tanh(v)", made)
        return helper(x), by_lambda, made["made"](x)


def test_nodes_know_the_very_line_in_helpers_lambdas_and_made_code() -> None:
    prepared = nxfx.prepare(Spread(), (torch.randn(3),))
    lines = {op: locate(named(prepared.graph_module, op)) for op in (aten.sin.default, aten.cos.default, aten.tanh.default)}
    assert {location.file for location in lines.values()} == {__file__}
    assert lines[aten.sin.default].source == "return torch.sin(x)"
    assert "torch.cos(v)" in lines[aten.cos.default].source
    assert 'made["made"](x)' in lines[aten.tanh.default].source


def test_inputs_are_located_at_their_first_use() -> None:
    captured = graph_of(Outer(), (torch.ones(3, 4),))
    weight, x = captured.gm.graph.find_nodes(op="placeholder")
    assert locate(x).source == "return torch.relu(x * self.scale)"
    with NodeBuilder(captured.gm.graph, "m").after(x) as build:
        cast = build.cast(x, torch.float64)
    x.replace_all_uses_with(cast, lambda user: user is not cast)
    assert locate(x).source == "return torch.relu(x * self.scale)"
    unused = graph_of(lambda x, y: x + 1, (torch.ones(2), torch.ones(2)))
    assert locate(list(unused.gm.graph.find_nodes(op="placeholder"))[1]).line == 0
