"""Python control flow that reads a tensor's value.

A trace runs ``forward`` once, so ``if flag[0] == 1`` becomes whichever side the example took, for every later call.
nxfx does not freeze it: ``nxfx check`` reports the line as NX401, and ``nxfx.prepare`` raises
:class:`nxfx.CaptureError` that names it. ``selected`` is the same model written as the report advises: both sides are
computed and ``where`` chooses::

    nxfx check examples/branch.py:frozen
    nxfx check examples/branch.py:selected
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

Example = tuple[nn.Module, tuple[Tensor, Tensor]]


class Branch(nn.Module):
    """Doubles x when the flag is set, else negates it. flag (1,) int64, x of any shape."""

    def forward(self, x: Tensor, flag: Tensor) -> Tensor:
        if flag[0] == 1:
            return x * 2
        return -x


class Select(nn.Module):
    """:class:`Branch` without the branch."""

    def forward(self, x: Tensor, flag: Tensor) -> Tensor:
        return torch.where(flag[0] == 1, x * 2, -x)


def frozen() -> Example:
    """The model that a trace would freeze."""
    return Branch(), (torch.arange(6.0).reshape(2, 3), torch.tensor([1]))


def selected() -> Example:
    """The model that serves both values."""
    return Select(), (torch.arange(6.0).reshape(2, 3), torch.tensor([1]))


if __name__ == "__main__":
    import nxfx

    model, args = frozen()
    print(nxfx.check(model, args))
    model, (x, _) = selected()
    prepared = nxfx.prepare(model, (x, torch.tensor([1])))
    print(prepared(x, torch.tensor([0])))
