"""Which pass changed what the graph computes, and which of its rewrites: the first that does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from nxfx import reproducer
from nxfx.capture.export import Capture, without_autocast
from nxfx.captured_call import Recipe
from nxfx.errors import PassError
from nxfx.graph.copying import copy_graph
from nxfx.pipeline import PassContext, Pipeline
from nxfx.report.rewrites import Kind, Rewrite
from nxfx.verification.equivalence import compare
from nxfx.verification.judge import judge
from nxfx.verification.localisation import Blame
from nxfx.verification.localise import localise
from nxfx.verification.precision import Precision


@dataclass(frozen=True)
class Bisection:
    """The change at fault.

    Attributes:
        pass_name: the first pass after which the graph computes something else.
        pipeline: text of the smallest pipeline that shows it.
        differences: what differs, in words.
        first: the node at fault; None when no single node is (the outputs were rewired, for example).
        rewrite: the rewrite that the pass recorded at that line, if it recorded one.
        reproducer: path of a stand-alone script that shows the difference, or None.
    """

    pass_name: str
    pipeline: str
    differences: list[str]
    first: Blame | None
    rewrite: Rewrite | None
    reproducer: str | None

    def __str__(self) -> str:
        lines = [f"pass {self.pass_name!r} changes what the graph computes; smallest pipeline: {self.pipeline!r}"]
        lines += [f"  {d}" for d in self.differences[:3]]
        if self.first is not None:
            lines.append(f"first node: {self.first}")
        if self.rewrite is not None:
            r = self.rewrite
            lines.append(f"rewrite: {r.rule} ({r.kind.value}): {r.before} → {r.after} at {r.location}")
        elif self.first is not None:
            lines.append("the pass recorded no rewrite there")
        if self.reproducer:
            lines.append(f"reproducer: {self.reproducer}")
        return "\n".join(lines)


def run_graph(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> list[Any]:
    """The outputs of a graph that need not have been recompiled; every run draws the same random numbers."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]), without_autocast():
        torch.manual_seed(0)
        return list(fx.Interpreter(graph_module).run(*[t.clone() if isinstance(t, torch.Tensor) else t for t in inputs]))


def differences(before: Sequence[Any], after: Sequence[Any], truth: Callable[[], Sequence[Any]], *, exact: bool) -> list[str]:
    """What a step changed of the outputs that it must keep: bits when it is ``exact``, else the noise floor.

    Args:
        truth: gives the outputs in high precision; asked for only when it is needed.
    """
    strict = compare(list(before), list(after), kind="exact", check_device=False)
    if strict.ok or exact:
        return strict.mismatches
    found = []
    for position, (reference, ours, theirs) in enumerate(zip(truth(), before, after, strict=True)):
        found += [f"output[{position}]: {p}" for p in judge(f"output[{position}]", reference, ours, theirs).problems]
    return found


def is_exact(rewrites: Sequence[Rewrite]) -> bool:
    """Whether all of them promise equal bits."""
    return all(r.kind is Kind.EXACT for r in rewrites)


def bisect_passes(recipe: Recipe, inputs: Sequence[Any], precision: Precision) -> Bisection | None:
    """The first pass after which the graph gives something else on ``inputs``, and its first rewrite that does; None when none does.

    Args:
        inputs: the flat inputs of the captured graph, not narrowed.
    """
    fresh = recipe.capture()
    context = PassContext(recipe.target, dict(fresh.sources), recipe.training)
    graph_module = fresh.graph_module
    outputs = run_graph(graph_module, inputs)
    for position in range(len(recipe.pipeline)):
        before = copy_graph(graph_module)
        known = replace(context, sources=dict(context.sources), premises=list(context.premises), requirements=dict(context.requirements))
        result = recipe.pipeline.part(position, position + 1).run(graph_module, context)
        if not result.changed:
            continue
        now, exact = run_graph(graph_module, inputs), is_exact(result.rewrites)
        wrong = differences(outputs, now, lambda graph=before: precision.run(graph, inputs), exact=exact)  # type: ignore[misc]
        if wrong:
            step = recipe.pipeline.part(position, position + 1)
            found = localise(before, inputs, graph_module, inputs, precision, exact=exact)
            rewrite = _recorded(result.rewrites, found.first)
            smallest = _smallest(recipe, fresh, position, inputs, precision)
            return Bisection(step.names[0], smallest, wrong, found.first, rewrite, _script(before, step, known, wrong, inputs, exact=exact))
        outputs = now
    return None


def _recorded(rewrites: Sequence[Rewrite], blame: Blame | None) -> Rewrite | None:
    """The rewrite at the blamed node's line."""
    if blame is None:
        return None
    here = [r for r in rewrites if (r.location.file, r.location.line) == (blame.location.file, blame.location.line)]
    inside = [r for r in here if r.location.module == blame.location.module]
    return next(iter(inside or here), None)


def _smallest(recipe: Recipe, fresh: Capture, position: int, inputs: Sequence[Any], precision: Precision) -> str:
    """The pass at fault alone if that shows it; else with as few of those before it as it needs."""
    steps = recipe.pipeline.steps

    def shows(kept: list[int]) -> bool:
        graph_module, context = recipe.capture().graph_module, PassContext(recipe.target, dict(fresh.sources), recipe.training)
        for at in kept[:-1]:
            recipe.pipeline.part(at, at + 1).run(graph_module, context)
        before = run_graph(graph_module, inputs)
        was = copy_graph(graph_module)
        result = recipe.pipeline.part(kept[-1], kept[-1] + 1).run(graph_module, context)
        after = run_graph(graph_module, inputs)
        return bool(differences(before, after, lambda: precision.run(was, inputs), exact=is_exact(result.rewrites)))

    kept = [*range(position + 1)]
    if shows([position]):
        kept = [position]
    else:
        for at in range(position):
            fewer = [k for k in kept if k != at]
            if shows(fewer):
                kept = fewer
    some = Pipeline()
    some.steps = tuple(steps[k] for k in kept)
    return str(some)


def _script(
    before: fx.GraphModule, step: Pipeline, context: PassContext, wrong: list[str], inputs: Sequence[Any], *, exact: bool
) -> str | None:
    error = PassError(f"pass {step.names[0]!r} changes what the graph computes:\n" + "\n".join(wrong), pass_name=step.names[0])
    try:
        return reproducer.write_reproducer(before, step, error, context, inputs=list(inputs), exact=exact)
    except Exception:  # what was found must be told, with or without a script
        return None
