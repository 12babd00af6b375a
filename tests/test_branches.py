"""Branches and reads on tensor values: every site seen in one run, either side traced, guards that torch invents."""

from __future__ import annotations

import runpy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nxfx.capture import branches
from nxfx.capture.interception import Session, interception
from nxfx.errors import CaptureError
from nxfx.report import Severity
from nxfx.verification.equivalence import compare

Model = Callable[..., Any]


class Shell(torch.nn.Module):
    """What nxfx.capture.export does; with ``conditions`` it also returns what each branch read, as merging needs it."""

    def __init__(self, fn: Model, session: Session, conditions: bool = False) -> None:
        super().__init__()
        self.fn, self.session, self.conditions = fn, session, conditions

    def forward(self, *args: Any) -> Any:
        with interception(self.session):
            outputs = self.fn(*args)
        return (outputs, [s.condition for s in self.session.sites]) if self.conditions else outputs


def traced(fn: Model, *args: Any, decisions: Sequence[bool] = (), conditions: bool = False) -> tuple[Any, Session]:
    session = Session(decisions=decisions)
    with torch.no_grad():
        program = torch.export.export(Shell(fn, session, conditions), args, strict=False).run_decompositions({})
    return program, session


def lines(sites: Sequence[Any]) -> list[tuple[str, str]]:
    return [(s.kind, s.location.source) for s in sites]


X = torch.arange(4.0)
N = torch.tensor(2)


def every_branch(x: Tensor, n: Tensor) -> Tensor:
    if n > 1:
        x = x + 1
    if (n > 3).any() and not (x > 0).all():
        x = x * 2
    y = x if n == 0 else x + 3
    flag = bool(n > 2)
    x = x + (1 if n != 5 or flag else 2)
    if n > 7:
        x = x - 1
    elif n > 8:
        x = x - 2
    if 0 < n < 9:
        x = x * 3
    if 2 in n[None]:
        x = x + 1
    if torch.equal(n, n + 1) or torch.allclose(x, y):
        x = x - y
    while n > 6:
        n = n - 1
        break
    values = [v for v in (1, 2) if n > v]
    if torch.is_nonzero(n):
        x = x + len(values)
    return x + y


def test_every_site_in_one_run() -> None:
    _, session = traced(every_branch, X, N)
    assert lines(session.sites) == [
        ("if", "if n > 1:"),
        ("if", "if (n > 3).any() and not (x > 0).all():"),
        ("if", "if (n > 3).any() and not (x > 0).all():"),
        ("if", "y = x if n == 0 else x + 3"),
        ("bool", "flag = bool(n > 2)"),
        ("if", "x = x + (1 if n != 5 or flag else 2)"),
        ("if", "if n > 7:"),
        ("if", "if 0 < n < 9:"),
        ("if", "if 0 < n < 9:"),
        ("if", "if 2 in n[None]:"),
        ("equal", "if torch.equal(n, n + 1) or torch.allclose(x, y):"),
        ("while", "while n > 6:"),
        ("if", "values = [v for v in (1, 2) if n > v]"),
        ("if", "values = [v for v in (1, 2) if n > v]"),
        ("if", "if torch.is_nonzero(n):"),
    ]
    assert all(
        s.location.file == __file__ and s.location.function in ("every_branch", "<listcomp>") for s in session.sites
    )
    assert all(s.answer is True and s.condition.dtype is torch.bool and s.condition.ndim == 0 for s in session.sites)
    assert not session.findings and not session.assertions


def test_refusal_lists_every_line_once_with_a_fix() -> None:
    _, session = traced(every_branch, X, N)
    findings = branches.unresolved([session])
    assert {f.code for f in findings} == {"NX401"} and all(f.severity is Severity.ERROR and f.fix for f in findings)
    assert [f.count for f in findings] == [1, 2, 1, 1, 1, 1, 2, 1, 1, 1, 2, 1]
    error = branches.refusal([session], "Model")
    assert isinstance(error, CaptureError) and error.report.findings == findings
    for site in session.sites:
        assert f"{site.location}: {site.location.source}" in str(error)
    assert "torch.where" in str(error)


