"""The mask of a vision encoder that takes one to four image tiles: one graph for every aspect ratio.

How many tiles an image has stands in a tensor, so ``mask[: rows * columns, :tokens] = 0`` is a slice whose end is
data. Traced as it stands, the example's count is frozen into the graph and every other image gets the wrong mask.
nxfx captures the write as a comparison with the tensor::

    nxfx check examples/mllama_mask.py:small --range ar=1:4
    nxfx dump examples/mllama_mask.py:small
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# Every aspect ratio (rows, columns) of at most four tiles.
ASPECT_RATIOS = ((1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1))

Example = tuple[nn.Module, tuple[Any, ...]]


class VisionMask(nn.Module):
    """The additive mask between all tokens of an image's tiles.

    Args:
        chunks: tiles that an image is padded to.
        tokens: real tokens of a tile; the rest of a tile is padding.
        heads: attention heads that the mask is expanded to.
    """

    def __init__(self, chunks: int, tokens: int, heads: int = 1) -> None:
        super().__init__()
        self.chunks, self.tokens, self.heads = chunks, tokens, heads

    def forward(self, x: Tensor, ar: Tensor) -> Tensor:
        """x (batch, chunks, padded tokens, width) gives length and dtype; ar (batch, 2) int: rows and columns of tiles.

        Returns (batch, heads, n, n), n = chunks * padded tokens: finfo.min between two masked tokens, zero elsewhere.
        """
        length = x.shape[2]
        masks = []
        for rows, columns in ar:
            mask = torch.ones(self.chunks, length, 1, dtype=x.dtype, device=x.device)
            mask[: rows * columns, : self.tokens] = 0
            mask = mask.view(self.chunks * length, 1)
            masks.append(mask @ mask.T * torch.finfo(x.dtype).min)
        return torch.stack(masks)[:, None].expand(-1, self.heads, -1, -1)


def zeros_expected(chunks: int, length: int, tokens: int, tiles: int) -> int:
    """How many entries are zero: all pairs but those of two masked tokens."""
    return (chunks * length) ** 2 - (chunks * length - tiles * tokens) ** 2


def small() -> Example:
    """4 tiles of 24 tokens, 17 of them real: a mask of 96 x 96."""
    return VisionMask(4, 17), (torch.zeros(1, 4, 24, 8), torch.tensor([[1, 1]]))


def full() -> Example:
    """The size of the real encoder: 4 tiles of 1608 tokens, 1601 of them real: a mask of 6432 x 6432."""
    return VisionMask(4, 1601), (torch.zeros(1, 4, 1608, 1280), torch.tensor([[1, 1]]))


if __name__ == "__main__":
    import nxfx

    model, args = small()
    prepared = nxfx.prepare(model, args, ranges={"ar": (1, 4)})
    for ratio in ASPECT_RATIOS:
        ar = torch.tensor([ratio])
        mask = prepared(args[0], ar)
        print(f"{ratio}: {int((mask == 0).sum())} zeros, equal to eager: {torch.equal(mask, model(args[0], ar))}")
