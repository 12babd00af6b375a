"""The user's own statement, rewritten as data flow: what a finding about a value says to write, for that very line.

Only forms that mean the same are written out: a branch whose sides give one value each, a loop whose body assigns, a number that goes
back into arithmetic, a boolean read that is summed. For everything else the general advice stands alone.
"""

from __future__ import annotations

import ast
import copy
import functools
import linecache

from nxfx.report.locations import Location

_LONGEST = 8  # lines
_ALIKE = "  # where both have one shape and dtype"
_MATHS = frozenset({"sqrt", "exp", "log", "sin", "cos", "tan", "tanh", "floor", "ceil"})


@functools.lru_cache(maxsize=512)
def written_out(code: str, location: Location) -> str:
    """The statement at ``location`` without its ``code``; ``""`` where there is no form that is sure to mean the same."""
    writer = _WRITERS.get(code)
    if writer is None or not location.file:
        return ""
    try:  # a name of a file may hold anything
        statement, after = _statement(_parsed("".join(linecache.getlines(location.file))), location.line)
        text = "" if statement is None else writer(statement, after)
    except (SyntaxError, ValueError, RecursionError):
        return ""
    return text if text.count("\n") < _LONGEST and (statement is None or text != ast.unparse(statement)) else ""


@functools.lru_cache(maxsize=4)
def _parsed(source: str) -> ast.AST:
    return ast.parse(source)


def _statement(tree: ast.AST, line: int) -> tuple[ast.stmt | None, ast.stmt | None]:
    """The innermost statement at ``line``, and the one after it in its block."""
    found: tuple[ast.stmt | None, ast.stmt | None] = (None, None)
    block: list[ast.stmt] = list(getattr(tree, "body", []))
    while True:
        at = next((i for i, s in enumerate(block) if _first(s) <= line <= (s.end_lineno or s.lineno)), None)
        if at is None:
            return found
        found = block[at], block[at + 1] if at + 1 < len(block) else None
        inner = block[at]
        block = [s for name in ("body", "orelse", "finalbody") for s in getattr(inner, name, [])]
        block += [s for handler in getattr(inner, "handlers", []) for s in handler.body]
        if not block or line < min(map(_first, block)):
            return found


def _first(statement: ast.stmt) -> int:
    decorators: list[ast.expr] = getattr(statement, "decorator_list", [])
    return min([statement.lineno, *(d.lineno for d in decorators)])


def _unparse(node: ast.AST) -> str:
    return ast.unparse(ast.fix_missing_locations(node))


# --- branches and loops ----------------------------------------------------------------------------------------------


def _branch(statement: ast.stmt, after: ast.stmt | None) -> str:
    if isinstance(statement, ast.If):
        return _if(statement, after)
    if isinstance(statement, ast.While):
        return _loop("for _ in range(N):  # N: the most rounds there can be", f"active = {_condition(statement.test)}", statement)
    return _simple(statement, _Conditionals())


def _if(statement: ast.If, after: ast.stmt | None) -> str:
    """One value a side: ``if c: return a`` with what returns otherwise, ``if c: x = a``."""
    test = _condition(statement.test)
    body, other = statement.body, statement.orelse or ([after] if isinstance(after, ast.Return) else [])
    if len(body) != 1 or len(other) > 1:
        return ""
    one, two = body[0], other[0] if other else None
    if isinstance(one, ast.Return) and isinstance(two, ast.Return):
        return f"return {_where(test, one.value, two.value)}{_ALIKE}" if _is_single(one.value) and _is_single(two.value) else ""
    assigned = _assigned(one)
    if assigned is None or statement.orelse and (_assigned(two) or ("", None))[0] != assigned[0]:
        return ""
    otherwise = _assigned(two)[1] if statement.orelse and _assigned(two) else ast.parse(assigned[0], mode="eval").body  # type: ignore[index]
    return f"{assigned[0]} = {_where(test, assigned[1], otherwise)}{_ALIKE}"


def _is_single(value: ast.expr | None) -> bool:
    return value is not None and not isinstance(value, (ast.Tuple, ast.List, ast.Dict))


def _where(test: str, one: ast.expr | None, two: ast.expr | None) -> str:
    return f"torch.where({test}, {_unparse(one)}, {_unparse(two)})" if one is not None and two is not None else ""


def _assigned(statement: ast.stmt | None) -> tuple[str, ast.expr] | None:
    """Name and value of ``x = value`` or ``x += value``."""
    if isinstance(statement, ast.AugAssign) and isinstance(statement.target, ast.Name):
        name = ast.Name(statement.target.id, ast.Load())
        return statement.target.id, ast.BinOp(name, statement.op, statement.value)
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1 and isinstance(statement.targets[0], ast.Name):
        return (statement.targets[0].id, statement.value) if _is_single(statement.value) else None
    return None


def _loop(head: str, active: str, statement: ast.While | ast.For) -> str:
    """A fixed number of rounds, of which the finished ones change nothing."""
    lines = [head, f"    {active}"]
    for inner in statement.body:
        masked = _masked(inner)
        if not masked:
            return ""
        lines.append(f"    {masked}")
    return "" if statement.orelse else "\n".join(lines)


