"""Random programs against eager, as many as there is time for: ``make fuzz``.

    python tests/fuzz.py --what writes --programs 50000 --seed 0      views and writes, mask-slice-writes
    python tests/fuzz.py --what bounds --programs 500                 slices with tensor bounds, one capture each, prepare()
    python tests/fuzz.py --what integers --programs 5000              64-bit arithmetic, narrow-64bit
    python tests/fuzz.py --what branches --programs 500               ifs on tensors, one capture each, prepare()
    python tests/fuzz.py --what precision --programs 200              integers in low precision against float64, lift-int-casts

Program ``i`` is made from seed ``--seed + i``: a difference is reported with its seed and the shortest program that shows
it, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import copy
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import bound_programs
import branch_programs
import integer_programs
import precision_programs
import torch
import view_programs

import nxfx
from nxfx.errors import CaptureError
from nxfx.graph import invariants, walk
from nxfx.passes.mask_slice_writes import MaskSliceWrites
from nxfx.passes.narrow_64bit import Narrow64bit
from nxfx.pipeline import Pipeline
from nxfx.verification.equivalence import compare

SCATTERS = ("scatter", "index_put", "index_copy", "index_fill", "index_add", "aten.copy", "aten.put")


def left(gm: torch.fx.GraphModule) -> list[str]:
    """The writers that still stand in the graph."""
    return [str(n.target) for n in gm.graph.nodes if n.op == "call_function" and any(w in str(n.target) for w in SCATTERS)]


def check_writes(seed: int, figures: Counter[str], program: Any = None) -> str | None:
    """What is wrong with the graph of program ``seed``; None: nothing."""
    rng = random.Random(seed)
    made = view_programs.generate(rng)
    program = program or made
    args = view_programs.inputs(random.Random(seed), program)
    try:
        expected = program(*(a.clone() for a in args))
        gm, context = view_programs.functional_graph(program, args)
        walk.reshape_views(gm)  # as prepare leaves it
        gm.recompile()
    except (RuntimeError, IndexError, ValueError):  # eager refuses it, or tracing does
        figures["refused"] += 1
        return None
    if not compare(expected, gm(*args)).ok:  # torch's own functionalization of as_strided, which capture refuses
        figures["wrong before"] += 1
        return None
    result = Pipeline([MaskSliceWrites()]).run(gm, context, verify_each=True, finish=lambda: walk.reshape_views(gm))
    outcome = compare(expected, gm(*args))
    figures["rewrites"] += len(result.rewrites)
    figures["kept"] += len(left(gm))
    if not outcome.ok:
        return str(outcome)
    return None if len(left(gm)) <= len(result.findings) else f"kept without a finding: {left(gm)}"


def check_bounds(seed: int, figures: Counter[str], program: Any = None) -> str | None:
    """One capture of program ``seed`` against eager at twelve run-time values."""
    rng = random.Random(seed)
    program = bound_programs.generate(rng)
    draws = bound_programs.inputs(rng, program, 12)

    class Model(torch.nn.Module):
        def forward(self, x: Any, y: Any, n: Any, s: Any) -> Any:
            return program(x, y, n, s)

    for args in draws:
        try:
            program(*args)
        except (RuntimeError, IndexError):
            figures["refused"] += 1
            return None
    try:
        prepared = nxfx.prepare(Model(), draws[0], pipeline="flag-value-dependence,mask-slice-writes", check="never")
    except CaptureError as error:
        figures["not captured"] += 1
        return None if error.report and error.report.findings else f"no finding: {error}"
    figures["rewrites"] += sum(r.count for r in prepared.report.rewrites)
    figures["kept"] += len(left(prepared.graph_module))
    for args in draws:
        outcome = compare(program(*args), prepared(*args))
        if not outcome.ok:
            return f"n={args[2].item()} s={args[3].item()}: {outcome}"
    return None


def check_integers(seed: int, figures: Counter[str], program: Any = None) -> str | None:
    """Integer program ``seed`` after narrow-64bit at the corners of its ranges."""
    program = integer_programs.Program(seed)
    context, original = program.context(), copy.deepcopy(program.gm)
    contract = invariants.contract_of(program.gm)
    result = Narrow64bit().run(program.gm, context)
    figures["rewrites"] += len(result.rewrites)
    broken = [b for b in invariants.check(program.gm, contract) if b.rule != "has-trace"]
    if broken:
        return str(broken[0])
    program.gm.recompile()
    for draw in range(3):
        inputs = program.inputs(draw, context.requirements)
        outcomes = []
        for gm in (original, program.gm):
            try:
                outcomes.append(gm(*copy.deepcopy(inputs)))
            except (RuntimeError, IndexError) as error:
                outcomes.append(type(error).__name__)
        if not all(isinstance(o, str) for o in outcomes) and not compare(*outcomes).ok:
            return str(compare(*outcomes))
    return None


def check_branches(seed: int, figures: Counter[str], program: Any = None) -> str | None:
    """One capture of program ``seed`` against eager on inputs that drive every path: results, inputs and buffers."""
    rng = random.Random(seed)
    program = program or branch_programs.generate(rng)
    draws = list(program.inputs(rng))
    model = program.model()
    figures["flags"] += program.flags
    try:
        prepared = nxfx.prepare(model, copy.deepcopy(draws[0]), max_traces=64)
    except CaptureError as error:
        figures["not captured"] += 1
        return None if error.report and error.report.findings else f"no finding: {error}"
    figures["nodes"] += len(prepared.graph_module.graph.nodes)
    figures["branches removed"] += sum(r.count for r in prepared.report.rewrites if r.rule == "branch.both-sides")
    if any(f.code == "NX406" and f.severity.value == "error" for f in prepared.report.findings):
        return "a random program holds no Python state"
    start = model.state.clone()
    for draw in draws:
        theirs, ours = copy.deepcopy(draw), copy.deepcopy(draw)
        eager = program.model()
        eager.state.copy_(start)
        model.state = start.clone()
        expected, actual = eager(*theirs), prepared(*ours)
        outcome = compare((expected, theirs, eager.state), (actual, ours, model.state))
        if not outcome.ok:
            return f"{draw}: {outcome}"
    return None


def check_precision(seed: int, figures: Counter[str], program: Any = None) -> str | None:
    """Integers, bf16 or fp16 and the ops that magnify rounding: every rewritten value and the outputs against float64."""
    rng = random.Random(seed)
    try:
        found, lucky = precision_programs.check(seed, rng.choice(precision_programs.LOW), rng.random() < 0.5)
    except AssertionError as error:
        return str(error).splitlines()[0] if str(error) else "AssertionError"
    figures["rewrites"] += len(found.result.rewrites)
    figures["of constants that eager rounds luckily"] += lucky
    return None


CHECKS: dict[str, Callable[..., str | None]] = {
    "writes": check_writes, "bounds": check_bounds, "integers": check_integers, "branches": check_branches,
    "precision": check_precision,
}  # fmt: skip


def described(what: str, seed: int) -> str:
    """The program of a seed that fails, as short as it gets."""
    if what == "integers":
        return str(integer_programs.Program(seed).gm.code)
    if what == "branches":
        return str(branch_programs.generate(random.Random(seed)))
    if what == "precision":
        return f"precision_programs.Program({seed}, ...)"
    if what == "bounds":
        return str(bound_programs.generate(random.Random(seed)))
    program = view_programs.generate(random.Random(seed))
    return str(view_programs.shrunk(program, lambda fewer: _fails(seed, fewer)))


def _fails(seed: int, program: Any) -> bool:
    try:
        return check_writes(seed, Counter(), program) is not None
    except Exception:
        return True


def main() -> int:
    """Exit code 0: no program differs from eager."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--what", choices=CHECKS, default="writes")
    parser.add_argument("--programs", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after this long")
    options = parser.parse_args()
    torch.set_num_threads(1)
    figures: Counter[str] = Counter()
    started, failed, done = time.monotonic(), 0, 0
    for seed in range(options.seed, options.seed + options.programs):
        try:
            wrong = CHECKS[options.what](seed, figures)
        except Exception as error:
            wrong = f"{type(error).__name__}: {error}"
        done += 1
        if wrong is not None:
            failed += 1
            print(f"seed {seed}: {wrong}\n{described(options.what, seed)}\n", flush=True)
        seconds = time.monotonic() - started
        if done % 1000 == 0:
            print(f"{done} programs, {failed} differ, {seconds:.0f} s", file=sys.stderr, flush=True)
        if seconds > options.seconds:
            break
    figures_text = ", ".join(f"{count} {name}" for name, count in sorted(figures.items()))
    print(f"{options.what}: {done} programs from seed {options.seed}: {failed} differ; {figures_text}; {time.monotonic() - started:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
