"""Writes the parts of the documentation that can be computed: pages of the passes, and the output of commands.

    python docs/generate.py           write them
    python docs/generate.py --check   exit 1 and show the difference when they are not up to date (a test does this)

``docs/passes/`` is made from the passes' docstrings, the table of ``docs/targets.md`` from nxfx/targets/facts.py. In
``README.md`` and below ``docs/`` a fenced block that follows
a comment ``<!-- output: nxfx ... -->`` is filled with what that command prints, run from the root of the repository.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import inspect
import io
import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
sys.path.insert(0, str(ROOT))

from nxfx.graph import printing  # noqa: E402
from nxfx.passes import DEFAULT_ORDER  # noqa: E402
from nxfx.pipeline import Pass  # noqa: E402
from nxfx.targets.facts import FACTS, GENERATIONS, LATEST_SDK, SDKS  # noqa: E402

_OUTPUT = re.compile(r"(<!-- output: (?P<command>nxfx [^\n]*?) -->\n```\w*\n).*?(?=^```$)", re.DOTALL | re.MULTILINE)
_FACTS = re.compile(r"(<!-- facts -->\n).*?(?=^<!-- end of facts -->$)", re.DOTALL | re.MULTILINE)
_MADE = "<!-- Made by docs/generate.py from the docstring of {}; edit that. -->"


def main() -> int:
    """Write or check; the exit code."""
    stale = [(path, wanted) for path, wanted in pages() if _read(path) != wanted]
    for path, wanted in stale:
        name = str(path.relative_to(ROOT))
        if "--check" in sys.argv:
            before, after = _read(path).splitlines(), wanted.splitlines()
            print("\n".join(difflib.unified_diff(before, after, name, f"{name}, up to date", lineterm="")))
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(wanted, encoding="utf-8")
            print(f"wrote {name}")
    return 1 if stale and "--check" in sys.argv else 0


def pages() -> Iterator[tuple[Path, str]]:
    """Every page that holds something computed, as it should be."""
    folder = DOCS / "passes"
    yield folder / "index.md", index_page()
    for cls in DEFAULT_ORDER:
        yield folder / f"{cls.name}.md", pass_page(cls)
    for path in (ROOT / "README.md", *sorted(DOCS.rglob("*.md"))):
        text = _read(path)
        if path.parent != folder and (_OUTPUT.search(text) or _FACTS.search(text)):
            wanted = _FACTS.sub(lambda m: m.group(1) + facts_table(), text)
            yield path, _OUTPUT.sub(lambda m: m.group(1) + output_of(m["command"]), wanted)


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def output_of(command: str) -> str:
    """What an ``nxfx`` command prints, with paths that do not depend on the machine."""
    from nxfx.cli import main as nxfx

    arguments, printed, errors = sys.argv, io.StringIO(), io.StringIO()
    try:
        sys.argv = shlex.split(command)
        with contextlib.chdir(ROOT), contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
            nxfx()
    except SystemExit:
        pass
    finally:
        sys.argv = arguments
    text = printed.getvalue().strip("\n") or errors.getvalue().strip("\n")
    text = text.replace(f"{ROOT}{os.sep}", "")
    return re.sub(r"[^\s'\"]*/site-packages/", "", text) + "\n"


def facts_table() -> str:
    """What each generation does under each release of the SDK."""
    rows = [f"\nGenerations: {', '.join(GENERATIONS)}. SDK releases: {', '.join(SDKS)}; unless told otherwise {LATEST_SDK}.\n"]
    rows += ["| fact | generations | from SDK | value | source |", "|---|---|---|---|---|"]
    for row in FACTS:
        targets = ", ".join(t for t in GENERATIONS if t in row.targets)
        value = ", ".join(sorted(row.value)) if isinstance(row.value, frozenset) else str(row.value)
        rows.append(f"| {row.name.replace('_', ' ')} | {targets} | {row.since} | {value} | {row.source} |")
    return "\n".join([*rows, "", ""])


def index_page() -> str:
    """The list of passes in the order they run."""
    summaries = {cls.name: " ".join(_markdown(_doc(cls)).split("\n\n")[0].split()) for cls in DEFAULT_ORDER}
    head = ["# The passes", "", "In the order they run. `nxfx passes` lists them too, with those of other packages."]
    rows = [f"| [{name}]({name}.md) | {summary} |" for name, summary in summaries.items()]
    return "\n".join([_MADE.format("each pass"), *head, "", "| pass | what it does |", "|---|---|", *rows, ""])


def pass_page(cls: type[Pass]) -> str:
    """One pass: docstring, options, what it looks for, its place in the pipeline, the codes it reports."""
    source = inspect.getsourcefile(cls)
    assert source is not None
    file = f"passes/{Path(source).name}"
    parts = [_MADE.format(f"`{cls.__name__}`"), f"# {cls.name}", "", _markdown(_doc(cls)), "", *_options(cls)]
    if cls.targets:
        names = ", ".join(f"`{name}`" for name in sorted(map(printing.short, cls.targets)))
        parts += ["## Looks for", "", names + ". A graph without any of them is left alone.", ""]
    order = [f"after `{name}`" for name in cls.after] + [f"`{name}` must be in the pipeline" for name in cls.requires]
    if order:
        parts += ["## Order", "", ", ".join(order)[:1].upper() + ", ".join(order)[1:] + ".", ""]
    codes = sorted(set(re.findall(r"\bNX\d{3}\b", Path(source).read_text(encoding="utf-8"))))
    if codes:
        parts += ["## Reports", "", ", ".join(f"[{code}](../codes/{code}.md)" for code in codes) + ".", ""]
    parts += [f"Source: [`{file}`](../../{file})", ""]
    return "\n".join(parts)


def _options(cls: type[Pass]) -> list[str]:
    fields = dataclasses.fields(cls.Options)
    if not fields:
        return ["## Options", "", "None.", ""]
    described = _attributes(_doc(cls.Options))
    defaults = cls.Options()
    rows = []
    for field in fields:
        value = getattr(defaults, field.name)
        shown = ("on" if value else "off") if isinstance(value, bool) else str(value)
        rows.append(f"| `{field.name}` | `{shown}` | {described.get(field.name, '')} |")
    first = fields[0].name
    text, call = f"{cls.name}{{{first}=...}}", f'.with_options("{cls.name}", {first}=...)'
    usage = f"In a pipeline's text: `{text}`; in Python: `Pipeline.default(){call}`."
    return ["## Options", "", "| option | default | meaning |", "|---|---|---|", *rows, "", usage, ""]


def _doc(thing: type) -> str:
    return inspect.getdoc(thing) or ""


def _attributes(docstring: str) -> dict[str, str]:
    """Name → text of an ``Attributes:`` section."""
    _, _, section = docstring.partition("Attributes:\n")
    found: dict[str, str] = {}
    for match in re.finditer(r"^    (\w+): (.*(?:\n {5,}.*)*)", section, re.MULTILINE):
        found[match[1]] = _inline(" ".join(match[2].split()))
    return found


def _markdown(docstring: str) -> str:
    """A docstring as Markdown: ``::`` blocks are fenced, double backticks single."""
    result: list[str] = []
    lines = docstring.splitlines()
    position = 0
    while position < len(lines):
        line = lines[position]
        position += 1
        if not line.endswith("::"):
            result.append(_inline(line))
            continue
        result += [_inline(line[:-1]), "", "```text"]
        block: list[str] = []
        while position < len(lines) and (not lines[position] or lines[position].startswith(" ")):
            block.append(lines[position].removeprefix("    "))
            position += 1
        result += ["\n".join(block).strip("\n"), "```", ""]
    return "\n".join(result).strip("\n")


def _inline(text: str) -> str:
    text = text.replace("``", "`")
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text)
    return re.sub(r"\b(NX\d{3})\b", r"[\1](../codes/\1.md)", text)


if __name__ == "__main__":
    sys.exit(main())
