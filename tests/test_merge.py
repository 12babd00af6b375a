"""Branches on tensors become data flow: one graph, equal to eager whichever side an input takes; or they stay, and are told why."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import branch_programs
import fuzz
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import nxfx
from nxfx.capture.merging import joints, merge, speculation
from nxfx.capture.merging.proof import Mismatch, Proof
from nxfx.capture.merging.selects import Selects
from nxfx.errors import CaptureError
from nxfx.handoff import xla
from nxfx.report import Kind
from nxfx.verification.equivalence import compare

PASSES = "flag-value-dependence"
X = torch.tensor([1.5, -2.0, 0.25, 3.0])
NASTY = [X, torch.tensor([math.nan, 0.0, -0.0, math.inf]), torch.zeros(4), -X]


class Model(nn.Module):
    """``function(self, x, f)``, with a buffer and a linear layer."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.linear = nn.Linear(4, 4)
        self.register_buffer("state", torch.arange(4.0))

    def forward(self, x: Tensor, f: Tensor) -> Any:
        return self.function(self, x, f)


def flags(count: int) -> list[Tensor]:
    return [torch.tensor(v) for v in itertools.product((True, False), repeat=count)]


def merged(function: Callable[..., Any], count: int, **options: Any) -> nxfx.PreparedModule:
    """``function`` prepared once, and compared with eager for every combination of flags on ordinary and nasty data, twice in a row."""
    model = Model(function)
    prepared = nxfx.prepare(model, (X.clone(), torch.ones(count, dtype=torch.bool)), pipeline=PASSES, **options)
    twin = Model(function)
    twin.load_state_dict(model.state_dict())
    for f, x in itertools.product(flags(count), NASTY):
        theirs, ours = (x.clone(), f.clone()), (x.clone(), f.clone())
        outcome = compare((twin(*theirs), theirs, twin.state), (prepared(*ours), ours, model.state))
        assert outcome.ok, (f, x, str(outcome))
    assert not [f for f in prepared.report.findings if f.code in ("NX401", "NX402")]
    return prepared


def count(prepared: nxfx.PreparedModule, *names: str) -> int:
    return sum(any(n in str(node.target) for n in names) for node in prepared.graph_module.graph.nodes if node.op == "call_function")


def reason(function: Callable[..., Any], number: int = 1, **options: Any) -> str:
    """Why a branch stays."""
    with pytest.raises(CaptureError) as caught:
        nxfx.prepare(Model(function), (X.clone(), torch.ones(number, dtype=torch.bool)), pipeline=PASSES, **options)
    (finding,) = [f for f in caught.value.report.findings if "It stays, since" in f.message]
    assert finding.code == "NX401" and finding.location.file == __file__ and finding.fix
    return finding.message.partition("It stays, since ")[2]


# --- shapes of control flow ------------------------------------------------------------------------------------------


def if_else(m: Any, x: Tensor, f: Tensor) -> Tensor:
    y = x + 1
    if f[0]:
        y = y * 2
        y = y.abs()
    else:
        y = y - 3
    return torch.relu(y)


def early_return(m: Any, x: Tensor, f: Tensor) -> Tensor:
    if f[0]:
        return x
    if f[1]:
        return x / 0
    return m.linear(x)


def elif_chain(m: Any, x: Tensor, f: Tensor) -> Tensor:
    if f[0]:
        y = x.sqrt()
    elif f[1]:
        y = x.log()
    elif f[2]:
        y = 1 / x
    else:
        y = x
    return m.linear(y).sum() + y


def nested(m: Any, x: Tensor, f: Tensor) -> Tensor:
    if f[0]:
        if f[1]:
            if f[2]:
                x = x.exp()
            x = x + 1
        else:
            return -x
    return x * 3


def conditional_expression(m: Any, x: Tensor, f: Tensor) -> Tensor:
    return (x if f[0] else -x) + (2.0 if f[1] else 3.0)


def and_or_not(m: Any, x: Tensor, f: Tensor) -> Tensor:
    return x + 1 if f[0] and (not f[1] or f[2]) else x * 2


