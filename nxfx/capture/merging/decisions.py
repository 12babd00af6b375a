"""When a part of a model runs: Boolean functions of the answers at its branches, as reduced ordered decision diagrams.

A function is ``True``, ``False`` or a :class:`Test`, and equal functions are the same object, so that "runs always" is a
look and not a proof. With anything else at the leaves a diagram says which value holds when. The branches are numbered
in an order that every path through the model keeps.

Source: Bryant, "Graph-Based Algorithms for Boolean Function Manipulation", IEEE Transactions on Computers 35 (1986).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, eq=False)
class Test:
    """``yes`` where branch number ``branch`` is taken, else ``no``."""

    branch: int
    yes: Any
    no: Any


class Decisions:
    """The diagrams of one model."""

    def __init__(self) -> None:
        self._made: dict[tuple[int, int, int], Test] = {}
        self._support: dict[Test, frozenset[int]] = {}
        self._chosen: dict[tuple[int, int, int], tuple[Any, Any]] = {}  # with the operands, whose ids are the key

    def test(self, branch: int, yes: Any, no: Any) -> Any:
        """``yes`` if the branch is taken, else ``no``."""
        if yes is no:
            return yes
        key = (branch, id(yes), id(no))
        if key not in self._made:
            self._made[key] = Test(branch, yes, no)
        return self._made[key]

    def choose(self, condition: Any, yes: Any, no: Any) -> Any:
        """``yes`` where ``condition`` holds, else ``no``; either may be a function or a value."""
        if condition is True or yes is no:
            return yes
        if condition is False:
            return no
        key = (id(condition), id(yes), id(no))
        if key not in self._chosen:
            first = min(f.branch for f in (condition, yes, no) if isinstance(f, Test))
            halves = [
                self.choose(*(getattr(f, side) if isinstance(f, Test) and f.branch == first else f for f in (condition, yes, no)))
                for side in ("yes", "no")
            ]
            self._chosen[key] = self.test(first, *halves), (condition, yes, no)
        return self._chosen[key][0]

    def both(self, one: Any, other: Any) -> Any:
        return self.choose(one, other, False)

    def either(self, one: Any, other: Any) -> Any:
        return self.choose(one, True, other)

    def implies(self, one: Any, other: Any) -> bool:
        """Whether ``other`` holds wherever ``one`` does."""
        return other is True or self.choose(one, other, True) is True

    def within(self, function: Any, reached: Any) -> Any:
        """A function that agrees with ``function`` wherever ``reached`` holds, and is simpler: the rest does not matter."""
        if not isinstance(function, Test) or reached is True or reached is False:
            return function
        if isinstance(reached, Test) and reached.branch < function.branch:
            # Both halves of what is reached may differ: only what holds for either of them helps.
            return self.within(function, self.either(reached.yes, reached.no))
        yes, no = (reached.yes, reached.no) if reached.branch == function.branch else (reached, reached)
        if yes is False:
            return self.within(function.no, no)
        if no is False:
            return self.within(function.yes, yes)
        return self.test(function.branch, self.within(function.yes, yes), self.within(function.no, no))

    def support(self, function: Any) -> frozenset[int]:
        """The branches that ``function`` depends on."""
        if not isinstance(function, Test):
            return frozenset()
        if function not in self._support:
            self._support[function] = frozenset((function.branch,)) | self.support(function.yes) | self.support(function.no)
        return self._support[function]

    @staticmethod
    def value(function: Any, answers: dict[int, bool]) -> Any:
        """What ``function`` gives for these answers; a branch that is not among them is taken."""
        while isinstance(function, Test):
            function = function.yes if answers.get(function.branch, True) else function.no
        return function
