"""Masks that the model is given: float inputs that are added to attention scores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import fx

from nxfx.analysis.mask_rules import RULES, operands
from nxfx.analysis.provenance import Role, Source
from nxfx.graph import matrix_products, meta

aten = torch.ops.aten

_SCALES = frozenset([aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar])


def unknown_masks(root: fx.Node, sources: Mapping[str, Source], *, scored: bool) -> Iterator[fx.Node]:
    """The float inputs that ``root`` is a sum of, where a matrix product is another part of it, or (``scored``) will be."""
    found: list[fx.Node] = []
    stack, seen = [root], {root}
    while stack:
        node = stack.pop()
        scored |= bool(matrix_products.factor_positions(node.target))
        if node.op == "placeholder":
            source = sources.get(node.name)
            dtype = meta.dtype_of(node)
            if (source is None or source.role in (Role.INPUT, Role.OPAQUE)) and dtype is not None and dtype.is_floating_point:
                found.append(node)
        elif node.target in RULES and (node.target not in _SCALES or len(operands(node)) == 1):
            fresh = [n for n in operands(node) if n not in seen]
            seen.update(fresh)
            stack += fresh
    yield from found if scored else ()
