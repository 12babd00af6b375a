"""torch's own int64 samples of every op: the narrowed program gives eager's bits, and what stays in 64 bits is reported.

    python tests/test_narrow_op_db.py 8        up to eight samples of each op (the tests take one), and the figures
"""

from __future__ import annotations

import copy
import sys
from collections import Counter
from itertools import islice
from typing import Any

import pytest
import torch
from harness import graph_of
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, PendingUnbackedSymbolNotFound
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils import _pytree as pytree
from view_programs import functional_graph

from nxfx.analysis.wide_edges import wide_edges
from nxfx.boundary import hoist
from nxfx.passes.exact_integer_sums import ExactIntegerSums
from nxfx.passes.narrow_64bit import Narrow64bit
from nxfx.pipeline import PassContext, Pipeline
from nxfx.verification.equivalence import compare

DataDependent = (torch._subclasses.fake_tensor.DataDependentOutputException, GuardOnDataDependentSymNode, PendingUnbackedSymbolNotFound)

OPS = [op for op in op_db if torch.int64 in op.dtypes and "jiterator" not in op.name]  # jiterator needs a GPU
# A value decides the result's type, its shape or how often the op loops: torch captures no graph of it.
VALUES_DECIDE = {"equal", "cov", "corrcoef", "nn.functional.one_hot", "combinations", "tensor_split"}
# What they return is whatever was in memory.
UNINITIALISED = {"empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided"}
EXPLAINS = ("NX301", "NX302", "NX304", "NX306")
SEED = 42  # that of the op_db's own wrappers around random ops


def program(op: Any, sample: Any) -> tuple[Any, tuple[Tensor, ...]]:
    """``op`` on ``sample`` as a function of the sample's tensors."""
    leaves, spec = pytree.tree_flatten((sample.input, sample.args, sample.kwargs))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def call(*tensors: Tensor) -> tuple[Any, ...]:
        given = list(leaves)
        for place, tensor in zip(places, tensors, strict=True):
            given[place] = tensor
        first, args, kwargs = pytree.tree_unflatten(given, spec)
        result = op.op(first, *args, **kwargs)
        return tuple(r.zero_() if op.name in UNINITIALISED else r for r in pytree.tree_leaves(result))

    return call, tuple(leaves[place].detach() for place in places)


def graph(call: Any, tensors: tuple[Tensor, ...]) -> tuple[fx.GraphModule, PassContext]:
    """The functional graph; by way of export where a composite op mutates what it made, or reads a value."""
    try:
        gm, context = functional_graph(call, tensors)
    except RuntimeError:
        captured = graph_of(call, tensors)
        return captured.gm, captured.context
    mutates = any(isinstance(n.target, torch._ops.OpOverload) and n.target._schema.is_mutable for n in gm.graph.nodes)
    if mutates:
        captured = graph_of(call, tensors)
        gm, context = captured.gm, captured.context
    return gm, context


def check(op: Any, sample: Any) -> Counter[str]:
    """Narrow one sample and compare it with eager.

    Returns:
        64-bit edges ``before`` and ``after``; ``not captured`` where torch makes no graph.
    """
    call, tensors = program(op, sample)
    try:
        gm, context = graph(call, copy.deepcopy(tensors))
    except DataDependent:
        assert op.name in VALUES_DECIDE, sample.summary()
        return Counter({"not captured": 1})
    torch.manual_seed(SEED)
    expected = call(*copy.deepcopy(tensors))
    before = wide_edges(gm)["edges"]
    result = Pipeline([Narrow64bit(), ExactIntegerSums()]).run(gm, context, verify_each=True)
    boundary = hoist(gm, context.sources, context.requirements)
    gm.recompile()
    after = wide_edges(gm)["edges"]
    torch.manual_seed(SEED)
    actual = boundary.restore(gm(*boundary.admit(copy.deepcopy(tensors))))
    outcome = compare(expected, tuple(actual[-len(expected) :]))  # export gives mutated inputs first
    where = f"{sample.summary()}\n{gm.code}"
    assert outcome.ok, f"{outcome}\n{where}"
    assert not after or any(f.code in EXPLAINS for f in result.findings), f"edges without a reason: {where}"
    return Counter({"equal": 1, "kept and reported": bool(after), "before": before, "after": after})


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.formatted_name)
def test_sample(op: Any) -> None:
    samples = list(islice(op.sample_inputs("cpu", torch.int64), 3))  # the first ones often are scalars
    assert samples
    figures = check(op, samples[-1])
    assert figures["equal"] or figures["not captured"]


def main(limit: int) -> None:
    figures: Counter[str] = Counter()
    for op in OPS:
        torch.manual_seed(0)
        for sample in islice(op.sample_inputs("cpu", torch.int64), limit):
            figures += check(op, sample)
    print(f"{len(OPS)} ops:", ", ".join(f"{count} {name}" for name, count in figures.items()))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 8)
