"""Token matching, as accuracy is validated on Neuron today: greedy, and with teacher forcing.

- Greedy: model, reference and candidate each generate on their own; the first index at which the tokens part is the divergence.
- Teacher forcing: all are fed the reference's tokens, so that one divergence does not hide what comes after it.

Where the argmax differs, the *divergence difference* is how far the reference's own logits put the two tokens apart, over the
largest logit. Below the tolerance (0.001, NxD Inference's ``divergence_difference_tol``), or below what the model's own logits are
off at that place, it is a near tie: no fault. No constant is subtracted and no index is left out.

The sequence is padded to its final length at once, which a causal model does not see; a model that does is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from nxfx import api
from nxfx.errors import CaptureError, UsageError
from nxfx.verification.judge import TOP_K, TopK, judge
from nxfx.verification.precision import Precision
from nxfx.verification.subjects import Call, run, through

DIVERGENCE_DIFFERENCE_TOL = 0.001
Logits = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Divergence:
    """A place where the candidate's argmax is another token.

    Attributes:
        batch, index: row, and position among the new tokens.
        expected, actual: the reference's token and the candidate's.
        difference: by how much the reference prefers its own, over its largest logit.
        near_tie: whether that is within the tolerance or the model's own error.
        model_diverges: whether the model itself has another token than the reference here.
    """

    batch: int
    index: int
    expected: int
    actual: int
    difference: float
    near_tie: bool
    model_diverges: bool

    def __str__(self) -> str:
        kind = "near tie" if self.near_tie else "divergence"
        also = ", where the model diverges too" if self.model_diverges else ""
        return f"{kind} at batch {self.batch} index {self.index}: {self.actual} for {self.expected}, difference {self.difference:.3g}{also}"


@dataclass
class TokenReport:
    """Tokens of the candidate against the reference's.

    Attributes:
        expected, model, candidate: greedily generated tokens, one list a row.
        greedy: the first divergence of each row's own generation.
        teacher_forced: every divergence with teacher forcing.
        top_k: largest logit errors with teacher forcing.
    """

    expected: list[list[int]] = field(default_factory=list)
    model: list[list[int]] = field(default_factory=list)
    candidate: list[list[int]] = field(default_factory=list)
    greedy: list[Divergence] = field(default_factory=list)
    teacher_forced: list[Divergence] = field(default_factory=list)
    top_k: list[TopK] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        beyond = any(not t.ok and t.model_error <= t.tolerance for t in self.top_k)
        return not beyond and all(d.near_tie or d.model_diverges for d in (*self.greedy, *self.teacher_forced))

    @property
    def status(self) -> str:
        """In the words of the field."""
        if not self.greedy and not self.teacher_forced:
            return "No divergence" if self.ok else "No divergence; test fails logit validation"
        first = min((d.index for d in self.greedy), default=min((d.index for d in self.teacher_forced), default=0))
        verdict = "passes" if self.ok else "fails"
        ties = " (near ties)" if all(d.near_tie for d in (*self.greedy, *self.teacher_forced)) else ""
        return f"Divergence at index {first}{ties}; test {verdict} logit validation"

    def lines(self) -> list[str]:
        """For the text report."""
        count = len(self.expected[0]) if self.expected else 0
        lines = [f"{self.status}: {len(self.expected)} rows of {count} new tokens"]
        lines += [f"greedy: {d}" for d in self.greedy[:5]]
        lines += [f"teacher forcing: {d}" for d in self.teacher_forced[:5]]
        shown = ", ".join(f"top {t.k or 'all'}: {t.error:.3g} (model {t.model_error:.3g}, tolerance {t.tolerance})" for t in self.top_k)
        return [*lines, f"logit errors with teacher forcing: {shown}"]

    def to_dict(self) -> dict[str, Any]:
        top_k = [{**asdict(t), "ok": t.ok} for t in self.top_k]
        return {"ok": self.ok, "status": self.status, **asdict(self), "top_k": top_k}


def match_tokens(model: torch.nn.Module, candidate: Any, call: Call, count: int, precision: Precision) -> TokenReport:
    """Generate ``count`` tokens after the prompt in ``call`` with each of the three, and compare.

    Args:
        call: the first integer tensor (``input_ids``, or the first positional one) holds token ids ``[batch, length]``; arguments as
            long as the prompt (an attention mask, positions) grow with it.

    Raises:
        UsageError: no token ids, or a model that is not causal or gives no logits.
    """
    padded = _Padded(call, count)
    reference = _reference(model, padded, precision)

    def own(ids: torch.Tensor) -> torch.Tensor:
        return _logits(run(model, padded.call(ids)).value)

    def theirs(ids: torch.Tensor) -> torch.Tensor:
        return _logits(run(candidate, padded.call(ids)).value)

    _refuse_non_causal(own, padded)
    report = TokenReport()
    golden = _generate(reference, padded)
    mine, given = _generate(own, padded), _generate(theirs, padded)
    length = padded.length
    report.expected, report.model, report.candidate = (ids[:, length:].tolist() for ids in (golden, mine, given))
    window = slice(length - 1, length - 1 + count)
    truth, model_logits, candidate_logits = (f(golden)[:, window].to(torch.float64).cpu() for f in (reference, own, theirs))
    report.teacher_forced = _divergences(truth, model_logits, candidate_logits)
    report.greedy = _greedy_divergences(golden, mine, given, padded, reference, own)
    report.top_k = judge("logits", truth, model_logits, candidate_logits, strict=False).top_k
    if not report.top_k:
        error = float((candidate_logits - truth).abs().max())
        noise = float((model_logits - truth).abs().max())
        scale = float(truth.abs().max()) or 1.0
        report.top_k = [TopK(None, error / scale, noise / scale, TOP_K[-1][1])]
    return report


class _Padded:
    """The call with its token ids padded to their final length."""

    def __init__(self, call: Call, count: int) -> None:
        self.args, self.kwargs = call
        # Positional arguments by their position, keyword arguments by their name.
        given: dict[Any, Any] = {**dict(enumerate(self.args)), **self.kwargs}
        self.key = next((k for k in ("input_ids", "tokens", "ids", *range(len(self.args))) if self._is_ids(given.get(k))), None)
        if self.key is None:
            raise UsageError("tokens need token ids: an integer tensor [batch, length] as input_ids or first argument")
        self.prompt: torch.Tensor = given[self.key]
        self.count, self.length = count, self.prompt.shape[1]

    @staticmethod
    def _is_ids(value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value.dtype in (torch.int64, torch.int32) and value.dim() == 2

    def ids(self, fill: int = 0) -> torch.Tensor:
        """The prompt and ``count`` places for new tokens."""
        room = self.prompt.new_full((self.prompt.shape[0], self.count), fill)
        return torch.cat([self.prompt, room], 1)

    def call(self, ids: torch.Tensor) -> Call:
        """The arguments for padded ``ids``."""
        args = [ids if i == self.key else self._grown(a) for i, a in enumerate(self.args)]
        kwargs = {k: ids if k == self.key else self._grown(v) for k, v in self.kwargs.items()}
        return tuple(args), kwargs

    def _grown(self, value: Any) -> Any:
        """A mask grows by ones, positions by the next ones."""
        if not isinstance(value, torch.Tensor) or value.dim() != 2 or value.shape[1] != self.length or value.is_floating_point():
            return value
        last = value[:, -1:]
        counts_up = self.length > 1 and bool((value[:, 1:] - value[:, :-1] == 1).all()) if value.dtype is not torch.bool else False
        steps = torch.arange(1, self.count + 1, dtype=last.dtype, device=last.device) if counts_up else torch.zeros_like(last)
        return torch.cat([value, (last + steps if counts_up else last).expand(value.shape[0], self.count)], 1)


def _reference(model: torch.nn.Module, padded: _Padded, precision: Precision) -> Logits:
    call = padded.call(padded.ids())
    try:
        captured = api.prepare(model, *call, pipeline="", check="never").capture(*call[0], **call[1])
    except CaptureError:
        return lambda ids: _logits(run(model, padded.call(ids), precision).value)
    return lambda ids: _logits(through(captured, padded.call(ids), precision.run, precision).value)


def _logits(value: Any) -> torch.Tensor:
    """The logits in a model's result: ``.logits``, ``["logits"]``, the first item, or the tensor itself."""
    found = getattr(value, "logits", None)
    if found is None and isinstance(value, Mapping):
        found = value.get("logits", next(iter(value.values()), None))
    if found is None:
        found = value[0] if isinstance(value, (tuple, list)) and value else value
    if not isinstance(found, torch.Tensor) or found.dim() != 3 or not found.is_floating_point():
        raise UsageError("tokens need logits [batch, length, vocabulary]: the result, its .logits or its first item")
    return found.detach()


