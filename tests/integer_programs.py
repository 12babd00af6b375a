"""Random integer programs as functional ATen graphs: what interval analysis and narrowing are fuzzed with.

A graph is built node by node on fake tensors, without capture, so that a program costs a few milliseconds.
:func:`check_integers` narrows one and compares it with what it was.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import operator
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from nxfx.analysis.provenance import Role, Source
from nxfx.analysis.wide_edges import wide_edges
from nxfx.graph import invariants
from nxfx.passes.narrow_64bit import Narrow64bit, NarrowOptions
from nxfx.pipeline import PassContext
from nxfx.verification.equivalence import compare

aten = torch.ops.aten
# Refused ops are part of the game and would each be logged with a traceback.
logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
INT32 = (-(2**31), 2**31 - 1)
INT64 = (-(2**63), 2**63 - 1)

# Ordinary numbers, the ends of int32 and int64, the exact limits of floats, and what hashes are made of.
NUMBERS = (
    0, 1, -1, 2, -2, 3, 5, 7, -7, 8, 10, 100, 255, 256, 1000, -1000, 2**15, 2**16, 2**24 + 1, 2**30, 2**31 - 1, 2**31, -(2**31),
    -(2**31) - 1, 2**32, 2**33 + 5, 2**40, 2**62, 2**63 - 1, -(2**63), 2654435761,
)  # fmt: skip
RANGES = (
    (0, 1), (0, 2), (-1, 1), (0, 7), (0, 99), (-100, 100), (1, 1000), (0, 2**15), (0, 2**16 - 1), (0, 2**24), (-(2**30), 2**30),
    (2**31 - 3, 2**31 - 1), (0, 2**31 - 1), INT32, (-(2**31), -(2**31) + 2), (0, 2**31), (0, 2**40), INT64,
)  # fmt: skip


def corners(bounds: tuple[int, int], rng: random.Random) -> int:
    """A value in ``bounds``, most often at a corner."""
    low, high = bounds
    candidates = [v for v in (low, low + 1, high - 1, high, 0, 1, -1) if low <= v <= high]
    return rng.choice(candidates) if rng.random() < 0.7 else rng.randint(low, high)


class Program:
    """One random program.

    Attributes:
        gm: the graph; every input is called ``x0``, ``x1`` ...
        sources: with the declared range of each input, None for an undeclared one.
    """

    def __init__(self, seed: int, *, size: int = 12) -> None:
        self.rng = random.Random(seed)
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.graph = fx.Graph()
        self.values: list[fx.Node] = []
        self.sources: dict[str, Source] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for position in range(self.rng.randint(1, 3)):
            self._input(f"x{position}")
        while len(self.values) < size:
            self._grow()
        outputs = [n for n in self.values if not n.users or self.rng.random() < 0.1]
        self.graph.output(tuple(outputs))
        self.gm = fx.GraphModule(torch.nn.Module(), self.graph)

    def context(self) -> PassContext:
        return PassContext(sources=dict(self.sources))

    def inputs(self, seed: int, limits: dict[str, tuple[int, int]]) -> list[torch.Tensor]:
        """Values for every input within its declared range, or within ``limits`` where it is not declared."""
        rng = random.Random(seed)
        found = []
        for name, source in self.sources.items():
            bounds = source.range or limits.get(name, INT64)
            shape = self.shapes[name]
            count = int(torch.Size(shape).numel())
            found.append(torch.tensor([corners(bounds, rng) for _ in range(count)], dtype=torch.int64).reshape(shape))
        return found

    # --- building ----------------------------------------------------------------------------------------------------

    def _input(self, name: str) -> None:
        node = self.graph.placeholder(name)
        self.shapes[name] = self.rng.choice([(), (4,), (3, 4), (2, 3, 4), (1,), (4, 4), (0, 4)])
        with self.mode:
            node.meta["val"] = torch.empty(self.shapes[name], dtype=torch.int64)
        declared = None if self.rng.random() < 0.25 else self.rng.choice(RANGES)
        self.sources[name] = Source(name, Role.INPUT, range=declared)
        self.values.append(node)

    def _emit(self, op: Any, *args: Any, **kwargs: Any) -> None:
        fakes = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
        with self.mode:
            value = op(*fakes[0], **fakes[1])
        node = self.graph.call_function(op, args, kwargs)
        node.meta["val"] = value
        if isinstance(value, torch.Tensor):
            self.values.append(node)
            return
        for index, element in enumerate(value):
            getitem = self.graph.call_function(operator.getitem, (node, index))
            getitem.meta["val"] = element
            self.values.append(getitem)

    def _pick(self, *dtypes: torch.dtype, dims: int | None = None) -> fx.Node:
        found = [
            n for n in self.values if (not dtypes or n.meta["val"].dtype in dtypes) and (dims is None or n.meta["val"].dim() >= dims)
        ]
        if not found:
            raise LookupError
        return self.rng.choice(found[-6:] if self.rng.random() < 0.6 else found)

    def _grow(self) -> None:
        # An op that refuses these operands: another one.
        with contextlib.suppress(LookupError, RuntimeError, ArithmeticError, ValueError, TypeError):
            self.rng.choice(_GROWERS)(self)

    def divisor(self) -> int:
        """A number, but not -1 where torch kills the process on the lowest integer divided by it (2.9, all ways to divide)."""
        number = self.number()
        old = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13)
        return -2 if number == -1 and old else number

    def number(self) -> int:
        return self.rng.choice(NUMBERS[:16]) if self.rng.random() < 0.75 else self.rng.choice(NUMBERS)

    def integer(self, dims: int | None = None) -> fx.Node:
        narrow = (torch.int32, torch.int16, torch.uint8, torch.int8, torch.bool)
        return self._pick(torch.int64, *(narrow if self.rng.random() < 0.2 else ()), dims=dims)

    def dim(self, node: fx.Node) -> int:
        return self.rng.randrange(-node.meta["val"].dim(), node.meta["val"].dim())

    def product_of_part(self, x: fx.Node) -> fx.Node:
        """Something to write over all but the first row of ``x``."""
        self._emit(aten.slice.Tensor, x, 0, 1, 2**63 - 1)
        self._emit(aten.mul.Tensor, self.values[-1], self.number())
        return self.values[-1]

    def zeros_of(self, x: fx.Node) -> fx.Node:
        self._emit(aten.zeros_like.default, x)
        return self.values[-1]

    def index(self, node: fx.Node, dim: int) -> fx.Node:
        """Some integer brought into the bounds of ``node``'s dimension."""
        size = node.meta["val"].shape[dim]
        self._emit(aten.remainder.Scalar, self._pick(torch.int64), size)
        return self.values[-1]


