"""`nxfx lower`: the program on standard output or in a file, the summary on standard error, one line and an exit code when refused."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from nxfx.cli import main
from nxfx.handoff import mlir, xla

MODELS = """\
import torch


class Pick(torch.nn.Module):
    def forward(self, x, i):
        return x[i] * 0.5


class Counts(torch.nn.Module):
    def forward(self, x):
        return torch.histc(x, 4)  # the line at fault


def pick():
    return Pick(), (torch.randn(5, 4), torch.tensor([0, -1]))


def counts():
    return Counts(), (torch.randn(5),)
"""
needs_torch_mlir = pytest.mark.skipif(importlib.util.find_spec("torch_mlir") is None, reason="torch-mlir is not installed")


@pytest.fixture
def nxfx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "lower_models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["nxfx", "lower", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    yield run
    sys.modules.pop("lower_models", None)


@needs_torch_mlir
def test_the_program_goes_out_and_the_summary_to_standard_error(nxfx, tmp_path: Path) -> None:
    code, out, err = nxfx("lower_models.py:pick")
    assert code == 0 and "func.func @main" in out and "stablehlo.gather" in out and "operations, 2 arguments" not in out
    assert "2 arguments" in err and "0 scatter" in err and "1 gather by the graph: aten.index.Tensor" in err
    assert "lower_models.py:6: return x[i] * 0.5" in err
    assert nxfx("lower_models.py:pick", "-o", "a.mlir", "--weights", "inline")[:2] == (0, "")
    assert nxfx("lower_models.py:pick", "-o", "a.mlirbc")[:2] == (0, "")
    assert "stablehlo.gather" in (tmp_path / "a.mlir").read_text()
    assert (tmp_path / "a.mlirbc").read_bytes()[:4] == b"ML\xefR"


@needs_torch_mlir
def test_a_refusal_is_one_line_and_exit_1(nxfx) -> None:
    code, out, err = nxfx("lower_models.py:counts")
    assert code == 1 and out == ""
    assert err.startswith("nxfx lower: torch-mlir cannot lower aten.histc.default at ") and len(err.splitlines()) == 1
    assert "lower_models.py:11: return torch.histc(x, 4)" in err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--to", "hl"), "Did you mean 'hlo'?"),
        (("--weights", "inlin"), "Did you mean 'inline'?"),
        (("--to", "hlo", "--weights", "inline"), "--weights inline goes with --to stablehlo"),
        (("--pipeline", "narow-64bit"), "narrow-64bit"),
        (("-o", "nowhere/a.mlir"), "there is no directory"),
    ],
)
def test_wrong_usage_is_exit_2(nxfx, arguments: tuple[str, ...], told: str) -> None:
    code, out, err = nxfx("lower_models.py:pick", *arguments)
    assert (code, out) == (2, "") and told in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(("to", "module", "parts"), [("stablehlo", "torch_mlir.ir", mlir.torch_mlir), ("hlo", "torch_xla", xla.torch_xla)])
def test_what_is_not_installed_is_told_before_the_model_is_loaded(nxfx, monkeypatch, to: str, module: str, parts) -> None:
    parts.cache_clear()
    monkeypatch.setitem(sys.modules, module, None)
    code, _, err = nxfx("no_such_model.py:pick", "--to", to)
    parts.cache_clear()
    assert code == 2 and f"pip install 'nxfx[{'xla' if to == 'hlo' else to}]'" in err


@pytest.mark.xla
def test_hlo_text(nxfx) -> None:
    pytest.importorskip("torch_xla")
    code, out, err = nxfx("lower_models.py:pick", "--to", "hlo")
    assert code == 0 and out.startswith("HloModule") and "hlo operations" in err
