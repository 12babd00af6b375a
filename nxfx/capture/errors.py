"""From whatever ``torch.export`` raises to one :class:`~nxfx.errors.CaptureError`: which construct, on which line, what instead.

Tracers fail far from the cause and in their own terms. Here the exception says which *family* it belongs to, and the syntax
at the model's innermost frame says which construct it is. Found by experiment on torch 2.9 and 2.13, non-strict and strict;
what is not known is told as such, with the user's line.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass

import torch

from nxfx.errors import CaptureError
from nxfx.graph.meta import FakeTensor
from nxfx.report import advice
from nxfx.report.advice import Advice
from nxfx.report.findings import Finding, Severity
from nxfx.report.locations import Location, frame_rank, locate
from nxfx.report.report import Report
from nxfx.report.syntax import READING_BUILTINS, Construct, Site, causes, site_of

_MAX_TEXT = 200


@dataclass(frozen=True)
class Diagnosis:
    """What is wrong, in the user's terms; ``line`` is a pattern for the line in ``forward``, for errors that have no frame."""

    construct: str
    advice: Advice
    line: str = r"^\s*def forward\b"


def translate(error: BaseException, *, model_name: str = "", model: torch.nn.Module | None = None) -> CaptureError:
    """The one error that a failed capture gives the user.

    Args:
        error: what ``torch.export.export`` or ``run_decompositions`` raised. Of two attempts pass the non-strict one's: its
            traceback holds the model's own frames.
        model_name: what to call the model.
        model: where to look for the line when no frame of the model is involved (its inputs, its outputs, its attributes).

    Returns:
        A ``CaptureError`` with ``error`` as its cause: the construct, the user's ``file:line`` and source text, what it means and
        what to write instead, in at most six lines; its report holds one finding. A ``CaptureError`` is returned as it is.
    """
    if isinstance(error, CaptureError):
        return error
    sites = [(cause, site_of(cause)) for cause in causes(error)]
    site = next((s for _, s in sites if s is not None), None)
    for cause, own_site in sites:
        found = _diagnose(cause, own_site or site)
        if found is not None:
            return _capture_error(error, found, own_site or site or _declared(found, model), model_name)
    return _capture_error(error, _unknown(error), site, model_name)


def _capture_error(error: BaseException | None, found: Diagnosis, site: Site | None, model_name: str) -> CaptureError:
    location = site.location if site is not None else Location()
    lines = [f"{model_name or 'the model'} cannot be captured: {found.construct}"]
    if site is not None:
        lines.append(f"  {location}: {location.source}")
        if site.innermost != location:
            lines.append(f"  in library code: {site.innermost}: {site.innermost.source}")
    lines += [f"  {found.advice.becomes}"] if found.advice.becomes else []
    lines += [f"  Write instead: {found.advice.fix}"] if found.advice.fix else []
    message = f"{found.construct}. {found.advice.becomes}".rstrip()
    finding = Finding(found.advice.code, Severity.ERROR, message, location, "", found.advice.fix)
    translated = CaptureError("\n".join(lines), construct=found.construct, report=Report(findings=[finding]))
    translated.__cause__ = error
    return translated


def _declared(found: Diagnosis, model: torch.nn.Module | None) -> Site | None:
    """The first line of the model's code, ``__init__`` apart, that matches ``found.line``."""
    for module in (model, *model.children()) if model is not None else ():
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
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return Diagnosis("memory ran out", Advice("NX409", "", "capture with fewer layers or a smaller example, or put the weights on the meta device"))
    if isinstance(error, RecursionError) or "RecursionError: " in str(error):
        return _raised("RecursionError: the model calls itself without end, or deeper than Python's recursion limit")
    if site is not None and site.raised_there and not type(error).__module__.startswith("torch"):
        if "FakeTensor" not in str(error) and "Sym" not in str(error) and not _MISFIT.pattern.search(f"TypeError: {error}"):
            return _raised(f"{type(error).__name__}: {_plain(str(error))}")
    text = f"{type(error).__name__}: {error}"
    if type(error).__name__ == "TorchRuntimeError":  # Dynamo's wrapper
        inner = re.search(r"got (\w+)\((['\"])(.*?)\2\)", text)
        text = f"{inner.group(1)}: {inner.group(3)}" if inner else text
    for rule in _RULES:
        match = rule.pattern.search(text)
        if match is not None and (rule.syntax is None or site is not None and _is(site.construct, rule.syntax)):
            construct = _plain(match.expand(rule.construct)).rstrip(": ")
            return Diagnosis(construct, Advice(rule.code, rule.becomes, match.expand(rule.fix)), rule.line_for(match))
    if "ConstraintViolationError" in text or "Constraints violated" in text:
        return _dynamic_shapes(text)
    if _DATA.search(text):
        return _data_dependent(text, site.construct if site is not None else Construct())
    return None


