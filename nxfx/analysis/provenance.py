"""Where a graph's values come from: its sources."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch

_TABLE_LIMIT = 4096


class Role(str, Enum):
    """What a placeholder or ``get_attr`` stands for."""

    INPUT = "input"
    PARAMETER = "parameter"
    BUFFER = "buffer"
    CONSTANT = "constant"  # lifted by capture; nobody can change it
    OPAQUE = "opaque"  # a tangent, a saved activation, the operand of a higher-order op's body


@dataclass(frozen=True)
class Source:
    """A placeholder or ``get_attr`` node's origin.

    Attributes:
        name: the user's name for it: argument name or the parameter's fully qualified name.
        role: see :class:`Role`.
        value: the tensor it holds now (parameters, buffers, constants), None when unknown or fake.
        mutated: the graph writes it, so ``value`` proves nothing.
        range: declared inclusive ``(low, high)``, None when not declared. Of an operand: what is proved of it.
        assumed: of an undeclared input: tighter bounds than int32 that proofs rest on and the boundary enforces. Of an operand of a
            higher-order op's body: its bounds when undeclared inputs of the model are within theirs.
        culprit: of such an operand: the user's name for an undeclared input that ``assumed`` depends on.
        seen: of an integer input: the extremes of the example.
        recomputed: of a constant: the float32 origin of a table that was rounded before capture.
    """

    name: str
    role: Role
    value: torch.Tensor | None = None
    mutated: bool = False
    range: tuple[int, int] | None = None
    assumed: tuple[int, int] | None = None
    culprit: str | None = None
    seen: tuple[int, int] | None = None
    recomputed: bool = False

    @property
    def is_known(self) -> bool:
        """Whether ``value`` may be used as a premise."""
        return self.value is not None and not self.mutated

    @property
    def is_table(self) -> bool:
        """Whether it holds numbers that were computed once. Of parameters those that no training changes and that have the form of
        frequencies: the weights of a frozen model are learned all the same.
        """
        if self.role is not Role.PARAMETER:
            return self.role in (Role.BUFFER, Role.CONSTANT)
        held = self.value
        return held is not None and not held.requires_grad and held.dim() == 1 and held.numel() <= _TABLE_LIMIT


@dataclass(frozen=True)
class Premise:
    """A proof rests on the present value of a buffer or parameter.

    Attributes:
        source: the buffer's fully qualified name.
        fact: kind of fact: ``"range"`` (low, high), ``"finite-nonnegative"``, ``"value"``, ``"among"`` (its numbers) or ``"low-among"``
            (those of them below -1000). Minus infinity stands among these as the smallest float64.
        detail: the fact itself; re-checked when the tensor's identity or ``_version`` changes.
    """

    source: str
    fact: str
    detail: tuple[float, ...] | None = None
