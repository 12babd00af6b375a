"""What is proved finite and non-negative is: facts hold of every intermediate value, and the useful ones are found."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from nxfx.analysis.finiteness import Facts, Finiteness
from nxfx.analysis.provenance import Premise, Role, Source
from nxfx.analysis.uniform import UniformValues

INF, NAN = float("inf"), float("nan")
NASTY = torch.tensor([0.0, -0.0, 1.0, -1.0, INF, -INF, NAN, 3e38, -3e38, 1e-40, 65504.0, 300.7])


def graph_of(
    function: Callable[..., Any], *args: Tensor, buffers: tuple[int, ...] = ()
) -> tuple[fx.GraphModule, dict[str, Source]]:
    """A functional graph; the arguments at ``buffers`` are buffers with known values."""
    gm = make_fx(function, tracing_mode="fake")(*args)
    sources = {}
    for position, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        known = position in buffers
        sources[node.name] = Source(node.name, Role.BUFFER if known else Role.INPUT, args[position] if known else None)
    for node in gm.graph.find_nodes(op="get_attr"):
        sources[node.name] = Source(str(node.target), Role.CONSTANT, getattr(gm, str(node.target)))
    return gm, sources


def result_facts(function: Callable[..., Any], *args: Tensor, buffers: tuple[int, ...] = ()) -> Facts:
    gm, sources = graph_of(function, *args, buffers=buffers)
    return Finiteness(sources).of(gm.graph.find_nodes(op="output")[0].all_input_nodes[0])


PROVED = {
    "ones": lambda x: torch.ones(2, 3),
    "zeros_like": lambda x: torch.zeros_like(x),
    "full": lambda x: torch.full((2,), 0.5).bfloat16(),
    "comparison": lambda x: (x > 0).to(torch.float16),
    "sigmoid of a number": lambda x: torch.ones(2).sigmoid(),
    "softmax of finite": lambda x: (x > 0).float().softmax(-1),
    "bool": lambda x: x > 0,
    "arange": lambda x: torch.arange(4.0) * 2 + 1,
    "shapes": lambda x: torch.ones(2, 3).t().reshape(-1)[1:].unsqueeze(0).expand(4, 5).contiguous(),
    "cat": lambda x: torch.cat([torch.ones(2), torch.zeros(1)]),
    "where": lambda x: torch.where(x > 0, torch.ones(()), torch.zeros(())),
    "tril": lambda x: torch.ones(3, 3).tril(),
    "product": lambda x: torch.ones(2) * torch.arange(2.0) * 3,
    "quotient": lambda x: torch.ones(3, 3) / torch.arange(1.0, 4.0),
    "difference": lambda x: 1.0 - (x > 0).float(),
    "pad": lambda x: torch.nn.functional.pad(torch.ones(2), (1, 1)),
}
NOT_PROVED = {
    "an input": lambda x: x * 1,
    "relu of an input": lambda x: x.relu(),  # inf stays inf, -0.0 may stay -0.0
    "sigmoid of an input": lambda x: x.sigmoid(),  # nan stays nan
    "softmax of an input": lambda x: x.softmax(-1),
    "minus ones": lambda x: -torch.ones(2),
    "-0.0": lambda x: torch.full((2,), -0.0),
    "a negative times a positive": lambda x: torch.zeros(2) * -1.0,
    "infinity": lambda x: torch.full((2,), INF),
    "nan": lambda x: torch.full((2,), NAN),
    "overflow in float16": lambda x: (torch.ones(2) * 70000.0).to(torch.float16),
    "overflow of a product": lambda x: torch.full((2,), 3e38) * 10,
    "zero by zero": lambda x: torch.zeros(2) / torch.zeros(2),
    "a wide integer": lambda x: torch.full((2,), 2**40),
}


@pytest.mark.parametrize("name", PROVED)
def test_proved(name: str) -> None:
    facts = result_facts(PROVED[name], NASTY)
    assert facts.finite and facts.non_negative, facts


@pytest.mark.parametrize("name", NOT_PROVED)
def test_not_proved(name: str) -> None:
    """Trap 20: mask multiply → nan (tt-metal #52038, tinygrad #11760), and its sign-of-zero twin."""
    gm, sources = graph_of(NOT_PROVED[name], NASTY)
    assert not Finiteness(sources).zero_fill_may_multiply(gm.graph.find_nodes(op="output")[0].all_input_nodes[0])


def test_present_values_of_a_buffer_are_a_premise() -> None:
    mask, bad = torch.ones(3), torch.tensor([1.0, -0.0, 1.0])
    gm, sources = graph_of(lambda x, b: b.clone() * 1, NASTY, mask, buffers=(1,))
    node = gm.graph.find_nodes(op="output")[0].all_input_nodes[0]
    facts = Finiteness(sources)
    assert facts.zero_fill_may_multiply(node)
    buffer = gm.graph.find_nodes(op="placeholder")[1].name
    assert facts.premises(node) == [Premise(buffer, "finite-nonnegative")]
    assert not result_facts(lambda x, b: b.clone(), NASTY, bad, buffers=(1,)).non_negative


def test_a_written_buffer_and_an_unknown_source_prove_nothing() -> None:
    gm, sources = graph_of(lambda x: x.clone(), torch.ones(3), buffers=(0,))
    (node,) = gm.graph.find_nodes(op="output")[0].all_input_nodes
    (name,) = sources
    assert Finiteness(sources).of(node).finite
    assert not Finiteness({name: Source(name, Role.BUFFER, torch.ones(3), mutated=True)}).of(node).finite
    assert not Finiteness({name: Source(name, Role.OPAQUE, torch.ones(3))}).of(node).finite
    assert not Finiteness({}).of(node).finite


def test_lifted_constants_are_uniform_values() -> None:
    def program(x: Tensor) -> Tensor:
        return torch.tensor(2.5).bfloat16().expand(3).clone()

    gm, sources = graph_of(program, NASTY)
    value = UniformValues(sources).value(gm.graph.find_nodes(op="output")[0].all_input_nodes[0])
    assert value is not None and value.dtype is torch.bfloat16 and value.item() == 2.5
    assert UniformValues({}).value(gm.graph.find_nodes(op="output")[0].all_input_nodes[0]) is None


UNARY = [
    torch.sigmoid, torch.relu, torch.abs, torch.exp, torch.cos, torch.tanh, torch.logical_not, torch.tril,
    torch.zeros_like, lambda t: t.softmax(-1), lambda t: t.clamp(min=0), lambda t: t.clamp(-1, 2), lambda t: t > 0,
    lambda t: t.clamp(max=-1), lambda t: -1 - t, lambda t: t.to(torch.bfloat16), lambda t: t.to(torch.float16),
    lambda t: t.to(torch.float32), lambda t: t.to(torch.int32), lambda t: t.to(torch.int8), lambda t: t * 3,
    lambda t: t * -0.5, lambda t: t + 1, lambda t: 2 - t, lambda t: t / 3, lambda t: t.flip(0),
    lambda t: t.amax(-1, keepdim=True), lambda t: t.sort(-1)[0], lambda t: t.max(-1, keepdim=True)[1],
    lambda t: torch.full_like(t, 2), lambda t: t.masked_fill(t > 0, 7),
]  # fmt: skip
BINARY = [torch.add, torch.sub, torch.mul, torch.div, torch.maximum, lambda a, b: torch.where(a > b, a, b),
          lambda a, b: torch.cat([a, b]).narrow(0, 0, 1), lambda a, b: torch.slice_scatter(a, b, 0, 0, 3)]  # fmt: skip


def _random_program(rng: random.Random, *inputs: Tensor) -> Callable[[Tensor, Tensor], list[Tensor]]:
    """Six steps on values so far, those that eager refuses (dtypes, shapes) left out."""
    accepted: list[tuple[Any, int, int]] = []

    def program(x: Tensor, known: Tensor) -> list[Tensor]:
        values = [x, known, torch.ones(3, 4), torch.arange(12.0).reshape(3, 4)]
        for step, i, j in accepted:
            values.append(step(values[i], values[j]) if step in BINARY else step(values[i]))
        return values[4:]

    for _ in range(6):
        size = 4 + len(accepted)
        accepted.append((rng.choice([*UNARY, *BINARY]), rng.randrange(size), rng.randrange(size)))
        try:
            program(*inputs)
        except (RuntimeError, TypeError, IndexError):
            accepted.pop()
    return program


def test_facts_are_true_of_every_value() -> None:
    """Random expressions over nasty and known inputs: no proved bound, finiteness or sign is ever wrong."""
    proved = 0
    for seed in range(60):
        rng = random.Random(seed)
        x = NASTY[torch.tensor([rng.randrange(len(NASTY)) for _ in range(12)])].reshape(3, 4)
        known = torch.tensor([rng.choice([0.0, 1.0, 3e38, 70000.0]) for _ in range(12)]).reshape(3, 4)
        gm, sources = graph_of(_random_program(rng, x, known), x, known, buffers=(1,))
        finiteness = Finiteness(sources)
        nodes = gm.graph.find_nodes(op="output")[0].args[0]
        for node, value in zip(nodes, gm(x, known), strict=True):
            facts = finiteness.of(node)
            wide = value.double()
            assert facts.nan or not wide.isnan().any(), (seed, node.format_node())
            numbers = wide[~wide.isnan()]
            assert (numbers >= facts.low).all() and (numbers <= facts.high).all(), (seed, node.format_node(), facts)
            assert facts.negative_zero or not ((numbers == 0) & numbers.signbit()).any(), (seed, node.format_node())
            proved += facts.finite and facts.non_negative
    assert proved > 40
