"""The pipeline as data, and the engine that runs it: order, options, bodies, verification, errors."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import Any

import pytest
import torch
from harness import graph_of
from torch import fx, nn

import nxfx
from nxfx import pipeline as engine
from nxfx.errors import PassError, UsageError
from nxfx.graph import invariants, meta, walk
from nxfx.graph.builder import NodeBuilder, refresh
from nxfx.pipeline import Pass, PassContext, PassResult, Pipeline
from nxfx.report import Kind
from nxfx.verification.equivalence import compare

aten = torch.ops.aten
OURS = [
    "mask-slice-writes", "lift-int-casts", "complex-to-real", "narrow-64bit", "exact-integer-sums", "flag-value-dependence", "finite-masks",
    "check-constraints",
]  # fmt: skip


@dataclass(frozen=True)
class Knobs:
    """One option of each type."""

    flag: bool = False
    count: int = 3
    factor: float = 0.5
    mode: str = "soft"

    def __post_init__(self) -> None:
        if self.mode not in ("soft", "hard"):
            raise ValueError(f"option 'mode' is soft or hard, not {self.mode!r}")


class Idle(Pass):
    """Does nothing, but can be told to do it in several ways."""

    name = "idle"
    Options = Knobs

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> PassResult:
        return PassResult()


class Second(Idle):
    name = "second"
    Options = engine.NoOptions
    after = ("idle",)


class Needy(Idle):
    name = "needy"
    Options = engine.NoOptions
    requires = ("idle",)


class Acts(Pass):
    """Runs ``edit`` on the graph and reports a change."""

    name = "acts"

    def __init__(self, edit: Callable[[fx.GraphModule], None], *targets: Any, changed: bool = True) -> None:
        super().__init__()
        self.edit, self.changed, self.seen = edit, changed, []
        if targets:
            self.targets = frozenset(targets)  # type: ignore[misc]

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> PassResult:
        self.seen.append((graph_module, context))
        self.edit(graph_module)
        return PassResult(changed=self.changed)


def nothing(graph_module: fx.GraphModule) -> None:
    pass


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The passes of this file stand in the registry."""
    own = {c.name: c for c in (Idle, Second, Needy)}
    everything = {**engine.available_passes(), **own}  # as if installed: they are in the default pipeline too
    monkeypatch.setattr(engine, "available_passes", lambda: everything)
    yield


# -- a pipeline is data -----------------------------------------------------------------------------------------------


