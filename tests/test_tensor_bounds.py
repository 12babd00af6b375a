"""Slices with tensor bounds, captured once, against eager at every run-time value."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from tools import nasty_like
from torch import Tensor

from nxfx.capture.branches import invented_guards
from nxfx.capture.interception import Session, check_outputs, interception
from nxfx.errors import CaptureError
from nxfx.report import Kind, Severity
from nxfx.verification.equivalence import compare

INT64_MAX = 2**63 - 1
BOUNDS = [0, 1, -1, 2, -2, 99, -99, INT64_MAX, -INT64_MAX]


class Shell(torch.nn.Module):
    """What nxfx.capture.export does: the mode is entered inside what is exported."""

    def __init__(self, fn: Callable[..., Any], session: Session, training: bool = False) -> None:
        super().__init__()
        self.fn, self.session, self.training_graph = fn, session, training

    def forward(self, *args: Any) -> Any:
        with interception(self.session, training=self.training_graph):
            return self.fn(*args)


def capture(
    fn: Callable[..., Any], *args: Any, dynamic_shapes: Any = None, training: bool = False
) -> tuple[Any, Session]:
    session = Session()
    shell = Shell(fn, session, training)
    with torch.set_grad_enabled(training):
        program = torch.export.export(shell, args, strict=False, dynamic_shapes=dynamic_shapes)
        if not training:  # the functional aten.copy has no derivative
            program = program.run_decompositions({})
    assert not session.errors, session.errors
    assert invented_guards(program) == []
    return program, session


def reads_value(program: Any) -> list[str]:
    """Nodes that take a value to the host, or have a size that depends on data."""
    names = ("aten.item.", "aten._local_scalar_dense.", "aten.nonzero.", "aten._assert_scalar.", "aten.sym_size.")
    return [n.name for n in program.graph.nodes if str(n.target).startswith(names)]


def same_as_eager(
    fn: Callable[..., Any],
    example: Iterable[Any],
    others: Iterable[Iterable[Any]],
    kind: str = "exact",
    **bounds: float,
) -> tuple[Any, Session]:
    """One capture from ``example``; every one of ``others`` gives what eager gives, arguments written included."""
    example = tuple(example)
    program, session = capture(fn, *copy.deepcopy(example))
    assert not reads_value(program)
    module = program.module()
    for inputs in (example, *others):
        eager_inputs, graph_inputs = copy.deepcopy(tuple(inputs)), copy.deepcopy(tuple(inputs))
        expected, actual = fn(*eager_inputs), module(*graph_inputs)
        result = compare((expected, eager_inputs), (actual, graph_inputs), kind=kind, **bounds)
        assert result.ok, (inputs, result.mismatches)
    return program, session


def t(value: Any, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(value, dtype=dtype)


def line_of(marker: str) -> int:
    with open(__file__, encoding="utf-8") as file:
        return next(i for i, line in enumerate(file, 1) if f"# {marker}" in line and "line_of" not in line)


# --- the specification's mask ----------------------------------------------------------------------------------------


def mllama_mask(x: Tensor, ratios: Tensor, ntok: int, num_chunks: int = 4, n_heads: int = 1) -> Tensor:
    """NEURON.md: the mllama vision mask, written from its specification."""
    rows, length = [], x.shape[2]
    for ratio in ratios:
        mask = torch.ones(num_chunks, length, 1, dtype=x.dtype)
        mask[: ratio[0] * ratio[1], :ntok] = 0
        mask = mask.view(num_chunks * length, 1)
        rows.append(mask @ mask.transpose(-1, -2) * torch.finfo(x.dtype).min)
    return torch.stack(rows).unsqueeze(1).expand(-1, n_heads, -1, -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mllama_mask_one_capture_serves_all_aspect_ratios(dtype: torch.dtype) -> None:
    x = torch.zeros(1, 4, 24, 8, dtype=dtype)
    ratios = [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]]
    program, session = same_as_eager(
        lambda x, ar: mllama_mask(x, ar, 17), (x, t([[1, 1]])), [(x, t([r])) for r in ratios]
    )
    zeros = {r[0] * r[1]: int((program.module()(x, t([r])) == 0).sum()) for r in ratios}
    assert zeros == {1: 2975, 2: 5372, 3: 7191, 4: 8432}
    (rewrite,) = session.rewrites
    assert (rewrite.rule, rewrite.kind) == ("slice.tensor-bound", Kind.EXACT)
    assert rewrite.location.source == "mask[: ratio[0] * ratio[1], :ntok] = 0"


# --- the grid --------------------------------------------------------------------------------------------------------


def both_ends(dim: int, step: int) -> Callable[..., Any]:
    """Every form of one slice write: both ends tensors, each alone, and beside a Python int."""

    def model(x: Tensor, start: Tensor, stop: Tensor, value: Tensor) -> list[Tensor]:
        results = []
        forms = (
            slice(start, stop, step),
            slice(None, stop, step),
            slice(start, None, step),
            slice(-3, stop, step),
            slice(start, 3, step),
        )
        for form, written in zip(forms, (value, 3, value, True, value), strict=True):
            y = x.clone()
            y[(form,) if dim == 0 else (slice(None), form) if dim == 1 else (..., form)] = written
            results.append(y)
        return results

    return model


# The mask does not depend on the dtype, so the other dtypes take one (dim, step) each.
GRID = [(d, s, torch.float32) for d in (0, 1, -1) for s in (1, 2, 3)]
GRID += [(0, 1, torch.bfloat16), (1, 2, torch.int32), (-1, 3, torch.bool)]


@pytest.mark.parametrize(("dim", "step", "dtype"), GRID)
def test_grid_every_bound_from_one_capture(dim: int, step: int, dtype: torch.dtype) -> None:
    """Traps 11, 12, 13, 16, 20: clamping, sentinels, negative and reversed bounds, steps; inf, nan and -0.0."""
    x = nasty_like(torch.zeros(5, 6, 7, dtype=dtype), 1)
    value = nasty_like(torch.zeros((), dtype=dtype), 2)
    others = [(x, t(a), t(b), value) for a, b in itertools.product(BOUNDS, BOUNDS)]
    same_as_eager(both_ends(dim, step), (x, t(1), t(2), value), others)


# --- forms of the write ----------------------------------------------------------------------------------------------

Model = Callable[..., Any]


def write(model: Model) -> Model:
    """The model on a copy of its first argument, which it returns."""

    def run(x: Tensor, *rest: Any) -> Tensor:
        y = x.clone()
        model(y, *rest)
        return y

    return run


def isub(y: Tensor, n: Tensor, *_: Any) -> None:
    y[:n] -= 5


def imul_inner(y: Tensor, n: Tensor, *_: Any) -> None:
    y[1, :n] *= 2


def fills(y: Tensor, n: Tensor, s: Tensor, *_: Any) -> None:
    y[:n].zero_()
    y[s:].fill_(7)
    y[:, n:s].add_(1)
    y[n:, :s].mul_(2).sub_(3)


def several_axes(y: Tensor, n: Tensor, s: Tensor, *_: Any) -> None:
    y[s:n, n:] = 9
    y[n:, 1:, ...] = 8
    y[None, :n, None, s:] = 4
    y[..., :n] = 3
    y[2, s:n] = 2
    y[::2, :n] = 1


def views(y: Tensor, n: Tensor, s: Tensor, *_: Any) -> None:
    """Trap 19: views of views, transposed views, a read of the base after the write."""
    y[0][:n] = 1
    y.transpose(0, 1)[s:, 1:n] = 2
    y.view(-1)[s : n * 3] = 3
    y[1:][:, 1:][:n] = y[0, 0]
    y.diagonal()[s:n] += 1
    y[:n][:, 1] = 5
    y[:n][..., s:] -= 1


def window_values(y: Tensor, n: Tensor, s: Tensor, other: Tensor) -> None:
    y[:n] = other[:n]
    y[n:, s:] = other[n:, s:] * 2 + 1
    y[s:n] = torch.where(other[s:n] > 0, other[s:n], 0)
    y[n * s :] = y[n * s :] + other[n * s :]
    y[:n, 0] = other[:n, 1]
    y[1, s:] = other[2, s:].abs()
    y[:n] = other[:n, :1]


def tensor_values(y: Tensor, n: Tensor, s: Tensor, other: Tensor) -> None:
    """Trap 17: a smaller source is broadcast; leading ones are dropped, as eager does."""
    y[:n] = other[0]
    y[s:, :n] = other[0, 0]
    y[n:] = other[:1]
    y[:, s:n] = other[:, :1]
    y[:, n:] = other[:, 2].view(1, 1, -1, 1)
    y[s] = other[1]
    y[1, s:] = other[None, None, 0, 0]


def mixed_dtypes(y: Tensor, n: Tensor, s: Tensor, other: Tensor) -> None:
    """A written value is cast to the base's dtype before the select."""
    y[:n] = 2
    y[s:] = True
    y[n:] = torch.tensor(0.7)
    y[:s] = other.to(torch.float64)[:s]
    y[:n, :s] = torch.tensor(3, dtype=torch.int64)
    y[s:n] = 1.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int64, torch.uint8], ids=str)
