"""The slice normaliser means what Python means, for every kind of bound; regions of view chains compose exactly."""

from __future__ import annotations

import functools
import itertools
import random
from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from view_programs import apply_view, view_of

from nxfx.analysis.views import Views
from nxfx.graph.slices import INT64_MAX, Extent, clamp_bound, select_extent, slice_bounds, slice_extent, wrap_bound

BOUNDS = [None, 0, 1, -1, 2, -2, 4, -4, 5, -5, 99, -99, INT64_MAX, -INT64_MAX, -INT64_MAX - 1]


@pytest.mark.parametrize("size", [0, 1, 2, 4, 5])
def test_positions_are_pythons(size: int) -> None:
    """Traps 12, 13, 16: bounds clamp, open ends, start past the end; trap 11: steps that do not divide."""
    for start, end, step in itertools.product(BOUNDS, BOUNDS, (None, 1, 2, 3, 7)):
        extent = slice_extent(start, end, step, size)
        expected = list(range(size))[start:end:step]
        assert list(extent.positions) == expected, (start, end, step)
        assert extent.count == len(expected)
        assert extent.is_empty == (not expected)
        assert extent.is_whole == (expected == list(range(size)))


def test_a_step_must_be_positive() -> None:
    with pytest.raises(ValueError, match="positive"):
        slice_extent(None, None, 0, 4)
    with pytest.raises(ValueError, match="-1"):
        slice_extent(None, None, -1, 4)


def test_a_select_does_not_clamp() -> None:
    """Trap 14: index -1 is the last; trap 12: -5 on an axis of 4 is an error, not position 3."""
    assert select_extent(-1, 4) == Extent(3, 1, 1, 4)
    assert select_extent(0, 1).is_whole
    for index in (4, -5):
        with pytest.raises(IndexError, match="axis of size 4"):
            select_extent(index, 4)


def test_equal_positions_are_equal_extents() -> None:
    assert slice_extent(3, 4, 1, 5) == slice_extent(-2, -1, 7, 5) == select_extent(3, 5)
    assert slice_extent(3, 1, 1, 5) == slice_extent(99, 0, 2, 5) == Extent(0, 1, 0, 5)
    assert slice_extent(0, 5, 2, 6) == slice_extent(0, 99, 2, 6)


def test_slices_of_slices() -> None:
    rows = list(range(11))
    cuts = [(None, None, 1), (1, None, 2), (2, 9, 3), (-5, -1, 1), (5, 2, 1), (0, 1, 1)]
    for (a, b, c), (d, e, f) in itertools.product(cuts, cuts):
        outer = slice_extent(a, b, c, 11)
        both = outer.within(slice_extent(d, e, f, outer.count))
        assert list(both.positions) == rows[a:b:c][d:e:f]
    with pytest.raises(ValueError, match="does not fit"):
        slice_extent(0, 3, 1, 11).within(slice_extent(0, 1, 1, 4))


def test_symbolic_bounds_add_no_guard() -> None:
    """Trap 15: bounds that depend on a size, also negative ones; unbacked bounds are decided at run time."""
    env = ShapeEnv()
    unbacked = env.create_unbacked_symint()
    bound = clamp_bound(unbacked, 6)
    for value in (-99, -7, -6, -1, 0, 3, 6, 99):
        number = bound.node.expr.subs({unbacked.node.expr: value})
        assert number == len(range(6)[: value if value >= 0 else None]) if value >= 0 else number == max(6 + value, 0)
    torch._check(unbacked >= 2)
    size = unbacked * 3
    assert wrap_bound(-unbacked, size).node.expr == (size - unbacked).node.expr
    assert slice_bounds(1, INT64_MAX, size)[0] == 1
    assert slice_bounds(None, None, size) == (0, size)
    assert not env.guards


def _shown(chain: list[Any], x: torch.Tensor) -> torch.Tensor:
    return functools.reduce(apply_view, chain, x)


def test_a_region_names_the_elements_that_a_view_chain_shows() -> None:
    """Traps 14 and 19: chains of views, views of views; what no region expresses starts a new root."""
    rng = random.Random(0)
    followed = 0
    for _ in range(120):
        shape = [rng.choice([1, 2, 3, 4, 5]) for _ in range(rng.randrange(1, 4))]
        base = torch.arange(torch.Size(shape).numel()).reshape(shape)
        chain: list[Any] = []
        tensor = base
        for _ in range(rng.randrange(1, 6)):
            chain.append(view_of(rng, tensor))
            tensor = apply_view(tensor, chain[-1])

        graph = make_fx(functools.partial(_shown, chain), tracing_mode="fake")(base).graph
        (node,) = graph.find_nodes(op="output")[0].all_input_nodes
        root, region = Views().origin(node)
        if root.op != "placeholder":
            continue
        followed += 1
        if region.is_empty:
            assert tensor.numel() == 0
            continue
        shown = base
        for axis, extent in enumerate(region.axes):
            if extent is not None:
                shown = shown.index_select(axis, torch.tensor(list(extent.positions)))
        walked = [axis for axis in region.dims if axis is not None]
        order = [*walked, *(axis for axis in range(base.dim()) if axis not in walked)]
        assert torch.equal(shown.permute(order).reshape(tensor.shape), tensor), chain
    assert followed > 60
