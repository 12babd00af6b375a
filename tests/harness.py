"""Test tools: a functional ATen graph of anything, one pass applied and checked."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from nxfx.analysis.provenance import Role, Source
from nxfx.graph import invariants, walk
from nxfx.pipeline import Pass, PassContext, Pipeline, PipelineResult
from nxfx.verification.equivalence import compare


@dataclass
class Captured:
    """A lifted functional graph: weights are its first placeholders."""

    gm: fx.GraphModule
    context: PassContext
    weights: list[torch.Tensor]

    def __call__(self, *inputs: torch.Tensor) -> Any:
        return self.gm(*self.weights, *inputs)

    def ops(self) -> Counter[str]:
        """How often each op stands in the graph (bodies included)."""
        return Counter(
            str(n.target) for scope in walk.scopes(self.gm) for n in scope.graph_module.graph.nodes if n.op == "call_function"
        )


class _Wrap(torch.nn.Module):
    def __init__(self, fn: Any) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, *args: Any) -> Any:
        return self.fn(*args)


def graph_of(
    model: Any,
    args: Sequence[Any],
    *,
    ranges: dict[str, tuple[int, int]] | None = None,
    dynamic_shapes: Any = None,
    core_aten: bool = False,
) -> Captured:
    """The functional graph of ``model`` (a module or function) on ``args``, weights lifted, with a context that knows its sources."""
    module = model if isinstance(model, torch.nn.Module) else _Wrap(model)
    program = torch.export.export(module, tuple(args), strict=False, dynamic_shapes=dynamic_shapes)
    program = program.run_decompositions() if core_aten else program.run_decompositions({})
    signature = program.graph_signature
    mutated = set(signature.buffers_to_mutate.values())
    sources: dict[str, Source] = {}
    weights: list[torch.Tensor] = []
    for spec in signature.input_specs:
        name = spec.arg.name
        kind = spec.kind.name
        if kind == "USER_INPUT":
            sources[name] = Source(name, Role.INPUT, range=(ranges or {}).get(name))
            continue
        target = str(spec.target)
        value = program.state_dict.get(target, program.constants.get(target))
        role = {"PARAMETER": Role.PARAMETER, "BUFFER": Role.BUFFER}.get(kind, Role.CONSTANT)
        sources[name] = Source(target, role, value, mutated=target in mutated)
        weights.append(value)
    gm = program.graph_module
    return Captured(gm, PassContext(sources=sources), weights)


def run_passes(captured: Captured, *passes: Pass | str) -> PipelineResult:
    """The passes on ``captured`` in place, invariants checked after each."""
    return Pipeline(passes).run(captured.gm, captured.context, verify_each=True)


def assert_invariants(captured: Captured) -> None:
    """Every invariant holds."""
    assert not invariants.check(captured.gm), [str(b) for b in invariants.check(captured.gm)]


def apply_pass(
    step: Pass | str,
    model: Any,
    args: Sequence[Any],
    *,
    more_inputs: Sequence[Sequence[Any]] = (),
    kind: str = "exact",
    ranges: dict[str, tuple[int, int]] | None = None,
    dynamic_shapes: Any = None,
    core_aten: bool = False,
) -> tuple[Captured, PipelineResult]:
    """Capture, apply one pass, check the invariants, idempotence and the numbers against the graph before it.

    ``args`` and each of ``more_inputs`` are run through both graphs and compared strictly (``kind``).
    """
    before = graph_of(model, args, ranges=ranges, dynamic_shapes=dynamic_shapes, core_aten=core_aten)
    after = graph_of(model, args, ranges=ranges, dynamic_shapes=dynamic_shapes, core_aten=core_aten)
    result = run_passes(after, step)
    assert_invariants(after)
    nodes = len(after.gm.graph.nodes)
    again = run_passes(after, step)
    assert not again.changed, f"a second run of {step} changed the graph again: {again.rewrites}"
    assert len(after.gm.graph.nodes) == nodes
    for inputs in (args, *more_inputs):
        expected = before(*copy.deepcopy(list(inputs)))
        actual = after(*copy.deepcopy(list(inputs)))
        outcome = compare(expected, actual, kind=kind)
        assert outcome.ok, outcome.mismatches
    return after, result


def golden(captured: Captured) -> str:
    """The graph as stable text: one line a node, `%name : dtype[shape] = op(args)`; to be compared with expecttest."""
    lines = []
    for node in captured.gm.graph.nodes:
        described = invariants._describe(node.meta.get("val")) if node.op != "output" else ""
        args = ", ".join([*map(str, node.args), *(f"{k}={v}" for k, v in node.kwargs.items())])
        if node.op == "output":
            lines.append(f"return {node.args[0]}")
        elif node.op in ("placeholder", "get_attr"):
            lines.append(f"%{node.name} : {described} = {node.op}[{node.target}]")
        else:
            lines.append(f"%{node.name} : {described} = {node.target}({args})")
    return "\n".join(lines)
