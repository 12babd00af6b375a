"""What the scripts of this folder share: one line for each check, and an exit code."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import nxfx
from nxfx.verification.equivalence import compare

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the models of examples/

from kv_cache import CachedAttention  # noqa: E402

# Neuron computes fp32 matmuls in fp32 with --auto-cast=none, in another order than a CPU.
CLOSE = {"kind": "close", "max_abs": 1e-3, "signed_zeros": False}
_failed: list[str] = []


def check(name: str, expected: Any, actual: Any) -> None:
    """Print ``pass`` or ``FAIL`` for one comparison: structure, dtypes and shapes strictly, floats closely, integers exactly."""
    outcome = compare(expected, actual, **CLOSE)
    report(name, bool(outcome), "" if outcome else str(outcome).splitlines()[-1])


def report(name: str, passed: bool, why: str = "") -> None:
    print(f"{'pass' if passed else 'FAIL'}  {name}{f': {why}' if why else ''}", flush=True)
    if not passed:
        _failed.append(name)


def refuses(name: str, call: Callable[[], Any], error: type[Exception]) -> None:
    """Print ``pass`` when ``call`` raises ``error``."""
    try:
        call()
    except error as raised:
        report(name, True, str(raised).splitlines()[0])
    else:
        report(name, False, f"no {error.__name__}")


def target(default: str) -> str:
    """The generation named on the command line."""
    return sys.argv[1] if len(sys.argv) > 1 else default


def decoder() -> CachedAttention:
    """Attention with a KV cache, always the same weights."""
    torch.manual_seed(0)
    return CachedAttention().eval()


def steps(count: int = 10) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Tokens and positions for :func:`decoder`."""
    torch.manual_seed(1)
    for position in range(count):
        yield torch.randn(2, 1, 32), torch.tensor(position)


def run(main: Callable[[], None]) -> None:
    """Run a script: exit code 0 when all passed, 1 when one failed, 2 when what it needs is not installed."""
    try:
        with torch.no_grad():
            main()
    except nxfx.NeuronNotFound as error:
        print(f"needs Neuron: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(1 if _failed else 0)
