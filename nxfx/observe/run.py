"""Run a model eagerly on its example, and on inputs like it, and list where values decide."""

from __future__ import annotations

import contextlib
import io
import itertools
import random
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch

from nxfx.capture.export import input_names
from nxfx.capture.shell import bind
from nxfx.capture.state import Change, ModuleState
from nxfx.capture.structure import flatten
from nxfx.errors import CaptureError
from nxfx.graph.meta import FakeTensor
from nxfx.observe import python_state, routes, watch
from nxfx.observe.aims import Aims, Range
from nxfx.observe.recorder import DispatchMode, Event, FunctionMode, Key, Record
from nxfx.observe.variations import Call, clones, duplicate
from nxfx.observe.variations import variations as varied_calls
from nxfx.observe.watch import Probe
from nxfx.report.sites import ValueSite

SHOWN_VALUES = 6
_TRIES = 2  # inputs for each run that is wanted: a model may refuse one
_NEVER_TESTED = frozenset({"random", "copy"})
_FLAG = "its value was the same for {} inputs: if it is a setting, make it a Python flag decided before the model is compiled"


@dataclass
class Observation:
    """What the eager runs showed.

    Attributes:
        sites: in the order of the first time each ran; those that only a varied input reached come last, with a count of 0.
        error: what the run on the example raised; the list ends there.
    """

    sites: list[ValueSite] = field(default_factory=list)
    error: Exception | None = None


def observe(
    model: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    ranges: dict[str, tuple[int, int]] | None = None,
    variations: int = 1,
) -> Observation:
    """Run ``model`` on the example and list every place where a value reaches Python, a shape or the host.

    The model, its arguments and the random generators are left as they were; what the model prints is dropped. Where such places are
    found, the model runs on another input too, one that turns the conditions on inputs which the example met, to tell the places that
    never change from the ones that do. Nothing is run where there are no values: on the meta device, on fake tensors.

    Args:
        ranges: input name → declared inclusive range, as :func:`nxfx.prepare` takes it.
        variations: on how many other inputs the model runs.

    Raises:
        TypeError: the arguments do not fit the model's signature.
    """
    args, kwargs, positional = bind(model, args, kwargs)
    call: Call = (args, kwargs)
    try:
        flat = flatten(call, share=True)
    except CaptureError:  # tensors where they cannot be told apart: the example is all there is to run
        flat = flatten(())
    if not _has_values([*model.parameters(), *model.buffers(), *(leaf for leaf in flat.leaves if isinstance(leaf, torch.Tensor))]):
        return Observation()
    declared = _declared(ranges or {}, input_names(flat, positional))
    leaves = clones(flat)
    first = _run(model, duplicate(call, flat, leaves), aims=Aims(leaves))
    record, found = first.record, Observation(error=first.error)
    tests: dict[str, Record] = {}
    if flat.leaves and any(event.reading.role not in _NEVER_TESTED for event in record.events.values()):
        others = itertools.islice(varied_calls(call, flat, declared, record.aims.met), _TRIES * variations)
        tests = _varied_runs(model, first, others, variations)
    found.sites = [_site(key, event, tests) for key, event in record.events.items()]
    later = {key: (name, event) for name, other in tests.items() for key, event in other.events.items() if key not in record.events}
    found.sites += [_hidden(name, event) for name, event in later.values()]
    if first.changes or first.draws:

        def watched(probes: list[Probe]) -> watch.Found:
            lines: watch.Found = {}
            _run(model, duplicate(call, flat), lambda forward: lines.update(watch.written_lines(forward, probes)))
            return lines

        found.sites += python_state.sites(model, first.changes, first.draws, watched)
    return found


def _varied_runs(model: torch.nn.Module, first: _Run, calls: Iterable[tuple[str, Call]], wanted: int) -> dict[str, Record]:
    """Runs on the first of ``calls`` that the model takes."""
    found: dict[str, Record] = {}
    for name, call in calls:
        if len(found) >= wanted:
            break
        other = _run(model, call)
        if other.error is None or first.error is not None:
            found[f"{name} ({len(found) + 1})" if name in found else name] = other.record
    return found