def on_a_merged_value(m: Any, x: Tensor, f: Tensor) -> Tensor:
    y = x * 2 if f[0] else x - 1
    if y.sum() > 0:
        y = y + 10
    if y[0] > 1 and f[1]:
        y = y / 3
    return y


def bounded_loop(m: Any, x: Tensor, f: Tensor) -> Tensor:
    i = 0
    while i < 3 and (x.abs() < 4).any():
        x = x * 2
        i += 1
    for j in range(3):
        if f[j]:
            break
        x = x + j
    return x


def loop_with_continue(m: Any, x: Tensor, f: Tensor) -> Tensor:
    total = torch.zeros_like(x)
    for i in range(3):
        if f[i]:
            continue
        total = total + x * (i + 1)
    return total


def helper(x: Tensor, flag: Tensor) -> Tensor:
    if flag:
        scale = x.abs().max()
        return x / scale
    return x + 1


def one_helper_twice(m: Any, x: Tensor, f: Tensor) -> Tensor:
    x = helper(x, f[0])
    return helper(x * 2, f[1])


def a_side_that_does_nothing(m: Any, x: Tensor, f: Tensor) -> Tensor:
    residual = x
    if not f[0]:
        x = m.linear(x)
    return x + residual


def python_values(m: Any, x: Tensor, f: Tensor) -> Tensor:
    k, name = 1.0, "a"
    if f[0]:
        k, name = 2.0, "b"
    if f[1]:
        x = x * k
    return x + (1 if name == "b" else 2)


def appended_lists(m: Any, x: Tensor, f: Tensor) -> Tensor:
    parts = [x]
    if f[0]:
        parts.append(x * 2)
    if f[1]:
        parts.append(x * 3)
    return torch.stack(parts).sum(0)


def caught_exceptions(m: Any, x: Tensor, f: Tensor) -> Tensor:
    try:
        if f[0]:
            raise ValueError
        x = x + 1
    except ValueError:
        x = x * 5
    finally:
        x = x - 2
    return x


CONTROL_FLOW = {
    if_else: 1, early_return: 2, elif_chain: 3, nested: 3, conditional_expression: 2, and_or_not: 3, on_a_merged_value: 2, bounded_loop: 3,
    loop_with_continue: 3, one_helper_twice: 2, a_side_that_does_nothing: 1, python_values: 2, appended_lists: 2, caught_exceptions: 1,
}  # fmt: skip


@pytest.mark.parametrize("function", CONTROL_FLOW, ids=lambda f: f.__name__)
def test_control_flow(function: Callable[..., Any]) -> None:
    prepared = merged(function, CONTROL_FLOW[function])
    records = [r for r in prepared.report.rewrites if r.rule == "branch.both-sides"]
    assert records and all(r.kind is Kind.EXACT and r.location.file == __file__ for r in records)
    assert all(any(word in r.location.source for word in ("f[", "any", "sum", "flag")) for r in records)


@pytest.mark.xla
@pytest.mark.parametrize("function", CONTROL_FLOW, ids=lambda f: f.__name__)
def test_xla_traces_the_merged_graph_without_running_it(function: Callable[..., Any]) -> None:
    """Where the model itself makes the trace run what it has, to learn which side to follow."""
    pytest.importorskip("torch_xla")
    model, args = Model(function), (X.clone(), torch.ones(CONTROL_FLOW[function], dtype=torch.bool))
    prepared = nxfx.prepare(model, args)
    xla.lower(prepared)  # any execution raises
    device = xla.torch_xla().device()
    moved = [a.to(device) for a in args]
    with xla._no_execution(xla.torch_xla()), pytest.raises(RuntimeError, match="execution"):
        model.to(device)(moved[0], ~~moved[1])


# --- memory ----------------------------------------------------------------------------------------------------------


def writes_in_both_sides(m: Any, x: Tensor, f: Tensor) -> Tensor:
    if f[0]:
        m.state.add_(x)
        x.mul_(2)
    else:
        m.state.zero_()
    m.state[1:] += 1
    return x + m.state


def condition_written_later(m: Any, x: Tensor, f: Tensor) -> Tensor:
    flag = f[0]
    if flag:
        x = x + 1
    f.fill_(False)
    if flag:
        x = x * 100
    return x


