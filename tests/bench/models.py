"""The models that the benches share, by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests import corpus

ROOT = Path(__file__).parents[2]

_EXAMPLES = {"mllama_mask": "small", "swin_mask": "window", "kv_cache": "step"}


def build(case: str) -> tuple[torch.nn.Module, tuple[Any, ...], dict[str, Any]]:
    """The model and the example of a case, always the same."""
    torch.manual_seed(0)
    if case.startswith("examples/"):
        from nxfx.cli import specs

        loaded = specs.load(f"{ROOT / case}:{_EXAMPLES[Path(case).stem]}")
        return loaded.model, loaded.args, loaded.kwargs
    name, _, cached = case.partition(":")
    entry = corpus.BY_NAME[name]
    model, kwargs = entry.build_cached() if cached else entry.build()
    return model, (), kwargs
