"""From an exception to the place in the user's source where it happened, and to the Python construct that stands there.

A traceback says which bytecode instruction of which frame was running, and since Python 3.11 which columns it stands
for. Together with the syntax tree of the file that tells ``if x.any():`` from ``int(x)`` from ``x[:n]``, which the
exception of a tracer does not.
"""

from __future__ import annotations

import ast
import dis
import functools
import itertools
import linecache
import re
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import CodeType, FrameType, TracebackType

from nxfx.report.locations import Location, frame_rank

# What asks a tensor for its value: the likely culprit where a line holds several calls. x.sum() is no sum(x).
READING_BUILTINS = frozenset(
    {
        "bool",
        "complex",
        "float",
        "format",
        "int",
        "len",
        "list",
        "max",
        "min",
        "print",
        "range",
        "repr",
        "sorted",
        "str",
        "sum",
        "tuple",
    }
)
READING_FUNCTIONS = frozenset({"allclose", "array", "asarray", "equal", "is_nonzero", "item", "numpy", "tolist"})
_FRAME = re.compile(r'^\s*File "([^"]+)", line (\d+), in (\S+)', re.MULTILINE)
# Where Dynamo's own messages begin to quote the model's frames.
_QUOTED = ("from user code:", "User Stack (most recent call last):")
_MAX_CHAIN = 16
# Installed packages that torch itself runs while it traces: never a model's.
_TOOLS = re.compile(r"[\\/]site-packages[\\/](sympy|mpmath|networkx|functorch|torchgen|triton)[\\/]")
_TESTS = {ast.If: "if", ast.While: "while", ast.Assert: "assert", ast.IfExp: "conditional"}
_JUMP = re.compile(r"JUMP\w*_IF_")


@dataclass(frozen=True)
class Place:
    """One frame of the model, at the instruction that failed.

    Attributes:
        opcode: name of the bytecode instruction, ``""`` when the frame is known from text only.
        columns: ``(line, end line, column, end column)`` in UTF-8 bytes, None where Python does not tell.
    """

    file: str
    line: int
    function: str = ""
    opcode: str = ""
    columns: tuple[int, int, int, int] | None = None

    @property
    def location(self) -> Location:
        return Location(self.file, self.line, linecache.getline(self.file, self.line).strip(), "", self.function)


@dataclass(frozen=True)
class Construct:
    """A Python construct.

    Attributes:
        kind: ``"if"``, ``"while"``, ``"assert"``, ``"conditional"``, ``"and-or"``, ``"not"``, ``"in"``, ``"call"``,
            ``"read"`` (``x[i]``), ``"slice"`` (``x[a:b]``), ``"write"`` (``x[i] = v``),
            ``"loop"`` (iteration or unpacking), ``"format"``, ``"raise"``,
            ``"attribute"`` (``x.name``) or ``""``.
        name: what is called (``"torch.split"``; ``".item"`` for a method of an expression) or the attribute.
        nested: names of everything that is called inside the construct.
        test: what of ``"if"``, ``"while"``, ``"assert"`` ... the statement around it tests, whatever the construct is.
    """

    kind: str = ""
    name: str = ""
    nested: tuple[str, ...] = ()
    test: str = ""

    @property
    def base(self) -> str:
        """The last part of the name."""
        return self.name.rpartition(".")[2]

    def calls(self, name: str) -> bool:
        """Whether this is a call of ``name``, whatever module it is in, or holds one."""
        return any(n.rpartition(".")[2] == name for n in (self.name, *self.nested))

    @property
    def is_reader(self) -> bool:
        """It is known to ask a tensor for its value."""
        return self.name in READING_BUILTINS or self.base in READING_FUNCTIONS


@dataclass(frozen=True)
class Site:
    """Where an exception came from.

    Attributes:
        location: the innermost line that is the user's own; an installed library's where no line is.
        innermost: the line at fault itself, be it the user's or a library's.
        construct: what stands there.
        raised_there: the exception was raised by that very line, not by torch on its behalf.
    """

    location: Location
    innermost: Location
    construct: Construct
    raised_there: bool = False


def site_of(error: BaseException, *, is_cause: bool = False) -> Site | None:
    """Where ``error`` came from; None when no frame is a model's.

    Args:
        is_cause: it was caught on the way, perhaps by the model itself: its first frame may be the model's. Otherwise
            frames above the first one of torch or nxfx belong to whoever asked for the capture.
    """
    places, last = _from_traceback(error.__traceback__, is_cause)
    if not places:
        places, last = _from_dynamo(error), False
    if not places:
        return None
    own = [p for p in places if frame_rank(p.file) == 2]
    return Site((own or places)[-1].location, places[-1].location, construct_at(places[-1]), last)


