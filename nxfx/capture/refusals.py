"""What ``torch.export`` refuses by rule, in the user's terms: one table, found by experiment on torch 2.9 and 2.13."""

from __future__ import annotations

import re
from dataclasses import dataclass

from nxfx.report import advice
from nxfx.report.advice import Advice

_MAX_TEXT = 200
FORWARD = r"^\s*def forward\b"
_RETURN = r"^\s*return\b"
_WRITE = r"\bself\.\1\b(\[[^\]]*\])*(\s*[-+*/|&]?=[^=]|\.\w+_\(|\.(append|extend|insert|update)\()"


@dataclass(frozen=True)
class Diagnosis:
    """What is wrong, in the user's terms.

    Attributes:
        construct: what cannot be captured.
        advice: the code, why, and what to write instead.
        line: a pattern for the line in the model's source, for errors that no frame of the model belongs to.
    """

    construct: str
    advice: Advice
    line: str = ""


@dataclass(frozen=True)
class Rule:
    """``ErrorType: message`` that matches one of ``patterns`` has this diagnosis; ``\\1`` in it is the match's group.

    Attributes:
        patterns: searched in order.
        construct, fix, becomes, code, line: see :class:`Diagnosis`.
        syntax: the rule holds only where this is called on the user's line.
        at_line: the rule holds only where a line of the model is known: it blames that line.
    """

    patterns: tuple[re.Pattern[str], ...]
    construct: str
    fix: str
    becomes: str = ""
    code: str = "NX409"
    line: str = ""
    syntax: str = ""
    at_line: bool = False

    def diagnose(self, text: str) -> Diagnosis | None:
        match = next(filter(None, (p.search(text) for p in self.patterns)), None)
        if match is None:
            return None
        construct = plain(match.expand(self.construct)).rstrip(": ")
        line = self.line.replace(r"\1", re.escape(match.group(1))) if r"\1" in self.line else self.line
        return Diagnosis(construct, Advice(self.code, self.becomes, match.expand(self.fix)), line)


def _rule(*patterns: str, construct: str, fix: str, **rest: str | bool) -> Rule:
    return Rule(tuple(re.compile(p, re.DOTALL) for p in patterns), construct, fix, **rest)  # type: ignore[arg-type]


def plain(text: str) -> str:
    """The first line, in the user's terms: no fake tensors, no paths of torch, not without end."""
    line = next(iter(text.strip().splitlines()), "").strip()
    line = re.sub(r"(Fake|Functional)Tensor\(\.\.\., size=\(([^)]*)\)[^)]*\)", r"Tensor of size (\2)", line)
    line = re.sub(r"\S*\btorch/\S+", "torch", line.replace("FakeTensor", "Tensor"))
    return line if len(line) <= _MAX_TEXT else line[: _MAX_TEXT - 1] + "…"


_NO_FAKE = "Capture runs the model on tensors without data, and this operator does not say what it returns for them."
_NO_DATA = "Capture runs the model on tensors without data: there is no memory to look at."
_MISTAKE = (
    "The model's own code raises it: called eagerly with the same arguments it should fail on this line too. "
    "If it does not, it takes another path while it is traced."
)
_PYTREE = "Only tensors, Python numbers and strings, and containers that torch knows can pass the model's boundary."
_CORRECT = "call the model with arguments it accepts, or correct that line"
_BUFFER = "register it in __init__ with register_buffer and write it in place (self.name.copy_(value))"
_REGISTER = "or register its class with torch.utils._pytree.register_pytree_node"
_FAKE = r'torch.library.register_fake("{}") with a function that returns torch.empty_like(...)'

MISFIT = _rule(
    r"TypeError: (?!maximum|minimum).*?((?:missing \d+ required|missing a required|takes (?:from )?\d+|got an unexpected keyword)[^\n]*)",
    r"TypeError.*?((?:got multiple values|[Tt]oo many positional|Missing required)[^\n]*?)['\")\]]*\n",
    "(failed to bind arguments)",
    construct=r"a call whose arguments do not fit: \1",
    fix="pass what the signature of that forward asks for",
    becomes=_MISTAKE,
)
LOST_TENSOR = _rule(
    "not tracked with proxy|fake tensor in the exported program constant",
    construct="a tensor that tracing cannot follow (.data, .set_(), another thread)",
    fix="x.detach() instead of x.data; to write a parameter: with torch.no_grad(): p.copy_(value)",
    becomes="The graph would hold the example's value instead of computing it.",
    line=r"\.data\b|\.set_\(|Thread\(",
)

