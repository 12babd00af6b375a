"""What rounding costs integers in real spellings, before and after nxfx, and under each emulated auto-cast.

    python tests/bench/precision.py                  every section but XLA's (half an hour)
    python tests/bench/precision.py --only tables    one section: tables, models, counts, time, or xla (torch 2.9 and torch-xla)
    python tests/bench/precision.py --write          write what was made into docs/precision.md too; other sections of it stay

It fails where prepared is worse than the original: `assert`s hold the claims that the page makes.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import os
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.simplefilter("ignore")

import torch
from torch import Tensor, fx

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "bench")]

import corpus
import precision_tables

import nxfx
from nxfx.passes.finite_masks import FiniteMasks
from nxfx.passes.lift_int_casts import LiftIntCasts
from nxfx.verification.equivalence import ErrorStats, error_against

BF16 = torch.bfloat16


# --- models at far positions ------------------------------------------------------------------------------------------

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gpt_neox", "phi", "phi3", "olmo", "olmo2", "cohere", "falcon", "stablelm",
            "granite", "starcoder2", "glm")  # fmt: skip


def rounding(model: Any) -> Any:
    """The model as it is in many checkpoints' own code: the rotary's positions and table in the model's dtype."""
    for module in model.modules():
        if "inv_freq" in module._buffers:
            module.forward = _LowRotary(module)  # type: ignore[method-assign]
    return model


class _LowRotary:
    def __init__(self, module: Any) -> None:
        self.module = module

    def __deepcopy__(self, memo: dict[int, Any]) -> _LowRotary:
        return _LowRotary(memo[id(self.module)])

    def __call__(self, x: Tensor, position_ids: Tensor, *rest: Any, **named: Any) -> tuple[Tensor, Tensor]:
        angles = position_ids[:, :, None].to(x.dtype) * self.module.inv_freq.to(torch.float64 if x.dtype is torch.float64 else torch.float32).to(x.dtype)
        both = torch.cat((angles, angles), dim=-1)
        return both.cos(), both.sin()


def models() -> Iterator[tuple[str, dict[str, float]]]:
    """Family, and the error of the logits against float64 and the agreement of the tokens, before and after."""
    for name in FAMILIES:
        if name not in corpus.BY_NAME:
            continue
        model, kwargs = corpus.BY_NAME[name].build(BF16)
        if "position_ids" in inspect.signature(model.forward).parameters:
            kwargs["position_ids"] = (30000 + torch.arange(corpus.LENGTH) * 3).expand(corpus.BATCH, -1).contiguous()
        model = sharpened(rounding(model))
        with torch.no_grad():
            exact = copy.deepcopy(model).double()(**corpus.clone(kwargs)).logits
            before = model(**corpus.clone(kwargs)).logits
            try:
                prepared = nxfx.prepare(model, (), corpus.clone(kwargs), ranges={"position_ids": (0, 131071)} if "position_ids" in kwargs else None)
            except nxfx.UsageError:
                prepared = nxfx.prepare(model, (), corpus.clone(kwargs))
            after = prepared(**corpus.clone(kwargs)).logits
        tokens = exact.argmax(-1)
        was, is_ = error_against(exact, before), error_against(exact, after)
        assert is_.mean < was.mean / 3 and is_.p999 <= was.p999, (name, was, is_)
        yield name, {
            "before, mean": was.mean, "before, max": was.max, "after, mean": is_.mean, "after, max": is_.max,
            "agree before": float((before.argmax(-1) == tokens).float().mean()), "agree after": float((after.argmax(-1) == tokens).float().mean()),
            "lifted": float(sum(r.count for r in prepared.report.rewrites if r.pass_name == "lift-int-casts")),
        }  # fmt: skip