Grower = Callable[[Program], None]
_GROWERS: list[Grower] = []


def _grows(weight: int = 1) -> Callable[[Grower], Grower]:
    def register(function: Grower) -> Grower:
        _GROWERS.extend([function] * weight)
        return function

    return register


@_grows(6)
def _binary(p: Program) -> None:
    op = p.rng.choice([
        aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.maximum.default, aten.minimum.default, aten.bitwise_and.Tensor,
        aten.bitwise_or.Tensor, aten.bitwise_xor.Tensor, aten.max.other, aten.min.other,
    ])  # fmt: skip
    p._emit(op, p.integer(), p.integer())


@_grows(6)
def _with_number(p: Program) -> None:
    op = p.rng.choice([aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.bitwise_and.Scalar, aten.bitwise_or.Scalar,
                       aten.bitwise_xor.Scalar, aten.rsub.Scalar, aten.add.Scalar, aten.mul.Scalar])  # fmt: skip
    subtracts = op in (aten.sub.Tensor, aten.rsub.Scalar)  # refused for bool, at run time only
    p._emit(op, p._pick(torch.int64) if subtracts else p.integer(), p.number())


@_grows()
def _with_alpha(p: Program) -> None:
    p._emit(p.rng.choice([aten.add.Tensor, aten.sub.Tensor]), p.integer(), p.integer(), alpha=p.number())


@_grows(3)
def _divides(p: Program) -> None:
    op, number = p.rng.choice([aten.remainder.Scalar, aten.fmod.Scalar, aten.floor_divide.default]), p.divisor()
    if number:
        p._emit(op, p._pick(torch.int64), number)


@_grows()
def _divides_mode(p: Program) -> None:
    number = p.divisor()
    modes = ["floor", "trunc"] if number != -1 else ["floor"]  # torch kills the process on -2**63 / -1 truncated
    if number:
        p._emit(aten.div.Tensor_mode, p.integer(), number, rounding_mode=p.rng.choice(modes))


@_grows(2)
def _unary(p: Program) -> None:
    op = p.rng.choice([aten.neg.default, aten.abs.default, aten.sign.default, aten.square.default, aten.bitwise_not.default,
                       aten.relu.default, aten.clone.default, aten.floor.default])  # fmt: skip
    p._emit(op, p._pick(torch.int64))


