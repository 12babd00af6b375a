"""lift-int-casts: how far it follows what is made of integers. Ops that no table lists, sums in low precision, constants, bodies of
higher-order ops, and what is told where it ends."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from lifting import BF16, HIDDEN, POSITIONS, applied, errors, inv_freq, lifted, untouched
from torch import Tensor, nn
from torch.nn import functional as F

import nxfx
from nxfx.verification.equivalence import error_against

P = POSITIONS[0]
H = HIDDEN[0, 0]
FAR = {"args_0": (0, 131071)}
TABLE = inv_freq(64)

UNLISTED: dict[str, Callable[[Tensor], Tensor]] = {
    "clip": lambda q: q.clip(0, 1e5),
    "clip-tensor": lambda q: q.clip(torch.zeros(1, dtype=q.dtype)),
    "nan_to_num": torch.nan_to_num,
    "hardtanh": lambda q: F.hardtanh(q, 0, 1e5),
    "silu": F.silu,
    "copysign": lambda q: torch.copysign(q, q),
    "float_power": lambda q: torch.float_power(q, 0.9).to(q.dtype),
    "logit": lambda q: torch.logit(q / 40000) * 10000,
    "softmax": lambda q: torch.softmax(q / 10, 0) * 1000,
    "norm": lambda q: torch.linalg.vector_norm(torch.stack([q, q * 0.3], -1), dim=-1),
    "layer_norm": lambda q: F.layer_norm(q, (16,)) * 100,
    "fliplr": lambda q: q[None].fliplr()[0],
    "column_stack": lambda q: torch.column_stack([q, q])[:, 0],
    "atleast_2d": lambda q: torch.atleast_2d(q)[0],
    "rot90": lambda q: torch.rot90(q.view(4, 4)).reshape(-1),
    "kron": lambda q: torch.kron(q, torch.ones(2, dtype=q.dtype))[:16],
    "interpolate": lambda q: F.interpolate(q.view(1, 1, 4, 4), size=(4, 4), mode="bilinear").flatten(),
    "avg_pool": lambda q: F.avg_pool1d(q[None, None], 1)[0, 0],
    "pixel_unshuffle": lambda q: F.pixel_unshuffle(q.view(1, 1, 4, 4), 2).flatten(),
    "index_fill": lambda q: q.index_fill(0, torch.tensor([0]), 3.0),
    "put": lambda q: q.put(torch.tensor([0]), q[1:2]),
    "scatter_reduce": lambda q: torch.zeros(16, dtype=q.dtype).scatter_reduce(0, torch.arange(16), q, "amax"),
    "sort": lambda q: q.sort().values,
    "topk": lambda q: q.topk(16).values,
    "cummax": lambda q: q.cummax(0).values,
    "max-of-a-dimension": lambda q: q - q.max(-1, keepdim=True)[0],
    "median": lambda q: q - q.median(),
    "var_mean": lambda q: q - torch.var_mean(q, 0)[1],
    "aminmax": lambda q: q - torch.aminmax(q)[0],
    "broadcast_tensors": lambda q: torch.broadcast_tensors(q, torch.zeros(3, 16, dtype=q.dtype))[0][0],
    "unbind": lambda q: torch.stack(q.unbind(0)),
}


@pytest.mark.parametrize("op", UNLISTED)
def test_an_op_that_makes_floats_of_its_operands_alone_is_followed(op: str) -> None:
    found = applied(lambda p, h: h + (UNLISTED[op](p.to(BF16) * 1.1)[:, None] * 0.3).cos(), (P, H), ranges=FAR)
    before, after = errors(found, (P, H * 0))
    assert found.result.changed and after < before / 20, (before, after)


def test_where_positions_are_sorted_their_places_stay_integers() -> None:
    found = lifted(lambda p, h: h[(p.to(BF16) * 1.1).sort().indices] * (p.to(BF16) * 1.1).sort().values.cos()[:, None], (P, H), ranges=FAR)
    assert found.result.changed


def test_the_difference_from_the_largest_position_is_exact() -> None:
    """In float32 the model's own rounded maximum would not cancel against unrounded positions."""
    found = lifted(lambda p: torch.exp((p.to(BF16).float() - p.to(BF16).max(-1, keepdim=True)[0].float()) * 0.5), (P,), ranges=FAR)
    truth = torch.exp((P - P.max()).double() * 0.5)
    assert error_against(truth, found.after(P)[0]).max < 1e-6


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_meshgrid_of_any_size(dynamic: bool) -> None:
    class Model(nn.Module):
        def forward(self, hidden: Tensor) -> Tensor:
            rows, columns = (torch.arange(n, dtype=hidden.dtype) for n in hidden.shape)
            y, x = torch.meshgrid(rows, columns, indexing="xy")
            return hidden * (y * 0.3 + x * 0.7).cos().t()

    args = (torch.ones(600, 500, dtype=BF16),)
    size = torch.export.Dim("size", min=2, max=4096)
    found = applied(Model(), args, **({"dynamic_shapes": {"hidden": {0: size}}} if dynamic else {}))
    before, after = errors(found, args)
    assert after < before / 100 and not found.codes, "a grid is no activation"


