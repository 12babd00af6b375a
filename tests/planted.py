"""Faults planted into captured graphs, and what localisation must say of each: the node and the user's line.

    PYTHONPATH=.:tests python tests/planted.py            the whole set, with figures
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

import nxfx
from nxfx.graph.builder import NodeBuilder
from nxfx.graph.meta import dtype_of, is_tensor, val
from nxfx.prepared import PreparedModule
from nxfx.report import locate
from nxfx.verification.equivalence import compare
from nxfx.verification.subjects import run

aten = torch.ops.aten
Plant = Callable[[fx.GraphModule, torch.nn.Module], str | None]


# -- faults: each changes the graph and gives the name of the node at fault, or None where the graph has no place for it --------------


def _first(gm: fx.GraphModule, *targets: Any, where: Callable[[fx.Node], bool] = lambda n: True, last: bool = False) -> fx.Node | None:
    found = [n for n in gm.graph.nodes if n.op == "call_function" and n.target in targets and where(n)]
    return found[-1 if last else 0] if found else None


def _round_after(gm: fx.GraphModule, node: fx.Node | None, dtype: torch.dtype) -> str | None:
    """A cast down and back after ``node``: the cast down is the fault."""
    if node is None:
        return None
    build = NodeBuilder(gm.graph, "planted")
    users = list(node.users)
    with build.after(node):
        down = build.cast(node, dtype)
        back = build.cast(down, val(node).dtype)
    for user in users:
        user.replace_input_with(node, back)
    return down.name


def _from_integers(node: fx.Node) -> bool:
    source = node.args[0]
    return isinstance(source, fx.Node) and is_tensor(source) and not val(source).is_floating_point() and val(node).is_floating_point()


def round_positions(gm: fx.GraphModule, model: nn.Module) -> str | None:
    """Positions pass through bf16 on their way to the angles."""
    node = _first(gm, aten._to_copy.default, aten.to.dtype, where=lambda n: _from_integers(n) and dtype_of(n) is torch.float32)
    return _round_after(gm, node, torch.bfloat16)


def round_angles(gm: fx.GraphModule, model: nn.Module) -> str | None:
    """The argument of the cosine is rounded to bf16."""
    node = _first(gm, aten.cos.default, aten.sin.default, where=lambda n: dtype_of(n) is torch.float32)
    return None if node is None else _round_after(gm, node.all_input_nodes[0], torch.bfloat16)


def round_table(gm: fx.GraphModule, model: nn.Module) -> str | None:
    """An fp32 buffer (``inv_freq``, a table) holds values rounded to bf16."""
    from nxfx.graph.attributes import own_buffer

    for node in gm.graph.find_nodes(op="get_attr"):
        value = dict(gm.named_buffers()).get(str(node.target))
        if value is not None and value.dtype is torch.float32 and value.dim() and not torch.equal(value, value.bfloat16().float()):
            own_buffer(gm, str(node.target), value.bfloat16().float())
            return str(node.name)
    return None


def round_weight(gm: fx.GraphModule, model: nn.Module) -> str | None:
    """One weight matrix lost half of its bits."""
    for node in reversed(list(gm.graph.find_nodes(op="get_attr"))):
        value = dict(gm.named_parameters()).get(str(node.target))
        if value is not None and value.dim() == 2 and value.is_floating_point() and list(node.users)[0].target is not aten.embedding.default:
            low = torch.float8_e4m3fn if value.dtype is torch.bfloat16 else torch.bfloat16
            from nxfx.graph.attributes import own_buffer

            path, _, leaf = str(node.target).rpartition(".")
            holder = gm.get_submodule(path)
            holder.__dict__["_parameters"] = {k: v for k, v in holder._parameters.items() if k != leaf}
            own_buffer(gm, str(node.target), value.detach().to(low).to(value.dtype))
            return str(node.name)
    return None


def _change(node: fx.Node | None, position: int, change: Callable[[Any], Any]) -> str | None:
    if node is None or len(node.args) <= position:
        return None
    node.update_arg(position, change(node.args[position]))
    return node.name


def wrong_scalar(gm: fx.GraphModule, model: nn.Module) -> str | None:
    """A constant factor or summand is another one."""
    node = _first(
        gm, aten.mul.Tensor, aten.add.Tensor, aten.div.Tensor, where=lambda n: isinstance(n.args[1], float) and n.args[1] != 0, last=True
    )
    return _change(node, 1, lambda c: c * 1.5)


def wrong_epsilon(gm: fx.GraphModule, model: nn.Module) -> str | None:
    """A layer norm divides by something else."""
    node = _first(gm, aten.layer_norm.default, last=True)
    if node is None:
        return None
    node.args = (*node.args[:4], 0.1)
    return node.name


def other_activation(gm: fx.GraphModule, model: nn.Module) -> str | None:
    """silu for gelu, gelu for silu, relu for anything else."""
    node = _first(gm, aten.gelu.default, aten.silu.default, aten.relu.default, aten.tanh.default, aten.sigmoid.default)
    if node is None:
        return None
    node.target = aten.silu.default if node.target is not aten.silu.default else aten.gelu.default
    node.args, node.kwargs = node.args[:1], {}
    return node.name


def low_precision_matmul(gm: fx.GraphModule, model: nn.Module) -> str | None:
    """A matrix product in the middle runs in fewer bits than the model's."""
    found = [n for n in gm.graph.nodes if n.op == "call_function" and n.target in (aten.linear.default, aten.matmul.default, aten.mm.default)]
    if not found:
        return None
    node = found[len(found) // 2]
    low = torch.float8_e4m3fn if dtype_of(node) is torch.bfloat16 else torch.bfloat16
    source = node.args[0]
    build = NodeBuilder(gm.graph, "planted")
    with build.before(node):
        down = build.cast(source, low)
        node.replace_input_with(source, build.cast(down, val(source).dtype))
    return down.name


def overflow_mask(gm: fx.GraphModule, model: nn.Module) -> str | None:
    """An additive mask goes through a sum with itself: finfo.min becomes -inf, and a masked row nan."""
    node = _first(gm, aten.where.self, aten.masked_fill.Scalar, where=lambda n: val(n).is_floating_point() and val(n).dim() >= 2)
    if node is None:
        return None
    build = NodeBuilder(gm.graph, "planted")
    users = list(node.users)
    with build.after(node):
        doubled = build.call(aten.mul.Tensor, node, 2.0)
    for user in users:
        user.replace_input_with(node, doubled)
    return doubled.name


def other_dim(gm: fx.GraphModule, model: nn.Module) -> str | None:
    """A softmax, mean or sum goes along another dimension."""
    node = _first(gm, aten.softmax.int, aten._softmax.default, where=lambda n: val(n).dim() >= 2 and n.args[1] in (-1, val(n).dim() - 1))
    return _change(node, 1, lambda d: val(node).dim() - 2)  # type: ignore[arg-type,union-attr]


def swapped(gm: fx.GraphModule, model: nn.Module) -> str | None:
    """A difference is the other way round."""
    node = _first(gm, aten.sub.Tensor, aten.pow.Tensor_Tensor, aten.div.Tensor, where=lambda n: all(is_tensor(a) for a in n.args[:2]), last=True)
    if node is None or val(node.args[0]).shape != val(node.args[1]).shape:
        return None
    node.args = (node.args[1], node.args[0])
    return node.name


def wrap_integers(gm: fx.GraphModule, model: nn.Module) -> str | None:
    """Integer arithmetic runs in int16 and wraps."""
    node = _first(gm, aten.mul.Tensor, aten.add.Tensor, aten.cumsum.default, where=lambda n: dtype_of(n) in (torch.int64, torch.int32))
    if node is None:
        return None
    build = NodeBuilder(gm.graph, "planted")
    users = list(node.users)
    with build.after(node):
        huge = build.call(aten.add.Tensor, node, 0)
        narrow = build.cast(huge, torch.int8)
        back = build.cast(narrow, val(node).dtype)
    for user in users:
        user.replace_input_with(node, back)
    return narrow.name


FAULTS: dict[str, Plant] = {
    f.__name__: f
    for f in (round_positions, round_angles, round_table, overflow_mask, wrap_integers, low_precision_matmul, round_weight, wrong_scalar,
              wrong_epsilon, other_activation, other_dim, swapped)
}  # fmt: skip


# -- small models ----------------------------------------------------------------------------------------------------------


class Rotary(nn.Module):
    """Attention with rotary positions: an fp32 table, integer positions, a mask."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.norm = nn.LayerNorm(width)
        self.register_buffer("inv_freq", 10000.0 ** (-torch.arange(0, width, 2).float() / width), persistent=False)

    def turn(self, x: Tensor, angles: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)

    def forward(self, x: Tensor, positions: Tensor, keep: Tensor) -> Tensor:
        angles = positions.float()[..., None] * self.inv_freq
        h = self.norm(x)
        q, k = self.turn(self.query(h), angles), self.turn(self.key(h), angles)
        bias = torch.where(keep[:, None, :], 0.0, torch.finfo(x.dtype).min / 4).to(x.dtype)
        scores = q @ k.transpose(-1, -2) * 0.17 + bias
        return x + self.out(torch.softmax(scores, -1) @ self.value(h))


class Amplifier(nn.Module):
    """Layers one of which has a large norm: it amplifies what it is handed."""

    def __init__(self, width: int = 32, norm: float = 300.0) -> None:
        super().__init__()
        self.first, self.large, self.last = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, 8)
        with torch.no_grad():
            self.large.weight.mul_(norm)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.nn.functional.gelu(self.first(x))
        return self.last(torch.nn.functional.silu(self.large(h)) * 0.5) - h.mean(-1, keepdim=True)


class Buckets(nn.Module):
    """Integer arithmetic that chooses rows of a table."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(512, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, ids: Tensor) -> Tensor:
        slots = (ids * 7 + torch.arange(ids.shape[-1])) % 512
        return torch.tanh(self.head(self.rows(slots)).float()) * 2.5


def small_models(dtype: torch.dtype = torch.float32) -> dict[str, tuple[nn.Module, tuple[Any, ...]]]:
    """Name → model and arguments."""
    torch.manual_seed(0)
    x = torch.randn(2, 24, 32).to(dtype)
    keep = torch.arange(24) < torch.tensor([[24], [17]])
    return {
        "rotary": (Rotary().to(dtype).eval(), (x, torch.arange(3000, 3024), keep)),
        "amplifier": (Amplifier().to(dtype).eval(), (x,)),
        "buckets": (Buckets().to(dtype).eval(), (torch.randint(0, 1000, (2, 24)),)),
    }


# -- planting and asking -----------------------------------------------------------------------------------------------------


@dataclass
class Verdict:
    """What was planted, and what was said."""

    model: str
    fault: str
    planted: str
    line: str
    blamed: str
    blamed_line: str
    cause: str
    ok: bool

    @property
    def hit(self) -> bool:
        return self.planted == self.blamed and self.line == self.blamed_line

    def __str__(self) -> str:
        mark = "hit " if self.hit else "MISS"
        return f"{mark} {self.model:<14} {self.fault:<22} {self.planted} → {self.blamed or 'nobody'} ({self.cause}, {self.blamed_line})"


def plant(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], fault: str, pipeline: str | None = None
) -> tuple[PreparedModule, str] | None:
    """A prepared model with ``fault`` in its graph, and the node at fault; None where the graph has no place for it."""
    prepared = nxfx.prepare(model, args, kwargs, pipeline=pipeline)
    before = run(prepared, (args, kwargs))
    name = FAULTS[fault](prepared.graph_module, model)
    if name is None:
        return None
    prepared.graph_module.graph.lint()
    prepared.graph_module.recompile()
    unchanged = compare(before.value, run(prepared, (args, kwargs)).value).ok  # positions below 256 do not mind bf16
    return None if unchanged else (prepared, name)


