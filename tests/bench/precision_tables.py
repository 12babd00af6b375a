"""Tables of positions in a bf16 model as they are written, and what rounding costs each. Used by `precision.py`."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

import nxfx
from nxfx.graph.meta import dtype_of
from nxfx.prepared import PreparedModule
from nxfx.verification.autocast import AutoCast, CastType, emulate
from nxfx.verification.equivalence import ErrorStats, error_against

BF16 = torch.bfloat16
LENGTHS = (512, 4096, 32768, 131072)
CAST_TYPES = ("bf16", "fp16", "tf32", "fp8_e4m3")
EPSILON = {"bf16": 2**-8, "fp16": 2**-11, "tf32": 2**-11, "fp8_e4m3": 2**-4}  # half a unit in the last place of 1.0 to 2.0
UNDER: tuple[tuple[AutoCast, CastType], ...] = tuple((a, c) for a in ("matmult", "all") for c in CAST_TYPES)  # type: ignore[misc]
WIDTH = 64


class Table(nn.Module):
    """One spelling of a table of positions, in bf16 (or, for the truth, in float64)."""

    def __init__(self, spelling: Callable[[Tensor, torch.dtype, Tensor], Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        self.spelling, self.dtype = spelling, dtype
        exact = 1.0 / 10000 ** (torch.arange(0, WIDTH, 2).double() / WIDTH)
        self.register_buffer("inv_freq", exact if dtype is torch.float64 else exact.float())

    def forward(self, positions: Tensor) -> Tensor:
        return self.spelling(positions, self.dtype, self.inv_freq)


def _frequencies(base: Tensor | float, d: torch.dtype, width: int = WIDTH) -> Tensor:
    return 1.0 / base ** (torch.arange(0, width, 2).to(d) / width)


def _partial(p: Tensor, d: torch.dtype, f: Tensor) -> Tensor:
    """GPT-NeoX, Phi: half of the width turns."""
    angles = p[:, None].to(d) * f[::2].to(d)
    return torch.cat([angles.cos().repeat(1, 2), torch.ones_like(angles).repeat(1, 2)], -1)


def _two_dimensional(p: Tensor, d: torch.dtype, f: Tensor) -> Tensor:
    """Qwen2-VL's vision tower, Pixtral: rows and columns turn half of the width each."""
    rows, columns = p // 224, p
    return torch.cat([rows[:, None].to(d) * f[::2].to(d), columns[:, None].to(d) * f[::2].to(d)], -1).cos()


