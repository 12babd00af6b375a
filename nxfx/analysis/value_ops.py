"""Which operators make what follows depend on a tensor's value: one table, for graphs and for a model that runs eagerly."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from nxfx.graph import walk

aten = torch.ops.aten
_Tag = torch.Tag

# A random op's mode and probability arguments: it draws nothing when they say so.
_IS_TRAINING = ("train", "training")
_PROBABILITY = ("dropout_p", "dropout", "p")
_ASSERTIONS = ("_assert_async", "_functional_assert_async")
# torch-xla 2.9 counts these as fallbacks: the value goes to the host, and a legacy trace keeps what comes back.
_HOST_ONLY = frozenset({"bucketize", "searchsorted", "nonzero_static", "histc"})
# No tag, or not in every version; `index` and `index_put` only with a mask.
_SIZED_BY_DATA = frozenset({"where.default", "nonzero_numpy.default", "repeat_interleave.self_Tensor"})
_INDEXED = frozenset({"index", "_unsafe_index", "index_put", "index_put_", "_unsafe_index_put", "_index_put_impl_"})


def name_of(target: Any) -> str:
    """``aten.index.Tensor`` → ``"index"``."""
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.partition("::")[2]
    return str(getattr(target, "__name__", target))


@functools.lru_cache(maxsize=4096)
def kind_of(target: Any) -> str:
    """``"value"``, ``"size"``, ``"random"``, ``"host"``, ``"assert"``, ``"body"`` or ``""``.

    With ``?`` when the call must be asked as well (:func:`depends`).
    """
    if isinstance(target, torch._ops.HigherOrderOperator):
        return "" if target.name() in walk.KNOWN_HIGHER_ORDER_OPS else "body?"
    if not isinstance(target, torch._ops.OpOverload):
        return ""
    name, tags = name_of(target), target.tags
    if _Tag.data_dependent_output in tags or name in ("is_nonzero", "_local_scalar_dense"):
        return "value"
    if name in _INDEXED:
        return "size?mask"
    if name in _HOST_ONLY:
        return "host"
    if _Tag.dynamic_output_shape in tags or f"{name}.{target._overloadname}" in _SIZED_BY_DATA:
        return "size?fixed"
    if _Tag.nondeterministic_seeded in tags:
        return "random?"
    return "assert" if name in _ASSERTIONS else ""


def depends(
    kind: str, target: Any, args: Sequence[Any], kwargs: Mapping[str, Any], dtype_of: Callable[[Any], torch.dtype | None]
) -> bool:
    """Whether this very call of ``target`` is what :func:`kind_of` says its calls can be.

    Args:
        args, kwargs: of the call: nodes or tensors.
        dtype_of: gives the dtype of either, None for what is neither.
    """
    if kind == "size?mask":
        return any(dtype_of(i) in (torch.bool, torch.uint8) for i in (args[1] if len(args) > 1 else ()))
    if kind == "size?fixed":
        if name_of(target) == "one_hot":
            return argument(target, args, kwargs, "num_classes") in (None, -1)
        return target is not aten._ctc_loss.default
    if kind == "random?":
        if any(argument(target, args, kwargs, name) is False for name in _IS_TRAINING):
            return False
        names = [n for n in _PROBABILITY if n != "p" or "dropout" in name_of(target)]
        return not any(argument(target, args, kwargs, name) == 0 for name in names)
    return True


def argument(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any], name: str) -> Any:
    """The value of an argument by its schema name, defaults included; None where there is no such argument."""
    for position, spec in enumerate(target._schema.arguments):
        if spec.name == name:
            default = spec.default_value if spec.has_default_value() else None
            return args[position] if position < len(args) else kwargs.get(name, default)
    return None


# Batch norms update their statistics, and their schemas do not say so.
_STATISTICS = frozenset({"running_mean", "running_var"})


@functools.lru_cache(maxsize=4096)
def written_by(target: Any) -> tuple[tuple[int, str], ...]:
    """Position and name of each argument that ``target`` writes."""
    if not isinstance(target, torch._ops.OpOverload):
        return ()
    return tuple(
        (position, spec.name)
        for position, spec in enumerate(target._schema.arguments)
        if spec.name in _STATISTICS or spec.alias_info is not None and spec.alias_info.is_write
    )


def written_arguments(written: Sequence[tuple[int, str]], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    """The tensors at the places that :func:`written_by` gave."""
    for position, name in written:
        value = args[position] if position < len(args) else kwargs.get(name)
        for tensor in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(tensor, torch.Tensor):
                yield tensor