# --- sums, and constants ----------------------------------------------------------------------------------------------


COUNTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "index_add": lambda ids, ones: torch.zeros(2, dtype=BF16).index_add(0, ids, ones),
    "scatter_add": lambda ids, ones: torch.zeros(2, dtype=BF16).scatter_add(0, ids, ones),
    "index_put": lambda ids, ones: torch.zeros(2, dtype=BF16).index_put((ids,), ones, accumulate=True),
    "of-a-number": lambda ids, ones: torch.zeros(2, dtype=BF16).index_put((ids,), torch.tensor(1.0, dtype=BF16), accumulate=True),
}


@pytest.mark.parametrize("ones", [lambda ids: torch.ones(4000, dtype=BF16), lambda ids: (ids >= 0).to(BF16)], ids=["ones", "mask"])
@pytest.mark.parametrize("how", COUNTS)
def test_counts_do_not_stop_at_256(how: str, ones: Callable[[Tensor], Tensor]) -> None:
    """A sum of ones in bf16 is 256 for ever: 256 + 1 is 256."""
    ids = torch.randint(0, 2, (4000,), generator=torch.Generator().manual_seed(0))
    found = lifted(lambda ids, h: h * COUNTS[how](ids, ones(ids)), (ids, torch.ones(2, dtype=BF16)), ranges={"args_0": (0, 1)})
    counted = found.after(ids, torch.ones(2, dtype=BF16))[0]
    assert torch.equal(counted, torch.bincount(ids).to(BF16))


def test_a_prefix_sum_of_ones_is_a_sequence() -> None:
    """SAM's dense position encoding."""

    def model(h: Tensor, gaussian: Tensor) -> Tensor:
        ones = torch.ones(64, 64, dtype=BF16)
        places = torch.stack([(ones.cumsum(1) - 0.5) / 64, (ones.cumsum(0) - 0.5) / 64], -1)
        return h + (2 * torch.pi * ((2 * places - 1) @ gaussian)).sin()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("gaussian", (torch.randn(2, 32, generator=torch.Generator().manual_seed(0)) * 128).to(BF16))

        def forward(self, h: Tensor) -> Tensor:
            return model(h, self.gaussian)

    found = lifted(Model(), (torch.zeros(64, 64, 32, dtype=BF16),))
    before, after = errors(found, (torch.zeros(64, 64, 32, dtype=BF16),))
    assert after < before / 100


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        (lambda h: h * (torch.full((16,), 999.3, dtype=BF16)[:, None] * TABLE.to(BF16)).cos().repeat(1, 2), True),
        (lambda h: h * ((torch.ones(16, dtype=BF16) * 999)[:, None] * TABLE.to(BF16)).cos().repeat(1, 2), True),
        (lambda h: h * (h.new_tensor([999, 750]).repeat(8)[:, None] * TABLE.to(BF16)).cos().repeat(1, 2), True),
        (lambda h: h * (torch.arange(16, 273, dtype=BF16)[:16, None] * 0.5), True),
        (lambda h: h * (torch.arange(257, dtype=BF16)[:16, None] * 0.5), False),
        (lambda h: h + torch.arange(0, 257, 16, dtype=BF16)[:16, None], False),
    ],
)
def test_a_constant_that_bf16_rounds_is_a_position_and_one_that_it_holds_is_none(model: Callable[[Tensor], Tensor], changes: bool) -> None:
    """Of arange(257) the last number is 256, which bf16 holds."""
    found = lifted(model, (H,))
    assert found.result.changed == changes
    assert set(found.codes) <= {"NX102"}, "that 999 is 1000 in a constant of the code is beyond repair"


def test_a_table_that_is_written_in_parts_is_lifted_before_it_is_folded() -> None:
    """The textbook's sinusoids: the whole pipeline, where constants that are written into are computed once."""

    def model(hidden: Tensor) -> Tensor:
        position = torch.arange(hidden.shape[-2], dtype=hidden.dtype)[:, None]
        scale = torch.exp(torch.arange(0, 32, 2).to(hidden.dtype) * (-9.21 / 32))
        table = torch.zeros(hidden.shape[-2], 32, dtype=hidden.dtype)
        table[:, 0::2] = torch.sin(position * scale)
        table[:, 1::2] = torch.cos(position * scale)
        return hidden + table

    class Model(nn.Module):
        def forward(self, hidden: Tensor) -> Tensor:
            return model(hidden)

    args = (torch.zeros(1500, 32, dtype=BF16),)
    truth = model(args[0].double())
    prepared = nxfx.prepare(Model(), args)
    assert error_against(truth, prepared(*args)).mean < 0.001 < 0.1 < error_against(truth, Model()(*args)).mean


