"""Branches and reads: every place where Python asks a tensor for its value while the model is captured.

``bool(tensor)`` (``if``, ``while``, ``assert``, ``and``, ``or``, ``not``, ``in``), ``torch.equal``, ``torch.allclose``
and ``torch._assert`` are answered by an oracle: from ``Session.decisions``, else ``True``, so that one run sees every
site. The condition is cloned at that moment, since the model may write it later. An assertion, or an ``if`` that does
nothing but raise, is told that all is well and reported (NX407).

``.item()`` and ``.tolist()`` go on with a symbol, as torch has it; an ``if`` on that is a branch like the others.
``int(t)``, ``float(t)``, ``complex(t)``, ``range(t)``, ``list[t]`` and ``.numpy()`` are seen but cannot be answered,
since Python insists on a real number: NX402 at the user's line. Literals such as ``torch.tensor(True)`` and conditions
on shapes are left to torch.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

import sympy
import torch
from torch.utils import _pytree as pytree
from torch.utils._sympy.functions import FloorDiv, Mod, PythonMod

from nxfx.capture import statements, symbols, trace
from nxfx.capture.session import Session, Site, rank_of
from nxfx.errors import CaptureError
from nxfx.report.findings import Finding, Severity, merge
from nxfx.report.report import Report

# An `if` in a `while True` may be its only way out; a `for` over layers repeats a line without being endless.
_REPEAT_CAP = 1024

_FIXES = {
    "while": "run a fixed number of steps and mask the finished ones: x = torch.where(active, step(x), x)",
    "equal": "compare without leaving the device: (a == b).all(), and choose with torch.where",
    "allclose": "compare without leaving the device: torch.isclose(a, b).all(), and choose with torch.where",
}
_FIX = (
    "compute both sides and choose: torch.where(condition, a, b); "
    "or decide with a Python flag before the model is compiled"
)


_CHECK = "a check reads a tensor's value: the captured graph takes it to hold and does not check"
_CHECK_FIX = "check the value on the host before the call, or declare a range for the input"


# --- the oracle ------------------------------------------------------------------------------------------------------


def _decide(session: Session, kind: str, condition: torch.Tensor | None) -> bool:
    """Record a branch on ``condition`` (one element) and answer it."""
    frames = session.frames()
    innermost = frames[0] if frames else None
    statement, natural = ("bool", None) if innermost is None else statements.asking(innermost)
    is_check = natural is not None and not statements.may_be_caught(frames)
    standpoint = None if is_check else session.stand()
    # Before the condition's own: a path is cut into pieces there.
    alive = standpoint.keep() if standpoint is not None else []
    site = session.site(statement if kind == "bool" else kind, _own(condition))
    site.standpoint, site.alive = standpoint, alive
    if natural is not None and is_check:
        site.kind = "assert"
        return _take_to_hold(session, site, natural)
    number = len(session.sites)
    site.answer = bool(session.decisions[number]) if number < len(session.decisions) else True
    session.sites.append(site)
    if innermost is not None:
        _cap(session, site, innermost)
    return site.answer


def _own(condition: torch.Tensor | None) -> torch.Tensor | None:
    """A 0-d bool tensor that nobody else can write."""
    if condition is None:
        return None
    own = condition.clone() if condition.dtype is torch.bool else condition != 0
    return own.reshape(()) if own.ndim else own


def _take_to_hold(session: Session, site: Site, answer: bool) -> bool:
    site.answer = answer
    session.assertions.append(site)
    session.note(
        "NX407",
        Severity.WARNING,
        _CHECK,
        _CHECK_FIX,
        site.location,
    )
    return answer


def _cap(session: Session, site: Site, frame: FrameType) -> None:
    """End a loop that the oracle keeps alive: the other answer at the cap, an error when that does not help either."""
    place = (frame.f_code.co_filename, frame.f_lineno)
    last, count = session.repetitions.get(place, (frame, 0))
    count = count + 1 if last is frame else 1
    session.repetitions[place] = (frame, count)
    cap = session.loop_cap if site.kind == "while" else _REPEAT_CAP
    if count > 2 * cap:
        raise session.refuse(
            "NX401", "a loop that a tensor ends", f"no answer ends this loop after {count} rounds", _FIXES["while"]
        )
    if count > cap:
        site.exhausted, site.answer = True, not site.answer


# --- handlers --------------------------------------------------------------------------------------------------------


def _on_bool(session: Session, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    (value,) = args
    if not trace.is_unknown(value) or value.numel() != 1:
        return function(value)
    return _decide(session, "bool", value)


def _on_equal(session: Session, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    a, b = (*args, *kwargs.values())
    if not (trace.is_unknown(a) or trace.is_unknown(b)):
        return function(a, b)
    return a.shape == b.shape and _decide(session, "equal", (a == b).all())


def _on_allclose(session: Session, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if not any(map(trace.is_unknown, (*args, *kwargs.values()))):
        return function(*args, **kwargs)
    return _decide(session, "allclose", torch.isclose(*args, **kwargs).all())


def _on_contains(session: Session, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    value, element = args
    if not isinstance(element, (torch.Tensor, bool, int, float, complex, torch.SymInt, torch.SymFloat)):
        return function(value, element)
    if not (trace.is_unknown(value) or trace.is_unknown(element)):
        return function(value, element)
    return _decide(session, "bool", (element == value).any())


def _on_assert(session: Session, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    condition = args[0] if args else kwargs["condition"]
    if not trace.is_unknown(condition) or condition.numel() != 1:
        return function(*args, **kwargs)
    if not statements.may_be_caught(session.frames()):
        _take_to_hold(session, session.site("assert", _own(condition)), True)
    elif not _decide(session, "assert", condition):
        raise AssertionError(args[1] if len(args) > 1 else kwargs.get("message", ""))
    return None


def _on_item(session: Session, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    result = function(*args, **kwargs)
    unbacked = [v for v in pytree.tree_leaves(result) if trace.is_unbacked(v)]
    if unbacked:
        session.reads.append(session.site(function.__name__))
        symbols.watch(
            session, unbacked[0].node.shape_env, lambda e: _decide(session, "bool", symbols.condition_of(session, e))
        )
        if result is unbacked[0]:
            symbols.remember(session, result, args[0])
    return result


def _on_number(session: Session, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    value = args[0]
    if not trace.is_unknown(value):
        return function(*args, **kwargs)
    spelled = _SPELLED[function.__name__]
    raise session.refuse(
        "NX402",
        f"{spelled} of a tensor",
        f"{spelled} takes a tensor's value to Python, where it cannot be traced",
        "stay with tensors: a 0-d tensor serves in arithmetic, torch.where, x[i] and x[:n]",
    )


_SPELLED = {
    "__int__": "int()",
    "__float__": "float()",
    "__complex__": "complex()",
    "__index__": "use as a Python integer (range(), list index, size)",
    "numpy": ".numpy()",
    "__array__": "numpy conversion",
}

HANDLERS: dict[Any, Callable[[Session, Any, tuple[Any, ...], dict[str, Any]], Any]] = {
    torch.Tensor.__bool__: _on_bool,
    torch.Tensor.is_nonzero: _on_bool,
    torch.is_nonzero: _on_bool,
    torch.Tensor.equal: _on_equal,
    torch.equal: _on_equal,
    torch.Tensor.allclose: _on_allclose,
    torch.allclose: _on_allclose,
    torch.Tensor.__contains__: _on_contains,
    torch._assert: _on_assert,
    torch.Tensor.item: _on_item,
    torch.Tensor.tolist: _on_item,
    **{getattr(torch.Tensor, name): _on_number for name in _SPELLED},
}


# --- what is left ----------------------------------------------------------------------------------------------------


def note_check(session: Session, site: Site) -> None:
    """The branch at ``site`` ends in an exception on one side: the other is taken to hold."""
    session.note("NX407", Severity.WARNING, _CHECK, _CHECK_FIX, site.location)


def unresolved(sessions: Sequence[Session], error: Exception | None = None) -> list[Finding]:
    """One finding for each line that branches on a tensor's value, in order of execution; ``error`` says why it could not go."""
    culprit, reason = getattr(error, "site", None), getattr(error, "reason", "")
    findings: list[Finding] = []
    for session in sessions:
        known = {f.location for f in findings}
        here = [_unresolved(site) for site in session.sites if site.location not in known]
        findings += merge(here)
    for finding in findings:
        if reason and (culprit is None or finding.location == culprit.location):
            finding.message += f". It stays, since {reason}"
            finding.instead = ""  # to be written out anew, for that reason
            if culprit is not None:
                break
    return findings


