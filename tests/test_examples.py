"""Every example: captured, prepared, equal to eager on its inputs and on others, and free of its first device."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

import nxfx
from nxfx.verification.equivalence import compare, error_against

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
sys.path.insert(0, str(EXAMPLES))

Call = tuple[tuple[Any, ...], dict[str, Any]]


def _other_positions(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Call]:
    """Positions at the start, around bf16's limit, far out, and scattered; with other activations or tokens."""
    length = next(t for t in _leaves(args, kwargs) if t.dim() == 2).shape[1]
    for number, start in enumerate((0, 250, 8000)):
        yield _with_positions(args, kwargs, torch.arange(start, start + length)[None], number)
    yield _with_positions(args, kwargs, torch.randint(8192, (1, length)), 3)


def _with_positions(args: tuple[Any, ...], kwargs: dict[str, Any], positions: torch.Tensor, seed: int) -> Call:
    torch.manual_seed(seed)
    if "position_ids" in kwargs:
        return (torch.randint_like(args[0], 512),), {**kwargs, "position_ids": positions}
    return (torch.randn_like(args[0]), positions), kwargs


def _other_ratios(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Call]:
    for ratio in importlib.import_module("mllama_mask").ASPECT_RATIOS:
        yield (args[0], torch.tensor([ratio])), kwargs
    for ratio in ((0, 3), (9, 9), (-1, 1), (2, -2)):  # nothing, everything, ends counted from the back
        yield (args[0], torch.tensor([ratio])), kwargs


def _other_steps(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Call]:
    for at in (4, 5, 0, 63):
        yield (torch.randn_like(args[0]), torch.tensor(at)), kwargs


def _other_flags(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Call]:
    for flag in (0, 2, -1, 1):
        x = torch.tensor([[0.0, -0.0, 1.5], [float("inf"), float("nan"), -3.0]])
        yield (x, torch.tensor([flag])), kwargs


def _other_images(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Call]:
    yield (torch.randn_like(args[0]) * 100,), kwargs
    nasty = torch.randn_like(args[0])
    nasty[0, 0, 0, 0], nasty[1, 3, 2, 5] = float("inf"), float("nan")
    yield (nasty,), kwargs


def _other_timesteps(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Call]:
    for start in (0, 250, 992):
        yield (torch.arange(start, start + 8),), kwargs


@dataclass(frozen=True)
class Case:
    """An example's factory, the promise its rewrites keep, other inputs, and whether calls change its state."""

    spec: str
    kind: str
    others: Callable[[tuple[Any, ...], dict[str, Any]], Iterator[Call]]
    exact_on_xla: bool = False

    def build(self) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        module, _, factory = self.spec.partition(":")
        model, args, *kwargs = getattr(importlib.import_module(module), factory)()
        return model, args, kwargs[0] if kwargs else {}


CASES = (
    Case("llama_bf16:tiny", "exact", _other_positions),
    Case("llama_bf16:naive", "refines", _other_positions),
    Case("llama_bf16:attention", "refines", _other_positions),
    Case("llama_bf16:rotary", "refines", _other_positions),
    Case("mllama_mask:small", "exact", _other_ratios, exact_on_xla=True),
    Case("kv_cache:step", "exact", _other_steps),
    Case("branch:flag", "exact", _other_flags, exact_on_xla=True),
    Case("swin_mask:window", "exact", _other_images),
    Case("timestep_embedding:bf16", "refines", _other_timesteps),
)
each_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.spec)


def _double(model: Any, args: Any, kwargs: Any) -> Any:
    """The call in float64: the reference that a refinement must not be further from than eager."""
    to_double = lambda t: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t  # noqa: E731
    args, kwargs = pytree.tree_map(to_double, (args, kwargs))
    return copy.deepcopy(model).double()(*args, **kwargs)


@each_case
@torch.no_grad()
def test_prepared_equals_eager_on_the_example_and_on_other_inputs(case: Case) -> None:
    eager, args, kwargs = case.build()
    model, *_ = case.build()
    prepared = nxfx.prepare(model, args, kwargs, verify_each=True)
    for call_args, call_kwargs in ((args, kwargs), *case.others(args, kwargs)):
        reference = _double(eager, call_args, call_kwargs) if case.kind == "refines" else None
        expected = eager(*copy.deepcopy(call_args), **copy.deepcopy(call_kwargs))
        actual = prepared(*copy.deepcopy(call_args), **copy.deepcopy(call_kwargs))
        outcome = compare(expected, actual, kind=case.kind, reference=reference)
        assert outcome, f"{call_args} {call_kwargs}\n{outcome}"
        assert compare(dict(eager.named_buffers()), dict(model.named_buffers()))
    assert len(prepared.captures) == 1
    assert not prepared.report.errors, str(prepared.report)


