"""What each matmul loses when the compiler casts it: the list for choosing between ``--auto-cast=none`` and speed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from nxfx.graph import matrix_products, printing
from nxfx.report.locations import Location, locate
from nxfx.verification.autocast import AutoCast, CastType, Emulation
from nxfx.verification.deviation import relative_error
from nxfx.verification.precision import Precision
from nxfx.verification.stepping import Values, attribute, evaluate


@dataclass(frozen=True)
class MatmulLoss:
    """One matmul under a cast.

    Attributes:
        loss: relative error (root mean square) of the cast matmul on the inputs it has without a cast.
        own: that of the matmul as the model wrote it.
    """

    node: str
    op: str
    location: Location
    loss: float
    own: float

    def __str__(self) -> str:
        where = f" in {self.location.module}" if self.location.module else ""
        return f"{self.loss:.3g} (as written {self.own:.3g})  {self.op} `{self.node}`{where} at {self.location}"


@torch.no_grad()
def matmul_losses(
    graph_module: fx.GraphModule, inputs: Sequence[Any], autocast: AutoCast, cast_type: CastType, precision: Precision
) -> list[MatmulLoss]:
    """Every matmul of the graph under the emulated auto-cast, on the inputs it has without one; worst first."""
    values = Values(graph_module.graph)
    given = iter(inputs)
    found = []
    for node in graph_module.graph.nodes:
        if node.op == "output":
            break
        if node.op == "placeholder":
            values[node] = next(given)
        elif node.op == "get_attr":
            values[node] = attribute(graph_module, node)
        else:
            values[node] = value = evaluate(node, values.__getitem__, None)
            if matrix_products.factor_positions(node.target):
                truth = evaluate(node, values.__getitem__, precision)
                with Emulation(autocast, cast_type):
                    rounded = evaluate(node, values.__getitem__, None)
                errors = relative_error(rounded, truth), relative_error(value, truth)
                found.append(MatmulLoss(node.name, printing.short(node.target), locate(node), *errors))
        values.drop_after(node)
    return sorted(found, key=lambda m: -m.loss)