@_grows()
def _power(p: Program) -> None:
    p._emit(aten.pow.Tensor_Scalar, p._pick(torch.int64), p.rng.randint(0, 4))


@_grows(2)
def _shift(p: Program) -> None:
    op = p.rng.choice([aten.bitwise_left_shift.Tensor_Scalar, aten.bitwise_right_shift.Tensor_Scalar, aten.__lshift__.Scalar,
                       aten.__rshift__.Scalar])  # fmt: skip
    p._emit(op, p._pick(torch.int64), p.rng.choice([0, 1, 2, 5, 16, 31, 32, 33, 40, 62, 63]))


@_grows()
def _shift_by_tensor(p: Program) -> None:
    p._emit(aten.bitwise_and.Scalar, p._pick(torch.int64), p.rng.choice([3, 15, 31, 63]))
    op = p.rng.choice([aten.bitwise_left_shift.Tensor, aten.bitwise_right_shift.Tensor])
    p._emit(op, p._pick(torch.int64), p.values[-1])


@_grows(2)
def _clamp(p: Program) -> None:
    low, high = sorted((p.number(), p.number()))
    p._emit(aten.clamp.default, p._pick(torch.int64), p.rng.choice([None, low]), high)


@_grows(2)
def _compares(p: Program) -> None:
    op = p.rng.choice([aten.eq.Scalar, aten.ne.Scalar, aten.lt.Scalar, aten.le.Scalar, aten.gt.Scalar, aten.ge.Scalar])
    p._emit(op, p.integer(), p.number())


@_grows()
def _compares_tensors(p: Program) -> None:
    p._emit(p.rng.choice([aten.eq.Tensor, aten.lt.Tensor, aten.ge.Tensor, aten.isin.Tensor_Tensor]), p.integer(), p.integer())


@_grows(3)
def _where(p: Program) -> None:
    p._emit(aten.where.self, p._pick(torch.bool), p.integer(), p.integer())


@_grows()
def _where_number(p: Program) -> None:
    if p.rng.random() < 0.5:
        p._emit(aten.where.ScalarOther, p._pick(torch.bool), p.integer(), p.number())
    else:
        p._emit(aten.where.Scalar, p._pick(torch.bool), p.number(), p.number())


@_grows()
def _guarded_where(p: Program) -> None:
    x, limit = p._pick(torch.int64), p.rng.choice([1, 8, 100])
    p._emit(aten.lt.Scalar, x, limit)
    condition = p.values[-1]
    p._emit(p.rng.choice([aten.mul.Tensor, aten.add.Tensor]), x, p.number())
    p._emit(aten.where.self, condition, p.values[-1], p.integer())


@_grows()
def _bucketed(p: Program) -> None:
    """T5's relative position buckets: log(0) is cast to int64 and discarded."""
    exact = p.rng.choice([1, 4, 16])
    p._emit(aten.abs.default, p._pick(torch.int64))
    x = p.values[-1]
    p._emit(p.rng.choice([aten.lt.Scalar, aten.le.Scalar]), x, exact)
    small = p.values[-1]
    p._emit(aten._to_copy.default, x, dtype=torch.float32)
    p._emit(aten.div.Tensor, p.values[-1], exact)
    p._emit(aten.log.default, p.values[-1])
    p._emit(aten.mul.Tensor, p.values[-1], p.rng.choice([2.5, 8.0]))
    p._emit(aten._to_copy.default, p.values[-1], dtype=torch.int64)
    p._emit(aten.add.Tensor, p.values[-1], exact)
    p._emit(aten.full_like.default, p.values[-1], 31)
    p._emit(aten.minimum.default, p.values[-2], p.values[-1])
    p._emit(aten.where.self, small, x, p.values[-1])


@_grows()
def _masked_fill(p: Program) -> None:
    p._emit(aten.masked_fill.Scalar, p._pick(torch.int64), p._pick(torch.bool), p.number())


@_grows(2)
def _casts(p: Program) -> None:
    dtype = p.rng.choice([torch.int64, torch.int64, torch.int32, torch.int16, torch.uint8, torch.bool, torch.float32, torch.float64])
    p._emit(aten._to_copy.default, p._pick(), dtype=dtype)


@_grows(2)
def _float_and_back(p: Program) -> None:
    p._emit(aten._to_copy.default, p._pick(torch.int64), dtype=torch.float32)
    p._emit(p.rng.choice([aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor]), p.values[-1], p.rng.choice([0.5, 2.0, 3.0, -1.5, 100.0]))
    if p.rng.random() < 0.5:
        p._emit(p.rng.choice([aten.floor.default, aten.ceil.default, aten.neg.default, aten.relu.default]), p.values[-1])
    p._emit(aten.clamp.default, p.values[-1], -(2.0**30), 2.0**30)
    p._emit(aten._to_copy.default, p.values[-1], dtype=torch.int64)


