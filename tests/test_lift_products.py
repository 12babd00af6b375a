"""Matrix products of integer-derived values: sums of a few terms as broadcast products, and the flag for those that stay."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from harness import Captured, graph_of, run_passes
from torch import Tensor, nn

import nxfx
from nxfx.pipeline import Pipeline
from nxfx.report.rewrites import Kind
from nxfx.verification.autocast import emulate
from nxfx.verification.equivalence import error_against

SHAPES = [((5, 2), (2, 7)), ((3, 5, 3), (3, 7)), ((2, 3, 5, 4), (2, 1, 4, 7))]


class Projected(nn.Module):
    """Pixel coordinates times a matrix, into a sine: SAM's position encoding, Fourier features."""

    def __init__(self, coordinates: int, dtype: torch.dtype = torch.float32, width: int = 16) -> None:
        super().__init__()
        self.register_buffer("matrix", torch.randn(coordinates, width, generator=torch.Generator().manual_seed(0)).to(dtype) * 0.01)

    def forward(self, grid: Tensor) -> Tensor:
        return (grid.to(self.matrix.dtype) @ self.matrix).sin()


@pytest.mark.parametrize("core_aten", [False, True], ids=["training-ir", "core-aten"])
@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_a_product_with_few_terms_is_a_sum_of_broadcast_products(shapes: tuple[tuple[int, ...], tuple[int, ...]], core_aten: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("matrix", torch.randn(shapes[1], generator=torch.Generator().manual_seed(1)))

        def forward(self, grid: Tensor) -> Tensor:
            return grid.float() @ self.matrix

    grid = torch.randint(-4000, 4000, shapes[0])
    before, after = (graph_of(Model(), (grid,), core_aten=core_aten) for _ in range(2))
    result = run_passes(after, "lift-int-casts")
    assert [(r.rule, r.kind) for r in result.rewrites] == [("lift.small-product", Kind.REASSOCIATED)] and result.rewrites[0].bound
    (was,), (is_,) = before(grid), after(grid)
    assert was.shape == is_.shape and was.stride() == is_.stride()
    truth = grid.double() @ Model().matrix.double()
    terms = shapes[0][-1]
    bound = terms * torch.finfo(torch.float32).eps * (grid.double().abs() @ Model().matrix.double().abs())
    assert ((is_ - truth).abs() <= bound).all()
    assert not after.context.float32_products and not run_passes(after, "lift-int-casts").changed


def test_under_matmult_the_sum_keeps_its_precision_and_the_product_does_not() -> None:
    model, grid = Projected(2), torch.randint(3000, 4000, (64, 2))
    prepared = nxfx.prepare(model, (grid,))
    truth = (grid.double() @ model.matrix.double()).sin()
    before, after = (error_against(truth, emulate(m, "matmult")(grid)).mean for m in (model, prepared))
    assert before > 0.01 and after < 1e-5
    assert "--auto-cast=none" not in prepared.compiler_args


def test_a_low_precision_product_is_lifted_once_it_is_spread() -> None:
    model, grid = Projected(2, torch.bfloat16), torch.randint(3000, 4000, (64, 2))
    prepared = nxfx.prepare(model, (grid,))
    truth = (grid.double() @ model.matrix.double()).sin()
    assert error_against(truth, prepared(grid)).mean < error_against(truth, model(grid)).mean / 20
    assert prepared(grid).dtype is torch.bfloat16


STAY: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "many-terms": (lambda: Projected(8), "lift-int-casts"),
    "switched-off": (lambda: Projected(2), "lift-int-casts{terms=1}"),
    "large": (lambda: Projected(4, width=1 << 17), "lift-int-casts"),
}


@pytest.mark.parametrize("case", STAY)
def test_products_beyond_the_bound_stay_and_ask_for_the_flag(case: str) -> None:
    make, pipeline = STAY[case]
    model = make()
    grid = torch.randint(0, 4000, (64, model.matrix.shape[0]))
    prepared = nxfx.prepare(model, (grid,), pipeline=pipeline, ranges={"grid": (0, 4000)})
    assert not prepared.report.rewrites
    why = prepared.report.compiler_args["--auto-cast=none"]
    assert "integers up to 4000 would be off by up to 8" in why and "`matmul`" in why and f"{__file__}:" in why


LAYERS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "linear": (lambda p: nn.functional.linear(p.float(), torch.ones(3, 6)), True),
    "linear-of-small": (lambda p: nn.functional.linear((p > 3).float(), torch.ones(3, 6)), False),
    "activation": (lambda p: torch.ones(3, 6) @ torch.ones(6, 3), False),
    "outer": (lambda p: p.float()[:, None] @ torch.linspace(0.1, 1, 4)[None], False),
}


@pytest.mark.parametrize("case", LAYERS)
@pytest.mark.parametrize("sdk", ["2.26", "2.33"])
def test_the_flag_is_there_where_the_graph_needs_it(case: str, sdk: str) -> None:
    function, needed = LAYERS[case]

    class Model(nn.Module):
        def forward(self, positions: Tensor) -> Tensor:
            return function(positions)

    prepared = nxfx.prepare(Model(), (torch.arange(6),), target="trn1", sdk=sdk)
    others = sdk == "2.26" and case != "outer"  # its default rounds any float32 product
    assert ("--auto-cast=none" in prepared.compiler_args) == (needed or others)


def test_options_reach_the_pass() -> None:
    captured: Captured = graph_of(Projected(3), (torch.arange(12).view(4, 3),))
    assert not Pipeline.parse("lift-int-casts{terms=2}").run(captured.gm, captured.context).changed
    assert Pipeline.parse("lift-int-casts{terms=3}").run(captured.gm, captured.context).changed