_BOUNDARY = (
    _rule(
        r"Found <class '(?:[\w.<>]*\.)?(\w+)'> in output",
        r"one of the outputs with type `<class '(?:[\w.<>]*\.)?(\w+)'>`",
        r"unrecognized type (?:UserDefinedObjectVariable\()?(\w+?)(?:Variable)?\(?\)* at output",
        construct=r"an output of type \1",
        fix=f"return tensors, in tuples, lists or dicts; {_REGISTER}",
        becomes=_PYTREE,
        line=_RETURN,
    ),
    _rule(
        r"Unsupported input type <class '(?:[\w.<>]*\.)?(\w+)'>",
        r"one of the inputs with type `<class '(?:[\w.<>]*\.)?(\w+)'>",
        construct=r"an input of type \1",
        fix=f"pass its tensors as arguments; {_REGISTER}",
        becomes=_PYTREE,
        line=FORWARD,
    ),
    _rule(
        "`dynamic_shapes`",
        construct="dynamic_shapes that do not fit the inputs",
        fix="give one entry for each argument: {'x': {0: Dim('batch')}, 'y': None}",
        line=FORWARD,
    ),
    MISFIT,
)

_MEMORY = (
    _rule(
        "data pointer|not allocated yet|deepcopy",
        construct="copy.deepcopy() of a tensor",
        fix="use tensor.clone()",
        becomes=_NO_DATA,
        syntax="deepcopy",
    ),
    _rule(
        "not allocated yet",
        construct="torch.tensor() of tensors",
        fix="torch.stack([a, b]) keeps them tensors",
        becomes=_NO_DATA,
        syntax="tensor",
    ),
    _rule(
        "data pointer|not allocated yet",
        construct="the memory of a tensor",
        fix="use tensor operations instead of pointers and storages",
        becomes=_NO_DATA,
    ),
    _rule(
        "support the deepcopy protocol",
        construct="a tensor with an autograd history that is kept in the model",
        fix="keep tensor.detach()",
    ),
    LOST_TENSOR,
)

_OPERATORS = (
    _rule(
        "^UnsupportedOperatorException: .*nested_tensor|NestedTensor",
        construct="a nested tensor",
        fix="pad to one length and pass a mask",
        line=FORWARD,
    ),
    _rule(
        "quantized nyi|UnsupportedFakeTensorException",
        construct="a quantised tensor",
        fix="use the float weights, or quantise with torchao",
        line=FORWARD,
    ),
    _rule(
        r"__obj_flatten__|__torch__\.torch\.classes",
        construct="a TorchScript object (quantised weights, for example)",
        fix="use the float module, or quantise with torchao",
    ),
    _rule(
        r"no fake impl registered for <CustomOpDef\(([\w:]+)\)>",
        r"Operator `(?!aten)([\w.]+)` cannot be executed with fake tensors",
        construct=r"the custom operator \1 without a fake implementation",
        fix=_FAKE.format(r"\1"),
        becomes=_NO_FAKE,
    ),
    _rule(
        r"^UnsupportedOperatorException: (?!aten)(\w+)\.(\w+)",
        construct=r"the custom operator \1::\2 without a fake implementation",
        fix=_FAKE.format(r"\1::\2"),
        becomes=_NO_FAKE,
    ),
    _rule(
        r"^UnsupportedOperatorException: ([\w.]+)",
        r"^AssertionError: NYI: ([\w.]+)",
        construct=r"the operator \1",
        fix="compute it before the model, or write it with other operators",
        becomes=_NO_FAKE,
    ),
    _rule(
        "Exporting a ScriptModule",
        construct="a TorchScript module",
        fix="prepare the Python module it was made from",
    ),
    _rule(
        "uninitialized parameter",
        construct="a lazy module without its shapes",
        fix="call the model once, eagerly, before preparing it",
        line=FORWARD,
    ),
    _rule(
        r"class 'torch\._C\.Generator'|opaque object was created",
        construct="a torch.Generator in forward",
        fix="leave generator= out, or draw the noise outside and pass it in as an input",
        becomes=advice.RANDOM,
        code="NX405",
    ),
    _rule(
        "Guard check failed|torch_fn_counts",
        construct="torch.compile inside the model",
        fix="prepare the module without the inner torch.compile",
    ),
    _rule(
        "not linked with support for|driver version is insufficient|No CUDA GPUs|not compiled with CUDA",
        construct="a device that is not here",
        fix="take the device from the input: device=x.device",
    ),
    _rule(
        "two devices|two different devices",
        construct="tensors on different devices",
        fix="move the model and its inputs to one device; create tensors with device=x.device",
    ),
    _rule(
        "does not require grad and does not have a grad_fn",
        construct="autograd inside forward",
        fix="write the derivative out with tensor operations",
        becomes="Capture runs without gradients.",
    ),
    _rule(
        "leaf Variable that requires grad",
        construct="an in-place write to a parameter that requires a gradient",
        fix="write it under torch.no_grad(), or make it a buffer",
    ),
)

