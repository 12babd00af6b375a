"""NxD's ModelBuilder, second generation, on Trn1, Inf2, Trn2. Usage: python model_builder_v2.py [trn1]"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

import torch  # noqa: E402
from checks import check, run, steps  # noqa: E402
from kv_cache import CachedAttention  # noqa: E402

from nxfx.environment import neuronx_distributed  # noqa: E402
from nxfx.handoff.modelbuilder import builder_module  # noqa: E402

TARGET = sys.argv[1] if len(sys.argv) > 1 else "trn1"


def make() -> CachedAttention:
    torch.manual_seed(0)
    return CachedAttention().eval()


def main() -> None:
    builder_class = neuronx_distributed().ModelBuilder
    module = builder_module(make(), next(steps(1)), target=TARGET, ranges={"position": (0, 63)})
    builder = builder_class(module)
    for example in module.examples:
        builder.trace(kwargs=example)
    compiled = builder.compile(compiler_args=module.compiler_args)
    compiled.set_weights([make().state_dict()])
    compiled.to_neuron()
    serve, eager = module.bind(compiled), make()
    for token, position in steps():
        check(f"cache at position {int(position)}", eager(token, position), serve(token, position))


if __name__ == "__main__":
    run(main)
