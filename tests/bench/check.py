"""What `nxfx.check`'s eager run costs: one watched forward, and all of them, against a plain forward. Run with `make bench`.

    python tests/bench/check.py             Llama, GPT-2 and BERT of 2 layers, hidden sizes 64, 512 and 1024
    python tests/bench/check.py llama bert  some of them

Plain, watched and whole runs take turns, so that a busy machine slows all of them alike; the ratios are medians over the rounds. One
thread, (2, 128) token ids. Capture comes on top and is shown beside it.
"""

from __future__ import annotations

import statistics
import sys
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
ROUNDS = 9


def _ms(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return (time.perf_counter() - started) * 1e3


def measure(name: str, hidden: int, rounds: int = ROUNDS) -> dict[str, float]:
    """A plain forward and `check` in milliseconds; one watched forward and the whole eager part as multiples of the plain one."""
    config, model_class, options = CONFIGS[name]
    model = model_class(config(hidden_size=hidden, num_attention_heads=8, vocab_size=4096, **options)).eval()
    ids = torch.randint(4096, (2, 128), generator=torch.Generator().manual_seed(0))
    kwargs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}

    def forward() -> None:
        with torch.no_grad():
            model(**kwargs)

    calls = {
        "plain": forward,
        "watched": lambda: observing._run(model, ((), dict(kwargs))),
        "whole": lambda: observing.observe(model, (), dict(kwargs)),
    }
    for call in calls.values():
        call()
    times = [{kind: _ms(call) for kind, call in calls.items()} for _ in range(rounds)]
    found = {kind: statistics.median(t[kind] / t["plain"] for t in times) for kind in ("watched", "whole")}
    found["plain"] = statistics.median(t["plain"] for t in times)
    found["check"] = _ms(lambda: nxfx.check(model, (), dict(kwargs)))
    return found


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    table = Table("model", "hidden", "forward, ms", "watched run", "all eager runs", "check with capture, ms")
    for name in names or list(CONFIGS):
        for hidden in (64, 512, 1024):
            row = measure(name, hidden)
            ratios = f"{row['watched']:.2f} ×", f"{row['whole']:.2f} ×"
            table.add_row(name, str(hidden), f"{row['plain']:.1f}", *ratios, f"{row['check']:.0f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main(sys.argv[1:])
