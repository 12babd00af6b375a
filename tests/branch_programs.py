"""Random models that branch on tensors: nested ifs, elif chains, early returns, loops, writes to inputs, buffers and views."""

from __future__ import annotations

import itertools
import linecache
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

NAMES = ("a", "b", "c")


@dataclass
class Program:
    """``source`` of a class ``Model`` whose branches read ``flags`` elements of its second argument, and values of its first."""

    source: str
    flags: int

    def __str__(self) -> str:
        return self.source

    def model(self) -> torch.nn.Module:
        name = f"branch_program_{hash(self.source):x}.py"
        linecache.cache[name] = (len(self.source), None, self.source.splitlines(True), name)
        namespace: dict[str, Any] = {"torch": torch}
        exec(compile(self.source, name, "exec"), namespace)
        made: torch.nn.Module = namespace["Model"]()
        return made

    def inputs(self, rng: random.Random, most: int = 32) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Arguments that drive every combination of the flags, or ``most`` of them, over data with nan and infinities."""
        generator = torch.Generator().manual_seed(rng.randrange(2**31))
        answers = list(itertools.product((True, False), repeat=self.flags))
        for values in answers if len(answers) <= most else rng.sample(answers, most):
            x = torch.randn(4, generator=generator) * rng.choice((0.1, 1.0, 100.0))
            if rng.random() < 0.3:
                x[rng.randrange(4)] = rng.choice((float("nan"), float("inf"), -0.0, 0.0, -float("inf")))
            yield x, torch.tensor([*values, True])


def generate(rng: random.Random, most_flags: int = 5) -> Program:
    """A program whose ifs, nested to three, read ``most_flags`` flags at most. All of these have a data-flow form."""
    return _Writer(rng, most_flags).program()


class _Writer:
    def __init__(self, rng: random.Random, most_flags: int) -> None:
        self.rng = rng
        self.most_flags = most_flags
        self.lines: list[str] = []
        self.flags = 0
        self.depth = 0

    def program(self) -> Program:
        helper = self.rng.random() < 0.5
        self.lines += [
            "class Model(torch.nn.Module):",
            "    def __init__(self):",
            "        super().__init__()",
            "        self.register_buffer('state', torch.arange(4.0))",
            "",
        ]
        if helper:
            self.lines += ["    def helper(self, a, flag):", "        if flag:", f"            a = {self.value('a')}"]
            self.lines += ["            return a * 2", f"        return {self.value('a')}", ""]
        self.lines += [
            "    def forward(self, x, flags):",
            "        a, b, c, k, parts = x * 2, x + 1, self.state + x, 1.0, [x]",
        ]
        self.helper = helper
        self.block(2, self.rng.randint(3, 6))
        self.lines.append("        return a * k, b, [c, torch.stack(parts).sum(0)]")
        return Program("\n".join(self.lines) + "\n", self.flags)

    def block(self, indent: int, count: int) -> None:
        for _ in range(count):
            self.statement(indent)

    def add(self, indent: int, text: str) -> None:
        self.lines.append("    " * indent + text)

    def operand(self) -> str:
        return self.rng.choice((*NAMES, *NAMES, "self.state", "x", "k", "2", "0.5"))

    def value(self, name: str = "") -> str:
        a = name or self.rng.choice(NAMES)
        b = name or self.operand()
        return self.rng.choice(
            (f"{a} + {b}", f"{a} * {b}", f"{a} / {b}", f"{a}.sqrt()", f"{a}.abs().log()", f"{a} - {b}", f"torch.relu({a})", f"{a}.flip(0)",
             f"{a}.clone()", f"torch.where({a} > 0, {a}, 1.0)", f"{a}[torch.tensor([3, 1, 0, 2])]")
        )  # fmt: skip

    def condition(self) -> str:
        if self.flags < self.most_flags and self.rng.random() < 0.8:
            self.flags += 1
            return self.rng.choice((f"flags[{self.flags - 1}]", f"not flags[{self.flags - 1}]"))
        return self.rng.choice(
            (f"{self.rng.choice(NAMES)}.sum() > 0", f"({self.rng.choice(NAMES)} < 1).all()", "self.state[0] > 2", "k > 1", "len(parts) > 1")
        )

    def statement(self, indent: int) -> None:
        kind = self.rng.random()
        name = self.rng.choice(NAMES)
        if kind < 0.32 and self.depth < 3 and self.flags < self.most_flags:
            self.branch(indent)
        elif kind < 0.37 and self.depth == 0:
            self.add(indent, f"for i in range({self.rng.randint(1, 2)}):")
            self.depth += 1
            self.block(indent + 1, self.rng.randint(1, 2))
            if self.rng.random() < 0.3 and self.flags < self.most_flags:
                self.flags += 1
                self.add(indent + 1, f"if flags[{self.flags - 1}]:")
                self.add(indent + 2, self.rng.choice(("break", "continue")))
            self.depth -= 1
            self.add(indent + 1, f"{name} = {name} + i")
        elif kind < 0.42 and self.helper and self.flags < self.most_flags:
            self.flags += 1
            self.add(indent, f"{name} = self.helper({name}, flags[{self.flags - 1}])")
        else:
            self.plain(indent, name)

    def plain(self, indent: int, name: str) -> None:
        fresh = self.value()
        self.add(indent, self.rng.choice((
            f"{name} = {fresh}", f"{name} = {fresh}", f"{name} = {fresh}", f"{name} += {self.operand()}", f"{name} = {self.rng.choice(NAMES)}",
            f"self.state.add_({name})", f"self.state = {fresh}", f"x.mul_({self.operand()})", f"{name}[1:] = {self.rng.choice(NAMES)}[0]",
            f"{name}.view(2, 2)[0].fill_(3)", f"k = {self.rng.choice(('2.0', '0.5', 'k + 1'))}", f"parts.append({name})", f"parts[-1] = {name}",
            f"v = {name}[2:]; v.mul_(2)", f"flags[-1] = {self.rng.choice(('False', 'flags[0]'))}",
        )))  # fmt: skip

    def branch(self, indent: int) -> None:
        self.depth += 1
        self.add(indent, f"if {self.condition()}:")
        self.block(indent + 1, self.rng.randint(1, 2))
        self.ending(indent + 1)
        if self.rng.random() < 0.25 and self.flags < self.most_flags:
            self.add(indent, f"elif {self.condition()}:")
            self.block(indent + 1, 1)
        if self.rng.random() < 0.5:
            self.add(indent, "else:")
            self.block(indent + 1, self.rng.randint(1, 2))
            self.ending(indent + 1)
        self.depth -= 1

    def ending(self, indent: int) -> None:
        if self.rng.random() < 0.15:
            self.add(indent, f"return {self.rng.choice(NAMES)}, {self.value()}, [{self.rng.choice(NAMES)}, x]")
