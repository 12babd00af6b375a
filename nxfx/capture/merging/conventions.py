"""What several paths of a model leave in Python: it must be the same, since no tensor can choose between Python values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nxfx.capture.merging.explore import Unmergeable
from nxfx.capture.path import Traced
from nxfx.capture.session import Site
from nxfx.capture.shell import Assigned, Convention
from nxfx.capture.structure import Container, Leaf, Same, Static
from nxfx.report.findings import Finding
from nxfx.report.rewrites import Rewrite


def common(paths: list[Traced], parting: Callable[[Traced, Traced], Site | None]) -> Convention:
    """The calling convention of all ``paths``.

    A result that is the caller's own tensor on one path only becomes a tensor of its own.

    Args:
        parting: the branch at which two paths part.

    Raises:
        Unmergeable: the paths return different structures, or leave different things in arguments or attributes.
    """
    first = paths[0].convention
    for path in paths[1:]:
        other = path.convention
        reason = (
            _difference(first.output_spec, other.output_spec, "return")
            or _assigned(first.arguments_after, other.arguments_after, "leave", "in the arguments")
            or _state(first, other)
        )
        if reason:
            raise Unmergeable(f"its sides {reason}", parting(paths[0], path))
    conventions = [p.convention for p in paths]
    first.passed_through = _shared([c.passed_through for c in conventions])
    first.rebound = list({change.path: change for c in conventions for change in c.rebound}.values())
    first.returned_state = _shared([c.returned_state for c in conventions])
    return first


def collect(into: Traced, paths: list[Traced]) -> None:
    """What was rewritten and found on any path, once."""
    for path in paths:
        if path is into:
            continue
        into.session.rewrites += _new(path.session.rewrites, into.session.rewrites, _rewrite_key)
        into.session.findings += _new(path.session.findings, into.session.findings, _finding_key)
        into.findings += _new(path.findings, into.findings, _finding_key)
        for name, seconds in path.timings.items():
            into.timings[name] = into.timings.get(name, 0.0) + seconds


def _new(records: list[Any], known: list[Any], key: Callable[[Any], Any]) -> list[Any]:
    seen = {key(record) for record in known}
    return [record for record in records if key(record) not in seen]


def _rewrite_key(record: Rewrite) -> Any:
    return record.rule, record.location, record.before, record.after


def _finding_key(record: Finding) -> Any:
    return record.code, record.location, record.message


def _shared(origins: list[dict[int, Any]]) -> dict[int, Any]:
    return {i: origin for i, origin in origins[0].items() if all(other.get(i) == origin for other in origins)}


def _difference(one: Any, other: Any, verb: str) -> str:
    """How two structures differ, in words; ``""`` when they do not."""
    if one == other:
        return ""
    if not isinstance(one, Container) or not isinstance(other, Container):
        return f"{verb} {_shown(one)} and {_shown(other)}"
    if (one.kind, one.type, one.keys) == (other.kind, other.type, other.keys):
        for a, b in zip(one.children, other.children, strict=True):
            found = _difference(a, b, verb)
            if found:
                return found
    return f"{verb} {_shown(one)} and {_shown(other)}"


def _shown(spec: Any) -> str:
    if isinstance(spec, Container):
        return f"a {spec.type.__name__} of {len(spec.children)}"
    if isinstance(spec, Static):
        return repr(spec.value)
    return "a tensor" if isinstance(spec, Leaf) else "an argument" if isinstance(spec, Same) else "nothing"


def _assigned(one: Assigned | None, other: Assigned | None, verb: str, where: str) -> str:
    if one == other:
        return ""
    if one is None or other is None:
        return f"{verb} different things {where}: one changes nothing"
    return _difference(one.spec, other.spec, verb) or f"{verb} tensors of different origin {where}"


def _state(one: Convention, other: Convention) -> str:
    """Python attributes that one path changes and another does not, or in another way."""
    written = [{(id(w.holder.container), w.key): w for w in c.state_writes} for c in (one, other)]
    for key in {**written[0], **written[1]}:
        a, b = written[0].get(key), written[1].get(key)
        path = (a or b).path  # type: ignore[union-attr]  # one of them is there
        if a is None or b is None:
            return f"do not both change the Python attribute {path!r}"
        if a.value != b.value:
            return f"leave different values in the Python attribute {path!r}"
    return ""