@pytest.mark.parametrize(
    "model",
    [isub, imul_inner, fills, several_axes, views, window_values, tensor_values, mixed_dtypes],
    ids=lambda m: m.__name__,
)
def test_write_forms(model: Model, dtype: torch.dtype) -> None:
    x, other = (nasty_like(torch.zeros(5, 5, dtype=dtype), seed) for seed in (3, 4))
    if dtype is torch.uint8 and model is isub:
        x = x // 2
    bounds = [0, 2, 4, 6, -1, -7]
    positions = model is tensor_values
    pairs = [(n, s) for n in bounds for s in ([0, -2] if positions else [0, 2, -2])]
    same_as_eager(write(model), (x, t(2), t(1), other), [(x, t(n), t(s), other) for n, s in pairs])


def test_write_forms_bool() -> None:
    def model(y: Tensor, n: Tensor, other: Tensor) -> None:
        y[:n] = True
        y[n:, 1:] = other[n:, 1:]
        y[:n] |= other[:n]
        y[n:] ^= True
        y[1:n] = ~other[1:n]
        y[:, :n] = 0.5

    x, other = (nasty_like(torch.zeros(5, 5, dtype=torch.bool), seed) for seed in (3, 4))
    same_as_eager(write(model), (x, t(2), other), [(x, t(n), other) for n in range(-7, 8)])


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint8, torch.uint16, torch.int32, torch.int64, torch.uint64, torch.bool], ids=str
)
def test_bounds_of_every_integer_dtype(dtype: torch.dtype) -> None:
    def model(x: Tensor, n: Tensor) -> Tensor:
        y = x.clone()
        y[:n] = 1
        y[n:, 1:n] -= 2
        return y

    info = (0, 1) if dtype is torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    values = [v for v in (0, 1, 3, -1, -3, -6, 99, *info, info[1] - 1) if v < 2**63 and info[0] <= v <= info[1]]
    x = torch.randn(5, 6)
    same_as_eager(model, (x, t(1, dtype)), [(x, t(v, dtype)) for v in values])


