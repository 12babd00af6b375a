"""Value sites: where a tensor's value reaches Python, a shape or the host, as an eager run of the model saw them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from nxfx.report.locations import Location


@dataclass
class ValueSite:
    """One place where what the model does depends on a value, in the order of the first time it ran.

    Attributes:
        kind: the construct as it is written: ``"if"``, ``"while"``, ``"assert"``, ``".item()"``, ``"int()"``, ``"slice bound"``, ...
        code: the finding code that explains it (``"NX401"``).
        location: the user's line; an installed library's where no line is the user's own.
        reads: what reads the value where that is not ``location`` itself: a line of a library.
        chain: the calls inside the user's own code that led there, outermost first, ``location`` last.
        count: how often it ran in one forward on the example.
        values: distinct values seen on the example, in order of appearance, as text; the first few.
        becomes: route → what it turns into there: ``"legacy trace"``, ``"torch.compile"``, ``"TorchNeuron"``, ``"host"``.
        outcome: ``"removed"``: the prepared graph does not read it; ``"reported"``: a finding of the graph stands at this line;
            ``"refused"``: the model was not captured.
        across_inputs: ``"same"`` when every varied input gave the same values, ``"changes"`` when one did not, ``"untested"``.
        evidence: for ``"changes"``, the input that changed it and what came of it.
        fix: what to write instead.
    """

    kind: str
    code: str
    location: Location
    reads: Location | None = None
    chain: tuple[Location, ...] = ()
    count: int = 1
    values: tuple[str, ...] = ()
    becomes: dict[str, str] = field(default_factory=dict)
    outcome: str = ""
    across_inputs: str = "untested"
    evidence: str = ""
    fix: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ValueSite:
        """The inverse of :meth:`to_dict`."""
        places = {
            "location": Location(**data["location"]),
            "reads": Location(**data["reads"]) if data["reads"] else None,
            "chain": tuple(Location(**c) for c in data["chain"]),
        }
        return cls(**{**data, **places, "values": tuple(data["values"])})

    def lines(self) -> list[str]:
        """For a terminal."""
        times = f" ×{self.count}" if self.count > 1 else ""
        seen = f": {', '.join(self.values)}" if self.values else ""
        head = [f"  {self.code} {self.kind}{times}{seen}" + (f" [{self.outcome}]" if self.outcome else "")]
        head.append(f"        at {self.location}" + (f": {self.location.source}" if self.location.source else ""))
        if self.reads is not None:
            head.append(f"        read in {self.reads}: {self.reads.source}")
        if len(self.chain) > 1:
            head.append("        called from " + " → ".join(str(c) for c in self.chain[:-1]))
        if self.outcome != "removed":
            head += [f"        {route}: {text}" for route, text in self.becomes.items()]
        if self.across_inputs == "changes":
            head.append(f"        changes with the input: {self.evidence}")
        elif self.across_inputs == "same":
            head.append("        the same for every input tried")
        return head