def view_of_either(m: Any, x: Tensor, f: Tensor) -> Tensor:
    a, b = x * 2, x + 1
    v = a[1:] if f[0] else b[1:]
    v.mul_(3)
    return a + b


def alias_or_copy(m: Any, x: Tensor, f: Tensor) -> Tensor:
    y = x * 1
    z = y
    if f[0]:
        z = y.clone()
    if f[1]:
        z.add_(5)
    return y + z


def buffer_rebound(m: Any, x: Tensor, f: Tensor) -> Tensor:
    if f[0]:
        m.state = m.state + x
    if f[1]:
        m.state = m.state.flip(0)
    return m.state * 1


def input_or_result(m: Any, x: Tensor, f: Tensor) -> list[Tensor]:
    y = x if f[0] else x * 2
    if f[1]:
        x.fill_(7)
    return [y, x]


MEMORY = {writes_in_both_sides: 1, condition_written_later: 1, view_of_either: 1, alias_or_copy: 2, buffer_rebound: 2, input_or_result: 2}


@pytest.mark.parametrize("function", MEMORY, ids=lambda f: f.__name__)
def test_memory(function: Callable[..., Any]) -> None:
    merged(function, MEMORY[function])


# --- what must not be seen of the side that is not taken -------------------------------------------------------------


def test_an_index_of_the_other_side_never_raises() -> None:
    def model(m: Any, x: Tensor, f: Tensor) -> Tensor:
        position = (x[0].nan_to_num(0, 9, -9) * 100).long()
        if position.abs() < 4:
            y = x.index_select(0, position[None]) + x[position] + x.gather(0, position.abs()[None])
            x = x.index_put((position[None],), y)
        return x

    merged(model, 1)


def test_an_integer_division_of_the_other_side_never_raises() -> None:
    def model(m: Any, x: Tensor, f: Tensor) -> Tensor:
        n = x.nan_to_num(0, 9, -9).long()
        if (n != 0).all():
            return 7 // n + 7 % n
        return n

    merged(model, 1)


def test_a_side_that_raises_is_like_an_assertion() -> None:
    def fail() -> None:
        raise ValueError("no")

    def model(m: Any, x: Tensor, f: Tensor) -> Tensor:
        if f[0]:
            x = x + 1
        if f[1]:
            fail()
        return x * 2

    prepared = nxfx.prepare(Model(model), (X, torch.tensor([True, False])), pipeline=PASSES)
    (check,) = [f for f in prepared.report.findings if f.code == "NX407"]
    assert check.location.source == "if f[1]:"
    for value in (True, False):
        arguments = (X, torch.tensor([value, False]))
        assert compare(Model(model)(*arguments), prepared(*arguments)).ok


def a_value_where_a_mask_says(m: Any, x: Tensor, f: Tensor) -> Tensor:
    mask = x > 0
    if mask.any():
        x = x.clone()
        x[mask] = 7
    y = torch.stack([x, x + 1], 1)
    if f[0]:
        y[mask] = m.state[:2]
    return y


def normalised(m: Any, x: Tensor, f: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x, dim=0) if f[0] else x


@pytest.mark.parametrize("function", [a_value_where_a_mask_says, normalised], ids=lambda f: f.__name__)
def test_what_never_raises_may_run_for_nothing(function: Callable[..., Any]) -> None:
    merged(function, 1)


def as_many_values_as_the_mask_takes(m: Any, x: Tensor, f: Tensor) -> Tensor:
    if f[0]:
        x = x.clone()
        x[x > 0] = m.state[:3]
    return x


def test_a_count_that_must_fit_a_mask_stays() -> None:
    """Eager raises unless three elements are taken: for nothing it must not."""
    assert "one side gives a size that depends on data (index_put)" in reason(as_many_values_as_the_mask_takes)


# --- random numbers --------------------------------------------------------------------------------------------------