def two_branches(x: Tensor, n: Tensor) -> Tensor:
    y = x * 2
    if n > 1:
        y = y + 1
        n = n - 5
    if n > 0:
        return y * 10
    y[0] = 7
    return y


@pytest.mark.parametrize("decisions", [(True, True), (True, False), (False, True), (False, False)], ids=str)
def test_decisions_trace_either_side_and_keep_the_condition(decisions: tuple[bool, bool]) -> None:
    program, session = traced(two_branches, X, N, decisions=decisions, conditions=True)
    assert [s.answer for s in session.sites] == list(decisions)
    module, found = program.module(), 0
    for n in range(-3, 12):
        outputs, conditions = module(X, torch.tensor(n))
        if [bool(c) for c in conditions] == list(decisions):
            found += 1
            assert compare(two_branches(X, torch.tensor(n)), outputs).ok, n
    assert found


def test_decisions_that_differ_give_both_sides() -> None:
    """The basis of merging: where(condition, one trace, the other) is the model."""

    def model(x: Tensor, n: Tensor) -> Tensor:
        return x + 1 if n == 1 else x * 3

    yes, session = traced(model, X, N, decisions=[True], conditions=True)
    no, _ = traced(model, X, N, decisions=[False])
    assert len(session.sites) == 1
    for n in (0, 1, 2):
        value, (condition,) = yes.module()(X, torch.tensor(n))
        assert compare(model(X, torch.tensor(n)), torch.where(condition, value, no.module()(X, torch.tensor(n)))).ok


def test_the_condition_is_cloned_before_the_model_writes_it() -> None:
    def model(x: Tensor, n: Tensor) -> Tensor:
        flag = n > 1
        if flag:
            x = x + 1
        flag.fill_(False)
        m = n.clone()
        if m:
            x = x + 1
        m.zero_()
        return x

    program, _ = traced(model, X, N, conditions=True)
    for n in (0, 1, 2):
        _, conditions = program.module()(X, torch.tensor(n))
        assert [bool(c) for c in conditions] == [n > 1, n != 0]


# --- assertions ------------------------------------------------------------------------------------------------------


CHECKS = """
import torch

def checks(x, n):
    assert n > 1, "too small"
    assert not (x < 0).any()
    assert n > 0 and not n > 50, "range"
    torch._assert(n < 9, "too large")
    if n < 0:
        raise ValueError("negative")
    if not (n < 100) or n == 77:
        message = f"n is {n.shape}"
        raise ValueError(message)
    if x.shape[0] == 4 and (
        not n.isfinite()
        or n > 1000
    ):
        raise ValueError("spans lines")
    return x + n
"""


def test_assertions_hold_are_reported_and_do_not_block(tmp_path: Path) -> None:
    file = tmp_path / "checks.py"  # pytest rewrites the assertions of test modules
    file.write_text(CHECKS)
    checks = runpy.run_path(str(file))["checks"]
    program, session = traced(checks, X, N)
    assert session.sites == [] and session.errors == []
    assert [s.location.source for s in session.assertions[:8]] == [
        'assert n > 1, "too small"',
        "assert not (x < 0).any()",
        'assert n > 0 and not n > 50, "range"',
        'assert n > 0 and not n > 50, "range"',
        'torch._assert(n < 9, "too large")',
        "if n < 0:",
        "if not (n < 100) or n == 77:",
        "if not (n < 100) or n == 77:",
    ]
    assert [s.answer for s in session.assertions] == [True, False, True, False, True, False, True, False, True, False]
    assert {(f.code, f.severity) for f in session.findings} == {("NX407", Severity.WARNING)}
    assert compare(checks(X, torch.tensor(3)), program.module()(X, torch.tensor(3))).ok


def test_an_if_that_raises_after_doing_something_is_a_branch() -> None:
    def model(x: Tensor, n: Tensor) -> Tensor:
        if n > 5:
            for _ in range(2):
                x = x + 1
            raise ValueError
        return x

    session = Session(decisions=[False])
    with torch.no_grad():
        torch.export.export(Shell(model, session), (X, N), strict=False)
    assert [s.kind for s in session.sites] == ["if"] and not session.assertions


