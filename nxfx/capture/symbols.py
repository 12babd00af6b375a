"""Numbers that came out of tensors with ``.item()``: what they were, and what Python asks of them.

Torch stands in for them with unbacked symbols. Bounds and conditions made of such symbols are computed again on the
tensors themselves, so that nothing waits for the host. Private torch API used here: ``SymNode.expr`` and
``ShapeEnv.evaluate_sym_node``, which an ``if`` on a symbol ends up in; tested on torch 2.9 and 2.13.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import sympy
import torch
from sympy.core.relational import Relational
from sympy.logic.boolalg import BooleanFunction
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from nxfx.capture.session import Session, rank_of

_TORCH_INIT = os.path.realpath(torch.__file__)
_SYMBOLIC = os.path.join(os.path.dirname(_TORCH_INIT), "fx", "experimental", "")
_RELATIONS: dict[type, Any] = {
    sympy.Eq: torch.eq,
    sympy.Ne: torch.ne,
    sympy.Lt: torch.lt,
    sympy.Le: torch.le,
    sympy.Gt: torch.gt,
    sympy.Ge: torch.ge,
}


def remember(session: Session, symbol: Any, tensor: torch.Tensor) -> None:
    """``symbol`` is the number in ``tensor``, as long as nobody writes it."""
    symbols = free_unbacked_symbols(symbol)
    expression = symbol.node.expr
    if len(symbols) == 1 and (expression.is_Symbol or isinstance(expression, sympy.Eq)):  # a bool is Eq(u0, 1)
        session.item_sources[str(next(iter(symbols)))] = (tensor, session.trace.version(tensor))


def source_of(session: Session, symbol: Any) -> torch.Tensor | None:
    """The tensor that holds the number ``symbol``, None where nobody knows it any more, or more was made of it."""
    expression = symbol.node.expr
    source = session.item_sources.get(str(expression)) if expression.is_Symbol else None
    return None if source is None or session.trace.version(source[0]) != source[1] else source[0]


def as_tensor(session: Session, symbol: Any) -> torch.Tensor:
    """The 0-d integer tensor that ``symbol`` stands for: its arithmetic done again on the tensors it came from."""
    expression = symbol.node.expr
    result = _evaluate(session, expression) if _is_redoable(session, expression) else None
    return result if isinstance(result, torch.Tensor) else torch.scalar_tensor(symbol, dtype=torch.int64)


def condition_of(session: Session, expression: Any) -> torch.Tensor | None:
    """The 0-d bool tensor that ``expression`` stands for, None for more than a comparison of simple arithmetic."""
    relation = _RELATIONS.get(type(expression))
    if relation is None or not all(_is_redoable(session, side) for side in expression.args):
        return None
    left, right = (_evaluate(session, side) for side in expression.args)
    result = relation(left if isinstance(left, torch.Tensor) else torch.tensor(left), right)
    return result if isinstance(result, torch.Tensor) else None


def _is_redoable(session: Session, expression: Any) -> bool:
    if expression.is_Symbol:
        source = session.item_sources.get(str(expression))
        return source is not None and session.trace.version(source[0]) == source[1]
    if expression.is_Integer or expression.is_Float:
        return True
    return (expression.is_Add or expression.is_Mul) and all(_is_redoable(session, a) for a in expression.args)


def _evaluate(session: Session, expression: Any) -> Any:
    if expression.is_Symbol:
        tensor = session.item_sources[str(expression)][0]
        # Python computes with unlimited integers and doubles.
        dtype = torch.float64 if tensor.dtype.is_floating_point else torch.int64
        tensor = tensor.reshape(()) if tensor.ndim else tensor
        return tensor if tensor.dtype is dtype else tensor.to(dtype)
    if expression.is_Integer:
        return int(expression)
    if expression.is_Float:
        return float(expression)
    values = [_evaluate(session, a) for a in expression.args]
    result = values[0]
    for value in values[1:]:
        result = result + value if expression.is_Add else result * value
    return result


def watch(session: Session, environment: Any, decide: Callable[[Any], bool]) -> None:
    """Ask ``decide`` where the model itself branches on a symbol; torch's operators go on refusing to guess.

    The environment belongs to this one trace; the session takes the watch away when the trace ends.
    """
    if session.watched is environment:
        return
    evaluate = environment.evaluate_sym_node

    def watched(node: Any, *args: Any, **kwargs: Any) -> Any:
        expression = node.expr
        if session.is_paused or not free_unbacked_symbols(expression) or not _is_the_models_own(sys._getframe(1)):
            return evaluate(node, *args, **kwargs)
        known = environment._maybe_evaluate_static(expression)
        if known is not None:
            return evaluate(node, *args, **kwargs)
        if isinstance(expression, (Relational, BooleanFunction)):
            return decide(expression)
        raise session.refuse(
            "NX402",
            "int() or float() of a number from a tensor",
            "a number that came from a tensor is taken as a plain Python number, which cannot be traced",
            "stay with the number that .item() gave, or with the tensor",
        )

    environment.evaluate_sym_node = watched
    session.watched = environment


def _is_the_models_own(frame: Any) -> bool:
    while frame is not None:
        file = os.path.realpath(frame.f_code.co_filename)
        if file != _TORCH_INIT and not file.startswith(_SYMBOLIC):
            return rank_of(file) > 0
        frame = frame.f_back
    return False