def _unresolved(site: Site) -> Finding:
    kind = {"bool": "bool() of a tensor", "equal": "torch.equal", "allclose": "torch.allclose"}.get(
        site.kind, f"{site.kind} on a tensor's value"
    )
    message = f"{kind}: the trace follows one side, whatever the value is at run time"
    if site.innermost != site.location:
        message += f" (read in {site.innermost}: {site.innermost.source})"
    return Finding("NX401", Severity.ERROR, message, site.location, "", _FIXES.get(site.kind, _FIX))


def refusal(sessions: Sequence[Session], model_name: str, error: Exception | None = None) -> CaptureError:
    """One error for everything that was seen: branches that stay, and constructs that were refused.

    Args:
        sessions: of the traces that were made, the first one first.
        error: why the branches could not be removed.
    """
    refused = error.report.findings if isinstance(error, CaptureError) and error.report else []
    findings = merge([*unresolved(sessions, error), *sessions[0].errors, *(f for f in refused if f.code != "NX401")])
    lines = [
        f"{f.location}: {f.location.source}\n    {f.code} {f.message}"
        + (f"\n    Write instead: {f.fix}" if f.fix else "")
        + "".join(f"\n      {line}" for line in f.instead.splitlines())
        for f in findings
    ]
    what = (
        f"{len(findings)} places where a tensor's value decides"
        if len(findings) > 1
        else "a place where a tensor's value decides"
    )
    kinds = dict.fromkeys(f"{s.kind} on a tensor's value" for s in sessions[0].sites)
    report = Report(findings=merge([*findings, *sessions[0].findings]))
    return CaptureError(
        f"{model_name} cannot be captured: {what}\n  " + "\n  ".join(lines),
        construct=", ".join(kinds) or "a refused construct",
        report=report,
    )


