"""Where values decide in real architectures: sites of `nxfx.check`, and what plain `torch.export` and nxfx make of the model.

    python tests/value_corpus.py                      writes docs/value-dependence.md from the whole corpus (about 10 minutes)
    python tests/value_corpus.py --rows rows.jsonl    the same; rows are kept in that file, and those in it are not measured again
    python tests/value_corpus.py fsmt longformer      prints the rows of some architectures
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

import nxfx
from tests import corpus

PAGE = Path(__file__).resolve().parents[1] / "docs" / "value-dependence.md"
CAPTURED, BY_VALUE = "captured", "value dependence"
# What torch.export says where a model's path, or a size, hangs on a value.
_SAYS_VALUE = ("data-dependent", "data dependent", "unbacked", "DynamicOutputShape", "DataDependentOutput")
_SAYS_OTHER = {
    "a class that is no pytree": ("pytree", "Unsupported output type", "Unsupported input type", "unsupported type"),
    "a constant that is written": ("Constant", "mutated"),
}


@dataclass
class Row:
    """One architecture: fp32, one forward without a cache.

    Attributes:
        sites: outcome → how many places.
        kinds: construct → how many places.
        plain: ``captured``, or why plain ``torch.export`` refuses.
        ours: ``captured``, or the finding that refuses.
    """

    name: str
    family: str
    plain: str = ""
    ours: str = ""
    sites: dict[str, int] = field(default_factory=dict)
    kinds: dict[str, int] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)

    @property
    def is_new(self) -> bool:
        """Whether nxfx captures what plain export refuses for value dependence."""
        return self.plain == BY_VALUE and self.ours == CAPTURED


def measure(entry: corpus.Entry) -> Row:
    row = Row(entry.name, entry.family, plain=_plain(entry))
    model, kwargs = entry.build()
    report = nxfx.check(model, (), corpus.clone(kwargs))
    sites = [site for site in report.sites if site.code not in ("NX405", "NX406")]
    refused = [f for f in report.errors if f.code.startswith("NX4") and f.code != "NX406"]
    captured = report.nodes.get("after", 0) > 0
    row.ours = CAPTURED if captured else f"{refused[0].code} `{refused[0].location.source}`" if refused else "refused"
    row.sites = dict(Counter(site.outcome for site in sites))
    row.kinds = dict(Counter(site.kind for site in sites))
    row.left = list(dict.fromkeys(f"{site.code} `{site.location.source}`" for site in sites if site.outcome != "removed"))
    return row


def _plain(entry: corpus.Entry) -> str:
    """What non-strict ``torch.export`` of the model itself says."""
    model, kwargs = entry.build()
    try:
        with torch.no_grad():
            torch.export.export(model, (), corpus.clone(kwargs), strict=False)
    except Exception as error:
        return _reason(error)
    return CAPTURED


def _reason(error: BaseException) -> str:
    chain = [error]
    while chain[-1].__cause__ is not None or chain[-1].__context__ is not None:
        chain.append(chain[-1].__cause__ or chain[-1].__context__)  # type: ignore[arg-type]
    text = " ".join(f"{type(e).__name__} {e}" for e in chain)
    if any(isinstance(e, GuardOnDataDependentSymNode) for e in chain) or any(words in text for words in _SAYS_VALUE):
        return BY_VALUE
    return next((reason for reason, said in _SAYS_OTHER.items() if any(words in text for words in said)), type(error).__name__)


def _cells(row: Row) -> str:
    counts = [str(row.sites.get(outcome, 0) or "") for outcome in ("removed", "reported", "refused")]
    kinds = ", ".join(f"{kind} ×{n}" if n > 1 else kind for kind, n in sorted(row.kinds.items()))
    cells = (row.name, kinds, *counts, row.plain, row.ours, "; ".join(row.left[:3]) + (" …" if len(row.left) > 3 else ""))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def document(rows: list[Row]) -> str:
    """docs/value-dependence.md."""
    total = sum((Counter(r.sites) for r in rows), Counter[str]())
    plain, ours = (sum(getattr(r, which) == CAPTURED for r in rows) for which in ("plain", "ours"))
    by_value = [r for r in rows if r.plain == BY_VALUE]
    new, lost = [r.name for r in rows if r.is_new], [f"{r.name} ({r.ours.split()[0]})" for r in rows if r.plain == CAPTURED and r.ours != CAPTURED]
    other = [r.name for r in rows if r.plain not in (CAPTURED, BY_VALUE) and r.ours == CAPTURED]
    lines = [
        "# Where values decide in real architectures",
        "",
        "Tiny random-weight configurations of `transformers` architectures, fp32, one forward without a cache. This page is written by",
        "`python tests/value_corpus.py`.",
        "",
        f"{len(rows)} architectures, {sum(bool(r.sites) for r in rows)} of them with places where a value reaches Python, a shape or the host:",
        f"{sum(total.values())} places, {total['removed']} removed, {total['reported']} left in the graph and reported, {total['refused']} in "
        "models that are refused.",
        "",
        "|  | captured | refused for value dependence | refused otherwise |",
        "|---|---|---|---|",
        f"| plain `torch.export` (non-strict) | {plain} | {len(by_value)} | {len(rows) - plain - len(by_value)} |",
        f"| nxfx | {ours} | {len(rows) - ours} | |",
        "",
        f"Refused by plain `torch.export` for value dependence and captured by nxfx: {', '.join(new) or 'none'}.",
        f"Refused by it for another reason and captured by nxfx: {', '.join(other) or 'none'}.",
        f"Captured by it and refused by nxfx, with the line: {', '.join(lost) or 'none'}. [NX409](codes/NX409.md): its graph has a condition",
        "that the model does not state, and refuses inputs that eager takes.",
        "",
        "Where both capture a model with places in it, `transformers` itself leaves its mask shortcuts out while it is traced; both graphs have",
        "the general form.",
        "",
        "- *places*: constructs as they are written, by an eager run on the example and on one other input; a place counts once however",
        "  often it runs.",
        "- *left*: the first three lines that are reported or refused.",
        "",
        "| model | places | removed | reported | refused | plain export | nxfx | left |",
        "|---|---|---|---|---|---|---|---|",
        *map(_cells, [r for r in rows if r.sites or r.plain != CAPTURED or r.ours != CAPTURED]),
        "",
        f"No such place, and captured by both: {', '.join(r.name for r in rows if not r.sites and r.plain == r.ours == CAPTURED) or 'none'}.",
        "",
    ]
    return "\n".join(lines)


def _known(path: Path | None) -> dict[str, Row]:
    if path is None or not path.is_file():
        return {}
    return {row["name"]: Row(**row) for row in map(json.loads, path.read_text().splitlines())}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*")
    parser.add_argument("--rows", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows = _known(options.rows)
    for entry in corpus.CORPUS:
        if entry.name in rows or options.names and entry.name not in options.names:
            continue
        rows[entry.name] = row = measure(entry)
        print(_cells(row), file=sys.stderr, flush=True)
        if options.rows is not None:
            with options.rows.open("a") as kept:
                kept.write(json.dumps(asdict(row)) + "\n")
    if not options.names:
        PAGE.write_text(document([rows[entry.name] for entry in corpus.CORPUS if entry.name in rows]))


if __name__ == "__main__":
    main()
