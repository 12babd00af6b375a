"""From what ``torch.export`` raises to one :class:`~nxfx.errors.CaptureError`: which construct, where, what instead.

Tracers fail far from the cause and in their own terms. Here the exception says which *family* it belongs to, and the
syntax at the model's innermost frame which construct it is. What is not known is told as such, with the user's line.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import replace

import torch
from torch import fx

from nxfx.capture.refusals import LOST_TENSOR, MISFIT, RULES, Diagnosis, dynamic_shapes, plain, raised
from nxfx.errors import CaptureError
from nxfx.graph.meta import FakeTensor
from nxfx.report import advice
from nxfx.report.advice import Advice
from nxfx.report.findings import Finding, Severity
from nxfx.report.locations import Location, frame_rank, locate
from nxfx.report.report import Report
from nxfx.report.syntax import READING_BUILTINS, Construct, Site, causes, site_of

_AS_EAGER = "The trace accepts it and would give a graph that is silently different."


def translate(error: BaseException, *, model_name: str = "", model: torch.nn.Module | None = None) -> CaptureError:
    """The one error that a failed capture gives the user.

    Args:
        error: what ``torch.export.export`` or ``run_decompositions`` raised. Of two attempts pass the non-strict one's:
            its traceback holds the model's own frames.
        model_name: what to call the model.
        model: where to look for the line when no frame of the model is involved (its inputs, outputs, attributes).

    Returns:
        A ``CaptureError`` with ``error`` as its cause: the construct, the user's ``file:line`` and source text, what it
        means and what to write instead, in at most six lines; its report holds one finding. A ``CaptureError``, or one
        that torch wrapped, is returned as it is.
    """
    sites = [(cause, site_of(cause, is_cause=cause is not error)) for cause in causes(error)]
    refused = next((cause for cause, _ in sites if isinstance(cause, CaptureError)), None)
    if refused is not None:
        return refused
    site = next((s for _, s in sites if s is not None), None)
    borrowed = replace(site, raised_there=False) if site is not None else None
    # A model may wrap what it cannot handle in an error of its own: what reads a value is still the reason.
    for cause, own_site in sorted(sites, key=lambda pair: _DATA.search(_text(pair[0])) is None):
        found = _diagnose(cause, own_site or borrowed)
        if found is not None:
            return _capture_error(error, found, own_site or site or _declared(found, model), model_name)
    return _capture_error(error, _unknown(error), site, model_name)


def lost_tensor(program: torch.export.ExportedProgram, *, model_name: str = "") -> CaptureError | None:
    """A tensor that is computed in forward but stands in ``program`` as a constant without data.

    ``x.data``, for example: torch 2.9, and strict export on 2.13, give a graph that does not read ``x`` at all, and
    ``run_decompositions`` on it ends the process. Ask before that. A model made of fake tensors has fake constants of
    its own: nothing can be told there.
    """
    if any(isinstance(tensor, FakeTensor) for tensor in program.state_dict.values()):
        return None
    placeholders = {node.name: node for node in program.graph.find_nodes(op="placeholder")}
    for spec in program.graph_signature.input_specs:
        if spec.target is not None and isinstance(program.constants.get(spec.target), FakeTensor):
            found = Diagnosis(LOST_TENSOR.construct, Advice(LOST_TENSOR.code, LOST_TENSOR.becomes, LOST_TENSOR.fix))
            return _refused_at(placeholders[spec.arg.name], found, model_name)
    return None


def foreign_object(program: torch.export.ExportedProgram, *, model_name: str = "") -> CaptureError | None:
    """An object that is no tensor but an input of ``program``'s graph: a ``torch.Generator`` (from torch 2.13 on), a TorchScript object."""
    placeholders = {node.name: node for node in program.graph.find_nodes(op="placeholder")}
    for spec in program.graph_signature.input_specs:
        if spec.kind.name == "CUSTOM_OBJ":
            held, placeholder = program.constants.get(str(spec.target)), placeholders[spec.arg.name]
            text = f"{type(held)}: {held}"
            found = next(filter(None, (rule.diagnose(text) for rule in RULES)), None) or _unknown(TypeError(text))
            return _refused_at(next(iter(placeholder.users), placeholder), found, model_name)
    return None


