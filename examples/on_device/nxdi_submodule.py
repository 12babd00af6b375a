"""A prepared rotary embedding in a module that ModelBuilder traces whole, as NxD Inference does. Usage: python nxdi_submodule.py [trn1]"""

from __future__ import annotations

import torch
from checks import check, run, target
from llama_bf16 import rotary

import nxfx
from nxfx.environment import neuronx_distributed
from nxfx.handoff.submodule import prepare_on_load

TARGET = target("trn1")


class Decoder(torch.nn.Module):
    """Stands for a decoder: its rotary embedding casts position ids to bf16."""

    def __init__(self) -> None:
        super().__init__()
        self.rotary_emb, _, _ = rotary()

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        cos, sin = self.rotary_emb(x, position_ids)
        return cos.float() + sin.float()


def main() -> None:
    builder_module = neuronx_distributed("trace.model_builder")

    _, (x, positions), _ = rotary()
    positions = positions.to(torch.int32)
    instance = prepare_on_load(builder_module.BaseModelInstance(Decoder, {}), {"rotary_emb": (x, positions)}, target=TARGET)
    builder = builder_module.ModelBuilder(router=None, tp_degree=1, checkpoint_loader=lambda: Decoder().state_dict())
    compiled = builder.add("decoder", instance, [(x, positions)]).trace()
    check("positions from 5000 on", nxfx.prepare(Decoder(), (x, positions))(x, positions), compiled(x, positions))


if __name__ == "__main__":
    run(main)