def _three_dimensional(p: Tensor, d: torch.dtype, f: Tensor) -> Tensor:
    """Qwen2-VL: ids of time, height and width, a section of the width each."""
    angles = torch.stack([p, p // 7, p % 1009]).to(d)[:, :, None] * f.to(d)
    return torch.cat([part[i] for i, part in enumerate(angles.split([8, 12, 12], -1))], -1).cos()


def _ntk(p: Tensor, d: torch.dtype, f: Tensor) -> Tensor:
    """A base that grows with the length."""
    base = 10000.0 * ((2.0 * (p.max() + 1).to(d) / 512) - 1.0) ** (WIDTH / (WIDTH - 2))
    return (p[:, None].to(d) * _frequencies(base, d)).cos()


def _yarn(p: Tensor, d: torch.dtype, f: Tensor) -> Tensor:
    """Interpolated and extrapolated frequencies, blended by a ramp, with its attention factor."""
    ramp = ((torch.arange(WIDTH // 2).to(d) - 8) / 13).clamp(0, 1)
    blended = _frequencies(10000.0, d) / 8 * ramp + _frequencies(10000.0, d) * (1 - ramp)
    return (p[:, None].to(d) * blended).cos() * (0.1 * math.log(8) + 1)


def _longrope(p: Tensor, d: torch.dtype, f: Tensor) -> Tensor:
    """A factor for each frequency, chosen by the length."""
    factors = torch.where(p.max() + 1 > 4096, torch.linspace(1, 30, WIDTH // 2).to(d), torch.ones(WIDTH // 2).to(d))
    return (p[:, None].to(d) * (_frequencies(10000.0, d) / factors)).cos()


def _complex(p: Tensor, d: torch.dtype, f: Tensor) -> Tensor:
    turn = torch.polar(torch.ones_like(p[:, None] * f), (p[:, None].to(d) * f).to(f.dtype))
    return torch.view_as_real(turn)[..., 0]


def _buckets(p: Tensor, d: torch.dtype, f: Tensor) -> Tensor:
    """T5's: half of them exact, the rest logarithmic."""
    large = 16 + (torch.log(p.to(d) / 16 + 1e-6) / torch.log(torch.tensor(128.0 / 16, dtype=d)) * 16).to(torch.int64)
    return torch.where(p < 16, p, large.clamp(max=4000)).to(torch.float32 if d is BF16 else d)


SPELLINGS: dict[str, Callable[[Tensor, torch.dtype, Tensor], Tensor]] = {
    "rotary, half-split": lambda p, d, f: torch.cat([a := p[:, None].to(d) * f.to(d), a], -1).cos(),
    "rotary, interleaved": lambda p, d, f: (p[:, None].to(d) * f.to(d)).cos().repeat_interleave(2, -1),
    "rotary, product": lambda p, d, f: (p[:, None].to(d) * f).cos(),
    "rotary, fp32 matmul": lambda p, d, f: (f[:, None] @ p[None, :].to(f.dtype)).t().cos(),
    "rotary, outer": lambda p, d, f: torch.outer(p.to(d), f.to(d)).cos(),
    "rotary, einsum": lambda p, d, f: torch.einsum("i,j->ij", p.to(f.dtype), f).cos(),
    "rotary, complex": _complex,
    "rotary, partial": _partial,
    "rotary, 2-D": _two_dimensional,
    "rotary, 3-D": _three_dimensional,
    "rotary, NTK": _ntk,
    "rotary, YaRN": _yarn,
    "rotary, longrope": _longrope,
    "timestep": lambda p, d, f: (p.to(d)[:, None] * torch.exp(torch.arange(32).to(d) * (-9.210340371976184 / 32))).sin(),
    "sinusoidal": lambda p, d, f: (p.to(d)[:, None] / torch.pow(10000.0, torch.arange(32).to(d) / 32)).sin(),
    "ALiBi": lambda p, d, f: p[:, None] * torch.pow(torch.tensor(0.5, dtype=d), torch.arange(1, 9).to(d)),
    "T5 buckets": _buckets,
}


@dataclass
class Row:
    """The errors of one spelling at one length, against float64.

    Attributes:
        single: float32 throughout.
        original, prepared: in eager, without an auto-cast.
        lifted: what prepared has before it is cast back to bf16.
        largest: of the true values.
        under: (auto-cast, cast type) → original's and prepared's.
        under_all: cast type → what a model in float32 has under `all`.
        overflowed: where numbers of prepared became infinite, since the cast type has none so large: `all` only. NX550 says so.
    """

    spelling: str
    length: int
    single: ErrorStats
    original: ErrorStats
    prepared: ErrorStats
    lifted: ErrorStats
    largest: float
    under: dict[tuple[str, str], tuple[ErrorStats, ErrorStats]] = field(default_factory=dict)
    under_all: dict[str, ErrorStats] = field(default_factory=dict)
    overflowed: set[tuple[str, str]] = field(default_factory=set)

    def check(self) -> None:
        """The claims of docs/precision.md."""
        for key, (was, is_) in {("none", "bf16"): (self.original, self.prepared), **self.under}.items():
            if key not in self.overflowed:
                again = EPSILON[key[1]] * self.largest if key[0] == "all" else 0.0  # it rounds what is to be rounded to bf16 once more
                # A number beside bf16 is none of `all`'s: eager multiplies by it unrounded. Beside float32 it is rounded.
                usual = self.under_all[key[1]] if key[0] == "all" else was
                assert is_.mean <= 1.02 * max(was.mean, usual.mean) + again / 2 + 1e-12, (self.spelling, self.length, key, was, is_)
                assert is_.p999 <= 1.02 * max(was.p999, usual.p999) + again + 1e-12, (self.spelling, self.length, key, was, is_)
                assert is_.nan_mismatch <= was.nan_mismatch
        for best, is_ in ((getattr(self.single, w), getattr(self.lifted, w)) for w in ("mean", "p999", "max")):
            assert is_ <= 2 * best + 1e-12, (self.spelling, self.length, self.single, self.lifted)


def rows(lengths: tuple[int, ...] = LENGTHS) -> Iterator[Row]:
    """One after another, each checked."""
    for name, spelling in SPELLINGS.items():
        model, exact, pure = (Table(spelling, d) for d in (BF16, torch.float64, torch.float32))
        for length in lengths:
            positions = torch.randperm(length, generator=torch.Generator().manual_seed(0))[:4096].sort().values
            positions[-1] = length - 1
            prepared = nxfx.prepare(model, (positions,), ranges={"positions": (0, max(lengths))})
            truth = exact(positions).double()

            def error(found: Tensor, truth: Tensor = truth) -> ErrorStats:
                return error_against(truth, found)

            row = Row(
                name, length, error(pure(positions)), error(model(positions)), error(prepared(positions)),
                error(before_cast_back(prepared)(*prepared.example_inputs)[0]), float(truth.abs().max()),
            )  # fmt: skip
            for key in UNDER:
                emulated = emulate(model, *key), emulate(prepared, *key)
                row.under[key] = error(emulated[0](positions)), error(emulated[1](positions))
                if key[0] == "all":
                    row.under_all[key[1]] = error(emulate(pure, *key)(positions))
                if key[0] == "all" and emulated[1].emulation.overflowed:
                    row.overflowed.add(key)
            row.check()
            yield row


def before_cast_back(prepared: PreparedModule) -> fx.GraphModule:
    """The prepared graph without the casts that give its values back the model's dtype."""
    gm = copy.deepcopy(prepared.graph_module)
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.aten._to_copy.default):
        if dtype_of(node) is BF16 and dtype_of(node.args[0]) is torch.float32:
            node.replace_all_uses_with(node.args[0])
    gm.recompile()
    return gm
