"""Branches on tensor values, removed: all paths of a model in one graph, with ``where`` where they differ.

The model is traced again with one answer flipped at a time (:mod:`~nxfx.capture.merging.explore`). What the paths have in common is one
node; where they meet, what differs is chosen by the conditions, and the choice moves up as far as both sides do the same
(:mod:`~nxfx.capture.merging.sink`). What then still runs for one side only must be harmless for the inputs of the other
(:mod:`~nxfx.capture.merging.speculation`). At the end the graph is compared with every trace that it was made from: under the answers of
that trace it is the same graph.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from nxfx.capture import branches, errors
from nxfx.capture.merging import conventions, joints, speculation
from nxfx.capture.merging.decisions import Decisions
from nxfx.capture.merging.explore import Exploration, Fork, Unmergeable, Way, explore
from nxfx.capture.merging.proof import Mismatch, Proof, order
from nxfx.capture.merging.selects import Selects
from nxfx.capture.merging.sink import sink
from nxfx.capture.merging.sources import Sources
from nxfx.capture.path import Traced, Tracer
from nxfx.capture.session import Site
from nxfx.capture.shell import Convention
from nxfx.errors import CaptureError
from nxfx.report.rewrites import Kind, Rewrite

MAX_TRACES = 16
_MOST_ATTEMPTS = 8  # each tells two more paths apart


def merged(tracer: Tracer, max_traces: int = MAX_TRACES) -> Traced:
    """The model as one graph, whatever it branches on.

    Raises:
        CaptureError: it cannot be captured, or a branch has no data-flow form; says which line and why.
    """
    first = tracer.trace()
    if not first.session.sites:
        return first
    traces = _Traces(tracer, first, max_traces)
    try:
        if len(first.session.sites) >= max_traces:
            raise Unmergeable(_too_many([first], max_traces), first.session.sites[0] if max_traces > 1 else None)
        return _converted(traces)
    except (Unmergeable, CaptureError) as error:
        raise branches.refusal([p.session for p in traces.known.values()], type(tracer.model).__name__, error) from error


def _converted(traces: _Traces) -> Traced:
    """One graph of the paths that meet again; of all paths, each followed to its end, where those do not go on alike."""
    for _ in range(_MOST_ATTEMPTS):
        try:
            return _Conversion(explore(traces.start(), traces.trace, joints.meets), traces.tracer.training).run()
        except joints.Apart:
            traces.anew()
        except Mismatch:
            traces.anew()
            break
    try:
        return _Conversion(explore(traces.start(), traces.trace, joints.never), traces.tracer.training).run()
    except Mismatch as unproved:
        raise Unmergeable(f"it is not proved that one graph computes what each side does ({unproved})") from unproved


class _Traces:
    """The traces of a model by the answers they were asked for, as many as are allowed."""

    def __init__(self, tracer: Tracer, first: Traced, most: int) -> None:
        self.tracer = tracer
        self.most = most
        self.known: dict[tuple[bool, ...], Traced] = {(): first}
        self.asked: set[tuple[bool, ...]] = {()}

    def start(self) -> Traced:
        """The first path that does not raise, the one whose graph becomes that of all."""
        path = self.trace(())
        if path.raised is not None:
            name = type(self.tracer.model).__name__
            raise errors.translate(path.raised, model_name=name, model=self.tracer.model) from path.raised
        return path

    def trace(self, answers: Sequence[bool]) -> Traced:
        """The path with these answers; those after them are True, or False where the model raises otherwise."""
        path = self._trace(tuple(answers))
        if path.raised is None:
            return path
        given = path.answers
        for position in range(len(given) - 1, len(answers) - 1, -1):
            other = self.trace((*given[:position], not given[position]))
            if other.raised is None:
                return other
        return path

    def _trace(self, answers: tuple[bool, ...]) -> Traced:
        self.asked.add(answers)
        if len(self.asked) > self.most:
            raise Unmergeable(_too_many(self.known.values(), self.most))
        if answers not in self.known:
            self.known[answers] = self.tracer.trace(answers)
        return self.known[answers]

    def anew(self) -> None:
        """Start again: the graph of the first path was used up. What was learned of where it stands is kept."""
        used = self.start()
        again = self.known[used.decisions] = self.tracer.trace(used.decisions)
        for before, now in zip(used.session.sites, again.session.sites, strict=True):
            if before.standpoint is not None and now.standpoint is not None:
                now.standpoint.written |= before.standpoint.written
        self.asked = {()}


def _too_many(paths: Any, max_traces: int) -> str:
    most = max(len(path.session.sites) for path in paths)
    return (
        f"following both sides of {most} branches takes more than the {max_traces} traces that are allowed: "
        f"pass max_traces={2 * max(most + 1, max_traces)} or more"
    )


class _Conversion:
    """From an exploration to one graph: that of the first path, with what the others have beside it."""

    def __init__(self, exploration: Exploration, training: bool) -> None:
        self.exploration = exploration
        self.training = training
        self.host = exploration.paths[0]
        self.paths = [p for p in exploration.paths if p.raised is None]
        self.decisions = Decisions()
        self.selects = Selects(self.host.graph_module.graph, self.decisions)
        self.sources = Sources(self.host)
        self.reached: dict[int, Any] = {}
        self.passed = {id(p): list(_passed(exploration, p)) for p in self.paths}
        self.seen: dict[int, Counter[Any]] = {id(p): Counter() for p in self.paths}
        self.values = {id(p): self.sources.of(p) for p in self.paths}
        self.copied = joints.originals(self.paths)
        self.pieces = {id(p): list(_pieces(p)) for p in self.paths}

    def run(self) -> Traced:
        convention = conventions.common(self.paths, self._parting)
        names = self.sources.names(self.paths)
        proof = Proof(self.sources, self.paths, names)
        self._place_all()
        self.sources.finish({name: self._end(name) for name in names})
        sink(self.selects)
        order(self.selects, lambda node: self.training or speculation.is_dangerous(node))
        speculation.make_safe(self.selects, self.training)
        order(self.selects)
        proof.check(self.selects, self.exploration)
        self._drop_clones()
        return self._record(convention)

    def _drop_clones(self) -> None:
        """What a branch read was cloned, since the model may write it later; in a graph that writes nothing the original does."""
        for condition in self.selects.conditions.values():
            if not condition._erased and condition.target is torch.ops.aten.clone.default and condition.users:
                condition.replace_all_uses_with(condition.all_input_nodes[0])
                self.selects.graph.erase_node(condition)

    # --- placing -----------------------------------------------------------------------------------------------------

    def _place_all(self) -> None:
        for path in self.paths:
            self._place(path, 0)
        for fork in self.exploration.forks:
            self._join(fork)
            for path in self._through(fork):
                self._place(path, fork.index + 1)

    def _through(self, fork: Fork) -> list[Traced]:
        """The paths that come through ``fork`` as it was first come to."""
        return [p for p in self.paths if fork.index < len(self.passed[id(p)]) and self.passed[id(p)][fork.index] is fork]

    def _place(self, path: Traced, piece: int) -> None:
        """Make the nodes of ``path`` that run before its site number ``piece``, and after the one before that."""
        pieces, values = self.pieces[id(path)], self.values[id(path)]
        if piece >= len(pieces) or piece > len(self.passed[id(path)]):
            return
        guard = self._guard(path, piece)
        for node in pieces[piece]:
            # What runs on several ways must not use what only one of them has computed.
            for operand in node.all_input_nodes:
                if not self.decisions.implies(guard, self.selects.guards.get(values[operand], True)):
                    raise Mismatch(f"{operand} is not there on every way to {node}")
            values[node] = self.selects.place(node, values.__getitem__, self.seen[id(path)], guard)

    def _guard(self, path: Traced, piece: int) -> Any:
        """When this piece of ``path`` runs."""
        if piece == 0:
            return True
        fork = self.passed[id(path)][piece - 1]
        return self._taken(fork, path.answers[piece - 1])

    def _taken(self, fork: Fork, answer: bool) -> Any:
        reached = self.reached[fork.number]
        if fork.is_check:
            return reached
        test = self.decisions.test(fork.number, True, False) if answer else self.decisions.test(fork.number, False, True)
        return self.decisions.both(reached, test)

    def _arriving(self, fork: Fork | None) -> list[tuple[Any, Way]]:
        """The ways that lead to ``fork``, or to the end, each with when it is taken."""
        ways = [(start, answer, way) for start, answer, way in self.exploration.ways() if way.fork is fork and not way.raises]
        return [(True if start is None else self._taken(start, answer), way) for start, answer, way in ways]

    def _join(self, fork: Fork) -> None:
        """Where several ways lead to ``fork``, what they bring along is chosen between."""
        arriving = self._arriving(fork)
        reached: Any = False
        for guard, _ in arriving:
            reached = self.decisions.either(reached, guard)
        self.reached[fork.number] = reached
        self.selects.sites[fork.number] = fork.site
        if len(arriving) > 1:
            brought = [(guard, way, self.values[id(way.path)]) for guard, way in arriving]
            through = self._through(fork)
            own, choose = self.values[id(fork.path)], lambda options: self._choose(options, reached)
            joined = joints.joined(fork, brought, own, through, self.copied, choose)
            for path in through:
                values = self.values[id(path)]
                values.update({node: joined[value] for node, value in values.items() if value in joined})
        condition = self.selects.conditions[fork.number] = self.values[id(fork.path)][fork.path.marks[fork.index][0]]
        self.selects.ranks.setdefault(condition, fork.number)

    def _choose(self, options: list[tuple[Any, Any]], reached: Any = True) -> Any:
        """The node that has the value whose guard holds; nothing is said of inputs on which ``reached`` does not hold."""
        function: Any = options[-1][1]
        if all(value is function or value == function for _, value in options):
            return function
        for guard, value in reversed(options[:-1]):
            function = self.decisions.choose(guard, value, function)
        return self.selects.select(self.decisions.within(function, reached))

    # --- the end -----------------------------------------------------------------------------------------------------

    def _end(self, name: Any) -> Any:
        """An output, or what a buffer or input holds in the end, chosen between the ways that end."""
        arriving = self._arriving(None)
        return self._choose([(guard, self.sources.left(way.path, name, self.values[id(way.path)])) for guard, way in arriving])

    def _parting(self, one: Traced, other: Traced) -> Site | None:
        """The branch at which two paths part."""
        both = zip(self.passed[id(one)], one.answers, self.passed[id(other)], other.answers, strict=False)
        return next((f.site for f, a, g, b in both if f is g and a != b), None)

    def _record(self, convention: Convention) -> Traced:
        host = self.host
        conventions.collect(host, self.paths)
        host.convention, host.sources = convention, self.sources.all
        for fork in self.exploration.forks:
            if fork.is_check:
                branches.note_check(host.session, fork.site)
                continue
            before = f"{fork.site.kind} on a tensor's value"
            host.session.rewrites.append(
                Rewrite("capture", "branch.both-sides", Kind.EXACT, fork.site.location, before, "where(condition, one side, the other)")
            )
        return host


def _passed(exploration: Exploration, path: Traced) -> Iterator[Fork]:
    """The forks that ``path`` comes through as it was explored: up to where it meets another path, or to its end."""
    way, number = exploration.start, 0
    while way.fork is not None and number < len(path.session.sites):
        fork = way.fork
        if way.meets:
            return  # another path's from here on
        yield fork
        way = fork.ways[path.answers[number]]
        number += 1


def _pieces(path: Traced) -> Iterator[list[fx.Node]]:
    """The nodes of ``path``, cut after what each site reads."""
    ends = {marks[0] for marks in path.marks}
    piece: list[fx.Node] = []
    for node in path.graph_module.graph.nodes:
        if node.op != "call_function":
            continue
        piece.append(node)
        if node in ends:
            yield piece
            piece = []
    yield piece
