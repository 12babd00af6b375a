"""The legacy route on Inf2, Trn1 (Trn2 up to SDK 2.31): nxfx.trace. Usage: python trace.py [trn1]"""

from __future__ import annotations

import torch
from checks import check, decoder, refuses, report, run, steps, target
from llama_bf16 import rotary
from mllama_mask import small

import nxfx

TARGET = target("trn1")


def main() -> None:
    model, (x, ar) = small()
    mask = nxfx.trace(model, (x, ar), target=TARGET)
    for ratio in ([1, 1], [1, 2], [2, 2], [4, 1]):
        check(f"vision mask {ratio}", model(x, torch.tensor([ratio])), mask(x, torch.tensor([ratio])))

    naive, args, kwargs = rotary()
    expected, traced = nxfx.prepare(naive, args, kwargs), nxfx.trace(naive, args, kwargs, target=TARGET)
    check("rotary at position 5000", expected(*args, **kwargs), traced(*args, **kwargs))

    eager, traced = decoder(), nxfx.trace(decoder(), next(steps(1)), target=TARGET, ranges={"position": (0, 63)})
    for token, position in steps():
        check(f"cache at position {int(position)}", eager(token, position), traced(token, position))
    refuses("a position outside its range", lambda: traced(torch.randn(2, 1, 32), torch.tensor(64)), nxfx.RangeError)
    torch.jit.save(traced, "step.pt")
    report("saved and loaded", torch.jit.load("step.pt")(*next(steps(1))).shape == (2, 1, 32))
    print(traced.warmup(changes_state=True))


if __name__ == "__main__":
    run(main)
