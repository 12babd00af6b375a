"""Random programs of views and writes, and of slices with tensor bounds: no difference from eager (``make fuzz`` runs more)."""

from __future__ import annotations

import random
from collections import Counter

import fuzz
import pytest
import torch
import view_programs
from view_programs import NAN, Program, functional_graph

from nxfx.graph import meta
from nxfx.passes.mask_slice_writes import MaskSliceWrites
from nxfx.pipeline import Pipeline


@pytest.mark.parametrize("block", range(10))
def test_views_and_writes(block: int) -> None:
    """500 programs: up to five views deep, ranks 1 to 5, every dtype and writer."""
    figures: Counter[str] = Counter()
    for seed in range(50 * block, 50 * block + 50):
        wrong = fuzz.check_writes(seed, figures)
        assert wrong is None, f"seed {seed}: {wrong}\n{fuzz.described('writes', seed)}"
    assert figures["rewrites"] > 60 and figures["refused"] < 15 and figures["wrong before"] < 2


@pytest.mark.parametrize("block", range(2))
def test_slices_with_tensor_bounds(block: int) -> None:
    """One capture of each program, a dozen run-time values."""
    figures: Counter[str] = Counter()
    for seed in range(8 * block, 8 * block + 8):
        wrong = fuzz.check_bounds(seed, figures)
        assert wrong is None, f"seed {seed}: {wrong}\n{fuzz.described('bounds', seed)}"
    assert figures["rewrites"] > 10 and not figures["kept"] and figures["not captured"] < 3


def test_strides_are_what_the_ops_give() -> None:
    """Views further down rest on them."""
    for seed in range(60):
        program = view_programs.generate(random.Random(seed))
        args = view_programs.inputs(random.Random(seed), program)
        try:
            gm, context = functional_graph(program, args)
        except (RuntimeError, IndexError, ValueError):
            continue
        Pipeline([MaskSliceWrites()]).run(gm, context, verify_each=True)
        for node in gm.graph.nodes:
            if node.op == "call_function" and "nxfx" in node.meta and meta.is_tensor(node) and meta.val(node).numel() > 1:
                again = meta.evaluate(meta.fake_mode_of(gm.graph), node.target, node.args, dict(node.kwargs))
                wide = [d for d, size in enumerate(again.shape) if size > 1]
                assert [again.stride(d) for d in wide] == [meta.val(node).stride(d) for d in wide], node.format_node()


def test_a_program_that_fails_is_told_in_few_steps() -> None:
    """The shrinker keeps what the failure needs, the views under it included."""
    steps = [
        ("view", 0, ("slice", (0, 1, None, 1))), ("write", 1, ("fill_", 2)), ("view", 1, ("transpose", (0, 1))),
        ("read", 1, None), ("write", 2, ("item", NAN)), ("write", 0, ("zero_", 0)),
    ]  # fmt: skip

    def has_nan(program: Program) -> bool:
        return ("item", NAN) in [operation for _, _, operation in program.steps]

    shrunk = view_programs.shrunk(Program([4, 4], torch.float32, "input", steps), has_nan)
    assert [kind for kind, _, _ in shrunk.steps] == ["view", "view", "write"]


def _views(*views: tuple[str, tuple[object, ...]]) -> list[tuple[str, int, tuple[object, ...]]]:
    return [("view", i, (name, *arguments)) for i, (name, arguments) in enumerate(((n, (a,)) for n, a in views))]


# Found by `make fuzz`: what runs has other strides than the fakes say, and a view minds.
KEPT = {
    "zero-of-an-empty-view": (415190, Program(
        [5, 1, 3, 1, 5], torch.float16, "zeros",
        [
            *_views(("permute", ([4, 3, 2, 1, 0],)), ("movedim", (-5, -1))), ("write", 2, ("scatter", 2, 0, float("inf"))),
            ("view", 0, ("view", ([-1],))), ("write", 3, ("index_put", 0, [-28, -38, -1], None)),
        ],
    )),
    "slice-scatter-of-a-permuted-view": (436323, Program(
        [3, 4, 2], torch.bfloat16, "flags",
        [
            *_views(("slice", (-2, -99, -1, 2)), ("permute", ([1, 2, 0],)), ("squeeze", ())),
            ("write", 3, ("functional", "slice_scatter", (1, 1, 2, 1))),
        ],
    )),
    "unfold-of-dims-of-size-1": (436918, Program(
        [1, 5, 3], torch.bool, "input",
        [
            *_views(
                ("slice", (1, 1, 99, 3)), ("slice", (2, 0, 1, 3)), ("permute", ([2, 0, 1],)), ("transpose", (0, -2)),
                ("unsqueeze", (1,)), ("unfold", (1, 1, 1)),
            ),
            ("write", 6, ("position", 3, False)),
        ],
    )),
}  # fmt: skip


@pytest.mark.parametrize("name", KEPT)
def test_kept_programs(name: str) -> None:
    seed, program = KEPT[name]
    figures: Counter[str] = Counter()
    assert fuzz.check_writes(seed, figures, program) is None
    assert figures["rewrites"] and not figures["refused"] and not figures["wrong before"]