def test_default_holds_our_passes_in_order() -> None:
    assert Pipeline.default().names[: len(OURS)] == OURS
    assert Pipeline.default("inf2") == Pipeline.default()
    with pytest.raises(UsageError, match="trn2"):
        Pipeline.default("trn22")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "default",
        "idle",
        "idle,second",
        "idle{flag=on}",
        "idle{count=-7;factor=1e-09;mode=hard}",
        " idle { flag = yes , count = 4 } , second , ",
        "idle{}",
        "idle{mode=hard},mask-slice-writes{multiply=never},narrow-64bit{mode=proved;fp64=narrow}",
    ],
)
def test_text_round_trip(registered: None, text: str) -> None:
    pipeline = Pipeline.parse(text)
    again = Pipeline.parse(str(pipeline))
    assert again == pipeline and hash(again) == hash(pipeline) and again.names == pipeline.names
    assert [s.options for s in again] == [s.options for s in pipeline]
    assert eval(repr(pipeline), {"Pipeline": Pipeline}) == pipeline


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("flag=on;count=5", Knobs(True, 5)),
        ("flag=TRUE,count=5", Knobs(True, 5)),
        ("flag=0", Knobs(False)),
        ("factor=2", Knobs(factor=2.0)),
        ("mode=hard;;", Knobs(mode="hard")),
    ],
)
def test_options_are_parsed_as_their_types(registered: None, options: str, expected: Knobs) -> None:
    (step,) = Pipeline.parse(f"idle{{{options}}}")
    assert step.options == expected
    assert all(type(getattr(step.options, f.name)) is type(f.default) for f in dataclasses.fields(Knobs))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("idel", "unknown pass 'idel'. Did you mean 'idle'"),
        ("narrow64bit", "Did you mean 'narrow-64bit'"),
        ("zzz", "Available: .*narrow-64bit"),
        ("idle{flga=on}", "has no option 'flga'. Did you mean 'flag'"),
        ("idle{zzz=on}", "It has: flag, count, factor, mode"),
        ("second{x=1}", "It has: none"),
        ("idle{flag=maybe}", "wants on or off, not 'maybe'"),
        ("idle{count=many}", "wants a number, not 'many'"),
        ("idle{count=1.5}", "wants a number, not '1.5'"),
        ("idle{mode=medium}", "soft or hard, not 'medium'"),
        ("idle{flag}", "write option=value, not 'flag'"),
        ("idle{flag=on;flag=off}", "'flag' is given twice"),
        ("idle{flag=on", "cannot read the pipeline at 'idle{flag=on'"),
        ("idle second", "cannot read the pipeline at 'idle second'"),
        (",idle", "cannot read the pipeline"),
        ("idle,idle{flag=on}", "'idle' stands twice"),
        ("default,second", "'second' stands twice"),
        ("default,narrow-64bit", "'narrow-64bit' stands twice"),
        ("default{mode=hard}", "unknown pass 'default'"),
        ("mask-slice-writes{multiply=sometimes}", "not 'sometimes'"),
        ("narrow-64bit{mode=sometimes}", "not 'sometimes'"),
    ],
)
def test_mistakes_in_the_text_are_told_with_the_nearest_name(registered: None, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Pipeline.parse(text)


def test_edits_give_new_pipelines() -> None:
    default = Pipeline.default()
    before = str(default)
    assert "narrow-64bit" not in default.without("narrow-64bit").names
    assert default.without("narrow-64bit", "lift-int-casts").names == [n for n in OURS if n not in ("narrow-64bit", "lift-int-casts")]
    assert default.only("narrow-64bit", "mask-slice-writes").names == ["mask-slice-writes", "narrow-64bit"]
    changed = default.with_options("mask-slice-writes", multiply="never")
    assert changed.steps[0].options.multiply == "never" and default.steps[0].options.multiply == "proved"
    assert Pipeline([Idle]).with_pass(Second).names == ["idle", "second"]
    assert default.with_pass(Idle, before="lift-int-casts").names[1] == "idle"
    assert default.with_pass(Idle(), after="lift-int-casts").names[2] == "idle"
    assert Pipeline().with_pass("narrow-64bit").names == ["narrow-64bit"]
    assert str(default) == before and len(default) == len(list(default))


@pytest.mark.parametrize(
    "mistake",
    [
        lambda p: p.without("narow-64bit"),
        lambda p: p.only("narow-64bit"),
        lambda p: p.with_options("narow-64bit", mode="proved"),
        lambda p: p.with_pass(Idle, before="narow-64bit"),
        lambda p: p.with_pass(Idle, after="narow-64bit"),
    ],
    ids=["without", "only", "with_options", "before", "after"],
)
def test_edits_of_a_pass_that_is_not_there_raise(mistake: Callable[[Pipeline], Pipeline]) -> None:
    with pytest.raises(UsageError, match="Did you mean 'narrow-64bit'"):
        mistake(Pipeline.default())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flga": True}, "Did you mean 'flag'"),
        ({"flag": 3}, "wants bool, not 3"),
        ({"count": True}, "wants int, not True"),
        ({"count": None}, "wants int, not None"),
        ({"mode": 1}, "wants str, not 1"),
        ({"mode": "medium"}, "soft or hard"),
    ],
)
def test_trap_07_options_of_the_wrong_type_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Pipeline([Idle]).with_options("idle", **options)


def test_trap_31_order_constraints_ask_for_presence_and_order() -> None:
    for good in ([Idle, Second], [Second], [Idle, Needy], [Idle, Second, Needy]):
        assert Pipeline(good).names == [c.name for c in good]
    with pytest.raises(UsageError, match="'second' must come after 'idle'"):
        Pipeline([Second, Idle])
    with pytest.raises(UsageError, match="'needy' requires 'idle' to run before it"):
        Pipeline([Needy])
    with pytest.raises(UsageError, match="'needy' requires 'idle' to run before it"):
        Pipeline([Needy, Idle])
    with pytest.raises(UsageError, match="requires 'idle'"):
        Pipeline([Idle, Needy]).without("idle")
    with pytest.raises(UsageError, match="requires 'idle'"):
        Pipeline([Idle, Needy]).only("needy")
    with pytest.raises(UsageError, match="must come after"):
        Pipeline([Idle]).with_pass(Second, before="idle")
    assert Pipeline([Idle, Needy]).part(1, 2).names == ["needy"]  # for reproducers


