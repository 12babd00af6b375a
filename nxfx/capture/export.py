"""Model → flat functional graph, by non-strict ``torch.export`` of a shell (strict export is the one fallback)."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from nxfx.analysis.dtype_rules import integer_bounds, is_integral
from nxfx.analysis.provenance import Premise, Role, Source
from nxfx.capture.counting import captured
from nxfx.capture.merging.merge import MAX_TRACES
from nxfx.capture.path import Tracer, autocast_state
from nxfx.capture.shell import Convention, bind, parameter_names
from nxfx.capture.state import Change, Place, line_that_writes, writing_line
from nxfx.capture.structure import Flat, Path, at, flatten, leaf_names
from nxfx.capture.unlift import inputs_to_buffers
from nxfx.errors import CaptureError, UsageError
from nxfx.graph import meta
from nxfx.report import Finding, Kind, Rewrite, Severity

Ranges = dict[str, tuple[int, int]]


@dataclass
class Capture:
    """A model's graph in normal form: flat tensors in, flat tensors out, weights as ``get_attr`` of the model's own tensors.

    Attributes:
        graph_module: outputs in this order: the user's (with values left in arguments and attributes), then mutated buffers, then
            mutated inputs.
        convention: how flat tensors become the model's call and results.
        sources: node name → origin, for placeholders and ``get_attr`` nodes.
        mutated_buffers: fully qualified name → output index.
        mutated_inputs: input name → output index.
        example_inputs: the flat example.
        rewrites, findings: what capture itself did and saw.
        timings: seconds of ``capture`` and ``normalise``.
        captured_by: ``"non-strict"`` or ``"strict"``.
        plain_tensors: name → where the model keeps a tensor that is not registered.
        state_inputs: input leaf that became a buffer → name of that buffer.
        premises: what the graph rests on before any pass.
    """

    graph_module: fx.GraphModule
    convention: Convention
    sources: dict[str, Source]
    mutated_buffers: dict[str, int]
    mutated_inputs: dict[str, int]
    example_inputs: tuple[torch.Tensor, ...]
    rewrites: list[Rewrite] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=dict)
    captured_by: str = "non-strict"
    plain_tensors: dict[str, Any] = field(default_factory=dict)
    state_inputs: dict[str, str] = field(default_factory=dict)
    premises: list[Premise] = field(default_factory=list)

    def forget_values(self, names: Iterable[str]) -> None:
        """The parameters and buffers called ``names`` will hold other values: nothing may be proved from the present ones."""
        unknown = set(names)
        for node, source in self.sources.items():
            if source.name in unknown and source.role in (Role.PARAMETER, Role.BUFFER):
                self.sources[node] = replace(source, value=None)


def input_names(flat: Flat, positional: list[str]) -> list[str]:
    """One name per input leaf, after the model's own parameters."""
    paths: list[Path] = []
    for path in flat.paths:
        where, key, *rest = path
        first = positional[key] if where == 0 and key < len(positional) else key
        paths.append((first, *rest))
    return leaf_names(paths)