def test_bounds_of_one_element_and_of_mixed_dtypes() -> None:
    def model(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        y = x.clone()
        y[a : b[0, 0]] = 1
        y[a + 1 :, b:4] = 2
        y[a : torch.tensor(4)] = 3
        return y

    x = torch.randn(6, 6)
    others = [(x, t([a], torch.int32), t([[b]])) for a, b in itertools.product((0, 2, -2, 7), (0, 3, -1, -9))]
    same_as_eager(model, (x, t([1], torch.int32), t([[3]])), others)


def test_padding_masks_from_lengths() -> None:
    """The loop that speech models write: one row, one length."""

    def model(x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        mask, total = torch.zeros(x.shape[:2], dtype=torch.bool), []
        for row, length in enumerate(lengths):
            mask[row, :length] = True
            total.append(x[row, :length].amax())
        padded = torch.full_like(x, -1)
        for row, length in zip(torch.arange(3), lengths, strict=True):
            padded[row, :length] = x[row, :length]
        return mask, torch.stack(total) + padded.sum()

    x = torch.randint(0, 9, (3, 5, 2))
    same_as_eager(model, (x, t([1, 2, 3])), [(x, t(v)) for v in ([5, 1, 2], [1, 1, 1], [9, 4, -1])])


def test_inference_mode_inside_the_model() -> None:
    def model(x: Tensor, n: Tensor) -> Tensor:
        with torch.inference_mode():
            y, k = x.clone(), n + 1
            y[:k] -= 5
            y[k:] = x[k:]
            return y.clone()

    session = Session()
    try:
        with torch.no_grad():
            program = torch.export.export(Shell(model, session), (torch.randn(6), t(2)), strict=False)
    except RuntimeError as error:
        pytest.skip(f"torch.export itself refuses inference mode: {error}")
    assert compare(model(torch.ones(6), t(3)), program.module()(torch.ones(6), t(3))).ok


def test_buffers_and_arguments_are_written_in_place() -> None:
    class Cache(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("state", torch.zeros(2, 6, 3))

        def forward(self, k: Tensor, given: Tensor, n: Tensor) -> Tensor:
            self.state[:, :n] += k
            given[n:] = 0
            return self.state.sum(1) + self.state[:, n:].sum()

    model, reference = Cache(), Cache()
    k, given = torch.ones(3), torch.ones(4)
    program, _ = capture(model, k, given, t(2))
    assert len(program.graph_signature.buffers_to_mutate) == 1
    graph = program.module()
    for n in (0, 1, 3, -2, 9):
        expected_given, actual_given = given.clone(), given.clone()
        expected, actual = reference(k, expected_given, t(n)), graph(k, actual_given, t(n))
        assert compare((expected, expected_given), (actual, actual_given)).ok
    assert compare(reference.state, dict(graph.named_buffers())["fn.state"]).ok


def test_the_bound_may_be_written_after_the_slice_is_taken() -> None:
    def model(x: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
        y, n = x.clone(), n.clone()
        window = y[:n]
        n += 2
        window -= 1
        y[:n] *= 2
        return y, window.sum()

    x = torch.arange(8)
    same_as_eager(model, (x, t(2)), [(x, t(n)) for n in (0, 1, 5, -3)])


def test_a_window_is_a_view_of_the_live_base() -> None:
    def model(x: Tensor, n: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = x.clone()
        window, shifted = y[:n], y[:n] + 1
        y.add_(10)
        window[:, 0] = 3
        return y, window.sum(), shifted.sum()

    x = torch.arange(20).view(5, 4)
    same_as_eager(model, (x, t(2)), [(x, t(n)) for n in (0, 1, 5, -3, 9)])


def test_dynamic_shapes_keep_the_size_symbolic() -> None:
    def model(x: Tensor, n: Tensor) -> Tensor:
        y = x.clone()
        y[:, n:] = 0
        y[:, -n:] += 1
        return y

    length = torch.export.Dim("length", min=2, max=64)
    program, _ = capture(model, torch.randn(2, 6), t(2), dynamic_shapes={"args": ({1: length}, None)})
    module = program.module()
    for size, n in itertools.product((3, 6, 17), (0, 1, 5, -1, -9, 40)):
        x = torch.randn(2, size)
        assert compare(model(x, t(n)), module(x, t(n))).ok


# --- positions -------------------------------------------------------------------------------------------------------


def test_kv_cache_at_a_tensor_position() -> None:
    def model(cache: Tensor, k: Tensor, pos: Tensor) -> Tensor:
        cache[:, :, pos] = k
        cache[0, pos, :2] = 1
        cache[:, 1, pos, 1:] += 2
        return cache[1, :, pos] * 2

    cache, k = torch.randn(2, 3, 3, 4), torch.randn(2, 3, 4)
    _, session = same_as_eager(model, (cache, k, t(1)), [(cache, k, t(p)) for p in range(-3, 3)])
    assert not session.findings  # the pass has the boundary check the position


def test_kv_cache_of_several_positions() -> None:
    def model(cache: Tensor, k: Tensor, pos: Tensor) -> Tensor:
        cache[:, :, pos : pos + k.shape[2]] = k
        cache[:, 0, pos : pos + 6 : 2] = k[:, 0]
        return cache

    cache, k = torch.randn(2, 3, 8, 4), torch.randn(2, 3, 3, 4)
    positions = [0, 1, 2, 3, -8, -7, -6]  # pos + 6 must not pass the end: eager raises there
    program, session = same_as_eager(
        model, (cache, k, t(1)), [(cache, k, t(p)) for p in positions if p in (0, 1, 2) or p + 6 < 0]
    )
    assert not any("scatter" in str(n.target) and "select" not in str(n.target) for n in program.graph.nodes)
    assert all(f.severity is Severity.INFO for f in session.findings)  # the length is proved; only the end is not


def test_positions_beside_advanced_indices() -> None:
    def model(cache: Tensor, k: Tensor, rows: Tensor, pos: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = cache.clone()
        y[rows, :, pos] = k
        return y, y[pos, rows], y[:, [0, 2], pos]

    cache, k, rows = torch.randn(3, 4, 5), torch.randn(2, 4), t([2, 0])
    same_as_eager(model, (cache, k, rows, t(1)), [(cache, k, rows, t(p)) for p in (0, 2, -1, -3)])


def test_reading_at_a_position_is_a_gather() -> None:
    def model(x: Tensor, i: Tensor, j: Tensor) -> list[Tensor]:
        return [
            x[i],
            x[:, i],
            x[i, j],
            x[..., i],
            x[None, i, :, 1:3],
            x[i, None],
            x[1, j] + x[j : j + 2].sum(0),
            x[i][:j].sum(),
        ]

    x = torch.arange(64).view(4, 4, 4)
    same_as_eager(
        model,
        (x, t(1), t(2, torch.int16)),
        [(x, t(i), t(j, torch.int16)) for i, j in itertools.product((0, 3, -1, -4), repeat=2)],
    )


def test_a_slice_of_known_length_is_read_as_a_tensor() -> None:
    """Rotary tables and caches: ``table[pos : pos + s]`` has a fixed size, wherever it stands."""

    def model(table: Tensor, x: Tensor, pos: Tensor) -> tuple[Tensor, ...]:
        y, k = table.clone(), pos.item()
        part = table[pos : pos + x.shape[0]]
        y[pos + 1 : pos + 4] = table[pos : pos + 3]
        y[pos : pos + 1] *= 2
        y[pos : pos + 3] += x
        return y, x @ part.transpose(0, 1), table[pos : pos + 5 : 2][1:].reshape(-1), torch.cat([x, table[k : k + 2]])

    table, x = torch.arange(40).view(10, 4), torch.arange(12).view(3, 4)
    _, session = same_as_eager(model, (table, x, t(1)), [(table, x, t(p)) for p in (0, 2, 5)])
    severities = [f.severity for f in session.findings]
    assert (severities.count(Severity.INFO), severities.count(Severity.WARNING)) == (2, 4)
    assert [r.rule for r in session.rewrites].count("slice.tensor-offset-read") == 4


def test_a_slice_of_known_length_reads_the_same_elements() -> None:
    def model(table: Tensor, x: Tensor, pos: Tensor) -> tuple[Tensor, ...]:
        part = table[pos : pos + x.shape[0]]
        return x @ part.transpose(0, 1), table[:, pos : pos + 1].repeat(1, 2), table[pos : pos + 5 : 2][1:].reshape(-1)

    table, x = torch.arange(40).view(10, 4), torch.arange(12).view(3, 4)
    program, _ = same_as_eager(model, (table, x, t(1)), [(table, x, t(p)) for p in (0, 2, 3)])
    for past_the_end in (6, -1, 99):  # eager's result has another size there
        with pytest.raises((RuntimeError, IndexError)):
            program.module()(table, x, t(past_the_end))


def test_augmented_assignment_at_a_position() -> None:
    def model(x: Tensor, i: Tensor, n: Tensor) -> Tensor:
        y = x.clone()
        y[i] += 5
        y[i, :n] -= 1
        y[:n, i] *= 3
        y[i] -= 2
        return y

    x = torch.arange(20).view(4, 5)
    same_as_eager(model, (x, t(1), t(2)), [(x, t(i), t(n)) for i, n in itertools.product((0, 3, -2), (0, 2, 9, -1))])


def written_copy(x: Tensor, i: Tensor) -> Tensor:
    y = x.clone()
    y[i].zero_()  # marker: written copy
    return y


def stale_copy(x: Tensor, i: Tensor) -> Tensor:
    y = x.clone()
    row = y[i]
    y.mul_(2)
    return y + row


def put_back_and_written_again(x: Tensor, i: Tensor) -> Tensor:
    y = x.clone()
    row = y[i]
    row += 1
    y[i] = row
    row += 1
    return y


def put_elsewhere(x: Tensor, i: Tensor) -> Tensor:
    y, j = x.clone(), i + 1
    row = y[i]
    row += 1
    y[j] = row
    return y


def stale_slice(x: Tensor, i: Tensor) -> Tensor:
    y = x.clone()
    rows = y[i : i + 2].view(-1)
    y.zero_()
    return y.sum() + rows


def base_written_between(x: Tensor, i: Tensor) -> Tensor:
    y = x.clone()
    row = y[i]
    y.zero_()
    row += 1
    y[i] = row
    return y


@pytest.mark.parametrize(
    "model",
    [written_copy, stale_copy, put_back_and_written_again, put_elsewhere, base_written_between, stale_slice],
    ids=lambda m: m.__name__,
)
def test_a_position_that_had_to_be_a_view_is_refused(model: Model) -> None:
    with pytest.raises(CaptureError, match="one memory") as caught:
        capture(model, torch.randn(4, 3), t(1))
    (finding,) = caught.value.report.findings
    assert finding.code == "NX201"
    if model is written_copy:
        assert finding.location.line == line_of("marker: written copy")


def test_a_copy_that_is_only_read_is_not_refused() -> None:
    def model(x: Tensor, i: Tensor) -> Tensor:
        y = x.clone()
        row = y[i] * 2
        y[i] = row
        other = y[i].clone()
        y.add_(1)
        return y + other

    same_as_eager(model, (torch.randn(4, 3), t(1)), [(torch.randn(4, 3), t(i)) for i in (0, 3, -1)])


# --- numbers that came from .item() ----------------------------------------------------------------------------------


def test_bounds_from_item_are_traced_back_to_the_tensor() -> None:
    """2.13 invents guards for these (``Eq(u1, u14)``), 2.9 refuses them."""

    def model(x: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
        y, k = x.clone(), n.item()
        y[:k] -= 5
        y[k + 1 : 2 * k - 1] = 3
        y[k:] = x[k:]
        y[0, k:] = k
        return y, x[:k].sum()

    program, session = capture(model, torch.arange(25).view(5, 5), t(2, torch.int32))
    assert [s.kind for s in session.reads] == ["item"]
    module = program.module()
    for n in range(-7, 8):
        inputs = (torch.arange(25).view(5, 5), t(n, torch.int32))
        assert compare(model(*inputs), module(*inputs)).ok, n


def test_item_of_a_tensor_written_since_is_not_traced_back() -> None:
    def model(x: Tensor, n: Tensor) -> Tensor:
        y, n = x.clone(), n.clone()
        k = n.item()
        n.add_(2)
        y[:k] = 0
        return y

    program, _ = capture(model, torch.randn(6), t(2))
    for n in (0, 1, 4, -2):
        assert compare(model(torch.ones(6), t(n)), program.module()(torch.ones(6), t(n))).ok


@pytest.mark.skipif(torch.__version__ < "2.13", reason="torch 2.9 cannot slice with a number that came from a tensor")
def test_item_windows_fall_back_to_torch_where_masks_do_not_reach() -> None:
    def model(x: Tensor, n: Tensor) -> Tensor:
        return torch.nn.functional.pad(x[: n.item()], (0, 1))

    session = Session()
    with torch.no_grad():
        program = torch.export.export(Shell(model, session), (torch.randn(6), t(2)), strict=False)
    assert [f.code for f in session.findings] == ["NX403"]
    assert compare(model(torch.ones(6), t(3)), program.module()(torch.ones(6), t(3))).ok


# --- reads -----------------------------------------------------------------------------------------------------------


def exact_reads(x: Tensor, n: Tensor, s: Tensor) -> list[Any]:
    window = x[:n]
    return [
        window.sum() if not x.dtype.is_floating_point else window.amax(),
        window.max(),
        window.min(),
        torch.amax(x[:, :n], dim=1),
        x[:n].amin((0, 1)),
        (window > 0).any(),
        (window > 0).all(dim=0),
        (x[:n, 1:] == 0).sum(),
        torch.max(window, dim=0, keepdim=True),
        window.min(0).indices,
        window[:, 0].argmax(),
        x[:, :n].argmin(dim=-1),
        window.isnan().sum(dim=(0, 1)),
        torch.count_nonzero(window),
        torch.maximum(window, window[:, :1]).amax(1).min(),
        (window + x[:n] * 2).to(torch.float64).amin(0)
        if x.dtype.is_floating_point
        else (window.to(torch.int64) * 2).prod(),
        window.clamp(-1, 1).abs().amax(),
        x[-n:].amin(),
        x[:n].max(1).values.min() + s,
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int32], ids=str)
def test_exact_reads(dtype: torch.dtype) -> None:
    """Signs of zeros apart (max of 0.0 and -0.0 depends on the order), every bit; inf and nan included."""
    cases = [nasty_like(torch.zeros(6, 5, dtype=dtype), seed) for seed in range(3)]
    if dtype.is_floating_point:
        cases = [torch.where(c == 0, torch.zeros((), dtype=dtype), c) for c in cases]
    others = [(x, t(n), t(0)) for x in cases for n in (1, 2, 5, 6, 9, -1, -4)]
    _, session = same_as_eager(exact_reads, (cases[0], t(2), t(0)), others)
    inexact = [r for r in session.rewrites if r.kind is not Kind.EXACT]
    assert all("sign of a zero" in r.bound for r in inexact) and bool(inexact) == dtype.is_floating_point


def float_reads(x: Tensor, n: Tensor, s: Tensor) -> list[Tensor]:
    window = x[s:n]
    return [
        window.sum(),
        window.sum(0),
        window.sum(dim=1).sum(),
        window.mean(),
        window.mean(dim=0, keepdim=True),
        window.mean(dim=1).amax(),
        torch.softmax(window, dim=0)[:, 1].sum(),
        torch.log_softmax(x[:, s:n], -1).amax(),
        window.logsumexp(0),
        window.exp().sum(),
        torch.tanh(window * 0.5).amin(),
        (window / 3).sigmoid().mean(),
        window.square().sum(0).sqrt(),
        window.prod(),
    ]


def test_float_reads_are_close_and_say_so() -> None:
    """DESIGN: a masked prefix sum is the same sum in another order; the record carries the bound."""
    x = torch.randn(6, 6)
    pairs = [
        (n, s)
        for n, s in itertools.product((2, 4, 6, 9, -1), (0, 1, -6))
        if (n if n >= 0 else n + 6) > (s if s >= 0 else s + 6)
    ]
    _, session = same_as_eager(
        float_reads, (x, t(3), t(1)), [(x, t(n), t(s)) for n, s in pairs], kind="close", max_abs=2e-6
    )
    assert all(r.kind is Kind.REASSOCIATED and r.bound for r in session.rewrites)


def test_empty_windows_reduce_as_in_eager() -> None:
    def model(x: Tensor, n: Tensor) -> list[Tensor]:
        window = x[:n]
        return [
            window.sum(),
            window.sum(0),
            window.prod(),
            (window > 0).any(),
            (window > 0).all(),
            window.mean(),
            window.logsumexp(0),
        ]

    x = torch.randn(4, 3)
    same_as_eager(model, (x, t(2)), [(x, t(0)), (x, t(-4)), (x, t(-9))], kind="close", max_abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_mean_of_a_low_precision_window_is_accumulated_as_eager_does(dtype: torch.dtype) -> None:
    x = (torch.randn(64, 8) * 100 + 1000).to(dtype)
    same_as_eager(lambda x, n: x[:n].mean(0), (x, t(9)), [(x, t(n)) for n in (1, 33, 64)], kind="close", max_ulp=1)


def test_integer_division_outside_the_window_does_not_raise() -> None:
    def model(x: Tensor, d: Tensor, n: Tensor) -> Tensor:
        y = x.clone()
        y[:n] //= d[:n]
        y[:n] = torch.remainder(y[:n], d[:n] + 1)
        y[:n] = 100 // d[:n]
        y[n:] %= 7
        return y

    x, d = torch.arange(8) * 11, t([1, 2, 3, 4, 0, 0, 0, 0])
    same_as_eager(model, (x, d, t(2)), [(x, d, t(n)) for n in range(5)])


# --- refusals --------------------------------------------------------------------------------------------------------


def cases_refused() -> list[tuple[str, str, Model]]:
    return [
        ("shape", "NX203", lambda x, n: torch.zeros(x[:n].shape)),
        ("matmul", "NX203", lambda x, n: x[:n] @ x),
        ("linear", "NX203", lambda x, n: torch.nn.functional.linear(x[:n], x)),
        ("cat", "NX203", lambda x, n: torch.cat([x[:n], x])),
        ("len", "NX203", lambda x, n: x + len(x[:n])),
        ("iteration", "NX203", lambda x, n: list(x[:n])),
        ("other-bounds", "NX203", lambda x, n: (x[:n] + x[1 : n + 1]).sum()),
        ("other-axis", "NX203", lambda x, n: (x[:n] * x[:, :n]).sum()),
        ("whole-tensor", "NX203", lambda x, n: (x[:n] * x).sum()),
        ("out", "NX203", lambda x, n: torch.add(x[:n], 1, out=x)),
        ("inplace-relu", "NX203", lambda x, n: torch.nn.functional.relu(x[:n], inplace=True)),
        ("random", "NX203", lambda x, n: x[:n].uniform_()),
        ("argmax-not-prefix", "NX203", lambda x, n: x[n:].argmax(0)),
        ("element", "NX203", lambda x, n: x[:n][0]),
        ("numpy", "NX203", lambda x, n: x[:n].numpy()),
        ("contiguous-write", "NX203", lambda x, n: x[:, :n].contiguous().add_(1)),
        ("assign-other", "NX201", lambda x, n: x.__setitem__(slice(None, n), x[1 : n + 1])),
        ("assign-other-size", "NX201", lambda x, n: x.__setitem__(slice(None, n), torch.zeros(9, 4)[:n])),
        ("dynamic-size", "NX201", lambda x, n: x.__setitem__(slice(None, n), x[x[:, 0] > 0])),
        ("advanced", "NX201", lambda x, n: x.__setitem__(([0, 1], slice(None, n)), 0)),
        ("too-large", "NX201", lambda x, n: x.__setitem__((slice(None, n), slice(None)), torch.zeros(3))),
        ("too-many-dims", "NX201", lambda x, n: x.__setitem__((0, slice(None, n)), torch.zeros(2, 2))),
        ("wrong-length", "NX201", lambda x, n: x.__setitem__(slice(n, n + 3), torch.zeros(2, 4))),
        ("overflow", "NX201", lambda x, n: x.to(torch.uint8).__setitem__(slice(None, n), 300)),
        ("nan-in-int", "NX201", lambda x, n: x.long().__setitem__(slice(None, n), float("nan"))),
        ("tensor-step", "NX404", lambda x, n: x.__setitem__(slice(None, None, n), 0)),
    ]


@pytest.mark.parametrize(("code", "model"), [c[1:] for c in cases_refused()], ids=[c[0] for c in cases_refused()])
def test_refused_at_the_users_line(code: str, model: Model) -> None:
    session = Session()
    with pytest.raises(CaptureError) as caught, torch.no_grad():
        torch.export.export(Shell(model, session), (torch.randn(4, 4), t(2)), strict=False)
    (finding,) = session.errors
    assert caught.value.report.findings == [finding] and caught.value.construct
    assert (finding.code, finding.location.file) == (code, __file__)
    assert finding.location.source and finding.location.source in str(caught.value)


def test_an_error_stands_even_when_the_model_catches_it() -> None:
    def model(x: Tensor, n: Tensor) -> Tensor:
        try:
            return x + len(x[:n])
        except Exception:
            return x

    session = Session()
    with torch.no_grad():
        torch.export.export(Shell(model, session), (torch.randn(4), t(2)), strict=False)
    assert [f.code for f in session.errors] == ["NX203"]


@pytest.mark.parametrize(
    ("error", "model"),
    [
        (TypeError, lambda x, n: x.__setitem__(slice(None, n.float()), 0)),
        (TypeError, lambda x, n: x.__setitem__(slice(None, n.expand(2)), 0)),
        (TypeError, lambda x, n: x.__setitem__(slice(None, n), [1.0, 2.0])),
        (IndexError, lambda x, n: x[0, 0, 0, :n].sum()),
        (IndexError, lambda x, n: x.sum()[:n].sum()),
        (ValueError, lambda x, n: x[n::-1].sum()),
        (RuntimeError, lambda x, n: x.long()[:n].mul_(0.5)),
        (RuntimeError, lambda x, n: x.long()[:n].mean()),
    ],
)
def test_what_eager_refuses_is_refused_alike(error: type[Exception], model: Model) -> None:
    with pytest.raises(error):
        model(torch.randn(4, 4), t(2))
    with pytest.raises(error):
        capture(model, torch.randn(4, 4), t(2))


def test_a_window_may_not_leave_the_model() -> None:
    session = Session()

    class Returns(Shell):
        def forward(self, x: Tensor, n: Tensor) -> Any:
            outputs = super().forward(x, n)
            check_outputs(session, outputs)
            return outputs

    def model(x: Tensor, n: Tensor) -> dict[str, Any]:
        part = x[:n]  # marker: escapes
        return {"part": part, "x": x}

    with pytest.raises(CaptureError, match="an output needs the size"), torch.no_grad():
        torch.export.export(Returns(model, session), (torch.randn(4), t(2)), strict=False)
    assert [(f.code, f.location.line) for f in session.errors] == [("NX203", line_of("marker: escapes"))]


# --- training --------------------------------------------------------------------------------------------------------


def test_gradients_do_not_see_what_lies_outside_the_window() -> None:
    """sqrt and log have an infinite slope at 0; zero times infinity would be nan there."""

    def model(x: Tensor, w: Tensor, n: Tensor) -> Tensor:
        y = x * w
        z = y.clone()
        z[:n] = y[:n].sqrt() + torch.log(y[:n])
        return z.sum() + x[:n].square().mean() + (x[:n] * w).sum()

    x = t([1.0, 2.0, 0.0, float("inf")], torch.float32)
    program, _ = capture(model, x.clone().requires_grad_(), t(1.0, torch.float32).requires_grad_(), t(1), training=True)
    for n in (0, 1, 2):
        grads = []
        for fn in (model, program.module()):
            inputs = x.clone().requires_grad_(), t(1.0, torch.float32).requires_grad_()
            value = fn(*inputs, t(n))
            grads.append(torch.autograd.grad(value, inputs))
        assert compare(grads[0], grads[1], kind="close", max_abs=1e-6).ok, (n, grads)


def test_no_grad_regions_leave_no_higher_order_op_and_detach_in_training() -> None:
    def model(x: Tensor, w: Tensor) -> Tensor:
        with torch.no_grad():
            scale = (x * w).abs().mean()
        with torch.enable_grad():
            y = x * w
        return y / scale

    inputs = (torch.randn(4), torch.randn(4))
    with torch.no_grad():
        program = torch.export.export(Shell(model, Session()), inputs, strict=False)
    assert not any("grad_enabled" in str(n.target) for n in program.graph.nodes)
    assert compare(model(*inputs), program.module()(*inputs)).ok

    program = torch.export.export(
        Shell(model, Session(), training=True), tuple(i.requires_grad_() for i in inputs), strict=False
    )
    assert not any("grad_enabled" in str(n.target) for n in program.graph.nodes)
    grads = [torch.autograd.grad(fn(*inputs).sum(), inputs) for fn in (model, program.module())]
    assert compare(grads[0], grads[1]).ok


def test_a_write_under_no_grad_to_what_needs_a_gradient_is_reported() -> None:
    def model(x: Tensor, w: Tensor) -> Tensor:
        y = x * w
        with torch.no_grad():
            y.mul_(2)
        return y.sum()

    session = Session()
    shell = Shell(model, session, training=True)
    torch.export.export(shell, (torch.randn(3).requires_grad_(), torch.randn(3).requires_grad_()), strict=False)
    assert [f.severity for f in session.findings] == [Severity.ERROR]


# --- the surroundings ------------------------------------------------------------------------------------------------


def test_static_and_known_indices_are_left_to_torch() -> None:
    def model(x: Tensor) -> Tensor:
        y = x.clone()
        y[1:3] = 2
        y[: torch.tensor(2)] = 1
        y[[0, 1]] = 5
        y[y > 0] = 4
        return y + y[1] + y[None, ..., ::2].sum() + y[torch.tensor([1])] + y[x > 0].sum()

    session = Session()
    with torch.no_grad():
        program = torch.export.export(Shell(model, session), (torch.randn(4),), strict=False).run_decompositions({})
    assert not session.rewrites and not session.findings
    assert compare(model(torch.ones(4)), program.module()(torch.ones(4))).ok


def test_other_machinery_goes_on_working() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(4, 4)
            self.seen: list[int] = []
            self.linear.register_forward_hook(lambda *_: None)

        def forward(self, x: Tensor, n: Tensor) -> Tensor:
            def row(i: Tensor) -> Tensor:
                return x[0] * i

            y = torch.vmap(row)(torch.arange(4))
            y = torch.cond(n > 1, lambda a: a + 1, lambda a: a - 1, (y,))
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = self.linear(y).float()
            with torch._C.DisableTorchFunctionSubclass():
                y = y + x
            y = torch.nn.functional.scaled_dot_product_attention(y[None], y[None], y[None])[0]
            y = y.clone()
            y[:n] = 0
            return y

    model = Model().eval()
    x = torch.randn(4, 4)
    program, _ = capture(model, x, t(2))
    for n in (0, 1, 2, -1):
        with torch.no_grad():
            assert compare(model(x, t(n)), program.module()(x, t(n)), kind="close", max_abs=1e-6).ok


def test_eager_tensors_are_left_alone() -> None:
    session = Session()
    x = torch.arange(6)
    with interception(session):
        x[: t(2)] = 9
        part = x[: t(3)]
        assert bool(x[t(0)] == 9) and type(part) is Tensor
    assert x.tolist() == [9, 9, 2, 3, 4, 5] and not session.rewrites and not session.sites


def test_golden_graph() -> None:
    """Given: ``y[:n] = v``. Result: comparisons of ``arange`` and one ``where``."""
    program, _ = capture(
        write(lambda y, n, v: y.__setitem__(slice(None, n), v)), torch.randn(4, 3), t(2), torch.randn(3)
    )
    ops = [str(n.target).removeprefix("aten.") for n in program.graph.nodes if n.op == "call_function"]
    assert ops == [
        "clone.default",
        "arange.default",
        "lt.Scalar",
        "add.Tensor",
        "where.self",
        "lt.Tensor",
        "view.default",
        "where.self",
        "copy.default",
    ]
