"""What a write costs as a mask: the graph as captured against the cleaned one, under the same compiler.

    python tests/bench/writes.py                    Inductor: run time, peak memory, of one write each
    python tests/bench/writes.py --what models      the same of whole models, with masks and caches (15 minutes)
    python tests/bench/writes.py --on xla           XLA on the CPU (PJRT_DEVICE=CPU, torch 2.9 with torch_xla): run time

The two graphs take turns, the fastest of many runs counts, the ratio is what matters. `--check` makes a geometric mean
above 1.0, or a peak more than 10 % larger, the exit code.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("PJRT_DEVICE", "CPU")
warnings.simplefilter("ignore")

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import nxfx
from nxfx.pipeline import Pipeline
from tests import corpus
from tests.bench import models

Case = tuple[nn.Module, tuple[Tensor, ...]]

# Models that write into masks, caches or states, and some that write nothing; names as in tests/bench/lowering.py.
MODELS = (
    "llama_static:cached", "gemma2_static:cached", "t5_static:cached", "whisper_static:cached", "gpt2:cached", "mllama", "swin",
    "qwen3_5_text", "mamba", "mixtral", "bert", "deberta_v2",
)  # fmt: skip


class Program(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Any], **buffers: Tensor) -> None:
        super().__init__()
        self.function = function
        for name, value in buffers.items():
            self.register_buffer(name, value)

    def forward(self, *args: Tensor) -> Any:
        return self.function(self, *args)


def causal_padding() -> Case:
    """A 4-d attention mask with padded prompts, added to scores."""

    def run(self: Program, scores: Tensor) -> Tensor:
        size = scores.shape[-1]
        mask = torch.ones(4, 1, size, size)
        mask[0, :, :, :17] = 0
        mask[1, :, :, :5] = 0
        mask[:, :, 0, :] = 1
        return scores * mask + (1 - mask) * -10000.0

    return Program(run), (torch.randn(4, 8, 256, 256),)


def vision_aspect() -> Case:
    """The aspect-ratio mask of a tiled image encoder (mllama), sizes read from a table."""

    def run(self: Program, x: Tensor) -> Tensor:
        mask = torch.ones(2, 4, 260, dtype=x.dtype)
        mask[0, :3, :256] = 0
        mask[1, :2, :256] = 0
        flat = mask.view(2, 4 * 260, 1)
        return x + (flat @ flat.transpose(-1, -2)).unsqueeze(1) * torch.finfo(x.dtype).min

    return Program(run), (torch.randn(2, 2, 1040, 1040),)


def shifted_windows() -> Case:
    """Swin's attention mask: nine regions of one image, numbered."""

    def run(self: Program, scores: Tensor) -> Tensor:
        image, count = torch.zeros(1, 56, 56, 1), 0
        for rows in (slice(0, -7), slice(-7, -3), slice(-3, None)):
            for columns in (slice(0, -7), slice(-7, -3), slice(-3, None)):
                image[:, rows, columns, :] = count
                count += 1
        windows = image.view(1, 8, 7, 8, 7, 1).permute(0, 1, 3, 2, 4, 5).reshape(-1, 49)
        mask = windows.unsqueeze(1) - windows.unsqueeze(2)
        mask = mask.masked_fill(mask != 0, -100.0).masked_fill(mask == 0, 0.0)
        return scores + mask[None, :, None]

    return Program(run), (torch.randn(2, 64, 6, 49, 49),)


def cache_position() -> Case:
    """One new token in a static KV cache, the position an input."""

    def run(self: Any, query: Tensor, new: Tensor, position: Tensor) -> Tensor:
        self.keys.index_copy_(2, position, new)
        return torch.softmax(query @ self.keys.transpose(-1, -2), -1)

    cache = torch.randn(2, 8, 1024, 64)
    return Program(run, keys=cache), (torch.randn(2, 8, 1, 64), torch.randn(2, 8, 1, 64), torch.tensor([700]))


