"""From an FX node to the user's own source line."""

from __future__ import annotations

import functools
import linecache
import os
import re
import sysconfig
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import fx

_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)(?:\n[ \t]+(?![ \t]*File ")(.*))?')
_SITE_PACKAGES = tuple(
    {os.path.realpath(p) + os.sep for p in (sysconfig.get_paths()["purelib"], sysconfig.get_paths()["platlib"])}
)
_INSTALLED = {"site-packages", "dist-packages"}
_STDLIB = os.path.realpath(sysconfig.get_paths()["stdlib"]) + os.sep
# Never the author's line: torch itself and nxfx's own capture.
_MACHINERY = (
    os.path.realpath(os.path.dirname(torch.__file__)) + os.sep,
    os.path.realpath(os.path.dirname(os.path.dirname(__file__))) + os.sep,
)


@dataclass(frozen=True)
class Location:
    """A place in the user's source.

    Attributes:
        file: path as Python saw it, ``""`` when unknown.
        line: 1-based, 0 when unknown.
        source: the text of that line, stripped.
        module: path of the ``nn.Module`` that ran it (``"model.layers.0.self_attn"``), ``""`` for the root.
        function: the enclosing function.
    """

    file: str = ""
    line: int = 0
    source: str = ""
    module: str = ""
    function: str = ""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.file else (self.module or "unknown location")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@functools.lru_cache(maxsize=4096)
def frame_rank(file: str) -> int:
    """0 for machinery (torch, nxfx, generated code, the standard library), 1 for an installed library, 2 for the user's own code."""
    if file.startswith(("<", "torch/")):  # torch signs the nodes that it inserts itself with a relative path
        return 0
    path = os.path.realpath(file)
    if path.startswith(_MACHINERY):
        return 0
    if path.startswith(_SITE_PACKAGES) or not _INSTALLED.isdisjoint(path.split(os.sep)):
        return 1
    return 0 if path.startswith(_STDLIB) else 2


@functools.lru_cache(maxsize=65536)
def locate_trace(stack_trace: str, module: str = "") -> Location:
    """The innermost frame of ``stack_trace`` that is the user's own; an installed library's where there is none."""
    best, best_rank = None, 0
    for match in _FRAME.finditer(stack_trace):
        rank = frame_rank(match.group(1))
        if rank and rank >= best_rank:
            best, best_rank = match, rank
    if best is None:
        return Location(module=module)
    file, line, function = best.group(1), int(best.group(2)), best.group(3)
    source = linecache.getline(file, line).strip() or (best.group(4) or "").strip()
    return Location(file, line, source, module, function)


def module_path(node: fx.Node) -> str:
    """Path of the innermost module that ran ``node``."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = next(reversed(stack.values()))[0]
    return str(path).removeprefix("L['self'].").removeprefix("L['self']")


def locate(node: fx.Node) -> Location:
    """The user's line for ``node``. A node without a trace (an input) is located by its first located user."""
    trace = node.meta.get("stack_trace")
    if trace:
        return locate_trace(trace, module_path(node))
    if node.op in ("placeholder", "get_attr"):
        return _first_use(node)
    return Location()


def _first_use(node: fx.Node) -> Location:
    """Where an input or a buffer is first used, looking through the casts that passes put right after it."""
    for user in (*node.users, *(second for first in node.users for second in first.users)):
        if user.meta.get("stack_trace"):
            return locate_trace(user.meta["stack_trace"], module_path(user))
    return Location(source=str(node.target))