@_grows()
def _factory(p: Program) -> None:
    start, step = p.number(), p.rng.choice([1, 2, -1, 1000, 2**29])
    p._emit(aten.arange.start_step, start, start + step * 4, step)


@_grows()
def _fills(p: Program) -> None:
    if p.rng.random() < 0.5:
        p._emit(aten.full.default, p.rng.choice([[], [4], [3, 4]]), p.number())
    else:
        p._emit(p.rng.choice([aten.full_like.default]), p._pick(torch.int64), p.number())


@_grows()
def _like(p: Program) -> None:
    p._emit(p.rng.choice([aten.zeros_like.default, aten.ones_like.default]), p.integer(), dtype=p.rng.choice([None, torch.int64]))


@_grows(3)
def _views(p: Program) -> None:
    x = p._pick(torch.int64)
    value = x.meta["val"]
    kind = p.rng.randrange(8)
    if kind == 0:
        p._emit(aten.unsqueeze.default, x, p.rng.randint(0, value.dim()))
    elif kind == 1:
        p._emit(aten.slice.Tensor, x, p.dim(x), p.rng.choice([0, 1, -2]), p.rng.choice([2**63 - 1, 2, -1]), p.rng.choice([1, 2]))
    elif kind == 2:
        p._emit(aten.select.int, x, p.dim(x), p.rng.choice([0, -1]))
    elif kind == 3:
        p._emit(aten.permute.default, x, list(reversed(range(value.dim()))))
    elif kind == 4:
        p._emit(aten.expand.default, x, [2, *value.shape])
    elif kind == 5:
        p._emit(aten.flip.default, x, [p.dim(x)])
    elif kind == 6:
        p._emit(aten.constant_pad_nd.default, x, [1, 1], p.number())
    else:
        p._emit(aten.split.Tensor, x, 2, p.dim(x))


@_grows(2)
def _assembles(p: Program) -> None:
    x = p._pick(torch.int64, dims=1)
    same = [n for n in p.values if n.meta["val"].shape == x.meta["val"].shape]
    p._emit(p.rng.choice([aten.cat.default, aten.stack.default]), [x, p.rng.choice(same), p.rng.choice(same)], p.dim(x))


@_grows(2)
def _accumulates(p: Program) -> None:
    x = p.integer(dims=1)
    if p.rng.random() < 0.5:
        p._emit(p.rng.choice([aten.cumsum.default, aten.cumprod.default]), x, p.dim(x))
    else:
        p._emit(p.rng.choice([aten.sum.dim_IntList, aten.sum.dim_IntList]), x, [p.dim(x)], p.rng.random() < 0.5)


@_grows()
def _reduces(p: Program) -> None:
    op = p.rng.choice([aten.sum.default, aten.prod.default, aten.max.default, aten.min.default, aten.count_nonzero.default])
    p._emit(op, p.integer())


@_grows(2)
def _index_producers(p: Program) -> None:
    x = p.integer(dims=1)
    kind = p.rng.randrange(6)
    if kind == 0:
        p._emit(p.rng.choice([aten.argmax.default, aten.argmin.default]), x, p.dim(x))
    elif kind == 1:
        p._emit(aten.sort.stable, x, stable=True, dim=p.dim(x), descending=p.rng.random() < 0.5)
    elif kind == 2:
        p._emit(p.rng.choice([aten.max.dim, aten.min.dim, aten.cummax.default]), x, p.dim(x))
    elif kind == 3:
        p._emit(aten.argsort.stable, x, stable=True, dim=p.dim(x))
    elif kind == 4:
        p._emit(p.rng.choice([aten.amax.default, aten.amin.default]), x, [p.dim(x)])
    else:
        p._emit(aten.arange.default, 5)
        p._emit(aten.bucketize.Tensor, p._pick(torch.int64), p.values[-1], right=p.rng.random() < 0.5)


@_grows(2)
def _gathers(p: Program) -> None:
    x = p.integer(dims=1)
    dim = p.dim(x)
    index = p.index(x, dim)
    if p.rng.random() < 0.4:
        p._emit(aten.gather.default, x, dim, index)
    elif p.rng.random() < 0.5:
        p._emit(aten.index.Tensor, x, [p.index(x, 0)])
    else:
        p._emit(aten.view.default, index, [-1])
        p._emit(aten.index_select.default, x, dim, p.values[-1])


