"""mask-slice-writes: every write equals eager, strictly, and no scatter is left that a finding does not name."""

from __future__ import annotations

import copy
import functools
import itertools
import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import view_programs
from expecttest import assert_expected_inline
from harness import apply_pass, golden, graph_of, run_passes
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import aot_function, make_boxed_func
from torch._functorch.partitioners import default_partition
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.shape_prop import _extract_tensor_metadata
from torch.utils._python_dispatch import _disable_current_modes
from view_programs import INF, NAN, functional_graph

import nxfx
from nxfx.analysis.provenance import Premise, Role, Source
from nxfx.errors import UsageError
from nxfx.graph import meta
from nxfx.graph.builder import NodeBuilder
from nxfx.passes.mask_slice_writes import MaskSliceWrites, Options
from nxfx.pipeline import PassContext, Pipeline, PipelineResult
from nxfx.verification.equivalence import compare

aten = torch.ops.aten
WRITERS = ("scatter", "index_put", "index_copy", "index_fill", "index_add", "aten.copy")


def nasty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """inf, -inf, nan, both zeros, and numbers; corner values for integers."""
    corners: list[float] = [INF, -0.0, NAN, 1.0, -INF, 0.0, -2.5]
    if not dtype.is_floating_point and not dtype.is_complex:
        corners = [0, 1] if dtype is torch.bool else [0, 1, -1, torch.iinfo(dtype).max, torch.iinfo(dtype).min]
    count = torch.Size(shape).numel()
    return torch.tensor(corners * (count // len(corners) + 1), dtype=dtype)[:count].reshape(shape)


def left(gm: fx.GraphModule) -> list[str]:
    """The writers that still stand in the graph."""
    return [
        str(n.target) for n in gm.graph.nodes if n.op == "call_function" and any(w in str(n.target) for w in WRITERS)
    ]


def rules(result: PipelineResult) -> list[str]:
    return [rewrite.rule.removeprefix("mask.") for rewrite in result.rewrites]


def masked(
    function: Callable[..., Any],
    *args: Tensor,
    more: Sequence[Sequence[Tensor]] = (),
    step: MaskSliceWrites | None = None,
    buffers: Sequence[int] = (),
    keeps: bool = False,
) -> tuple[fx.GraphModule, PipelineResult, PassContext]:
    """``function``'s graph after the pass, equal to eager on ``args`` and ``more``, invariants and idempotence checked."""
    gm, context = functional_graph(function, args)
    for position, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        if position in buffers:
            context.sources[node.name] = Source(f"buffer{position}", Role.BUFFER, args[position])
    pipeline = Pipeline([step or MaskSliceWrites()])
    result = pipeline.run(gm, context, verify_each=True)
    nodes = len(gm.graph.nodes)
    assert not pipeline.run(gm, context).changed and len(gm.graph.nodes) == nodes
    for inputs in (args, *more):
        eager = function(*(i.clone() for i in inputs))
        outcome = compare(eager, gm(*(i.clone() for i in inputs)))
        assert outcome.ok, str(outcome)
    assert keeps or not left(gm), left(gm)
    return gm, result, context


def eager_writes(body: str) -> Callable[..., Tensor]:
    """``def f(x, v)`` that runs ``body`` on a copy of x."""
    scope: dict[str, Any] = {"torch": torch}
    exec("def f(x, v):\n    x = x.clone()\n    " + body.replace("\n", "\n    ") + "\n    return x", scope)
    return scope["f"]  # type: ignore[no-any-return]


# --- the graph --------------------------------------------------------------------------------------------------------


def test_nested_slices_are_one_mask_and_one_select() -> None:
    """The Given/Result of the pass."""
    captured, result = apply_pass(MaskSliceWrites(), eager_writes("x[:2, 1:3].zero_()"), [nasty(4, 6), nasty(4, 6)])
    assert rules(result) == ["slice"]
    assert result.rewrites[0].kind.value == "exact"
    assert_expected_inline(
        golden(captured),
        """\
%args_0 : float32[4, 6] = placeholder[args_0]
%args_1 : float32[4, 6] = placeholder[args_1]
%clone : float32[4, 6] = aten.clone.default(args_0)
%arange_default : int32[4] = aten.arange.default(4, dtype=torch.int32, device=cpu)
%lt_scalar : bool[4] = aten.lt.Scalar(arange_default, 2)
%view_default : bool[4, 1] = aten.view.default(lt_scalar, [4, 1])
%arange_default_1 : int32[6] = aten.arange.default(6, dtype=torch.int32, device=cpu)
%ge_scalar : bool[6] = aten.ge.Scalar(arange_default_1, 1)
%lt_scalar_1 : bool[6] = aten.lt.Scalar(arange_default_1, 3)
%bitwise_and_tensor : bool[6] = aten.bitwise_and.Tensor(ge_scalar, lt_scalar_1)
%bitwise_and_tensor_1 : bool[4, 6] = aten.bitwise_and.Tensor(view_default, bitwise_and_tensor)
%full_default : float32[] = aten.full.default([], 0.0, dtype=torch.float32, device=cpu)
%where_self : float32[4, 6] = aten.where.self(bitwise_and_tensor_1, full_default, clone)
return (where_self,)""",
    )


def test_an_attention_mask_is_one_comparison_and_one_product() -> None:
    def causal(n: Tensor) -> Tensor:
        mask = torch.ones(4, 6)
        mask[:, 4:] = 0
        return mask * n

    captured, result = apply_pass(MaskSliceWrites(), causal, [torch.tensor(2.0)])
    assert rules(result) == ["multiply"]
    assert_expected_inline(
        golden(captured),
        """\
%c_lifted_tensor_0 : float32[] = placeholder[c_lifted_tensor_0]
%args_0 : float32[] = placeholder[args_0]
%ones : float32[4, 6] = aten.ones.default([4, 6], device=cpu, pin_memory=False)
%arange_default : int32[6] = aten.arange.default(6, dtype=torch.int32, device=cpu)
%lt_scalar : bool[6] = aten.lt.Scalar(arange_default, 4)
%mul_tensor : float32[4, 6] = aten.mul.Tensor(ones, lt_scalar)
%mul : float32[4, 6] = aten.mul.Tensor(mul_tensor, args_0)
return (mul,)""",
    )


def test_a_cache_update_is_a_comparison_with_the_position() -> None:
    def update(cache: Tensor, key: Tensor, position: Tensor) -> Tensor:
        return cache.clone().index_copy_(2, torch.arange(2) + position, key)

    cache, key = nasty(1, 2, 8, 4), nasty(1, 2, 2, 4)
    captured, result = apply_pass(
        MaskSliceWrites(),
        update,
        [cache, key, torch.tensor(3)],
        more_inputs=[[cache, -key, torch.tensor(p)] for p in (0, 6)],
    )
    assert rules(result) == ["index-window"]
    assert_expected_inline(
        golden(captured),
        """\
%args_0 : float32[1, 2, 8, 4] = placeholder[args_0]
%args_1 : float32[1, 2, 2, 4] = placeholder[args_1]
%args_2 : int64[] = placeholder[args_2]
%clone : float32[1, 2, 8, 4] = aten.clone.default(args_0)
%arange_default : int64[8] = aten.arange.default(8, dtype=torch.int64, device=cpu)
%view_default : int64[8, 1] = aten.view.default(arange_default, [8, 1])
%sub_tensor : int64[8, 1] = aten.sub.Tensor(view_default, args_2)
%clamp_default : int64[8, 1] = aten.clamp.default(sub_tensor, 0, 1)
%ge_scalar : bool[8, 1] = aten.ge.Scalar(sub_tensor, 0)
%lt_scalar : bool[8, 1] = aten.lt.Scalar(sub_tensor, 2)
%bitwise_and_tensor : bool[8, 1] = aten.bitwise_and.Tensor(ge_scalar, lt_scalar)
%view_default_1 : int64[8] = aten.view.default(clamp_default, [8])
%index_select_default : float32[1, 2, 8, 4] = aten.index_select.default(args_1, 2, view_default_1)
%where_self : float32[1, 2, 8, 4] = aten.where.self(bitwise_and_tensor, index_select_default, clone)
return (where_self,)""",
    )


# --- the grid ---------------------------------------------------------------------------------------------------------

GRID_BOUNDS = [None, 0, 1, -1, 2, -2, 99, -99]
WIDE_BOUNDS = [None, 1, 2**63 - 1, -(2**63) + 1]
GRID = {
    torch.float32: (GRID_BOUNDS, ("value", "number")),
    torch.float16: (WIDE_BOUNDS, ("value", "number", "placed")),
    torch.bfloat16: (GRID_BOUNDS, ("value",)),
    torch.int32: (GRID_BOUNDS, ("value",)),
    torch.bool: (GRID_BOUNDS, ("value",)),
}


def _grid_graph(dtype: torch.dtype, bounds: list[int | None], values: tuple[str, ...]) -> fx.GraphModule:
    """``x[start:end:step] = v`` along every dim for every pair of bounds, all in one hand-made graph."""
    graph, mode = fx.Graph(), FakeTensorMode()
    x, y, number = (graph.placeholder(name) for name in ("x", "y", "number"))
    for node, shape in ((x, (4, 5)), (y, (4, 5)), (number, ())):
        node.meta["val"] = mode.from_tensor(torch.zeros(shape, dtype=dtype))
    output = graph.output(())
    build, results = NodeBuilder(graph, "test"), []
    with build.before(output):
        for dim, step, start, end in itertools.product((0, 1, -1), (1, 2, 3), bounds, bounds):
            where = (dim, start, end, step)
            placed = build.call(aten.slice.Tensor, y, *where)
            for kind in values:
                value = placed
                if kind == "value":
                    value = build.call(aten.flip.default, placed, [0])
                elif kind == "number":
                    value = build.call(aten.fill.Tensor, placed, number)
                results.append(build.call(aten.slice_scatter.default, x, value, *where))
    output.args = (tuple(results),)
    return fx.GraphModule({}, graph)


@pytest.mark.parametrize("dtype", GRID, ids=str)
def test_grid(dtype: torch.dtype) -> None:
    """The 576 cases of FX.md and INT64_MAX bounds, finite and not: traps 11, 12, 13, 16."""
    bounds, values = GRID[dtype]
    gm = _grid_graph(dtype, bounds, values)
    finite = [
        torch.arange(20).reshape(4, 5).to(dtype),
        (10 - torch.arange(20)).reshape(4, 5).to(dtype),
        torch.tensor(7).to(dtype),
    ]
    corners = [nasty(4, 5, dtype=dtype), nasty(5, 4, dtype=dtype).t().contiguous(), nasty(2, dtype=dtype)[1]]
    expected = [gm(*inputs) for inputs in (finite, corners)]
    result = MaskSliceWrites().run(gm, PassContext())
    gm.recompile()
    assert not result.findings and not left(gm)
    assert len(result.rewrites) == 9 * len(bounds) ** 2 * len(values)
    for inputs, outputs in zip((finite, corners), expected, strict=True):
        outcome = compare(outputs, gm(*inputs))
        assert outcome.ok, str(outcome)[:1000]


# --- traps ------------------------------------------------------------------------------------------------------------

WRITES = {
    "trap 14: select -1": "x[-1] = v[0]\nx[:, -2] = 7",
    "trap 16: start past the end": "x[3:1] = 5\nx[99:] = 5\nx[:, 2:2] = v[:, :0]",
    "trap 17: a smaller source broadcasts": "x[1:3] = v[:1]\nx[:, 1:4] = v[:, :1]\nx[2:] = v[0]\nx[:, ::2] = v[0, 0]",
    "trap 18: copy to a scalar slice": "x[1, 2].copy_(v[0, 0])\nx[0, 0] = 3",
    "trap 19: overlapping writes": "x[1:3] = v[:2]\nx[:, 1:4] = x[:, 2:5].clone()\nx[2:, 3:].fill_(1)",
    "trap 19: views of views": "y = x[1:]\nz = y[:, ::2]\nz[1].mul_(2)\ny[0] = z[0, 1]\nz.t()[1:].add_(x[0, 0])",
    "trap 19: a read of the base after a view write": "y = x[1:3]\ny.zero_()\nv = x * 2\ny.add_(v[1:3])",
    "trap 19: mutation through transposed views": "x.t()[1:3] = v.t()[:2]\nx.t().t()[0] = 1\nx.permute(1, 0)[4].neg_()",
    "views in between": "x[1:3].unsqueeze(1)[:, 0, 2:].copy_(v[:2, 2:])\nx.view(2, 2, 6)[:, 1, ::3] = v[:2, :2]",
    "a write of everything": "x[:] = v.t().reshape(4, 6)\nx[...] += 1",
    "a write of itself": "x[1:3] = x[1:3]\nx[:, 0] = x[:, 0].clone()",
    "chunks, splits and unbinding": "a, b = x.chunk(2, 1)\nb.zero_()\nx.split([1, 2, 1])[1].fill_(2)\n"
    "x.unbind(1)[3].copy_(v[:, 0])",
    "a value that is a view of another tensor": "x[:2] = v[2:]\nx[2:, 1:3] = v[2:, 1:3]",
    "a step that reaches beyond the end": "x[1::3, ::4] = v[:1, :2]\nx[:, 5::7] = v[:, :1]",
    "diagonals": "x.diagonal().fill_(3)\nx.diagonal(1).copy_(v[0, :4])\nx.diagonal(-2, 1, 0).zero_()\n"
    "x.diagonal(9).fill_(1)",
    "strided views": "x.as_strided((2, 3), (6, 2), 1).copy_(v[:2, :3])\nx.as_strided((4,), (6,), 5).fill_(2)",
    "masks": "x[v > 0] = 0\nx[v[:, 0] > 0] = v[0]\nx[:, v[0] > 0] = 7\nx.masked_fill_(v > 1, 2.5)\n"
    "m = x.isnan()\nx[m] = v[m]",
    "constant indices": "x[[2, 0]] = v[:2]\nx[:, [0, 2, 4]] = v[:, 1:4]\nx[[-1, 1]] = 4\nx[[1, 1, 3]] = 2\n"
    "x[[0], [1]] = 9",
    "index_fill and index_copy": "x.index_fill_(1, torch.tensor([-1, 2, 2]), 3)\n"
    "x.index_copy_(0, torch.tensor([3, 0]), v[:2])",
    "aligned index tensors": "i = torch.arange(4)\nx[i, i] = v[:, 0]\nx[i, 5 - i] = 1\nx[i[:2], i[:2] + 1] = v[0, :2]",
    "scatters": "i = (v > 0).long()\nx.scatter_(1, i[:, :1] + 1, 5)\nx.scatter_(0, i[:1] * 2, v[:1])\n"
    "x.scatter_(1, i * 3, 0)",
    "sums at one position": "x.index_add_(0, torch.tensor([2]), v[:1])\n"
    "x.index_put_((torch.tensor(1),), v[0], accumulate=True)\n"
    "x.scatter_add_(1, (v[:, :1] > 0).long(), v[:, :1])",
}  # fmt: skip


@pytest.mark.parametrize("name", WRITES)
def test_writes(name: str) -> None:
    more = [
        (nasty(4, 6), torch.randn(4, 6)),
        (torch.randn(4, 6), nasty(6, 4).t().contiguous()),
        (nasty(4, 6), -nasty(4, 6)),
    ]
    masked(eager_writes(WRITES[name]), torch.randn(4, 6), torch.randn(4, 6), more=more)


@pytest.mark.parametrize(
    "name", ["trap 17: a smaller source broadcasts", "trap 19: views of views", "constant indices"]
)
def test_writes_in_core_aten(name: str) -> None:
    """FX.md: the same program arrives in other ops."""
    apply_pass(MaskSliceWrites(), eager_writes(WRITES[name]), [nasty(4, 6), torch.randn(4, 6)], core_aten=True)


def test_trap_17_a_source_of_another_size_raises_as_in_eager() -> None:
    for body in ("x[:2] = v[:3]", "x[:, 1:3] = v[:, :3]"):
        with pytest.raises(RuntimeError):
            functional_graph(eager_writes(body), (torch.ones(4, 6), torch.ones(4, 6)))


def test_trap_20_a_zero_fill_multiplies_only_a_proved_base() -> None:
    def program(x: Tensor, ones: Tensor, minus: Tensor) -> tuple[Tensor, ...]:
        made, counted, truth = (
            torch.ones(4, 6).where(x == x, 2.0),
            torch.arange(24).reshape(4, 6) + (x > 0).to(torch.int64),
            x == x,
        )
        results = [x.clone(), ones.clone(), minus.clone(), made, counted, truth, (x > 0).to(torch.bfloat16)]
        for tensor in results:
            tensor[1:3] = 0
            tensor[:, :1] = -0.0 if tensor is made else False
        return tuple(results)

    args = (nasty(4, 6), torch.ones(4, 6), -torch.ones(4, 6))
    _, result, context = masked(program, *args, more=[(-nasty(4, 6), *args[1:])], buffers=(1, 2))
    # x, the buffer of -1 and the made ones after -0.0 was chosen for them: select; the others: one product each, fused.
    assert Counter(rules(result)) == {"multiply": 5, "slice": 3}
    assert context.premises == [Premise("buffer1", "finite-nonnegative")]


@pytest.mark.parametrize("mode", ["proved", "never", "always"])
def test_the_multiply_option(mode: str) -> None:
    def program(x: Tensor) -> tuple[Tensor, Tensor]:
        ones, x = (x > 0.5).to(x.dtype), x.clone()
        ones[:2] = 0
        x[:2] = 0
        return ones, x

    (step,) = Pipeline.parse(f"mask-slice-writes{{multiply={mode}}}").steps
    assert isinstance(step, MaskSliceWrites)
    _, result, _ = masked(program, torch.rand(4, 6), step=step)
    assert Counter(rules(result))["multiply"] == {"proved": 1, "never": 0, "always": 2}[mode]
    assert [f.code for f in result.findings] == (["NX204"] if mode == "always" else [])


def test_what_is_made_of_constants_is_computed_once() -> None:
    """Through views and arithmetic, as one constant for equal results; copies where the caller could write it."""

    def program(x: Tensor) -> tuple[Tensor, ...]:
        made = []
        for _ in range(2):
            mask = torch.zeros(8, 8)
            mask[:3, 2:] = 1
            mask[torch.tensor([5, 6])] = torch.arange(8.0)
            windows = mask.view(2, 4, 2, 4).permute(0, 2, 1, 3).reshape(-1, 16)
            made.append((windows.unsqueeze(1) - windows.unsqueeze(2)).masked_fill(windows.unsqueeze(1) == 0, -INF))
        free = torch.ones(4, 4)
        free[1:] = -0.0
        grows = torch.zeros(4, 4)
        grows[0] = x[0, 0, :4]
        drawn = torch.zeros(4, 4)
        drawn[0] = torch.empty(4)
        return x + made[0], x * made[1], free, grows, drawn[1:] * 1

    gm, result, context = masked(program, nasty(4, 16, 16))
    assert Counter(rules(result)) == {"constant": 3, "pad": 2}
    constants = [n for n in gm.graph.nodes if n.op == "get_attr" and "folded" in n.target]
    assert len(constants) == 2 and all(context.sources[n.name].role is Role.CONSTANT for n in constants)
    assert not gm.graph.find_nodes(op="call_function", target=aten.masked_fill.Scalar)
    first = gm(nasty(4, 16, 16))[2]
    first.fill_(7)
    assert compare(program(nasty(4, 16, 16)), gm(nasty(4, 16, 16))).ok


def test_large_constants_are_not_kept() -> None:
    def program(x: Tensor) -> Tensor:
        mask = torch.ones(1100, 1000)
        mask[:600] = 0
        return x * mask

    _, result, _ = masked(program, torch.rand(1000))
    assert rules(result) == ["multiply"]


def test_folded_constants_are_saved_and_move(tmp_path: Path) -> None:
    class Model(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            mask = torch.zeros(4, 6)
            mask[1:3, ::2] = 2.5
            return x + mask

    model, x = Model(), nasty(4, 6)
    prepared = nxfx.prepare(model, (x,))
    assert not prepared.state_dict() and [r.rule for r in prepared.report.rewrites] == ["mask.constant"]
    prepared.save(tmp_path / "model.pt2")
    for candidate in (prepared, nxfx.load(tmp_path / "model.pt2")):
        assert compare(model(x), candidate(x)).ok
    moved = prepared.to("meta")
    assert {t.device.type for t in moved.graph_module.buffers()} == {"meta"} and moved(x.to("meta")).shape == x.shape


def test_an_unknown_multiply_option_is_refused() -> None:
    assert Options("off") == Options("never")
    with pytest.raises(UsageError, match="proved, never or always"):
        Pipeline.parse("mask-slice-writes{multiply=sometimes}")


def test_the_value_is_cast_before_the_select() -> None:
    """``where(mask, 0.5, int64_base)`` would turn 2**40 + 1 into 2**40."""

    def program(x: Tensor, v: Tensor, flags: Tensor) -> tuple[Tensor, ...]:
        x, half, flags = x.clone(), v.bfloat16().clone(), flags.clone()
        x[:2] = 0.7
        x[2:4] = v[:2] * 1.5
        half[1:] = v[1:] + 2**-10
        flags[:3] = v[:3]
        half[:1] = x[5:]
        return x, half, flags

    x, v = torch.tensor([2**40 + 1, -1, 2**62 + 1, 3, 2**53 + 1, 7]), torch.tensor([1.0, -2.0, 0.0, 3.5, 1e4, -1.0])
    masked(program, x, v, torch.zeros(6, dtype=torch.bool))


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.float64, torch.uint8, torch.int16, torch.complex64, torch.float8_e4m3fn], ids=str
)
def test_dtypes(dtype: torch.dtype) -> None:
    def program(x: Tensor, v: Tensor) -> Tensor:
        x = x.to(dtype, copy=True)
        x[1:3] = v[:2].to(dtype)
        x[:, 0] = 1
        x[:, ::2].copy_(v[:, :3].to(dtype))
        return x.view(torch.uint8)

    x, v = torch.rand(4, 6) * 3, torch.rand(4, 6) * 5
    masked(program, x, v, more=[(torch.zeros(4, 6), v)])


def test_a_dtype_without_a_select_stays_and_is_named() -> None:
    def program(x: Tensor) -> Tensor:
        x = x.to(torch.uint16)
        x[1:3] = 3
        return x.to(torch.int32)

    gm, result, _ = masked(program, torch.ones(4), keeps=True)
    assert left(gm) and [f.code for f in result.findings] == ["NX201"] and "uint16" in result.findings[0].message


def test_degenerate_shapes() -> None:
    def program(empty: Tensor, scalar: Tensor, row: Tensor) -> tuple[Tensor, ...]:
        empty, scalar, row = empty.clone(), scalar.clone(), row.clone()
        empty[:, 1:] = 3
        empty[:0] = row[:, :0].reshape(0, 1)
        scalar[...] = 2
        scalar.copy_(row[0, 1])
        scalar.masked_fill_(scalar > 5, 1)
        row[0:0] = 5
        row[-1, 1:].zero_()
        row[:, :1].unsqueeze(0).fill_(4)
        return empty, scalar, row

    masked(program, torch.ones(0, 3), torch.tensor(1.0), torch.arange(3.0).reshape(1, 3))


def test_strides_that_views_rest_on_are_kept() -> None:
    """A channels-last base, a transposed one, an expanded one: the views after the write must still be views."""

    def program(image: Tensor, v: Tensor, matrix: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        image = image.contiguous(memory_format=torch.channels_last)
        written = torch.slice_scatter(image, v, 1, 1, 3)
        flipped = torch.slice_scatter(matrix.t(), w, 0, 0, 2)
        spread = torch.select_scatter(w[:1].expand(3, 4), w[0] * 2, 0, 1)
        return written.permute(0, 2, 3, 1).view(-1), flipped.t().view(-1), spread

    masked(program, torch.randn(2, 4, 3, 5), torch.randn(2, 2, 3, 5), torch.randn(4, 6), torch.randn(2, 4))


def test_results_share_no_memory_with_inputs() -> None:
    """A write of everything is its value, a write of nothing its base: but the caller gets a tensor of his own."""

    def program(x: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return torch.slice_scatter(x, v, 0, 0, 4), torch.slice_scatter(x, v[:0], 0, 0, 0), torch.slice_scatter(x, v + 1)

    x, v = torch.randn(4, 6), torch.randn(4, 6)
    gm, _, _ = masked(program, x, v)
    for result in gm(x, v):
        assert result.untyped_storage().data_ptr() not in (
            x.untyped_storage().data_ptr(),
            v.untyped_storage().data_ptr(),
        )


# --- chains -----------------------------------------------------------------------------------------------------------


def test_writes_of_one_number_are_one_mask() -> None:
    _, result, _ = masked(eager_writes("x[:1] = 2\nx[3:] = 2\nx[:, 2] = 2"), nasty(4, 6), nasty(4, 6))
    assert rules(result) == ["slice"]


def test_an_intermediate_that_is_read_stays() -> None:
    _, result, _ = masked(eager_writes("x[:1] = 2\ny = x * 1\nx[3:] = 2\nx = x + y"), nasty(4, 6), nasty(4, 6))
    assert rules(result) == ["slice", "slice"]

    def program(x: Tensor) -> tuple[Tensor, Tensor]:
        inner = torch.select_scatter(x[1:3], x[0], 0, 1)
        return torch.slice_scatter(x, inner, 0, 1, 3), inner

    masked(program, nasty(4, 6))


def test_an_in_place_add_writes_once() -> None:
    """``x[a] += b`` is captured as two writes, the second of which writes what stands there."""
    _, result, _ = masked(eager_writes("x[1:3, ::2] += v[:2, :3]"), nasty(4, 6), nasty(4, 6))
    assert rules(result) == ["slice", "nothing"]


def test_a_loop_of_writes_stays_linear() -> None:
    """The forward substitution of gated-delta decoders: 63 chained row writes a layer."""

    def substitute(system: Tensor, size: int) -> Tensor:
        system = -system
        for i in range(1, size):
            row, above = system[..., i, :i].clone(), system[..., :i, :i].clone()
            system[..., i, :i] = row + (row.unsqueeze(-1) * above).sum(-2)
        return system

    counts = []
    for size in (8, 16):
        gm, context = functional_graph(functools.partial(substitute, size=size), (torch.randn(2, size, size),))
        before = len(gm.graph.nodes)
        result = Pipeline([MaskSliceWrites()]).run(gm, context, verify_each=True)
        x = nasty(2, size, size)
        assert compare(substitute(x, size), gm(x)).ok
        assert len(result.rewrites) == size - 1 and not left(gm)
        assert Counter(n.target for n in gm.graph.nodes)[aten.arange.default] == 1  # one for every row and column
        counts.append(len(gm.graph.nodes))
        assert counts[-1] < 1.2 * before
    assert counts[1] / counts[0] < 2.2


def test_loops_of_writes_are_concatenations() -> None:
    """Row writes with reads of what is written, of what is not yet, of both, of other axes: no difference from eager."""
    seen: Counter[str] = Counter()
    for number in range(25):
        rng = random.Random(number)
        shape, program = view_programs.loop_of_writes(rng)
        _, result, _ = masked(
            program, *(torch.randn(shape) for _ in range(2)), more=[(nasty(*shape), nasty(*shape).neg())]
        )
        seen.update(rules(result))
    assert seen["row"] > 80


def test_writes_that_leave_nothing_of_their_base_are_a_concatenation() -> None:
    """Rotary halves and interleaved pairs, in any order, broadcast and cast; not where a half is read in between."""

    def program(x: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        halves, pairs, thirds, columns, read, partial, again = (torch.empty_like(x).copy_(x) for _ in range(7))
        halves[..., 4:], halves[..., :4] = v[..., :4], -v[..., 4:]
        pairs[..., 1::2] = v[..., ::2]
        pairs[..., ::2] = -x[..., 1::2]
        thirds[:, 2::3], thirds[:, ::3], thirds[:, 1::3] = v[:, :2], v[0, 0, 0], v[:, :1].double()
        columns[:2], columns[2:] = v[2:], x[:1, :1]
        read[..., :4] = v[..., :4]
        kept = read * 2
        read[..., 4:] = v[..., 4:]
        partial[..., ::2] = v[..., ::2]
        again[..., :4], again[..., 4:], again[..., :4] = v[..., :4], v[..., 4:], x[..., 4:]
        return halves, pairs, thirds, columns, read, kept, partial, again

    for dtype in (torch.float32, torch.bfloat16, torch.int32):
        _, result, _ = masked(program, nasty(4, 6, 8, dtype=dtype), nasty(4, 6, 8, dtype=dtype).flip(0))
        assert Counter(rules(result))["part"] == 11


def test_steps_of_a_recurrence_are_stacked() -> None:
    def recurrence(x: Tensor) -> Tensor:
        states, state = torch.zeros_like(x), x[:, 0]
        for step in range(x.shape[1]):
            state = state * 0.5 + x[:, step]
            states[:, step] = state
        return states

    gm, result, _ = masked(recurrence, torch.randn(2, 6, 3), more=[(nasty(2, 6, 3),)])
    assert rules(result) == ["part"] * 6
    ops = Counter(n.target for n in gm.graph.nodes)
    assert ops[aten.cat.default] == 1 and not ops[aten.where.self]


def test_a_step_that_divides_its_axis_is_an_axis() -> None:
    gm, _, _ = masked(eager_writes("x[:, ::2] = v[:, 3:]\nx[1:, 1::3] = v[1:, :2]"), nasty(4, 6), torch.randn(4, 6))
    ops = Counter(n.target for n in gm.graph.nodes)
    assert ops[aten.where.self] == 2 and not ops[aten.remainder.Scalar]


def test_a_constant_base_needs_no_select() -> None:
    """The backward of a slice, and accumulators: pad."""

    def program(v: Tensor) -> tuple[Tensor, ...]:
        steps, minus, whole = torch.zeros(3, 7, 4), torch.full((4, 5), -INF), torch.zeros(3, 4)
        steps[:, 1::3] = v[:, :2]
        minus[2, 1:] = v[0, 0]
        whole[1:, :] = v[0, :1]
        return steps, minus, whole

    _, result, _ = masked(program, nasty(3, 3, 4))
    assert rules(result) == ["pad", "pad", "slice"]


# --- positions --------------------------------------------------------------------------------------------------------


def test_one_position() -> None:
    """A KV cache at a tensor position, counted from either end; keys and values share the mask."""

    def program(keys: Tensor, values: Tensor, new: Tensor, position: Tensor) -> tuple[Tensor, ...]:
        keys, values = keys.clone(), values.clone()
        keys[:, :, position] = new
        values[:, :, position] = new * 2
        return keys, values

    cache, new = nasty(2, 3, 8, 4), nasty(2, 3, 1, 4)
    gm, result, _ = masked(
        program,
        cache,
        -cache,
        new,
        torch.tensor([3]),
        more=[(cache, cache, new, torch.tensor([p])) for p in (0, -1, -8, 7)],
    )
    assert rules(result) == ["index-position"] * 2
    assert Counter(n.target for n in gm.graph.nodes)[aten.eq.Tensor] == 1


def test_positions_of_rows() -> None:
    def program(cache: Tensor, new: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        one, run = cache.clone(), cache.clone()
        rows = torch.arange(2)
        one[rows, :, positions] = new[:, :, 0]
        run[rows[:, None], :, positions[:, None] + torch.arange(2)] = new.transpose(1, 2)
        return one, run

    cache, new = nasty(2, 3, 8, 4), nasty(2, 3, 2, 4)
    more = [(cache, -new, torch.tensor(p)) for p in ([0, 6], [-1, 3], [-8, -2])]
    _, result, _ = masked(program, cache, new, torch.tensor([3, 1]), more=more)
    assert rules(result) == ["index-position", "index-window"]


def test_indices_that_never_repeat() -> None:
    def program(scores: Tensor) -> tuple[Tensor, ...]:
        values, indices = scores.topk(3)
        order = scores[0].argsort()
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(6)
        chosen = torch.full_like(scores, -INF).scatter(-1, indices, values)
        group = torch.zeros_like(scores).scatter(1, indices, 1.0)
        added = scores.scatter_add(1, indices, values)
        return chosen, group, added, inverse

    scores = torch.tensor([[3.0, -1.0, 7.0, 0.5, 2.0, -4.0], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]])
    _, result, _ = masked(program, scores, more=[(-scores.flip(1),)])
    assert Counter(rules(result)) == {"index-several": 3, "index-member": 1}


def test_of_several_writers_of_one_element_the_last_is_seen() -> None:
    """As in eager on the CPU, where the copies are made one after the other."""

    def program(x: Tensor, i: Tensor, j: Tensor, new: Tensor) -> tuple[Tensor, ...]:
        columns = i[None].expand(4, -1)
        return (
            x.index_copy(0, i % 4, new),
            aten.index_put(x, [None, i], new[:, :4].T),
            torch.index_put(x, (i % 4, j), new[:, 0]),
            aten.index_put(x[None].expand(2, 4, 6), [None, i % 4, j], new[:, 0]),
            x.scatter(1, columns, new[:4, : i.shape[0]]),
            torch.index_put(x, (torch.tensor([3, -1, 3]),), new[:3]),
        )

    new = nasty(5, 6)
    drawn = [(torch.randint(0, 6, (5,)), torch.randint(-6, 6, (5,))) for _ in range(20)]
    gm, result, _ = masked(program, nasty(4, 6), *drawn[0], new, more=[(nasty(4, 6), i, j, new) for i, j in drawn])
    assert rules(result) == ["index-several"] * 6 and not left(gm)


def test_an_index_outside_the_dimension_is_refused_as_in_eager() -> None:
    class Cache(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("cache", torch.zeros(2, 8, 3))

    class One(Cache):
        def forward(self, position: Tensor, new: Tensor) -> Tensor:
            self.cache[:, position + 1] = new[:, 0]
            return self.cache * 2

    class Run(Cache):
        def forward(self, position: Tensor, new: Tensor) -> Tensor:
            self.cache[:, position : position + 2] = new
            return self.cache * 2

    class Rows(Cache):
        def forward(self, position: Tensor, new: Tensor) -> Tensor:
            self.cache[torch.arange(2)[:, None], position.view(1, 1) + torch.arange(2)] = new
            return self.cache * 2

    new = nasty(2, 2, 3)
    for model, low, high in ((One(), -9, 6), (Run(), -8, 6), (Rows(), -8, 6)):
        for dtype in (torch.int64, torch.int32):
            prepared = nxfx.prepare(model, (torch.tensor(3, dtype=dtype), new))
            assert prepared.report.requirements == {"position": (low, high)}
            for position in (low, 0, high):
                if model.__class__ is Run and position < 0:
                    continue  # x[-8:-6]
                expected, given = copy.deepcopy(model), torch.tensor(position, dtype=dtype)
                assert compare(expected(given, new), prepared(given, new)).ok
            for position in (low - 1, high + 1):
                with pytest.raises((IndexError, RuntimeError)):
                    copy.deepcopy(model)(torch.tensor(position, dtype=dtype), new)
                before = model.cache.clone()
                with pytest.raises(nxfx.RangeError, match="position"):
                    prepared(torch.tensor(position, dtype=dtype), new)
                assert compare(before, model.cache).ok


def test_a_computed_index_that_may_lie_outside_is_reported() -> None:
    """No input holds the index, so nobody checks it; indices that cannot lie outside are no news."""

    def program(x: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        return x.index_fill(0, mask.sum(-1), 0.0), x.index_fill(1, x.argsort(-1)[0], 1.0)

    _, result, _ = masked(program, nasty(4, 6), torch.tensor([[True, True, False]]))
    (finding,) = result.findings
    assert finding.code == "NX404" and "outside [-4, 3]" in finding.message


def test_constant_indices_outside_the_dimension_stay() -> None:
    def program(x: Tensor) -> Tensor:
        return torch.index_put(x, (torch.arange(3) + 2,), torch.tensor(1.0))

    with FakeTensorMode() as mode:
        gm, context = functional_graph(program, (mode.from_tensor(nasty(4, 6)),))
    result = Pipeline([MaskSliceWrites()]).run(gm, context)
    assert not result.changed and "outside the dimension" in result.findings[0].message


KEPT = {
    "a sum over indices": (lambda x, i: x.index_add(0, i, x[:3]), "NX202", "several values"),
    "a reduction": (lambda x, i: x.scatter_reduce(0, i[:, None], x[:3, :1], "amax"), "NX202", "reduces"),
    "a diagonal by strides": (lambda x, i: torch.as_strided_scatter(x, x[0, :3], (3,), (7,)), "NX201", "amount to slices"),
}  # fmt: skip


@pytest.mark.parametrize("name", KEPT)
def test_what_stays_is_named(name: str) -> None:
    function, code, words = KEPT[name]
    gm, result, _ = masked(function, torch.randn(4, 6), torch.tensor([2, 0, 1]), keeps=True)
    assert not result.changed and len(left(gm)) == 1
    (finding,) = result.findings
    assert finding.code == code and words in finding.message
    assert finding.fix or finding.severity.value == "info"


def test_too_many_comparisons_stay() -> None:
    def program(x: Tensor) -> Tensor:
        order = x.argsort()
        return torch.zeros_like(x).index_copy(0, order, x)

    gm, result, _ = masked(program, torch.randn(3000), keeps=True)
    assert left(gm) and "9000000 comparisons" in result.findings[0].message


# --- shapes known at run time, bodies, training -----------------------------------------------------------------------

SYMBOLIC = {
    "an end": "x[:, :n] = v * 2",
    "trap 15: negative bounds": "x[:, -n:] = 0\nx[:, -n:-1] += 1",
    "a start": "x[:, n:] = v[:, :1]\nx[1:, 1 : n + 1] = v[1:].flip(1)",
    "static bounds": "x[:, -1] = v[:, 0]\nx[:, 1:-1] *= 2\nx[:, ::2] = 3\nx[:, :99] = x[:, :1]",
    "steps": "x[:, n::2] = 1\nx[:, : 2 * n : 2] = v.flip(1)\nx[:, -n::3] = 2",
    "nested": "x[:, :n][:, ::2].mul_(2)\nx[:, :n][:, 1] = 0\nx[1:, :n] = v[1:]",
    "a copy between equal bounds": "y = x * 2\nx[:, :n] = y[:, :n]",
    "a select": "x = torch.select_scatter(x, v[:, 0] * 2, 1, n - 1)",
}


@pytest.mark.parametrize("name", SYMBOLIC)
def test_symbolic_shapes(name: str) -> None:
    """One capture serves every size; no guard is added."""
    long, short = torch.export.Dim("long", min=16, max=64), torch.export.Dim("short", min=4, max=8)
    program = eager_writes("n = v.shape[1]\n" + SYMBOLIC[name])
    captured, result = apply_pass(
        MaskSliceWrites(),
        program,
        [torch.randn(2, 18, 3), torch.randn(2, 5, 3)],
        more_inputs=[[nasty(2, 17, 3), torch.randn(2, 4, 3)], [torch.randn(2, 33, 3), nasty(2, 8, 3)]],
        dynamic_shapes=(({1: long}, {1: short}),),
    )
    assert not result.findings and not left(captured.gm)


def _fill_between(x: Tensor, n: Tensor) -> Tensor:
    x = x.clone()
    x[: n[0] * n[1], n[1] :] = 1.5
    x[:, n[0] - n[1] :: 2] = 0
    return x


def _copy_prefix(x: Tensor, n: Tensor) -> Tensor:
    x, y = x.clone(), x * 2
    x[: n[0]] = y[: n[0]]
    return x


@pytest.mark.skipif(
    torch.__version__ < "2.13", reason="Dynamo gives no graph for tensor-valued bounds before torch 2.13"
)
@pytest.mark.parametrize("program", [_fill_between, _copy_prefix])
def test_bounds_taken_from_tensors_become_comparisons_with_the_tensors(program: Callable[..., Tensor]) -> None:
    """What Dynamo captures with capture_scalar_outputs: one graph for every run-time value, nothing of a size known then only."""
    seen: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, _: Any) -> Any:
        with _disable_current_modes():
            Pipeline([MaskSliceWrites()]).run(gm, PassContext(), verify_each=True)
        seen.append(gm)
        return make_boxed_func(gm.forward)

    torch._dynamo.reset()
    inner = aot_autograd(fw_compiler=backend, inference_compiler=backend)
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        compiled = torch.compile(program, backend=inner, fullgraph=True)
        for bounds in ([1, 3], [0, 0], [-1, 2], [2, -99], [99, 1], [-99, -1]):
            outcome = compare(program(nasty(4, 6), torch.tensor(bounds)), compiled(nasty(4, 6), torch.tensor(bounds)))
            assert outcome.ok, (bounds, str(outcome))
    (gm,) = seen
    asserts = [n for n in gm.graph.nodes if "_assert" in str(n.target)]  # torch's own, about sizes
    assert not left(gm) and (asserts or not [n for n in gm.graph.nodes if "scalar_dense" in str(n.target)])


def test_bodies_of_higher_order_ops() -> None:
    class Model(torch.nn.Module):
        def forward(self, x: Tensor, p: Tensor) -> Tensor:
            def rows(x: Tensor) -> Tensor:
                x = x.clone()
                x[:2].zero_()
                return x

            def column(x: Tensor) -> Tensor:
                x = x.clone()
                x[:, 1].copy_(x[:, 0])
                return x

            return torch.cond(p, rows, column, (x,))

    captured, result = apply_pass(
        MaskSliceWrites(), Model(), [nasty(4, 3), torch.tensor(True)], more_inputs=[[nasty(4, 3), torch.tensor(False)]]
    )
    assert rules(result) == ["slice", "slice"]
    assert not [op for op in captured.ops() if any(w in op for w in WRITERS)]


def test_joint_training_graphs() -> None:
    """The AOTAutograd form: forward, backward and their saved values agree with eager."""
    results: list[PipelineResult] = []

    def partition(joint: fx.GraphModule, inputs: Any, **options: Any) -> Any:
        with _disable_current_modes():
            sources = {
                n.name: Source(str(n.target), Role.CONSTANT, getattr(joint, str(n.target)))
                for n in joint.graph.find_nodes(op="get_attr")
            }
            results.append(
                Pipeline([MaskSliceWrites()]).run(joint, PassContext(sources=sources, training=True), verify_each=True)
            )
        assert not left(joint)
        for node in joint.graph.nodes:  # torch 2.9's partitioner wants it
            if isinstance(meta.val(node), Tensor):
                node.meta.setdefault("tensor_meta", _extract_tensor_metadata(meta.val(node)))
        return default_partition(joint, inputs, **options)

    def loss(x: Tensor, w: Tensor) -> Tensor:
        a, rows = (x * 2).clone(), torch.tensor([2, 0])
        a[:, 1:3] = w[:, :2].sin()
        a[0] = 0
        mask = torch.ones(4, 6)
        mask[:2] = 0
        a = a * mask
        a[w > 0] = 1.0
        return (a[1:, ::2].exp().sum() + a[:, -1].sum() + a.diagonal().sum() + a[rows].pow(2).sum()).reshape(1)

    x, w = torch.randn(4, 6, requires_grad=True), torch.randn(4, 6, requires_grad=True)
    eager = loss(x, w)
    expected = [eager, *torch.autograd.grad(eager.sum(), (x, w))]
    identity = lambda gm, _: make_boxed_func(gm.forward)  # noqa: E731
    compiled = aot_function(loss, fw_compiler=identity, bw_compiler=identity, partition_fn=partition)(x, w)
    assert compare(expected, [compiled, *torch.autograd.grad(compiled.sum(), (x, w))]).ok
    assert not results[0].findings


def test_written_buffers() -> None:
    class Cache(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("keys", torch.ones(2, 8, 4))
            self.register_buffer("mask", torch.ones(8, 8))

        def forward(self, new: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
            self.keys[:, position] = new
            self.keys[:, :2] = 0  # its present value proves nothing: the graph writes it
            mask = self.mask.clone()
            mask[:, 2:5] = 0
            return self.keys * 2, mask

    captured = graph_of(Cache(), (nasty(2, 1, 4), torch.tensor([3])))
    before = graph_of(Cache(), (nasty(2, 1, 4), torch.tensor([3])))
    result = run_passes(captured, MaskSliceWrites())
    assert rules(result) == ["index-position", "slice", "multiply"]
    assert [p.source for p in captured.context.premises] == ["mask"]
    assert compare(before(nasty(2, 1, 4), torch.tensor([-1])), captured(nasty(2, 1, 4), torch.tensor([-1]))).ok


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [(1, 1), (1, 2), (3, 1), (2, 2)], ids=str)
def test_mllama_mask(ratio: tuple[int, int]) -> None:
    """NEURON.md, 4 chunks of 24 tokens, static aspect ratio."""

    def mask(x: Tensor) -> Tensor:
        m = torch.ones(4, x.shape[2], 1, dtype=x.dtype)
        m[: ratio[0] * ratio[1], :17] = 0
        m = m.view(4 * x.shape[2], 1)
        return m @ m.T * torch.finfo(x.dtype).min

    gm, result, _ = masked(mask, torch.randn(1, 4, 24, 8))
    assert rules(result) == ["constant"] and not gm.graph.find_nodes(op="call_function", target=aten.mm.default)
    zeros = int((gm(torch.randn(1, 4, 24, 8)) == 0).sum())
    kept = 4 * 24 - ratio[0] * ratio[1] * 17
    assert zeros == (4 * 24) ** 2 - kept**2


def test_a_swin_window_mask() -> None:
    def mask(x: Tensor) -> Tensor:
        m = torch.zeros(1, 8, 8, 1)
        parts = (slice(0, -4), slice(-4, -2), slice(-2, None))
        for count, (rows, columns) in enumerate(itertools.product(parts, parts)):
            m[:, rows, columns, :] = count
        windows = m.view(1, 2, 4, 2, 4, 1).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16)
        difference = windows.unsqueeze(1) - windows.unsqueeze(2)
        return x + difference.masked_fill(difference != 0, -100.0)

    masked(mask, torch.randn(4, 16, 16))
