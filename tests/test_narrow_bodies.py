"""narrow-64bit in the bodies of higher-order ops: intervals go in, loops are widened, both sides of an edge change together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import Captured, apply_pass, graph_of, run_passes
from torch._higher_order_ops import while_loop
from torch._higher_order_ops.map import map as map_over
from torch._higher_order_ops.scan import scan

import nxfx
from nxfx.analysis.ranges import analyse
from nxfx.analysis.wide_edges import wide_edges
from nxfx.graph import invariants, walk
from nxfx.graph.higher_order import take_apart
from nxfx.passes.narrow_64bit import Narrow64bit, NarrowOptions
from nxfx.pipeline import PipelineResult
from nxfx.verification.equivalence import compare

Ranges = dict[str, tuple[int, int]]
aten = torch.ops.aten


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.int64)


def zero() -> torch.Tensor:
    return torch.zeros((), dtype=torch.int64)


def with_cond(x: torch.Tensor, n: torch.Tensor) -> Any:
    return torch.cond(n.sum() > 9, lambda x, n: (x + n, x.argmax(), n.clone()), lambda x, n: (x - n, n.sum(), x * 2), (x, n))


def with_while(x: torch.Tensor, n: torch.Tensor) -> Any:
    def body(i: torch.Tensor, total: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return i + 1, total + x.index_select(0, (i % 4).view(1)).sum() * n[0]

    return while_loop(lambda i, total: i < 10, body, (zero(), zero()))


def with_scan(x: torch.Tensor, n: torch.Tensor) -> Any:
    return scan(lambda carry, row: (carry + row * n, carry % 5 + torch.arange(4)), torch.zeros(4, dtype=torch.int64), x.expand(5, 4))


def with_map(x: torch.Tensor, n: torch.Tensor) -> Any:
    return map_over(lambda row, n: (row * n + torch.arange(4), row.argsort(stable=True)), x.expand(5, 4), n)


def with_loop_in_a_branch(x: torch.Tensor, n: torch.Tensor) -> Any:
    return torch.cond(n.sum() > 9, lambda x, n: with_while(x, n)[1] + x, lambda x, n: x - n, (x, n))


MODELS = {f.__name__: f for f in (with_cond, with_while, with_scan, with_map, with_loop_in_a_branch)}
RANGES: Ranges = {"args_0": (0, 9), "args_1": (0, 7)}


def inputs(seed: int, high: tuple[int, int] = (9, 7)) -> tuple[torch.Tensor, torch.Tensor]:
    """Values within ``[0, high]``: both corners, and random ones."""
    fixed = {0: lambda h: torch.zeros(4, dtype=torch.int64), 1: lambda h: torch.full((4,), h)}
    draw = torch.Generator().manual_seed(seed)
    return tuple(fixed.get(seed, lambda h: torch.randint(0, h + 1, (4,), generator=draw))(h) for h in high)  # type: ignore[return-value]


def narrow(model: Any, args: tuple[Any, ...], ranges: Ranges | None) -> tuple[Captured, PipelineResult]:
    more = [inputs(seed) for seed in range(5)] if len(args) == 2 else []
    return apply_pass(Narrow64bit(), model, args, more_inputs=more, ranges=ranges)


def messages(result: PipelineResult) -> list[str]:
    return [f.message for f in result.findings if f.code == "NX301"]


def edge_dtypes(captured: Captured) -> set[torch.dtype]:
    """dtypes of what crosses the edges of bodies."""
    return {
        p.meta["val"].dtype
        for scope in walk.scopes(captured.gm)
        if scope.is_body
        for p in scope.graph_module.graph.find_nodes(op="placeholder")
    }


@pytest.mark.parametrize("name", MODELS)
def test_bodies_are_narrow_and_their_edges_agree(name: str) -> None:
    captured, result = narrow(MODELS[name], (ones(4), ones(4)), RANGES)
    assert wide_edges(captured.gm)["edges"] == 0
    assert edge_dtypes(captured) == {torch.int32}
    assert not messages(result)
    assert sum(r.count for r in result.rewrites if r.rule == "narrow.body") >= 3


@pytest.mark.parametrize("name", MODELS)
def test_prepared_models_with_bodies_equal_eager(name: str) -> None:
    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor, n: torch.Tensor) -> Any:
            return MODELS[name](x, n)

    model = Model()
    prepared = nxfx.prepare(model, inputs(2), ranges={"x": (0, 9), "n": (0, 7)}, verify_each=True)
    for seed in range(5):
        outcome = compare(model(*inputs(seed)), prepared(*inputs(seed)))
        assert outcome.ok, outcome.mismatches
    with pytest.raises(nxfx.RangeError, match=r"input 'n': value 8"):
        prepared(ones(4), ones(4) * 8)


@pytest.mark.parametrize("name", ["with_cond", "with_while"])
def test_undeclared_operands_are_kept_where_they_may_not_fit_and_blamed_by_name(name: str) -> None:
    captured, result = narrow(MODELS[name], (ones(4), ones(4)), None)
    huge = (torch.full((4,), 2**31 - 1), torch.full((4,), -(2**31)))
    before = graph_of(MODELS[name], (ones(4), ones(4)))
    outcome = compare(before(*huge), captured(*huge))
    assert outcome.ok, outcome.mismatches
    assert messages(result)
    assert any('ranges={"args_' in f.fix for f in result.findings if f.code == "NX301")
    assert captured.context.requirements.keys() == {"args_0", "args_1"}


def test_mode_proved_reads_the_proved_bounds_of_operands() -> None:
    captured = graph_of(with_cond, (ones(4), ones(4)))
    run_passes(captured, Narrow64bit(NarrowOptions(mode="proved")))
    assert captured.context.requirements == {}
    before, far = graph_of(with_cond, (ones(4), ones(4))), (torch.full((4,), 2**40), torch.full((4,), -(2**41)))
    outcome = compare(before(*far), captured(*far))
    assert outcome.ok, outcome.mismatches


def test_one_slot_is_narrow_beside_one_that_is_not() -> None:
    def model(x: torch.Tensor, t: torch.Tensor) -> Any:
        return torch.cond(x.sum() > 3, lambda x, t: (x + 1, t * 2), lambda x, t: (x.clone(), t - 1), (x, t))

    captured, result = apply_pass(
        Narrow64bit(), model, (ones(4), ones(4)), more_inputs=[(ones(4) * 9, ones(4) * 2**40), (ones(4) * 0, ones(4) * -(2**40))],
        ranges={"args_0": (0, 9), "args_1": (-(2**41), 2**41)},
    )  # fmt: skip
    assert edge_dtypes(captured) == {torch.int32, torch.int64}
    assert any("operand of a higher-order op" in m for m in messages(result))


def test_an_operand_read_by_two_slots_has_one_dtype() -> None:
    """The scan carries ``x`` and multiplies it beyond int32; the other reader of the same tensor stays wide with it."""

    def model(x: torch.Tensor) -> Any:
        return scan(lambda carry, row: (carry * 99, row % 7), x, x)

    captured, _ = apply_pass(Narrow64bit(), model, (ones(6, 6),), more_inputs=[(ones(6, 6) * 9,)], ranges={"args_0": (0, 9)})
    assert edge_dtypes(captured) == {torch.int64}


def test_a_body_never_returns_its_own_operand() -> None:
    captured, _ = apply_pass(
        Narrow64bit(), lambda x: torch.cond(x.sum() > 3, lambda x: x.clone(), lambda x: x + 1, (x,)), (ones(4),),
        more_inputs=[(ones(4) * 0,)], ranges={"args_0": (0, 9)},
    )  # fmt: skip
    for scope in walk.scopes(captured.gm):
        (output,) = scope.graph_module.graph.find_nodes(op="output")
        assert not scope.is_body or all(n.op != "placeholder" for n in output.all_input_nodes)


LOOPS: dict[str, tuple[Any, tuple[int, int]]] = {
    "a counter": (lambda x: while_loop(lambda i: i < 10, lambda i: (i + 1,), (zero(),)), (0, 10)),
    "a counter by threes": (lambda x: while_loop(lambda i: i < 10, lambda i: (i + 3,), (zero(),)), (0, 12)),
    "a countdown": (lambda x: while_loop(lambda i: i > 0, lambda i: (i - 1,), (x[0] + 0,)), (0, 9)),
    "two conditions": (lambda x: while_loop(lambda i: (i < 10) & (i > -5), lambda i: (i + 1,), (zero(),)), (0, 10)),
    "a bounded value": (lambda x: while_loop(lambda i: i.sum() < 10, lambda i: ((i * 7 + 1) % 50,), (x + 0,)), (0, 49)),
    "no bound": (lambda x: while_loop(lambda i: i != 10, lambda i: (i + 1,), (zero(),)), (-(2**63), 2**63 - 1)),
    "doubling": (lambda x: while_loop(lambda i: i < 1000, lambda i: (i * 2,), (x[0] + 1,)), (1, 1998)),
    "a sum over a scan": (lambda x: scan(lambda c, row: (c + row, c * 1), zero(), x)[:1], (0, 36)),
    "a product over a scan": (lambda x: scan(lambda c, row: (c * (row + 2), c * 1), zero() + 1, x)[:1], (-(2**63), 2**63 - 1)),
}


@pytest.mark.parametrize("name", LOOPS)
def test_loops_are_bounded_by_widening_their_condition_and_their_rounds(name: str) -> None:
    model, expected = LOOPS[name]
    captured = graph_of(model, (ones(4),), ranges={"args_0": (0, 9)})
    ranges = analyse(captured.gm, captured.context.sources)
    (loop,) = [n for n in captured.gm.graph.nodes if walk.is_higher_order(n)]
    assert ranges.outputs(loop)[0] == expected
    if name == "no bound":
        return
    for value in (0, 5, 9):
        (result, *_) = captured(ones(4) * value)
        assert expected[0] <= int(result.min()) and int(result.max()) <= expected[1]


def test_loops_in_loops_end() -> None:
    def nested(depth: int) -> Any:
        if depth == 0:
            return lambda i: (i + 1,)
        inner = nested(depth - 1)
        return lambda i: (while_loop(lambda j: j < 3, inner, (i * 0,))[0] + i,)

    captured = graph_of(lambda x: while_loop(lambda i: i < 10, nested(3), (zero(),)), (ones(1),))
    result = run_passes(captured, Narrow64bit())
    before = graph_of(lambda x: while_loop(lambda i: i < 10, nested(3), (zero(),)), (ones(1),))
    assert compare(before(ones(1)), captured(ones(1))).ok
    assert result.changed


def test_slots_name_everything_that_crosses_an_edge() -> None:
    captured = graph_of(with_scan, (ones(4), ones(4)))
    (node,) = [n for n in captured.gm.graph.nodes if walk.is_higher_order(n)]
    call = take_apart(node)
    assert call is not None and call.length == 5
    carry, row, factor, stacked = call.slots
    assert (carry.carried, carry.result, row.result, factor.result, stacked.result) == (True, 0, None, None, 1)
    assert not stacked.placeholders and [len(s.operands) for s in call.slots] == [1, 1, 1, 0]


def test_an_edge_whose_sides_disagree_breaks_an_invariant() -> None:
    captured = graph_of(with_map, (ones(4), ones(4)))
    (body,) = [s.graph_module for s in walk.scopes(captured.gm) if s.is_body]
    placeholder = next(iter(body.graph.find_nodes(op="placeholder")))
    placeholder.meta["val"] = placeholder.meta["val"].to(torch.int32)
    assert "bodies-agree" in {b.rule for b in invariants.check(captured.gm)}