def _refuse_non_causal(logits: Logits, padded: _Padded) -> None:
    one, other = logits(padded.ids(0)), logits(padded.ids(1))
    if one.shape[1] != padded.length + padded.count:
        raise UsageError("tokens need the logits of every position: the model gives only some (num_logits_to_keep?)")
    if not torch.allclose(one[:, : padded.length].float(), other[:, : padded.length].float(), rtol=1e-2, atol=1e-2, equal_nan=True):
        raise UsageError("tokens need a causal model: its logits change with what stands behind them")


def _generate(logits: Logits, padded: _Padded) -> torch.Tensor:
    ids = padded.ids()
    for position in range(padded.length, padded.length + padded.count):
        ids[:, position] = logits(ids)[:, position - 1].argmax(-1).to(ids.dtype)
    return ids


def _divergences(truth: torch.Tensor, model: torch.Tensor, candidate: torch.Tensor) -> list[Divergence]:
    """Every place of ``[batch, length, vocabulary]`` logits where the candidate's argmax is not the reference's."""
    wanted, mine, given = truth.argmax(-1), model.argmax(-1), candidate.argmax(-1)
    found = []
    for batch, index in (wanted != given).nonzero().tolist():
        place = (batch, index)
        pair = int(wanted[place]), int(given[place])
        found.append(_divergence(place, pair, truth[place], model[place], int(mine[place])))
    return found


