"""The same computation in a higher precision: every float dtype, explicit casts included, is float64 (or float32).

This is the reference that errors are measured against. A cast that the model wrote is part of what is judged, so it does not
round here; integers, booleans and random draws are the model's own. Ops that only move data run on what they are given.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from nxfx.errors import UsageError
from nxfx.graph.meta import val

aten = torch.ops.aten
Reference = Literal["fp64", "fp32"]
REFERENCES: dict[str, torch.dtype] = {"fp64": torch.float64, "fp32": torch.float32}
_COMPLEX = {torch.float64: torch.complex128, torch.float32: torch.complex64}

# Pure data movement beside the views: the result holds the operand's own values.
_MOVES = frozenset(
    {aten.embedding.default, aten.index.Tensor, aten.index_select.default, aten.gather.default, aten.clone.default, aten.contiguous.default,
     aten.flip.default, aten.repeat.default, aten.roll.default, aten.view_copy.default, aten.reshape.default, aten.take_along_dim.default}
)  # fmt: skip
# A flag that says "the operand is half precision", which it is no longer.
_HALF_FLAGS = {aten._softmax.default: 2, aten._log_softmax.default: 2}
_SWITCHES = frozenset({"train", "training", "dropout_p", "dropout"})
_BITCASTS = frozenset({aten.view.dtype})
# A kernel for another dtype may lay out its result otherwise, and a view of it must not fail for that.
_RELAXED = {aten.view.default: aten.reshape.default, aten._unsafe_view.default: aten.reshape.default}


@dataclass(frozen=True)
class Precision:
    """Runs ops with every float at least as wide as ``dtype`` (``torch.float64`` or ``torch.float32``).

    Attributes:
        kept: ops that have no kernel for that and ran in the model's own precision.
    """

    dtype: torch.dtype
    kept: set[str] = field(default_factory=set, compare=False)

    @classmethod
    def of(cls, reference: str) -> Precision:
        """By name.

        Raises:
            UsageError: not ``"fp64"`` or ``"fp32"``.
        """
        if reference not in REFERENCES:
            raise UsageError(f"reference is one of {', '.join(REFERENCES)}, not {reference!r}")
        return cls(REFERENCES[reference])

    def dtype_for(self, dtype: torch.dtype) -> torch.dtype:
        """What stands for ``dtype``."""
        if dtype.is_complex:
            wide = _COMPLEX[self.dtype]
            return wide if dtype.itemsize < wide.itemsize else dtype
        return self.dtype if dtype.is_floating_point and dtype.itemsize < self.dtype.itemsize else dtype

    def widen(self, value: Any) -> Any:
        """``value`` with every narrower float tensor in it widened: exact."""
        return pytree.tree_map_only(torch.Tensor, lambda t: t.to(self.dtype_for(t.dtype)), value)

    def call(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], node: fx.Node | None = None) -> Any:
        """``op`` on ``args``, in the higher precision; narrow tensors among them are widened first.

        Args:
            node: the node that calls it, for ops that must see the dtypes the model gave them: draws and bit casts.
        """
        if isinstance(op, torch._ops.HigherOrderOperator):
            args, kwargs = pytree.tree_map_only(fx.GraphModule, lambda body: self.runner(body), (args, kwargs))
            return op(*args, **kwargs)
        if not isinstance(op, torch._ops.OpOverload):
            return op(*args, **kwargs)  # getitem, arithmetic on sizes
        if op in _BITCASTS or draws(op, args, kwargs):
            args, kwargs = as_captured(node, args, kwargs)
            return self.widen(op(*args, **kwargs))
        if op in _MOVES or op.is_view:
            return relaxed(op)(*args, **kwargs)
        if op in _HALF_FLAGS:
            flag = _HALF_FLAGS[op]
            args = (*args[:flag], False, *args[flag + 1 :])
        given, named, written = args, kwargs, _written(op)
        args = tuple(a if i in written else self._operand(a) for i, a in enumerate(args))
        kwargs = {k: v if k in written else self._operand(v) for k, v in kwargs.items()}
        try:
            return op(*args, **kwargs)
        except (RuntimeError, NotImplementedError):
            if node is None:
                raise
            # No kernel for this precision (grouped products take bf16 only): the best there is is the model's own.
            self.kept.add(str(op))
            args, kwargs = as_captured(node, given, named)
            return self.widen(op(*args, **kwargs))

    def _operand(self, value: Any) -> Any:
        def one(leaf: Any) -> Any:
            if isinstance(leaf, torch.Tensor):
                return leaf.to(self.dtype_for(leaf.dtype))
            return self.dtype_for(leaf) if isinstance(leaf, torch.dtype) else leaf

        return pytree.tree_map(one, value)

    def runner(self, body: fx.GraphModule) -> Callable[..., Any]:
        """``body`` as a function that computes in the higher precision."""
        return lambda *operands: WideInterpreter(body, self).run(*operands)

    def run(self, graph_module: fx.GraphModule, inputs: Sequence[Any]) -> list[Any]:
        """The outputs of a flat functional graph, each widened."""
        with torch.no_grad():
            return [self.widen(o) for o in WideInterpreter(graph_module, self).run(*inputs)]


class WideInterpreter(fx.Interpreter):
    """Runs a graph in a higher precision."""

    def __init__(self, graph_module: fx.GraphModule, precision: Precision) -> None:
        super().__init__(graph_module)
        self.precision = precision

    def run_node(self, n: fx.Node) -> Any:
        if n.op != "call_function":
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        return self.precision.call(n.target, args, kwargs, n)


class HigherPrecision(TorchDispatchMode):
    """A block in which eager code computes in the higher precision, for models that cannot be captured."""

    def __init__(self, precision: Precision) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.precision = precision

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.precision.call(func, tuple(args), kwargs or {})


def draws(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call draws random numbers: dropout that is off does not."""
    if not _can_draw(op):
        return False
    for position, argument in enumerate(op._schema.arguments):
        if argument.name in _SWITCHES:
            given = args[position] if position < len(args) else kwargs.get(argument.name, argument.default_value)
            if not isinstance(given, (fx.Node, torch.Tensor)) and not given:  # False, 0.0
                return False
    return True


@functools.cache
def _can_draw(op: Any) -> bool:
    return isinstance(op, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in op.tags


def relaxed(op: Any) -> Any:
    """``op``, or the one that does the same whatever the strides of its operand."""
    return _RELAXED.get(op, op)


def as_captured(node: fx.Node | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The tensors of a node's arguments in the dtypes that its graph gives them."""
    if node is None:
        return args, kwargs

    def one(given: Any, stands: Any) -> Any:
        if isinstance(given, torch.Tensor) and isinstance(stands, fx.Node) and isinstance(val(stands), torch.Tensor):
            return given.to(val(stands).dtype)
        if isinstance(given, (list, tuple)) and isinstance(stands, (list, tuple)):
            return type(given)(one(g, s) for g, s in zip(given, stands, strict=True))
        return given

    return tuple(one(a, s) for a, s in zip(args, node.args, strict=True)), {k: one(v, node.kwargs[k]) for k, v in kwargs.items()}


@functools.cache
def _written(op: torch._ops.OpOverload) -> set[int | str]:
    """Positions and names of the arguments that ``op`` writes: they keep their dtype."""
    found: set[int | str] = set()
    for position, argument in enumerate(op._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found |= {position, argument.name}
    return found