@_grows()
def _table(p: Program) -> None:
    p._emit(aten.ones.default, [9, 2])
    p._emit(aten.embedding.default, p.values[-1], p.index(p.values[-1], 0))


@_grows(2)
def _scatters(p: Program) -> None:
    x = p._pick(torch.int64, dims=1)
    same = p.rng.choice([n for n in p.values if n.meta["val"].shape == x.meta["val"].shape and n.meta["val"].dtype == torch.int64])
    dim, kind = p.dim(x), p.rng.randrange(5)
    if kind == 0:
        p._emit(aten.slice_scatter.default, x, p.product_of_part(x), 0, 1, 2**63 - 1, 1)
    elif kind == 1:
        p._emit(aten.scatter.value, x, dim, p.zeros_of(x), p.number())
    elif kind == 2:
        p._emit(aten.scatter_add.default, x, dim, p.zeros_of(x), same)
    elif kind == 3:
        p._emit(aten.copy.default, x, p.integer())
    else:
        p._emit(aten.fill.Scalar, x, p.number())


@_grows()
def _demands(p: Program) -> None:
    x = p._pick(torch.int64, dims=1)
    kind = p.rng.randrange(3)
    if kind == 0:
        count = int(x.meta["val"].numel())
        p._emit(aten.remainder.Scalar, p._pick(torch.int64), count)
        p._emit(aten.take.default, x, p.values[-1])
    elif kind == 1:
        p._emit(aten.zeros.default, [2], dtype=torch.int64)
        p._emit(aten.index_fill.int_Scalar, x, 0, p.values[-1], p.number())
    else:
        p._emit(aten.remainder.Scalar, x, 5)
        p._emit(aten.one_hot.default, p.values[-1], 5)


@_grows()
def _products(p: Program) -> None:
    x = p._pick(torch.int64, dims=2)
    p._emit(aten.matmul.default, x, p._pick(torch.int64, dims=1))


@_grows()
def _other(p: Program) -> None:
    x = p._pick(torch.int64, dims=1)
    kind = p.rng.randrange(4)
    if kind == 0:
        p._emit(aten.diff.default, x, 1, p.dim(x))
    elif kind == 1:
        p._emit(aten.tril.default, p._pick(torch.int64, dims=2))
    elif kind == 2:
        p._emit(aten.type_as.default, x, p._pick())
    else:
        p._emit(aten.repeat.default, x, [2] * x.meta["val"].dim())


# --- the check --------------------------------------------------------------------------------------------------------


def check_integers(seed: int, mode: str = "assume", *, draws: int = 3) -> tuple[int, int]:
    """Narrow the program of ``seed`` and compare it with the original, bit for bit, at interval corners.

    Returns:
        64-bit edges before and after.

    Raises:
        AssertionError: an invariant is broken, a second run changes the graph, an edge is left that no finding explains, or the
            two programs differ; the message holds both.
    """
    program = Program(seed)
    context = program.context()
    original = copy.deepcopy(program.gm)
    contract = invariants.contract_of(program.gm)
    options = NarrowOptions(mode=mode)
    result = Narrow64bit(options).run(program.gm, context)
    where = f"seed {seed}, mode={mode}\n{original.code}\n{program.gm.code}"
    broken = [b for b in invariants.check(program.gm, contract) if b.rule != "has-trace"]
    assert not broken, f"{broken[0]}\n{where}"
    assert not Narrow64bit(options).run(program.gm, program.context()).changed, f"a second run changed it\n{where}"
    before, after = wide_edges(original)["edges"], wide_edges(program.gm)["edges"]
    assert not after or any(f.code in ("NX301", "NX302", "NX306") for f in result.findings), f"edges without a reason\n{where}"
    program.gm.recompile()
    for draw in range(draws):
        inputs = program.inputs(draw, context.requirements)
        expected = _outcome_of(original, inputs)
        if expected is _Strides:
            continue
        outcome = compare(expected, _outcome_of(program.gm, inputs))
        assert outcome.ok, f"{outcome}\n{inputs}\n{where}"
    return before, after


class _Strides(RuntimeError):
    """A kernel refuses the strides of a view (``isin``); after a cast there is no view."""


def _outcome_of(gm: fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
    try:
        return gm(*copy.deepcopy(inputs))
    except (RuntimeError, IndexError) as error:
        return _Strides if "view size is not compatible" in str(error) else type(error)