def causes(error: BaseException) -> Iterator[BaseException]:
    """``error``, then what caused it, and so on."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen and len(seen) < _MAX_CHAIN:
        seen.add(id(current))
        yield current
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)


def _rank(file: str) -> int:
    return 0 if _TOOLS.search(file) else frame_rank(file)


def _from_traceback(trace: TracebackType | None, inside: bool) -> tuple[list[Place], bool]:
    """The model's frames, outermost first, and whether the very last frame is one of them."""
    places: list[Place] = []
    last = False
    while trace is not None:
        code = trace.tb_frame.f_code
        rank = _rank(code.co_filename)
        inside |= not rank
        last = bool(rank) and inside
        if last:
            places.append(Place(code.co_filename, trace.tb_lineno, code.co_name, *instruction(code, trace.tb_lasti)))
        trace = trace.tb_next
    return places, last


def place_of(frame: FrameType) -> Place:
    """A frame that is running."""
    return Place(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name, *instruction(frame.f_code, frame.f_lasti))


def instruction(code: CodeType, at: int) -> tuple[str, tuple[int, int, int, int] | None]:
    """Opcode and columns of the instruction at offset ``at``, as :class:`Place` has them."""
    columns = _columns(code, at)
    while at > 0 and dis.opname[code.co_code[at]] == "CACHE":  # a call into a Python function points behind its own cache
        at -= 2
    return dis.opname[code.co_code[at]] if 0 <= at < len(code.co_code) else "", columns


def _columns(code: CodeType, at: int) -> tuple[int, int, int, int] | None:
    positions = getattr(code, "co_positions", None)
    if positions is None or at < 0:
        return None
    found = next(itertools.islice(positions(), at // 2, None), None)
    return None if found is None or None in found else found


def _from_dynamo(error: BaseException) -> list[Place]:
    """Dynamo runs no frames of the model: it keeps a stack of its own, and quotes it in its message."""
    stack = getattr(error, "real_stack", None)
    if isinstance(stack, traceback.StackSummary):
        places = [_place(frame) for frame in stack if _rank(frame.filename)]
        if places:
            return places
    text = next((str(error).partition(mark)[2] for mark in _QUOTED if mark in str(error)), "")
    return [Place(f, int(line), function) for f, line, function in _FRAME.findall(text) if _rank(f)]


def _place(frame: traceback.FrameSummary) -> Place:
    line, end_line = frame.lineno or 0, getattr(frame, "end_lineno", None)
    column, end_column = getattr(frame, "colno", None), getattr(frame, "end_colno", None)
    if end_line is None or column is None or end_column is None:
        return Place(frame.filename, line, frame.name)
    return Place(frame.filename, line, frame.name, "", (line, end_line, column, end_column))


# --- syntax ----------------------------------------------------------------------------------------------------------


def construct_at(place: Place) -> Construct:
    """The construct that ``place`` is at; an empty one when the source is not to be had."""
    path = _path(place)
    if not path:
        return Construct()
    found = _by_opcode(place.opcode, path) if place.opcode else _by_syntax(path, exact=place.columns is not None)
    around = _truth(path)
    return replace(found, test=around.kind if around else "")


@functools.lru_cache(maxsize=32)
def _tree(source: str) -> ast.Module | None:
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError):
        return None


def _path(place: Place) -> list[ast.AST]:
    """The nodes around the place, from the statement in the file to the smallest that covers it."""
    tree = _tree("".join(linecache.getlines(place.file)))
    if tree is None:
        return []
    line, end_line, column, end_column = place.columns or (place.line, place.line, None, None)
    path: list[ast.AST] = [tree]
    while True:
        inner = next((c for c in _children(path[-1]) if _covers(c, line, end_line, column, end_column)), None)
        if inner is None:
            break
        path.append(inner)
        if column is None and isinstance(inner, ast.stmt) and inner.lineno == line:
            break
    return path if len(path) > 1 else []


def _children(node: ast.AST) -> Iterator[ast.AST]:
    """Nodes with positions right below ``node``; those without (operators, arguments) are passed through."""
    for child in ast.iter_child_nodes(node):
        if hasattr(child, "lineno"):
            yield child
        else:
            yield from _children(child)


def _covers(node: ast.AST, line: int, end_line: int, column: int | None, end_column: int | None) -> bool:
    first, last = node.lineno, node.end_lineno or node.lineno  # type: ignore[attr-defined]
    if column is None or end_column is None:
        return bool(first <= line <= last)
    start, end = (first, node.col_offset), (last, node.end_col_offset or 0)  # type: ignore[attr-defined]
    return bool(start <= (line, column) and (end_line, end_column) <= end)


def _by_opcode(opcode: str, path: list[ast.AST]) -> Construct:
    if opcode in ("TO_BOOL", "UNARY_NOT") or _JUMP.search(opcode):
        return _truth(path) or Construct("not" if opcode == "UNARY_NOT" else "if")
    if opcode == "COMPARE_OP":  # since Python 3.13 it also asks for the truth of what it got
        return _truth(path) or Construct()
    if opcode == "CONTAINS_OP":
        return Construct("in")
    if opcode == "RAISE_VARARGS":
        return Construct("raise")
    if opcode in ("GET_ITER", "FOR_ITER") or opcode.startswith("UNPACK_"):
        return Construct("loop")
    if opcode.startswith("FORMAT_"):
        return Construct("format")
    if "CALL" in opcode:
        call = _last(path, ast.Call) or _call_below(path[-1])
        return _call(call) if call else Construct("call")
    if opcode.startswith(("STORE_SUBSCR", "STORE_SLICE")):
        return Construct("write")
    if opcode.startswith(("BINARY_SUBSCR", "BINARY_SLICE")):
        return _subscript(_last(path, ast.Subscript))
    if opcode.startswith("LOAD_ATTR"):
        attribute = _last(path, ast.Attribute)
        return Construct("attribute", attribute.attr if isinstance(attribute, ast.Attribute) else "")
    if opcode.startswith("BINARY_OP") and isinstance(path[-1], ast.Subscript):  # Python 3.14
        return _subscript(path[-1])
    return Construct()


def _by_syntax(path: list[ast.AST], exact: bool) -> Construct:
    """Without an instruction: what a reader would guess of the expression (``exact``) or of the whole statement."""
    node = path[-1]
    reader = _call_below(node, readers_only=True)
    if exact and isinstance(node, ast.Call):
        call = _call(node)
        return call if call.is_reader else _truth(path) or call
    if not exact and reader is not None:
        return _call(reader)
    if isinstance(node, ast.For):
        return Construct("loop")
    if isinstance(node, ast.Raise):
        return Construct("raise")
    truth = _truth(path)
    if truth is not None:
        return truth
    if isinstance(node, ast.Subscript):
        return _subscript(node)
    call_below = _call_below(node)
    return _call(call_below) if call_below else Construct()


def _truth(path: list[ast.AST]) -> Construct | None:
    """The statement or expression that asks whether the last node of ``path`` is true."""
    inner, found = path[-1], _test_of(path[-1])
    if found and found.kind in _TESTS.values():
        return found
    for outer in reversed(path[:-1]):
        if isinstance(outer, ast.BoolOp):
            found = Construct("and-or")
        elif isinstance(outer, ast.UnaryOp) and isinstance(outer.op, ast.Not):
            found = found or Construct("not")
        elif isinstance(outer, (ast.If, ast.While, ast.Assert, ast.IfExp)):
            return Construct(_TESTS[type(outer)]) if outer.test is inner else found
        elif isinstance(outer, ast.Match):
            return Construct("if") if inner is not outer.subject else found
        elif isinstance(outer, (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)):
            return Construct("if") if any(inner in g.ifs for g in outer.generators) else found
        else:
            break
        inner = outer
    return found


def _test_of(node: ast.AST) -> Construct | None:
    """What a whole statement, or an expression that has no other place to be tested in, tests."""
    if isinstance(node, (ast.If, ast.While, ast.Assert, ast.IfExp)):
        return Construct(_TESTS[type(node)])
    if isinstance(node, ast.stmt):
        return Construct("conditional") if any(isinstance(n, ast.IfExp) for n in ast.walk(node)) else None
    if isinstance(node, ast.BoolOp):
        return Construct("and-or")
    return Construct("not") if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not) else None