def test_random_numbers_after_a_branch_are_drawn_once() -> None:
    def model(m: Any, x: Tensor, f: Tensor) -> Tensor:
        x = x + torch.rand(4)
        if f[0]:
            x = x * 2
        return x + torch.rand_like(x) * torch.rand(4)

    prepared = nxfx.prepare(Model(model), (X, torch.tensor([True])), pipeline=PASSES)
    assert count(prepared, "rand") == 3
    for value in (True, False):
        torch.manual_seed(3)
        expected, after = Model(model)(X, torch.tensor([value])), None
        torch.manual_seed(3)
        expected, after = model(None, X, torch.tensor([value])), torch.rand(1)
        torch.manual_seed(3)
        assert compare(expected, prepared(X, torch.tensor([value]))).ok and torch.equal(torch.rand(1), after)


def test_random_numbers_after_an_early_side_are_drawn_once() -> None:
    """The path with every answer True comes to them last: what it would draw itself is not drawn as well."""

    def model(m: Any, x: Tensor, f: Tensor) -> list[Tensor]:
        scale = 1.0
        if f[0]:
            scale = 2.0
            if f[1]:
                x = x + 1
        return [x * scale, torch.rand(2), torch.rand(2)]

    prepared = nxfx.prepare(Model(model), (X, torch.tensor([True, True])), pipeline=PASSES)
    assert count(prepared, "rand") == 2
    for f in flags(2):
        torch.manual_seed(3)
        expected, after = model(None, X, f), torch.rand(1)
        torch.manual_seed(3)
        assert compare(expected, prepared(X, f)).ok and torch.equal(torch.rand(1), after)


def test_random_numbers_on_one_side_stay() -> None:
    def model(m: Any, x: Tensor, f: Tensor) -> Tensor:
        if f[0]:
            x = x + torch.rand(4)
        return x

    assert "one side draws random numbers (rand)" in reason(model)


# --- sides of different dtypes ---------------------------------------------------------------------------------------


def tables_of_two_dtypes(m: Any, x: Tensor, f: Tensor, low: torch.dtype) -> Tensor:
    table = x.exp() if f[0] else x.to(low).exp()
    return (table.float() * 1.1).cos()


def tables_of_two_dtypes_rounded(m: Any, x: Tensor, f: Tensor, low: torch.dtype) -> Tensor:
    table = x.exp() if f[0] else x.to(low).exp()
    return (table.to(low) * 1.1).cos()


def buffer_overwritten_with_another_dtype(m: Any, x: Tensor, f: Tensor, low: torch.dtype) -> Tensor:
    state = m.state.to(low)
    if f[0]:
        state.copy_(x.exp())
    if f[1]:
        m.state.copy_(state * 1.1)
    return (state * 1.1).cos() + m.state


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "function", [tables_of_two_dtypes, tables_of_two_dtypes_rounded, buffer_overwritten_with_another_dtype], ids=lambda f: f.__name__
)
def test_sides_of_different_dtypes_meet_where_each_is_cast(function: Callable[..., Any], low: torch.dtype) -> None:
    """One side is float32 and the other is not: each is read as its own path has it, never promoted to the other's dtype."""
    merged(lambda m, x, f: function(m, x, f, low), 2)


# --- what stays, and why ---------------------------------------------------------------------------------------------


def other_shape(m: Any, x: Tensor, f: Tensor) -> Tensor:
    return x if f[0] else x[:2]


def other_dtype(m: Any, x: Tensor, f: Tensor) -> Tensor:
    return x if f[0] else x.double()


def other_structure(m: Any, x: Tensor, f: Tensor) -> Any:
    return [x, x] if f[0] else [x]


def other_python_value(m: Any, x: Tensor, f: Tensor) -> Any:
    return (x, "a") if f[0] else (x, "b")


def attribute(m: Any, x: Tensor, f: Tensor) -> Any:
    if f[0]:
        m.count = 1
    return x


def number_from_a_side(m: Any, x: Tensor, f: Tensor) -> Any:
    if f[0]:
        x = x * float(x[0])
    return x


def singular(m: Any, x: Tensor, f: Tensor) -> Any:
    return torch.linalg.inv(x.view(2, 2)) if f[0] else x.view(2, 2)


STAYS = {
    other_shape: "float32[4] and float32[2]", other_dtype: "float32[4] and float64[4]", other_structure: "a list of 2 and a list of 1",
    other_python_value: "return 'a' and 'b'", attribute: "Python attribute 'count'", singular: "linalg_inv",
}  # fmt: skip


