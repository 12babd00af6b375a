"""What the pipeline costs: per node, against `torch.export`, and as graphs grow. Run with `make bench`.

    python tests/bench/pipeline.py            Llama with 2, 8 and 32 layers, synthetic graphs of 1k, 4k and 16k nodes
    python tests/bench/pipeline.py --405b     also the shape of Llama-3.1-405B, fake weights, each side in a process of its own

Weights are fake throughout. Export, pipeline and their ratio are measured in one run; the fastest of several runs counts,
because these machines are shared. `--check` makes a missed target the exit code.
"""

from __future__ import annotations

import argparse
import gc
import os
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.simplefilter("ignore")

import torch
from rich.console import Console
from rich.table import Table
from torch._subclasses.fake_tensor import FakeTensorMode

import nxfx
from nxfx.boundary import hoist
from nxfx.capture.export import capture

BIG = {
    "hidden_size": 16384, "intermediate_size": 53248, "num_attention_heads": 128, "num_key_value_heads": 8, "vocab_size": 128256,
    "max_position_embeddings": 131072, "rope_theta": 500000.0,
}  # fmt: skip
LAYERS_405B = 126


def llama(layers: int) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A bf16 Llama of Llama-3.1-405B's width with fake weights, and a fake example."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(num_hidden_layers=layers, use_cache=False, **BIG)
    with FakeTensorMode(allow_non_fake_inputs=True):
        torch.set_default_dtype(torch.bfloat16)
        model = LlamaForCausalLM(config).eval()
        torch.set_default_dtype(torch.float32)
        return model, {"input_ids": torch.zeros(1, 32, dtype=torch.int64), "position_ids": torch.arange(32)[None]}


class Integers(torch.nn.Module):
    """Every node int64, every node narrows: index arithmetic on a bounded input."""

    def __init__(self, nodes: int) -> None:
        super().__init__()
        self.nodes = nodes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i in range(self.nodes // 3):
            x = ((x + i % 7) * 3).remainder(1000)
        return x


class Mixed(torch.nn.Module):
    """Blocks as real models have them: floats mostly, a mask written by slices, positions cast to bf16."""

    def __init__(self, nodes: int) -> None:
        super().__init__()
        self.blocks = nodes // 24

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        for i in range(self.blocks):
            mask = torch.ones(8, 8, dtype=x.dtype)
            mask[: 1 + i % 7, :3] = 0
            angle = positions.to(torch.bfloat16) * 0.5
            x = torch.relu((x * mask + angle.cos() * angle.sin()) * 0.5)
            x = torch.tanh(x + 1.0) - x.sigmoid()
        return x


def fastest(run: Callable[[], Any], times: int) -> float:
    best = float("inf")
    for _ in range(times):
        gc.collect()
        gc.disable()
        started = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - started)
        gc.enable()
    return best


def pipeline_seconds(take: Callable[[], Any], times: int) -> tuple[float, int]:
    """The fastest pipeline run (passes, boundary, clean-up and recompile) on fresh captures, and the nodes of the capture."""
    best, nodes = float("inf"), 0
    for _ in range(times):
        found = take()
        graph_module, nodes = found.graph_module, len(found.graph_module.graph.nodes)
        context = nxfx.PassContext(sources=found.sources)
        pipeline = nxfx.Pipeline.default()
        best = min(
            best,
            fastest(
                lambda: pipeline.run(graph_module, context, finish=lambda: hoist(graph_module, found.sources, context.requirements)), 1
            ),
        )
    return best, nodes


def real(console: Console, repeats: int) -> list[str]:
    """Llama with 2, 8 and 32 layers against torch.export's own time."""
    table = Table("layers", "nodes", "torch.export s", "pipeline s", "share", "µs a node", title="Llama, fake weights")
    missed = []
    for layers in (2, 8, 32):
        model, kwargs = llama(layers)
        with torch.no_grad():
            export = fastest(lambda: torch.export.export(model, (), kwargs, strict=False), repeats)
        seconds, nodes = pipeline_seconds(lambda: capture(model, (), kwargs), repeats)
        share, per_node = seconds / export, seconds / nodes * 1e6
        table.add_row(str(layers), str(nodes), f"{export:.2f}", f"{seconds:.3f}", f"{share:.1%}", f"{per_node:.0f}")
        if layers == 32 and (share > 0.05 or per_node > 60):
            missed.append(f"32 layers: {share:.1%} (target 5 %), {per_node:.0f} µs a node (target 60)")
    console.print(table)
    return missed


