"""The one table of what each Neuron generation and SDK release does: a row is a fact, and says where it is from.

A row holds for its generations from the SDK release ``since`` on, until a later row of the same name. Read from AWS's public
documentation; nothing here was run on a device.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

GENERATIONS = ("inf2", "trn1", "trn2", "trn3")
SDKS = ("2.26", "2.27", "2.28", "2.29", "2.30", "2.31", "2.32", "2.33")
LATEST_SDK = SDKS[-1]

ALL = frozenset(GENERATIONS)
V2 = frozenset({"inf2", "trn1"})
V3_UP = frozenset({"trn2", "trn3"})
TRN2 = frozenset({"trn2"})
TRN3 = frozenset({"trn3"})

_CLI = "Neuron Compiler CLI Reference Guide"
_DATA_TYPES = "Neuron documentation, Data Types"
_ERRORS = "Neuron Compiler Error Codes"
_NOTES = "Neuron Graph Compiler release notes"

NOT_ESTABLISHED = "not established"
"""A default that was announced to change, with no word on whether it did."""


@dataclass(frozen=True)
class Fact:
    """One row.

    Attributes:
        name: what it is about; the names are those of :class:`~nxfx.targets.Target`'s properties.
        targets: the generations it holds for.
        since: the first SDK release it holds for; ``"2.26"``, the oldest one known here, stands for earlier ones too.
        value: the fact.
        source: where it is written.
    """

    name: str
    targets: frozenset[str]
    since: str
    value: Any
    source: str


_E5M2 = frozenset({"float8_e5m2"})

FACTS: tuple[Fact, ...] = (
    Fact("core", V2, "2.26", "NeuronCore-v2", f"{_DATA_TYPES}: Trn1 / Inf2"),
    Fact("core", TRN2, "2.26", "NeuronCore-v3", f"{_DATA_TYPES}: Trn2"),
    Fact("core", TRN3, "2.26", "NeuronCore-v4", f"{_DATA_TYPES}: Trn3"),
    # Defaults that touch numbers.
    Fact("auto_cast", ALL, "2.26", "matmult", f"{_NOTES}, 2.25.0: the default is still matmult"),
    Fact("auto_cast", ALL, "2.27", "none", f"{_NOTES}, 2.27.0: --auto-cast now defaults to none"),
    Fact("fp32_accumulation", ALL, "2.26", False, f"{_NOTES}, 2.13.66: --enable-mixed-precision-accumulation is an option"),
    Fact("fp32_accumulation", ALL, "2.27", True, f"{_NOTES}, 2.27.0: --enable-mixed-precision-accumulation is on by default"),
    # 64-bit integers, and integer arithmetic without an integer datapath.
    Fact("native_int64", ALL, "2.26", False, f"{_DATA_TYPES}: 64-bit integers are always converted to 32-bit integers"),
    Fact("native_int64", V3_UP, "2.32", True, f"{_CLI}: --native-int64, trn2 and later"),
    Fact("native_int64_default", ALL, "2.26", "disabled", f"{_NOTES}, 2.32.0: the posture before it"),
    Fact("native_int64_default", V3_UP, "2.33", NOT_ESTABLISHED, f"{_NOTES}, 2.32.0: `enabled` is announced for the next release"),
    Fact("integer_downcast_flag", ALL, "2.26", False, f"{_NOTES}, 2.32.0: --implicit-integer-downcast is new"),
    Fact("integer_downcast_flag", ALL, "2.32", True, f"{_CLI}: --implicit-integer-downcast"),
    Fact("integer_downcast_default", ALL, "2.26", "all", f"{_NOTES}, 2.32.0: the posture before it"),
    Fact("integer_downcast_default", ALL, "2.33", NOT_ESTABLISHED, f"{_NOTES}, 2.32.0: `none` is announced for the next release"),
    Fact("int32_dot", V2, "2.26", True, f"{_ERRORS}, NCC_EVRF035: on Trainium1 a 32-bit integer dot compiles, with a warning"),
    Fact("int32_dot", V3_UP, "2.26", False, f"{_ERRORS}, NCC_EVRF035: 32-bit integers on Trainium2 and later, 64-bit ones everywhere"),
    # Dtypes.
    Fact("float8", V2 | TRN2, "2.26", _E5M2, f"{_DATA_TYPES}: FP8_e5m2; {_ERRORS}, NCC_EVRF051: F8E4M3FN is Trn3's"),
    Fact("float8", TRN3, "2.26", _E5M2 | {"float8_e4m3fn", "float8_e8m0fnu"}, f"{_ERRORS}, NCC_EVRF051; MXFP8 scales on NeuronCore-v4"),
    Fact("complex64", ALL, "2.26", False, f"{_ERRORS}, NCC_EVRF004: complex data types are not supported"),
    Fact("complex64", ALL, "2.32", True, f"{_NOTES}, 2.32.0: complex64 in a list of operations; NCC_EVRF004 for the others"),
    # Operations.
    Fact("sort", V2, "2.26", True, f"{_ERRORS}, NCC_EVRF013: sort and top-k lower to one custom call"),
    Fact("sort", V3_UP, "2.26", False, "the compiler's own message, NCC_EVRF029: operation sort is not supported on trn2"),
    Fact("saturate_infinity", V2, "2.26", True, f"{_CLI}: --enable-saturate-infinity is only needed on trn1 (NeuronCore-v2)"),
    Fact("saturate_infinity", V3_UP, "2.26", False, f"{_CLI}: --enable-saturate-infinity has no effect on trn2"),
    # Routes.
    Fact("legacy", V2, "2.26", True, "Neuron documentation: torch-neuronx 2.9 (PyTorch/XLA) serves Inf2 and Trn1"),
    Fact("legacy", TRN2, "2.26", True, "Neuron documentation: torch-neuronx 2.9 (PyTorch/XLA), Trn2 up to SDK 2.31"),
    Fact("legacy", TRN2, "2.32", False, "Neuron documentation: TorchNeuron serves Trn2 and Trn3"),
    Fact("legacy", TRN3, "2.26", False, "Neuron documentation: TorchNeuron serves Trn2 and Trn3"),
)

# neuronx-cc release → SDK release, where both are published side by side.
COMPILERS = {"2.21": "2.26", "2.22": "2.27", "2.24": "2.29", "2.25": "2.30", "2.26": "2.31", "2.27": "2.32", "2.28": "2.33"}


@functools.cache
def fact(name: str, target: str, sdk: str) -> Fact:
    """The row called ``name`` that is in force for a generation and an SDK release."""
    at = SDKS.index(sdk)
    rows = [f for f in FACTS if f.name == name and target in f.targets and SDKS.index(f.since) <= at]
    return max(rows, key=lambda f: SDKS.index(f.since))
