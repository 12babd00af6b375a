"""What an installed nxfx must do. Run by `.ci/wheel-check` as `python -I tests/wheel_smoke.py`, outside the tree."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import pkgutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]


class MaskedEmbedding(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(16, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        mask = torch.ones(ids.shape)
        mask[:, :2] = 0
        return self.embedding(ids) * mask.unsqueeze(-1)


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def dynamo_finds_the_backend_by_itself(model: torch.nn.Module, ids: torch.Tensor) -> None:
    assert "nxfx" not in sys.modules
    assert "nxfx" in torch._dynamo.list_backends(None)
    with torch.no_grad():
        assert_same(torch.compile(model, backend="nxfx")(ids), model(ids))


def import_comes_from_the_wheel() -> None:
    import nxfx

    assert not Path(nxfx.__file__).resolve().is_relative_to(ROOT), nxfx.__file__
    files = {file.as_posix() for file in importlib.metadata.files("nxfx") or ()}
    assert "nxfx/py.typed" in files
    strays = {file for file in files if not file.startswith(("nxfx/", "nxfx-")) and Path(file).stem != "nxfx"}
    assert not strays, strays


def every_pass_is_importable() -> None:
    import nxfx.passes

    installed = {module.name for module in pkgutil.iter_modules(nxfx.passes.__path__)}
    written = {file.stem for file in (ROOT / "passes").glob("*.py")} - {"__init__"}
    assert written, "no passes in the tree"
    assert installed == written, installed ^ written
    for name in installed:
        importlib.import_module(f"nxfx.passes.{name}")
    assert importlib.util.find_spec("passes") is None, "a top-level package `passes` was installed"


def prepare_keeps_the_result(model: torch.nn.Module, ids: torch.Tensor) -> None:
    import nxfx

    prepared = nxfx.prepare(model, (ids,))
    with torch.no_grad():
        assert_same(prepared(ids), model(ids))
    assert prepared.report.rewrites


def the_command_runs() -> None:
    command = Path(sysconfig.get_path("scripts")) / "nxfx"
    for arguments, expected in (("--help", "doctor"), ("passes", "narrow-64bit")):
        run = subprocess.run([command, arguments], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        assert expected in run.stdout, run.stdout


def main() -> None:
    torch.manual_seed(0)
    model, ids = MaskedEmbedding().eval(), torch.arange(12).reshape(2, 6)
    dynamo_finds_the_backend_by_itself(model, ids)
    import_comes_from_the_wheel()
    every_pass_is_importable()
    prepare_keeps_the_result(model, ids)
    the_command_runs()
    print(f"nxfx {importlib.metadata.version('nxfx')} works from its wheel")


if __name__ == "__main__":
    main()
