"""The command line: what it prints, where, and how it ends, on good input and on bad."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from nxfx.cli import app
from nxfx.cli import console as cli_console
from nxfx.pipeline import Pass, PassResult, available_passes
from nxfx.report import Finding, Severity

ROOT = Path(__file__).parents[1]
Narrow64bit = available_passes()["narrow-64bit"]

MODELS = """\
import os, signal
import torch


class Tiny(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(16, 4)

    def forward(self, ids, mask=None):
        print("chatter from the model")
        positions = (ids != 0).cumsum(-1)
        return self.embedding(ids) * positions.unsqueeze(-1)


class Nothing(torch.nn.Module):
    def forward(self):
        return 3


class Loop(torch.nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else x[:1]


IDS = torch.tensor([[1, 2, 3], [4, 5, 0]])
instance = Nothing()
number = 3


def tiny():
    return Tiny().eval(), (IDS,)


def tiny_kwargs():
    return Tiny().eval(), (), {"ids": IDS}


def model_only():
    return Tiny()


def nothing():
    return Nothing()


def loop():
    return Loop(), (torch.ones(2),)


def raises():
    raise ValueError("no weights in [bold]here[/]\\n\\x1b[31mred")  # the line at fault


def exits():
    raise SystemExit(3)


def interrupts():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background is born ignoring it
    os.kill(os.getpid(), signal.SIGINT)


def needs(checkpoint, size=3):
    return None


def returns_none():
    return None


def returns_four():
    return Tiny(), (), {}, 1


def returns_class():
    return Tiny


def returns_tensor_args():
    return Tiny(), IDS


def returns_dict_args():
    return Tiny(), {"ids": IDS}


def returns_bad_kwargs():
    return Tiny(), (IDS,), {1: 2}


def too_many_inputs():
    return Tiny(), (IDS, None, IDS)


def unknown_input():
    return Tiny(), (IDS,), {"idz": IDS}
"""


class Run:
    """The result of one command."""

    def __init__(self, code: int, stdout: str, stderr: str) -> None:
        self.code, self.stdout, self.stderr = code, stdout, stderr


Nxfx = Callable[..., Run]


@pytest.fixture
def nxfx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Nxfx]:
    """Runs a command in-process, in a directory with ``models.py``."""
    (tmp_path / "models.py").write_text(MODELS)
    (tmp_path / "broken.py").write_text("import torch\nx = = 1\n")
    (tmp_path / "imports.py").write_text("import not_installed_anywhere\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setenv("NXFX_REPRODUCER_DIR", str(tmp_path / "reproducers"))
    before = set(sys.modules)

    def run(*arguments: str) -> Run:
        result = CliRunner().invoke(app, list(arguments))
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Run(result.exit_code, result.stdout, result.stderr)

    yield run
    for name in set(sys.modules) - before:
        if name in ("models", "broken", "imports") or name.startswith("_nxfx_spec_"):
            del sys.modules[name]


def one_line(run: Run) -> str:
    """The error, which is all there is on standard error."""
    lines = run.stderr.splitlines()
    assert len(lines) == 1, run.stderr
    assert "Traceback" not in run.stderr and "\x1b" not in run.stderr
    return lines[0]


def process(*arguments: str, cwd: Path, path: Path | None = None, **options: Any) -> subprocess.CompletedProcess[str]:
    """``python -m nxfx`` in a process of its own."""
    return subprocess.run(
        command(*arguments), cwd=cwd, env=environment(path), capture_output=True, text=True, timeout=120, **options
    )


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-W", "ignore", "-m", "nxfx", *arguments]


def environment(path: Path | None = None) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *([str(path)] if path else [])]),
        "OMP_NUM_THREADS": "1",
    }


# -- help --------------------------------------------------------------------------------------------------


def test_version(nxfx: Nxfx) -> None:
    run = nxfx("--version")
    assert (run.code, run.stderr) == (0, "")
    assert run.stdout.startswith("nxfx 0.")


def test_help_teaches_by_example_and_promises_nothing_that_is_not_there(nxfx: Nxfx) -> None:
    for arguments in ([], ["--help"], ["-h"]):
        run = nxfx(*arguments)
        assert run.code == 0 and "doctor" in run.stdout and "nxfx check model.py:tiny" in run.stdout
        assert "bisect" not in run.stdout
    for name in ("dump", "check", "lower", "verify", "passes"):
        run = nxfx(name, "--help")
        assert run.code == 0 and "Examples" in run.stdout and "Exit codes" in run.stdout


def test_help_does_not_wait_for_torch(tmp_path: Path) -> None:
    script = "import sys; sys.argv = ['nxfx', '--help']\ntry:\n    from nxfx.cli import main; main()\n"
    script += "finally:\n    assert 'torch' not in sys.modules"
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


# -- dump --------------------------------------------------------------------------------------------------


def test_dump_prints_the_cleaned_graph_and_nothing_else(nxfx: Nxfx) -> None:
    run = nxfx("dump", "models.py:tiny")
    assert run.code == 0
    assert run.stdout.startswith("class GraphModule(torch.nn.Module):")
    assert "# models.py:12: positions = (ids != 0).cumsum(-1)" in run.stdout
    assert "chatter" not in run.stdout  # what the model prints goes to standard error


@pytest.mark.parametrize("spec", ["models:tiny", "./models.py:tiny", "models:tiny_kwargs", "models.py:tiny_kwargs"])
def test_every_form_of_spec_gives_the_same_graph(nxfx: Nxfx, spec: str) -> None:
    assert nxfx("dump", spec, "-f", "text").stdout == nxfx("dump", "models.py:tiny", "-f", "text").stdout != ""


def test_dump_formats(nxfx: Nxfx, tmp_path: Path) -> None:
    assert nxfx("dump", "models.py:tiny", "--format", "text").stdout.startswith("%")
    assert nxfx("dump", "models.py:tiny", "--format", "table").stdout.startswith("name")
    assert nxfx("dump", "models.py:tiny", "--format", "dot").stdout.startswith("digraph")
    assert json.loads(nxfx("dump", "models.py:tiny", "--format", "json").stdout)["inputs"] == ["ids"]
    run = nxfx("dump", "models.py:tiny", "-f", "json", "-o", "graph.json")
    assert run.stdout == "" and json.loads((tmp_path / "graph.json").read_text())["inputs"] == ["ids"]


def test_dump_diff_and_pipeline(nxfx: Nxfx) -> None:
    diff = nxfx("dump", "models.py:tiny", "--diff", "--pipeline", "narrow-64bit").stdout
    assert diff.startswith("--- after capture\n+++ prepared\n@@ ")
    assert any(line.startswith("+") and "int32" in line for line in diff.splitlines())
    assert nxfx("dump", "models.py:tiny", "--diff", "--pipeline", "").stdout.strip() == ""
    assert "int32" not in nxfx("dump", "models.py:tiny", "--pipeline", "").stdout


def test_print_after(nxfx: Nxfx) -> None:
    def titles(*arguments: str) -> list[str]:
        lines = nxfx("dump", "models.py:tiny", "-f", "text", *arguments).stdout.splitlines()
        return [line.split(" (")[0] for line in lines if line.startswith("# ")]

    names = list(available_passes())
    assert titles("--print-after", "all") == ["# after capture", *(f"# after {n}" for n in names), "# prepared"]
    assert titles("--print-after", "narrow-64bit") == ["# after narrow-64bit", "# prepared"]
    assert titles("--print-after", "capture") == ["# after capture", "# prepared"]
    changed = titles("--print-after", "changed")
    assert "# after narrow-64bit" in changed and "# after capture" not in changed
    staged = nxfx("dump", "models.py:tiny", "--print-after", "changed", "--diff").stdout
    assert (
        "--- after " in staged
        and "+++ after narrow-64bit" in staged
        and "+++ prepared" in staged
        or "# prepared" in staged
    )
    stages = json.loads(nxfx("dump", "models.py:tiny", "-f", "json", "--print-after", "all").stdout)
    assert [s["stage"].split(" (")[0] for s in stages][-1] == "prepared" and len(stages) == len(names) + 2


# -- check -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("severity", "arguments", "code"),
    [
        (None, [], 0),
        (Severity.INFO, ["--strict-warnings"], 0),
        (Severity.WARNING, [], 0),
        (Severity.WARNING, ["--strict-warnings"], 1),
        (Severity.ERROR, [], 1),
    ],
)
def test_check_exits_by_severity(
    nxfx: Nxfx, monkeypatch: pytest.MonkeyPatch, severity: Severity | None, arguments: list[str], code: int
) -> None:
    found = [] if severity is None else [Finding("NX501", severity, "made up \x1b[31m[red]")]
    monkeypatch.setattr(Narrow64bit, "targets", None)
    monkeypatch.setattr(Narrow64bit, "run", lambda self, gm, context: PassResult(findings=list(found)))
    run = nxfx("check", "models.py:tiny", "--pipeline", "narrow-64bit", *arguments)
    assert run.code == code
    assert run.stdout.startswith("nxfx report · target trn2") and "\x1b" not in run.stdout
    assert ("NX501" in run.stdout) == bool(found) and ("[red]" in run.stdout) == bool(found)
    data = json.loads(nxfx("check", "models.py:tiny", "--pipeline", "narrow-64bit", "-f", "json").stdout)
    assert [f["code"] for f in data["findings"]] == ["NX501"] * len(found)


def test_check_of_a_model_that_cannot_be_captured_fails(nxfx: Nxfx) -> None:
    run = nxfx("check", "models.py:loop")
    assert run.code == 1
    assert "models.py:23" in run.stdout + run.stderr
    assert "Traceback" not in run.stderr


# -- passes and doctor -------------------------------------------------------------------------------------


def test_check_says_that_there_is_no_graph_in_json_too(nxfx: Nxfx) -> None:
    run = nxfx("check", "models.py:nothing", "--format", "json")
    assert run.code == 1 and "Nothing" in one_line(run)
    assert [f["code"] for f in json.loads(run.stdout)["findings"]] == ["NX409"]


def test_verify_exits_by_the_verdict_and_writes_every_form(nxfx: Nxfx, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    run = nxfx("verify", "models.py:tiny", "--html", str(page))
    assert run.code == 0 and "PASS" in run.stdout
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    data = json.loads(nxfx("verify", "models.py:tiny", "--format", "json").stdout)
    assert data["ok"] is True and data["outputs"]
    torch.save(torch.full((1,), 9.0), tmp_path / "outputs.pt")
    run = nxfx("verify", "models.py:tiny", "--candidate", str(tmp_path / "outputs.pt"))
    assert run.code == 1 and "FAIL" in run.stdout
    for wrong in (("--reference", "fp16"), ("--autocast", "some"), ("--candidate", str(tmp_path / "nothing.pt"))):
        run = nxfx("verify", "models.py:tiny", *wrong)
        assert run.code == 2 and run.stderr.count("\n") == 1


def test_passes_lists_all_and_explains_each(nxfx: Nxfx) -> None:
    listing = nxfx("passes").stdout
    positions = [listing.index(f"  {name} ") for name in available_passes()]
    assert positions == sorted(positions)
    for name, cls in available_passes().items():
        run = nxfx("passes", name)
        assert run.code == 0 and run.stdout.startswith(f"{name}\n")
        assert "Given" in run.stdout and "Result" in run.stdout, name
        assert "Options" in run.stdout or "no options" in run.stdout
        assert all(f"  {f}=" in run.stdout for f in cls.Options.__dataclass_fields__)


def test_doctor_here(nxfx: Nxfx) -> None:
    run = nxfx("doctor")
    assert run.code == 0 and f"{torch.__version__}" in run.stdout and "Hand-offs" in run.stdout
    data = json.loads(nxfx("doctor", "-f", "json").stdout)
    assert {p["name"]: p["version"] for p in data["packages"]}["torch"] == torch.__version__
    assert all(h["use"] and h["install"] for h in data["hand_offs"])


LEGACY = "def trace(func, example_inputs): ...\n"
NATIVE = "import torch._dynamo\ntorch._dynamo.register_backend(name='neuron')(lambda gm, inputs: gm)\nprint('noise')\n"
BROKEN = "raise OSError('libnrt.so.1:\\ncannot open')\n"


@pytest.mark.parametrize("source", [LEGACY, NATIVE, BROKEN], ids=["legacy", "native", "broken"])
def test_doctor_tells_the_two_torch_neuronx_apart_by_feature(
    nxfx: Nxfx, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    (tmp_path / "torch_neuronx").mkdir()
    (tmp_path / "torch_neuronx" / "__init__.py").write_text(source)
    if source == NATIVE:  # a backend cannot be unregistered
        native = process("doctor", "--format", "json", cwd=tmp_path, path=tmp_path)
        run = Run(native.returncode, native.stdout, native.stderr)
    else:
        monkeypatch.syspath_prepend(str(tmp_path))
        run = nxfx("doctor", "--format", "json")
        sys.modules.pop("torch_neuronx", None)
    assert run.code == 0, run.stderr
    data = json.loads(run.stdout)
    available = {h["name"].split(",")[0]: h["available"] for h in data["hand_offs"]}
    assert available["torch_neuronx.trace"] == (source == LEGACY)
    assert available["TorchNeuron"] == (source == NATIVE)
    (package,) = (p for p in data["packages"] if p["name"] == "torch-neuronx")
    assert package["version"] == "unknown version"
    if source == BROKEN:
        assert data["problems"] == ["torch_neuronx is installed but does not import: OSError: libnrt.so.1: cannot open"]
    else:
        assert ("legacy" if source == LEGACY else "TorchNeuron") in package["note"]


# -- bad input ---------------------------------------------------------------------------------------------

BAD_USAGE = {
    "no-such-command": (["dmp", "models.py:tiny"], "Did you mean 'dump'"),
    "no-such-option": (["dump", "models.py:tiny", "--formt", "json"], "--format"),
    "no-such-format": (["dump", "models.py:tiny", "-f", "jsn"], "Did you mean 'json'"),
    "no-spec": (["dump"], "SPEC"),
    "no-such-module": (["dump", "modles:tiny"], "Did you mean 'models'"),
    "no-such-package": (["dump", "torch.ditributed.tensor:x"], "Did you mean 'torch.distributed.tensor'"),
    "half-an-extension": (["dump", "models.p:tiny"], "Did you mean 'models.py'"),
    "no-such-file": (["dump", "modles.py:tiny"], "Did you mean 'models.py'"),
    "no-extension": (["dump", "./models:tiny"], "Did you mean 'models.py:tiny'"),
    "no-such-attribute": (["check", "models.py:tiney"], "Did you mean 'tiny'"),
    "no-factory": (["check", "models.py"], "write models.py:NAME"),
    "no-name": (["check", "models:"], "SPEC"),
    "empty": (["check", ""], "SPEC"),
    "not-callable": (["check", "models.py:number"], "int, not a factory"),
    "arguments-needed": (["check", "models.py:needs"], "needs checkpoint"),
    "returns-none": (["check", "models.py:returns_none"], "NoneType"),
    "returns-four": (["check", "models.py:returns_four"], "returned 4 values"),
    "returns-class": (["check", "models.py:returns_class"], "class Tiny"),
    "returns-tensor": (["check", "models.py:returns_tensor_args"], "(model, (tensor,))"),
    "returns-dict": (["check", "models.py:returns_dict_args"], "(model, (), {...})"),
    "returns-bad-kwargs": (["check", "models.py:returns_bad_kwargs"], "kwargs"),
    "no-inputs": (["check", "models.py:model_only"], "missing a required argument: 'ids'"),
    "too-many-inputs": (["check", "models.py:too_many_inputs"], "too many positional arguments"),
    "unknown-input": (["check", "models.py:unknown_input"], "unexpected keyword argument 'idz'"),
    "no-such-pass": (["dump", "models.py:tiny", "--pipeline", "narrow-64bits"], "Did you mean 'narrow-64bit'"),
    "no-such-pass-explained": (["passes", "narrow"], "Did you mean 'narrow-64bit'"),
    "no-such-pass-option": (["dump", "models.py:tiny", "--pipeline", "narrow-64bit{mood=x}"], "no option 'mood'"),
    "unreadable-pipeline": (["dump", "models.py:tiny", "--pipeline", "a b"], "cannot read the pipeline"),
    "no-such-target": (["dump", "models.py:tiny", "--target", "trn9"], "trn2"),
    "no-such-stage": (["dump", "models.py:tiny", "--print-after", "narow-64bit"], "Did you mean 'narrow-64bit'"),
    "diff-of-a-table": (["dump", "models.py:tiny", "--diff", "-f", "table"], "--diff"),
    "bad-range": (["check", "models.py:tiny", "--range", "ids:0-3"], "INPUT=LOW:HIGH"),
    "no-such-input": (["check", "models.py:tiny", "--range", "idz=0:3"], "Did you mean 'ids'"),
    "empty-range": (["check", "models.py:tiny", "--range", "ids=3:0"], "3 is above 0"),
    "output-nowhere": (["dump", "models.py:tiny", "-o", "nowhere/graph.py"], "no directory"),
    "output-directory": (["dump", "models.py:tiny", "-o", "."], "it is a directory"),
    "no-such-program": (["dump", "mine.pt2"], "no file 'mine.pt2'"),
}


@pytest.mark.parametrize("case", BAD_USAGE)
def test_bad_usage_is_one_line_and_exit_2(nxfx: Nxfx, case: str) -> None:
    arguments, told = BAD_USAGE[case]
    run = nxfx(*arguments)
    assert run.code == 2, run.stderr
    assert told in one_line(run)
    assert run.stdout == ""


def test_a_file_that_is_no_program_is_refused(nxfx: Nxfx, tmp_path: Path) -> None:
    (tmp_path / "text.pt2").write_text("not a program")
    (tmp_path / "directory.pt2").mkdir()
    with zipfile.ZipFile(tmp_path / "zip.pt2", "w") as archive:
        archive.writestr("zip/hello.txt", "hello")
    with zipfile.ZipFile(tmp_path / "torn.pt2", "w") as archive:
        archive.writestr("torn/archive_format", "pt2")
    torch.save({"weight": torch.ones(2)}, tmp_path / "weights.pt2")
    for name in ("text", "directory", "zip", "torn", "weights"):
        run = nxfx("dump", f"{name}.pt2")
        assert run.code == 2, name
        assert f"{name}.pt2" in one_line(run)


BAD_MODELS = {
    "factory-raises": (
        "models.py:raises",
        ["ValueError: no weights in [bold]here[/]; \\x1b[31mred", "models.py:52", "# the line at fault"],
    ),
    "factory-exits": ("models.py:exits", ["SystemExit", "models.py:56"]),
    "syntax-error": ("broken.py:tiny", ["SyntaxError", "broken.py:2", "x = = 1"]),
    "import-error": ("imports.py:tiny", ["not_installed_anywhere", "imports.py:1"]),
    "import-error-in-module": ("imports:tiny", ["not_installed_anywhere", "imports.py:1"]),
    "no-tensors": ("models.py:nothing", ["Nothing"]),
    "no-tensors-instance": ("models.py:instance", ["Nothing"]),
    "no-tensors-class": ("models.py:Nothing", ["Nothing"]),
    "not-capturable": ("models.py:loop", ["models.py:23"]),
}


@pytest.mark.parametrize("case", BAD_MODELS)
def test_a_model_that_fails_is_one_line_and_exit_1(nxfx: Nxfx, case: str) -> None:
    spec, told = BAD_MODELS[case]
    run = nxfx("dump", spec)
    assert run.code == 1, run.stderr
    for text in told:
        assert text in one_line(run)
    assert run.stdout == ""


def test_traceback_on_request_only(nxfx: Nxfx) -> None:
    run = nxfx("dump", "models.py:raises", "--traceback")
    assert (
        run.code == 1
        and run.stderr.startswith("Traceback")
        and "the line at fault" in run.stderr
        and "\x1b" not in run.stderr
    )
    assert run.stderr.splitlines()[-1].startswith("nxfx dump: raises() raised")


def test_a_value_out_of_its_declared_range_is_refused(nxfx: Nxfx) -> None:
    run = nxfx("check", "models.py:tiny", "--range", "ids=0:4")
    assert run.code == 1
    assert "'ids'" in run.stderr.splitlines()[-1] and "[0, 4]" in run.stderr.splitlines()[-1]


def test_a_failing_pass_names_itself_the_line_and_a_reproducer_that_fails_too(
    nxfx: Nxfx, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nxfx.graph.builder import NodeBuilder

    def fail(self: Pass, gm: torch.fx.GraphModule, context: Any) -> PassResult:
        (node,) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.cumsum.default)
        with NodeBuilder(gm.graph, self.name).before(node):
            raise RuntimeError("deliberate\nfailure")

    monkeypatch.setattr(Narrow64bit, "targets", None)
    monkeypatch.setattr(Narrow64bit, "run", fail)
    run = nxfx("dump", "models.py:tiny")
    assert run.code == 1
    told = run.stderr.splitlines()[-1]
    assert (
        "'narrow-64bit'" in told
        and "cumsum" in told
        and "models.py:12" in told
        and "RuntimeError: deliberate; failure" in told
    )
    path = Path(told.split("reproducer: ")[1])
    assert path.is_file() and "cumsum" in path.read_text()


def test_ctrl_c_is_130(nxfx: Nxfx) -> None:
    run = nxfx("dump", "models:interrupts")
    assert (run.code, run.stderr, run.stdout) == (128 + signal.SIGINT, "nxfx dump: interrupted\n", "")


def test_a_closed_pipe_is_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "models.py").write_text(MODELS)
    with subprocess.Popen(
        command("dump", "models.py:tiny", "-f", "table"),
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as run:
        assert run.stdout is not None and run.stderr is not None
        run.stdout.close()
        told = run.stderr.read()
    assert run.returncode == 128 + signal.SIGPIPE
    assert told.strip() == "chatter from the model"


def test_progress_where_standard_error_is_a_terminal(tmp_path: Path) -> None:
    pty = pytest.importorskip("pty")
    (tmp_path / "models.py").write_text(MODELS.replace('print("chatter from the model")', "pass"))
    ours, theirs = pty.openpty()
    run = subprocess.run(
        command("dump", "models.py:tiny"),
        cwd=tmp_path,
        env={**environment(), "TERM": "xterm"},
        stdout=subprocess.PIPE,
        stderr=theirs,
        text=True,
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            chunk = os.read(ours, 65536)
        except OSError:
            break
        if not chunk:
            break
        shown += chunk
    os.close(ours)
    assert run.returncode == 0 and run.stdout.startswith("class GraphModule")
    assert b"capturing" in shown


# -- .pt2 --------------------------------------------------------------------------------------------------


class Scale(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("factor", torch.tensor([2.0, 3.0]))

    def forward(self, x: torch.Tensor, *, bias: torch.Tensor) -> torch.Tensor:
        return x * self.factor + bias.cumsum(0)


def test_an_exported_program_is_a_spec(nxfx: Nxfx, tmp_path: Path) -> None:
    program = torch.export.export(Scale(), (torch.ones(2),), {"bias": torch.ones(2, dtype=torch.int64)}, strict=False)
    torch.export.save(program, tmp_path / "scale.pt2")
    run = nxfx("dump", "scale.pt2", "-f", "text")
    assert run.code == 0, run.stderr
    assert "aten.cumsum.default(" in run.stdout
    assert nxfx("check", "scale.pt2").code == 0


def test_a_saved_prepared_module_is_a_spec(nxfx: Nxfx, tmp_path: Path) -> None:
    import nxfx as package

    args, kwargs = (torch.ones(2),), {"bias": torch.ones(2, dtype=torch.int64)}
    prepared = package.prepare(Scale(), args, kwargs)
    prepared.save(tmp_path / "scale.pt2")
    run = nxfx("dump", "scale.pt2", "-f", "text")
    assert run.code == 0, run.stderr
    assert "aten.cumsum.default(" in run.stdout
    assert nxfx("check", "scale.pt2").stdout == f"{prepared.report}\n"
    assert nxfx("dump", "scale.pt2", "--diff").code == 2


# -- safe to show ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["[bold]x[/] [link=http://a]", "[/] [[", "\x1b]0;title\x07", "a\u202eb", "\ud800"])
def test_names_are_never_markup_nor_terminal_codes(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    cli_console.say(text)
    cli_console.emit(text)
    shown = capsys.readouterr()
    expected = text.translate({0x1B: "\\x1b", 0x07: "\\x07", 0x202E: "\\u202e", 0xD800: "\\ud800"})
    assert shown.err == f"nxfx: {expected}\n" and shown.out == f"{expected}\n"
    assert cli_console.paint_report(expected).plain == cli_console.paint_diff(expected).plain == expected


def test_output_that_the_terminal_cannot_spell_is_escaped(tmp_path: Path) -> None:
    (tmp_path / "models.py").write_text(
        textwrap.dedent(MODELS).replace("positions = ", "größe = positions = "), encoding="utf-8"
    )
    run = subprocess.run(
        command("dump", "models.py:tiny"),
        cwd=tmp_path,
        env={**environment(), "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
    )
    assert (run.returncode, run.stderr) == (0, "chatter from the model\n")  # and no progress: it is no terminal
    assert "gr\\xf6\\xdfe = positions" in run.stdout
