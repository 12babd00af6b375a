"""The sinusoidal timestep embedding of a diffusion model in bf16.

A sampler counts down from 999. Cast to bf16, the timesteps above 256 fall together in twos and fours, and their
rounding error is multiplied by frequencies up to 1 and enters a sine: neighbouring steps get one embedding. nxfx
moves the cast behind the cosines::

    nxfx check examples/timestep_embedding.py:bf16
    nxfx dump examples/timestep_embedding.py:bf16 --diff
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

CHANNELS, MAX_PERIOD = 64, 10_000

Example = tuple[nn.Module, tuple[Tensor]]


class TimestepEmbedding(nn.Module):
    """timesteps (batch,) int64 → (batch, CHANNELS) in the dtype of the weights."""

    frequencies: Tensor

    def __init__(self) -> None:
        super().__init__()
        half = CHANNELS // 2
        table = torch.exp(-math.log(MAX_PERIOD) * torch.arange(half, dtype=torch.float32) / half)
        self.register_buffer("frequencies", table, persistent=False)
        self.first = nn.Linear(CHANNELS, CHANNELS)
        self.second = nn.Linear(CHANNELS, CHANNELS)

    def sinusoids(self, timesteps: Tensor) -> Tensor:
        """Cosines, then sines, of timestep times frequency: (batch, CHANNELS)."""
        angles = timesteps.to(self.first.weight.dtype)[:, None] * self.frequencies
        return torch.cat((angles.cos(), angles.sin()), dim=-1).to(self.first.weight.dtype)

    def forward(self, timesteps: Tensor) -> Tensor:
        return self.second(nn.functional.silu(self.first(self.sinusoids(timesteps))))


def bf16() -> Example:
    """bf16 weights, an fp32 frequency table, timesteps spread over 0 ... 999."""
    torch.manual_seed(0)
    model = TimestepEmbedding().eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    return model, (torch.tensor([0, 1, 257, 500, 501, 777, 998, 999]),)


if __name__ == "__main__":
    import nxfx

    model, args = bf16()
    prepared = nxfx.prepare(model, args)
    print(prepared.report)
