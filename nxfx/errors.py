"""The exceptions nxfx raises. All derive from :class:`NxfxError`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nxfx.report.locations import Location
    from nxfx.report.report import Report


class NxfxError(Exception):
    """Base class of every error that nxfx raises on purpose."""


class UsageError(NxfxError, ValueError):
    """An unknown pass, option, target, range name or file: the caller's mistake, told with the nearest valid name."""


class CaptureError(NxfxError):
    """The model could not be turned into a graph.

    Attributes:
        construct: the Python construct that cannot be captured, e.g. ``"if on a tensor's value"``.
        report: a report whose findings hold the user's line and the fix.
    """

    def __init__(self, message: str, *, construct: str = "", report: Report | None = None) -> None:
        super().__init__(message)
        self.construct = construct
        self.report = report


class PrepareError(NxfxError):
    """The model was captured but cannot be prepared as asked; ``report`` holds the findings."""

    def __init__(self, message: str, report: Report | None = None) -> None:
        super().__init__(message)
        self.report = report


class PassError(NxfxError):
    """A pass failed or broke an invariant. Names the pass, the node and the user's line.

    Attributes:
        pass_name: id of the pass, e.g. ``"narrow-64bit"``.
        node: name of the FX node at fault, or ``""``.
        reproducer: path of a stand-alone script that fails the same way, or ``None``.
    """

    def __init__(self, message: str, *, pass_name: str, node: str = "", reproducer: str | None = None) -> None:
        super().__init__(message)
        self.pass_name = pass_name
        self.node = node
        self.reproducer = reproducer


class CompilerError(NxfxError):
    """The compiler that was handed the graph failed; its own error is the cause, the message names the user's lines."""


class RangeError(NxfxError, ValueError):
    """A 64-bit value at the boundary does not fit the range the graph was narrowed for. Nothing has run.

    Attributes:
        argument: name of the input.
        value: the offending Python int or float.
        position: its unravelled index in the tensor.
        flat_position: its index in the flattened tensor.
        range: the permitted ``(low, high)``, both ends included.
    """

    def __init__(
        self, message: str, *, argument: str, value: Any, position: tuple[int, ...], flat_position: int, range: tuple[Any, Any]
    ) -> None:
        super().__init__(message)
        self.argument = argument
        self.value = value
        self.position = position
        self.flat_position = flat_position
        self.range = range


class LoweringError(NxfxError):
    """A lowering refused the graph.

    Attributes:
        op: the operation that it refuses, e.g. ``"aten.nonzero.default"``; ``""`` when that could not be told.
        location: the user's line that made it.
    """

    def __init__(self, message: str, *, op: str = "", location: Location | None = None) -> None:
        super().__init__(message)
        self.op = op
        self.location = location


class MissingDependencyError(NxfxError, ImportError):
    """A hand-off needs a package that is not installed, or not one that fits; the message tells how to install it."""


class NeuronNotFound(MissingDependencyError):
    """The Neuron package that a hand-off goes to is not installed here, or is the other one of the same name."""