def refused_write(node: fx.Node, construct: str, fix: str) -> CaptureError:
    """The error for a write in a captured graph that eager refuses, or that means nothing certain."""
    return _refused_at(node, Diagnosis(construct, Advice("NX201", _AS_EAGER, fix)), "")


def _refused_at(node: fx.Node, found: Diagnosis, model_name: str) -> CaptureError:
    location = locate(node)
    return _capture_error(None, found, Site(location, location, Construct()) if location.file else None, model_name)


def _capture_error(error: BaseException | None, found: Diagnosis, site: Site | None, model_name: str) -> CaptureError:
    location = site.location if site is not None else Location()
    lines = [f"{model_name or 'the model'} cannot be captured: {found.construct}"]
    if site is not None:
        lines.append(f"  {location}: {location.source}")
        if site.innermost != location:
            lines.append(f"  in library code: {site.innermost}: {site.innermost.source}")
    if found.advice.becomes:
        lines.append(f"  {found.advice.becomes}")
    if found.advice.fix:
        lines.append(f"  Write instead: {found.advice.fix}")
    message = f"{found.construct}. {found.advice.becomes}".rstrip()
    finding = Finding(found.advice.code, Severity.ERROR, message, location, "", found.advice.fix)
    translated = CaptureError("\n".join(lines), construct=found.construct, report=Report(findings=[finding]))
    translated.__cause__ = error
    return translated


def _declared(found: Diagnosis, model: torch.nn.Module | None) -> Site | None:
    """The first line of the model's code, ``__init__`` apart, that matches ``found.line``."""
    for module in (model, *model.children()) if model is not None and found.line else ():
        try:
            lines, first = inspect.getsourcelines(type(module))
            file = inspect.getsourcefile(type(module)) or ""
        except (TypeError, OSError):
            continue
        method = ""
        for number, text in enumerate(lines):
            method = next(iter(re.findall(r"^\s*def (\w+)", text)), method)
            if method != "__init__" and frame_rank(file) and re.search(found.line, text):
                location = Location(file, first + number, text.strip(), "", method)
                return Site(location, location, Construct())
    return None


def _diagnose(error: BaseException, site: Site | None) -> Diagnosis | None:
    text = _text(error)
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        fix = "capture with fewer layers or a smaller example, or put the weights on the meta device"
        return Diagnosis("memory ran out", Advice("NX409", "", fix))
    if "RecursionError: " in text:
        return raised("RecursionError: it calls itself without end, or deeper than Python's recursion limit")
    if site is not None and site.raised_there and is_own(error) and MISFIT.diagnose(text) is None:
        return raised(f"{type(error).__name__}: {plain(str(error))}".removesuffix(": "))
    for rule in RULES:
        if (rule.at_line or rule.syntax) and site is None:
            continue
        if rule.syntax and site is not None and not site.construct.calls(rule.syntax):
            continue
        found = rule.diagnose(text)
        if found is not None:
            return found
    if "Constraints violated" in text:
        return dynamic_shapes(text)
    return _data_dependent(text, site.construct if site is not None else Construct()) if _DATA.search(text) else None


def _text(error: BaseException) -> str:
    text = f"{type(error).__name__}: {error}"
    if type(error).__name__ == "TorchRuntimeError":  # Dynamo's wrapper around what an operator raised
        inner = re.search(r"got (\w+)\((['\"])(.*?)\2\)", text)
        text = f"{inner.group(1)}: {inner.group(3)}" if inner else text
    return text


def is_own(error: BaseException) -> bool:
    """Raised by the model on its own account, not because it saw a tracer's stand-in for a tensor or a number."""
    return not type(error).__module__.startswith("torch") and not re.search(
        r"FakeTensor|\bSym(Int|Float|Bool)", str(error)
    )


def _unknown(error: BaseException) -> Diagnosis:
    what = f"{type(error).__name__}: {plain(str(error))}".removesuffix(": ")
    fix = "keep what this line does out of forward, or write it with ordinary tensor operations"
    return Diagnosis(f"an operation that torch.export refuses ({what})", Advice("NX409", "", fix))


