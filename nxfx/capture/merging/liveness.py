"""Which local variables of a running frame can still be read: what a dead one holds makes no difference to what follows.

The usual backward analysis over the bytecode; anything that is not plainly a store counts as a read.
"""

from __future__ import annotations

import dis
import functools
import re
from types import CodeType

_RETURNS = re.compile(r"RETURN_VALUE|RETURN_CONST|RAISE_VARARGS|RERAISE")
_ALL = "*"


@functools.lru_cache(maxsize=1024)
def live_at(code: CodeType, offset: int) -> frozenset[str] | None:
    """The locals that may be read after the instruction at ``offset``, None for all of them (``locals()`` may be called)."""
    if {"locals", "vars", "eval", "exec", "dir"} & {*code.co_names}:
        return None
    return _live(code).get(offset)


@functools.lru_cache(maxsize=256)
def _live(code: CodeType) -> dict[int, frozenset[str]]:
    """Offset of each instruction → the names that are live after it."""
    instructions = list(dis.get_instructions(code))
    index = {instruction.offset: i for i, instruction in enumerate(instructions)}
    followers = _followers(code, instructions, index)
    always = frozenset((*code.co_cellvars, *code.co_freevars))
    before: list[frozenset[str]] = [always] * len(instructions)
    after: list[frozenset[str]] = [always] * len(instructions)
    changed = True
    while changed:
        changed = False
        for i in range(len(instructions) - 1, -1, -1):
            out = always.union(*(before[f] for f in followers[i]))
            reads, writes = _touches(instructions[i])
            into = (out - writes) | reads
            after[i] = out
            if into != before[i]:
                before[i], changed = into, True
    return {instruction.offset: after[i] for i, instruction in enumerate(instructions)}


def _followers(code: CodeType, instructions: list[dis.Instruction], index: dict[int, int]) -> list[list[int]]:
    followers: list[list[int]] = []
    for i, instruction in enumerate(instructions):
        found = [] if _RETURNS.match(instruction.opname) else [i + 1] if i + 1 < len(instructions) else []
        if instruction.opcode in dis.hasjrel or instruction.opcode in dis.hasjabs:
            found.append(index[instruction.argval])
        followers.append(found)
    for start, end, target in _handlers(code):
        for i, instruction in enumerate(instructions):
            if start <= instruction.offset < end:
                followers[i].append(index[target])
    return followers


def _handlers(code: CodeType) -> list[tuple[int, int, int]]:
    """``(start, end, target)`` of what an exception handler covers; before Python 3.11 handlers are jumps."""
    table = getattr(dis.Bytecode(code), "exception_entries", None) or ()
    return [(entry.start, entry.end, entry.target) for entry in table]


def _touches(instruction: dis.Instruction) -> tuple[frozenset[str], frozenset[str]]:
    """The names that an instruction reads, and those that it writes."""
    name, value = instruction.opname, instruction.argval
    if "FAST" not in name:
        return frozenset(), frozenset()
    names = frozenset(value if isinstance(value, tuple) else (value,))
    if name in ("STORE_FAST", "STORE_FAST_STORE_FAST"):
        return frozenset(), names
    if name == "STORE_FAST_LOAD_FAST" and isinstance(value, tuple):
        return (frozenset(), names) if value[0] == value[1] else (frozenset(value[1:]), frozenset(value[:1]))
    return names, frozenset()
