"""Shifted-window attention as in Swin: a mask built by nine slice assignments, then two ``masked_fill``.

Each region of the shifted image gets its number by a slice assignment; tokens of one window may attend to each other
where their numbers agree. A functional graph holds every assignment as a chain of ``slice`` and ``slice_scatter``.
nxfx turns each chain into one comparison mask and one element-wise op::

    nxfx dump examples/swin_mask.py:window --diff
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

HEIGHT, WIDTH, WINDOW, SHIFT, HEADS, CHANNELS = 8, 8, 4, 2, 2, 16

Example = tuple[nn.Module, tuple[Tensor]]


def windows_of(image: Tensor) -> Tensor:
    """(batch, HEIGHT, WIDTH, channels) → (batch * windows, WINDOW * WINDOW, channels)."""
    batch, channels = image.shape[0], image.shape[-1]
    tiles = image.view(batch, HEIGHT // WINDOW, WINDOW, WIDTH // WINDOW, WINDOW, channels)
    return tiles.permute(0, 1, 3, 2, 4, 5).reshape(-1, WINDOW * WINDOW, channels)


class ShiftedWindowAttention(nn.Module):
    """Attention inside the windows of an image that was rolled by SHIFT: x (batch, HEIGHT, WIDTH, CHANNELS)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(CHANNELS, 3 * CHANNELS)

    def mask(self, x: Tensor) -> Tensor:
        """Additive mask (windows, n, n), n = WINDOW * WINDOW: 0 inside a region, -100 between regions."""
        region = torch.zeros(1, HEIGHT, WIDTH, 1, dtype=x.dtype, device=x.device)
        bands = (slice(0, -WINDOW), slice(-WINDOW, -SHIFT), slice(-SHIFT, None))
        for i, rows in enumerate(bands):
            for j, columns in enumerate(bands):
                region[:, rows, columns, :] = 3 * i + j
        numbers = windows_of(region).squeeze(-1)
        difference = numbers[:, None, :] - numbers[:, :, None]
        return difference.masked_fill(difference != 0, -100.0).masked_fill(difference == 0, 0.0)

    def forward(self, x: Tensor) -> Tensor:
        rolled = torch.roll(x, (-SHIFT, -SHIFT), (1, 2))
        query, key, value = self.qkv(windows_of(rolled)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
        windows = HEIGHT * WIDTH // WINDOW**2
        scores = scores.unflatten(0, (-1, windows)) + self.mask(x)[:, None]
        return (scores.flatten(0, 1).softmax(-1) @ value).transpose(1, 2).flatten(-2)


def window() -> Example:
    """One block on an 8 x 8 image in four windows."""
    torch.manual_seed(0)
    return ShiftedWindowAttention().eval(), (torch.randn(2, HEIGHT, WIDTH, CHANNELS),)


if __name__ == "__main__":
    import nxfx

    model, args = window()
    prepared = nxfx.prepare(model, args)
    print(prepared.report)
    with torch.no_grad():
        print("equal to eager:", torch.equal(prepared(*args), model(*args)))
