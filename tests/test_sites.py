"""Value sites: `nxfx.check` lists every place where a value reaches Python, a shape or the host, and no other."""

from __future__ import annotations

import inspect
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import site_models
import torch
import torch.utils.checkpoint

import nxfx
from nxfx.observe.run import observe

SITE = re.compile(r"# site: (.*)$")
# From bad to good: a capture may come to do better than what is listed.
ORDER = ("refused", "reported", "removed")


class Model(torch.nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor, n: torch.Tensor, mask: torch.Tensor) -> Any:
        return self.function(x, n, mask)


def example() -> tuple[torch.Tensor, ...]:
    x = torch.tensor([[0.5, -1.0, 2.0], [1.5, 0.25, -0.5], [3.0, -2.0, 1.0], [0.0, 1.0, -1.5]])
    return x, torch.tensor(2), x > 0


def expected(function: Callable[..., Any]) -> dict[tuple[int, str], tuple[str, str]]:
    """(line, kind) → (code, outcome), read from the comments of a model and of the helper it calls."""
    found = {}
    for part in (function, *([site_models.helper] if "helper(" in inspect.getsource(function) else [])):
        lines, first = inspect.getsourcelines(part)
        for number, line in enumerate(lines, first):
            for text in SITE.search(line).group(1).split("; ") if SITE.search(line) else ():
                *kind, code, outcome = text.split(" ")
                found[number, " ".join(kind)] = (code, outcome)
    return found


MODELS = {**site_models.SINGLE, **site_models.SEVERAL}


@pytest.mark.parametrize("name", MODELS)
def test_every_site_is_listed_and_none_is_invented(name: str) -> None:
    wanted = expected(MODELS[name])
    assert wanted or name == "clean"
    report = nxfx.check(Model(MODELS[name]), example())
    assert {(s.location.line, s.kind): s.code for s in report.sites} == {key: code for key, (code, _) in wanted.items()}
    for site in report.sites:
        assert site.location.file == site_models.__file__
        assert site.location.source == site_models_line(site.location.line)
        assert site.count >= 1 and site.becomes["legacy trace"] and site.becomes["torch.compile"]
        outcome = wanted[site.location.line, site.kind][1]
        assert ORDER.index(site.outcome) >= ORDER.index(outcome), (site.outcome, outcome)
        stands = [f for f in report.findings if f.location.line == site.location.line and f.code.startswith(("NX2", "NX4"))]
        assert bool(stands) == (site.outcome != "removed")


def site_models_line(number: int) -> str:
    return inspect.getsource(site_models).splitlines()[number - 1].strip()


# --- the example of Neuron's own troubleshooting page ----------------------------------------------------------------


class Troubleshooting(torch.nn.Module):
    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor[0] == 1:
            return tensor
        return tensor * 2


def test_the_troubleshooting_example_is_told_by_route() -> None:
    report = nxfx.check(Troubleshooting(), (torch.tensor([1, 2, 3]),))
    (branch,) = [s for s in report.sites if s.kind == "if"]
    assert branch.becomes["legacy trace"].startswith("baked to the example's branch (True)")
    assert branch.becomes["TorchNeuron"].startswith("refused (fullgraph=True)")
    assert branch.across_inputs == "changes" and "False" in branch.evidence
    assert "legacy trace: baked to the example's branch (True)" in str(report) or branch.outcome == "removed"


# --- what is said of a site ------------------------------------------------------------------------------------------