@pytest.mark.parametrize("function", STAYS, ids=lambda f: f.__name__)
def test_what_has_no_data_flow_form_stays_and_says_why(function: Callable[..., Any]) -> None:
    assert STAYS[function] in reason(function)


def test_the_cap_counts_traces_and_can_be_raised() -> None:
    def model(m: Any, x: Tensor, f: Tensor) -> Tensor:
        for i in range(5):
            if f[i]:
                x = x + i
        return x

    assert "more than the 4 traces that are allowed: pass max_traces=12" in reason(model, 5, max_traces=4)
    assert "more than the 1 traces" in reason(model, 5, max_traces=1)
    merged(model, 5, max_traces=6)


# --- what Python hides where paths meet ------------------------------------------------------------------------------


def rows_of_either(m: Any, x: Tensor, f: Tensor) -> Tensor:
    """The rows to come are held by the loop alone, and the path on which every answer is True never uses one."""
    rows = torch.stack([x, x * 2])
    if f[0]:
        rows = rows + 5
    total, i = x * 0, 1
    for row in rows:
        if f[i]:
            i += 1
            continue
        i += 1
        total = total + row
    return total


def number_on_the_stack(m: Any, x: Tensor, f: Tensor) -> Tensor:
    def number(flag: Tensor) -> int:
        return 2 if flag else 3

    return x * (number(f[0]) + number(f[1]) * number(f[2]))


def views_of_a_tensor_without_a_name(m: Any, x: Tensor, f: Tensor) -> Tensor:
    a, b = (x * 1).chunk(2)
    if f[0]:
        b.mul_(3)
    if not f[1]:
        a.add_(1)
    return torch.cat([a, b, a])


@pytest.mark.parametrize("function", [rows_of_either, number_on_the_stack, views_of_a_tensor_without_a_name], ids=lambda f: f.__name__)
def test_what_python_hides_is_not_taken_to_be_the_same(function: Callable[..., Any]) -> None:
    merged(function, 3)


# --- where paths meet more than once ---------------------------------------------------------------------------------


def kept_over_two_joints(m: Any, x: Tensor, f: Tensor) -> list[Tensor]:
    a, b = x * 2, x + 1
    if f[0]:
        b, a = a, m.linear(a)
    x = x * 3
    if f[1]:
        b, a = a, m.linear(a)
    return [a, b, x]


def one_constant_twice(m: Any, x: Tensor, f: Tensor) -> Tensor:
    x = x + torch.tensor([1.0, 2.0, 3.0, 4.0]) if f[0] else x * 2
    x = x * torch.tensor([1.0, 2.0, 3.0, 4.0])
    return x.flip(0) if f[1] else x


@pytest.mark.parametrize("function", [kept_over_two_joints, one_constant_twice], ids=lambda f: f.__name__)
def test_branches_that_meet_again_take_one_trace_each(function: Callable[..., Any]) -> None:
    merged(function, 2, max_traces=3)


def aliased_and_written_on_one_side(m: Any, x: Tensor, f: Tensor) -> Tensor:
    """Whether the write at the end changes y is decided at the start, and the path with every answer True does not write."""
    y = x * 1
    z = y
    if f[0]:
        z = y.clone()
    if f[1]:
        x = x + 1
    if f[2]:
        x = x / 2
    if not f[3]:
        z.add_(5)
    return y + z + x


def test_paths_that_differ_later_are_told_apart_where_they_met_and_there_only() -> None:
    """One and the same for each value of f[0]; following all paths takes sixteen traces."""
    merged(aliased_and_written_on_one_side, 4, max_traces=8)


def permuted(a: Tensor, flag: Tensor) -> Tensor:
    if flag:
        a = a[torch.tensor([3, 1, 0, 2])]
        return a * 2
    return a + a


def one_helper_on_both_sides(m: Any, x: Tensor, f: Tensor) -> Tensor:
    """What the helper reads is chosen between the sides as well, and what it does on either is made safe."""
    return permuted(x, f[1]) if f[0] else permuted(x - 1, f[2])


