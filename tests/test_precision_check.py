"""The check that every test of lift-int-casts rests on: it takes what float32 is off by, and finds a rounding that is planted."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator

import precision_programs
import pytest
import torch
from lifting import FAR, FP16, FP32, HIDDEN, LOW, POSITIONS, Lifted, Rotary, applied, half_ulp, lifted, recorded
from torch import Tensor, fx

from nxfx.graph.builder import NodeBuilder
from nxfx.graph.meta import dtype_of


def rounded_after(found: Lifted, name: str, dtype: torch.dtype) -> Lifted:
    """The lifted graph with a cast to ``dtype`` and back after the value ``name``."""
    found = copy.copy(found)
    found.after = copy.copy(found.after)
    found.after.gm = copy.deepcopy(found.after.gm)
    graph = found.after.gm.graph
    node = next(n for n in graph.nodes if n.name == name)
    build, users = NodeBuilder(graph, "planted"), list(node.users)
    with build.after(node):
        back = build.cast(build.cast(node, dtype), FP32)
    for user in users:
        user.replace_input_with(node, back)
    found.after.gm.recompile()
    return found


def is_found(found: Lifted, *inputs: tuple[Tensor, ...]) -> bool:
    try:
        for given in inputs:
            found.check(given)
    except AssertionError:
        return True
    return False


def lifted_values(found: Lifted) -> Iterator[fx.Node]:
    """Values in float32 that others in float32 are made of, and no activation beside them."""
    members = found.members()
    for node in found.after.gm.graph.nodes:
        if node.op == "call_function" and dtype_of(node) is FP32 and any(u.name in members and dtype_of(u) is FP32 for u in node.users):
            yield node


def test_where_eager_is_exact_by_luck_float32_is_good_enough() -> None:
    """float16 rounds 0.3 * 3220 up to 966, which it is; float32 rounds to 966.00006."""
    args = (torch.tensor([3220, 3221]),)
    found = lifted(lambda p: (p.to(FP16) * 0.3).cos(), args)
    eager, after, truth = (values["cos"].double() for values in found.values(args))
    assert (after - truth).abs()[0] > (eager - truth).abs()[0] + half_ulp(truth, FP16)[0]
    assert (after - truth).abs()[0] < 1e-4


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_a_rounding_planted_anywhere_in_a_rotary_is_found(dtype: torch.dtype) -> None:
    args = (POSITIONS, HIDDEN.to(dtype))
    found = lifted(Rotary("matmul", dtype), args, ranges=FAR)
    values = recorded(found.after, args)
    planted = [n.name for n in lifted_values(found) if not torch.equal(values[n.name], values[n.name].to(dtype).float())]
    assert len(planted) >= 4
    assert all(is_found(rounded_after(found, name, dtype), args) for name in planted)


def test_roundings_planted_in_random_programs_are_found() -> None:
    """Nine in ten: what is added to a large number or clamped may change nothing."""
    planted = caught = 0
    for seed in range(8):
        dtype = random.Random(seed).choice(LOW)
        inputs = [precision_programs.inputs(case, dtype) for case in range(4)]
        found = applied(precision_programs.Program(seed, dtype), inputs[3])
        assert not is_found(found, *inputs)
        runs = [recorded(found.after, given) for given in inputs]
        for node in lifted_values(found):
            if not all(torch.equal(values[node.name], values[node.name].to(dtype).float()) for values in runs):
                planted += 1
                caught += is_found(rounded_after(found, node.name, dtype), *inputs)
    assert planted > 20 and caught >= 0.9 * planted, (caught, planted)
