"""The interval table: op → what its integer result can be, given what its arguments can be."""

from nxfx.analysis.range_rules import arithmetic, assembly, reductions
from nxfx.analysis.range_rules.factories import arange_arguments
from nxfx.analysis.range_rules.table import RULES, Rule, overloads, products, within
from nxfx.analysis.range_rules.views import PRESERVING_VIEWS, SELECTIONS

__all__ = [
    "PRESERVING_VIEWS", "RULES", "SELECTIONS", "Rule", "arange_arguments", "arithmetic", "assembly", "overloads", "products", "reductions",
    "within",
]  # fmt: skip
