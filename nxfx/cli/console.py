"""What the commands write and how they end: output, one-line errors, progress, exit codes."""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import sys
import traceback as tracebacks
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import typer
from rich.console import Console
from rich.text import Text

from nxfx.errors import NxfxError, UsageError
from nxfx.graph.escaping import printable

FAILED, USAGE, INTERRUPTED, BROKEN_PIPE = 1, 2, 130, 141  # the last two: 128 + SIGINT, 128 + SIGPIPE, as shells say it

Paint = Callable[[str], Text]


def one_line(text: str) -> str:
    """``text`` on one line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    joined = [line if line.endswith((".", ":", ";", ",", "!", "?")) else f"{line};" for line in lines[:-1]]
    return printable(" ".join([*joined, *lines[-1:]]))


def say(message: str, *, command: str = "nxfx") -> None:
    """One line on standard error. Names in it are never read as markup."""
    line = Text(f"{command}: {one_line(message)}")
    line.stylize("bold red", 0, len(command) + 1)
    with contextlib.suppress(BrokenPipeError):
        Console(stderr=True, highlight=False, soft_wrap=True).print(line)


def note(text: str) -> None:
    """What goes with a result, on standard error: never mixed into the result itself."""
    with contextlib.suppress(BrokenPipeError):
        sys.stderr.write(printable(text.rstrip("\n") + "\n"))


def emit(text: str, output: Path | None = None, paint: Paint | None = None) -> None:
    """Write a result to ``output`` or to standard output, coloured by ``paint`` when that is a terminal.

    Raises:
        UsageError: the file cannot be written.
        typer.Exit: the reader closed the pipe.
    """
    text = text.rstrip("\n") + "\n"
    if output is not None:
        try:
            output.write_text(text, encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise UsageError(f"cannot write {str(output)!r}: {error.strerror}") from None
        return
    try:
        if paint is not None and sys.stdout.isatty():
            Console(highlight=False, soft_wrap=True).print(paint(printable(text)), end="")
        else:
            # Rich's own help is styled already when standard output is a terminal; everything else is made safe.
            sys.stdout.write(text if "\x1b[" in text and sys.stdout.isatty() and paint is None else printable(text))
        sys.stdout.flush()
    except BrokenPipeError:
        with contextlib.suppress(
            OSError, ValueError
        ):  # so that Python's own flush at exit has nothing to complain about
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(BROKEN_PIPE) from None


def check_writable(output: Path | None) -> None:
    """Refuse an impossible ``-o`` before the work, not after it.

    Raises:
        UsageError: a directory, or a directory that is not there.
    """
    if output is None:
        return
    if output.is_dir():
        raise UsageError(f"cannot write {str(output)!r}: it is a directory")
    if not output.absolute().parent.is_dir():
        raise UsageError(f"cannot write {str(output)!r}: there is no directory {str(output.absolute().parent)!r}")


def choose(what: str, given: str, names: tuple[str, ...]) -> None:
    """Check that ``given`` is one of ``names``.

    Raises:
        UsageError: it is not; tells the nearest.
    """
    if given not in names:
        near = difflib.get_close_matches(given, names, n=1)
        raise UsageError(
            f"unknown {what} {given!r}. "
            + (f"Did you mean {near[0]!r}?" if near else f"There are: {', '.join(names)}.")
        )


def ranges(texts: Iterable[str]) -> dict[str, tuple[int, int]]:
    """``INPUT=LOW:HIGH`` options as ``prepare`` takes them.

    Raises:
        UsageError: not of that form, or an empty range.
    """
    found = {}
    for text in texts:
        match = re.fullmatch(r"(\w+)=(-?\d+):(-?\d+)", text.replace(" ", ""))
        if match is None:
            raise UsageError(f"--range wants INPUT=LOW:HIGH, e.g. input_ids=0:128255, not {text!r}")
        low, high = int(match[2]), int(match[3])
        if low > high:
            raise UsageError(f"--range {text}: {low} is above {high}")
        found[match[1]] = (low, high)
    return found


def paint_diff(text: str) -> Text:
    """Added lines green, removed lines red."""
    styles = {"+": "green", "-": "red", "@": "cyan"}
    painted = Text()
    for line in text.splitlines(keepends=True):
        painted.append(line, "bold" if line.startswith(("+++", "---")) else styles.get(line[:1], ""))
    return painted


def paint_report(text: str) -> Text:
    """Codes by severity."""
    painted = Text(text)
    for severity, style in (("error", "bold red"), ("warning", "yellow"), ("info", "cyan")):
        painted.highlight_regex(rf"NX\d+ {severity}\b", style)
    painted.highlight_regex(r"(?m)^\S.*$", "bold")
    return painted


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """Says what is going on, on standard error, while that is a terminal.

    What the model prints meanwhile goes there too: standard output is for the result.
    """
    with contextlib.redirect_stdout(sys.stderr):
        if not sys.stderr.isatty():
            yield lambda what: None
            return
        with Console(stderr=True, highlight=False).status(Text("…")) as status:
            yield lambda what: status.update(Text(f"{one_line(what)} …"))


@contextlib.contextmanager
def reported(command: str, traceback: bool) -> Iterator[None]:
    """Every way a command can end, as one line and an exit code; ``traceback`` puts the Python traceback before it."""
    try:
        yield
    except typer.Exit:
        raise
    except KeyboardInterrupt:
        say("interrupted", command=f"nxfx {command}")
        raise typer.Exit(INTERRUPTED) from None
    except Exception as error:
        if traceback:
            sys.stderr.write(printable("".join(tracebacks.format_exception(error))))
        say(_message(error), command=f"nxfx {command}")
        raise typer.Exit(USAGE if isinstance(error, UsageError) else FAILED) from None


def _message(error: Exception) -> str:
    text = str(error).strip()
    if isinstance(error, NxfxError):
        return text
    where = tracebacks.extract_tb(error.__traceback__)[-1]
    return (
        f"internal error: {type(error).__name__}: {text} ({where.filename}:{where.lineno}); --traceback shows all of it"
    )
