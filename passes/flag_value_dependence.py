"""flag-value-dependence."""

from __future__ import annotations

from torch import fx

from nxfx.pipeline import Pass, PassContext, PassResult


class FlagValueDependence(Pass):
    """flag-value-dependence."""

    name = "flag-value-dependence"

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> PassResult:
        return PassResult()