def test_trap_32_options_are_in_the_key() -> None:
    plain = Pipeline([Idle])
    keys = {plain}
    for options in ({"flag": True}, {"count": 4}, {"factor": 0.25}, {"mode": "hard"}):
        changed = plain.with_options("idle", **options)
        assert changed not in keys and str(changed) != str(plain)
        keys.add(changed)
    assert plain.with_options("idle", flag=True).with_options("idle", flag=False) == plain
    assert plain != "idle"


# -- what runs --------------------------------------------------------------------------------------------------------


def test_a_pass_without_targets_in_the_graph_does_not_run() -> None:
    captured = graph_of(lambda x: x + 1, (torch.ones(3),))
    idle, eager = Acts(nothing, aten.mul.Tensor, aten.sub.Tensor), Acts(nothing, aten.add.Tensor)
    eager.name = "eager"  # type: ignore[misc]
    result = Pipeline([idle, eager]).run(captured.gm, captured.context)
    assert not idle.seen and len(eager.seen) == 1
    assert [(r.name, r.ran, r.changed) for r in result.runs] == [("acts", False, False), ("eager", True, True)]


def test_nothing_to_do_leaves_the_very_graph() -> None:
    captured = graph_of(lambda x: torch.relu(x) * 2, (torch.ones(3),))
    before, code = invariants.drawing(captured.gm), captured.gm.code
    result = Pipeline.default().run(captured.gm, captured.context, verify_each=True)
    assert not result.changed and not result.rewrites
    assert invariants.drawing(captured.gm) == before and captured.gm.code == code


def test_runs_are_counted_observed_and_finished_once() -> None:
    captured = graph_of(lambda x: x[:2] + torch.arange(2), (torch.arange(4),))
    order: list[str] = []
    result = Pipeline.default().run(
        captured.gm,
        captured.context,
        observer=lambda step, gm, run: order.append(f"{step.name}/{run.nodes_after == len(gm.graph.nodes)}"),
        finish=lambda: order.append("finish"),
    )
    assert order == [*(f"{name}/True" for name in Pipeline.default().names), "finish"]
    assert sum(r.rewrites for r in result.runs) == len(result.rewrites)
    assert sum(r.findings for r in result.runs) == len(result.findings)
    assert all(r.seconds >= 0 and r.nodes_before > 0 for r in result.runs)


def test_dead_code_goes_and_the_module_is_recompiled() -> None:
    def swap(gm: fx.GraphModule) -> None:
        for node in gm.graph.find_nodes(op="call_function", target=aten.add.Tensor):
            with NodeBuilder(gm.graph, "acts").before(node) as build:
                node.replace_all_uses_with(build.call(aten.sub.Tensor, *node.args))

    captured = graph_of(lambda x: x + 1, (torch.ones(3),))
    result = Pipeline([Acts(swap)]).run(captured.gm, captured.context, verify_each=True)
    assert result.changed and captured.ops() == {"aten.sub.Tensor": 1}
    (output,) = captured(torch.ones(3))
    assert torch.equal(output, torch.zeros(3))


# -- verify_each ------------------------------------------------------------------------------------------------------


def add_of(gm: fx.GraphModule) -> fx.Node:
    return next(iter(gm.graph.find_nodes(op="call_function", target=aten.add.Tensor)))


def without_val(gm: fx.GraphModule) -> None:
    add_of(gm).meta.pop("val")


def bare_node(gm: fx.GraphModule) -> None:
    add = add_of(gm)
    with gm.graph.inserting_after(add):
        add.replace_all_uses_with(gm.graph.call_function(aten.relu.default, (add,)), lambda user: user.op == "output")


def false_dtype(gm: fx.GraphModule) -> None:
    add = add_of(gm)
    add.meta["val"] = meta.retype(meta.val(add), torch.bfloat16)


def false_input(gm: fx.GraphModule) -> None:  # trap 26: the argument changed, the user's val did not
    add = add_of(gm)
    with NodeBuilder(gm.graph, "acts").before(add) as build:
        add.update_arg(0, build.cast(add.args[0], torch.float64))