def test_a_truth_that_goes_through_something_else_is_a_branch(tmp_path: Path) -> None:
    """Otherwise one side of it would be taken for good, under the name of a check."""
    file = tmp_path / "inner.py"
    file.write_text(
        """
def inner(x, n):
    assert (x if n > 1 else -x).shape[0] == 4
    assert sorted([n, n + 1])[0].ndim == 0
    if len([v for v in (1, 2) if n > v]) > 7:
        raise ValueError
    assert str(bool(n > 2))
    assert n not in [n + 1]
    assert bool(n > 1) and all([n > 0, n > 1]) and not any([n > 4])
    return x
"""
    )
    _, session = traced(runpy.run_path(str(file))["inner"], X, N, decisions=[True, True, True, True, True, False])
    assert [s.location.source[:19] for s in session.sites] == [
        "assert (x if n > 1 ",
        "assert sorted([n, n",
        "if len([v for v in ",
        "if len([v for v in ",
        "assert str(bool(n >",
        "assert n not in [n ",
    ]
    assert [s.answer for s in session.assertions] == [True, True, True, False]


def test_a_check_that_the_model_catches_is_a_branch(tmp_path: Path) -> None:
    file = tmp_path / "caught.py"
    file.write_text(
        """
import contextlib
import torch

def validate(n):
    if n > 3:
        raise ValueError("large")

def caught(x, n):
    try:
        validate(n)
        torch._assert(n > 0, "small")
        x = x + 1
    except ValueError:
        x = x - 1
    with contextlib.suppress(AssertionError):
        assert n < 9
    try:
        assert n > 1
    finally:
        x = x * 2
    return x
"""
    )
    _, session = traced(runpy.run_path(str(file))["caught"], X, N, decisions=[False])
    assert [s.location.source for s in session.sites] == ["if n > 3:", 'torch._assert(n > 0, "small")', "assert n < 9"]
    assert [s.location.source for s in session.assertions] == ["assert n > 1"]


# --- loops -----------------------------------------------------------------------------------------------------------


def test_a_while_ends_at_the_cap() -> None:
    def model(x: Tensor, n: Tensor) -> Tensor:
        while n > 0:
            x, n = x + 1, n - 1
        if n == 0:
            x = x * 2
        return x

    session = Session(loop_cap=5)
    with torch.no_grad():
        torch.export.export(Shell(model, session), (X, N), strict=False)
    assert [s.kind for s in session.sites] == ["while"] * 6 + ["if"]
    assert session.sites[5].exhausted and session.sites[5].answer is False
    (loop, _) = branches.unresolved([session])
    assert loop.count == 6 and "torch.where(active" in loop.fix


def test_a_loop_that_no_answer_ends_is_refused() -> None:
    def model(x: Tensor, n: Tensor) -> Tensor:
        while True:
            x = x + 1
            if n > 3:
                continue

    session = Session(loop_cap=2)
    branches_cap = branches._REPEAT_CAP
    branches._REPEAT_CAP = 8
    try:
        with pytest.raises(CaptureError, match="no answer ends this loop"), torch.no_grad():
            torch.export.export(Shell(model, session), (X, N), strict=False)
    finally:
        branches._REPEAT_CAP = branches_cap
    assert [f.code for f in session.errors] == ["NX401"]


