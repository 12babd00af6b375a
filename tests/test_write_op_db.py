"""torch's own samples of every writer op: equal to eager, or reported with the property that could not be proved."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils import _pytree as pytree
from view_programs import functional_graph

from nxfx.passes.mask_slice_writes import MaskSliceWrites
from nxfx.pipeline import Pipeline
from nxfx.verification.equivalence import compare

WRITERS = [
    "slice_scatter", "select_scatter", "diagonal_scatter", "as_strided_scatter", "index_put", "index_fill", "index_copy",
    "index_add", "masked_fill", "masked_scatter", "scatter", "scatter_add", "scatter_reduce", "fill", "index_reduce", "put",
    "zero_", "fill_", "copy_", "__setitem__",
]  # fmt: skip
DTYPES = (torch.float32, torch.int64, torch.bool)
SCATTERS = ("scatter", "index_put", "index_copy", "index_fill", "index_add", "index_reduce", "aten.put", "aten.copy")


def left(gm: torch.fx.GraphModule) -> list[str]:
    return [str(n.target) for n in gm.graph.nodes if n.op == "call_function" and any(w in str(n.target) for w in SCATTERS)]


@pytest.mark.parametrize("op", [o for o in op_db if o.name in WRITERS], ids=lambda o: o.formatted_name)
def test_samples(op: Any) -> None:
    figures: Counter[str] = Counter()
    for dtype in DTYPES:
        if dtype not in op.dtypes:
            continue
        for sample in op.sample_inputs("cpu", dtype):
            leaves, spec = pytree.tree_flatten((sample.input, sample.args, sample.kwargs))
            places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

            def call(*tensors: Tensor, leaves: list[Any] = leaves, spec: Any = spec, places: list[int] = places) -> Any:
                given = list(leaves)
                for place, tensor in zip(places, tensors, strict=True):
                    given[place] = tensor
                first, args, kwargs = pytree.tree_unflatten(given, spec)
                return op.op(first.clone(), *args, **kwargs)

            tensors = tuple(leaves[place].detach() for place in places)
            expected = call(*(t.clone() for t in tensors))
            gm, context = functional_graph(call, tensors)
            result = Pipeline([MaskSliceWrites()]).run(gm, context, verify_each=True)
            outcome = compare(expected, gm(*tensors))
            assert outcome.ok, f"{sample.summary()}\n{outcome}"
            kept = [f for f in result.findings if "is not turned into a mask" in f.message]
            assert len(left(gm)) <= len(kept), f"{sample.summary()}: {left(gm)}"
            figures["samples"] += 1
            figures["kept"] += len(kept)
    reduces = op.name in ("index_add", "index_reduce", "scatter_reduce", "scatter_add", "put", "scatter", "as_strided_scatter", "masked_scatter", "index_put")
    assert figures["samples"] and (reduces or not figures["kept"]), figures
