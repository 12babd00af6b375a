"""Text that is safe to show. Imports nothing, so that the command line can use it before torch is loaded."""

from __future__ import annotations


def printable(text: str) -> str:
    """``text`` with what can drive a terminal or hide code (control and bidirectional characters) written as escapes.

    Line ends and tabs stay.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