# --- products ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("terms", [2, 3, 4])
def test_a_small_product_in_low_precision_is_spread_only_where_it_is_lifted(terms: int) -> None:
    """Each of its terms would be rounded, where a matrix product adds in float32."""
    weight = torch.randn(8, terms, generator=torch.Generator().manual_seed(0)).to(BF16)
    args = (torch.randint(0, 200, (64, terms)), torch.ones(64, 8, dtype=BF16))
    untouched(lambda c, h: h * F.linear(c.to(BF16) * 0.1, weight), args, ranges={"args_0": (0, 199)})
    far = applied(lambda c, h: h * F.linear(c.to(BF16) * 0.1, weight).cos(), args, ranges={"args_0": (0, 199)})
    assert far.rules == ["lift.sensitive-use", "lift.small-product"]


# --- where it ends ----------------------------------------------------------------------------------------------------


FREQUENCIES = torch.exp(torch.arange(64) * -0.03)
TOLD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "product": lambda p, h: (h * p[:, None].to(BF16)).cos(),
    "view-of-a-table": lambda p, h: (h[:, :1] * torch.exp(torch.arange(64, dtype=BF16) * -0.03)[None]).sin(),
    "scaled-and-shifted": lambda p, h: ((h * torch.arange(64, dtype=BF16)) * 0.3 + 0.25).cos(),
    "floor": lambda p, h: torch.floor(h + p[:, None].to(BF16) * 0.7),
    "index": lambda p, h: H[((h[:, 0] + p.to(BF16)) % 16).abs().to(torch.int64)],
    "sampled": lambda p, h: F.grid_sample(h[None, None].float(), (h[:2, :2, None] + p[:2].to(BF16) * 1e-4)[None].float()),
    "one-hot": lambda p, h: ((F.one_hot(p % 16, 16).to(BF16) @ h) * p[:, None].to(BF16)).sin(),
}  # fmt: skip


@pytest.mark.parametrize("case", TOLD)
def test_positions_that_went_into_an_activation_before_a_step_or_a_sine_are_told(case: str) -> None:
    found = lifted(TOLD[case], (P, H), ranges=FAR)
    told = [f for f in found.result.findings if f.code == "NX103"]
    assert told and all(f.location.file and f.location.line for f in told)


@pytest.mark.parametrize(
    "model",
    [
        lambda p, h: (h * (p[:, None].to(BF16) * 0.3).cos()).sin(),
        lambda p, h: (h * (p > 30003).to(torch.int64)[:, None]).sin(),
        lambda p, h: (h.float() * p[:, None]).sin(),
        lambda p, h: torch.softmax(h @ h.t() + p.to(BF16) * 0.1, -1),
    ],
    ids=["wave", "mask", "float32", "softmax"],
)
def test_what_nothing_magnifies_is_not_told(model: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert "NX103" not in lifted(model, (P, H), ranges=FAR).codes


class Conditional(nn.Module):
    """Positions that a body turns, by a table that it closes over or in the model's dtype from outside."""

    def __init__(self, outside: bool) -> None:
        super().__init__()
        self.outside = outside
        self.register_buffer("table", TABLE)

    def forward(self, flag: Tensor, p: Tensor, h: Tensor) -> Tensor:
        given = p.to(BF16) if self.outside else p
        both = h * (p[:, None].to(BF16) * self.table.to(BF16)).cos().repeat(1, 2)
        return both * torch.cond(flag, lambda p, h: self._turned(p, h), lambda p, h: h.clone(), (given, h))

    def _turned(self, p: Tensor, h: Tensor) -> Tensor:
        return h * (p[:, None].to(BF16) * self.table.to(BF16)).cos().repeat(1, 2)


def test_a_body_knows_the_table_that_it_closes_over() -> None:
    args = (torch.tensor(True), P, torch.ones(16, 64, dtype=BF16))
    prepared = nxfx.prepare(Conditional(outside=False), args)
    truth = (P.double()[:, None] * TABLE.double()).cos().repeat(1, 2) ** 2
    assert error_against(truth, prepared(*args)).mean < 0.005 < 0.1 < error_against(truth, Conditional(outside=False)(*args)).mean


def test_what_a_body_is_given_rounded_stays_as_it_is_outside_too() -> None:
    """Two rotations by the same rounded positions belong together."""
    args = (torch.tensor(True), P, torch.ones(16, 64, dtype=BF16))
    prepared = nxfx.prepare(Conditional(outside=True), args)
    assert torch.equal(prepared(*args), Conditional(outside=True)(*args))
    assert "goes into cond" in next(f.message for f in prepared.report.findings if f.code == "NX101")


def test_positions_kept_in_a_low_precision_state_are_compared_as_they_were() -> None:
    class Decay(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("last", torch.arange(29990, 30006).to(BF16))

        def forward(self, p: Tensor) -> Tensor:
            low = p.to(BF16)
            decay = torch.exp((self.last.float() - low.float()) * 0.05)
            self.last.copy_(low)
            return decay

    prepared = nxfx.prepare(Decay(), (P,), ranges={"p": (0, 131071)}, share_state=False)
    assert torch.equal(prepared(P), Decay()(P))
