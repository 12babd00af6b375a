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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.simplefilter("ignore")

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import corpus

import nxfx
from nxfx.verification.autocast import emulate
from nxfx.verification.equivalence import error_against

BF16 = torch.bfloat16
LENGTHS = (512, 4096, 32768, 131072)
CASTS = (("none", "bf16"), ("matmult", "bf16"), ("matmult", "fp16"), ("matmult", "tf32"), ("matmult", "fp8_e4m3"), ("all", "bf16"))
WIDTH = 64


# --- the tables -------------------------------------------------------------------------------------------------------


def frequencies(dtype: torch.dtype) -> Tensor:
    return 1.0 / 10000 ** (torch.arange(0, WIDTH, 2).to(dtype) / WIDTH)


class Table(nn.Module):
    """One spelling of a table of positions, in bf16 (or, for the truth, in float64)."""

    def __init__(self, spelling: Callable[[Tensor, torch.dtype, Tensor], Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        self.spelling, self.dtype = spelling, dtype
        self.register_buffer("inv_freq", (1.0 / 10000 ** (torch.arange(0, WIDTH, 2).double() / WIDTH)).to(torch.float64 if dtype is torch.float64 else torch.float32))

    def forward(self, positions: Tensor) -> Tensor:
        return self.spelling(positions, self.dtype, self.inv_freq)


def _buckets(p: Tensor, d: torch.dtype, f: Tensor) -> Tensor:
    """T5's: half of them exact, the rest logarithmic."""
    large = 16 + (torch.log(p.to(d) / 16 + 1e-6) / torch.log(torch.tensor(128.0 / 16, dtype=d)) * 16).to(torch.int64)
    return torch.where(p < 16, p, large.clamp(max=4000)).to(torch.float32 if d is BF16 else d)


SPELLINGS: dict[str, Callable[[Tensor, torch.dtype, Tensor], Tensor]] = {
    "rotary, product": lambda p, d, f: (p[:, None].to(d) * f).cos(),
    "rotary, fp32 matmul": lambda p, d, f: (f[:, None] @ p[None, :].to(f.dtype)).t().cos(),
    "rotary, outer": lambda p, d, f: torch.outer(p.to(d), f.to(d)).cos(),
    "rotary, einsum": lambda p, d, f: torch.einsum("i,j->ij", p.to(f.dtype), f).cos(),
    "rotary, complex": lambda p, d, f: torch.view_as_real(torch.polar(torch.ones_like(p[:, None] * f), (p[:, None].to(d) * f).to(f.dtype)))[..., 0],
    "timestep": lambda p, d, f: (p.to(d)[:, None] * torch.exp(torch.arange(32).to(d) * (-9.210340371976184 / 32))).sin(),
    "sinusoidal": lambda p, d, f: (p.to(d)[:, None] / torch.pow(10000.0, torch.arange(32).to(d) / 32)).sin(),
    "ALiBi": lambda p, d, f: p[:, None] * torch.pow(torch.tensor(0.5, dtype=d), torch.arange(1, 9).to(d)),
    "T5 buckets": _buckets,
}  # fmt: skip


def tables(lengths: tuple[int, ...] = LENGTHS) -> Iterator[tuple[str, int, dict[str, tuple[float, float, float]]]]:
    """Spelling, length, and for each way of running it mean, largest and 99.9th percentile of the error against float64."""
    for name, spelling in SPELLINGS.items():
        model, exact, pure = (Table(spelling, d) for d in (BF16, torch.float64, torch.float32))
        for length in lengths:
            positions = torch.randperm(length, generator=torch.Generator().manual_seed(0))[:4096].sort().values
            prepared = nxfx.prepare(model, (positions,), ranges={"positions": (0, max(lengths))}, recompute_tables=True)
            truth = exact(positions).double()
            row: dict[str, tuple[float, float, float]] = {}
            for autocast, cast_type in CASTS:
                label = autocast if autocast == "none" else f"{autocast} {cast_type}"
                for who, module in (("original", model), ("prepared", prepared)):
                    found = error_against(truth, emulate(module, autocast, cast_type)(positions))
                    row[f"{who}, {label}"] = (found.mean, found.max, found.p999)
                was, is_ = row[f"original, {label}"], row[f"prepared, {label}"]
                if autocast != "all":  # it rounds what nxfx keeps in fp32: nothing helps against it but the flag
                    assert is_[0] <= 1.02 * was[0] + 1e-12 and is_[2] <= 1.02 * was[2] + 1e-12, (name, length, label, was, is_)
            single = error_against(truth, pure(positions))
            row["fp32"] = (single.mean, single.max, single.p999)
            low = row["prepared, none"]
            output = prepared(positions).dtype
            rounding = 0.0 if output is torch.float32 else torch.finfo(output).eps / 2 * float(truth.abs().max())
            assert low[0] <= 2 * single.mean + rounding + 1e-12, (name, length, low, single)
            yield name, length, row


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


COUNTED = ("llama", "bert", "t5", "bloom", "mamba", "gpt2", "swin", "whisper")


def counts(names: tuple[str, ...]) -> Iterator[tuple[str, dict[str, int]]]:
    """Nodes and casts before and after lift-int-casts and finite-masks, of models as transformers writes them."""
    for name in names:
        model, kwargs = corpus.BY_NAME[name].build(BF16)
        graphs = [nxfx.prepare(model, (), corpus.clone(kwargs), pipeline=p).graph_module.graph for p in ("", "lift-int-casts,finite-masks")]
        casts = [sum(n.target is torch.ops.aten._to_copy.default for n in g.nodes) for g in graphs]
        nodes = [len(g.nodes) for g in graphs]
        yield name, {"nodes before": nodes[0], "nodes after": nodes[1], "casts before": casts[0], "casts after": casts[1]}


# --- the page ---------------------------------------------------------------------------------------------------------


HEAD = """# What rounding costs integers

Made by `python tests/bench/precision.py --write`, which fails where prepared is worse than the original. Everything ran on a CPU; the
auto-casts are [emulated](autocast.md). Errors are against float64: mean (largest).
"""
SLOWER = """Before and after lift-int-casts and finite-masks, both graphs compiled alike. The widths are those of the corpus, tiny, on
sequences of 240: the rotary's share is larger than in any real model. Median processor time of 100 interleaved calls, after over
before, on a machine that did other work too: one ratio is good to a few hundredths, their geometric mean is the figure.
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
    labels = ["none" if a == "none" else f"{a} {c}" for a, c in CASTS]
    columns = [f"{who}, {label}" for label in labels for who in ("original", "prepared")]

    def lines() -> Iterator[str]:
        for name, length, row in tables():
            cells = (row[c] for c in ("fp32", *columns))
            yield f"| {name}, {length} | " + " | ".join(f"{mean:.2g} ({largest:.2g})" for mean, largest, _ in cells) + " |"

    yield from rows(f"| spelling, length | fp32 | {' | '.join(columns)} |", lines())
    yield "\n`all` rounds the positions themselves, in whatever type the graph has them: only `--auto-cast=none` helps there."


def models_section() -> Iterator[str]:
    yield "In bf16, with a rotary that computes in the model's dtype; against the same weights in float64.\n"

    def lines() -> Iterator[str]:
        for name, row in models():
            cells = f"{row['before, mean']:.2g} ({row['before, max']:.2g}) | {row['after, mean']:.2g} ({row['after, max']:.2g})"
            yield f"| {name} | {row['lifted']:.0f} | {cells} | {row['agree before']:.0%} | {row['agree after']:.0%} |"

    yield from rows("| family | values lifted | error before | after | tokens that agree before | after |", lines())


def counts_section() -> Iterator[str]:
    lines = (f"| {name} | " + " | ".join(map(str, row.values())) + " |" for name, row in counts(COUNTED))
    yield from rows("| model | nodes before | after | casts before | after |", lines)


def time_section(backend: str) -> Iterator[str]:
    from precision_time import model_ratios, ratio

    yield SLOWER
    found = model_ratios(FAMILIES, rounding, backend)
    yield from rows("| family | ratio |", (f"| {name} | {value:.2f} |" for name, value in found))
    yield BARE
    every = torch.arange(32768)

    def lines() -> Iterator[str]:
        for name in ("rotary, product", "rotary, outer", "timestep", "sinusoidal"):
            same, all_ = (ratio(Table(SPELLINGS[name], BF16), (p,), {}, backend) for p in (every.to(BF16).long(), every))
            yield f"| {name} | {same:.2f} | {all_:.2f} |"

    yield from rows("| spelling | ratio at positions that bf16 holds | at all positions |", lines())


SECTIONS: dict[str, tuple[str, Callable[[], Iterator[str]]]] = {
    "tables": ("Tables of positions in a bf16 model", tables_section),
    "models": ("Tiny models at positions from 30,000", models_section),
    "counts": ("Nodes and casts of models as transformers writes them", counts_section),
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