def mutates(gm: fx.GraphModule) -> None:
    add = add_of(gm)
    with NodeBuilder(gm.graph, "acts").before(add) as build:
        add.update_arg(0, build.call(aten.relu_.default, add.args[0]))


def narrowed_placeholder(gm: fx.GraphModule) -> None:
    node = next(iter(gm.graph.find_nodes(op="placeholder")))
    node.meta["val"] = meta.retype(meta.val(node), torch.bfloat16)
    for later in gm.graph.find_nodes(op="call_function", target=aten.add.Tensor):
        refresh(later, meta.fake_mode_of(gm.graph))
    output = gm.graph.output_node()
    output.args = ((output.args[0][0], output.args[0][0]),)
    gm.graph.eliminate_dead_code()


def dropped_output(gm: fx.GraphModule) -> None:
    output = gm.graph.output_node()
    output.args = (output.args[0][:-1],)


def swapped_outputs(gm: fx.GraphModule) -> None:  # trap 27
    output = gm.graph.output_node()
    output.args = (tuple(reversed(output.args[0])),)


def cast_output(gm: fx.GraphModule) -> None:
    output = gm.graph.output_node()
    first, *rest = output.args[0]
    with NodeBuilder(gm.graph, "acts").before(output, first) as build:
        output.args = ((build.cast(first, torch.float16), *rest),)


def traceless(gm: fx.GraphModule) -> None:
    add = add_of(gm)
    with NodeBuilder(gm.graph, "acts").before(gm.graph.output_node(), add) as build:
        made = build.call(aten.relu.default, add)
    made.meta.pop("stack_trace")
    output = gm.graph.output_node()
    output.args = ((made, *output.args[0][1:]),)


def out_of_order(gm: fx.GraphModule) -> None:
    gm.graph.output_node().prev.append(add_of(gm))


class AddAndSum(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = x + 1
        return y, y.sum()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (without_val, "has-val: add"),
        (bare_node, "has-val: relu"),
        (false_dtype, r"val-is-true: add.*bfloat16\[3\].*float32\[3\]"),
        (false_input, "val-is-true: add"),
        (mutates, "functional: relu_"),
        (narrowed_placeholder, "inputs-kept"),
        (dropped_output, "outputs-kept: output: 1 outputs, were 2"),
        (swapped_outputs, r"outputs-kept.*output 0 is float32\[\], was float32\[3\]"),
        (cast_output, r"outputs-kept.*output 0 is float16\[3\], was float32\[3\]"),
        (traceless, "has-trace: relu"),
        (out_of_order, "well-formed"),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_trap_25_verify_each_catches(edit: Callable[[fx.GraphModule], None], message: str) -> None:
    captured = graph_of(AddAndSum(), (torch.ones(3),))
    assert not invariants.check(captured.gm, invariants.contract_of(captured.gm))
    with pytest.raises(PassError, match="pass 'acts' broke an invariant: " + message) as caught:
        Pipeline([Acts(edit)]).run(captured.gm, captured.context, verify_each=True)
    assert caught.value.pass_name == "acts"
    if edit in (false_dtype, false_input):
        assert caught.value.node == "add" and "test_pipeline.py:" in str(caught.value) and "y = x + 1" in str(caught.value)


def test_verify_each_catches_a_pass_that_hides_its_change() -> None:
    captured = graph_of(lambda x: x + 1, (torch.ones(3),))
    with pytest.raises(PassError, match="pass 'acts' edited the graph and reported no change"):
        Pipeline([Acts(bare_node, changed=False)]).run(captured.gm, captured.context, verify_each=True)


# -- a pass that fails ------------------------------------------------------------------------------------------------


class Fails(Pass):
    """Builds a node that its op refuses."""

    name = "fails"
    targets = frozenset({aten.mm.default, aten.linear.default})

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> PassResult:
        for target in self.targets:
            for node in graph_module.graph.find_nodes(op="call_function", target=target):
                with NodeBuilder(graph_module.graph, self.name).before(node) as build:
                    build.call(aten.mm.default, node.args[0], node.args[0])
        return PassResult()


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x * 2)  # the failing line


