"""A record of one change, and the promise it keeps."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from typing import Any

from torch import fx

from nxfx.report.locations import Location, locate


class Kind(str, Enum):
    """The promise a rewrite keeps (DESIGN: never silently wrong)."""

    EXACT = "exact"
    REFINES = "refines"
    REASSOCIATED = "reassociated"


@dataclass
class Rewrite:
    """One rewrite, or ``count`` equal ones on the same line.

    Attributes:
        pass_name: id of the pass.
        rule: countable name of the rule inside the pass, e.g. ``"narrow.argmax-index"``.
        kind: the promise.
        location: the user's line.
        before: what stood there, in short.
        after: what stands there now.
        count: how many equal rewrites this record stands for.
        bound: for ``reassociated``: the measured error bound, in words.
    """

    pass_name: str
    rule: str
    kind: Kind
    location: Location = field(default_factory=Location)
    before: str = ""
    after: str = ""
    count: int = 1
    bound: str = ""

    @classmethod
    def at(cls, node: fx.Node, pass_name: str, rule: str, kind: Kind, before: str, after: str, bound: str = "") -> Rewrite:
        """A rewrite at ``node``'s user line."""
        return cls(pass_name, rule, kind, locate(node), before, after, 1, bound)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "kind": self.kind.value}


def merge(rewrites: list[Rewrite]) -> list[Rewrite]:
    """Equal records folded into one with a count, in order of first appearance."""
    merged: dict[tuple[Any, ...], Rewrite] = {}
    for r in rewrites:
        key = (r.pass_name, r.rule, r.kind, r.location.file, r.location.line, r.before, r.after, r.bound)
        if key in merged:
            merged[key].count += r.count
        else:
            merged[key] = replace(r)  # the caller's own record keeps its count
    return list(merged.values())