def _divergence(place: tuple[int, int], pair: tuple[int, int], truth: torch.Tensor, model: torch.Tensor, own: int) -> Divergence:
    scale = float(truth[truth.isfinite()].abs().max()) or 1.0
    margin = float(truth[pair[0]] - truth[pair[1]])
    noise = float((model - truth).nan_to_num().abs().max())
    near = margin <= max(DIVERGENCE_DIFFERENCE_TOL * scale, 2 * noise)
    return Divergence(*place, *pair, margin / scale, near, own != pair[0])


def _greedy_divergences(
    golden: torch.Tensor, mine: torch.Tensor, given: torch.Tensor, padded: _Padded, reference: Logits, own: Logits
) -> list[Divergence]:
    """The first place of each row where the candidate's own generation leaves the reference's."""
    other = golden != given
    if not bool(other.any()):
        return []
    truth, model = (f(golden).to(torch.float64) for f in (reference, own))
    found = []
    for batch in range(golden.shape[0]):
        if not bool(other[batch].any()):
            continue
        at = int(other[batch].to(torch.uint8).argmax())
        pair = int(golden[batch, at]), int(given[batch, at])
        left = (mine[batch] != golden[batch]).to(torch.uint8)
        leaves_too = bool(left.any()) and int(left.argmax()) <= at
        place = batch, at - padded.length
        found.append(_divergence(place, pair, truth[batch, at - 1], model[batch, at - 1], -1 if leaves_too else pair[0]))
    return found
