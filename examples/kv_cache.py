"""One decoding step with a static key/value cache, written at a position that is a tensor.

The cache is a pair of buffers of fixed length, so that the compiled graph has one shape for every step. Each call
writes one token's key and value at ``position`` and attends to what has been written so far. nxfx turns the write
into a mask (an ``arange`` compared with the position) and keeps the cache the model's own buffer: the prepared module
updates it as the model would, and ``prepared.input_output_aliases`` tells the compiler which output is which buffer::

    nxfx check examples/kv_cache.py:step --range position=0:63
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

LENGTH, HIDDEN, HEADS, BATCH = 64, 32, 4, 2

Example = tuple[nn.Module, tuple[Tensor, Tensor]]


class CachedAttention(nn.Module):
    """Self-attention of one new token over a cache of ``LENGTH`` positions."""

    keys: Tensor
    values: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN, bias=False)
        self.out = nn.Linear(HIDDEN, HIDDEN, bias=False)
        shape = (BATCH, HEADS, LENGTH, HIDDEN // HEADS)
        self.register_buffer("keys", torch.zeros(shape))
        self.register_buffer("values", torch.zeros(shape))

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        """x (batch, 1, hidden); position, an int64 scalar: where the new token stands. Returns (batch, 1, hidden)."""
        query, key, value = self.qkv(x).view(BATCH, 1, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        self.keys[:, :, position : position + 1] = key
        self.values[:, :, position : position + 1] = value
        written = torch.arange(LENGTH, device=x.device) <= position
        mixed = nn.functional.scaled_dot_product_attention(query, self.keys, self.values, attn_mask=written[None])
        return self.out(mixed.transpose(1, 2).reshape(BATCH, 1, HIDDEN))


def step() -> Example:
    """The step at position 3 of a cache that holds random keys and values at the first three."""
    torch.manual_seed(0)
    model = CachedAttention().eval()
    model.keys[:, :, :3] = torch.randn_like(model.keys[:, :, :3])
    model.values[:, :, :3] = torch.randn_like(model.values[:, :, :3])
    return model, (torch.randn(BATCH, 1, HIDDEN), torch.tensor(3))


if __name__ == "__main__":
    import nxfx

    model, (x, position) = step()
    prepared = nxfx.prepare(model, (x, position), ranges={"position": (0, LENGTH - 1)})
    for at in range(3, 8):
        prepared(x, torch.tensor(at))
    print("positions written:", model.keys.abs().sum((0, 1, 3)).nonzero().flatten().tolist())
    print("outputs that update buffers:", list(prepared.input_output_aliases.values()))
