"""The boundary of a cleaned graph: 64-bit values are checked and narrowed on the way in, restored on the way out.

The passes put casts right after the sources and right before the outputs. :func:`hoist` moves them out of the graph and
records them here, so that the same passes serve exported graphs and the forward and backward graphs of AOTAutograd.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import fx

from nxfx.analysis.dtype_rules import integer_bounds, is_integral, is_wide, narrow
from nxfx.analysis.intervals import fits
from nxfx.analysis.provenance import Role, Source
from nxfx.errors import PrepareError, RangeError
from nxfx.graph import meta
from nxfx.real_pairs import REAL, crosses_as_pairs

aten = torch.ops.aten
Check = Literal["always", "first", "never"]


def narrowed(value: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """``value`` in ``dtype`` (None: as it is). A finite float beyond float32 becomes its end: ``finfo(float64).min`` is no -inf.

    Complex numbers in a real dtype are pairs along a new last dimension.
    """
    if dtype is None or value.dtype == dtype:
        return value
    if value.is_complex() and not dtype.is_complex:
        return torch.view_as_real(value.resolve_conj()).to(dtype, copy=True)
    result = value.to(dtype)
    if value.dtype is torch.float64 and not isinstance(value, meta.FakeTensor):
        overflown = result.isinf() & value.isfinite()
        end = torch.finfo(dtype).max
        result = torch.where(overflown, torch.where(value > 0, end, -end).to(dtype), result)
    return result


def widened(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The inverse of :func:`narrowed`: a twin as the model's own ``dtype`` again."""
    if dtype.is_complex and not value.is_complex():
        return torch.view_as_complex(value.contiguous()).to(dtype)
    return value.to(dtype)


def twin_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the graph's twin of a buffer: 32 bits for 64, real for complex."""
    return REAL.get(dtype, narrow(dtype))


_UNORDERED = (torch.uint16, torch.uint32, torch.uint64)  # no min and max kernels


def _comparable(value: torch.Tensor) -> torch.Tensor:
    return value.detach().to(torch.int64) if value.dtype in _UNORDERED else value.detach()


@dataclass
class InputRule:
    """What happens to one input.

    Attributes:
        name: the user's name for it.
        narrow: dtype the graph takes, None when it takes the caller's.
        low, high: inclusive range that is enforced; None when nothing rests on it.
        why: where the range comes from: ``"declared"``, ``"implied by use"``, ``"assumed"`` (what is computed from it fits) or ``"int32"``.
    """

    name: str
    narrow: torch.dtype | None = None
    low: int | None = None
    high: int | None = None
    why: str = ""
    checked: bool = False

    def enforce(self, value: torch.Tensor, check: Check) -> None:
        """Raise RangeError when ``value`` holds anything outside the range.

        Host tensors are checked on each call, device tensors on the first (a min/max is a host synchronisation), meta and fake
        tensors never.
        """
        if self.low is None or self.high is None or check == "never" or value.is_meta or value.numel() == 0:
            return
        if isinstance(value, meta.FakeTensor) or (self.checked and (check == "first" or value.device.type != "cpu")):
            return
        if fits(integer_bounds(value.dtype), (self.low, self.high)):
            return
        low, high = torch.aminmax(_comparable(value))
        if int(low) < self.low or int(high) > self.high:
            self._refuse(value)
        self.checked = True

    def _refuse(self, value: torch.Tensor) -> None:
        assert self.low is not None and self.high is not None
        flat, bounds = value.detach().reshape(-1), torch.iinfo(torch.int64)
        wide = flat.to(torch.int64)  # a uint8 compares with -5 as if it were 251
        low = max(self.low, bounds.min if value.dtype.is_signed or value.dtype == torch.bool else 0)
        flat_position = int(((wide < low) | (wide > min(self.high, bounds.max))).nonzero()[0])
        position = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat_position), value.shape)) if value.dim() else ()
        found = flat[flat_position].item()
        hint = {
            "declared": "this is the range declared with ranges=",
            "implied by use": "the model uses it as an index into a dimension of that size",
            "assumed": "what is computed from larger values may leave int32, which the graph was narrowed to; "
            "declare what it can hold with ranges=",
        }.get(self.why, "the graph was narrowed to int32; declare what it can hold with ranges=")
        raise RangeError(
            f"input {self.name!r}: value {found} at {list(position)} (flat position {flat_position}) is outside [{self.low}, {self.high}]: "
            f"{hint}",
            argument=self.name,
            value=found,
            position=position,
            flat_position=flat_position,
            range=(self.low, self.high),
        )

    def admit(self, value: torch.Tensor, check: Check) -> torch.Tensor:
        """``value`` checked and narrowed.

        Raises:
            RangeError: a value does not fit; nothing has run.
        """
        self.enforce(value, check)
        return narrowed(value, self.narrow)


