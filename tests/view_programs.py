"""Random programs of views and writes: the generator behind the fuzz test of mask-slice-writes."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from nxfx.analysis.provenance import Role, Source
from nxfx.pipeline import PassContext

INF, NAN = float("inf"), float("nan")
NASTY = [0.0, -0.0, 1.0, INF, -INF, NAN, -1.0, 2.5, 300.7, 1e-3]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int64, torch.bool]
VIEWS = ["slice", "slice", "slice", "narrow", "select", "transpose", "permute", "unsqueeze", "squeeze", "view",
         "diagonal", "split", "unbind", "chunk", "unfold", "as_strided", "movedim"]  # fmt: skip
WRITES = ["fill_", "zero_", "item", "copy_", "copy_broadcast", "copy_cast", "mul_", "add_", "masked_fill_", "mask",
          "mask_rows", "mask_and_slice", "masked_scatter_", "index_fill_", "index_copy_", "index_add_", "index_put",
          "pairs", "grid", "position", "scatter", "scatter_value", "scatter_order", "scatter_add_", "put_",
          "accumulate", "functional", "own"]  # fmt: skip


@dataclass
class Program:
    """Steps on a list of tensors, the base first: ``("view" | "write" | "read", position, operation)``."""

    shape: list[int]
    dtype: torch.dtype
    base: str
    steps: list[tuple[str, int, Any]]

    def __call__(self, x: Tensor, other: Tensor, position: Tensor) -> tuple[Tensor, ...]:
        if self.base == "flags":
            x = (x > 0).to(self.dtype)
        elif self.base in ("ones", "zeros"):
            x = getattr(torch, self.base)(self.shape, dtype=self.dtype)
        elif self.base == "transposed" and x.dim() > 1:
            x = x.transpose(0, 1).clone(memory_format=torch.contiguous_format).transpose(0, 1)
        else:
            x = x.clone()
        tensors, reads = [x], []
        for kind, at, operation in self.steps:
            if kind == "view":
                tensors.append(apply_view(tensors[at], operation))
            elif kind == "write":
                apply_write(tensors[at], operation, other, position)
            else:
                reads.append(tensors[at].logical_not() if self.dtype is torch.bool else tensors[at] * 1)
        return (x, *reads)


def generate(rng: random.Random, views: int = 5, writes: int = 3) -> Program:
    """A program that eager accepts, except by bad luck."""
    shape = [rng.choice([1, 2, 3, 4, 5]) for _ in range(rng.randrange(1, 6))]
    if rng.random() < 0.05:
        shape[rng.randrange(len(shape))] = 0
    program = Program(shape, rng.choice(DTYPES), rng.choice(["input", "ones", "zeros", "flags", "transposed"]), [])
    tensors = [torch.zeros(shape, dtype=program.dtype)]
    for _ in range(rng.randrange(1, writes + 1)):
        at = rng.randrange(len(tensors))
        for _ in range(rng.randrange(0, views + 1)):
            operation = view_of(rng, tensors[at])
            tensors.append(apply_view(tensors[at], operation))
            program.steps.append(("view", at, operation))
            at = len(tensors) - 1
        program.steps.append(("write", at, write_to(rng, tensors[at])))
        if rng.random() < 0.3:
            program.steps.append(("read", rng.randrange(len(tensors)), None))
    return program


def view_of(rng: random.Random, x: Tensor) -> tuple[str, tuple[Any, ...]]:
    """A view op that ``x`` accepts."""
    rank = x.dim()
    for _ in range(20):
        kind = rng.choice(VIEWS)
        dim = rng.randrange(rank) if rank else 0
        size = x.shape[dim] if rank else 0
        signed = dim - rng.choice([0, rank])
        if kind == "slice" and rank:
            bounds = [None, 0, 1, -1, 2, -2, 3, 99, -99, 2**63 - 1, size, size - 1]
            return kind, (signed, rng.choice(bounds), rng.choice(bounds), rng.choice([1, 1, 1, 2, 3]))
        if kind == "narrow" and size:
            start = rng.randrange(size)
            return kind, (dim, start, rng.randrange(1, size - start + 1))
        if kind == "select" and size:
            return kind, (signed, rng.randrange(-size, size))
        if kind == "transpose" and rank > 1:
            return kind, (rng.randrange(-rank, rank), rng.randrange(-rank, rank))
        if kind == "permute" and rank > 1:
            order = list(range(rank))
            rng.shuffle(order)
            return kind, (order,)
        if kind == "unsqueeze" and rank < 5:
            return kind, (rng.randrange(-rank - 1, rank + 1),)
        if kind == "squeeze":
            return kind, (signed,) if rank and rng.random() < 0.5 else ()
        if kind == "view" and rank and x.is_contiguous() and x.numel():
            return kind, (rng.choice([[-1], [x.shape[0], -1], [-1, x.shape[-1]], [1, *x.shape]]),)
        if kind == "diagonal" and rank > 1:
            return kind, (rng.randrange(-2, 3), *rng.sample(range(rank), 2))
        if kind == "split" and size:
            length = rng.randrange(1, size + 1)
            return kind, (length, dim, rng.randrange(-(-size // length)))
        if kind == "unbind" and size:
            return kind, (dim, rng.randrange(size))
        if kind == "chunk" and size:
            parts = rng.randrange(1, 4)
            return kind, (parts, dim, rng.randrange(len(x.chunk(parts, dim))))
        if kind == "unfold" and size and rank < 5:  # of other windows functionalisation clears what lies between
            length = rng.choice([n for n in range(1, size + 1) if size % n == 0])
            return kind, (dim, length, length)
        if kind == "as_strided" and rank and x.is_contiguous() and x.storage_offset() == 0 and x.numel() > 1:
            step = rng.choice([1, 2, x.shape[-1], x.shape[-1] + 1])
            start = rng.randrange(x.numel())
            return kind, ([len(range(start, x.numel(), step))], [step], start)
        if kind == "movedim" and rank > 1:
            return kind, (rng.randrange(-rank, rank), rng.randrange(-rank, rank))
    return "squeeze", ()


def apply_view(x: Tensor, operation: tuple[str, tuple[Any, ...]]) -> Tensor:
    kind, args = operation
    if kind == "slice":
        dim, start, end, step = args
        index = [slice(None)] * x.dim()
        index[dim] = slice(start, end, step)
        return x[tuple(index)]
    if kind == "split":
        return x.split(args[0], args[1])[args[2]]
    if kind == "unbind":
        return x.unbind(args[0])[args[1]]
    if kind == "chunk":
        return x.chunk(args[0], args[1])[args[2]]
    return getattr(x, kind)(*args)


def write_to(rng: random.Random, x: Tensor) -> tuple[Any, ...]:
    """A write that ``x`` accepts."""
    floats = [0, 0.0, -0.0, 1, -1.5, 2, INF, NAN]
    number = rng.choice(floats) if x.dtype.is_floating_point else rng.choice([0, 0, 1, 3])
    kind = rng.choice(WRITES)
    if kind in ("fill_", "zero_", "item", "copy_", "copy_cast", "mul_", "add_", "masked_fill_", "mask"):
        return kind, number
    if x.dim() == 0 or x.numel() == 0:
        return "fill_", number
    dim = rng.randrange(x.dim())
    size = x.shape[dim]
    distinct = rng.sample(range(size), rng.randrange(1, size + 1))
    if kind == "copy_broadcast":
        return kind, dim
    if kind == "mask_rows":
        return kind, rng.randrange(1, x.dim() + 1)
    if kind == "index_fill_":
        return kind, dim, [rng.randrange(-size, size) for _ in range(rng.randrange(1, size + 1))], number
    if kind in ("index_copy_", "index_add_", "accumulate", "scatter_order"):
        return kind, dim, distinct
    if kind in ("masked_scatter_", "put_", "own"):
        return kind, number
    if kind == "mask_and_slice":
        bounds = rng.choice([(None, None), (0, 1), (1, None), (-1, None), (0, 0)])
        return (kind, *bounds, number) if x.dim() > 1 else ("mask", number)
    if kind in ("pairs", "grid"):
        if x.dim() < 2 or kind == "grid" and x.shape[1] == 0:
            return "index_fill_", dim, distinct, number
        places = rng.sample(range(x.shape[0] * x.shape[1]), rng.randrange(1, min(5, x.shape[0] * x.shape[1]) + 1))
        rows, columns = [p // x.shape[1] for p in places], [p % x.shape[1] for p in places]
        return kind, rows, columns, number if rng.random() < 0.4 else None
    if kind == "functional":
        op = rng.choice(["slice_scatter", "select_scatter", "diagonal_scatter"])
        start = rng.randrange(-size, size)
        if op == "select_scatter":
            return kind, op, (dim, start)
        if op == "diagonal_scatter" and x.dim() > 1:
            return kind, op, (rng.randrange(-1, 2), *rng.sample(range(x.dim()), 2))
        return kind, "slice_scatter", (dim, start, rng.choice([None, size, start + 2, 99]), rng.choice([1, 2]))
    if kind == "scatter_add_":
        return kind, dim, rng.randrange(size)
    if kind == "index_put":
        distinct = rng.choice([distinct, sorted(distinct), [d - size for d in distinct]])
        return kind, dim, distinct, number if rng.random() < 0.3 else None
    if kind == "position":
        return kind, dim, rng.random() < 0.5
    return kind, dim, rng.randrange(size), number


def apply_write(x: Tensor, operation: tuple[Any, ...], other: Tensor, position: Tensor) -> None:
    kind, *args = operation

    def source(shape: Any, dtype: torch.dtype | None = None) -> Tensor:
        count = int(torch.Size(shape).numel())
        made = other.repeat(count // other.numel() + 1)[:count].reshape(shape)
        return made if dtype is None else made.to(dtype)

    def resized(dim: int, size: int) -> list[int]:
        return [size if d == dim else s for d, s in enumerate(x.shape)]

    if kind == "fill_":
        x.fill_(args[0])
    elif kind == "item":
        x[...] = args[0]
    elif kind == "zero_":
        x.zero_()
    elif kind == "copy_":
        x.copy_(source(x.shape))
    elif kind == "copy_cast":
        x.copy_(source(x.shape, torch.bfloat16 if x.dtype is torch.float32 else torch.float32))
    elif kind == "copy_broadcast":
        x.copy_(source(resized(args[0], 1)))
    elif kind in ("mul_", "add_"):
        _ = x.logical_not_() if x.dtype is torch.bool else getattr(x, kind)(2)
    elif kind == "masked_fill_":
        x.masked_fill_(source(x.shape) > 0, args[0])
    elif kind == "mask":
        x[source(x.shape) > 0] = args[0]
    elif kind == "mask_rows":
        x[source(x.shape[: args[0]]) > 0] = source(x.shape[args[0] :], x.dtype)
    elif kind == "index_fill_":
        x.index_fill_(args[0], torch.tensor(args[1]), args[2])
    elif kind == "mask_and_slice":
        x[source(x.shape[:1]) > 0, args[0] : args[1]] = args[2]
    elif kind == "masked_scatter_":
        x.masked_scatter_(source(x.shape) > 0, source(x.shape, x.dtype))
    elif kind == "own":
        mask = source(x.shape) > 0
        x[mask] = (x.logical_not() if x.dtype is torch.bool else x * 2 + 1)[mask]
    elif kind == "put_":
        x.put_(torch.tensor([x.numel() - 1, 0][: x.numel()]), source([min(2, x.numel())], x.dtype))
    elif kind == "accumulate":
        values = source(resized(args[0], len(args[1])), x.dtype).movedim(args[0], 0)
        x.movedim(args[0], 0).index_put_((torch.tensor(args[1]),), values, accumulate=True)
    elif kind == "pairs":
        rows, columns, number = torch.tensor(args[0]), torch.tensor(args[1]), args[2]
        x[rows, columns] = source((len(args[0]), *x.shape[2:]), x.dtype) if number is None else number
    elif kind == "grid":
        rows, columns = sorted(set(args[0])), sorted(set(args[1]))
        value = source((len(rows), len(columns), *x.shape[2:]), x.dtype) if args[2] is None else args[2]
        x[torch.tensor(rows)[:, None], torch.tensor(columns)] = value
    elif kind == "functional":
        name, where = args
        part = apply_view(x, (name.removesuffix("_scatter"), where))
        x.copy_(getattr(torch, name)(x, source(part.shape, x.dtype), *where))
    elif kind == "scatter_order":
        dim, order = args
        shape = [1] * x.dim()
        shape[dim] = len(order)
        places = torch.tensor(order).reshape(shape).expand(resized(dim, len(order)))
        x.scatter_(dim, places, source(resized(dim, len(order)), x.dtype))
    elif kind == "scatter_add_":
        values = source(resized(args[0], 1))
        x.scatter_add_(args[0], (values > 0).long() * args[1], values.to(x.dtype))
    elif kind in ("index_copy_", "index_add_"):
        getattr(x, kind)(args[0], torch.tensor(args[1]), source(resized(args[0], len(args[1])), x.dtype))
    elif kind == "index_put":
        dim, indices, number = args
        index: list[Any] = [slice(None)] * x.dim()
        index[dim] = torch.tensor(indices)
        x[tuple(index)] = source(resized(dim, len(indices)), x.dtype) if number is None else number
    elif kind == "position":
        dim, from_end = args
        index = [slice(None)] * x.dim()
        index[dim] = (position % x.shape[dim] - (x.shape[dim] if from_end else 0)).reshape(1)
        x[tuple(index)] = source(resized(dim, 1), x.dtype)
    else:
        dim, row, number = args
        values = source(resized(dim, 1))
        index_tensor = (values > 0).long() * row
        x.scatter_(dim, index_tensor, number if kind == "scatter_value" else values.to(x.dtype))


def inputs(rng: random.Random, program: Program) -> tuple[Tensor, Tensor, Tensor]:
    """A base full of corner values, something to write, and a position."""
    count = int(torch.Size(program.shape).numel())
    if program.dtype.is_floating_point:
        corners, values = NASTY, NASTY
    elif program.dtype is torch.bool:
        corners, values = [0, 1], [1.0, 0.0, -3.0, 2.0]
    else:
        info = torch.iinfo(program.dtype)
        corners, values = [0, 1, -1, info.max, info.min, 2**24 + 1], [1.0, 0.0, -3.0, 2.0, 7.0]
    base = torch.tensor([rng.choice(corners) for _ in range(count)], dtype=program.dtype).reshape(program.shape)
    return base, torch.tensor([rng.choice(values) for _ in range(7)]), torch.tensor(rng.randrange(5))


def functional_graph(function: Any, args: tuple[Tensor, ...]) -> tuple[fx.GraphModule, PassContext]:
    """The functional ATen graph of ``function``, much faster than export, in the form that AOTAutograd gives."""
    gm = make_fx(torch.func.functionalize(function, remove="mutations"), tracing_mode="fake")(*args)
    gm.graph.eliminate_dead_code()
    sources = {n.name: Source(n.name, Role.INPUT) for n in gm.graph.find_nodes(op="placeholder")}
    for node in gm.graph.find_nodes(op="get_attr"):
        sources[node.name] = Source(str(node.target), Role.CONSTANT, getattr(gm, str(node.target)))
    return gm, PassContext(sources=sources)


def shrunk(program: Program, fails: Any) -> Program:
    """The shortest program, steps left out one by one, for which ``fails(program)`` still holds."""
    position = len(program.steps) - 1
    while position >= 0:
        fewer = _without(program, position)
        if fewer is not None and fails(fewer):
            program, position = fewer, min(position, len(fewer.steps))
        position -= 1
    return program


def _without(program: Program, position: int) -> Program | None:
    """``program`` less one step; a view that others rest on is left out with them never: None."""
    kind = program.steps[position][0]
    if kind != "view":
        return Program(program.shape, program.dtype, program.base, program.steps[:position] + program.steps[position + 1 :])
    number = 1 + sum(step[0] == "view" for step in program.steps[:position])  # tensors[number] is what it makes
    rest = program.steps[position + 1 :]
    if any(at == number for _, at, _ in rest):
        return None
    rest = [(kind, at - (at > number), operation) for kind, at, operation in rest]
    return Program(program.shape, program.dtype, program.base, program.steps[:position] + rest)


def loop_of_writes(rng: random.Random) -> tuple[list[int], Any]:
    """A shape, and a function of two tensors of it: writes along one axis from front to back, with reads in between."""
    rank = rng.choice([1, 2, 3])
    shape = [rng.choice([6, 7, 8]) for _ in range(rank)]
    axis, base = rng.randrange(rank), rng.choice(["input", "zeros", "transposed"])
    steps, position = [], 0
    while position < shape[axis]:
        width = min(rng.choice([1, 1, 2]), shape[axis] - position)
        partial = (
            (rng.randrange(rank), rng.choice([slice(0, 3), slice(2, 5), slice(1, None, 2)]))
            if rng.random() < 0.4
            else None
        )
        reads = [slice(0, position), slice(position, None), slice(-2, None), slice(1, 5), slice(0, position, 2), None]
        steps.append((position, width, partial, rng.choice(reads), rng.choice(["plain", "sum", "dependent", "select"])))
        position += width + (rng.random() < 0.2)

    def at(where: Any, partial: Any) -> tuple[Any, ...]:
        index: list[Any] = [slice(None)] * rank
        if partial is not None and partial[0] != axis:
            index[partial[0]] = partial[1]
        index[axis] = where
        return tuple(index)

    def program(x: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        written = x.clone() if base == "input" else torch.zeros(shape)
        if base == "transposed":
            written = x.transpose(0, -1).clone(memory_format=torch.contiguous_format).transpose(0, -1)
        reads = []
        for position, width, partial, read, value in steps:
            selects = value == "select" and width == 1
            where = at(position if selects else slice(position, position + width), partial)
            source = v[where] * 2
            if value == "sum":
                source = source.sum()
            if value == "dependent" and position:
                source = source + written[at(slice(0, 1), partial)]
            written[where] = source
            reads.append(written + 1 if read is None else written[at(read, None)].flatten() * 3)
        return written, *reads

    return shape, program
