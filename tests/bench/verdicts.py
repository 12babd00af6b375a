"""Three-way verdicts on bf16 models: the prepared model, and the original under each emulated auto-cast.

    PYTHONPATH=.:tests python tests/bench/verdicts.py            print the table
    PYTHONPATH=.:tests python tests/bench/verdicts.py --write    write docs/verdicts.md
"""

from __future__ import annotations

import argparse
import logging
import warnings
from pathlib import Path
from typing import Any

warnings.simplefilter("ignore")

import torch
from corpus import BY_NAME

import nxfx

MODELS = ("llama", "mistral", "qwen2", "gemma2", "phi3", "gpt2", "gpt_neox", "bert", "roberta", "t5", "bart", "vit", "swin", "whisper", "mamba")
OFFSET = 3000
PAGE = Path(__file__).parents[2] / "docs" / "verdicts.md"
TEXT = """# Three-way verdicts

Fifteen tiny models of `transformers` in bf16 (weights rounded, tables as `from_pretrained` leaves them). Decoders with rotary positions
start at position {offset}. Error: mean over the first output, relative to the reference's size, against the same computation in fp64 with no
cast rounding. The model's own error is the noise floor; auto-cast is the [emulation](autocast.md), to bf16. Made by
`tests/bench/verdicts.py`.

{table}
"""


def row(name: str) -> str:
    """One line of the table."""
    model, kwargs = BY_NAME[name].build(torch.bfloat16)
    if "position_ids" not in kwargs and "inv_freq" in " ".join(n for n, _ in model.named_buffers()):
        batch, length = kwargs["input_ids"].shape
        kwargs["position_ids"] = torch.arange(OFFSET, OFFSET + length).expand(batch, length).clone()
    options: dict[str, Any] = {"kwargs": kwargs, "localise": False, "bisect": False}
    prepared = nxfx.verify(model, None, (), **options)
    cells = [name, _error(prepared, "model"), _told(prepared)]
    cells += [_told(nxfx.verify(model, None, (), autocast=setting, **options)) for setting in ("matmult", "all")]
    return f"| {' | '.join(cells)} |"


def _error(report: Any, side: str) -> str:
    measured = [getattr(o, side) for o in report.outputs if getattr(o, side) is not None]
    return f"{measured[0].mean_rel:.2g}" if measured else "none"


def _told(report: Any) -> str:
    return f"{'pass' if report.ok else '**fail**'} {_error(report, 'candidate')}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    head = ["| model | own error | prepared | original, `--auto-cast=matmult` | original, `--auto-cast=all` |", "|---|---|---|---|---|"]
    print(*head, sep="\n", flush=True)
    rows = []
    for name in MODELS:
        rows.append(row(name))
        print(rows[-1], flush=True)
    if options.write:
        PAGE.write_text(TEXT.format(offset=OFFSET, table="\n".join(head + rows)), encoding="utf-8")


if __name__ == "__main__":
    main()
