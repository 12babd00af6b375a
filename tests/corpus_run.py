"""One architecture of the corpus through `prepare`, measured: shared by tests/test_corpus.py and docs/corpus.md.

    python tests/corpus_run.py               writes docs/corpus.md from the whole corpus (about 20 minutes)
    python tests/corpus_run.py --tested      writes it from the part that `make test` runs
    python tests/corpus_run.py llama bert    prints the rows of some architectures
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
import warnings
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import fx

import nxfx
from nxfx.analysis.intervals import INT32, fits
from nxfx.analysis.ranges import analyse
from nxfx.capture.shell import bind
from nxfx.capture.structure import flatten
from nxfx.graph import meta
from nxfx.verification.equivalence import Comparison, compare
from tests import corpus

# Findings that explain a 64-bit edge that is left.
EXPLAINS_WIDE = ("NX301", "NX302", "NX304", "NX306")


class Snapshot(nxfx.Pass):
    """Changes nothing: keeps the graph as it was captured, to be run beside the cleaned one, and counts what is proved of it."""

    name = "snapshot"

    def run(self, graph_module: fx.GraphModule, context: nxfx.PassContext) -> nxfx.PassResult:
        if not context.is_body:
            self.graph_module = fx.GraphModule(graph_module, _copy(graph_module.graph))
            self.proved = _proved(graph_module, context)
        return nxfx.PassResult()


def _proved(graph_module: fx.GraphModule, context: nxfx.PassContext) -> tuple[int, int]:
    """How many int64 values that ops make fit int32 for every input that the model accepts, and how many there are."""
    ranges = analyse(graph_module, context.sources)
    bounds = [
        bound
        for node in graph_module.graph.nodes
        if node.op == "call_function" and meta.dtype_of(node) is torch.int64
        for bound in [ranges.proved(node)]
    ]
    return sum(b is not None and fits(b, INT32) for b in bounds), len(bounds)


def _copy(graph: fx.Graph) -> fx.Graph:
    copied = fx.Graph()
    output = copied.graph_copy(graph, {})
    copied.output(output)
    return copied


@dataclass
class Row:
    """What happened to one architecture.

    Attributes:
        verdict: ``exact`` or ``refines`` (prepared against the captured graph), or ``refused`` with a located finding.
        capture: ``bits`` when the captured graph gives eager's bits, else the largest difference: library code took another path.
    """

    name: str
    family: str
    dtype: str
    cached: bool
    verdict: str = ""
    capture: str = ""
    kinds: Counter[str] = field(default_factory=Counter)
    wide: tuple[int, int, int] = (0, 0, 0)
    nodes: tuple[int, int] = (0, 0)
    proved: tuple[int, int] = (0, 0)
    codes: Counter[str] = field(default_factory=Counter)
    why: str = ""
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)

    @property
    def kept(self) -> int:
        return self.wide[1]


def run(entry: corpus.Entry, dtype: torch.dtype, cached: bool, *, verify_each: bool = False) -> Row:
    """Prepare one architecture and compare: with the captured graph (the rewrites' promise) and with eager (the capture)."""
    row = Row(entry.name, entry.family, str(dtype).removeprefix("torch."), cached)
    started = time.perf_counter()
    model, kwargs = entry.build_cached(dtype) if cached else entry.build(dtype)
    snapshot = Snapshot()
    pipeline = nxfx.Pipeline([snapshot, *nxfx.Pipeline.default()])
    try:
        prepared = nxfx.prepare(model, (), corpus.clone(kwargs), pipeline=pipeline, verify_each=verify_each)
    except nxfx.CaptureError as error:
        row.verdict, row.seconds = "refused", time.perf_counter() - started
        _explain(row, error)
        return row
    report = prepared.report
    row.kinds = Counter({r.kind.value: 0 for r in report.rewrites})
    for rewrite in report.rewrites:
        row.kinds[rewrite.kind.value] += rewrite.count
    row.codes = Counter(f.code for f in report.findings)
    row.wide = (report.wide_edges["before"], report.wide_edges["after"], report.wide_edges["forced"])
    row.proved = snapshot.proved
    row.nodes = (report.nodes["before"], report.nodes["after"])
    if row.kept and not any(code in EXPLAINS_WIDE for code in row.codes):
        row.problems.append(f"{row.kept} 64-bit edges are left and no finding says why")
    _compare(row, model, prepared, snapshot.graph_module, kwargs, entry)
    row.seconds = time.perf_counter() - started
    return row


def _explain(row: Row, error: nxfx.CaptureError) -> None:
    findings = error.report.findings if error.report else []
    row.codes = Counter(f.code for f in findings)
    located = [f for f in findings if f.location.file and f.location.source]
    if not located:
        row.problems.append(f"refused without the line: {error}")
        return
    row.why = f"{located[0].code} `{located[0].location.source}`"


def _compare(
    row: Row, model: Any, prepared: nxfx.PreparedModule, captured: fx.GraphModule, kwargs: dict[str, Any], entry: corpus.Entry
) -> None:
    (call,) = prepared.captures.values()
    row.verdict = "exact" if set(row.kinds) <= {"exact"} else "refines"
    differences = []
    for number, inputs in enumerate((kwargs, corpus.vary(kwargs, 1), corpus.vary(kwargs, 2))):
        flat = flatten(bind(model, (), corpus.clone(inputs))[:2], share=True).leaves
        if len(flat) != len(call.placeholders):
            row.problems.append(f"input {number}: {len(flat)} leaves for {len(call.placeholders)} placeholders")
            return
        with torch.no_grad():
            torch.manual_seed(7)
            before = list(captured(*[t.clone() for t in flat]))
            torch.manual_seed(7)
            after = call.boundary.restore(call.graph_module(*call.boundary.admit([t.clone() for t in flat])))
        outcome = compare(before, after) if row.verdict == "exact" else _refined(before, after)
        row.problems += [f"input {number}: rewritten graph: {m}" for m in outcome.mismatches[:2]]
        if entry.stateful:
            continue
        eager_inputs, own_inputs = corpus.clone(inputs), corpus.clone(inputs)
        torch.manual_seed(7)
        with torch.no_grad():
            eager = model(**eager_inputs)
        torch.manual_seed(7)
        mine = prepared(**own_inputs)
        differences.append(compare((eager, eager_inputs), (mine, own_inputs)))
        close = compare((eager, eager_inputs), (mine, own_inputs), kind="close", max_abs=_noise(eager, row.dtype))
        row.problems += [f"input {number}: eager: {m}" for m in close.mismatches[:2]]
    if len(prepared.captures) != 1:
        row.problems.append(f"{len(prepared.captures)} captures for inputs of one signature")
    row.capture = "bits" if differences and all(d.ok for d in differences) else "close" if differences else "stateful"


def _noise(value: Any, dtype: str) -> float:
    """What two orders of summation may differ by: some units in the last place of the largest output."""
    largest = max((float(t.abs().max()) for t in flatten(value).leaves if t.is_floating_point() and t.numel()), default=1.0)
    return max(largest, 1.0) * (2**-6 if dtype == "bfloat16" else 2**-14)


def _refined(before: list[Any], after: list[Any]) -> Comparison:
    scale = max((float(t.abs().max()) for t in before if t.is_floating_point() and t.numel()), default=1.0)
    return compare(before, after, kind="close", max_abs=max(scale, 1.0) * 2**-4)


def _one(job: tuple[str, torch.dtype, bool]) -> Row:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    name, dtype, cached = job
    row = run(corpus.BY_NAME[name], dtype, cached)
    print(_line(row), file=sys.stderr, flush=True)
    return row


def measure_all(names: list[str], processes: int = 2) -> list[Row]:
    """Rows for the named architectures (all of them without names), fp32 and bf16, without and with a cache."""
    jobs = []
    for entry in corpus.CORPUS:
        if names and entry.name not in names:
            continue
        for dtype in (torch.float32,) if entry.bf16_failure else (torch.float32, torch.bfloat16):
            jobs += [(entry.name, dtype, cached) for cached in ((False, True) if entry.cached else (False,))]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        return pool.map(_one, jobs, chunksize=1)


def _line(row: Row) -> str:
    kinds = ", ".join(f"{n} {k}" for k, n in row.kinds.items()) or "-"
    kept = f"{row.wide[0]} → {row.wide[1]}" + (f" (+{row.wide[2]} forced)" if row.wide[2] else "")
    codes = ", ".join(f"{c}×{n}" if n > 1 else c for c, n in row.codes.items())
    note = row.why or "; ".join(row.problems)
    cells = (row.name, row.dtype, "yes" if row.cached else "", row.verdict, row.capture, kinds, kept, codes, note)
    return "| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |"


def _percent(rows: list[Row]) -> str:
    return f"{100 * sum(r.proved[0] for r in rows) / max(sum(r.proved[1] for r in rows), 1):.1f} %"


def document(rows: list[Row]) -> str:
    """docs/corpus.md."""
    prepared = [r for r in rows if r.verdict != "refused"]
    architectures = {r.name for r in rows}
    ok = {r.name for r in prepared}
    lines = [
        "# Which models were tried",
        "",
        "Tiny random-weight configurations of `transformers` architectures, in fp32 and bf16, with and without a cache. This page is",
        "written by `python tests/corpus_run.py`; a part of it runs in `make test`.",
        "",
        f"{len(architectures)} architectures, {len(rows)} runs: {len(prepared)} prepared ({len(ok)} architectures), "
        f"{len(rows) - len(prepared)} refused with the line that refuses. "
        f"{sum(r.verdict == 'exact' for r in rows)} exact, {sum(r.verdict == 'refines' for r in rows)} refines. "
        f"64-bit edges: {sum(r.wide[0] for r in rows)} before, {sum(r.wide[1] for r in rows)} after, "
        f"{sum(r.wide[2] for r in rows)} forced by a schema and followed at once by their cast. "
        f"Of {sum(r.proved[1] for r in rows)} int64 values that ops make, {_percent(rows)} are proved to fit int32, or implied to by their "
        "use, without any declaration.",
        "",
        "- *verdict*: the cleaned graph against the captured graph on three inputs. `exact`: equal bits. `refines`: int → low precision",
        "  casts were lifted, so bits differ on purpose.",
        "- *capture*: the prepared model against eager. `bits`: equal bits. `close`: library code takes another path while it is traced",
        "  (another attention kernel, say), so sums differ in their last places.",
        "- *64-bit*: edges before → after; those left are explained by NX301, NX302, NX304 or NX306 findings.",
        "",
        "| model | dtype | cache | verdict | capture | rewrites | 64-bit | findings | note |",
        "|---|---|---|---|---|---|---|---|---|",
        *map(_line, rows),
        "",
    ]
    return "\n".join(lines)




if __name__ == "__main__":
    chosen = sys.argv[1:]
    if tested := chosen == ["--tested"]:
        from tests.test_corpus import CASES, REFUSED

        chosen = sorted({str(case.values[0]) for case in CASES} | set(REFUSED.split()))  # type: ignore[attr-defined]
    measured = measure_all(chosen)
    bad = [r for r in measured if r.problems]
    if tested or not chosen:
        with open(os.path.join(os.path.dirname(__file__), "..", "docs", "corpus.md"), "w") as page:
            page.write(document(measured))
    for broken in bad:
        print(broken.name, broken.dtype, "cached" if broken.cached else "", broken.problems)
    print(f"{len(measured)} runs, {len(bad)} with problems; {_percent(measured)} of the int64 values proved without a declaration")
    sys.exit(bool(bad))
