"""What Python offers around an ``if`` on a tensor: generators, closures, recursion, ``finally``, ``while`` ... ``else``, aliases that part."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from test_merge import merged
from torch import Tensor


def generator(m: Any, x: Tensor, f: Tensor) -> Any:
    def chosen() -> Iterator[Tensor]:
        for i in range(2):
            if f[i]:
                yield x * (i + 1)

    return sum(chosen(), x)


def counter_of_an_outer_function(m: Any, x: Tensor, f: Tensor) -> Tensor:
    n = 0

    def note(condition: Tensor) -> None:
        nonlocal n
        if condition:
            n += 1

    note(f[0])
    note(f[1])
    return x * n


def recursion(m: Any, x: Tensor, f: Tensor) -> Tensor:
    def step(z: Tensor, depth: int) -> Tensor:
        if depth == 2:
            return z
        if f[depth]:
            return step(z * 2, depth + 1)
        return step(z + 1, depth + 1)

    return step(x, 0)


def returns_through_finally(m: Any, x: Tensor, f: Tensor) -> Tensor:
    try:
        if f[0]:
            return x * 2
        if f[1]:
            raise KeyError
        return x - 1
    except KeyError:
        return x + 5
    finally:
        m.state.add_(1)


def while_with_else(m: Any, x: Tensor, f: Tensor) -> Tensor:
    i = 0
    while i < 2:
        if f[i]:
            break
        i += 1
    else:
        x = x * 100
    return x + i


def any_of_a_generator(m: Any, x: Tensor, f: Tensor) -> Tensor:
    if any(f[i] for i in range(2)):
        x = x + 1
    return x * 2 if all(v < 2 for v in x[:2]) else x


def comprehension(m: Any, x: Tensor, f: Tensor) -> Any:
    return [x + i if f[i] else x - i for i in range(2)], x * len([i for i in range(2) if f[i]])


def exchanged_names(m: Any, x: Tensor, f: Tensor) -> Any:
    a, b = x + 1, x * 2
    if f[0]:
        a, b = b, a
    a.add_(b)
    if f[1]:
        a, b = b, a
    b.mul_(a)
    return a, b


def buffer_or_input(m: Any, x: Tensor, f: Tensor) -> Tensor:
    t = m.state if f[0] else x
    t[1:].add_(3)
    if f[1]:
        t = m.state
    t.mul_(2)
    return m.state + x


def view_or_copy(m: Any, x: Tensor, f: Tensor) -> Tensor:
    y = x[:1].expand(4)
    if f[0]:
        y = y.clone()
    if f[1]:
        x.add_(1)
    return y + x


def condition_that_its_side_changes(m: Any, x: Tensor, f: Tensor) -> Tensor:
    positive = x[0] > 0
    if positive:
        x[0] = -5
    if positive:
        x = x + 1
    if x[0] > 0:
        x = x * 2
    return x


def number_as_condition(m: Any, x: Tensor, f: Tensor) -> Tensor:
    n = f.sum()
    if n:
        x = x + 1
    if n == 2:
        x = x * 2
    if n > 0 and x[0] > n:
        x = x - n
    return x


def attribute_of_one_call(m: Any, x: Tensor, f: Tensor) -> Tensor:
    if f[0]:
        m.kept = x * 2
    else:
        m.kept = x + 1
    kept: Tensor = m.kept
    del m.kept
    return kept


def shapes_that_agree_again(m: Any, x: Tensor, f: Tensor) -> Tensor:
    y = x[:2] if f[0] else x
    return torch.stack([y.sum(), y.max()])


CONSTRUCTS = [
    generator, counter_of_an_outer_function, recursion, returns_through_finally, while_with_else, any_of_a_generator, comprehension,
    exchanged_names, buffer_or_input, view_or_copy, condition_that_its_side_changes, number_as_condition, attribute_of_one_call,
    shapes_that_agree_again,
]  # fmt: skip


@pytest.mark.parametrize("function", CONSTRUCTS, ids=lambda f: f.__name__)
def test_constructs(function: Callable[..., Any]) -> None:
    merged(function, 2)