def helper_after_helper(m: Any, x: Tensor, f: Tensor) -> Tensor:
    if f[0]:
        y = permuted(x, f[1])
    elif f[2]:
        y = permuted(x + 1, f[1])
    else:
        y = permuted(x + 1, f[2])
    return y / 2


@pytest.mark.parametrize("function", [one_helper_on_both_sides, helper_after_helper], ids=lambda f: f.__name__)
def test_conditions_are_chosen_between_like_values(function: Callable[..., Any]) -> None:
    merged(function, 3)


# --- the proof refuses what is wrong ---------------------------------------------------------------------------------


def planted(m: Any, x: Tensor, f: Tensor) -> list[Tensor]:
    y, z = x * 3, x - 7
    if f[0]:
        y = y.flip(0)
        m.state.add_(y)
    elif f[1]:
        y, z = z, y
    if f[2]:
        y = y + x[torch.tensor([3, 1, 0, 2])].exp()
    return [y, z, torch.rand(2), torch.rand(2)]


def _choices(selects: Selects) -> list[torch.fx.Node]:
    return [n for n in selects.graph.nodes if n in selects.chosen]


def swapped_sides(selects: Selects) -> None:
    node = _choices(selects)[0]
    condition, yes, no = node.args
    node.args = (condition, no, yes)


def another_condition(selects: Selects) -> None:
    for node in _choices(selects):
        if node.args[0] is selects.conditions[0]:
            node.update_arg(0, selects.conditions[2])


def a_condition_that_is_not_always_asked(selects: Selects) -> None:
    """On a path that never asks it, it holds whatever it happens to hold."""
    output = selects.output.args[0]
    index, node = next((i, n) for i, n in enumerate(output) if "select.int" not in str(n.target))
    with selects.build.before(selects.output, node):
        wrong = selects.build.call(torch.ops.aten.neg.default, node)
        chosen = selects.build.call(torch.ops.aten.where.self, selects.conditions[1], node, wrong)
    selects.chosen[chosen] = (selects.conditions[1], node, wrong)
    selects.output.args = ((*output[:index], chosen, *output[index + 1 :]),)


def dropped_write(selects: Selects) -> None:
    (state,) = [n for n in selects.graph.nodes if n.op == "get_attr" and n.target == "state"]
    output = list(selects.output.args[0])
    output[4] = state
    selects.output.args = (tuple(output),)


def another_number(selects: Selects) -> None:
    node = next(n for n in selects.graph.nodes if n.target is torch.ops.aten.sub.Tensor)
    node.update_arg(1, 8)


def outputs_exchanged(selects: Selects) -> None:
    first, second, *rest = selects.output.args[0]
    selects.output.args = ((second, first, *rest),)


def draws_exchanged(selects: Selects) -> None:
    first, second = [n for n in selects.graph.nodes if n.target is torch.ops.aten.rand.default]
    first.prepend(second)


def made_safe_where_it_is_needed(selects: Selects) -> None:
    (node,) = selects.safe
    condition, operand, fine = node.args
    node.args = (condition, fine, operand)


FAULTS = [
    swapped_sides, another_condition, a_condition_that_is_not_always_asked, dropped_write, another_number, outputs_exchanged, draws_exchanged,
    made_safe_where_it_is_needed,
]  # fmt: skip


def refused(function: Callable[..., Any], number: int, **options: Any) -> str:
    """Why none of the branches goes."""
    with pytest.raises(CaptureError) as caught:
        nxfx.prepare(Model(function), (X.clone(), torch.ones(number, dtype=torch.bool)), pipeline=PASSES, **options)
    findings = caught.value.report.findings
    assert all(f.code == "NX401" and f.location.file == __file__ for f in findings)
    (why,) = {f.message.partition("It stays, since ")[2] for f in findings}
    return why