def _is(construct: Construct, name: str) -> bool:
    return name in (construct.kind, construct.base) or name in (n.rpartition(".")[2] for n in construct.nested)


def _plain(text: str) -> str:
    """The first line, in the user's terms: no fake tensors, no paths of torch, not without end."""
    line = next(iter(text.strip().splitlines()), "").strip()
    line = re.sub(r"(Fake|Functional)Tensor\(\.\.\., size=\(([^)]*)\)[^)]*\)", r"Tensor of size (\2)", line)
    line = re.sub(r"\S*\btorch/\S+", "torch", line.replace("FakeTensor", "Tensor"))
    return line if len(line) <= _MAX_TEXT else line[: _MAX_TEXT - 1] + "…"


def _raised(what: str) -> Diagnosis:
    becomes = "The model itself raises it, not the capture: calling it with the same arguments should fail on this line too."
    return Diagnosis(f"the model raises {what}", Advice("NX409", becomes, "call the model with arguments it accepts, or correct that line"))


def _unknown(error: BaseException) -> Diagnosis:
    what = f"{type(error).__name__}: {_plain(str(error))}".removesuffix(": ")
    fix = "keep what this line does out of forward, or write it with ordinary tensor operations"
    return Diagnosis(f"an operation that torch.export refuses ({what})", Advice("NX409", "", fix))


# --- data dependence -------------------------------------------------------------------------------------------------

_DATA = re.compile(
    r"^(GuardOnDataDependentSymNode|DataDependentOutputException|DynamicOutputShapeException|PendingUnbackedSymbolNotFound)"
    r"|data-dependent|Data-dependent branching|Data dependent operator|Dynamic slicing with Tensor|Indexing list with non-scalar"
    r"|builtin operator `\w+` with argument types \[[^\]]*Tensor|\.numpy\(\) is not supported|Tensor\.tolist\(\) with"
    r"|unsupported format string passed to (Fake|Sym)|unhashable type: .*Sym|of ints,\s*but got FakeTensor|(max|min)imum\(\) missing"
)
_OPERATOR = re.compile(r"\baten[.:]+(\w+)")
_TRUTH = {"conditional": "conditional expression", "and-or": "and/or"}
_NUMPY_ROOTS = ("np.", "numpy.")


def _data_dependent(text: str, construct: Construct) -> Diagnosis:
    """A tensor's value, or a size that depends on one, was needed by Python. The syntax says for what."""
    on_size = "Size-like symbols: u" in text
    kind = construct.kind
    if "Data-dependent branching" in text and kind in ("", "call"):  # strict export does not tell the column
        kind = construct.test or "if"
    elif "Dynamic slicing" in text and kind == "call":
        kind = "slice"
    elif "Indexing list" in text:
        kind = "read"
    if kind in ("if", "while", "conditional", "and-or", "not", "in", "assert"):
        name = _TRUTH.get(kind, kind)
        if kind == "in":
            return Diagnosis("in with a tensor's value", advice.SYNTAX["in"])
        if on_size:
            return Diagnosis(f"{name} on a size that depends on data", advice.EMPTY)
        return Diagnosis(f"{name} on a tensor's value", advice.SYNTAX[kind])
    if kind == "call":
        return _call(text, construct, on_size)
    if kind == "loop":
        return Diagnosis("a loop over a tensor whose size depends on data", advice.SYNTAX["loop"])
    if kind == "write":
        return Diagnosis("an assignment to a slice with a tensor as bound", advice.SYNTAX["write"])
    if kind == "slice":
        return Diagnosis("a slice with a tensor as bound", advice.SYNTAX["slice"])
    if kind == "read":
        return Diagnosis("indexing with a tensor's value", advice.SYNTAX["read"])
    if kind == "format" or "format string" in text:
        return Diagnosis("formatting a tensor's value", advice.SYNTAX["format"])
    return Diagnosis("a size that depends on data", advice.DATA_SIZE) if on_size else Diagnosis("a tensor's value read by Python", advice.DATA_VALUE)