def test_trap_30_a_failing_pass_is_named_with_the_users_line_and_a_reproducer(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PassError) as caught:
        nxfx.prepare(Linear(), (torch.ones(3, 4),), pipeline=Pipeline.default().with_pass(Fails))
    error = caught.value
    assert error.pass_name == "fails" and error.node
    assert "pass 'fails' failed at node" in str(error) and "# the failing line" in str(error)
    assert f"{os.path.basename(__file__)}:" in str(error)
    assert error.reproducer and os.path.exists(error.reproducer) and str(error.reproducer) in str(error)
    with open(error.reproducer) as script:
        compile(script.read(), error.reproducer, "exec")
    assert error.__cause__ is not None


def test_an_error_outside_the_builder_names_the_pass() -> None:
    def fail(gm: fx.GraphModule) -> None:
        raise KeyError("lost")

    captured = graph_of(lambda x: x + 1, (torch.ones(3),))
    with pytest.raises(PassError, match="pass 'acts' failed: KeyError: 'lost'") as caught:
        Pipeline([Acts(fail)]).run(captured.gm, captured.context)
    assert caught.value.node == "" and isinstance(caught.value.__cause__, KeyError)


def test_errors_raised_on_purpose_pass_through() -> None:
    def fail(gm: fx.GraphModule) -> None:
        raise UsageError("not so")

    captured = graph_of(lambda x: x + 1, (torch.ones(3),))
    with pytest.raises(UsageError, match="^not so$"):
        Pipeline([Acts(fail)]).run(captured.gm, captured.context)


# -- passes of other packages -----------------------------------------------------------------------------------------


class Foreign(Idle):
    """Another package's pass."""

    name = "foreign"


class Impostor(Idle):
    """Takes the name of one of ours."""

    name = "narrow-64bit"


not_a_pass = object()


@pytest.fixture
def entry(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], list[str]]]:
    """Install the entry point ``value``; gives the list of groups that were asked for."""

    def install(value: str) -> list[str]:
        asked: list[str] = []

        def entry_points(*, group: str) -> list[EntryPoint]:
            asked.append(group)
            return [EntryPoint("theirs", value, group)]

        monkeypatch.setattr(engine, "entry_points", entry_points)
        engine.available_passes.cache_clear()
        return asked

    monkeypatch.setitem(__import__("sys").modules, "their_package", __import__("sys").modules[__name__])
    yield install
    monkeypatch.undo()
    engine.available_passes.cache_clear()


def test_entry_points_are_treated_like_ours_and_read_once(entry: Callable[[str], list[str]]) -> None:
    asked = entry("their_package:Foreign")
    assert Pipeline.default().names[-1] == "foreign"
    (step,) = Pipeline.parse("foreign{count=9}")
    assert isinstance(step, Foreign) and step.options.count == 9
    captured = graph_of(lambda x: x + 1, (torch.ones(3),))
    assert [r.name for r in Pipeline.default().run(captured.gm, captured.context).runs][-1] == "foreign"
    assert asked == ["nxfx.passes"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("their_package:Impostor", "two passes are called 'narrow-64bit'.*Impostor"),
        ("their_package:not_a_pass", "'theirs' .* is not a subclass of nxfx.Pass"),
        ("their_package:Missing", "'theirs' .* cannot be loaded: AttributeError"),
        ("no_such_package_at_all:X", "'theirs' .* cannot be loaded: ModuleNotFoundError"),
    ],
)
def test_entry_points_that_cannot_serve_are_named(entry: Callable[[str], list[str]], value: str, message: str) -> None:
    entry(value)
    with pytest.raises(UsageError, match=message):
        Pipeline.default()


# -- higher-order ops -------------------------------------------------------------------------------------------------


class Branches(nn.Module):
    """Both bodies hold a slice write and int64 arithmetic."""

    def forward(self, x: torch.Tensor, flag: torch.Tensor) -> torch.Tensor:
        def left(x: torch.Tensor) -> torch.Tensor:
            y = torch.zeros_like(x)
            y[1:3] = x[:2]
            return y * 3 + torch.arange(4)

        def right(x: torch.Tensor) -> torch.Tensor:
            return torch.slice_scatter(x, x[:2] - 7, 0, 2, 9) // 2

        return torch.cond(flag, left, right, (x,))


