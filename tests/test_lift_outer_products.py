"""lift-int-casts: matrix products with one term a sum become broadcast products."""

from __future__ import annotations

import pytest
import torch
from harness import graph_of
from lifting import (
    FAR,
    applied,
    aten,
    inv_freq,
    lifted,
    untouched,
)
from torch import Tensor, nn

from nxfx.pipeline import Pipeline
from nxfx.report.rewrites import Kind
from nxfx.verification.equivalence import compare

# --- broadcast products -----------------------------------------------------------------------------------------------


class Products(nn.Module):
    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.register_buffer("table", table)

    def forward(self, position_ids: Tensor) -> tuple[Tensor, ...]:
        positions = position_ids.to(self.table.dtype)
        return (
            (self.table[None, :, None] @ positions[:, None, :]).transpose(1, 2),
            torch.mm(self.table[:, None], positions[:1]),
            torch.bmm(positions[:, :, None], self.table[None, None, :].expand(positions.shape[0], 1, -1)),
            torch.einsum("i,bj->bji", self.table, positions),
        )


@pytest.mark.parametrize("core_aten", [False, True], ids=["training-ir", "core-aten"])
def test_products_with_one_term_a_sum_are_bit_equal_broadcasts(core_aten: bool) -> None:
    args = (torch.randint(0, 131072, (2, 40)),)
    found = applied(Products(inv_freq()), args, ranges=FAR, core_aten=core_aten)
    assert {(r.rule, r.kind) for r in found.result.rewrites} == {("lift.outer-product", Kind.EXACT)}
    assert compare(found.before(*args), found.after(*args), kind="exact").ok
    products = {aten.mm.default, aten.bmm.default, aten.matmul.default, aten.einsum.default}
    assert not products & {n.target for n in found.after.gm.graph.nodes}
    assert {p.source for p in found.after.context.premises} == {"table"}


def test_products_that_can_give_a_signed_zero_only_refine() -> None:
    """Matrix kernels sign ``-1 * 0`` as they please: +0 for small shapes, -0 for large ones."""
    found = lifted(Products(inv_freq()), (torch.arange(-3, 3)[None].expand(2, 6).contiguous(),))
    assert {r.kind for r in found.result.rewrites} == {Kind.REFINES}
    args = (torch.arange(-3, 3)[None].expand(2, 6).contiguous(),)
    assert all(torch.equal(a, b) for a, b in zip(found.before(*args), found.after(*args), strict=True))


def test_products_that_stay() -> None:
    untouched(lambda p, w: p.float() @ w, (torch.arange(12).view(3, 4), torch.randn(4, 5)))
    untouched(lambda h, w: h[:, None] @ w[None], (torch.randn(4), torch.randn(5)))
    mask = torch.ones(4, 6, dtype=torch.bool)
    untouched(lambda m: (1 - m.float())[..., None] @ (1 - m.float())[:, None], (mask,))


def test_outer_products_can_be_kept() -> None:
    captured = graph_of(Products(inv_freq()), (torch.arange(6)[None],))
    assert not Pipeline.parse("lift-int-casts{outer_products=off}").run(captured.gm, captured.context).changed


