"""What each Neuron generation computes with under each SDK release."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from typing import Any

from nxfx.errors import UsageError
from nxfx.targets.facts import FACTS, GENERATIONS, LATEST_SDK, SDKS, Fact, fact

__all__ = ["GENERATIONS", "LATEST_SDK", "SDKS", "Target", "get_target"]


@dataclass(frozen=True)
class Target:
    """One Neuron generation under one SDK release; every property is a row of :mod:`nxfx.targets.facts`.

    Attributes:
        name: ``inf2``, ``trn1``, ``trn2`` or ``trn3``.
        sdk: the SDK release, ``"2.26"`` … ``"2.33"``; a patch release (``"2.31.1"``) stands for its release.

    Raises:
        UsageError: no such generation or release; says which there are.
    """

    name: str
    sdk: str = LATEST_SDK

    def __post_init__(self) -> None:
        if self.name not in GENERATIONS:
            near = difflib.get_close_matches(str(self.name), GENERATIONS, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise UsageError(f"unknown target {self.name!r}: choose one of {', '.join(GENERATIONS)}.{hint}")
        object.__setattr__(self, "sdk", _release(self.sdk))

    def __str__(self) -> str:
        return f"{self.name}, SDK {self.sdk}"

    def _value(self, name: str) -> Any:
        return fact(name, self.name, self.sdk).value

    @property
    def facts(self) -> tuple[Fact, ...]:
        """The rows in force, in the table's order."""
        return tuple(fact(name, self.name, self.sdk) for name in dict.fromkeys(f.name for f in FACTS))

    @property
    def core(self) -> str:
        """``"NeuronCore-v2"`` …"""
        return str(self._value("core"))

    @property
    def auto_cast(self) -> str:
        """What ``--auto-cast`` is when it is not given: ``"none"`` or ``"matmult"``."""
        return str(self._value("auto_cast"))

    @property
    def fp32_accumulation(self) -> bool:
        """Whether low-precision sums accumulate in fp32 unless told otherwise."""
        return bool(self._value("fp32_accumulation"))

    @property
    def native_int64(self) -> bool:
        """Whether int64 can be computed as such; this is also whether ``--native-int64`` is a legal flag."""
        return bool(self._value("native_int64"))

    @property
    def native_int64_default(self) -> str:
        """What ``--native-int64`` is when it is not given."""
        return str(self._value("native_int64_default"))

    @property
    def integer_downcast_flag(self) -> bool:
        """Whether ``--implicit-integer-downcast`` is a legal flag. Without it such arithmetic is silently done in fp32."""
        return bool(self._value("integer_downcast_flag"))

    @property
    def integer_downcast_default(self) -> str:
        """What ``--implicit-integer-downcast`` is, or amounts to, when it is not given."""
        return str(self._value("integer_downcast_default"))

    @property
    def int32_dot(self) -> bool:
        """Whether a matrix product of int32 compiles whatever ``--implicit-integer-downcast`` says."""
        return bool(self._value("int32_dot"))

    @property
    def float8(self) -> frozenset[str]:
        """Names of the 8-bit float dtypes it computes with."""
        return frozenset(self._value("float8"))

    @property
    def complex64(self) -> bool:
        """Whether complex64 compiles at least in some operations."""
        return bool(self._value("complex64"))

    @property
    def sort(self) -> bool:
        """Whether a full sort compiles."""
        return bool(self._value("sort"))

    @property
    def saturate_infinity(self) -> bool:
        """Whether ``--enable-saturate-infinity`` does anything."""
        return bool(self._value("saturate_infinity"))

    @property
    def legacy(self) -> bool:
        """Whether it is reached through torch-neuronx on PyTorch/XLA; else through TorchNeuron."""
        return bool(self._value("legacy"))


def get_target(target: str | Target, sdk: str | None = None) -> Target:
    """The target called ``target`` (or itself), under ``sdk`` where one is given.

    Raises:
        UsageError: no such target or SDK release.
    """
    if isinstance(target, Target):
        return target if sdk is None else dataclasses.replace(target, sdk=sdk)
    return Target(target) if sdk is None else Target(target, sdk)


def _release(sdk: Any) -> str:
    if not isinstance(sdk, str):
        raise UsageError(f"sdk wants a string such as {LATEST_SDK!r}, not {sdk!r}")
    release = ".".join(sdk.split(".")[:2])
    if release not in SDKS:
        raise UsageError(f"unknown SDK release {sdk!r}: nxfx knows {', '.join(SDKS)}")
    return release
