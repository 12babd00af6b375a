"""nxfx: a PyTorch model compiled for AWS Neuron should compute what its author wrote."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nxfx.errors import CaptureError, CompilerError, NeuronNotFound, NxfxError, PassError, PrepareError, RangeError, UsageError

if TYPE_CHECKING:
    from nxfx.api import check, prepare
    from nxfx.capture.dynamo import reports
    from nxfx.compiled import compile
    from nxfx.handoff.neuron import TracedModule, trace
    from nxfx.latency import WarmUp, warmup
    from nxfx.pipeline import Pass, PassContext, PassResult, Pipeline
    from nxfx.prepared import PreparedModule
    from nxfx.report import Finding, Location, Report, Rewrite, ValueSite
    from nxfx.storage import load
    from nxfx.targets import Target
    from nxfx.verification.report import VerifyReport
    from nxfx.verification.verify import verify

__version__ = "0.1.0"

__all__ = [
    "CaptureError", "CompilerError", "Finding", "Location", "NeuronNotFound", "NxfxError", "Pass", "PassContext", "PassError",
    "PassResult", "Pipeline", "PrepareError", "PreparedModule", "RangeError", "Report", "Rewrite", "Target", "TracedModule",
    "UsageError", "ValueSite", "WarmUp", "check", "compile", "load", "prepare", "reports", "trace", "verify", "VerifyReport", "warmup",
]  # fmt: skip

_WHERE = {
    "check": "nxfx.api", "prepare": "nxfx.api", "compile": "nxfx.compiled", "load": "nxfx.storage", "PreparedModule": "nxfx.prepared",
    "Pass": "nxfx.pipeline", "PassContext": "nxfx.pipeline", "PassResult": "nxfx.pipeline", "Pipeline": "nxfx.pipeline",
    "Finding": "nxfx.report", "Location": "nxfx.report", "Report": "nxfx.report", "Rewrite": "nxfx.report",
    "reports": "nxfx.capture.dynamo", "trace": "nxfx.handoff.neuron", "TracedModule": "nxfx.handoff.neuron",
    "warmup": "nxfx.latency", "WarmUp": "nxfx.latency",
    "Target": "nxfx.targets", "ValueSite": "nxfx.report",
    "verify": "nxfx.verification.verify", "VerifyReport": "nxfx.verification.report",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    # `import nxfx` costs what torch's entry-point scan can bear: the rooms are opened when they are asked for.
    if name not in _WHERE:
        raise AttributeError(f"module 'nxfx' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_WHERE[name]), name)
    globals()[name] = value
    return value