_STATE = (
    _rule(
        r"attrs were created in the model\.forward: \{'(\w+)'",
        r"tensor attributes? self\.([\w.\[\]]+).*assigned during export",
        r"Mutating module attribute (\w+) during export",
        construct=r"assignment to self.\1 in forward",
        fix=_BUFFER,
        becomes=advice.STATE,
        code="NX406",
        line=_WRITE,
    ),
    _rule(
        r"Constant (\S+) is mutated",
        construct=r"a write to the plain tensor attribute \1",
        fix=_BUFFER,
        becomes=advice.STATE,
        code="NX406",
        line=_WRITE,
    ),
    _rule(
        "Node arity mismatch",
        construct="a list or dict of the model that grows in forward",
        fix="collect in a local variable and return it",
        becomes=advice.STATE,
        code="NX406",
        line=r"\bself\.\w+(\[[^\]]*\]\s*=[^=]|\.(append|extend|insert|update)\()",
    ),
)

_MISTAKES = (
    _rule(
        "Data-dependent assertion failed",
        construct="an assertion that fails, or reads a tensor's value",
        fix=advice.SYNTAX["assert"].fix,
        becomes=advice.CHECK,
        code="NX407",
    ),
    _rule(
        r"raised exception (\w+)\((?:\[?(?:ConstantVariable\(\w+: )?['\"]([^\n]*?)['\"][)\]]*\n)?",
        r"^(AttributeError): ('(?:Fake)?Tensor' object has no attribute '\w+')",
        construct=r"the model raises \1: \2",
        fix=_CORRECT,
        becomes=_MISTAKE,
    ),
    _rule(
        r"^(?!Torch|Internal)\w+: ([^\n]*(?:same reduction dim|Attempting to broadcast|is invalid for input of size"
        r"|out of bounds for dimension|out of range|[Ss]izes? of tensors? must match|must match the size"
        r"|shapes cannot be multiplied|size mismatch|to have the same|expand: attempting|unsupported operand type"
        r"|expected .{0,60}channels|[Ee]xpected .{0,80}but got|must be equal|not divisible|does not match)[^\n]*)",
        construct=r"an operation that does not fit its operands: \1",
        fix=_CORRECT,
        becomes=_MISTAKE,
        at_line=True,
    ),
)

RULES: tuple[Rule, ...] = (*_BOUNDARY, *_MEMORY, *_OPERATORS, *_STATE, *_MISTAKES)


def raised(what: str) -> Diagnosis:
    """The model raises on its own account."""
    return Diagnosis(f"the model raises {what}", Advice("NX409", _MISTAKE, _CORRECT))


# --- dynamic shapes --------------------------------------------------------------------------------------------------

_SUGGESTED = re.compile(r"^\s+(\w+) = (.+)$", re.MULTILINE)
_SOURCE = r"L\['(\w+)'\]((?:\[[^\]]+\])*)\.size\(\)\[(\d+)\]"
_SIZES = "The model does not work for every size that dynamic_shapes allows."


def dynamic_shapes(text: str) -> Diagnosis:
    """Name the dimension and the constraint, which torch hides among generated guards."""
    suggested = dict(_SUGGESTED.findall(text.partition("Suggested fixes:")[2]))
    # A name with an underscore in front is torch's own helper: `_b = Dim(...)`, `b = 4*_b`.
    own = next(((name, value) for name, value in suggested.items() if not name.startswith("_")), None)
    if own is None:
        fixed = re.search(r"specialized it to be a constant \((\d+)\)", text)
        what = f"can only be {fixed.group(1)}" if fixed else "has sizes that the model does not take"
        fix = "leave that dimension out of dynamic_shapes"
        return Diagnosis(f"a dynamic dimension{_where('', text)} {what}", Advice("NX409", _SIZES, fix), FORWARD)
    name, value = own
    stated = "; ".join(f"{n} = {v}" for n, v in suggested.items())
    construct = f"the dynamic dimension {name}{_where(name, text)} {_requirement(value)}"
    return Diagnosis(construct, Advice("NX409", _SIZES, f"in dynamic_shapes: {stated}"), FORWARD)


def _where(name: str, text: str) -> str:
    source = re.search(rf"{name} = {_SOURCE}", text) if name else re.search(_SOURCE, text)
    return f" (dimension {source.group(3)} of {source.group(1)}{source.group(2)})" if source else ""


def _requirement(value: str) -> str:
    if value.isdigit():
        return f"can only be {value}: the model fixes it, or the example's size is 0 or 1"
    if re.fullmatch(r"[A-Za-z]\w*", value):
        return f"must always equal {value}"
    limits = re.search(r"^Dim\(.*?min=(\w+)(?:, max=(\w+))?", value)
    if limits is None:
        return f"must have the form {value}"
    return f"must be at least {limits.group(1)}" + (f" and at most {limits.group(2)}" if limits.group(2) else "")