@each_case
@torch.no_grad()
def test_prepared_runs_on_the_meta_device_no_device_is_baked(case: Case) -> None:
    model, args, kwargs = case.build()
    prepared = nxfx.prepare(model, args, kwargs)
    expected = prepared(*copy.deepcopy(args), **copy.deepcopy(kwargs))
    prepared.to("meta")
    moved = pytree.tree_map(lambda t: t.to("meta") if isinstance(t, torch.Tensor) else t, (args, kwargs))
    actual = prepared(*moved[0], **moved[1])
    assert len(prepared.captures) == 1, "moving must not capture again"
    for was, now in zip(_tensors(expected), _tensors(actual), strict=True):
        assert (now.device.type, now.dtype, now.shape) == ("meta", was.dtype, was.shape)


@each_case
@torch.no_grad()
@pytest.mark.xla
@pytest.mark.skipif(importlib.util.find_spec("torch_xla") is None, reason="needs torch_xla")
def test_prepared_runs_on_an_xla_device_with_the_same_values(case: Case) -> None:
    os.environ.setdefault("PJRT_DEVICE", "CPU")
    import torch_xla

    device = torch_xla.device()
    model, args, kwargs = case.build()
    prepared = nxfx.prepare(model, args, kwargs)
    expected = prepared(*copy.deepcopy(args), **copy.deepcopy(kwargs))
    model, *_ = case.build()  # the call may have changed the first one's state
    prepared = nxfx.prepare(model, args, kwargs).to(device)
    moved = pytree.tree_map(lambda t: t.to(device) if isinstance(t, torch.Tensor) else t, (args, kwargs))
    actual = prepared(*moved[0], **moved[1])
    assert len(prepared.captures) == 1, "moving must not capture again"
    for was, now in zip(_tensors(expected), _tensors(actual), strict=True):
        assert now.device.type == "xla"
        outcome = compare(was, now.cpu(), **_xla_bounds(case, was.dtype))
        assert outcome, str(outcome)


def _xla_bounds(case: Case, dtype: torch.dtype) -> dict[str, Any]:
    """XLA's matmul, cos and exp round in another order; masks and selects have one right answer."""
    if case.exact_on_xla:
        return {"kind": "exact"}
    bounds = {"max_abs": 0.25, "mean_abs": 0.025} if dtype == torch.bfloat16 else {"max_abs": 1e-4}
    return {"kind": "close", "signed_zeros": False, **bounds}


def _leaves(*values: Any) -> list[torch.Tensor]:
    return [t for t in pytree.tree_leaves(values) if isinstance(t, torch.Tensor)]


def _tensors(result: Any) -> list[torch.Tensor]:
    result = getattr(result, "logits", result)
    return _leaves(result)


def test_branch_on_a_tensor_is_removed_or_refused_with_its_line() -> None:
    model, (x, _) = importlib.import_module("branch").flag()
    prepared = nxfx.prepare(model, (x, torch.tensor([1])))
    for value in (0, 1):
        assert torch.equal(prepared(x, torch.tensor([value])), model(x, torch.tensor([value])))
    model, args = importlib.import_module("branch").shapes()
    (finding,) = [f for f in nxfx.check(model, args).findings if f.code == "NX401"]
    assert finding.location.source == "if flag[0] == 1:"
    assert Path(finding.location.file).name == "branch.py"
    with pytest.raises(nxfx.CaptureError, match=rf"branch\.py:{finding.location.line}\b"):
        nxfx.prepare(model, args)


def test_mask_zero_counts_at_full_size_follow_from_the_formula() -> None:
    zeros = importlib.import_module("mllama_mask").zeros_expected
    assert [zeros(4, 1608, 1601, tiles) for tiles in (1, 2, 3, 4)] == [18_032_063, 30_937_724, 38_716_983, 41_369_840]


def test_bf16_rounds_the_naive_positions_and_preparing_restores_them() -> None:
    """Trap 21: above 256 positions fall together."""
    llama = importlib.import_module("llama_bf16")
    model, (x, positions), _ = llama.rotary()
    assert positions.to(torch.bfloat16).unique().numel() <= 2
    with torch.no_grad():
        before, _ = model(x, positions)
        after, _ = nxfx.prepare(model, (x, positions))(x, positions)
    assert before.unique(dim=1).shape[1] <= 2
    assert after.unique(dim=1).shape[1] == positions.numel()


@torch.no_grad()
def test_llama_logits_error_is_what_the_readme_says() -> None:
    """From 1.2 to 0.02, the error of the same model with a careful rotary."""
    llama = importlib.import_module("llama_bf16")
    (model, args, kwargs), (careful, *_) = llama.naive(), llama.tiny()
    reference = _double(model, args, kwargs).logits
    before = error_against(reference, model(*args, **kwargs).logits)
    after = error_against(reference, nxfx.prepare(model, args, kwargs)(*args, **kwargs).logits)
    floor = error_against(reference, careful(*args, **kwargs).logits)
    assert (round(before.mean, 1), round(after.mean, 2)) == (1.2, 0.02)
    assert after.mean <= 1.02 * floor.mean


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda p: p.stem)
@pytest.mark.slow
def test_example_runs_as_a_script(path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    run = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.strip()