def sharpened(model: Any) -> Any:
    """With attention that looks somewhere: random weights of a tiny model look everywhere, whatever the positions are."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1 and re.search(r"\b(q_proj|k_proj|query|key|query_key_value|Wqkv|c_attn)\.weight", name):
                weight.mul_(8)
    return model


# --- counts --------------------------------------------------------------------------------------------------


class Counted(nxfx.Pass):
    """Changes nothing: counts the nodes and casts that are alive."""

    name = "counted"

    def run(self, graph_module: fx.GraphModule, context: nxfx.PassContext) -> nxfx.PassResult:
        if not context.is_body:
            copied = fx.Graph()
            copied.output(copied.graph_copy(graph_module.graph, {}))
            copied.eliminate_dead_code()
            self.nodes, self.casts = size(copied)
        return nxfx.PassResult()


CHANGED = ("lift-int-casts", "finite-masks")


def size(graph: fx.Graph) -> tuple[int, int]:
    """How many nodes, and how many of them are casts."""
    return len(graph.nodes), len(graph.find_nodes(op="call_function", target=torch.ops.aten._to_copy.default))


def counts(names: Iterable[str]) -> Iterator[tuple[str, dict[str, int], list[str]]]:
    """Nodes and casts before and after lift-int-casts and finite-masks, and the rules that made a change, of models as transformers writes them.

    Fails where there are more and nothing was lifted, or repaired: what is exactly representable costs nothing.
    """
    for name in names:
        model, kwargs = corpus.BY_NAME[name].build(BF16)
        counted = Counted()
        try:
            prepared = nxfx.prepare(model, (), corpus.clone(kwargs), pipeline=nxfx.Pipeline([counted, LiftIntCasts(), FiniteMasks()]))
        except nxfx.CaptureError:  # docs/corpus.md says why
            continue
        nodes, casts = size(prepared.graph_module.graph)
        rules = Counter(r.rule for r in prepared.report.rewrites for _ in range(r.count) if r.pass_name in CHANGED)
        assert rules or (nodes, casts) == (counted.nodes, counted.casts), name
        row = {"nodes before": counted.nodes, "nodes after": nodes, "casts before": counted.casts, "casts after": casts}
        yield name, row, [f"{rule} {count}" for rule, count in rules.items()]


# --- the page ---------------------------------------------------------------------------------------------------------


HEAD = """# What rounding costs integers

Made by `python tests/bench/precision.py --write`, which fails where prepared is worse than the original. Everything ran on a CPU; the
auto-casts are [emulated](autocast.md). Errors are against float64: mean (largest).
"""
SLOWER = """Before and after lift-int-casts and finite-masks, both graphs compiled alike. The widths are those of the corpus, tiny, on
sequences of 240: the rotary's share is larger than in any real model. Calls of both take turns for 8 seconds; the figure is the median of
the ratios of neighbouring calls in processor time, after over before, with the 95 % interval of that median.
"""
BARE = """
A bare table of 32,768 positions, and nothing beside it, which no model is. At positions that bf16 holds both graphs compute the same
angles. At all positions the original has 1,153 different angles in a column, repeated, and the cosine of XLA on a CPU is faster on
those: the difference is in the numbers, not in the graph.
"""


def rows(head: str, lines: Iterator[str]) -> Iterator[str]:
    """A table of Markdown, shown as it is made."""
    yield from (head, "|---" * (head.count("|") - 1) + "|")
    for line in lines:
        print(line, flush=True)
        yield line


def tables_section() -> Iterator[str]:
    found = []

    def lines() -> Iterator[str]:
        for row in precision_tables.rows():
            found.append(row)
            yield f"| {row.spelling}, {row.length} | " + " | ".join(map(shown, (row.single, row.original, row.prepared, row.lifted))) + " |"

    yield "Without an auto-cast. The last column is what prepared computes before it is cast back to bf16.\n"
    yield from rows("| spelling, length | fp32 | original | prepared | before the cast back |", lines())
    for autocast, text in UNDER.items():
        kinds = [key for key in precision_tables.UNDER if key[0] == autocast]
        yield f"\nUnder `--auto-cast={autocast}`, original → prepared. {text}\n"
        cells = (f"| {row.spelling}, {row.length} | " + " | ".join(_pair(row, key) for key in kinds) + " |" for row in found)
        yield from rows("| spelling, length | " + " | ".join(cast for _, cast in kinds) + " |", cells)


UNDER = {
    "matmult": "It rounds the factors of float32 matrix products; where a spelling has none nothing changes.",
    "all": """It rounds the positions themselves, in whatever type the graph has them, and what is rounded to bf16 later is rounded once