def _last(path: list[ast.AST], kind: type[ast.AST]) -> ast.AST | None:
    return next((node for node in reversed(path) if isinstance(node, kind)), None)


def _call_below(node: ast.AST, readers_only: bool = False) -> ast.AST | None:
    """The outermost call in ``node`` (of its header, where it is a statement with a body); known readers first."""
    bodies = ("body", "orelse", "handlers", "finalbody")
    parts = [v for name, v in ast.iter_fields(node) if not (isinstance(node, ast.stmt) and name in bodies)]
    calls: list[ast.AST] = []
    for part in itertools.chain.from_iterable(p if isinstance(p, list) else [p] for p in parts):
        calls += [n for n in ast.walk(part) if isinstance(n, ast.Call)] if isinstance(part, ast.AST) else []
    readers = [c for c in calls if _call(c).is_reader]
    return next(iter(readers or ([] if readers_only else calls)), None)


def _call(node: ast.AST) -> Construct:
    if not isinstance(node, ast.Call):
        return Construct("call")
    arguments = [*node.args, *(k.value for k in node.keywords)]
    nested = [_name(n.func) for a in arguments for n in ast.walk(a) if isinstance(n, ast.Call)]
    return Construct("call", _name(node.func), tuple(nested))


def _subscript(node: ast.AST | None) -> Construct:
    if not isinstance(node, ast.Subscript):
        return Construct("read")
    if isinstance(node.ctx, ast.Store):
        return Construct("write")
    bounds = [b for n in ast.walk(node.slice) if isinstance(n, ast.Slice) for b in (n.lower, n.upper, n.step)]
    return Construct("slice" if any(b is not None and not isinstance(b, ast.Constant) for b in bounds) else "read")


def _name(function: ast.expr) -> str:
    """``torch.split`` in full; of a method of an expression only its own name, with a dot."""
    parts: list[str] = []
    node: ast.expr = function
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if isinstance(node, ast.Name):
        return ".".join([node.id, *reversed(parts)])
    return "." + parts[0] if parts else ""