def test_trap_29_bodies_of_cond_are_rewritten() -> None:
    model = Branches()
    prepared = nxfx.prepare(model, (torch.arange(4), torch.tensor(True)), verify_each=True)
    scopes = list(walk.scopes(prepared.graph_module))
    assert [s.is_body for s in scopes] == [True, True, False]
    ops = {str(n.target) for s in scopes for n in s.graph_module.graph.nodes}
    assert not any("slice_scatter" in op for op in ops)
    assert len({s.path for s in scopes}) == 3
    for x in (torch.arange(4), torch.tensor([-(2**20), 2**20, -1, 0])):
        for flag in (True, False):
            outcome = compare(model(x, torch.tensor(flag)), prepared(x, torch.tensor(flag)))
            assert outcome.ok, outcome.mismatches


def test_trap_29_while_loop_bodies_are_walked_and_know_their_operands() -> None:
    class Loop(nn.Module):
        def forward(self, i: torch.Tensor, x: torch.Tensor) -> Any:
            return torch.while_loop(lambda i, x: i < 3, lambda i, x: (i + 1, x * 2 + i), (i, x))

    model = Loop()
    args = (torch.tensor(0), torch.arange(3))
    captured = graph_of(model, args)
    seen = Acts(nothing, changed=False)
    Pipeline([seen]).run(captured.gm, captured.context)
    assert [context.is_body for _, context in seen.seen] == [True, True, False]
    known = [{name: source.assumed for name, source in context.sources.items()} for _, context in seen.seen if context.is_body]
    assert [list(bounds.values())[0] for bounds in known] == [(-(2**31), 2**31 - 1), (-(2**31), 2)]  # the loop runs while i < 3
    prepared = nxfx.prepare(model, args, verify_each=True)
    outcome = compare(model(*args), prepared(*args))
    assert outcome.ok, outcome.mismatches


def test_a_body_that_changes_its_boundary_is_caught() -> None:
    def cast(gm: fx.GraphModule) -> None:
        if not any(walk.is_higher_order(n) for n in gm.graph.nodes):
            cast_output(gm)

    captured = graph_of(Branches(), (torch.arange(4), torch.tensor(True)))
    with pytest.raises(PassError, match=r"outputs-kept.*output 0 is float16\[4\], was int64\[4\]"):
        Pipeline([Acts(cast)]).run(captured.gm, captured.context, verify_each=True)


class Unheard(torch._ops.HigherOrderOperator):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__("unheard_of")

    def __call__(self, *args: Any) -> Any:
        return super().__call__(*args)


def test_trap_29_unknown_bodies_are_reported_not_skipped_silently() -> None:
    captured = graph_of(Branches(), (torch.arange(4), torch.tensor(True)))
    (cond,) = [n for n in captured.gm.graph.nodes if walk.is_higher_order(n)]
    cond.target = Unheard()
    assert invariants.unknown_higher_order(captured.gm) == [cond] and len(list(walk.scopes(captured.gm))) == 1
    before = [invariants.drawing(body) for _, body in captured.gm.named_children() if isinstance(body, fx.GraphModule)]
    result = Pipeline.default().run(captured.gm, captured.context, verify_each=True)
    (finding,) = [f for f in result.findings if f.code == "NX410"]
    assert "unheard_of" in finding.message and finding.fix and finding.location.file == __file__
    after = [invariants.drawing(body) for _, body in captured.gm.named_children() if isinstance(body, fx.GraphModule)]
    assert before == after


def test_a_body_that_many_nodes_share_is_visited_once() -> None:
    captured = graph_of(Branches(), (torch.arange(4), torch.tensor(True)))
    (cond,) = [n for n in captured.gm.graph.nodes if walk.is_higher_order(n)]
    left, right = cond.args[1], cond.args[2]
    right.replace_all_uses_with(left)
    captured.gm.graph.erase_node(right)
    assert len(list(walk.scopes(captured.gm))) == 2


def test_rewrites_of_a_pass_carry_its_name_and_line() -> None:
    captured = graph_of(AddAndSum(), (torch.ones(3),))
    record = Idle().rewrite(add_of(captured.gm), "idle.rule", Kind.EXACT, "add", "add")
    assert (record.pass_name, record.rule, record.count) == ("idle", "idle.rule", 1)
    assert record.location.file == __file__ and record.location.source == "y = x + 1"