more. It rounds the numbers beside float32 too (a timestep's 9.21 / 32), which a bf16 model is multiplied by unrounded on a CPU. Beyond that
prepared is no worse than the original, or than the model in float32. † A number became infinite, since fp16 has none above 65504 and
fp8_e4m3 none above 240; bf16 has, so a model that keeps its positions in bf16 is better off there. `nxfx.trace` warns of `all`, with
the line: [NX550](codes/NX550.md).""",
}


def shown(error: ErrorStats) -> str:
    return f"{error.mean:.2g} ({error.max:.2g})"


def _pair(row: precision_tables.Row, key: tuple[str, str]) -> str:
    was, is_ = row.under[key]
    return f"{shown(was)} → {shown(is_)}" + " †" * (key in row.overflowed)


def models_section() -> Iterator[str]:
    yield "In bf16, with a rotary that computes in the model's dtype; against the same weights in float64.\n"

    def lines() -> Iterator[str]:
        for name, row in models():
            cells = f"{row['before, mean']:.2g} ({row['before, max']:.2g}) | {row['after, mean']:.2g} ({row['after, max']:.2g})"
            yield f"| {name} | {row['lifted']:.0f} | {cells} | {row['agree before']:.0%} | {row['agree after']:.0%} |"

    yield from rows("| family | values lifted | error before | after | tokens that agree before | after |", lines())


def counts_section() -> Iterator[str]:
    same: list[str] = []

    def lines() -> Iterator[str]:
        for name, row, rules in counts(corpus.BY_NAME):
            if rules:
                yield f"| {name} | " + " | ".join(map(str, row.values())) + f" | {', '.join(rules)} |"
            else:
                same.append(name)

    yield "In bf16, as transformers writes them, after lift-int-casts and finite-masks alone.\n"
    yield from rows("| model | nodes before | after | casts before | after | rewrites |", lines())
    yield f"\nNot a node and not a cast more or less in the other {len(same)}, masks and their casts included: {', '.join(same)}."


def time_section(backend: str) -> Iterator[str]:
    from precision_time import model_ratios, ratio

    yield SLOWER
    found = model_ratios(FAMILIES, rounding, backend)
    yield from rows("| family | ratio |", (f"| {name} | {value} |" for name, value in found))
    yield BARE
    every = torch.arange(32768)

    def lines() -> Iterator[str]:
        for name in ("rotary, product", "rotary, outer", "timestep", "sinusoidal"):
            same, all_ = (ratio(precision_tables.Table(precision_tables.SPELLINGS[name], BF16), (p,), {}, backend) for p in (every.to(BF16).long(), every))
            yield f"| {name} | {same} | {all_} |"

    yield from rows("| spelling | ratio at positions that bf16 holds | at all positions |", lines())


SECTIONS: dict[str, tuple[str, Callable[[], Iterator[str]]]] = {
    "tables": ("Tables of positions in a bf16 model", tables_section),
    "models": ("Tiny models at positions from 30,000", models_section),
    "counts": ("Nodes and casts of the corpus", counts_section),
    "time": ("Running time under Inductor", lambda: time_section("inductor")),
    "xla": ("Running time under XLA on a CPU", lambda: time_section("openxla")),
}


def written(page: str, made: dict[str, str]) -> str:
    """The page with the sections that were made in the place of those it had."""
    parts = re.split(r"^## (.+)\n", page, flags=re.MULTILINE)
    held = dict(zip(parts[1::2], parts[2::2], strict=True)) | made
    return HEAD + "".join(f"\n## {title}\n\n{held[title].strip()}\n" for title, _ in SECTIONS.values() if title in held)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=SECTIONS)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    chosen = [options.only] if options.only else [name for name in SECTIONS if name != "xla"]
    made = {title: "\n".join(make()) for title, make in (SECTIONS[name] for name in chosen)}
    if options.write:
        path = ROOT / "docs" / "precision.md"
        path.write_text(written(path.read_text(encoding="utf-8"), made), encoding="utf-8")


if __name__ == "__main__":
    main()