def _masked(statement: ast.stmt) -> str:
    assigned = _assigned(statement)
    if assigned is not None:
        name, value = assigned
        return f"{name} = torch.where(active, {_unparse(value)}, {name})"
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
        target, value = statement.targets[0], statement.value
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
            names = [_unparse(t) for t in target.elts if isinstance(t, ast.Name)]
            if len(names) == len(value.elts):
                values = [f"torch.where(active, {_unparse(v)}, {n})" for n, v in zip(names, value.elts, strict=True)]
                return f"{', '.join(names)} = {', '.join(values)}"
    return ""


def _condition(test: ast.expr) -> str:
    """``a and not b`` as tensors."""
    if isinstance(test, ast.BoolOp):
        sign = " & " if isinstance(test.op, ast.And) else " | "
        return sign.join(f"({_condition(v)})" for v in test.values)
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return f"~({_condition(test.operand)})"
    text = _unparse(test)
    is_truth = isinstance(test, ast.Compare) or isinstance(test, ast.Call) and text.endswith((".any()", ".all()"))
    return text if is_truth else f"{text} != 0"


# --- inside one statement --------------------------------------------------------------------------------------------


def _simple(statement: ast.stmt, change: ast.NodeTransformer) -> str:
    if not isinstance(statement, (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Return, ast.Expr)):
        return ""
    return _unparse(change.visit(copy.deepcopy(statement)))


class _Conditionals(ast.NodeTransformer):
    """``a if c else b``."""

    def visit_IfExp(self, node: ast.IfExp) -> ast.AST:  # noqa: N802
        self.generic_visit(node)
        if not _is_single(node.body) or not _is_single(node.orelse):
            return node
        return ast.parse(_where(_condition(node.test), node.body, node.orelse), mode="eval").body


class _Numbers(ast.NodeTransformer):
    """``t.item()``, ``float(t)``, ``math.sqrt(t)`` inside arithmetic: the tensor itself.

    Where a statement reads with ``.item()``, other calls may be of numbers: only those around such a read are changed.
    """

    def __init__(self, statement: ast.stmt) -> None:
        self.reads = _reads(statement)

    def visit_Call(self, node: ast.Call) -> ast.AST:  # noqa: N802
        holds_read = _reads(node)
        self.generic_visit(node)
        function = node.func
        if isinstance(function, ast.Attribute) and function.attr == "item" and not node.args:
            return function.value
        if self.reads and not holds_read:
            return node
        name = ast.unparse(function)
        if name == "float" and len(node.args) == 1 and not isinstance(node.args[0], ast.Constant):
            return ast.Call(ast.Attribute(node.args[0], "float", ast.Load()), [], [])
        if name.removeprefix("math.") in _MATHS and name.startswith("math.") and len(node.args) == 1:
            return ast.Call(ast.Attribute(ast.Name("torch", ast.Load()), name.removeprefix("math."), ast.Load()), node.args, [])
        return node


def _reads(node: ast.AST) -> bool:
    """Whether ``.item()`` is called in ``node``."""
    return any(isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute) and n.func.attr == "item" for n in ast.walk(node))


class _Reads(ast.NodeTransformer):
    """``x[mask].sum()`` and ``x[mask].mean()``."""

    changed = 0

    def visit_Call(self, node: ast.Call) -> ast.AST:  # noqa: N802
        self.generic_visit(node)
        function = node.func
        if not isinstance(function, ast.Attribute) or function.attr not in ("sum", "mean") or node.args or node.keywords:
            return node
        read = _boolean_read(function.value)
        if read is None:
            return node
        self.changed += 1
        base, mask = read
        total = f"torch.where({mask}, {base}, 0).sum()"
        return ast.parse(total if function.attr == "sum" else f"({total} / ({mask}).sum())", mode="eval").body


def _boolean_read(node: ast.expr) -> tuple[str, str] | None:
    if isinstance(node, ast.Subscript) and isinstance(node.slice, (ast.Compare, ast.Name, ast.BinOp, ast.UnaryOp)):
        return _unparse(node.value), _unparse(node.slice)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "masked_select" and len(node.args) == 1:
        return _unparse(node.func.value), _unparse(node.args[0])
    return None


def _number(statement: ast.stmt, after: ast.stmt | None) -> str:
    if isinstance(statement, ast.For) and isinstance(statement.iter, ast.Call) and isinstance(statement.target, ast.Name):
        if ast.unparse(statement.iter.func) != "range" or len(statement.iter.args) != 1:
            return ""
        count, name = _unparse(statement.iter.args[0]), statement.target.id
        name = "step" if name == "_" else name
        return _loop(f"for {name} in range(N):  # N: the most rounds there can be", f"active = {name} < {count}", statement)
    return _simple(statement, _Numbers(statement))


def _size(statement: ast.stmt, after: ast.stmt | None) -> str:
    change = _Reads()
    text = _simple(statement, change)
    return text if change.changed == 1 else ""  # which of several is the boolean one is not known here


_WRITERS = {"NX401": _branch, "NX402": _number, "NX403": _size}
