"""What the capture of a model can bake although the model does not hold it: globals, class attributes, Python's random numbers."""

from __future__ import annotations

import random
from typing import Any

import numpy
import torch

from nxfx.report import Finding, Severity
from nxfx.report.locations import locate

_PLAIN = (bool, int, float, str, bytes, type(None))
_SEED = 0x6E786678  # nobody else's: a forward that seeds with the seed in use is seen too
_LITERAL = torch.ops.aten.lift_fresh_copy.default


class OutsideState:
    """Stock of the state around a model, taken before its capture."""

    def __init__(self, model: torch.nn.Module) -> None:
        classes = {c for m in model.modules() for c in type(m).__mro__ if c is not object and not c.__module__.startswith("torch.")}
        self._classes = [(c, k, v) for c in classes for k, v in vars(c).items() if isinstance(v, _PLAIN) and not k.startswith("__")]
        self._random: Any = random.getstate()
        self._numpy: Any = numpy.random.get_state(legacy=False)
        self._torch = torch.get_rng_state()
        torch.default_generator.manual_seed(_SEED)

    def findings(self) -> list[Finding]:
        """What forward changed there, put back as it was."""
        found = []
        for cls, key, value in self._classes:
            now = vars(cls).get(key)
            if now is not value and now != value:
                setattr(cls, key, value)
                found.append(_baked(f"forward changes the class attribute {cls.__name__}.{key} from {value!r} to {now!r}"))
        if random.getstate() != self._random:
            random.setstate(self._random)
            found.append(_baked("forward draws from Python's random"))
        if repr(numpy.random.get_state(legacy=False)) != repr(self._numpy):
            numpy.random.set_state(self._numpy)
            found.append(_baked("forward draws from numpy.random"))
        seed = torch.initial_seed()
        torch.set_rng_state(self._torch)
        if seed != _SEED:
            message = f"forward seeds torch's generator ({seed}): the graph does not, and draws other numbers on each call"
            fix = "seed outside of the model, or make the numbers a buffer"
            found.append(Finding("NX406", Severity.ERROR, message, fix=fix))
        return found


def _baked(what: str) -> Finding:
    fix = "use a buffer, a torch random op, or an argument"
    return Finding("NX406", Severity.ERROR, f"{what}: the value at capture is baked into the graph, every call repeats it", fix=fix)


def foreign_tensors(program: torch.export.ExportedProgram) -> list[Finding]:
    """A warning for each tensor that is neither the model's nor written as a literal: a global, or one in a closure."""
    placeholders = {n.name: n for n in program.graph.find_nodes(op="placeholder")}
    found = []
    for spec in program.graph_signature.input_specs:
        node = placeholders[spec.arg.name]
        if spec.kind.name != "CONSTANT_TENSOR" or not node.users:
            continue
        if all(user.target in (_LITERAL, torch.ops.aten.clone.default) for user in node.users):
            continue
        user = next(iter(node.users))
        message = "a tensor that is neither an argument nor the model's own (a global, a closure) is baked into the graph as it is now"
        found.append(Finding("NX406", Severity.WARNING, message, locate(user), user.name, "pass it in, or register it as a buffer"))
    return found