@pytest.fixture(scope="module")
def verdicts() -> dict[Any, str]:
    """What the proof says of the merged graph with each fault, one after the other; ``"proved"`` where it sees nothing."""
    found: dict[Any, str] = {}

    class Planting(Proof):
        def check(self, selects: Selects, exploration: Any) -> None:
            for fault in FAULTS:
                with _undone(selects):
                    fault(selects)
                    try:
                        super().check(selects, exploration)
                        found[fault] = "proved"
                    except Mismatch as wrong:
                        found[fault] = str(wrong)
            super().check(selects, exploration)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merge, "Proof", Planting)
        nxfx.prepare(Model(planted), (X.clone(), torch.ones(3, dtype=torch.bool)), pipeline=PASSES)
    return found


@contextlib.contextmanager
def _undone(selects: Selects) -> Iterator[None]:
    """What is done to the graph inside is undone."""
    before = [(node, node.args, node.kwargs) for node in selects.graph.nodes if node.op != "output"]
    returned = selects.output.args
    yield
    selects.output.args = returned
    for node, args, kwargs in before:
        node.args, node.kwargs = args, kwargs
        selects.output.prepend(node)
    known = {node for node, _, _ in before} | {selects.output}
    for node in [n for n in reversed(selects.graph.nodes) if n not in known]:
        selects.chosen.pop(node, None)
        selects.graph.erase_node(node)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_a_wrong_merge_is_not_proved(fault: Callable[[Selects], None], verdicts: dict[Any, str]) -> None:
    assert verdicts[fault].startswith(("output", "buffer", "what is read"))


def test_what_is_not_proved_is_refused_with_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    made_safe = speculation.make_safe

    def make_safe(selects: Selects, training: bool) -> None:
        made_safe(selects, training)
        swapped_sides(selects)

    monkeypatch.setattr(speculation, "make_safe", make_safe)
    assert "it is not proved that one graph computes what each side does" in refused(if_else, 1)


