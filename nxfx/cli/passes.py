"""``nxfx passes``: what passes there are, and what one does."""

from __future__ import annotations

import dataclasses
import difflib
import inspect

from nxfx.errors import UsageError
from nxfx.graph import printing
from nxfx.pipeline import Pass, available_passes


def listing() -> str:
    """Every pass with the first line of its docstring, in the order the default pipeline runs them."""
    found = available_passes()
    width = max(map(len, found), default=0)
    lines = [f"  {name.ljust(width)}  {_summary(cls)}" for name, cls in found.items()]
    return "\n".join(
        ["Passes, in the order they run:", *lines, "", "`nxfx passes NAME` explains one: Given, Result, options."]
    )


def explain(name: str) -> str:
    """One pass: its docstring with Given and Result, its options with their defaults, what it looks for and its order.

    Raises:
        UsageError: no such pass.
    """
    found = available_passes()
    if name not in found:
        near = difflib.get_close_matches(name, found, n=1, cutoff=0.4)
        raise UsageError(
            f"unknown pass {name!r}. " + (f"Did you mean {near[0]!r}?" if near else f"There are: {', '.join(found)}.")
        )
    cls = found[name]
    parts = [name, "", _docstring(cls), "", *_options(cls)]
    if cls.targets:
        parts += ["", "Looks for", *(f"  {op}" for op in sorted(map(printing.short, cls.targets)))]
    if cls.after:
        parts += ["", f"Runs after {', '.join(cls.after)}"]
    if cls.requires:
        parts += ["", f"Requires {', '.join(cls.requires)}"]
    return "\n".join(parts)


def _docstring(cls: type[Pass]) -> str:
    return inspect.cleandoc(cls.__doc__ or "It has no description.")


def _summary(cls: type[Pass]) -> str:
    return " ".join(_docstring(cls).split("\n\n")[0].split())


def _options(cls: type[Pass]) -> list[str]:
    fields = dataclasses.fields(cls.Options)
    if not fields:
        return ["It has no options."]
    defaults = cls.Options()
    lines = ["Options", *(f"  {f.name}={_spell(getattr(defaults, f.name))}" for f in fields)]
    described = inspect.cleandoc(cls.Options.__doc__ or "")
    if described and not described.startswith(f"{cls.Options.__name__}("):  # that is what dataclass writes itself
        lines += ["", *(f"  {line}".rstrip() for line in described.splitlines())]
    first = fields[0]
    example = f"{cls.name}{{{first.name}={_spell(getattr(defaults, first.name))}}}"
    return [*lines, "", f"On the command line: --pipeline '{example}'"]


def _spell(value: object) -> str:
    return ("on" if value else "off") if isinstance(value, bool) else str(value)
