"""What localisation tells: errors along the graph, and the ops to blame."""

from __future__ import annotations

from dataclasses import dataclass, field

from nxfx.report.locations import Location


@dataclass(frozen=True)
class NodeError:
    """The error at one node of the model's graph, relative (root mean square), against the high-precision run.

    Attributes:
        candidate, model: total error of each. candidate is None where the candidate has no such node.
        amplification: total error over the largest total error among the node's inputs (of the candidate).
    """

    node: str
    op: str
    location: Location
    candidate: float | None
    model: float
    amplification: float | None = None


@dataclass(frozen=True)
class Blame:
    """An op whose value its inputs do not explain.

    Attributes:
        node: its name in the candidate's graph.
        original: the model's node that it stands for (or the first one after it that both graphs have).
        op, location: what it is and the user's line; ``location.module`` is the module path.
        made_by: the pass that made it, ``""`` for a node of the model.
        cause: ``"cast"``, ``"mask overflow"``, ``"integer wrap"``, ``"accumulation"``, ``"reordering"``, ``"rounded weight"`` or
            ``"rewrite"`` (another value altogether).
        local: relative error that it introduces on the candidate's own inputs.
        expected: what the model's op introduces on the same inputs.
        inherited: relative error of its worst input against the reference.
        detail: in words.
    """

    node: str
    original: str
    op: str
    location: Location
    made_by: str
    cause: str
    local: float
    expected: float
    inherited: float
    detail: str

    def __str__(self) -> str:
        by = f" (made by {self.made_by})" if self.made_by else ""
        where = f"{self.location}: {self.location.source}" if self.location.source else str(self.location)
        inside = f" in module {self.location.module}" if self.location.module else ""
        return f"{self.op} `{self.node}`{by}{inside}\n  at {where}\n  cause: {self.cause}; {self.detail}"


@dataclass
class Localisation:
    """Where a candidate leaves the model.

    Attributes:
        first: the first op to blame, None when every value is explained by its inputs.
        others: further ops whose value their inputs do not explain.
        along: total errors along the model's graph, in order.
        amplifiers: nodes that multiplied the error they were given most, worst first: not to blame.
        compared: how many nodes were compared; unmatched: how many of the model's the candidate does not have.
        unseen: deviations that reach no output: values that a later op throws away.
    """

    first: Blame | None = None
    others: list[Blame] = field(default_factory=list)
    along: list[NodeError] = field(default_factory=list)
    amplifiers: list[NodeError] = field(default_factory=list)
    compared: int = 0
    unmatched: int = 0
    unseen: int = 0
