"""Python control flow that reads a tensor's value.

A trace runs ``forward`` once, so ``if flag[0] == 1`` becomes whichever side the example took, for every later call.
``nxfx.prepare`` follows both sides and puts ``where`` where they meet: one graph, right for both values. What has no such
form, sides of different shapes for one, is refused with its line and the reason::

    nxfx check examples/branch.py:flag
    nxfx check examples/branch.py:shapes
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


class Shapes(nn.Module):
    """The result's shape depends on the flag: no graph of fixed shapes computes that."""

    def forward(self, x: Tensor, flag: Tensor) -> Tensor:
        if flag[0] == 1:
            return x
        return x.sum()


def flag() -> Example:
    """The model that a trace would freeze."""
    return Branch(), (torch.arange(6.0).reshape(2, 3), torch.tensor([1]))


def shapes() -> Example:
    """The model that stays refused."""
    return Shapes(), (torch.arange(6.0).reshape(2, 3), torch.tensor([1]))


if __name__ == "__main__":
    import nxfx

    model, (x, value) = flag()
    prepared = nxfx.prepare(model, (x, value))
    print(prepared(x, torch.tensor([1])), prepared(x, torch.tensor([0])), sep="\n")
    print(nxfx.check(*shapes()))