def _call(text: str, construct: Construct, on_size: bool) -> Diagnosis:
    shown = _shown(construct.name)
    known = advice.CALLS.get(construct.base)
    if known is not None and (construct.base not in READING_BUILTINS or "." not in construct.name):
        if on_size and known.code == "NX402":
            return Diagnosis(f"{shown}() of a size that depends on data", advice.DATA_SIZE)
        return Diagnosis(f"{shown}() of a tensor", known)
    if "numpy" in text or construct.name.startswith(_NUMPY_ROOTS):
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
    is_method = "." in name and hasattr(torch.Tensor, base) and root.partition(".")[0] not in ("torch", "F", "np", "numpy", "math", "nn")
    return f".{base}" if is_method else name or "a call"


# --- dynamic shapes --------------------------------------------------------------------------------------------------

_SUGGESTED = re.compile(r"^\s+(\w+) = (.+)$", re.MULTILINE)
_SOURCE = re.compile(r"L\['(\w+)'\]((?:\[[^\]]+\])*)\.size\(\)\[(\d+)\]")


def _dynamic_shapes(text: str) -> Diagnosis:
    """Name the dimension and the constraint, which torch hides among generated guards."""
    suggested = dict(_SUGGESTED.findall(text.partition("Suggested fixes:")[2]))
    source = _SOURCE.search(text)
    where = f" (dimension {source.group(3)} of {source.group(1)}{source.group(2)})" if source else ""
    helpers = {name for name in suggested if name.startswith("_")}
    for name, value in suggested.items():
        if name in helpers:
            continue
        if value.isdigit():
            named = re.search(rf"{name} = L\['(\w+)'\]", text)
            what = f"the dynamic dimension {name}{where if named else ''} can only be {value}: the model fixes it, or the example's size is 0 or 1"
        elif value.startswith("Dim("):
            limits = re.search(r"min=(\w+)(?:, max=(\w+))?", value)
            low, high = (limits.group(1), limits.group(2)) if limits else ("", None)
            most = f" and at most {high}" if high else ""
            what = f"the dynamic dimension {name}{where} must be at least {low}{most}" if limits else f"the dynamic dimension {name}{where} is {value}"
        elif value in suggested or re.fullmatch(r"[A-Za-z]\w*", value):
            what = f"the dynamic dimensions {name} and {value} must always be equal"
        else:
            what = f"the dynamic dimension {name}{where} must have the form {value}"
        stated = "; ".join(f"{n} = {v}" for n, v in suggested.items())
        return Diagnosis(what, Advice("NX409", "The model does not work for every size that dynamic_shapes allows.", f"in dynamic_shapes: {stated}"))
    fixed = re.search(r"specialized it to be a constant \((\d+)\)", text)
    what = f"a dynamic dimension{where} can only be {fixed.group(1)}" if fixed else f"dynamic_shapes allow sizes{where} that the model does not"
    return Diagnosis(what, Advice("NX409", "The model does not work for every size that dynamic_shapes allows.", "leave that dimension out of dynamic_shapes"))


# --- what torch.export refuses by rule -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Rule:
    """``pattern`` in ``ErrorType: message``, and perhaps a construct at the line, give a diagnosis; groups may be used in it."""

    pattern: re.Pattern[str]
    construct: str
    fix: str
    becomes: str = ""
    code: str = "NX409"
    syntax: str | None = None
    line: str = ""

    def line_for(self, match: re.Match[str]) -> str:
        return self.line.replace(r"\1", re.escape(match.group(1))) if self.line else Diagnosis.line


def _rule(pattern: str, construct: str, fix: str, becomes: str = "", code: str = "NX409", syntax: str | None = None, line: str = "") -> _Rule:
    return _Rule(re.compile(pattern, re.DOTALL), construct, fix, becomes, code, syntax, line)


_NO_FAKE = "Capture runs the model on tensors without data, and this operator does not say what it returns for them."
_NO_DATA = "Capture runs the model on tensors without data: there is no memory to look at."
_SHAPES = "Capture runs the model on the example's shapes: calling it with the same arguments should fail on this line too."
_PYTREE = "Only tensors, Python numbers and strings, and containers that torch knows can pass the model's boundary."
_BUFFER = "register it in __init__ with register_buffer and write it in place (self.name.copy_(value))"
_REGISTER = "or register its class with torch.utils._pytree.register_pytree_node"