def cache_run() -> Case:
    """A prompt of 64 tokens written from a position on."""

    def run(self: Any, query: Tensor, new: Tensor, position: Tensor) -> Tensor:
        self.keys[:, :, position + torch.arange(64)] = new
        return torch.softmax(query @ self.keys.transpose(-1, -2), -1)

    cache = torch.randn(2, 8, 1024, 64)
    return Program(run, keys=cache), (torch.randn(2, 8, 64, 64), torch.randn(2, 8, 64, 64), torch.tensor(100))


def cache_slots() -> Case:
    """64 tokens written to slots that are data."""

    def run(self: Any, query: Tensor, new: Tensor, slots: Tensor) -> Tensor:
        self.keys.index_copy_(2, slots, new)
        return torch.softmax(query @ self.keys.transpose(-1, -2), -1)

    cache = torch.randn(2, 8, 1024, 64)
    return Program(run, keys=cache), (torch.randn(2, 8, 64, 64), torch.randn(2, 8, 64, 64), torch.randperm(1024)[:64])


def cache_rows() -> Case:
    """One new token at another position in each row of a batch."""

    def run(self: Any, query: Tensor, new: Tensor, positions: Tensor) -> Tensor:
        self.keys[torch.arange(4), :, positions] = new
        return torch.softmax(query @ self.keys.transpose(-1, -2), -1)

    cache = torch.randn(4, 8, 512, 64)
    return Program(run, keys=cache), (torch.randn(4, 8, 1, 64), torch.randn(4, 8, 64), torch.tensor([3, 100, 7, 200]))


def delta_rule() -> Case:
    """The triangular solve of a gated delta rule by rows (linear-attention decoders): 63 dependent row writes."""

    def run(self: Program, x: Tensor) -> Tensor:
        attention = x.tril(-1) * 0.01
        for i in range(1, 64):
            row = attention[..., i, :i].clone()
            part = attention[..., :i, :i].clone()
            attention[..., i, :i] = row + (row.unsqueeze(-1) * part).sum(-2)
        return attention + torch.eye(64)

    return Program(run), (torch.randn(1, 4, 4, 64, 64),)


def recurrence() -> Case:
    """A recurrent layer that writes its state at each step."""

    def run(self: Program, x: Tensor) -> Tensor:
        out, state = torch.zeros_like(x), torch.zeros_like(x[:, 0])
        for t in range(x.shape[1]):
            state = torch.tanh(state * 0.9 + x[:, t])
            out[:, t] = state
        return out * 2

    return Program(run), (torch.randn(8, 64, 256),)


def masked_features() -> Case:
    """Masked time steps of a speech encoder: x[mask] = embedding."""

    def run(self: Any, x: Tensor, mask: Tensor) -> Tensor:
        x = x.clone()
        x[mask] = self.embedding
        return torch.relu(x)

    return Program(run, embedding=torch.randn(256)), (torch.randn(4, 512, 256), torch.rand(4, 512) < 0.2)


def image_tokens() -> Case:
    """Image features placed in a prompt at positions that are known when the model is written."""

    def run(self: Any, text: Tensor, image: Tensor) -> Tensor:
        text = text.clone()
        text[:, 4:132] = image
        text[:, ::2, :8] *= 0.5
        return torch.nn.functional.gelu(text)

    return Program(run), (torch.randn(2, 512, 512), torch.randn(2, 128, 512))


