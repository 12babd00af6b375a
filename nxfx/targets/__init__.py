"""What each Neuron generation computes with. Data, with a source for each row."""

from __future__ import annotations

from dataclasses import dataclass

from nxfx.errors import UsageError

LATEST_SDK = "2.33"


@dataclass(frozen=True)
class Target:
    """One Neuron generation.

    Attributes:
        name: ``inf2``, ``trn1``, ``trn2`` or ``trn3``.
        native_int64: whether the hardware can compute in int64 at all (``--native-int64``, neuronx-cc 2.32 release notes).
        sdk: the SDK release assumed.
    """

    name: str
    native_int64: bool
    sdk: str = LATEST_SDK


# neuronx-cc release notes, SDK 2.32: "--native-int64: trn2 and later; trn1/inf2 always int32".
TARGETS: dict[str, Target] = {
    "inf2": Target("inf2", native_int64=False),
    "trn1": Target("trn1", native_int64=False),
    "trn2": Target("trn2", native_int64=True),
    "trn3": Target("trn3", native_int64=True),
}


def get_target(name: str | Target) -> Target:
    """The target called ``name``.

    Raises:
        UsageError: no such target.
    """
    if isinstance(name, Target):
        return name
    if name not in TARGETS:
        raise UsageError(f"unknown target {name!r}: choose one of {', '.join(TARGETS)}")
    return TARGETS[name]