def test_a_wrong_joint_is_not_proved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where two paths meet, one tensor is taken for another: the paths are followed one by one, which more traces are needed for."""
    joined = joints.joined

    def mistaken(*args: Any) -> Any:
        found = joined(*args)
        return dict(zip(found, reversed(found.values()), strict=True))

    assert merged(kept_over_two_joints, 2, max_traces=3)
    monkeypatch.setattr(joints, "joined", mistaken)
    assert "more than the 3 traces" in refused(kept_over_two_joints, 2, max_traces=3)
    merged(kept_over_two_joints, 2)


# --- size ------------------------------------------------------------------------------------------------------------


def _growth(k: int, python_state: bool) -> int:
    def model(m: Any, x: Tensor, f: Tensor) -> Tensor:
        scale = 1.0
        for i in range(k):
            if f[i]:
                x = x * 2 + i
                scale = 2.0 if python_state else 1.0
            x = torch.relu(m.linear(x)) - 1
        return x * scale

    prepared = nxfx.prepare(Model(model), (X, torch.ones(k, dtype=torch.bool)), pipeline=PASSES, max_traces=64)
    return len(prepared.graph_module.graph.nodes)


def test_nodes_grow_by_what_the_sides_hold() -> None:
    """k branches that meet again: a straight line, and k + 1 traces."""
    nodes = [_growth(k, python_state=False) for k in range(1, 7)]
    steps = [b - a for a, b in itertools.pairwise(nodes)]
    assert max(steps) == min(steps) < 12, nodes


def test_paths_that_python_keeps_apart_share_what_they_have_in_common() -> None:
    """Sixteen paths followed one by one make no sixteen copies, nor two."""
    assert _growth(4, python_state=True) < 2 * _growth(4, python_state=False)


# --- training --------------------------------------------------------------------------------------------------------


def divided_by_nothing(y: Tensor, f: Tensor) -> Tensor:
    return y / (y - y.detach()).sum() if f[0] else y


def divided_by_its_norm(y: Tensor, f: Tensor) -> Tensor:
    """What is square-rooted is made inside the side, of finite values."""
    if f[0]:
        z = y * 0
        return y / z.norm()
    return y * 2


def nested_roots(y: Tensor, f: Tensor) -> Tensor:
    z = y - y.detach()
    if f[0]:
        if f[1]:
            return z**0.5
        return torch.acos(z + 1)
    return y.exp()


def early_return_then_log(y: Tensor, f: Tensor) -> Tensor:
    if not f[0]:
        return y
    z = y - y.detach()
    return z.log() if f[1] else torch.atan2(z, z)


def written_root(y: Tensor, f: Tensor) -> Tensor:
    z = y.clone()
    if f[0]:
        z[1:] = (y - y.detach())[1:].sqrt()
    return z


SINGULAR = [divided_by_nothing, divided_by_its_norm, nested_roots, early_return_then_log, written_root]


@pytest.mark.parametrize("function", SINGULAR, ids=lambda f: f.__name__)
def test_gradients_equal_eagers_on_every_path(function: Callable[..., Any]) -> None:
    def model(m: Any, x: Tensor, f: Tensor) -> Tensor:
        return function(m.linear(x), f)  # type: ignore[no-any-return]

    twin = Model(model)
    prepared = nxfx.prepare(copy.deepcopy(twin), (X, torch.tensor([True, True])), training=True)
    finite = []
    for f in flags(2):
        grads = []
        for m in (twin, prepared):
            m.zero_grad()
            m(X, f).sum().backward()
            grads.append([p.grad.clone() for p in m.parameters()])
        assert compare(grads[0], grads[1]).ok, f
        finite.append(all(torch.isfinite(g).all() for g in grads[0]))
    assert any(finite) and not all(finite)  # the singular side is what would spoil the other


@pytest.mark.parametrize("name", ["sqrt", "log", "reciprocal"])
def test_the_gradient_of_the_other_side_does_not_come_through(name: str) -> None:
    def model(m: Any, x: Tensor, f: Tensor) -> Tensor:
        y = m.linear(x)
        if f[0]:
            return getattr(y - y.detach(), name)() * m.state
        return y * 2

    twin = Model(model)
    prepared = nxfx.prepare(copy.deepcopy(twin), (X, torch.tensor([True])), pipeline=PASSES, training=True)
    grads = []
    for m in (twin, prepared):
        m.zero_grad()
        m(X, torch.tensor([False])).sum().backward()
        grads.append([p.grad for p in m.parameters()])
    assert all(torch.isfinite(g).all() for g in grads[1]) and compare(grads[0], grads[1]).ok


# --- random programs -------------------------------------------------------------------------------------------------


def run_programs(seeds: range) -> Counter[str]:
    figures: Counter[str] = Counter()
    for seed in seeds:
        wrong = fuzz.check_branches(seed, figures)
        assert wrong is None, f"seed {seed}: {wrong}\n{fuzz.described('branches', seed)}"
    return figures


def check_program(program: branch_programs.Program, seed: int) -> None:
    """One capture of it equals eager on every path, and every branch is gone."""
    figures: Counter[str] = Counter()
    wrong = fuzz.check_branches(seed, figures, program)
    assert wrong is None and not figures["not captured"], f"{wrong or 'refused'}\n{program}"


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(st.integers(0, 2**32))
def test_random_programs_on_every_path(seed: int) -> None:
    """ifs nested to three, elif, early returns, loops, writes to buffers, inputs and views; results, inputs and buffers compared."""
    check_program(branch_programs.generate(random.Random(seed), most_flags=3), seed)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(st.integers(0, 2**32))
def test_larger_random_programs_on_every_path(seed: int) -> None:
    check_program(branch_programs.generate(random.Random(seed)), seed)


@pytest.mark.parametrize("seed", [35, 5119])
def test_programs_that_were_not_proved_before_are_merged(seed: int) -> None:
    assert run_programs(range(seed, seed + 1))["not captured"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", [5023, 5045, 5092, 5105])
def test_more_programs_that_were_not_proved_before_are_merged(seed: int) -> None:
    assert run_programs(range(seed, seed + 1))["not captured"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("block", range(6))
def test_more_random_programs_on_every_path(block: int) -> None:
    figures = run_programs(range(10 * block, 10 * block + 10))
    assert figures["branches removed"] > 10 and not figures["not captured"]


def test_the_programs_are_what_they_should_be() -> None:
    text = "".join(str(branch_programs.generate(random.Random(seed))) for seed in range(60))
    for construct in ("elif", "else", "return", "self.state", "x.mul_", "break", "self.helper", "parts.append", "                if "):
        assert construct in text