def rotary_halves() -> Case:
    """Interleaved halves written by step."""

    def run(self: Program, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        out = torch.empty_like(x)
        even, odd = x[..., ::2], x[..., 1::2]
        out[..., ::2] = even * cos - odd * sin
        out[..., 1::2] = even * sin + odd * cos
        return out

    return Program(run), (torch.randn(2, 8, 512, 64), torch.randn(512, 32), torch.randn(512, 32))


CASES = (
    causal_padding, vision_aspect, shifted_windows, cache_position, cache_run, cache_slots, cache_rows, delta_rule, recurrence,
    masked_features, image_tokens, rotary_halves,
)  # fmt: skip


def graphs(case: Callable[[], Case] | str) -> tuple[nxfx.PreparedModule, nxfx.PreparedModule]:
    """The captured and the cleaned graph of a program, or of a model by its name."""
    torch.manual_seed(0)
    model, args, kwargs = models.build(case) if isinstance(case, str) else (*case(), {})
    captured, cleaned = (
        nxfx.prepare(model, *corpus.clone((args, kwargs)), pipeline=pipeline, share_state=False) for pipeline in (Pipeline([]), None)
    )
    return captured, cleaned


def on_inductor(prepared: nxfx.PreparedModule) -> Callable[[], Any]:
    torch._dynamo.reset()
    compiled, args = torch.compile(prepared.graph_module, fullgraph=True), prepared.example_inputs
    return lambda: compiled(*args)


def on_xla(prepared: nxfx.PreparedModule) -> Callable[[], Any]:
    import torch_xla
    from torch_xla.core.xla_model import wait_device_ops

    torch._dynamo.reset()
    moved = prepared.to(torch_xla.device())
    # The compiled program is kept: what a run costs then is not the tracing of lazy tensors, op by op.
    compiled, args = torch.compile(moved.graph_module, backend="openxla", fullgraph=True), moved.example_inputs

    def run() -> Any:
        out = compiled(*args)
        wait_device_ops()
        return out

    return run


def paired(runs: list[Callable[[], Any]], seconds: float) -> list[float]:
    """The fastest run of each, in turns."""
    best = [math.inf] * len(runs)
    for run in runs:
        run(), run()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for position, run in enumerate(runs):
            start = time.perf_counter()
            run()
            best[position] = min(best[position], time.perf_counter() - start)
    return best


def peak(run: Callable[[], Any]) -> int:
    """Bytes allocated at most at one time during a run."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        out = run()
    del out
    now = most = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=("programs", "models"), default="programs")
    parser.add_argument("--on", choices=("inductor", "xla"), default="inductor")
    parser.add_argument("--seconds", type=float, default=2.0, help="measuring time for each program")
    parser.add_argument("--only", help="part of a program's name")
    parser.add_argument("--check", action="store_true", help="exit with 1 when a target is missed")
    options = parser.parse_args()
    torch.set_num_threads(1)
    compiler = {"inductor": on_inductor, "xla": on_xla}[options.on]
    table = Table("program", "captured, us", "cleaned, us", "ratio", "peak, ratio", title=f"writes as masks, on {options.on}")
    ratios, peaks = [], []
    offered: dict[str, Callable[[], Case] | str] = {case.__name__: case for case in CASES}
    if options.what == "models":
        offered = {name: name for name in MODELS}
    cases = {name: case for name, case in offered.items() if not options.only or options.only in name}
    for name, case in track(cases.items(), "measuring", console=Console(stderr=True)):
        prepared = graphs(case)
        with torch.no_grad():
            runs = [compiler(p) for p in prepared]
            before, after = paired(runs, options.seconds)
            held = [peak(run) for run in runs] if options.on == "inductor" else []
        ratios.append(after / before)
        if held:
            peaks.append(held[1] / max(held[0], 1))
        memory = f"{peaks[-1]:.2f}" if held else "-"
        table.add_row(name, f"{before * 1e6:.0f}", f"{after * 1e6:.0f}", f"{ratios[-1]:.2f}", memory)
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    table.add_section()
    table.add_row("geometric mean", "", "", f"{mean:.2f}", f"{max(peaks):.2f} at most" if peaks else "")
    Console().print(table)
    missed = mean > 1.0 or any(p > 1.1 for p in peaks)
    return int(options.check and missed)


if __name__ == "__main__":
    sys.exit(main())