def ask(name: str, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], fault: str) -> Verdict | None:
    """Plant ``fault`` and localise it."""
    planted = plant(model, args, kwargs, fault)
    if planted is None:
        return None
    prepared, node_name = planted
    (node,) = (n for n in prepared.graph_module.graph.nodes if n.name == node_name)
    report = nxfx.verify(model, prepared, args, kwargs=kwargs, localise=True, bisect=False)
    assert report.localisation is not None
    first = report.localisation.first
    said = ("", "", "") if first is None else (first.node, str(first.location), first.cause)
    return Verdict(name, fault, node_name, str(locate(node)), said[0], said[1], said[2], report.ok)


CORPUS_MODELS = ("llama", "bert", "gpt2", "t5", "swin", "mistral", "vit", "bloom", "whisper", "deberta_v2")


def corpus_models(names: tuple[str, ...] = CORPUS_MODELS, dtype: torch.dtype = torch.float32) -> dict[str, tuple[nn.Module, dict[str, Any]]]:
    """Tiny transformers models and their keyword arguments."""
    from corpus import BY_NAME

    return {name: BY_NAME[name].build(dtype) for name in names}


CLEAN_MODELS = ("mixtral", "qwen3", "gemma", "gpt_neox", "opt", "roberta", "distilbert", "bart", "convnext", "mamba")