# --- guards on data-dependent sizes ----------------------------------------------------------------------------------


# Symbolic environment of a capture → the conditions that the model stated in it.
_STATED: weakref.WeakKeyDictionary[Any, set[str]] = weakref.WeakKeyDictionary()


def note_stated_guards() -> None:
    """Remember the conditions on data-dependent numbers that the model states itself, with ``torch._check``.

    To be called while the trace is running: afterwards torch forgets where they came from.
    """
    mode = trace.fake_mode()
    environment = mode.shape_env if mode is not None else None
    for asserts in environment.deferred_runtime_asserts.values() if environment is not None else ():
        for stated in asserts:
            if _is_stated(list(stated.stack.summary())):
                _STATED.setdefault(environment, set()).add(_canonical(stated.expr))


def _is_stated(frames: list[Any]) -> bool:
    """Whether the model itself calls ``torch._check`` or a friend of it; torch's own operators do so too."""
    for caller, called in zip(frames, frames[1:], strict=False):
        if called.name.startswith("_check") and called.filename == torch.__file__ and rank_of(caller.filename):
            return True
    return False


def invented_guards(program: torch.export.ExportedProgram) -> list[str]:
    """Conditions on data-dependent numbers that ``torch.export`` added and the model neither states nor implies.

    Every operator implies that sizes are not negative and that slices fit, a view that sizes divide, a split that they
    add up; those are not listed, and neither is what the model stated with ``torch._check`` under interception (the nodes
    themselves do not tell: their stack traces name the ``.item()``). What is listed makes the graph refuse inputs that
    eager takes, such as ``u6 >= 3`` for ``y[:n] -= 5``.
    """
    return list(guards_by_node(program))


def guards_by_node(program: torch.export.ExportedProgram) -> dict[str, torch.fx.Node]:
    """What :func:`invented_guards` lists, each with the node that states it: its stack trace names what it is a condition on."""
    listed: dict[str, torch.fx.Node] = {}
    for symbol, expression, node in _guards(program):
        stated = _STATED.get(symbol.node.shape_env, ())
        if _canonical(expression) not in stated and not _is_implied(expression):
            listed.setdefault(str(expression), node)
    return listed


def _guards(program: torch.export.ExportedProgram) -> Iterator[tuple[Any, Any, torch.fx.Node]]:
    aten = torch.ops.aten
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            if node.op != "call_function" or not node.args:
                continue
            value = node.args[0].meta.get("val") if isinstance(node.args[0], torch.fx.Node) else node.args[0]
            if node.target is aten._assert_scalar.default and isinstance(value, torch.SymBool):
                yield value, value.node._expr, node
            elif node.target in (aten.sym_constrain_range.default, aten.sym_constrain_range_for_size.default):
                low = node.kwargs.get("min")
                if isinstance(value, torch.SymInt) and low is not None and low > 0:
                    yield value, value.node._expr >= low, node


def _canonical(expression: Any) -> str:
    return str(expression.canonical if getattr(expression, "is_Relational", False) else expression)


def _is_truth(side: Any) -> bool:
    """A bool read from a tensor, as the number 0 or 1."""
    return isinstance(side, sympy.Piecewise) and {branch.expr for branch in side.args} == {sympy.S.Zero, sympy.S.One}


def _is_implied(expression: Any) -> bool:
    if expression in (True, sympy.true):
        return True
    if any(_is_truth(side) for side in getattr(expression, "args", ())):  # what a check on a tensor states; no size
        return True
    if isinstance(expression, sympy.Eq):  # a view's sizes divide, the pieces of a split add up
        return expression.has(Mod, PythonMod, FloorDiv) or any(
            side.is_Add and _is_free(other) for side, other in _both_ways(expression)
        )
    if not isinstance(expression, (sympy.Ge, sympy.Gt, sympy.Le, sympy.Lt)):
        return False
    # 0 <= u, or u <= a limit that does not depend on data.
    return bool(expression.lts.is_number and expression.lts <= 0) or _is_free(expression.gts)


def _is_free(expression: Any) -> bool:
    """Whether no data-dependent number is in it."""
    return not any(str(symbol).startswith(("u", "zuf")) for symbol in expression.free_symbols)


def _both_ways(expression: Any) -> list[tuple[Any, Any]]:
    return [(expression.lhs, expression.rhs), (expression.rhs, expression.lhs)]
