"""What a frame keeps where nobody can look: values on Python's evaluation stack, the position of a loop in what it runs over.

Two runs of a model that come to the same instruction with the same locals go on alike only if that is the same as well. It is told
from the source: at a *plain* position nothing was computed before in the same statement, and every loop around it runs over what its
header names.
"""

from __future__ import annotations

import ast
import functools
import itertools
import linecache
from types import CodeType

from nxfx.capture.statements import parsed

# C functions that call Python back, or ask values, while they hold some of their own.
_CALL_BACK = frozenset(
    ["map", "filter", "sorted", "min", "max", "sum", "any", "all", "list", "tuple", "set", "dict", "frozenset", "reduce", "next", "iter",
     "zip", "enumerate", "sort", "index", "count", "remove"]
)  # fmt: skip
_HEADERS = frozenset(
    ["range", "enumerate", "zip", "reversed", "len", "list", "tuple", "sorted", "min", "max", "items", "keys", "values", "children"]
)
_NOT_PLAIN = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.Await, ast.Yield, ast.YieldFrom, ast.AsyncFor, ast.AsyncWith)
_SIMPLE = (
    ast.Name, ast.Attribute, ast.Constant, ast.Load, ast.Tuple, ast.List, ast.Subscript, ast.Slice, ast.UnaryOp, ast.BinOp, ast.operator,
    ast.unaryop, ast.keyword, ast.Starred, ast.JoinedStr,
)  # fmt: skip


@functools.lru_cache(maxsize=4096)
def names_behind(code: CodeType, offset: int) -> frozenset[str] | None:
    """What the headers of the loops around ``offset`` name, ``"x"`` or ``"self.layers"``; None where hidden values cannot be told."""
    found = _position(code, offset)
    if found is None:
        return None
    chain = _chain("".join(linecache.getlines(code.co_filename)), found)
    if len(chain) < 2:
        return None
    innermost = chain[-1]
    if isinstance(innermost, ast.Call) and _called(innermost) in _CALL_BACK:
        return None
    if isinstance(innermost, ast.Compare) and any(isinstance(op, (ast.In, ast.NotIn)) for op in innermost.ops):
        return None
    names: set[str] = set()
    for parent, child in itertools.pairwise(chain):
        behind = _behind(parent, child)
        if behind is None:
            return None
        names |= behind
    return frozenset(names)


def _behind(parent: ast.AST, child: ast.AST) -> set[str] | None:
    """What hides in ``parent`` while ``child`` runs."""
    if isinstance(parent, (*_NOT_PLAIN, ast.Match)):
        return None
    if isinstance(parent, ast.Try) and any(child is statement for statement in parent.finalbody):
        return None  # a result may be waiting
    if isinstance(parent, ast.For):
        return set() if child is parent.iter else _loop(parent)
    if isinstance(parent, ast.expr) and not isinstance(parent, (ast.BoolOp, ast.IfExp, ast.Lambda)):
        before = itertools.takewhile(lambda sibling: sibling is not child, ast.iter_child_nodes(parent))
        return set() if all(_is_simple(sibling) for sibling in before) else None
    return set()


def _loop(loop: ast.For) -> set[str] | None:
    header = loop.iter
    calls = [node for node in ast.walk(header) if isinstance(node, ast.Call)]
    if any(_called(call) not in _HEADERS for call in calls):
        return None
    if not all(isinstance(node, (*_SIMPLE, ast.Call)) for node in ast.walk(header)):
        return None
    names = {ast.unparse(node) for node in ast.walk(header) if isinstance(node, (ast.Name, ast.Attribute))}
    inside = [node for part in (loop.target, *loop.body) for node in ast.walk(part) if isinstance(node, ast.Name)]
    stored = {node.id for node in inside if not isinstance(node.ctx, ast.Load)}
    return None if names & stored else names


def _is_simple(node: ast.AST) -> bool:
    return all(isinstance(part, (*_SIMPLE, ast.expr_context)) for part in ast.walk(node))


def _called(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def _position(code: CodeType, offset: int) -> tuple[int, int, int, int] | None:
    if not hasattr(code, "co_positions"):  # Python 3.10
        return None
    line, end, column, end_column = next(itertools.islice(code.co_positions(), offset // 2, None))
    return None if None in (line, end, column, end_column) else (line, end, column, end_column)  # type: ignore[return-value]


def _chain(source: str, position: tuple[int, int, int, int]) -> list[ast.AST]:
    """The nodes around ``position``, outermost first."""
    line, end, column, end_column = position
    chain: list[ast.AST] = []
    node: ast.AST | None = parsed(source)
    while node is not None:
        chain.append(node)
        node = next((c for c in _positioned(node) if _holds(c, (line, column), (end, end_column))), None)
    return chain


def _positioned(node: ast.AST) -> list[ast.AST]:
    """The children that have a position, those of children without one among them."""
    found: list[ast.AST] = []
    for child in ast.iter_child_nodes(node):
        found += [child] if hasattr(child, "end_lineno") else _positioned(child)
    return found


def _holds(node: ast.AST, start: tuple[int, int], end: tuple[int, int]) -> bool:
    first = (node.lineno, node.col_offset)  # type: ignore[attr-defined]
    last = (node.end_lineno, node.end_col_offset)  # type: ignore[attr-defined]
    return bool(first <= start and end <= last)
