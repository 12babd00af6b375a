"""narrow-64bit: 64-bit values become 32-bit ones wherever it is proved that nothing is lost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from nxfx.narrowing.floats import NarrowFloats
from nxfx.narrowing.integers import NarrowIntegers
from nxfx.pipeline import Pass, PassContext, PassResult

aten = torch.ops.aten

_CHOICES = {"mode": ("proved", "assume", "aggressive"), "boundary": ("narrow", "keep"), "fp64": ("keep", "narrow")}


@dataclass(frozen=True)
class NarrowOptions:
    """Options of narrow-64bit.

    Attributes:
        mode: ``"assume"`` takes undeclared int64 inputs to fit int32, and those that are summed to be as small as the sums need (far
            above the example's values), and has the boundary enforce it; ``"proved"`` narrows only what holds for every input;
            ``"aggressive"`` narrows unproved values too, as every layer below does, and reports each.
        boundary: ``"narrow"`` casts 64-bit outputs down and back up, so that the boundary can take both casts out of the graph;
            ``"keep"`` hands an output that an op makes in int64 on as it is.
        fp64: ``"keep"`` reports float64 and complex128, and narrows constants where that changes no bit; ``"narrow"`` computes in
            float32 and complex64.
    """

    mode: str = "assume"
    boundary: str = "narrow"
    fp64: str = "keep"

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"option {name!r} is one of {', '.join(choices)}, not {getattr(self, name)!r}")


class Narrow64bit(Pass):
    """int64 values that provably fit int32 are produced as int32; what may not fit stays and is reported with the reason.

    Given::

        %ids : int64[2, 8] = placeholder                    # indexes an embedding of 100 rows
        %positions : int64[8] = aten.arange.default(8)
        %sum : int64[2, 8] = aten.add.Tensor(%ids, %positions)
        %best : int64[2] = aten.argmax.default(%sum, 1)
        return (%best,)

    Result::

        %ids : int64[2, 8] = placeholder                    # required: [0, 99]
        %_to_copy : int32[2, 8] = aten._to_copy.default(%ids, dtype=int32)
        %positions : int32[8] = aten.arange.default(8, dtype=int32)
        %sum : int32[2, 8] = aten.add.Tensor(%_to_copy, %positions)
        %best : int64[2] = aten.argmax.default(%sum, 1)     # its schema forces int64
        %_to_copy_1 : int32[2] = aten._to_copy.default(%best, dtype=int32)
        %_to_copy_2 : int64[2] = aten._to_copy.default(%_to_copy_1, dtype=int64)
        return (%_to_copy_2,)

    Casts behind inputs and before outputs are there for the boundary to take out. Sums and cumulative sums accumulate in int32
    only where the bound of the result covers every partial sum; an op that demands int64 gets a local cast.
    """

    name = "narrow-64bit"
    Options = NarrowOptions
    after: ClassVar[tuple[str, ...]] = ("mask-slice-writes", "lift-int-casts")

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> PassResult:
        integers, floats = _concerned(graph_module.graph)
        parts = [NarrowIntegers(self, graph_module, context).run(integers)] if integers else []
        parts += [NarrowFloats(self, graph_module, context).run(floats)] if floats else []
        return PassResult(
            any(p.changed for p in parts), [r for p in parts for r in p.rewrites], [f for p in parts for f in p.findings]
        )


_FLOATS = frozenset({torch.float64, torch.complex128})


def _concerned(graph: fx.Graph) -> tuple[list[fx.Node], list[fx.Node]]:
    """Nodes that give or read int64, and those that give or read float64 or complex128, in order."""
    integers: dict[fx.Node, None] = {}
    floats: dict[fx.Node, None] = {}
    readers: set[fx.Node] = set()
    float_readers: set[fx.Node] = set()
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            dtypes: Any = (value.dtype,)
        elif isinstance(value, (list, tuple)):
            dtypes = {v.dtype for v in value if isinstance(v, torch.Tensor)}
        else:
            dtypes = ()
        if torch.int64 in dtypes:
            integers[node] = None
            readers.update(node.users)
        elif node in readers:
            integers[node] = None
        if not _FLOATS.isdisjoint(dtypes):
            floats[node] = None
            float_readers.update(node.users)
        elif node in float_readers:
            floats[node] = None
    return list(integers), list(floats)
