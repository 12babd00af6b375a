"""The paths of a model through its branches, found by tracing it again with one answer flipped at a time.

A :class:`Fork` is a place on a path where a branch asks; from it two ways lead on, each to another fork or to the end. Two paths
that come to the same place with the same Python state go on alike and share the forks from there, so that independent branches
cost one trace each; where they differ all paths are followed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from nxfx.capture.path import Traced
from nxfx.capture.session import Site


class Unmergeable(Exception):
    """The branch at ``site`` has no data-flow form; the message says why, as the end of a sentence."""

    def __init__(self, reason: str, site: Site | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.site = site


@dataclass
class Way:
    """What follows on an answer: the part of ``path`` after its site number ``start`` (-1: the whole path).

    Attributes:
        fork: the fork it leads to, None: the end of the path.
        meets: another path has come to ``fork`` before.
        stop: number of the site on ``path`` at which it meets ``fork``; the number of its sites at the end.
    """

    path: Traced
    start: int
    stop: int
    fork: Fork | None = None
    meets: bool = False

    @property
    def raises(self) -> bool:
        """Whether it ends in an exception of the model, however the branches on it are answered."""
        if self.fork is None:
            return self.path.raised is not None
        return all(way.raises for way in self.fork.ways.values())


@dataclass
class Fork:
    """Site number ``index`` of ``path``, the path that came here first."""

    path: Traced
    index: int
    ways: dict[bool, Way] = field(default_factory=dict)
    number: int = -1

    @property
    def site(self) -> Site:
        return self.path.session.sites[self.index]

    @property
    def is_check(self) -> bool:
        """Whether one answer ends in an exception: like an assertion, the other is taken to hold."""
        return any(way.raises for way in self.ways.values())


Trace = Callable[[Sequence[bool]], Traced]
Meets = Callable[[Traced, int, Traced, int], bool]


@dataclass
class Exploration:
    """All paths of a model.

    Attributes:
        forks: in an order that every path keeps.
        start: what comes before the first fork.
        paths: every trace that was made.
    """

    forks: list[Fork]
    start: Way
    paths: list[Traced]

    def ways(self) -> Iterator[tuple[Fork | None, bool, Way]]:
        """Every way with where it comes from, in order."""
        yield None, True, self.start
        for fork in self.forks:
            for answer, way in fork.ways.items():
                yield fork, answer, way


def explore(first: Traced, trace: Trace, meets: Meets) -> Exploration:
    """Follow both answers at every branch.

    Args:
        first: the path on which every answer is True.
        trace: traces the model with the given answers to its first branches, True to the others.
        meets: whether the rest of the model is the same function at a site of one path and a site of another.

    Raises:
        Unmergeable: a loop has no end, or a value cannot be asked for again.
    """
    found = Exploration([], Way(first, -1, 0), [first])
    _follow(found, first, 0, None, found.start, meets)
    position = 0
    while position < len(found.forks):
        fork = found.forks[position]
        for answer in (True, False):
            if answer not in fork.ways:
                path = trace([*fork.path.answers[: fork.index], answer])
                found.paths.append(path)
                way = fork.ways[answer] = Way(path, fork.index, fork.index + 1)
                _follow(found, path, fork.index + 1, fork, way, meets)
        position += 1
    for number, fork in enumerate(found.forks):
        fork.number = number
    return found


def _follow(found: Exploration, path: Traced, index: int, fork: Fork | None, way: Way, meets: Meets) -> None:
    """Enter what ``path`` meets from site ``index`` on; ``way`` is the one that led there, out of ``fork``."""
    if path.raised is not None:
        return  # whatever is answered on it: the caller has tried
    place = found.forks.index(fork) + 1 if fork is not None else 0
    later = found.forks[place:]
    for number in range(index, len(path.session.sites)):
        site = path.session.sites[number]
        way.stop = number
        way.fork = next((f for f in later if meets(f.path, f.index, path, number)), None)
        if way.fork is not None:
            way.meets = True
            return
        if site.exhausted:
            raise Unmergeable("the loop has no bound but the tensor's value", site)
        if site.condition is None:
            raise Unmergeable("the number from .item() went through more arithmetic than can be done again on the tensor", site)
        fork = way.fork = Fork(path, number)
        found.forks.insert(place, fork)
        place += 1
        fork.ways[bool(site.answer)] = way = Way(path, number, number + 1)
    way.stop, way.fork = len(path.session.sites), None