def planted_set() -> list[Verdict]:
    """Every fault that finds a place in each of ten models, and has an effect there."""
    models = {**{n: (m, a, {}) for n, (m, a) in small_models().items()}, **{n: (m, (), k) for n, (m, k) in corpus_models(CORPUS_MODELS[:7]).items()}}
    return [v for name, (model, args, kwargs) in models.items() for fault in FAULTS if (v := ask(name, model, args, kwargs, fault)) is not None]


def clean_set() -> dict[str, Any]:
    """Model → whom localisation blames in its prepared form: nobody, in twenty models, half of them in bf16."""
    found = {}
    models = {**corpus_models(CORPUS_MODELS), **{f"{n} bf16": pair for n, pair in corpus_models(CLEAN_MODELS, torch.bfloat16).items()}}
    for name, (model, kwargs) in models.items():
        report = nxfx.verify(model, None, (), kwargs=kwargs, localise=True)
        found[name] = report.localisation.first if report.localisation is not None else "not localised"
        if not report.ok:
            found[name] = found[name] or report.summary()
    return found


def main() -> None:
    """The whole set, with figures."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    verdicts = planted_set()
    print(*verdicts, sep="\n")
    print(f"planted {len(verdicts)} faults in 10 models: {sum(v.hit for v in verdicts)} localised to the exact node", flush=True)
    clean = clean_set()
    blamed = {name: first for name, first in clean.items() if first is not None}
    print(f"{len(clean)} clean models: an innocent op blamed in {len(blamed)}", *blamed.items(), sep="\n")


if __name__ == "__main__":
    sys.exit(main())
