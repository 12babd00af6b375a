"""Premises: proofs that rest on the present value of a buffer, guarded by identity and ``_version``."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterable

import torch

from nxfx.analysis.mask_rules import LOW
from nxfx.analysis.provenance import Premise
from nxfx.errors import PrepareError
from nxfx.graph.meta import FakeTensor

_NEVER = itertools.count(1)


def check_premises(
    premises: Iterable[Premise], tensor_of: Callable[[str], torch.Tensor], stamps: dict[str, tuple[int, int]]
) -> None:
    """Re-check the premises whose tensor changed since ``stamps`` were taken; ``stamps`` is brought up to date.

    Raises:
        PrepareError: a premise no longer holds: the graph would compute something else than the model.
    """
    fresh: dict[str, tuple[int, int]] = {}
    for premise in premises:
        tensor = tensor_of(premise.source)
        stamp = stamp_of(tensor)
        if stamps.get(premise.source) == stamp:
            continue
        if premise.source in stamps and not holds(premise, tensor):
            raise PrepareError(
                f"{premise.source!r} changed and no longer is what the graph was proved with ({premise.fact}"
                f"{f' {list(premise.detail)}' if premise.detail else ''}): prepare the model again"
            )
        fresh[premise.source] = stamp
    stamps.update(fresh)


def stamp_of(tensor: torch.Tensor) -> tuple[int, int]:
    """Equal while the tensor is the same object with the same content; inference tensors do not count versions, so never."""
    return (id(tensor), tensor._version) if not tensor.is_inference() else (id(tensor), -next(_NEVER))


def holds(premise: Premise, tensor: torch.Tensor) -> bool:
    """Whether the fact is true of ``tensor`` now."""
    if tensor.numel() == 0 or tensor.is_meta or isinstance(tensor, FakeTensor):
        return True
    if premise.fact == "range":
        assert premise.detail is not None
        low, high = torch.aminmax(tensor)
        return premise.detail[0] <= low.item() and high.item() <= premise.detail[1]
    if premise.fact == "finite-nonnegative":
        return bool(torch.isfinite(tensor).all() and (tensor >= 0).all() and not torch.signbit(tensor).any())
    if premise.fact in ("among", "low-among"):
        held = tensor.detach().flatten()
        held = (held[held < LOW] if premise.fact == "low-among" else held).double().clamp_min(-sys.float_info.max)
        return bool(torch.isin(held, torch.tensor(premise.detail, dtype=torch.float64, device=held.device)).all())
    return False
