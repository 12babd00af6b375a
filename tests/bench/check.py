"""What `nxfx.check`'s eager run costs: one watched forward, and all of them, against a plain forward. Run with `make bench`.

    python tests/bench/check.py             Llama, GPT-2 and BERT of 2 layers, hidden sizes 64 and 512

The fastest of several rounds, in milliseconds, one thread. Capture comes on top and is shown beside it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

import nxfx
from nxfx.observe import run as observing

CONFIGS = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {"intermediate_size": 1408, "num_hidden_layers": 2}),
    "gpt2": (transformers.GPT2Config, transformers.GPT2LMHeadModel, {"num_hidden_layers": 2}),
    "bert": (transformers.BertConfig, transformers.BertModel, {"num_hidden_layers": 2}),
}


def fastest_ms(call: Callable[[], Any], rounds: int = 7) -> float:
    call()
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return min(times) * 1e3


def measure(name: str, hidden: int) -> dict[str, float]:
    """Milliseconds of a plain forward, of one watched forward, of the whole eager part, and of `check`."""
    config, model_class, options = CONFIGS[name]
    model = model_class(config(hidden_size=hidden, num_attention_heads=8, vocab_size=4096, **options)).eval()
    ids = torch.randint(4096, (2, 128), generator=torch.Generator().manual_seed(0))
    kwargs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}

    def forward() -> None:
        with torch.no_grad():
            model(**kwargs)

    plain = fastest_ms(forward)
    watched = fastest_ms(lambda: observing._run(model, ((), dict(kwargs))))
    whole = fastest_ms(lambda: observing.observe(model, (), dict(kwargs)), 3)
    return {"plain": plain, "watched": watched, "whole": whole, "check": fastest_ms(lambda: nxfx.check(model, (), dict(kwargs)), 1)}


def main() -> None:
    torch.set_num_threads(1)
    table = Table("model", "hidden", "forward", "watched", "ratio", "all eager runs", "ratio", "check")
    for name in CONFIGS:
        for hidden in (64, 512):
            row = measure(name, hidden)
            plain = row["plain"]
            ratios = f"{row['watched'] / plain:.2f}", f"{row['whole'] / plain:.2f}"
            table.add_row(
                name, str(hidden), f"{plain:.1f}", f"{row['watched']:.1f}", ratios[0], f"{row['whole']:.1f}", ratios[1], f"{row['check']:.0f}"
            )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
