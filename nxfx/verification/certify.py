"""The certificate of ``prepare(..., verify=True)``: model against prepared model, and the graph before and after each pass."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from nxfx.boundary import Boundary, hoist
from nxfx.capture.export import Capture
from nxfx.capture.structure import flatten, unflatten
from nxfx.captured_call import CapturedCall, Recipe
from nxfx.errors import PrepareError, RangeError
from nxfx.graph.copying import copy_graph
from nxfx.graph.meta import FakeTensor
from nxfx.pipeline import PassContext
from nxfx.report import Report
from nxfx.report.certificate import Certificate, CertificateCase
from nxfx.verification.bisect import bisect_passes, differences, is_exact, run_graph
from nxfx.verification.equivalence import compare
from nxfx.verification.generated import generated_calls
from nxfx.verification.judge import judge
from nxfx.verification.precision import Precision
from nxfx.verification.structure import Pairing
from nxfx.verification.subjects import Call, Outcome, run, through

_PRECISION = Precision(torch.float64)
# Library code may take another path while it is traced; a difference of this many epsilons of the largest value is no fault.
_CLOSE = 2**6


def certify(
    model: torch.nn.Module, prepared: Callable[..., Any], call: Call, captured: CapturedCall, *, strict: bool = True
) -> Certificate:
    """Run ``model`` and ``prepared`` on the example and on generated inputs, and each pass on its own.

    Args:
        captured: the capture that serves the example; its recipe says how it was made.
        strict: whether outputs have the model's own dtypes.

    Raises:
        PrepareError: they differ; carries the report with the certificate, and names the pass, the node and a reproducer.
    """
    certificate = captured.report.certificate = Certificate()
    tensors = [*model.parameters(), *model.buffers(), *flatten(call, share=True).leaves]
    if any(isinstance(t, FakeTensor) or (isinstance(t, torch.Tensor) and t.is_meta) for t in tensors):
        certificate.reason = "the model has no weights to run with (they are fake, or on the meta device)"
        return certificate
    assert captured.recipe is not None
    original = captured.recipe.capture()
    reference = _reference(model, original)
    certificate.status = "passed"
    runnable: list[tuple[str, Call]] = []
    failing: Call | None = None
    masked = any(f.code == "NX602" for f in captured.report.findings)
    for name, case in generated_calls(call, captured):
        outcome, detail = _case(model, prepared, case, reference, strict=strict, masked=masked)
        if name == "example" and outcome == "refused at the boundary":
            outcome = "differs"
        certificate.cases.append(CertificateCase(name, outcome, detail))
        if outcome == "differs":
            failing = failing or case
        elif outcome not in ("refused by the model", "refused at the boundary"):
            runnable.append((name, case))
    wrong = _each_pass(captured.recipe, runnable + ([("failing", failing)] if failing else []), reference, certificate)
    if failing is None and wrong is None:
        return certificate
    certificate.status = "failed"
    first = next((c for c in certificate.cases if c.outcome == "differs"), None)
    if first is not None:
        told = f"the prepared model differs from the model on {_named(first.name)}:\n{first.detail}"
    else:
        assert wrong is not None
        told = f"the prepared model differs from the captured one: {wrong[1]}"
    bisection = None
    with contextlib.suppress(Exception):  # the difference must be told, whatever happens while its cause is looked for
        bisection = bisect_passes(captured.recipe, _flat_inputs(reference, failing or (wrong[0] if wrong else call)), _PRECISION)
    certificate.reason = told
    raise PrepareError(told + (f"\n{bisection}" if bisection is not None else ""), captured.report)


def _named(case: str) -> str:
    return "the example" if case == "example" else f"inputs of the kind {case!r}"


def _reference(model: torch.nn.Module, original: Capture) -> CapturedCall:
    """The graph as it was captured, callable like the model."""
    boundary: Boundary = hoist(original.graph_module, original.sources, {})
    original.graph_module.recompile()
    return CapturedCall(model, original, boundary, Report(), check="never", training=False)


def _flat_inputs(reference: CapturedCall, call: Call) -> list[Any]:
    from nxfx.capture.shell import bind

    args, kwargs, _ = bind(reference.model, *call)
    return reference.admit(flatten((args, kwargs), share=True))


def _case(model: torch.nn.Module, prepared: Any, case: Call, reference: CapturedCall, *, strict: bool, masked: bool) -> tuple[str, str]:
    try:
        eager = run(model, case)
    except Exception as error:
        return "refused by the model", f"{type(error).__name__}: {error}"[:200]
    try:
        outcome = run(prepared, case)
    except (RangeError, PrepareError) as error:  # a value or a size that the graph was not made for
        return "refused at the boundary", str(error)[:200]
    except Exception as error:
        return "differs", f"the prepared model raises {type(error).__name__}: {error}"
    if masked:
        outcome = Outcome(*_nan_of((eager.value, eager.left), (outcome.value, outcome.left)))
    if _equal(eager, outcome):
        return "equal", ""
    try:
        truth = through(reference, case, _PRECISION.run, _PRECISION)
    except Exception:  # then the model itself is the reference
        truth = eager
    problems = _problems(eager, outcome, truth, strict=strict)
    return ("differs", "\n".join(problems)) if problems else ("within noise", "")


def _nan_of(expected: Any, actual: Any) -> Any:
    """``actual`` with the nan of ``expected``: rows that are masked whole, which finite-masks makes finite and reports (NX602)."""

    def leaf(ours: Any, theirs: Any) -> Any:
        pair = (ours, theirs)
        if not all(isinstance(t, torch.Tensor) and t.is_floating_point() for t in pair) or ours.shape != theirs.shape:
            return theirs
        return torch.where(ours.isnan(), ours.to(theirs.dtype), theirs)

    flat, given = flatten(expected), flatten(actual)
    if flat.spec != given.spec:
        return actual
    return unflatten(given.spec, [leaf(*pair) for pair in zip(flat.leaves, given.leaves, strict=True)])


def _equal(eager: Outcome, outcome: Outcome) -> bool:
    return compare((eager.value, eager.left), (outcome.value, outcome.left), kind="exact").ok


def _problems(eager: Outcome, outcome: Outcome, truth: Outcome, *, strict: bool) -> list[str]:
    found = []
    for ours, theirs, known in ((eager.value, outcome.value, truth.value), (eager.left, outcome.left, truth.left)):
        pairing = Pairing.of(ours, theirs)
        truths = {path: t for path, _, t in Pairing.of(ours, known).leaves}
        found += pairing.mismatches if strict else []
        for path, mine, given in pairing.leaves:
            problems = judge(path, truths.get(path), mine, given, strict=strict).problems
            if problems and not _close(mine, given):
                found += [f"{path}: {p}" for p in problems]
    return found


def _close(ours: Any, theirs: Any) -> bool:
    """Whether two floats differ by a few epsilons of the largest value, with nan and infinities in the same places."""
    if not isinstance(ours, torch.Tensor) or not ours.is_floating_point() or not ours.numel():
        return False
    finite = ours[ours.isfinite()]
    scale = float(finite.abs().max()) if finite.numel() else 1.0
    return compare(ours, theirs, kind="close", max_abs=max(scale, 1.0) * _CLOSE * torch.finfo(ours.dtype).eps, signed_zeros=False).ok


def _each_pass(
    recipe: Recipe, cases: Sequence[tuple[str, Call]], reference: CapturedCall, certificate: Certificate
) -> tuple[Call, str] | None:
    """The outputs of the graph before and after each pass that changed it; the first case that one of them breaks."""
    fresh = recipe.capture()
    context = PassContext(recipe.target, dict(fresh.sources), recipe.training)
    inputs = [_flat_inputs(reference, case) for _, case in cases]
    outputs = [run_graph(fresh.graph_module, given) for given in inputs]
    for position in range(len(recipe.pipeline)):
        before = copy_graph(fresh.graph_module)
        result = recipe.pipeline.part(position, position + 1).run(fresh.graph_module, context)
        if not result.changed:
            continue
        exact = is_exact(result.rewrites)
        for kind in sorted({r.kind.value for r in result.rewrites}):
            counts = certificate.classes.setdefault(kind, {"rewrites": 0, "comparisons": 0})
            counts["rewrites"] += sum(r.count for r in result.rewrites if r.kind.value == kind)
            counts["comparisons"] += len(cases)
        now = []
        for (name, case), given, was in zip(cases, inputs, outputs, strict=True):
            now.append(run_graph(fresh.graph_module, given))
            given_back = _nan_of(was, now[-1]) if recipe.pipeline.names[position] == "finite-masks" else now[-1]
            wrong = differences(was, given_back, lambda graph=before, x=given: _PRECISION.run(graph, x), exact=exact)  # type: ignore[misc]
            if wrong:
                return case, f"pass {recipe.pipeline.names[position]!r} changes the outputs on {_named(name)}: {wrong[0]}"
        outputs = now
    return None
