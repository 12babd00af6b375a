"""``nxfx verify``: is it still my model, and if not, which line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nxfx import api
from nxfx.cli import console, specs
from nxfx.errors import UsageError
from nxfx.pipeline import Pipeline
from nxfx.targets import get_target
from nxfx.verification.report import VerifyReport
from nxfx.verification.verify import verify


@dataclass(frozen=True)
class Request:
    """What was asked for on the command line."""

    spec: str
    candidate: str | None
    captures: Path | None
    reference: str
    autocast: str | None
    cast_type: str
    tokens: int
    localise: bool | None
    pipeline: str | None
    target: str
    sdk: str | None
    ranges: dict[str, tuple[int, int]]


def run(request: Request) -> VerifyReport:
    """Compare the candidate with the model that the SPEC names.

    Raises:
        UsageError: wrong SPEC, candidate, captures, pass, option, target, SDK release or range name.
        NxfxError: the model or a pass failed.
    """
    target = get_target(request.target, request.sdk)
    for path in (request.candidate if request.candidate and _is_outputs(request.candidate) else None, request.captures):
        if path is not None and not Path(path).exists():  # before the model is loaded
            raise UsageError(f"no such file: {path}")
    pipeline = Pipeline.default(target) if request.pipeline is None else Pipeline.parse(request.pipeline)
    with console.progress() as progress:
        progress(f"loading {request.spec}")
        loaded = specs.load(request.spec)
        if loaded.prepared is not None:
            raise UsageError(f"{request.spec} is a prepared model: name the model it was made from, and this file with --candidate")
        candidate: Any = _candidate(request.candidate)
        if candidate is None and request.autocast is None:
            progress("preparing")
            candidate = api.prepare(
                loaded.model,
                loaded.args,
                loaded.kwargs,
                target=target,
                pipeline=pipeline,
                ranges=request.ranges or None,
                observer=lambda step, graph_module, run: progress(f"after {step.name}"),
            )
        return verify(
            loaded.model,
            candidate,
            loaded.args,
            kwargs=loaded.kwargs,
            reference=request.reference,  # type: ignore[arg-type]  # checked by the caller
            autocast=request.autocast,  # type: ignore[arg-type]
            cast_type=request.cast_type,  # type: ignore[arg-type]
            localise=request.localise,
            captures=request.captures,
            tokens=request.tokens,
            progress=progress,
        )


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