class Nested(torch.nn.Module):
    def read(self, x: torch.Tensor) -> float:
        return x.sum().item()

    def between(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([row * self.read(row) for row in x])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.between(x) + torch.utils.checkpoint.checkpoint(self.between, x, use_reentrant=False)


def test_the_call_chain_holds_the_users_frames_only_and_repetitions_are_counted() -> None:
    (site,) = observe(Nested(), (torch.arange(8.0).reshape(4, 2),), {}).sites
    assert site.count == 8 and site.values == ("1.0", "5.0", "9.0", "13.0")
    assert [c.function for c in site.chain if c.function != "<listcomp>"] == ["forward", "between", "read"]
    assert {c.file for c in site.chain} == {__file__} and site.chain[-1] == site.location
    assert site.becomes["host"] == "waits for the device, 8 times a call"


class Settings(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mode", torch.tensor(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.mode == 1:
            x = x + 1
        if x.mean() > 0:
            return x
        return -x


def test_a_condition_that_no_input_changes_is_told_from_one_that_does() -> None:
    setting, value = observe(Settings(), (torch.ones(3),), {}).sites
    assert setting.across_inputs == "same" and "Python flag decided before the model is compiled" in setting.fix
    assert value.across_inputs == "changes" and value.evidence.endswith("False") and "Python flag decided" not in value.fix


CONDITIONS: dict[str, Callable[..., Any]] = {
    "element": lambda x, n, mask: x[1, 2] == 7.0,
    "beyond": lambda x, n, mask: n > 100,
    "at least": lambda x, n, mask: n <= -50,
    "one of many": lambda x, n, mask: (x == 123.0).any(),
    "all but one": lambda x, n, mask: mask.all(),
    "none": lambda x, n, mask: ~mask.any(),
    "not": lambda x, n, mask: torch.logical_not((x[:2] < 40).any()),
    "truth": lambda x, n, mask: n,
    "sign of a sum": lambda x, n, mask: x.sum() > 0,
}


class Asked(torch.nn.Module):
    def __init__(self, condition: Callable[..., Any]) -> None:
        super().__init__()
        self.condition = condition

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        if self.condition(*inputs):
            return inputs[0]
        return -inputs[0]


@pytest.mark.parametrize("name", CONDITIONS)
def test_one_other_input_turns_the_condition_that_the_example_met(name: str) -> None:
    """``x[1, 2] == 7`` needs the very number: it is solved, not guessed."""
    example_of = example()
    (site,) = [s for s in observe(Asked(CONDITIONS[name]), example_of, {}).sites if s.kind == "if"]
    assert site.across_inputs == "changes", site
    assert str(not bool(CONDITIONS[name](*example_of))) in site.evidence
    assert all(torch.equal(a, b) for a, b in zip(example(), example_of, strict=True))


def test_conditions_that_exclude_each_other_take_more_inputs() -> None:
    class Chain(torch.nn.Module):
        def forward(self, n: torch.Tensor) -> torch.Tensor:
            if n == 7:
                return n
            if n == 2:
                return n + 1
            return n + 2

    once, twice = (observe(Chain(), (torch.tensor(4),), {}, variations=v).sites for v in (1, 2))
    assert [s.across_inputs for s in once] == ["changes", "changes"]
    assert "does not run" in once[1].evidence and once[0].evidence == twice[0].evidence == "with negated conditions: True"


@pytest.mark.parametrize(("variations", "runs"), [(0, 1), (1, 2), (3, 4)])
def test_the_model_runs_once_and_once_for_each_other_input(variations: int, runs: int) -> None:
    called = []

    class Called(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            called.append(x)
            return x if x.mean() > 0 else -x

    (site,) = observe(Called(), (torch.ones(3),), {}, variations=variations).sites
    assert len(called) == runs and (site.across_inputs == "untested") == (variations == 0)


def test_without_a_site_that_could_change_the_model_runs_once() -> None:
    called = []

    class Plain(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            called.append(x)
            return torch.nn.functional.dropout(x, 0.5, training=True).cpu()

    observe(Plain(), (torch.ones(3),), {})
    assert len(called) == 1


def test_an_input_that_the_model_refuses_is_followed_by_another() -> None:
    class Refuses(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if (x == 3).all():
                return x.reshape(5)
            return x * x.sum().item()

    asked, read = observe(Refuses(), (torch.ones(3),), {}).sites
    assert (asked.across_inputs, read.across_inputs) == ("same", "changes") and "mirrored values" in read.evidence


class Embedded(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(10, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        if (ids > 7).any():
            return self.table(ids) * 2
        return self.table(ids)


def test_varied_inputs_stay_within_the_declared_ranges() -> None:
    ids = torch.tensor([[1, 2, 3]])
    (narrow,) = observe(Embedded(), (ids,), {}, {"ids": (0, 5)}).sites
    (wide,) = observe(Embedded(), (ids,), {}, {"ids": (0, 9)}).sites
    assert (narrow.across_inputs, wide.across_inputs) == ("same", "changes")


def test_a_site_on_the_side_the_example_does_not_take_is_listed() -> None:
    class Sides(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.sum() > 0:
                return x
            return x * x.min().item()

    taken, other = observe(Sides(), (torch.ones(3),), {}).sites
    assert (taken.kind, taken.count) == ("if", 1)
    assert (other.kind, other.count) == (".item()", 0) and "runs only with" in other.evidence


# --- nothing is changed ----------------------------------------------------------------------------------------------


class Stateful(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(3)
        self.cache = [torch.zeros(3)]
        self.calls, self.seen = 0, {"last": 0}

    def note(self, seen: dict[str, int]) -> None:
        seen["last"] += 1

    def forward(self, x: torch.Tensor, out: list[torch.Tensor]) -> torch.Tensor:
        self.calls += 1
        self.note(self.seen)
        self.cache[0].add_(1)
        x.add_(random.random())
        out.append(torch.rand(3))
        self.norm.weight.mul_(2)
        print("running")
        return self.norm(x) * x.max().item()


def test_observing_leaves_the_model_its_arguments_and_the_generators_alone(capsys: pytest.CaptureFixture[str]) -> None:
    model, x, out = Stateful(), torch.randn(4, 3), []
    before = [t.clone() for t in (*model.parameters(), *model.buffers(), model.cache[0], x, torch.get_rng_state())]
    generator = random.getstate()
    observe(model, (x, out), {})
    after = [*model.parameters(), *model.buffers(), model.cache[0], x, torch.get_rng_state()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert (model.calls, model.seen, out, random.getstate()) == (0, {"last": 0}, [], generator)
    assert capsys.readouterr() == ("", "")


def test_python_state_is_reported_with_the_line_that_writes_it() -> None:
    sites = {s.values[0] if s.values else s.kind: s for s in observe(Stateful(), (torch.randn(4, 3), []), {}).sites if s.code == "NX406"}
    assert {name: s.location.source for name, s in sites.items()} == {
        "calls: 0 → 1": "self.calls += 1",
        "seen.last: 0 → 1": 'seen["last"] += 1',
        "Python's random": "x.add_(random.random())",
    }


def test_a_forward_that_raises_keeps_what_came_before() -> None:
    class Raises(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            scale = x.max().item()
            raise RuntimeError(f"no {scale}")

    found = observe(Raises(), (torch.ones(2),), {})
    assert [s.kind for s in found.sites] == [".item()"] and isinstance(found.error, RuntimeError)


@pytest.mark.parametrize("device", ["meta", "fake"])
def test_without_values_nothing_is_run(device: str) -> None:
    if device == "meta":
        model, x = Settings().to("meta"), torch.ones(3, device="meta")
        assert observe(model, (x,), {}).sites == []
        return
    with torch._subclasses.FakeTensorMode():
        assert observe(Settings(), (torch.ones(3),), {}).sites == []


def test_cond_is_no_site_and_its_bodies_are_not_compiled() -> None:
    class Cond(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,))

    found = observe(Cond(), (torch.ones(3),), {})
    assert found.sites == [] and found.error is None


def test_a_report_with_sites_survives_json() -> None:
    report = nxfx.check(Settings(), (torch.ones(3),))
    again = nxfx.Report.from_dict(report.to_dict())
    assert again.sites == report.sites and again.to_json() == report.to_json() and len(report.sites) == 2


# --- against torch-xla -----------------------------------------------------------------------------------------------

_EXECUTE = """
import sys, torch, torch_xla, site_models, test_sites
for name, function in test_sites.MODELS.items():
    arguments = [a.to(torch_xla.device()) * 1 if a.dtype is not torch.bool else a.to(torch_xla.device()) | False for a in test_sites.example()]
    torch_xla.sync()
    print("=== " + name, file=sys.stderr, flush=True)
    try:
        test_sites.Model(function)(*arguments)
    except Exception as error:
        print("raised", type(error).__name__, file=sys.stderr, flush=True)
    print("=== -", file=sys.stderr, flush=True)
"""


@pytest.mark.xla
def test_every_frame_at_which_torch_xla_executes_is_on_the_list() -> None:
    """``PT_XLA_DEBUG_LEVEL=2`` prints the Python frames of each stray execution: all of them are lines that nxfx lists."""
    pytest.importorskip("torch_xla")
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    environment = {**os.environ, "PT_XLA_DEBUG_LEVEL": "2", "PJRT_DEVICE": "CPU", "PYTHONPATH": paths}
    run = subprocess.run([sys.executable, "-c", _EXECUTE], env=environment, capture_output=True, text=True, timeout=300)
    seen: dict[str, set[int]] = {}
    for part in run.stderr.split("=== ")[1:]:
        name, _, text = part.partition("\n")
        for triggered in text.split("Python Frame Triggered Execution")[1:]:
            lines = re.findall(r"\S+ \(\S*site_models\.py:(\d+)\)", triggered.partition("-----")[0])
            if lines:
                seen.setdefault(name, set()).add(int(lines[0]))
    assert len(seen) > 20, run.stderr[-2000:]
    for name, lines in seen.items():
        listed = {s.location.line for s in observe(Model(MODELS[name]), example(), {}).sites}
        assert lines <= listed, name


# --- against Dynamo --------------------------------------------------------------------------------------------------

# One kind, two ways for Dynamo: math.sqrt(t) and `t in list` are traced, an f-string may only make it skip the frame.
DYNAMO_DIFFERS = {"math_function", "tensor_in_list", "in_tensor", "f_string"}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(site_models.SINGLE) - DYNAMO_DIFFERS))
def test_what_is_said_of_torch_compile_is_what_dynamo_does(name: str) -> None:
    from torch._dynamo.utils import counters

    sites = observe(Model(site_models.SINGLE[name]), example(), {}).sites
    torch._dynamo.reset()
    counters.clear()
    with torch.no_grad():
        torch.compile(Model(site_models.SINGLE[name]), backend="eager")(*example())
    breaks = sum(counters["graph_break"].values())
    assert (breaks > 0) == any(s.becomes["torch.compile"].startswith("graph break") for s in sites)
    torch._dynamo.reset()
    try:
        with torch.no_grad():
            torch.compile(Model(site_models.SINGLE[name]), backend="eager", fullgraph=True)(*example())
        refused = False
    except Exception:
        refused = True
    said = " ".join(s.becomes["TorchNeuron"] for s in sites)
    assert refused == ("refused" in said) or not refused and "from torch 2.13 on" in said or name == "bool_call"


_TRANSFORMERS = """
import sys, torch, torch_xla, corpus, nxfx
from torch.utils._pytree import tree_map
device = torch_xla.device()
moved = lambda value: tree_map(lambda t: t.to(device) if isinstance(t, torch.Tensor) else t, value)
name = sys.argv[1]
def runs(call):
    torch_xla.sync()
    torch_xla._XLAC._set_allow_execution(False)
    try:
        with torch.no_grad():
            call()
        return True
    except RuntimeError:
        return False
    finally:
        torch_xla._XLAC._set_allow_execution(True)
model, kwargs = corpus.BY_NAME[name].build()
report = nxfx.check(model, (), dict(kwargs))
print(*(f"{s.location.line}:{s.outcome}" for s in report.sites if s.code == "NX401"), sep=",")
prepared = nxfx.prepare(model, (), dict(kwargs)).to(device)
inputs = moved(list(prepared.example_inputs))
print(runs(lambda: prepared.graph_module(*inputs)))
model, kwargs = corpus.BY_NAME[name].build()
model, kwargs = model.to(device), moved(dict(kwargs))
print(runs(lambda: model(**kwargs)))
"""


@pytest.mark.xla
@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_mask_shortcuts_of_transformers_execute_before_prepare_and_not_after(name: str) -> None:
    """Plain models of transformers look at their masks: each such frame is listed, and the cleaned graph has none."""
    pytest.importorskip("torch_xla")
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    environment = {**os.environ, "PT_XLA_DEBUG_LEVEL": "2", "PJRT_DEVICE": "CPU", "PYTHONPATH": paths}
    run = subprocess.run([sys.executable, "-c", _TRANSFORMERS, name], env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-2000:]
    sites, cleaned, original = run.stdout.split()[-3:]
    assert (cleaned, original) == ("True", "False")
    listed = dict(site.split(":") for site in sites.split(","))
    assert set(listed.values()) == {"removed"}
    triggered = re.findall(r"Python Frame Triggered Execution: *\n[^\n(]*\(\S*masking_utils\.py:(\d+)\)", run.stderr)
    assert triggered and set(triggered) <= set(listed)
