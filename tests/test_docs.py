"""The documentation holds: its Python runs, its commands work, its links lead somewhere, computed parts are fresh.

A block is fenced ``python``. The blocks of one page run in order and share their names. Words after ``python`` say
more: ``raises=NAME`` the block ends with that exception; ``needs=MODULE`` it runs where that can be imported, else it
only has to compile. In ``sh`` blocks the lines ``nxfx ...`` are run; a comment ``# exit 1`` says which code is
expected.
"""

from __future__ import annotations

import builtins
import importlib
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import nxfx

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "examples" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_FENCE = re.compile(r"^(?P<indent> *)```(?P<info>[^\n`]*)\n(?P<text>.*?)^(?P=indent)```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """One fenced block: its language, the words after it, its text and first line."""

    language: str
    words: dict[str, str]
    text: str
    line: int


def blocks(path: Path, *languages: str) -> list[Block]:
    text = path.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        language, *words = match["info"].split() or [""]
        if language in languages:
            named = dict(word.partition("=")[::2] for word in words)
            found.append(Block(language, named, match["text"], text.count("\n", 0, match.start("text")) + 1))
    return found


@pytest.fixture(autouse=True)
def _backend_is_registered() -> None:
    """An installed nxfx is found by its entry point; one that is only on the path is registered here."""
    if "nxfx" not in torch._dynamo.list_backends(None):
        module = importlib.import_module("nxfx.capture.dynamo")
        torch._dynamo.register_backend(module.nxfx_backend, name="nxfx")


def _id(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _with(*languages: str) -> list[Path]:
    return [path for path in PAGES if blocks(path, *languages)]


@pytest.mark.parametrize("page", _with("python"), ids=_id)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    namespace: dict[str, Any] = {"__name__": "page"}
    grad = torch.is_grad_enabled()
    for block in blocks(page, "python"):
        # As if the block stood in its file: errors and findings then name the page and its line.
        code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
        if "needs" in block.words and importlib.util.find_spec(block.words["needs"]) is None:
            continue
        if "raises" in block.words:
            with pytest.raises(_exception(block.words["raises"])):
                exec(code, namespace)
        else:
            exec(code, namespace)
    torch.set_grad_enabled(grad)


def _exception(name: str) -> type[BaseException]:
    found = getattr(nxfx, name.removeprefix("nxfx."), None) or getattr(builtins, name)
    assert isinstance(found, type) and issubclass(found, BaseException)
    return found


def _commands() -> list[tuple[str, int]]:
    found: dict[str, int] = {}
    for page in PAGES:
        for block in blocks(page, "sh"):
            for line in block.text.splitlines():
                if line.startswith("nxfx "):
                    command, _, comment = line.partition("#")
                    expected = re.search(r"exit (\d+)", comment)
                    found[command.strip()] = int(expected[1]) if expected else 0
    return list(found.items())


@pytest.mark.parametrize(("command", "expected"), _commands(), ids=lambda v: str(v))
def test_shown_commands_work(command: str, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nxfx.cli import main

    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", shlex.split(command))
    before = set(sys.modules)
    try:
        with pytest.raises(SystemExit) as ended:
            main()
    finally:
        for name in set(sys.modules) - before:
            if str(getattr(sys.modules[name], "__file__", None)).startswith(str(tmp_path)):
                del sys.modules[name]
    assert (ended.value.code or 0) == expected


@pytest.mark.parametrize("page", PAGES, ids=_id)
def test_links_lead_somewhere(page: Path) -> None:
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" not in target and not target.startswith("#"):
            path, _, anchor = target.partition("#")
            assert (page.parent / path).exists(), f"{_id(page)} links to {target}"
            assert not anchor or anchor in _anchors(page.parent / path), f"{_id(page)}: no such heading: {target}"


def _anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", path.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def test_make_targets_named_in_the_docs_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for page in PAGES:
        named = set(re.findall(r"`make ([a-z-]+)", page.read_text(encoding="utf-8")))
        assert named <= targets, f"{_id(page)}: {named - targets}"


def test_readme_opens_with_the_two_commands() -> None:
    first = blocks(ROOT / "README.md", "sh")[0]
    assert [line.partition("#")[0].strip() for line in first.text.splitlines()] == ["make demo", "make test"]


@pytest.mark.skipif(torch.__version__ < "2.13", reason="the pages show what the pinned torch gives")
def test_computed_pages_are_up_to_date() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "docs/generate.py", "--check"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, f"run `python docs/generate.py`\n{run.stdout}{run.stderr}"


@pytest.mark.parametrize(
    ("page", "double"),
    [("torch-neuronx-trace.md", "torch_neuronx"), ("model-builder.md", "neuronx_distributed")],
)
def test_blocks_that_need_neuron_run_on_the_contract_doubles(page: str, double: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but those that show what happens without it; the doubles execute the graph on this machine."""
    import doubles

    path = ROOT / "docs" / "guide" / page
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    namespace: dict[str, Any] = {"__name__": "page"}
    with doubles.installed(double):
        for block in blocks(path, "python"):
            exec(compile("\n" * (block.line - 1) + block.text, str(path), "exec"), namespace)
    assert namespace["traced" if double == "torch_neuronx" else "serve"].reports
