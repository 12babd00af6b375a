"""What the real upstream lowerings make of models, before and after nxfx, and whether the lowered programs compute the same.

    python tests/bench/lowering.py                     the whole table, with every lowering that is installed (20 minutes)
    python tests/bench/lowering.py llama bert          some models
    python tests/bench/lowering.py --keep build        also keep the figures, build/lowering-stablehlo.json ..., and go on from those there
    python tests/bench/lowering.py --write build       write docs/lowering.md from the figures kept there; measures nothing

StableHLO needs torch-mlir (torch 2.13), HLO needs torch-xla (torch 2.9): run it in both environments with `--keep`, then `--write`.
`before` is the captured graph, no pass run, lowered by the lowering alone; `after` is what nxfx hands on. The program of `after` is
executed (StableHLO by IREE, HLO by PyTorch/XLA's CPU client) as the prepared model's engine, on the example and on other inputs,
and compared with the model in eager mode. Each model runs in a process of its own.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("PJRT_DEVICE", "CPU")
warnings.simplefilter("ignore")

import torch
from rich.console import Console
from rich.table import Table

import nxfx
from nxfx.capture.structure import flatten
from nxfx.handoff import stablehlo, xla
from nxfx.handoff.lowered import WATCHED, WIDE, Lowered
from nxfx.verification.equivalence import compare
from tests import corpus
from tests.bench.models import ROOT, build

SECONDS = 900

# Architectures of tests/corpus.py (":cached": one decode step on a filled cache), and the examples' masks and caches.
CASES = (
    "llama", "llama:cached", "llama_static:cached", "mistral", "gemma2_static:cached", "qwen3", "gpt2:cached", "bloom", "opt", "falcon",
    "t5", "t5_static:cached", "bart", "bert", "deberta_v2", "mllama", "mllama:cached", "swin", "vit", "detr", "clip",
    "whisper_static:cached", "wav2vec2", "mamba", "qwen3_5_text", "qwen3_5_text:cached", "mixtral", "patchtst",
    "examples/mllama_mask.py", "examples/swin_mask.py", "examples/kv_cache.py",
)  # fmt: skip


def figures(lower: Any) -> dict[str, Any]:
    """Counts of one lowering, or why there is none."""
    try:
        lowered: Lowered = lower()
    except nxfx.NxfxError as error:
        return {"refused": " ".join(str(error).split())}
    demanded: Counter[str] = Counter()
    for trace in lowered.traces:
        demanded[trace.what] += trace.count * trace.demanded
    traces = [(t.what, t.count, t.op, t.demanded, f"{Path(t.location.file).name}:{t.location.line}", t.location.source) for t in lowered.traces]
    return {"counts": lowered.watched(), "demanded": dict(demanded), "traces": traces, "operations": sum(lowered.ops.values())}


def execute(prepared: nxfx.PreparedModule, case: str, dialect: str) -> str:
    """The lowered program in the place of the graph, against eager: ``"equal"``, the largest float error, or what differs."""
    model, args, kwargs = build(case)
    (call,) = prepared.captures.values()
    if dialect == "hlo":
        call.compiled = lambda *inputs: xla.run(prepared, inputs)
    else:
        from tests import run_stablehlo

        if not run_stablehlo.INSTALLED:
            return "IREE is not installed"
        try:
            call.compiled = run_stablehlo.Program(stablehlo.lower(prepared))
        except run_stablehlo.iree.compiler.CompilerToolError as error:
            return f"IREE refuses the program: {str(error).splitlines()[2:3]}"
    worst = 0.0
    for seed in range(3):
        given = (corpus.vary(kwargs, seed) if seed else kwargs) if not args else kwargs
        eager, own = corpus.clone((args, given)), corpus.clone((args, given))
        with torch.no_grad():
            expected = model(*eager[0], **eager[1])
        actual = prepared(*own[0], **own[1])
        floats = [t for t in flatten((expected, eager)).leaves if isinstance(t, torch.Tensor) and t.is_floating_point()]
        largest = max((float(t[t.isfinite()].abs().max()) for t in floats if t.isfinite().any()), default=1.0)
        outcome = compare((expected, eager), (actual, own), kind="close", max_abs=max(largest, 1.0) * 2**-14, signed_zeros=False)
        if not outcome.ok:
            return f"input {seed}: {outcome.mismatches[0]}"
        worst = max([worst, *(m.max_abs / max(largest, 1.0) for m in outcome.measures.values())])
    return "equal bits" if worst == 0 else f"{worst:.1e}"


def measure(case: str, dialect: str) -> dict[str, Any]:
    """One case with one lowering."""
    torch.set_num_threads(1)
    lowering = stablehlo if dialect == "stablehlo" else xla
    model, args, kwargs = build(case)
    try:
        captured = nxfx.prepare(model, *corpus.clone((args, kwargs)), pipeline="")
        prepared = nxfx.prepare(model, *corpus.clone((args, kwargs)))
    except nxfx.NxfxError as error:
        return {"case": case, "dialect": dialect, "before": {"refused": str(error)}, "after": {"refused": str(error)}, "result": "-"}
    row = {
        "case": case,
        "dialect": dialect,
        "before": figures(lambda: lowering.lower(captured, as_is=True)),
        "after": figures(lambda: lowering.lower(prepared)),
    }
    return row | {"result": "-" if "refused" in row["after"] else execute(prepared, case, dialect)}


def isolated(case: str, dialect: str) -> dict[str, Any]:
    """:func:`measure` in a process of its own: a lowering may end it, or never end."""
    command = [sys.executable, __file__, "--one", case, dialect]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=environment)
    except subprocess.TimeoutExpired:
        failed = f"no result within {SECONDS} s"
    else:
        if run.returncode == 0:
            row: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
            return row
        failed = f"the process ended with {run.returncode}: {(run.stderr.splitlines() or [''])[-1]}"
    return {"case": case, "dialect": dialect, "before": {"refused": failed}, "after": {"refused": failed}, "result": "-"}


# -- the tables -----------------------------------------------------------------------------------------------------------------

COLUMNS = (*WATCHED, *WIDE)


def cells(row: dict[str, Any]) -> list[str]:
    """One line of the table: counts before → after, one number where they are equal."""

    def count(side: str, name: str) -> str:
        return str(row[side]["counts"][name]) if "counts" in row[side] else "-"

    pairs = [(count("before", name), count("after", name)) for name in COLUMNS]
    changed = [before if before == after else f"{before} → {after}" for before, after in pairs]
    lowers = " → ".join("no" if "refused" in row[side] else "yes" for side in ("before", "after"))
    demanded = row["after"].get("demanded", {})
    share = "+".join(str(demanded.get(name, 0)) for name in WIDE)
    return [row["case"], "yes" if lowers == "yes → yes" else lowers, *changed, share, row["result"]]


def show(rows: list[dict[str, Any]], dialect: str) -> Table:
    table = Table("model", "lowers", *COLUMNS, "by the graph", "executed", title=f"{dialect}, before → after nxfx")
    for row in rows:
        table.add_row(*cells(row))
    return table


def _markdown(lines: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def document(kept: dict[str, dict[str, Any]]) -> str:
    """docs/lowering.md."""
    lines = [
        "# What the lowerings make of it",
        "",
        "Tiny random-weight models of `tests/corpus.py` and the masks and caches of `examples/`, lowered with the real upstream compilers",
        "before and after nxfx, and executed. Written by `python tests/bench/lowering.py --write`; how to lower a model of your own is in",
        "[Lowering](guide/lowering.md).",
        "",
        "- *before*: the captured graph without any pass, as the lowering alone takes it. *after*: what nxfx hands on. One number: no change.",
        "- *lowers*: whether there is a program. What is refused is listed below each table.",
        "- *i64*, *f64*: operations with a tensor of that type. *By the graph*: those of *after* (i64 + f64) that a 64-bit value of the cleaned",
        "  graph asks for; the others the lowering adds, listed by line below the table.",
        "- *executed*: the lowered program in the place of the graph against the model in eager mode, on three inputs: integers and masks",
        "  equal, floats within the given error, relative to the largest output.",
        "",
    ]
    for dialect, data in kept.items():
        rows = data["rows"]
        lines += [f"## {'StableHLO' if dialect == 'stablehlo' else 'HLO'}", "", data["with"] + ".", ""]
        head = ["model", "lowers", *COLUMNS, "by the graph", "executed"]
        lines += _markdown([head, ["---"] * len(head), *map(cells, rows)]) + [""]
        refused = [(r["case"], side, r[side]["refused"]) for r in rows for side in ("before", "after") if "refused" in r[side]]
        if refused:
            lines += ["Refused:", ""] + [f"- {case}, {side}: {_short(why)}" for case, side, why in refused] + [""]
        left: Counter[tuple[str, str, str, str, str]] = Counter()
        for row in rows:
            for what, count, op, demanded, place, source in row["after"].get("traces", ()):
                if what != "gather":
                    left[what, "the graph" if demanded else "the lowering", op, place, source] += count
        if left:
            lines += ["What is left after nxfx, by line (all models; gathers are the models' own look-ups):", ""]
            body = [[str(count), *key[:3], f"{key[3]}: `{key[4]}`"] for key, count in sorted(left.items())]
            lines += _markdown([["count", "what", "by", "op", "line"], ["---"] * 5, *body]) + [""]
    return "\n".join(lines)


def _short(text: str) -> str:
    text = re.sub(r"\S*site-packages/", "", text)  # of either environment
    text = text.replace(str(ROOT) + os.sep, "")
    return text if len(text) < 300 else text[:300] + " …"


def _kept(directory: Path | None, dialect: str) -> dict[str, dict[str, Any]]:
    """Figures of an earlier run, which this one goes on from."""
    path = (directory or Path()) / f"lowering-{dialect}.json"
    return {row["case"]: row for row in json.loads(path.read_text())["rows"]} if directory and path.exists() else {}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*")
    parser.add_argument("--keep", type=Path, metavar="DIRECTORY", help="keep the figures there")
    parser.add_argument("--write", type=Path, metavar="DIRECTORY", help="write docs/lowering.md from the figures there")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*options.cases)))
        return 0
    if options.write:
        files = [options.write / f"lowering-{dialect}.json" for dialect in ("stablehlo", "hlo")]
        kept = {f.stem.partition("-")[2]: json.loads(f.read_text()) for f in files if f.exists()}
        (ROOT / "docs" / "lowering.md").write_text(document(kept), encoding="utf-8")
        return 0
    console = Console(width=200)
    modules = {"stablehlo": "torch_mlir", "hlo": "torch_xla"}
    dialects = [d for d, module in modules.items() if importlib.util.find_spec(module)]
    if not dialects:
        console.print("neither torch-mlir nor torch-xla is installed")
        return 1
    bad = 0
    for dialect in dialects:
        rows, before = [], _kept(options.keep, dialect)
        for case in options.cases or CASES:
            rows.append(before.get(case) or isolated(case, dialect))
            console.print(*cells(rows[-1]), _short(rows[-1]["after"].get("refused", "")), soft_wrap=True)
            bad += "input" in rows[-1]["result"]
            if options.keep:
                options.keep.mkdir(parents=True, exist_ok=True)
                version = importlib.metadata.version(modules[dialect].replace("_", "-"))
                data = {"with": f"{modules[dialect]} {version}, torch {torch.__version__.partition('+')[0]}", "rows": rows}
                (options.keep / f"lowering-{dialect}.json").write_text(json.dumps(data, indent=1))
        console.print(show(rows, dialect))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
