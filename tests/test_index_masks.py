"""Writes at positions that are data: several writers of one element, sums, values for the elements of a mask in turn."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from test_mask_slice_writes import left, masked, nasty, rules
from torch import Tensor

import nxfx
from nxfx.verification.equivalence import compare

LAST = {
    "indices that may repeat": lambda x, i: x.clone().index_copy_(0, i, x[:3] * 2),
    "two index tensors": lambda x, i: torch.index_put(x, (i, i + 1), x[0, :3]),
    "repeated constants": lambda x, i: torch.index_put(x, (torch.tensor([1, 1, 3]),), x[:3]),
    "one position counted from both ends": lambda x, i: torch.index_put(x, (torch.tensor([3, -1]),), x[:2]),
    "a grid": lambda x, i: torch.index_put(x, (i[:, None], i[None, :2]), x[:3, :2]),
    "a grid with one row of values": lambda x, i: torch.index_put(x, (i[:, None], i[None, :2]), x[0, :2]),
    "rows of a scatter": lambda x, i: x.scatter(0, i[:, None].expand(3, 6), x[1:]),
    "places of a scatter": lambda x, i: x.scatter(1, x.isnan().long().cumsum(1)[:, :3], x[:, 3:]),
}


@pytest.mark.parametrize("name", LAST)
def test_of_several_writers_the_last_one_stays(name: str) -> None:
    """As in eager on a CPU; torch leaves it open."""
    more = [(nasty(4, 6), torch.tensor(i)) for i in ([1, 1, 1], [0, 3, 0], [3, 2, 3])]
    _, result, _ = masked(LAST[name], torch.randn(4, 6), torch.tensor([2, 0, 1]), more=more)
    assert rules(result) == ["index-several"]


def test_padding_slots_are_written_nowhere() -> None:
    """Positions of -1 in a scatter or an index_copy, which eager refuses."""
    gm, _, _ = masked(lambda x, i, v: x.index_copy(0, i, v), torch.zeros(4, 2), torch.tensor([2, 0]), torch.ones(2, 2))
    assert gm(torch.zeros(4, 2), torch.tensor([-1, 3]), torch.ones(2, 2))[3].tolist() == [1.0, 1.0]
    assert gm(torch.zeros(4, 2), torch.tensor([-1, 3]), torch.ones(2, 2))[:3].sum() == 0


def test_integer_sums_over_indices_that_may_repeat() -> None:
    """Integers add up to the same in any order; floats do not, and stay."""

    def program(x: Tensor, i: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        counts = torch.zeros(4, dtype=torch.int64).scatter_add(0, i, torch.ones_like(i))
        floats = torch.zeros(4, dtype=torch.bfloat16).index_add(0, i, torch.full((3,), 2.0, dtype=torch.bfloat16))
        return x.index_add(0, i, v), x.index_put((i, i), v[:, 0], accumulate=True), counts, floats

    x, v = nasty(4, 6, dtype=torch.int32), nasty(6, 3, dtype=torch.int32).t().contiguous()
    more = [(x, torch.tensor(i), v) for i in ([1, 1, 1], [0, 3, 0])]
    _, result, _ = masked(program, x, torch.tensor([2, 0, 1]), v, more=more)
    assert Counter(rules(result)) == {"index-sum": 2, "index-member": 2}


def test_values_in_the_order_of_a_mask() -> None:
    """Embeddings of images among those of words: rows are taken in turn, whatever the mask."""

    def program(words: Tensor, images: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        rows = words.masked_scatter(mask.unsqueeze(-1).expand_as(words), images)
        single = words.masked_scatter(words > 0, images.repeat(2, 1))
        transposed = words.transpose(0, 1).masked_scatter(mask.t().unsqueeze(-1), images)
        return rows, single, transposed

    words, images = nasty(2, 5, 3), nasty(10, 3).neg()
    masks = [torch.arange(10).reshape(2, 5) % k == 0 for k in (3, 2, 1, 99)]
    _, result, _ = masked(program, words, images, masks[0], more=[(words, images, m) for m in masks])
    assert rules(result) == ["index-ranked"] * 3
    assert {(f.code, f.severity.value) for f in result.findings} == {("NX201", "info")}


def test_as_many_values_as_a_mask_holds() -> None:
    def program(x: Tensor, v: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, ...]:
        one, other = x.clone(), x.clone()
        one[rows] = v[:2]
        other[:, columns] = v[:, :3]
        return one, other

    x, v = nasty(4, 6), -nasty(4, 6)
    rows = [torch.tensor(r) > 0 for r in ([1, 0, 1, 0], [0, 0, 1, 1])]
    columns = [torch.tensor(c) > 0 for c in ([1, 0, 0, 1, 1, 0], [0, 1, 1, 0, 0, 1])]
    _, result, _ = masked(program, x, v, rows[0], columns[0], more=[(x, v, rows[1], columns[1])])
    assert rules(result) == ["index-ranked"] * 2


OWN = {
    "product": "x[m] *= 2",
    "sum of two": "x[m] += v[m] * 3",
    "rows": "x[m[:, 0]] = x[m[:, 0]] * v[0] - 1",
    "columns": "x[..., m[0]] += 1",
    "a negated mask": "x[~m] = -x[~m].abs() / 2",
    "a part": "x[m[:, 0], 1:3] = v[m[:, 0], 1:3].clamp(-1, 1)",
    "read before another write": "part = x[m]\n    x[~m] = 0\n    x[m] = part + 1",
    "cast": "x[m] = (v[m] > 0).to(x.dtype)",
}


@pytest.mark.parametrize("name", OWN)
def test_masked_elements_changed_in_place_are_changed_everywhere_and_selected(name: str) -> None:
    """No size that depends on data is left, nor a finding about one."""
    scope: dict[str, Any] = {"torch": torch}
    exec(f"def f(x, v, m):\n    x = x.clone()\n    {OWN[name]}\n    return x", scope)

    class Model(torch.nn.Module):
        def forward(self, x: Tensor, v: Tensor, m: Tensor) -> Tensor:
            return scope["f"](x, v, m)  # type: ignore[no-any-return]

    args = (nasty(4, 6), -nasty(6, 4).t(), torch.arange(24).reshape(4, 6) % 3 == 0)
    prepared = nxfx.prepare(Model(), args)
    assert not left(prepared.graph_module) and not prepared.report.findings
    for mask in (args[2], ~args[2], args[2] & False, args[2] | True):
        outcome = compare(Model()(*args[:2], mask), prepared(*args[:2], mask))
        assert outcome.ok, str(outcome)


def test_masked_elements_under_a_function_that_rounds_by_place_stay() -> None:
    class Model(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = x.clone()
            x[x > 0] = x[x > 0].exp()
            return x

    report = nxfx.check(Model(), (torch.randn(4, 6),))
    assert {"NX201", "NX403"} <= {f.code for f in report.findings}
