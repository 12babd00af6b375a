"""``nxfx verify``: is it still my model, and if not, which line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nxfx.cli import console, specs
from nxfx.cli.options import Preparation
from nxfx.errors import UsageError
from nxfx.verification.report import VerifyReport
from nxfx.verification.verify import verify


def run(spec: str, candidate: str | None, how: Preparation, *, captures: Path | None, **options: Any) -> VerifyReport:
    """Compare the candidate with the model that the SPEC names.

    Args:
        options: more of what :func:`nxfx.verify` takes.

    Raises:
        UsageError: wrong SPEC, candidate, captures, pass, option, target, SDK release or range name.
        NxfxError: the model or a pass failed.
    """
    how.chosen()  # before the model is loaded
    for path in (candidate if candidate and _is_outputs(candidate) else None, captures):
        if path is not None and not Path(path).exists():
            raise UsageError(f"no such file: {path}")
    with console.progress() as progress:
        progress(f"loading {spec}")
        loaded = specs.load(spec)
        if loaded.prepared is not None:
            raise UsageError(f"{spec} is a prepared model: name the model it was made from, and this file with --candidate")
        other = _candidate(candidate)
        if other is None and options["autocast"] is None:
            other = how.prepare(loaded, progress)
        return verify(loaded.model, other, loaded.args, kwargs=loaded.kwargs, captures=captures, progress=progress, **options)


def _candidate(text: str | None) -> Any:
    """A file by its path, anything else by its SPEC."""
    if text is None:
        return None
    if _is_outputs(text):
        return text
    loaded = specs.load(text)
    return loaded.prepared if loaded.prepared is not None else loaded.model


def _is_outputs(text: str) -> bool:
    return Path(text).suffix in (".pt", ".pth", ".npz", ".npy")