def capture(
    model: torch.nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    ranges: dict[str, tuple[int, int]] | None = None,
    training: bool = False,
    state_inputs: Sequence[str] = (),
    max_traces: int = MAX_TRACES,
) -> Capture:
    """Capture ``model`` called with ``args`` and ``kwargs``. The model is left exactly as it was.

    Args:
        dynamic_shapes: as ``torch.export.export`` takes it, keyed by the names of ``forward``'s parameters.
        ranges: input name → declared inclusive integer range.
        training: keep autograd semantics (``no_grad`` regions become detaches) instead of capturing under ``no_grad``.
        state_inputs: inputs (by argument or leaf name) that become buffers of the graph.
        max_traces: how often the model may be traced to follow both sides of its branches; 1 leaves every branch and refuses it.

    Raises:
        CaptureError: names the construct that cannot be captured and the user's line.
        TypeError: the arguments do not fit the model's signature.
    """
    args, kwargs, positional = bind(model, args, kwargs or {})
    flat = flatten((args, kwargs), share=True)
    scripted = [n or type(model).__name__ for n, m in model.named_modules() if isinstance(m, torch.jit.ScriptModule)]
    if scripted:
        raise CaptureError(f"{scripted[0]!r} is a TorchScript module: use the nn.Module that it was made from", construct="TorchScript")
    names = input_names(flat, positional)
    dtypes = {n: leaf.dtype for n, leaf in zip(names, flat.leaves, strict=True) if isinstance(leaf, torch.Tensor)}
    ranges = _check_ranges(ranges or {}, dtypes, positional + list(kwargs), model)
    state_example = _state_example(state_inputs, flat, names)
    shapes = _flat_dynamic_shapes(dynamic_shapes, flat, positional, names)
    counted = captured(Tracer(model, flat, names, ranges, shapes, training), max_traces)
    path = counted.path
    convention, session = path.convention, path.session
    _note_examples(path.sources, dict(zip(names, flat.leaves, strict=True)))
    if convention.output_count == 0:
        raise CaptureError(f"{type(model).__name__}.forward returns no tensor: there is nothing to compile", construct="no tensor output")
    return Capture(
        path.graph_module,
        convention,
        path.sources,
        path.mutated_buffers,
        path.mutated_inputs,
        tuple(flat.leaves),
        [*session.rewrites, *(_rebinding(model, change) for change in convention.rebound)],
        [
            *session.findings,
            *path.findings,
            *_state_findings(model, convention, counted.stays),
            *_argument_findings((args, kwargs), positional, convention),
        ],
        path.timings,
        path.captured_by,
        state_inputs=inputs_to_buffers(path.graph_module, path.sources, state_example, path.mutated_buffers, path.mutated_inputs),
        plain_tensors=path.plain_tensors,
    )


@contextlib.contextmanager
def without_autocast() -> Iterator[None]:
    """No autocast in the block: the captured graph holds its casts already, and another round would add some."""
    with contextlib.ExitStack() as stack:
        while (active := autocast_state()) is not None:
            stack.enter_context(torch.autocast(active[0], enabled=False))
        yield


def _flat_dynamic_shapes(dynamic_shapes: Any, flat: Flat, positional: list[str], names: list[str]) -> Any:
    if dynamic_shapes is None:
        return None
    if isinstance(dynamic_shapes, (tuple, list)):
        dynamic_shapes = dict(zip(positional, dynamic_shapes, strict=False))
    result: dict[str, Any] = {}
    for name, path in zip(names, flat.paths, strict=True):
        where, key, *rest = path
        spec: Any = dynamic_shapes
        for step in ((positional[key] if where == 0 and key < len(positional) else key), *rest):
            if spec is None:
                break
            if isinstance(spec, dict):
                spec = spec.get(step)
            elif isinstance(spec, (list, tuple)) and isinstance(step, int) and step < len(spec):
                spec = spec[step]
            else:
                spec = None
        result[name] = spec
    return result


def _note_examples(sources: dict[str, Source], leaves: dict[str, Any]) -> None:
    """The extremes of the example's int64 inputs."""
    for node, source in sources.items():
        value = leaves.get(source.name) if source.role is Role.INPUT else None
        if not isinstance(value, torch.Tensor) or value.is_meta or isinstance(value, meta.FakeTensor):
            continue
        if value.dtype is torch.int64 and value.numel():
            low, high = torch.aminmax(value.detach())
            sources[node] = dataclasses.replace(source, seen=(int(low), int(high)))


