"""``nxfx lower``: the cleaned graph as StableHLO or HLO, and what stands in it."""

from __future__ import annotations

from nxfx.cli import console, specs
from nxfx.cli.options import Preparation
from nxfx.errors import MissingDependencyError, UsageError
from nxfx.handoff import mlir, stablehlo, xla
from nxfx.handoff.lowered import Lowered


def run(spec: str, dialect: str, weights: str, how: Preparation) -> Lowered:
    """Prepare the model and lower its graph.

    Raises:
        UsageError: wrong SPEC, pass, option, target, SDK release or range name, or the lowering is not installed.
        LoweringError: the lowering refuses; names the op and the user's line.
        NxfxError: the model or a pass failed.
    """
    how.chosen()  # before the model is loaded
    if dialect == "hlo" and weights == "inline":
        raise UsageError("--weights inline goes with --to stablehlo: torch-xla passes weights as arguments")
    try:
        if dialect == "stablehlo":
            mlir.torch_mlir()
        else:
            xla.torch_xla()
    except MissingDependencyError as error:
        raise UsageError(str(error)) from None
    with console.progress() as progress:
        progress(f"loading {spec}")
        loaded = specs.load(spec)
        prepared = loaded.prepared
        if prepared is None:
            prepared = how.prepare(loaded, progress)
        progress(f"lowering to {dialect}")
        if dialect == "hlo":
            return xla.lower(prepared)
        return stablehlo.lower(prepared, weights="inline" if weights == "inline" else "arguments")
