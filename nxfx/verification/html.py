"""The page of a verification: one file, nothing loaded from elsewhere, every name shown as text."""

from __future__ import annotations

import html
import linecache
import math
from collections.abc import Iterable, Sequence
from typing import Any

from torch import fx

from nxfx.graph import printing
from nxfx.graph.escaping import printable
from nxfx.report.locations import Location, locate
from nxfx.verification.judge import OutputReport
from nxfx.verification.localisation import Blame, NodeError
from nxfx.verification.report import VerifyReport

_AROUND = 4  # lines of code around the one at fault
_WIDTH, _HEIGHT, _LEFT, _TOP, _FOOT = 960, 240, 56, 10, 24

_STYLE = """
:root { color-scheme: light dark; --bad: #c62828; --good: #2e7d32; --line: #8884; --soft: #8881; --model: #1976d2; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 84rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; width: 100%; } th, td { text-align: left; padding: .2rem .6rem; border-bottom: 1px solid var(--line); }
td.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; } .wide { overflow-x: auto; }
td.told { padding-left: 4rem; opacity: .8; } tr.has-told td { border-bottom: none; } th { vertical-align: bottom; }
code, pre { font: 13px/1.45 ui-monospace, monospace; }
pre { overflow: auto; background: var(--soft); padding: .6rem; max-height: 32rem; } .FAIL { color: var(--bad); font-weight: 600; }
.PASS { color: var(--good); font-weight: 600; } mark { background: #ffd54f; color: #000; }
.two { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; } .two > div { min-width: 0; }
.g span { display: block; white-space: pre; }
.g span:target, .g span.on { background: #ffd54f; color: #000; } .made { color: var(--model); }
svg { width: 100%; height: auto; } svg text { fill: currentColor; font: 11px system-ui, sans-serif; } a { color: inherit; }
"""

# Picking a node in one graph shows its counterpart in the other. Reads attributes that this file wrote, runs no data.
_SCRIPT = """
document.addEventListener('click', function (event) {
  var row = event.target.closest('.g span');
  if (!row) return;
  document.querySelectorAll('.g span.on').forEach(function (other) { other.classList.remove('on'); });
  document.querySelectorAll('.g span[data-node]').forEach(function (other) {
    if (other.dataset.node === row.dataset.node) { other.classList.add('on'); other.scrollIntoView({block: 'nearest'}); }
  });
});
"""


def page(report: VerifyReport) -> str:
    """The whole page. Names of models, files and nodes are escaped: they are shown, never run."""
    verdict = "PASS" if report.ok else "FAIL"
    parts = [
        f'<h1>nxfx verify: <span class="{verdict}">{verdict}</span></h1>',
        f"<p>{_text(f'{report.candidate} against {report.model}, {report.reference} reference')}<br>{_text(report.summary())}</p>",
        _list("Problems", report.problems),
        _blame(report),
        _outputs(report.outputs),
        _tokens(report),
        _along(report),
        _bisection(report),
        _matmuls(report),
        _prepared(report),
        _graphs(report),
        _list("Notes", report.notes),
    ]
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f"<title>{_text(f'{verdict}: {report.model}')}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(p for p in parts if p)
        + f"\n<script>{_SCRIPT}</script>\n</body></html>\n"
    )


def _text(value: Any) -> str:
    return html.escape(printable(str(value)), quote=True)


def _section(title: str, body: str) -> str:
    return f"<h2>{_text(title)}</h2>\n{body}" if body else ""


def _list(title: str, items: Iterable[str]) -> str:
    rows = "".join(f"<li>{_text(i)}</li>" for i in items)
    return _section(title, f"<ul>{rows}</ul>" if rows else "")


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are markup already; a number's cell starts with ``#``. A cell more than the head has is told in a line below its row."""
    lines = []
    for row in rows:
        cells = "".join(f'<td class="n">{c[1:]}</td>' if c.startswith("#") else f"<td>{c}</td>" for c in row[: len(head)])
        told = "".join(f'<tr><td class="told" colspan="{len(head)}">{t}</td></tr>' for t in row[len(head) :] if t)
        opened = '<tr class="has-told">' if told else "<tr>"
        lines.append(f"{opened}{cells}</tr>{told}")
    header = "".join(f"<th>{_text(h)}</th>" for h in head)
    return f'<div class="wide"><table><tr>{header}</tr>{"".join(lines)}</table></div>'


def _number(value: float | None) -> str:
    return "#" if value is None else f"#{value:.3g}"