def _check_ranges(ranges: Ranges, leaves: dict[str, torch.dtype], arguments: list[str], model: torch.nn.Module) -> Ranges:
    """Ranges by leaf name; an argument's name stands for all its integer leaves, and gives way to the name of a leaf."""
    found: Ranges = {}
    for name, bounds in sorted(ranges.items(), key=lambda item: item[0] in leaves):
        if not (isinstance(bounds, (tuple, list)) and len(bounds) == 2 and all(isinstance(b, int) for b in bounds)):
            raise UsageError(f"ranges: {name!r} wants two integers (low, high), not {bounds!r}")
        low, high = bounds
        if low > high:
            raise UsageError(f"ranges: {name!r} has low {low} above high {high}")
        matching = [n for n in leaves if n == name] or [n for n in leaves if name in arguments and n.startswith(f"{name}_")]
        if not matching and name not in parameter_names(model):
            near = difflib.get_close_matches(name, leaves, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else f" The inputs are: {', '.join(leaves)}."
            raise UsageError(f"ranges: no input {name!r}.{hint}")
        integers = [n for n in matching if is_integral(leaves[n])]
        if matching and not integers:
            dtype = str(leaves[matching[0]]).removeprefix("torch.")
            raise UsageError(f"ranges: {name!r} is {dtype}, and ranges are of integers")
        for leaf in integers:
            first, last = integer_bounds(leaves[leaf])
            if high < first or low > last:
                raise UsageError(f"ranges: no {str(leaves[leaf]).removeprefix('torch.')} is in [{low}, {high}], declared for {leaf!r}")
        found |= dict.fromkeys(integers, (int(low), int(high)))
    return found


def _state_example(state_inputs: Sequence[str], flat: Flat, names: list[str]) -> dict[str, torch.Tensor]:
    """The leaves that ``state_inputs`` mean: a leaf by its name, or all leaves of an argument."""
    chosen = {}
    for wanted in state_inputs:
        matching = [n for n in names if n == wanted or n.startswith(f"{wanted}_")]
        if not matching:
            near = difflib.get_close_matches(wanted, names, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else f" The inputs are: {', '.join(names)}."
            raise UsageError(f"state_inputs: no input {wanted!r}.{hint}")
        chosen.update({n: flat.leaves[names.index(n)] for n in matching})
    return chosen


def _rebinding(model: torch.nn.Module, change: Change) -> Rewrite:
    before, after = f"self.{change.path} = a new tensor", "the buffer that stands for it is written"
    return Rewrite("capture", "state.rebound-buffer", Kind.EXACT, writing_line(model, change), before, after)


def _argument_findings(arguments: Any, positional: list[str], convention: Convention) -> list[Finding]:
    """Numbers that an argument's own Python state counts, such as the length that a cache has seen."""
    findings = []
    for path, was, now in convention.counted_arguments():
        where, key, *rest = path
        first = positional[key] if where == 0 and key < len(positional) else key
        message = (
            f"forward changes {'.'.join(map(str, (first, *rest)))!r} of an argument from {was!r} to {now!r}: the value at capture is baked "
            "into the graph; prepared calls capture again when it differs, a compiled graph cannot"
        )
        fix = "keep it as a 0-d tensor, as a static cache does, or pass it as one"
        location = line_that_writes(type(at(arguments, path[:-1])), str(path[-1]))
        findings.append(Finding("NX406", Severity.WARNING, message, location, "", fix))
    return findings


def _state_findings(model: torch.nn.Module, convention: Convention, stays: dict[Place, str]) -> list[Finding]:
    findings = []
    for change in convention.state_changes:
        tensors = flatten(change.after).leaves
        if change.path in convention.views:
            message = (
                f"forward leaves a part of another tensor in {change.path!r}: prepared calls leave a copy, which does not follow what is "
                "written to that tensor later"
            )
            severity = Severity.ERROR
        elif tensors and not change.removed:
            message = f"forward rebinds the attribute {change.path!r} to a tensor: prepared calls do too, a compiled graph does not"
            severity = Severity.WARNING
        else:
            message = (
                f"forward changes the Python attribute {change.path!r} from {change.before!r} to {change.after!r}: the value at capture is "
                "baked into the graph; prepared calls capture again when it differs, a compiled graph cannot"
            )
            severity = Severity.ERROR
            reason = stays.get((change.holder.path, change.key))
            message += f". It cannot become a buffer: {reason}" if reason else ""
        location = writing_line(model, change)
        fix = "register it as a buffer and update it in place with tensor operations"
        findings.append(Finding("NX406", severity, message, location, "", fix))
    return findings