def test_one_line_in_many_layers_is_not_a_loop() -> None:
    class Layer(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.sum() > 0:
                x = x + 1
            return x

    layers = torch.nn.ModuleList(Layer() for _ in range(70))

    def model(x: Tensor, n: Tensor) -> Tensor:
        for layer in layers:
            x = layer(x)
        return x

    _, session = traced(model, X, N)
    assert len(session.sites) == 70 and not any(s.exhausted for s in session.sites)


# --- reads -----------------------------------------------------------------------------------------------------------


def test_item_and_tolist_go_on_with_a_symbol() -> None:
    def model(x: Tensor, n: Tensor) -> Tensor:
        return x * n.item() + n[None].tolist()[0] + torch.tensor(3).item()

    program, session = traced(model, X, N)
    assert lines(session.reads) == [
        (k, "return x * n.item() + n[None].tolist()[0] + torch.tensor(3).item()") for k in ("item", "item")
    ]
    assert not session.findings and not session.sites
    assert compare(model(X, torch.tensor(5)), program.module()(X, torch.tensor(5))).ok


def branches_on_items(x: Tensor, n: Tensor) -> Tensor:
    k, most = n.item(), x.max().item()
    if k > 3:
        x = x + 1
    if (n > 2).item():
        x = x * 2
    if not k:
        x = x - 1
    if most * 2 > 0.1:
        x = x + 3
    if k < 0:
        raise ValueError("negative")
    return x + x[:k].sum()


def test_a_branch_on_an_item_is_a_branch_on_the_tensor() -> None:
    """The condition is computed again on the tensor, in Python's arithmetic: doubles and 64-bit integers."""
    program, session = traced(branches_on_items, X, N, decisions=[False, True, True, True], conditions=True)
    assert [s.location.source for s in session.sites] == [
        "if k > 3:",
        "if (n > 2).item():",
        "if not k:",
        "if most * 2 > 0.1:",
    ]
    assert [(s.kind, s.answer) for s in session.assertions] == [("assert", False)]
    assert not session.errors and branches.invented_guards(program) == []
    for n in range(8):
        outputs, conditions = program.module()(X, torch.tensor(n))
        assert [bool(c) for c in conditions] == [n > 3, n > 2, n != 0, True]
        if n == 3:
            assert compare(branches_on_items(X, torch.tensor(n)), outputs, kind="close", max_abs=0).ok


def test_a_float_item_is_compared_in_double() -> None:
    def model(x: Tensor, n: Tensor) -> Tensor:
        return x + 1 if x[0].item() > 0.1 else x

    x = torch.full((4,), 0.1)  # 0.1 in float32 is more than 0.1
    program, _ = traced(model, x, N, conditions=True)
    _, (condition,) = program.module()(x, N)
    assert bool(condition) is (x[0].item() > 0.1) is True


def test_the_watch_on_symbols_ends_with_the_trace() -> None:
    session = Session()
    with torch.no_grad():
        program = torch.export.export(Shell(lambda x, n: x * (n.item() + 1), session), (X, N), strict=False)
    symbol = next(n.meta["val"] for n in program.graph.nodes if "item" in str(n.target))
    assert "evaluate_sym_node" not in vars(symbol.node.shape_env)
    with pytest.raises(Exception, match="data-dependent"):
        bool(symbol > 3)


@pytest.mark.parametrize(
    ("spelled", "model"),
    [
        ("int()", lambda x, n: x + int(n)),
        ("float()", lambda x, n: x + float(n)),
        ("complex()", lambda x, n: x + complex(n)),
        ("range()", lambda x, n: x + sum(range(n))),
        ("list index", lambda x, n: x + [1, 2, 3][n]),
        (".numpy()", lambda x, n: x + n.numpy()),
        ("plain Python number", lambda x, n: x + int(n.item())),
    ],
)
def test_what_cannot_be_answered_is_refused_at_the_line(spelled: str, model: Model) -> None:
    session = Session()
    with pytest.raises(CaptureError) as caught, torch.no_grad():
        torch.export.export(Shell(model, session), (X, N), strict=False)
    (finding,) = session.errors
    assert finding.code == "NX402" and spelled in finding.message and finding.location.file == __file__
    assert finding.location.source.startswith('("') and caught.value.report.findings == [finding]


# --- what is left to torch -------------------------------------------------------------------------------------------


def test_literals_shapes_and_python_values_are_left_to_torch() -> None:
    def model(x: Tensor, n: Tensor) -> Tensor:
        if torch.tensor(True) and not torch.tensor(0):
            x = x + 1
        if x.shape[0] > 2 and x.dtype is torch.float32 and x is not None:
            x = x + 2
        if int(torch.tensor(3)) == 3 and torch.tensor(4.0).item() == 4.0:
            x = x * 2
        torch._assert(x.ndim == 1, "rank")
        return x

    program, session = traced(model, X, N)
    assert not session.sites and not session.assertions and not session.reads
    assert compare(model(X, N), program.module()(X, N)).ok


def test_eager_values_are_left_alone() -> None:
    session = Session()
    with interception(session):
        assert not bool(torch.tensor(False)) and int(N) == 2 and N.item() == 2 and not torch.equal(N, N + 1)
        assert [1, 2, 3][N] == 3 and 2 in N[None]
    assert not session.sites and not session.findings


def test_several_elements_are_ambiguous_as_in_eager() -> None:
    with pytest.raises(RuntimeError, match="ambiguous"):
        traced(lambda x, n: x if x > 1 else n, X, N)


def test_the_location_is_the_users_line_and_names_the_module() -> None:
    class Inner(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.sum() > 0:
                return x
            return -x

    class Outer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = torch.nn.ModuleList([Inner()])

        def forward(self, x: Tensor, n: Tensor) -> Tensor:
            return self.blocks[0](x)

    _, session = traced(Outer(), X, N)
    (site,) = session.sites
    assert (site.location.function, site.location.module) == ("forward", "fn.blocks.0")
    assert site.location == site.innermost and site.location.source == "if x.sum() > 0:"


# --- guards that torch invents ---------------------------------------------------------------------------------------


def exported(fn: Model, *args: Any) -> tuple[Any, Session]:
    session = Session()
    with torch.no_grad():
        program = torch.export.export(Shell(fn, session), args, strict=False)
    return program, session


def stated(x: Tensor, n: Tensor) -> Tensor:
    k = n.item()
    torch._check(k >= 2)
    torch._check(k != 7, lambda: "no sevens")
    torch._check(k <= 9)
    return x + torch.ones(k).sum()


def test_conditions_that_the_model_states_are_its_own() -> None:
    program, session = exported(stated, X, N)
    assert branches.invented_guards(program) == []
    assert branches.invented_guards(program.run_decompositions({})) == []
    branches._STATED.clear()
    assert branches.invented_guards(program) == ["u0 >= 2", "Ne(u0, 7)"]  # as if the model had stated nothing


@pytest.mark.parametrize(
    "model",
    [
        lambda x, n: x + x.nonzero().sum(),
        lambda x, n: x + x[x > 1].sum(),
        lambda x, n: x.repeat_interleave(n.expand(4)),
        lambda x, n: x + torch.ones(n.item()).sum(),
        lambda x, n: x + torch.zeros(4 * n.item()).view(-1, 4).sum(),
        lambda x, n: x * n.item(),
    ],
)
def test_what_the_operators_imply_is_not_invented(model: Model) -> None:
    program, session = exported(model, X, N)
    assert branches.invented_guards(program) == []
    assert branches.invented_guards(program.run_decompositions({})) == []


def test_what_torch_adds_is_listed() -> None:
    """As 2.13's strict export adds ``u6 >= 3`` for ``y[:n] -= 5``: the graph then refuses what eager takes."""

    def model(x: Tensor, n: Tensor) -> Tensor:
        k = n.item()
        torch._check_is_size(k)
        return x + torch.ones(k).sum()

    program, session = exported(model, X, N)
    graph = program.graph_module.graph
    item = next(n for n in graph.nodes if "item" in str(n.target))
    with graph.inserting_after(item):
        guard = graph.call_function(torch.ops.aten._assert_scalar.default, (item, "u0 >= 3"))
    guard.args = (graph.call_function(lambda v: v, (item,)), "u0 >= 3")
    guard.args[0].meta["val"] = item.meta["val"] >= 3
    assert branches.invented_guards(program) == ["u0 >= 3"]


@pytest.mark.skipif(torch.__version__ < "2.13", reason="torch 2.9 cannot capture these at all")
def test_strict_export_of_a_tensor_bound_invents_a_guard() -> None:
    class Model(torch.nn.Module):
        def forward(self, x: Tensor, n: Tensor) -> Tensor:
            y = x.clone()
            y[:n] -= 5
            return y

    program = torch.export.export(Model(), (torch.randn(8), torch.tensor(3)), strict=True)
    guards = branches.invented_guards(program)
    session = Session()
    with torch.no_grad():
        ours = torch.export.export(Shell(Model(), session), (torch.randn(8), torch.tensor(3)), strict=False)
    assert branches.invented_guards(ours) == [] and guards
