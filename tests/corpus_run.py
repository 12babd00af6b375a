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
from torch.utils import _pytree as pytree

import nxfx
from nxfx.analysis.intervals import INT32, fits
from nxfx.analysis.range_rules import PRESERVING_VIEWS, SELECTIONS
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


# Ops that hand an input's own values on: nothing is computed, so there is nothing to prove.
_MOVES = PRESERVING_VIEWS | frozenset(SELECTIONS)


def _proved(graph_module: fx.GraphModule, context: nxfx.PassContext) -> Counter[str]:
    """How many int64 values that ops compute fit int32 for every input that the model accepts; the same of those an index is made of."""
    ranges, graph = analyse(graph_module, context.sources), graph_module.graph
    indices: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if isinstance(node.target, torch._ops.OpOverload):
            for spec, value in zip(node.target._schema.arguments, node.args, strict=False):
                if node in indices or spec.name in ("index", "indices"):
                    indices.update(n for n in pytree.tree_leaves(value) if isinstance(n, fx.Node) and meta.dtype_of(n) is torch.int64)
    moved, found = set(graph.find_nodes(op="placeholder")), Counter[str]()
    for node in graph.nodes:
        if node.op != "call_function" or meta.dtype_of(node) is not torch.int64:
            continue
        if node.target in _MOVES and node.args[0] in moved:
            moved.add(node)
            continue
        bounds = ranges.proved(node)
        for kind in ("values", "indices") if node in indices else ("values",):
            found[kind] += 1
            found[f"proved {kind}"] += bounds is not None and fits(bounds, INT32)
    return found


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
    proved: Counter[str] = field(default_factory=Counter)
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


def _percent(rows: list[Row], kind: str) -> str:
    found = sum((r.proved for r in rows), Counter[str]())
    return f"{100 * found[f'proved {kind}'] / max(found[kind], 1):.1f} % of {found[kind]}"


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
        f"Proved to fit int32, or implied to by their use, without any declaration: {_percent(rows, 'indices')} int64 values that an index "
        f"is computed from, {_percent(rows, 'values')} that ops compute at all.",
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
    index, every = _percent(measured, "indices"), _percent(measured, "values")
    print(f"{len(measured)} runs, {len(bad)} with problems; without a declaration are proved {index} int64 values of index arithmetic, {every} of all")
    sys.exit(bool(bad))