# --- data dependence -------------------------------------------------------------------------------------------------

_DATA = re.compile(
    r"^(GuardOnDataDependentSymNode|DataDependentOutputException|DynamicOutputShapeException"
    r"|PendingUnbackedSymbolNotFound)"
    r"|data-dependent|Data-dependent branching|Data dependent operator|Dynamic slicing with Tensor"
    r"|Indexing list with non|builtin operator `\w+` with argument types \[[^\]]*Tensor"
    r"|\.numpy\(\) is not supported|Tensor\.tolist\(\) with|unsupported format string passed to (Fake|Sym)"
    r"|unhashable type: .*Sym|of ints,\s*but got FakeTensor|(max|min)imum\(\) missing"
)
_OPERATOR = re.compile(r"\baten[.:]+(\w+)")
_NAMES = {"conditional": "conditional expression", "and-or": "and/or"}
_CONSTRUCTS = {
    "in": "in with a tensor's value",
    "loop": "a loop over a tensor whose size depends on data",
    "write": "an assignment to a slice with a tensor as bound",
    "slice": "a slice with a tensor as bound",
    "read": "indexing with a tensor's value",
    "format": "formatting a tensor's value",
}


def _data_dependent(text: str, construct: Construct) -> Diagnosis:
    """A tensor's value, or a size that depends on one, was needed by Python. The syntax says for what."""
    on_size = "Size-like symbols: u" in text
    construct = _without_columns(text, construct)
    kind = construct.kind
    if kind == "call":
        return _call(text, construct, on_size)
    if kind in _CONSTRUCTS:
        return Diagnosis(_CONSTRUCTS[kind], advice.SYNTAX[kind])
    if kind in advice.SYNTAX:
        name = _NAMES.get(kind, kind)
        if on_size:
            return Diagnosis(f"{name} on a size that depends on data", advice.EMPTY)
        return Diagnosis(f"{name} on a tensor's value", advice.SYNTAX[kind])
    if on_size:
        return Diagnosis("a size that depends on data", advice.DATA_SIZE)
    return Diagnosis("a tensor's value read by Python", advice.DATA_VALUE)


def _without_columns(text: str, construct: Construct) -> Construct:
    """Strict export does not tell the column, but its message tells some kinds apart."""
    if "Data-dependent branching" in text and construct.kind in ("", "call"):
        return Construct(construct.test or "if")
    if "Dynamic slicing" in text and construct.kind in ("", "call"):
        return Construct("slice")
    if "Indexing list" in text:
        return Construct("read")
    return Construct("format") if "format string" in text else construct


def _call(text: str, construct: Construct, on_size: bool) -> Diagnosis:
    shown = _shown(construct.name)
    known = advice.CALLS.get(construct.base)
    if known is not None and (construct.base not in READING_BUILTINS or "." not in construct.name):
        if on_size and known.code == "NX402":
            return Diagnosis(f"{shown}() of a size that depends on data", advice.DATA_SIZE)
        return Diagnosis(f"{shown}() of a tensor", known)
    if "numpy" in text or construct.name.startswith(("np.", "numpy.")):
        return Diagnosis(f"{shown}() takes a tensor to numpy", advice.CALLS["numpy"])
    if on_size:
        return Diagnosis(f"{shown}() on a tensor whose size depends on data", advice.DATA_SIZE)
    operator = _OPERATOR.search(text)
    if operator is not None and operator.group(1) in advice.CALLS:
        return Diagnosis(f"{shown}() reads a tensor's value ({operator.group(1)})", advice.CALLS[operator.group(1)])
    return Diagnosis(f"{shown}() with a tensor's value as a Python number", advice.DATA_VALUE)


def _shown(name: str) -> str:
    """``.item`` for a method of a tensor, whatever the tensor is called; functions in full."""
    root, _, base = name.rpartition(".")
    modules = ("torch", "F", "np", "numpy", "math", "nn")
    is_method = "." in name and hasattr(torch.Tensor, base) and root.partition(".")[0] not in modules
    return f".{base}" if is_method else name or "a call"
