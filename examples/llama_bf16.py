"""Llama in bf16, and what bf16 does to position ids.

bf16 holds integers exactly up to 256. Between 4096 and 8192 its values are 32 apart, so 32 positions in a row become
one position or two. Nothing raises: the model runs and attends to the wrong places.

``transformers`` computes the rotary table in fp32 and rounds only the finished cosines: ``tiny`` is safe. Many other
models cast the position ids first, as :class:`NaiveRotary` does here. ``naive`` is the same Llama with that rotary;
``attention`` is one hand-written block and ``rotary`` the embedding alone, small enough to read its whole graph::

    nxfx check examples/llama_bf16.py:naive
    nxfx dump examples/llama_bf16.py:rotary --format text --diff
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

LENGTH, OFFSET, VOCABULARY, HIDDEN, HEADS = 32, 5000, 512, 64, 4

Example = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


def inverse_frequencies(head_dim: int, theta: float = 10_000.0) -> Tensor:
    """One fp32 frequency for each pair of channels (head_dim / 2,)."""
    return 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)


class NaiveRotary(nn.Module):
    """The rotary embedding with the mistake: positions are cast to the activations' dtype, then multiplied."""

    inv_freq: Tensor

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.register_buffer("inv_freq", inverse_frequencies(head_dim), persistent=False)

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = position_ids[..., None].to(x.dtype) * self.inv_freq
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the channel pairs of x (batch, heads, length, head_dim)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]


class Attention(nn.Module):
    """Causal self-attention with :class:`NaiveRotary`: x (batch, length, hidden), position_ids (batch, length)."""

    def __init__(self, hidden: int = HIDDEN, heads: int = HEADS) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.out = nn.Linear(hidden, hidden, bias=False)
        self.rotary = NaiveRotary(hidden // heads)

    def forward(self, x: Tensor, position_ids: Tensor) -> Tensor:
        batch, length, hidden = x.shape
        query, key, value = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        cos, sin = self.rotary(x, position_ids)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, hidden))


def keep_tables_fp32(model: nn.Module) -> nn.Module:
    """bf16 weights, but the frequency tables stay fp32: a table that was rounded cannot be restored."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    return model.eval()


def positions() -> Tensor:
    """Position ids (1, LENGTH) of a text's continuation: they start at OFFSET."""
    return torch.arange(OFFSET, OFFSET + LENGTH)[None]


def tiny() -> Example:
    """A two-layer Llama with random bf16 weights, as ``transformers`` makes it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        initializer_range=0.2,  # trained attention is sharp; with the usual 0.02 every random row is nearly uniform
    )
    model = keep_tables_fp32(LlamaForCausalLM(config))
    ids = torch.randint(VOCABULARY, (1, LENGTH))
    return model, (ids,), {"position_ids": positions(), "use_cache": False}


def naive() -> Example:
    """The same Llama, same weights, with :class:`NaiveRotary`."""
    model, args, kwargs = tiny()
    model.model.rotary_emb = NaiveRotary(HIDDEN // HEADS)
    return model, args, kwargs


def attention() -> Example:
    """One attention block."""
    torch.manual_seed(0)
    return keep_tables_fp32(Attention()), (torch.randn(1, LENGTH, HIDDEN, dtype=torch.bfloat16), positions()), {}


def rotary() -> Example:
    """:class:`NaiveRotary` alone; the dtype of its first argument says which dtype to return."""
    return NaiveRotary(HIDDEN // HEADS), (torch.zeros(1, dtype=torch.bfloat16), positions()), {}


if __name__ == "__main__":
    import nxfx

    model, args, kwargs = naive()
    print(nxfx.prepare(model, args, kwargs).report)
