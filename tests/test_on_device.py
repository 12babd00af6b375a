"""The scripts that a user runs on an instance: here they say what is missing, and on the contract doubles every check passes."""

from __future__ import annotations

import contextlib
import runpy
import sys
from pathlib import Path

import doubles
import pytest
import torch

SCRIPTS = Path(__file__).resolve().parents[1] / "examples" / "on_device"
ROUTES = {
    "trace.py": "torch_neuronx",
    "model_builder_v1.py": "neuronx_distributed",
    "model_builder_v2.py": "neuronx_distributed",
    "nxdi_submodule.py": "neuronx_distributed",
    "torch_compile.py": "",  # moves tensors to the device "neuron", which no double makes
}


def run(name: str, monkeypatch: pytest.MonkeyPatch) -> int:
    path, modules, threads = list(sys.path), set(sys.modules), torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", [name])
    torch.set_num_threads(1)
    sys.path.insert(0, str(SCRIPTS))  # as Python does for a script
    try:
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(SCRIPTS / name), run_name="__main__")
    finally:
        torch.set_num_threads(threads)
        sys.path[:] = path
        for module in set(sys.modules) - modules:
            if str(getattr(sys.modules[module], "__file__", "")).startswith(str(SCRIPTS)):
                del sys.modules[module]
    return int(ended.value.code or 0)


def test_every_script_is_known() -> None:
    assert {p.name for p in SCRIPTS.glob("*.py")} == {*ROUTES, "checks.py"}


@pytest.mark.parametrize("name", ROUTES)
def test_without_neuron_it_says_what_to_install(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(name, monkeypatch) == 2
    assert "pip install" in capsys.readouterr().err


@pytest.mark.parametrize("name", [n for n, double in ROUTES.items() if double])
def test_on_the_contract_double_every_check_passes(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    with doubles.installed(ROUTES[name]), contextlib.nullcontext():
        code = run(name, monkeypatch)
    printed = capsys.readouterr().out
    assert code == 0, printed
    assert "pass  " in printed and "FAIL" not in printed
