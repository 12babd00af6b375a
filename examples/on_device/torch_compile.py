"""TorchNeuron on Trn2, Trn3: nxfx.compile and torch.compile(backend="nxfx"). Usage: python torch_compile.py [trn2]"""

from __future__ import annotations

import torch
from checks import check, decoder, run, steps, target
from mllama_mask import small

import nxfx
from nxfx.environment import native_backend

TARGET = target("trn2")


def main() -> None:
    native_backend(TARGET)
    eager, compiled = decoder(), nxfx.compile(decoder().to("neuron"), inner="neuron", target=TARGET, ranges={"position": (0, 63)})
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