@dataclass
class Boundary:
    """What stands between the caller and the graph.

    Attributes:
        inputs: one rule per placeholder, in order.
        outputs: per output the dtype the model gives, None where the graph gives it already.
        narrowed_buffers: fully qualified name → dtype of the model's own buffer; the graph holds a twin in 32 bits, or in pairs of
            real numbers for a complex one.
        largest_size: what a dynamic dimension may reach at most, None when no proof rests on that.
    """

    inputs: list[InputRule] = field(default_factory=list)
    outputs: list[torch.dtype | None] = field(default_factory=list)
    narrowed_buffers: dict[str, torch.dtype] = field(default_factory=dict)
    largest_size: int | None = None

    def admit(self, values: Sequence[torch.Tensor], check: Check = "always") -> list[torch.Tensor]:
        """All inputs checked, then all narrowed: when one is refused nothing has run."""
        for rule, value in zip(self.inputs, values, strict=True):
            rule.enforce(value, check)
        return self.narrow(values)

    def narrow(self, values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """All inputs as the graph takes them, unchecked."""
        return [narrowed(value, rule.narrow) for rule, value in zip(self.inputs, values, strict=True)]

    def leave_narrow(self, count: int) -> None:
        """The first ``count`` outputs are handed to the caller as the graph gives them."""
        self.outputs[:count] = [None] * count

    def restore(self, values: Iterable[Any]) -> list[Any]:
        """The outputs in the model's own dtypes; None stands for one that stays on the device."""
        return [v if v is None or dtype is None else v.to(dtype) for v, dtype in zip(values, self.outputs, strict=True)]


class ShapeGuard:
    """The relations between input sizes that a capture with dynamic shapes rests on: fixed sizes, equal symbols, their ranges."""

    def __init__(self, graph_module: fx.GraphModule, largest: int | None = None) -> None:
        self.largest = sys.maxsize if largest is None else largest
        values = [meta.val(n) for n in graph_module.graph.find_nodes(op="placeholder")]
        self.expected = [tuple(v.shape) if isinstance(v, torch.Tensor) else () for v in values]
        self.dynamic = any(not isinstance(size, int) for shape in self.expected for size in shape)

    def enforce(self, values: Sequence[torch.Tensor], names: Sequence[str]) -> None:
        """Nothing to do without dynamic sizes: the signature has told them.

        Raises:
            PrepareError: a size contradicts the capture.
        """
        if not self.dynamic:
            return
        known: dict[Any, int] = {}
        for solved in (True, False):  # plain symbols first, then what is computed from them
            for name, value, expected in zip(names, values, self.expected, strict=True):
                for dim, (size, wanted) in enumerate(zip(value.shape, expected, strict=True)):
                    if meta.is_symbol(wanted) == solved:
                        self._one(name, dim, int(size), wanted, known)

    def _one(self, name: str, dim: int, size: int, wanted: Any, known: dict[Any, int]) -> None:
        low, high = meta.size_range(wanted)
        high = min(high, self.largest)
        needed = meta.size_given(wanted, known)
        if needed is None:
            known[meta.symbol_of(wanted)] = size
        if (needed is not None and needed != size) or not low <= size <= high:
            rule = str(needed) if needed is not None else f"a size in [{low}, {high}]"
            raise PrepareError(f"input {name!r}: size {size} of dimension {dim} does not fit the captured graph, which needs {rule} there")


def _is_boundary_cast(node: fx.Node, dtype: torch.dtype) -> bool:
    if node.op != "call_function" or node.target is not aten._to_copy.default:
        return False
    return dict(node.kwargs) == {"dtype": dtype}


def hoist(
    graph_module: fx.GraphModule,
    sources: Mapping[str, Source],
    requirements: Mapping[str, tuple[int, int]],
    *,
    hoist_outputs: bool = True,
    keep_outputs: Iterable[int] = (),
) -> Boundary:
    """Move the casts at the graph's edges into a :class:`Boundary`. Edits the graph; call once, as the pipeline's ``finish``.

    Args:
        sources: what the placeholders and ``get_attr`` nodes stand for.
        requirements: input name → inclusive range that the passes' proofs rest on.
        keep_outputs: positions whose cast stays in the graph.
    """
    graph = graph_module.graph
    boundary = Boundary()
    for node in list(graph.nodes):
        if node.op == "placeholder":
            boundary.inputs.append(_hoist_input(graph, node, sources.get(node.name), requirements))
        elif node.op == "get_attr" and node.name in sources and sources[node.name].role is not Role.PARAMETER:
            wide = meta.dtype_of(node)
            if wide is not None and (_narrow_source(graph, node) or _pair_source(graph, node)):
                boundary.narrowed_buffers[sources[node.name].name] = wide
    _hoist_outputs(graph, boundary, set(keep_outputs), hoist_outputs)
    return boundary


def _narrow_source(graph: fx.Graph, node: fx.Node) -> bool:
    """Whether every use of a 64-bit source is the cast to its 32-bit dtype; if so, the source takes that dtype."""
    dtype = meta.dtype_of(node)
    if dtype is None or not is_wide(dtype):
        return False
    if not all(_is_boundary_cast(user, narrow(dtype)) for user in node.users):
        return False
    casts = [meta.val(user) for user in node.users]  # what the caller's cast makes: its strides are not the input's
    node.meta["val"] = casts[0] if casts else meta.retype(meta.val(node), narrow(dtype))
    node.meta.pop("tensor_meta", None)
    for user in list(node.users):
        user.replace_all_uses_with(node)
        graph.erase_node(user)
    return True


def _pair_source(graph: fx.Graph, node: fx.Node) -> bool:
    """Whether a complex buffer is read as real numbers only; if so, the source holds these."""
    if not crosses_as_pairs(node):
        return False
    value = meta.val(next(iter(node.users)))
    for user in list(node.users):
        user.replace_all_uses_with(node)
        graph.erase_node(user)
    node.meta["val"] = value
    node.meta.pop("tensor_meta", None)
    return True


def _hoist_input(graph: fx.Graph, node: fx.Node, source: Source | None, requirements: Mapping[str, tuple[int, int]]) -> InputRule:
    name = source.name if source else node.name
    rule = InputRule(name)
    dtype = meta.dtype_of(node)
    if dtype is None or (source is not None and source.role not in (Role.INPUT, Role.OPAQUE)):
        return rule
    if _narrow_source(graph, node):
        rule.narrow = narrow(dtype)  # where no proof requires a range the cast is the model's own, and wraps as that does
    if name in requirements and is_integral(dtype):
        rule.low, rule.high = requirements[name]
        assumed = source is not None and source.assumed == requirements[name]
        declared = source is not None and source.range is not None
        fills = (rule.low, rule.high) == integer_bounds(torch.int32)
        rule.why = "declared" if declared else "assumed" if assumed else "int32" if fills else "implied by use"
    elif source is not None and source.range is not None and is_integral(dtype):
        rule.low, rule.high, rule.why = (*source.range, "declared")
    return rule


def _hoist_outputs(graph: fx.Graph, boundary: Boundary, keep: set[int], wanted: bool) -> None:
    (output,) = graph.find_nodes(op="output")
    results = list(output.args[0])
    for position, result in enumerate(results):
        dtype = meta.dtype_of(result)
        restored = None
        if wanted and position not in keep and dtype is not None and is_wide(dtype) and _is_boundary_cast(result, dtype):
            inner = result.args[0]
            if meta.dtype_of(inner) == narrow(dtype):
                results[position], restored = inner, dtype
        boundary.outputs.append(restored)
    casts = [r for r in output.args[0] if isinstance(r, fx.Node)]
    output.args = (tuple(results),)
    for cast in dict.fromkeys(casts):
        if not cast.users and cast.op == "call_function" and cast.target is aten._to_copy.default:
            graph.erase_node(cast)