def _outputs(outputs: list[OutputReport]) -> str:
    rows = []
    for output in outputs:
        verdict = "PASS" if output.ok else "FAIL"
        ours, theirs = output.model, output.candidate
        numbers = [_number(None)] * 6
        if ours is not None and theirs is not None:
            pairs = (theirs.max_abs, ours.max_abs, theirs.mean_abs, ours.mean_abs, theirs.mean_rel)
            numbers = [*map(_number, pairs), f"#{theirs.cosine:.8f}"]
        top = ", ".join(f"{t.k or 'all'}: {t.error:.3g}" for t in output.top_k)
        told = "<br>".join(map(_text, (*output.problems, *output.notes)))
        cells = [f'<span class="{verdict}">{verdict}</span>', f"<code>{_text(output.path)}</code>", _text(output.dtype + output.shape)]
        rows.append([*cells, *numbers, _text(top), told])
    head = ("", "output", "type", "max error", "model's", "mean error", "model's", "relative", "cosine", "top-k")
    return _section("Outputs", _table(head, rows) if rows else "")


def _tokens(report: VerifyReport) -> str:
    return _list("Tokens", report.tokens.lines()) if report.tokens is not None else ""


def _along(report: VerifyReport) -> str:
    """Total error of candidate and model at each node, on a logarithmic scale."""
    if report.localisation is None:
        return ""
    points = [e for e in report.localisation.along if e.candidate is not None]
    finite = [v for e in points for v in (e.candidate, e.model) if v is not None and 0 < v < math.inf]
    if len(points) < 2 or not finite:
        return ""
    low, high = math.floor(math.log10(max(min(finite), 1e-18))), math.ceil(math.log10(max(finite)))
    high = max(high, low + 1)
    shown_width, shown_height = _WIDTH - _LEFT - 10, _HEIGHT - _TOP - _FOOT

    def x(position: int) -> float:
        return _LEFT + shown_width * position / (len(points) - 1)

    def y(value: float | None) -> float:
        bounded = min(max(value or 10.0**low, 10.0**low), 10.0**high)
        return _TOP + shown_height * (high - math.log10(bounded)) / (high - low)

    def curve(values: Iterable[float | None]) -> str:
        return " ".join(f"{x(i):.1f},{y(v):.1f}" for i, v in enumerate(values))

    step = max(1, (high - low) // 6)
    grid = "".join(
        f'<line x1="{_LEFT}" x2="{_WIDTH - 10}" y1="{y(10.0**d):.1f}" y2="{y(10.0**d):.1f}" stroke="currentColor" stroke-opacity=".15"/>'
        f'<text x="4" y="{y(10.0**d) + 4:.1f}">1e{d}</text>'
        for d in range(low, high + 1, step)
    )
    first = report.localisation.first
    culprit = next((i for i, e in enumerate(points) if first is not None and e.node == first.original), None)
    marker = ""
    if culprit is not None:
        at = x(culprit)
        marker = (
            f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{_HEIGHT - _FOOT}" stroke="var(--bad)" stroke-dasharray="4 3"/>'
            f'<text x="{min(at + 4, _WIDTH - 200):.1f}" y="{_TOP + 12}">{_text(points[culprit].node)}</text>'
        )
    dots = "".join(_dot(x(i), y(e.candidate), e) for i, e in enumerate(points)) if len(points) <= 4000 else ""
    body = (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="error along the graph">{grid}'
        f'<polyline points="{curve(e.model for e in points)}" fill="none" stroke="var(--model)" stroke-width="1.2"/>'
        f'<polyline points="{curve(e.candidate for e in points)}" fill="none" stroke="var(--bad)" stroke-width="1.2"/>{dots}{marker}'
        f'<text x="{_LEFT}" y="{_HEIGHT - 6}">node 1 to {len(points)}; relative error against the reference: '
        "red the candidate, blue the model itself</text></svg>"
    )
    return _section("Error along the graph", body)


def _dot(x: float, y: float, error: NodeError) -> str:
    told = f"{error.node} ({error.op}) {error.location}: candidate {error.candidate:.3g}, model {error.model:.3g}"
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2" fill="var(--bad)"><title>{_text(told)}</title></circle>'


def _blame(report: VerifyReport) -> str:
    if report.localisation is None:
        return ""
    first = report.localisation.first
    if first is None:
        return _section("First bad op", "<p>Every compared value is explained by its inputs: no op is to blame.</p>")
    others = [f"{b.op} {b.node} at {b.location}: {b.cause}" for b in report.localisation.others]
    return _section("First bad op", _one_blame(first)) + _list("Further ops", others)


def _one_blame(blame: Blame) -> str:
    made_by = f"made by {blame.made_by}" if blame.made_by else ""
    errors = f"it introduces {blame.local:.3g} where the model's op makes {blame.expected:.3g}; it was handed {blame.inherited:.3g}"
    return (
        f'<p><a href="#candidate-{_text(blame.node)}"><code>{_text(blame.op)} {_text(blame.node)}</code></a> {_text(made_by)} '
        f"in module <code>{_text(blame.location.module or '(root)')}</code><br>"
        f"cause: <b>{_text(blame.cause)}</b>: {_text(blame.detail)}<br>{_text(errors)}</p>{_code(blame.location)}"
    )


def _code(location: Location) -> str:
    """The lines around a location, from its file; the line alone where that is gone."""
    if not location.file:
        return ""
    lines = []
    for number in range(max(1, location.line - _AROUND), location.line + _AROUND + 1):
        source = linecache.getline(location.file, number).rstrip("\n")
        if not source and number == location.line:
            source = location.source
        shown = _text(f"{number:>5}  {source}")
        lines.append(f"<mark>{shown}</mark>" if number == location.line else shown)
    return f"<p><code>{_text(location)}</code></p><pre>{chr(10).join(lines)}</pre>"


def _bisection(report: VerifyReport) -> str:
    return _section("Pass and rewrite at fault", f"<pre>{_text(report.bisection)}</pre>") if report.bisection is not None else ""


def _matmuls(report: VerifyReport) -> str:
    rows = (
        [_number(m.loss), _number(m.own), f"<code>{_text(m.op)} {_text(m.node)}</code>", f"<code>{_text(m.location.module)}</code>",
         _text(m.location)]
        for m in report.matmuls
    )  # fmt: skip
    head = ("under the cast", "as written", "matmul", "module", "line")
    return _section(f"What --auto-cast={report.autocast} costs", _table(head, rows)) if report.matmuls else ""


def _prepared(report: VerifyReport) -> str:
    """Rewrites and findings beside the source."""
    if report.prepared is None:
        return ""
    told_of = [(r.rule, f"{r.kind.value} ×{r.count}", f"{r.before} → {r.after}", r.location) for r in report.prepared.rewrites]
    told_of += [(f.code, f.severity.value, f.message, f.location) for f in report.prepared.findings]
    rows = [[*map(_text, told), f"<code>{_text(told[-1].source)}</code>"] for told in told_of]
    certificate = report.prepared.certificate
    told = f"<p>Certificate: {_text(certificate.summary())}</p>" if certificate is not None else ""
    table = _table(("rule or code", "kind", "what", "line", "source"), rows) if rows else "<p>none</p>"
    return _section("Rewrites and findings", told + table)


def _graphs(report: VerifyReport) -> str:
    """Before and after, a line a node; a click on one shows its counterpart."""
    sides = []
    for name, graph_module in report.graphs.items():
        lines = "".join(_node(name, node) for node in graph_module.graph.nodes)
        sides.append(f'<div><h3>{_text(name)}</h3><pre class="g">{lines}</pre></div>')
    return _section("Graphs (pick a node to see its counterpart)", f'<div class="two">{"".join(sides)}</div>' if sides else "")


def _node(side: str, node: fx.Node) -> str:
    origin = node.meta.get("nxfx", {}).get("origin", node.name) if printing.made_by(node) else node.name
    spelled = f"{node.name}: {printing.describe(node.meta.get('val'))} = {_called(node)}"
    made = ' class="made"' if printing.made_by(node) else ""
    title = f"{locate(node)} {f'made by {printing.made_by(node)}' if printing.made_by(node) else ''}"
    return f'<span id="{_text(side)}-{_text(node.name)}" data-node="{_text(origin)}" title="{_text(title)}"{made}>{_text(spelled)}</span>'


def _called(node: fx.Node) -> str:
    if node.op == "output":
        return f"return {printing.literal(node.args[0])}"
    if node.op != "call_function":
        return f"{node.op}[{node.target}]"
    arguments = [*map(printing.literal, node.args), *(f"{k}={printing.literal(v)}" for k, v in node.kwargs.items())]
    return f"{printing.short(node.target)}({', '.join(arguments)})"