def synthetic(console: Console, repeats: int) -> list[str]:
    """Graphs of 1k, 4k and 16k nodes: cost a node, and growth when the graph grows four times."""
    missed = []
    examples: dict[str, tuple[Any, tuple[torch.Tensor, ...], float]] = {
        "every node narrows": (Integers, (torch.arange(8),), 150),
        "mixed": (Mixed, (torch.randn(8, 8), torch.arange(8)), 150),
    }
    for name, (build, args, limit) in examples.items():
        table = Table("nodes", "pipeline s", "µs a node", "t(4N)/t(N)", title=f"Synthetic: {name}")
        previous = None
        for size in (1000, 4000, 16000):
            model = build(size)
            seconds, nodes = pipeline_seconds(lambda model=model: capture(model, args), repeats if size < 16000 else 2)
            growth = seconds / previous if previous else None
            table.add_row(str(nodes), f"{seconds:.3f}", f"{seconds / nodes * 1e6:.0f}", f"{growth:.2f}" if growth else "")
            if growth and growth > 4.6:
                missed.append(f"{name}, {nodes} nodes: t(4N)/t(N) = {growth:.2f} (target 4.6)")
            if seconds / nodes * 1e6 > limit:
                missed.append(f"{name}, {nodes} nodes: {seconds / nodes * 1e6:.0f} µs a node (target {limit:.0f})")
            previous = seconds
        console.print(table)
    return missed


def side(name: str, layers: int) -> None:
    """One side of the 405B comparison, in a process of its own; prints seconds, nodes and peak MB."""
    model, kwargs = llama(layers)
    started = time.perf_counter()
    if name == "plain":
        with torch.no_grad():
            program = torch.export.export(model, (), kwargs, strict=False)
        nodes = len(program.run_decompositions({}).graph.nodes)
    else:
        nodes = len(nxfx.prepare(model, (), kwargs).graph_module.graph.nodes)
    seconds = time.perf_counter() - started
    print(seconds, nodes, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def giant(console: Console, layers: int) -> list[str]:
    """The shape of Llama-3.1-405B: prepared with every pass, against plain export plus decompositions."""
    table = Table("what", "seconds", "nodes", "peak MB", title=f"Llama-3.1-405B's shape, {layers} layers, fake weights")
    measured = {}
    for name in ("plain", "prepare"):
        command = [sys.executable, __file__, "--side", name, "--layers", str(layers)]
        seconds, nodes, peak = map(float, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
        measured[name] = (seconds, peak)
        what = "torch.export + run_decompositions({})" if name == "plain" else "nxfx.prepare"
        table.add_row(what, f"{seconds:.1f}", f"{nodes:.0f}", f"{peak:.0f}")
    console.print(table)
    ratio = measured["prepare"][0] / measured["plain"][0]
    console.print(f"prepare / (export + decompositions) = {ratio:.2f}")
    missed = [] if ratio <= 1 else [f"405B: prepare takes {ratio:.2f} times plain export and decompositions"]
    return missed + ([] if measured["prepare"][1] < 2048 else [f"405B: peak {measured['prepare'][1]:.0f} MB (target 2048)"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--405b", dest="giant", action="store_true", help="also the shape of Llama-3.1-405B (two minutes)")
    parser.add_argument("--check", action="store_true", help="exit 1 when a target is missed")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--layers", type=int, default=LAYERS_405B, help=argparse.SUPPRESS)
    parser.add_argument("--side", choices=("plain", "prepare"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        side(options.side, options.layers)
        return 0
    console = Console(width=100)
    console.print(f"torch {torch.__version__}, nxfx {nxfx.__version__}, {os.cpu_count()} cores, fastest of {options.repeats}")
    missed = real(console, options.repeats) + synthetic(console, options.repeats)
    if options.giant:
        missed += giant(console, options.layers)
    for line in missed:
        console.print(f"MISSED {line}")
    if not missed:
        console.print("every target met")
    return 1 if missed and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
