"""TorchNeuron on Trn2, Trn3: nxfx.compile and torch.compile(backend="nxfx"). Usage: python torch_compile.py [trn2]"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

import torch  # noqa: E402
from checks import check, run, steps  # noqa: E402
from kv_cache import CachedAttention  # noqa: E402
from mllama_mask import small  # noqa: E402

import nxfx  # noqa: E402
from nxfx.environment import native_backend  # noqa: E402

TARGET = sys.argv[1] if len(sys.argv) > 1 else "trn2"


def make() -> CachedAttention:
    torch.manual_seed(0)
    return CachedAttention().eval()


def main() -> None:
    native_backend(TARGET)
    eager, compiled = make(), nxfx.compile(make().to("neuron"), inner="neuron", target=TARGET, ranges={"position": (0, 63)})
    for token, position in steps():
        check(f"cache at position {int(position)}", eager(token, position), compiled(token.to("neuron"), position.to("neuron")).cpu())

    model, (x, ar) = small()
    mask = nxfx.compile(model, inner="neuron", target=TARGET).to("neuron")
    for ratio in ([1, 1], [2, 2], [4, 1]):
        ar = torch.tensor([ratio])
        check(f"vision mask {ratio}", model.to("cpu")(x, ar), mask.to("neuron")(x.to("neuron"), ar.to("neuron")).cpu())

    layer = torch.nn.Sequential(torch.nn.Embedding(100, 16), torch.nn.Linear(16, 4))
    ids = torch.randint(100, (2, 8))
    expected = layer(ids)
    through_dynamo = torch.compile(layer.to("neuron"), backend="nxfx", fullgraph=True, options={"target": TARGET})
    check("torch.compile(backend='nxfx')", expected, through_dynamo(ids.to("neuron")).cpu())


if __name__ == "__main__":
    run(main)