def _declared(ranges: dict[str, tuple[int, int]], names: list[str]) -> list[Range]:
    """A leaf's own declaration, else that of the argument it belongs to."""
    by_argument = {n: limits for argument, limits in ranges.items() for n in names if n.startswith(f"{argument}_")}
    return [ranges.get(name, by_argument.get(name)) for name in names]


def _has_values(tensors: list[torch.Tensor]) -> bool:
    return not any(t.is_meta or isinstance(t, FakeTensor) for t in tensors)


# --- one run ---------------------------------------------------------------------------------------------------------


class _Storages:
    """The memory of a model: copied before the first write to it, and put back."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        self.own = {_memory(t) for t in tensors if t.layout is torch.strided}
        self.kept: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def keep(self, written: Iterable[torch.Tensor]) -> None:
        for tensor in written:
            if tensor.layout is torch.strided and (memory := _memory(tensor)) in self.own and memory not in self.kept:
                storage = tensor.untyped_storage()
                self.kept[memory] = (storage, storage.clone())

    def restore(self) -> None:
        for storage, was in self.kept.values():
            storage.copy_(was)


def _memory(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


@dataclass
class _Run:
    """What one run left: its record, what it raised, and what it did to Python state (put back since)."""

    record: Record
    error: Exception | None = None
    changes: list[Change] = field(default_factory=list)
    draws: list[Probe] = field(default_factory=list)


def _run(
    model: torch.nn.Module, call: Call, through: Callable[[Callable[[], Any]], None] = lambda forward: forward(), aims: Aims | None = None
) -> _Run:
    args, kwargs = call
    state, run = ModuleState(model), _Run(Record(aims=aims or Aims(())))
    storages = _Storages([*model.parameters(), *model.buffers(), *(slot.tensor for slot in state.slots())])
    with _aside():
        untouched = [(probe, probe.read()) for probe in watch.generators()]
        try:
            with DispatchMode(run.record, storages.keep), FunctionMode(run.record):
                run.record.entry = sys._getframe()
                through(lambda: model(*args, **kwargs))
        except Exception as raised:
            run.error = raised.with_traceback(None)
        finally:
            run.record.entry = None
            run.record.aims.close()
            run.changes, run.draws = state.changes(), [probe for probe, was in untouched if probe.read() != was]
            state.restore()
            storages.restore()
    return run


@contextlib.contextmanager
def _aside() -> Iterator[None]:
    """Nothing of the run shows outside: no text, no warnings, no gradients, no random numbers used up, nothing compiled."""
    host = random.getstate(), numpy.random.get_state(legacy=False)
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            stack.enter_context(warnings.catch_warnings())
            stack.enter_context(torch.no_grad())
            stack.enter_context(torch.random.fork_rng())
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            warnings.simplefilter("ignore")
            yield
    finally:
        random.setstate(host[0])
        numpy.random.set_state(host[1])


# --- what the runs show ----------------------------------------------------------------------------------------------


def _site(key: Key, event: Event, tests: dict[str, Record]) -> ValueSite:
    values = tuple(dict.fromkeys(value for value in event.history if value))
    shown = values[:SHOWN_VALUES] + (("…",) if len(values) > SHOWN_VALUES else ())
    site = _described(event, shown, event.count)
    if event.reading.role in _NEVER_TESTED or not tests:
        return site
    site.across_inputs = "same"
    for name, other in tests.items():
        there = other.events.get(key)
        if there is None or there.history != event.history:
            site.across_inputs = "changes"
            what = "does not run" if there is None else ", ".join(dict.fromkeys(there.history[:SHOWN_VALUES]))
            site.evidence = f"with {name}: {what}"
            break
    if site.across_inputs == "same" and event.reading.role == "branch":
        site.fix = f"{_FLAG.format(len(tests) + 1)}. Otherwise {site.fix}"
    return site


def _hidden(name: str, event: Event) -> ValueSite:
    site = _described(event, (), 0)
    site.across_inputs, site.evidence = "changes", f"runs only with {name}"
    return site


def _described(event: Event, values: tuple[str, ...], count: int) -> ValueSite:
    reading = event.reading
    return ValueSite(
        reading.kind,
        reading.advice.code,
        event.location,
        event.innermost if event.innermost != event.location else None,
        event.chain,
        count,
        values,
        routes.becomes(reading, values, max(count, 1)),
        fix=reading.advice.fix,
    )
