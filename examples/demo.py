"""What nxfx does to a bf16 Llama and to a vision mask, measured. Run it with ``make demo``.

Every number is computed here; the exit code is 1 when one of them is not what it has to be.
"""

from __future__ import annotations

import copy
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(Path(__file__).resolve().parent), str(ROOT)]

import llama_bf16  # noqa: E402
import mllama_mask  # noqa: E402

import nxfx  # noqa: E402
from nxfx.graph import printing  # noqa: E402
from nxfx.verification.equivalence import ErrorStats, compare, error_against  # noqa: E402

EAGER, PREPARED = "the model in bf16", "the prepared model in bf16"


@dataclass
class Demo:
    """The console, and what has been checked so far."""

    console: Console = field(default_factory=lambda: Console(highlight=False, soft_wrap=True))
    checks: list[tuple[str, bool]] = field(default_factory=list)

    def check(self, claim: str, holds: bool) -> None:
        self.checks.append((claim, holds))

    def check_edges(self, name: str, report: nxfx.Report) -> None:
        before, after = report.wide_edges["before"], report.wide_edges["after"]
        explained = any(f.code in ("NX301", "NX302", "NX306") for f in report.findings)
        rest = f"{after} after, as reported" if after else "none after"
        self.check(f"{name}: {before} values flow in 64 bits before, {rest}", after == 0 or explained)

    def title(self, text: str) -> None:
        self.console.print()
        self.console.rule(f"[bold]{text}", align="left")

    def say(self, text: str) -> None:
        self.console.print(text)

    def show_report(self, report: nxfx.Report) -> None:
        short = re.sub(r"\S*/site-packages/", "", str(report).replace(f"{ROOT}/", ""))
        self.console.print(short, markup=False)

    def show_diff(self, prepared: nxfx.PreparedModule, model: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        """The captured graph against the cleaned one: an empty pipeline gives the former."""
        self.say("\nThe graph, before and after:")
        captured = nxfx.prepare(model, args, kwargs, pipeline=nxfx.Pipeline())
        before, after = printing.text(captured.graph_module), printing.text(prepared.graph_module)
        styles = {"+": "green", "-": "red", "@": "cyan"}
        for line in printing.diff(before, after, "captured", "prepared", context=1).splitlines():
            self.console.print(Text(line, styles.get(line[0], "")))
        self.say("")

    def verdict(self) -> int:
        """Lists what was checked; the exit code."""
        self.title("Checked")
        for claim, holds in self.checks:
            self.say(f"  {'[green]ok  ' if holds else '[bold red]FAIL'}[/] {claim}")
        return 0 if all(holds for _, holds in self.checks) else 1


def float64(model: torch.nn.Module) -> torch.nn.Module:
    """The same weights and code, computed in float64."""
    return copy.deepcopy(model).double()


def errors_table(title: str, rows: list[tuple[str, ErrorStats]]) -> Table:
    """Errors against float64."""
    table = Table("computed by", "mean error", "worst error", title=title, title_justify="left")
    for name, error in rows:
        table.add_row(name, f"{error.mean:.5f}", f"{error.max:.5f}")
    return table


def llama(demo: Demo) -> None:
    """A Llama whose rotary embedding casts position ids to bf16."""
    demo.title("1. A bf16 Llama that casts its position ids to bf16")
    model, args, kwargs = llama_bf16.naive()
    positions = kwargs["position_ids"]
    first, last, left = int(positions.min()), int(positions.max()), positions.to(torch.bfloat16).unique().numel()
    demo.say(f"positions {first} to {last}: {positions.numel()} of them, {left} left in bf16\n")

    prepared = nxfx.prepare(model, args, kwargs, ranges={"position_ids": (0, model.config.max_position_embeddings - 1)})
    demo.show_report(prepared.report)
    demo.show_diff(prepared, model, *args, **kwargs)
    demo.check_edges("Llama", prepared.report)
    kinds = {r.kind.value for r in prepared.report.rewrites}
    demo.check("the report counts at least one refined cast", "refines" in kinds)

    cosines(demo, model.model.rotary_emb, positions)
    reference = float64(model)(*args, **kwargs).logits
    safe, *_ = llama_bf16.tiny()
    before = error_against(reference, model(*args, **kwargs).logits)
    after = error_against(reference, prepared(*args, **kwargs).logits)
    floor = error_against(reference, safe(*args, **kwargs).logits)
    rows = [(EAGER, before), (PREPARED, after), ("transformers' own rotary in bf16", floor)]
    title = f"Logits against float64 (their standard deviation is {reference.std():.2f})"
    demo.console.print(errors_table(title, rows))
    demo.check("the logits have the error of a Llama with a careful rotary", after.mean <= 1.02 * floor.mean)
    demo.check("preparing cuts the mean error of the logits at least tenfold", after.mean * 10 <= before.mean)
    agreement = compare(safe(*args, **kwargs).logits, prepared(*args, **kwargs).logits)
    demo.check("its logits are bit-equal to those of transformers' own Llama", bool(agreement))


def cosines(demo: Demo, rotary: torch.nn.Module, positions: torch.Tensor) -> None:
    """The rotary table alone."""
    x = torch.zeros(1, dtype=torch.bfloat16)
    prepared = nxfx.prepare(rotary, (x, positions))
    reference = float64(rotary)(x.double(), positions)[0]
    before = error_against(reference, rotary(x, positions)[0])
    after = error_against(reference, prepared(x, positions)[0])
    title = "Cosines of the rotary embedding against float64"
    demo.console.print(errors_table(title, [(EAGER, before), (PREPARED, after)]))
    # Half a unit in the last place of a bf16 value below 1, and the error of an fp32 angle of this size.
    bound = 2**-9 + float(positions.max()) * 2**-23
    demo.check("the cosines are as exact as bf16 can hold", after.max <= bound)
    demo.check("the model's own are not", before.max > 100 * bound)


def mask(demo: Demo) -> None:
    """The vision mask at full size: captured once, asked for every aspect ratio."""
    demo.title("2. A vision mask whose slice bound is a tensor")
    model, (x, example) = mllama_mask.full()
    prepared = nxfx.prepare(model, (x, example), ranges={"ar": (1, model.chunks)})
    demo.show_report(prepared.report)
    demo.show_diff(prepared, model, x, example)
    demo.check_edges("mask", prepared.report)
    title = f"Captured once, with {example.tolist()}"
    table = Table("tiles", "zeros", "expected", "equal to eager", title=title, title_justify="left")
    for rows, columns in mllama_mask.ASPECT_RATIOS:
        ar = torch.tensor([[rows, columns]])
        result = prepared(x, ar)
        equal = torch.equal(result, model(x, ar))
        zeros = int((result == 0).sum())
        expected = mllama_mask.zeros_expected(model.chunks, x.shape[2], model.tokens, rows * columns)
        filled = bool((result[result != 0] == torch.finfo(torch.float32).min).all())
        tiles = f"{rows} x {columns}"
        table.add_row(tiles, f"{zeros:,}", f"{expected:,}", "yes" if equal else "[bold red]no")
        demo.check(f"mask of {tiles} tiles: torch.equal, {zeros:,} zeros", equal and filled and zeros == expected)
    demo.console.print(table)


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        yield


def main() -> int:
    demo = Demo()
    with quiet():
        llama(demo)
        mask(demo)
    return demo.verdict()


if __name__ == "__main__":
    sys.exit(main())
