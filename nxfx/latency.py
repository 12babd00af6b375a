"""Warm-up: the first requests of a compiled model are slow, so send dummy ones before the real ones.

Source: the troubleshooting guide of NxD Inference, "Skip model warmup during inference": the runtime's own warm-up is off by
default on Trn2 (``skip_warmup``), and manual dummy requests work on all instance types.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from nxfx.analysis.dtype_rules import wide
from nxfx.capture.state import ModuleState
from nxfx.capture.structure import unflatten
from nxfx.errors import PrepareError, UsageError

if TYPE_CHECKING:
    from nxfx.captured_call import CapturedCall
    from nxfx.prepared import PreparedModule

# Settled: within a fifth of the best so far, and not the best by more than that. More requests than this are not sent.
TOLERANCE = 0.2
MOST_PER_ITERATION = 5


@dataclass
class BucketLatency:
    """Seconds per request for one set of shapes.

    Attributes:
        shapes: the tensors of the request.
        seconds: each request in order.
        settled: whether the last request took as long as the best ones.
    """

    shapes: str
    seconds: list[float] = field(default_factory=list)
    settled: bool = False

    @property
    def first(self) -> float:
        return self.seconds[0]

    @property
    def last(self) -> float:
        return self.seconds[-1]

    def __str__(self) -> str:
        state = "settled at" if self.settled else "not settled, last"
        return f"{self.shapes}: first {_milliseconds(self.first)}, {state} {_milliseconds(self.last)} after {len(self.seconds)} requests"


@dataclass
class WarmUp:
    """What a warm-up measured.

    Attributes:
        buckets: one for each set of shapes.
        skipped: why nothing was sent, or ``""``.
    """

    buckets: list[BucketLatency] = field(default_factory=list)
    skipped: str = ""

    @property
    def settled(self) -> bool:
        return all(bucket.settled for bucket in self.buckets)

    def __str__(self) -> str:
        return self.skipped or "\n".join(map(str, self.buckets))


def warmup(fn: Callable[..., Any], example_inputs: Any, iterations: int = 3) -> WarmUp:
    """Send dummy requests until latencies settle.

    Args:
        fn: whatever serves requests: a prepared, traced or compiled module, or a function. It is called for its latency only. A
            module that keeps state is changed as by any call; ``prepared.warmup()`` and ``traced.warmup()`` know about that.
        example_inputs: a request, or a list of them, one for each bucket. A request is a tuple of arguments, a tensor, a dict of
            keyword arguments, or ``(args tuple, kwargs dict)``. Its tensors are copied for each call.
        iterations: requests for each bucket at least; after five times as many it returns though latencies still change.

    Returns:
        The first and the settled latency of each bucket; nothing was sent where the runtime's own warm-up is on
        (``neuron_config.skip_warmup`` is False).

    Raises:
        UsageError: ``iterations`` below 1, or no request.
    """
    if iterations < 1:
        raise UsageError(f"iterations is at least 1, not {iterations}")
    requests = [_request(r) for r in (example_inputs if isinstance(example_inputs, list) else [example_inputs])]
    if not requests:
        raise UsageError("warm-up needs an example of each bucket")
    if _runtime_warms_up(fn):
        return WarmUp(skipped="the runtime warms up itself (neuron_config.skip_warmup is False): nothing was sent")
    return WarmUp([_one_bucket(fn, args, kwargs, iterations) for args, kwargs in requests])


def warmup_captures(prepared: PreparedModule, iterations: int = 3) -> WarmUp:
    """:func:`warmup` with each capture's own example; buffers and Python state of the model are put back afterwards.

    Raises:
        PrepareError: nothing is captured yet.
    """
    if not prepared.captures:
        raise PrepareError("nothing is captured yet: call the prepared module once, or give prepare() example arguments")
    model = prepared.__dict__["_model"]
    state = ModuleState(model)
    tensors = {t: t.detach().clone() for t in (*model.parameters(), *model.buffers(), *(slot.tensor for slot in state.slots()))}
    try:
        return warmup(prepared, [_example(call) for call in prepared.captures.values()], iterations)
    finally:
        state.restore()
        with torch.no_grad():
            for tensor, before in tensors.items():
                if not torch.equal(tensor, before):
                    tensor.copy_(before)


def _example(call: CapturedCall) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments that a capture was made with, in the caller's dtypes."""
    passed = iter(zip(call.boundary.inputs, call.example_inputs, strict=True))
    leaves: list[torch.Tensor] = []
    for name in call.convention.input_names:
        if name in call.state_inputs:
            leaves.append(call.graph_module.get_buffer(call.state_inputs[name]))
        else:
            rule, value = next(passed)
            leaves.append(value.to(wide(rule.narrow)) if rule.narrow is not None else value)
    args, kwargs = unflatten(call.convention.input_spec, leaves)
    return args, kwargs


def _request(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example, dict):
        return (), example
    if not isinstance(example, tuple):
        return (example,), {}
    if len(example) == 2 and isinstance(example[0], tuple) and isinstance(example[1], dict):
        return example
    return example, {}


def _runtime_warms_up(fn: Any) -> bool:
    """NxD Inference applications say so in their configuration; a missing ``skip_warmup`` says nothing."""
    for owner in (fn, getattr(fn, "config", None)):
        config = getattr(owner, "neuron_config", None)
        if config is not None and getattr(config, "skip_warmup", None) is False:
            return True
    return False


def _one_bucket(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], iterations: int) -> BucketLatency:
    found = BucketLatency(_shapes(args, kwargs))
    while len(found.seconds) < iterations * MOST_PER_ITERATION:
        request_args, request_kwargs = pytree.tree_map(_copy, (args, kwargs))
        started = time.perf_counter()
        with torch.no_grad():
            _wait(fn(*request_args, **request_kwargs))
        found.seconds.append(time.perf_counter() - started)
        found.settled = _is_settled(found.seconds)
        if found.settled and len(found.seconds) >= iterations:
            break
    return found


def _is_settled(seconds: Sequence[float]) -> bool:
    """The last request took no longer than the best before it, within the tolerance, and was no new record by more than that."""
    if len(seconds) < 2:
        return False
    best = min(seconds[:-1])
    return best * (1 - TOLERANCE) <= seconds[-1] <= best * (1 + TOLERANCE)


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def _wait(result: Any) -> None:
    """Until the result is there: a device may compute it later."""
    for leaf in pytree.tree_leaves(result):
        if isinstance(leaf, torch.Tensor) and leaf.device.type not in ("cpu", "meta"):
            leaf.cpu()


def _shapes(*values: Any) -> str:
    leaves = [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, torch.Tensor)]
    return "(" + ", ".join(f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}" for t in leaves) + ")"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.2f} ms"
