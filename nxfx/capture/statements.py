"""Which statement of the model is asking for a truth value, told from the running frame and the source."""

from __future__ import annotations

import ast
import dis
import functools
import itertools
import linecache
from types import FrameType

# Calls that return the truth of what they were asked about; any other call may do anything with it.
_TRUTHS = frozenset(["bool", "all", "any", "equal", "allclose", "is_nonzero"])


def asking(frame: FrameType) -> tuple[str, bool | None]:
    """The kind of statement, and for a check the answer that lets the program go on.

    A check is an ``assert``, or an ``if`` that only raises. Without the source, or where the value goes through something
    else first (``assert f(bool(t))``), there is no such answer.
    """
    line, column = _position(frame)
    inside = [t for t in _tests(_source(frame)) if _covers(t[1], line, column)]
    if not inside:
        return "bool", None
    kind, test, wanted = inside[-1]  # the innermost
    node: ast.expr = test
    while wanted is not None and (isinstance(node, ast.BoolOp) or _is_not(node)):
        if isinstance(node, ast.BoolOp):
            node = next((v for v in node.values if _covers(v, line, column)), node.values[0])
        elif isinstance(node, ast.UnaryOp):
            node, wanted = node.operand, not wanted
    return kind, wanted if _is_what_is_asked(node, frame) else None


def may_be_caught(frames: list[FrameType]) -> bool:
    """Whether an exception raised now would reach an ``except`` of the model: then it is a branch, not a check."""
    return any(first <= frame.f_lineno <= last for frame in frames for first, last in _guarded(_source(frame)))


def _is_not(node: ast.expr) -> bool:
    return isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)


def _is_what_is_asked(node: ast.expr, frame: FrameType) -> bool:
    """Whether the truth of ``node`` itself is asked, not that of something inside it (``max(a, b) > 3``)."""
    if isinstance(node, ast.Compare) and any(isinstance(op, ast.NotIn) for op in node.ops):
        return False
    if "CALL" not in dis.opname[frame.f_code.co_code[frame.f_lasti]]:  # Python 3.11 stays at PRECALL once it is warm
        return True
    name = node.func if isinstance(node, ast.Call) else None
    return (name.attr if isinstance(name, ast.Attribute) else getattr(name, "id", "")) in _TRUTHS


def _source(frame: FrameType) -> str:
    return "".join(linecache.getlines(frame.f_code.co_filename))


@functools.lru_cache(maxsize=64)
def parsed(source: str) -> ast.Module:
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError):
        return ast.Module([], [])


@functools.lru_cache(maxsize=64)
def _tests(source: str) -> list[tuple[str, ast.expr, bool | None]]:
    """``(kind, test, answer that lets the program go on)`` of every test in ``source``, outer ones before inner ones."""
    tests: list[tuple[str, ast.expr, bool | None]] = []
    for node in ast.walk(parsed(source)):
        if isinstance(node, ast.Assert):
            tests.append(("assert", node.test, True))
        elif isinstance(node, ast.If):
            tests.append(("if", node.test, False if _only_raises(node) else None))
        elif isinstance(node, (ast.While, ast.IfExp)):
            tests.append(("while" if isinstance(node, ast.While) else "if", node.test, None))
        elif isinstance(node, ast.comprehension):
            tests.extend(("if", test, None) for test in node.ifs)
    return tests


def _only_raises(node: ast.If) -> bool:
    """Whether the body prepares a message at most, and raises."""
    prepares = all(isinstance(s, (ast.Assign, ast.AnnAssign, ast.Expr)) for s in node.body[:-1])
    return not node.orelse and prepares and isinstance(node.body[-1], ast.Raise)


@functools.lru_cache(maxsize=64)
def _guarded(source: str) -> list[tuple[int, int]]:
    """First and last lines of the bodies that an ``except`` or a ``suppress`` stands guard over."""
    blocks: list[list[ast.stmt]] = []
    for node in ast.walk(parsed(source)):
        suppresses = isinstance(node, ast.With) and any("suppress" in ast.dump(i.context_expr) for i in node.items)
        if isinstance(node, ast.Try) and node.handlers or suppresses:
            blocks.append(node.body)  # type: ignore[attr-defined]  # both have one
    return [(block[0].lineno, block[-1].end_lineno or block[-1].lineno) for block in blocks]


def _position(frame: FrameType) -> tuple[int, int | None]:
    positions = getattr(frame.f_code, "co_positions", None)  # Python 3.11
    if positions is not None:
        # The jump that asks may carry the whole statement's position; what stands before it computed the operand.
        before = max(frame.f_lasti // 2 - 1, 0)
        line, _, column, _ = next(itertools.islice(positions(), before, None))
        if line is not None:
            return line, column
    return frame.f_lineno, None


def _covers(node: ast.expr, line: int, column: int | None) -> bool:
    end = node.end_lineno or node.lineno
    if column is None:
        return node.lineno <= line <= end
    return (node.lineno, node.col_offset) <= (line, column) <= (end, node.end_col_offset or 0)