_RETURN = r"^\s*return\b"
_WRITE = r"\bself\.\1\b(\[[^\]]*\])*(\s*[-+*/|&]?=[^=]|\.\w+_\(|\.(append|extend|insert|update)\()"
_MISFIT = _rule(
    r"TypeError: (?!maximum|minimum).*?((?:missing \d+ required|takes (?:from )?\d+|got an unexpected keyword|got multiple values|Too many positional)[^\n]*)",
    r"a call whose arguments do not fit: \1",
    "pass what the signature of that forward asks for",
    _SHAPES,
)

_LOST_TENSOR = _rule(
    "not tracked with proxy|fake tensor in the exported program constant",
    "a tensor that tracing cannot follow (.data, .set_(), another thread)",
    "x.detach() instead of x.data; to write a parameter: with torch.no_grad(): p.copy_(value)",
    "The graph would hold the example's value instead of computing it.",
)

_RULES: tuple[_Rule, ...] = (
    # Boundary.
    _rule(r"Found <class '(?:[\w.<>]*\.)?(\w+)'> in output", r"an output of type \1", f"return tensors, in tuples, lists or dicts; {_REGISTER}", _PYTREE, line=_RETURN),
    _rule(r"one of the outputs with type `<class '(?:[\w.<>]*\.)?(\w+)'>`", r"an output of type \1", f"return tensors, in tuples, lists or dicts; {_REGISTER}", _PYTREE, line=_RETURN),
    _rule(r"unrecognized type (?:UserDefinedObjectVariable\()?(\w+?)(?:Variable)?\(?\)* at output", r"an output of type \1", f"return tensors, in tuples, lists or dicts; {_REGISTER}", _PYTREE, line=_RETURN),
    _rule(r"(?:Unsupported input type|one of the inputs with type `?)\s*<class '(?:[\w.<>]*\.)?(\w+)'>", r"an input of type \1", f"pass its tensors as arguments; {_REGISTER}", _PYTREE),
    _rule(r"`dynamic_shapes`", "dynamic_shapes that do not fit the inputs", "give one entry for each argument: {'x': {0: Dim('batch')}, 'y': None}"),
    _MISFIT,
    _rule("failed to bind arguments|Missing required positional", "a call whose arguments do not fit", _MISFIT.fix, _SHAPES),
    # Memory that is not there, and values that get lost.
    _rule("data pointer|not allocated yet|deepcopy", "copy.deepcopy() of a tensor", "use tensor.clone()", _NO_DATA, syntax="deepcopy"),
    _rule("not allocated yet", "torch.tensor() of tensors", "torch.stack([a, b]) keeps them tensors", _NO_DATA, syntax="tensor"),
    _rule("data pointer|not allocated yet", "the memory of a tensor", "use tensor operations instead of pointers and storages", _NO_DATA),
    _rule("support the deepcopy protocol", "a tensor kept in the model that another one was computed for", "keep tensor.detach()"),
    _LOST_TENSOR,
    # Operators and kinds of tensors.
    _rule(r"^UnsupportedOperatorException: .*([Nn]ested_?[Tt]ensor)|NestedTensor|strided NestedTensor", "a nested tensor", "pad to one length and pass a mask"),
    _rule("quantized nyi|quantized tensor|UnsupportedFakeTensorException", "a quantised tensor", "dequantise before the model, or quantise with torchao, whose tensors can be traced"),
    _rule(r"__obj_flatten__|__torch__\.torch\.classes", "a TorchScript object (quantised weights, for example)", "use the float module, or quantise with torchao"),
    _rule(r"no fake impl registered for <CustomOpDef\(([\w:]+)\)>", r"the custom operator \1 without a fake implementation", r'torch.library.register_fake("\1") with a function that returns torch.empty_like(...)', _NO_FAKE),
    _rule(r"^UnsupportedOperatorException: (?!aten)(\w+)\.(\w+)", r"the custom operator \1::\2 without a fake implementation", r'torch.library.register_fake("\1::\2") with a function that returns torch.empty_like(...)', _NO_FAKE),
    _rule(r"^UnsupportedOperatorException: ([\w.]+)", r"the operator \1", "compute it before the model, or write it with other operators", _NO_FAKE),
    _rule("Exporting a ScriptModule", "a TorchScript module", "prepare the Python module it was made from"),
    _rule("uninitialized parameter", "a lazy module without its shapes", "call the model once, eagerly, before preparing it"),
    _rule(r"class 'torch\._C\.Generator'|opaque object was created", "a torch.Generator in forward", "draw the noise outside and pass it in as an input", advice.RANDOM, "NX405"),
    _rule("Guard check failed|torch_fn_counts", "torch.compile inside the model", "prepare the module without the inner torch.compile"),
    # Devices and autograd.
    _rule("not linked with support for|driver version is insufficient|No CUDA GPUs|not compiled with CUDA", "a device that is not here", "take the device from the input: device=x.device"),
    _rule("two devices|two different devices", "tensors on different devices", "move the model and its inputs to one device; create tensors with device=x.device"),
    _rule("does not require grad and does not have a grad_fn", "autograd inside forward", "write the derivative out, or use torch.func.grad", "Capture runs without gradients."),
    _rule("leaf Variable that requires grad", "an in-place write to a parameter that requires a gradient", "write it under torch.no_grad(), or make it a buffer"),
    # State.
    _rule(r"attrs were created in the model\.forward: \{'(\w+)'", r"assignment to self.\1 in forward", _BUFFER, advice.STATE, "NX406", line=_WRITE),
    _rule(r"tensor attributes? self\.([\w.\[\]]+).*assigned during export", r"assignment to self.\1 in forward", _BUFFER, advice.STATE, "NX406", line=_WRITE),
    _rule(r"Mutating module attribute (\w+) during export", r"assignment to self.\1 in forward", _BUFFER, advice.STATE, "NX406", line=_WRITE),
    _rule(r"Constant (\S+) is mutated", r"a write to the plain tensor attribute \1", _BUFFER, advice.STATE, "NX406", line=_WRITE),
    _rule("Node arity mismatch|tree structure.*mismatch", "a list or dict of the model that grows in forward", "collect in a local variable and return it", advice.STATE, "NX406"),
    # The model's own mistakes.
    _rule(
        "Data-dependent assertion failed",
        "an assertion that fails, or reads a tensor's value",
        advice.SYNTAX["assert"].fix,
        advice.CHECK,
        "NX407",
    ),
    _rule(r"raised exception (\w+)\((?:\[?(?:ConstantVariable\(\w+: )?['\"]([^\n]*?)['\"][)\]]*\n)?", r"the model raises \1: \2", "call the model with arguments it accepts, or correct that line", _SHAPES),
    _rule(r"Error: '(?:Fake)?Tensor' object (has no attribute '\w+')", r"the model raises AttributeError: a tensor \1", "correct that line", _SHAPES),
    _rule(
        r"^(?!Torch|Internal)\w+: ([^\n]*(?:same reduction dim|Attempting to broadcast|is invalid for input of size|out of bounds for dimension|out of range"
        r"|[Ss]izes? of tensors? must match|must match the size|shapes cannot be multiplied|size mismatch|to have the same|expand: attempting"
        r"|unsupported operand type|expected .{0,60}channels|[Ee]xpected .{0,80}but got|must be equal|not divisible|does not match)[^\n]*)",
        r"an operation that does not fit its operands: \1",
        "call the model with arguments it accepts, or correct that line",
        _SHAPES,
    ),
)


# --- what torch.export does not refuse -------------------------------------------------------------------------------


def lost_tensor(program: torch.export.ExportedProgram, *, model_name: str = "") -> CaptureError | None:
    """A tensor that is computed in forward but stands in ``program`` as a constant without data, told like any other refusal.

    ``x.data``, for example: torch 2.9, and strict export on 2.13, give a graph that does not read ``x`` at all, and
    ``run_decompositions`` on it ends the process. Ask before that. A model made of fake tensors has fake constants of its own:
    nothing can be told there.
    """
    if any(isinstance(tensor, FakeTensor) for tensor in program.state_dict.values()):
        return None
    placeholders = {node.name: node for node in program.graph.find_nodes(op="placeholder")}
    for spec in program.graph_signature.input_specs:
        if spec.target is not None and isinstance(program.constants.get(spec.target), FakeTensor):
            location = locate(placeholders[spec.arg.name])
            found = Diagnosis(_LOST_TENSOR.construct, Advice(_LOST_TENSOR.code, _LOST_TENSOR.becomes, _LOST_TENSOR.fix))
            return _capture_error(None, found, Site(location, location, Construct()), model_name)
    return None
