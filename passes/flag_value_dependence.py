"""flag-value-dependence: every place in the graph where a tensor's value reaches Python or a shape."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from nxfx.graph import meta, walk
from nxfx.pipeline import Pass, PassContext, PassResult
from nxfx.report import advice
from nxfx.report.advice import Advice
from nxfx.report.findings import Finding, Severity

aten = torch.ops.aten
_Tag = torch.Tag


class FlagValueDependence(Pass):
    """Report what depends on a tensor's value: what a compiler freezes, refuses or runs on the host. Changes nothing.

    One finding for each producer, at the user's line. A value read into Python: what it is used for decides between
    NX402 (an operand, a result), NX403 (a size), NX404 (a bound) and NX407 (an assertion); NX401 where it is branched
    on. A size that depends on data: NX403. A random op: NX405. An op that torch-xla runs on the host: NX411. A
    higher-order op whose body is not rewritten: NX410. ``torch.cond``, ``while_loop``, ``scan`` and ``map`` are data
    flow and give no finding, but their bodies are looked at like any other graph.

    Given::

        %n : int64[] = placeholder[n]
        %x : float32[4, 3] = placeholder[x]
        %gt : bool[4, 3] = aten.gt.Scalar(x, 0)
        %index : float32[u0] = aten.index.Tensor(x, [gt])
        %sum_1 : float32[] = aten.sum.default(index)
        %item : SymInt = aten.item.default(n)
        %mul_1 : float32[4, 3] = aten.mul.Tensor(x, item)
        %rand_like : float32[4, 3] = aten.rand_like.default(x, pin_memory=False)
        return (sum_1, mul_1, rand_like)

    Result: the same graph, and::

        NX403 error: reading through a boolean mask gives a size that depends on data. ...
        NX402 error: a tensor's value is read into Python and used as an operand. ...
        NX405 info: rand_like draws random numbers. ...
    """

    name = "flag-value-dependence"

    def wanted(self, graph: fx.Graph) -> bool:
        """``targets`` would not do: custom ops say by tags and by fresh symbols what they are."""
        return next(_sites(graph), None) is not None

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> PassResult:
        graph = graph_module.graph
        sites = list(_sites(graph))
        uses = _uses_of_numbers(graph) if any(s.kind == "value" for s in sites) else {}
        return PassResult(findings=[_finding(site, uses.get(site.node, frozenset())) for site in sites])


@dataclass(frozen=True)
class _Site:
    """``kind``: ``"value"``, ``"size"``, ``"random"``, ``"assert"``, ``"host"`` or ``"body"``."""

    node: fx.Node
    kind: str


# --- what is looked for ----------------------------------------------------------------------------------------------

# A random op's mode and probability arguments: it draws nothing when they say so.
_IS_TRAINING = ("train", "training")
_PROBABILITY = ("dropout_p", "dropout", "p")
_ASSERTIONS = ("_assert_async", "_functional_assert_async")
# torch-xla 2.9 counts these as fallbacks: the value goes to the host, and a legacy trace keeps what comes back.
_HOST_ONLY = frozenset({"bucketize", "searchsorted", "nonzero_static", "histc"})
# No tag, or not in every version; `index` and `index_put` only with a mask.
_SIZED_BY_DATA = frozenset({"where.default", "nonzero_numpy.default", "repeat_interleave.self_Tensor"})
_INDEXED = frozenset({"index", "_unsafe_index", "index_put", "_unsafe_index_put"})
# A symbolic bound makes these return a fresh symbol: the bound's producer is reported, not the consumer.
_BOUNDED = frozenset(
    {"slice", "slice_copy", "slice_scatter", "narrow", "narrow_copy", "select", "select_copy", "select_scatter"}
)


def _sites(graph: fx.Graph) -> Iterator[_Site]:
    for node in graph.nodes:
        if node.op == "call_function":
            kind = _kind(node.target)
            if kind and (kind not in _CHECKS or _CHECKS[kind](node)):
                yield _Site(node, kind.partition("?")[0])
            elif not kind and "unbacked_bindings" in node.meta and _name(node.target) not in _BOUNDED:
                yield _Site(node, "size")


@functools.lru_cache(maxsize=4096)
def _kind(target: Any) -> str:
    """What ``target`` is looked for as; with ``?`` when the node must be asked as well."""
    if isinstance(target, torch._ops.HigherOrderOperator):
        return "" if target.name() in walk.KNOWN_HIGHER_ORDER_OPS else "body?"
    if not isinstance(target, torch._ops.OpOverload):
        return ""
    name, tags = _name(target), target.tags
    if _Tag.data_dependent_output in tags or name in ("is_nonzero", "_local_scalar_dense"):
        return "value"
    if name in _INDEXED:
        return "size?mask"
    if name in _HOST_ONLY:
        return "host"
    if _Tag.dynamic_output_shape in tags or f"{name}.{target._overloadname}" in _SIZED_BY_DATA:
        return "size?fixed"
    if _Tag.nondeterministic_seeded in tags:
        return "random?"
    return "assert" if name in _ASSERTIONS else ""


def _name(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.partition("::")[2]
    return str(getattr(target, "__name__", target))


def _argument(node: fx.Node, name: str) -> Any:
    """The value of an argument of ``node`` by its schema name, defaults included; None where it has no such argument."""
    for position, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if argument.name == name:
            default = argument.default_value if argument.has_default_value() else None
            return node.args[position] if position < len(node.args) else node.kwargs.get(name, default)
    return None


def _has_mask(node: fx.Node) -> bool:
    indices = node.args[1] if len(node.args) > 1 else ()
    return any(meta.dtype_of(i) in (torch.bool, torch.uint8) for i in indices)  # type: ignore[union-attr]


def _is_sized_by_data(node: fx.Node) -> bool:
    """Whether the output's size was left open."""
    name = _name(node.target)
    if name == "one_hot":
        return _argument(node, "num_classes") in (None, -1)
    return node.target is not aten._ctc_loss.default


def _draws(node: fx.Node) -> bool:
    """Whether a random op draws anything with these arguments."""
    if any(_argument(node, name) is False for name in _IS_TRAINING):
        return False
    names = [n for n in _PROBABILITY if n != "p" or "dropout" in _name(node.target)]
    return not any(_argument(node, name) == 0 for name in names)


def _has_body(node: fx.Node) -> bool:
    module = node.graph.owning_module
    return module is not None and any(walk.bodies(module, node))


_CHECKS = {"size?mask": _has_mask, "size?fixed": _is_sized_by_data, "random?": _draws, "body?": _has_body}


# --- what a number that came out of a tensor is used for -------------------------------------------------------------


def _uses_of_numbers(graph: fx.Graph) -> dict[fx.Node, frozenset[str]]:
    """For each node that stands for a number: ``"bound"``, ``"size"``, ``"operand"``, ``"result"``, ``"assertion"``.

    Through arithmetic on numbers, in one pass from the end of the graph.
    """
    uses: dict[fx.Node, frozenset[str]] = {}
    for node in reversed(graph.nodes):
        if isinstance(meta.val(node), (torch.SymInt, torch.SymFloat, torch.SymBool, int, float, bool)):
            found: set[str] = set()
            for user in node.users:
                found |= (
                    uses[user]
                    if user in uses and not isinstance(user.target, torch._ops.OpOverload)
                    else _role(node, user)
                )
            uses[node] = frozenset(found)
    return uses


def _role(number: fx.Node, user: fx.Node) -> set[str]:
    if user.op == "output":
        return {"result"}
    if not isinstance(user.target, torch._ops.OpOverload):
        return {"operand"}
    name = _name(user.target)
    if "_assert_scalar" in name or name.startswith("sym_constrain_range"):
        return {"assertion"}
    if name in _BOUNDED:
        return {"bound"}
    if name.startswith(("arange", "linspace", "logspace")):
        return {"size"}
    roles = set()
    for position, argument in enumerate(user.target._schema.arguments):
        value = user.args[position] if position < len(user.args) else user.kwargs.get(argument.name)
        if value is number or isinstance(value, (list, tuple)) and any(v is number for v in value):
            roles.add("size" if "int" in str(argument.type).lower() else "operand")
    return roles


# --- what is reported ------------------------------------------------------------------------------------------------

_SIZES = {
    "index": ("reading through a boolean mask gives", advice.READ_MASK),
    "_unsafe_index": ("reading through a boolean mask gives", advice.READ_MASK),
    "index_put": ("writing through a boolean mask goes by way of", advice.WRITE_MASK),
    "_unsafe_index_put": ("writing through a boolean mask goes by way of", advice.WRITE_MASK),
    "_unique": ("unique gives", advice.CALLS["unique"]),
    "_unique2": ("unique gives", advice.CALLS["unique"]),
    "unique_dim": ("unique gives", advice.CALLS["unique"]),
    "unique_dim_consecutive": ("unique_consecutive gives", advice.CALLS["unique"]),
}
_USES = {
    "size": ("as a size", advice.DATA_SIZE),
    "bound": ("as a bound", advice.SYNTAX["slice"]),
    "operand": ("as an operand", advice.OPERAND),
    "result": ("as a result", advice.RETURNED),
    "assertion": ("in an assertion", advice.SYNTAX["assert"]),
}
_HOST_FIXES = {
    "bucketize": "count the boundaries below: (boundaries < x[..., None]).sum(-1), with <= for right=True",
    "searchsorted": "count the boundaries below: (boundaries < x[..., None]).sum(-1), with <= for right=True",
    "nonzero_static": advice.CALLS["nonzero"].fix,
    "histc": "for integers from 0 to N - 1: (x[:, None] == torch.arange(N)).sum(0)",
}
_DROPOUTS = ("dropout", "scaled_dot_product", "attention", "lstm", "gru", "rnn", "rrelu")


def _finding(site: _Site, uses: frozenset[str]) -> Finding:
    node, name = site.node, _name(site.node.target)
    if site.kind == "value":
        return _value(node, name, uses)
    if site.kind == "size":
        return _size(node, name)
    if site.kind == "random":
        return _random(node, name)
    if site.kind == "assert":
        return _report(node, "an assertion reads a tensor's value", advice.SYNTAX["assert"], Severity.WARNING)
    if site.kind == "host":
        return _report(
            node, f"{name} runs on the host", Advice("NX411", advice.HOST, _HOST_FIXES[name]), Severity.WARNING
        )
    what = f"the body of the higher-order op {name} is not rewritten: what is in it reaches the compiler as it is"
    fix = "write it with tensor operations, or with torch.cond, while_loop, scan or map, whose bodies are rewritten"
    return Finding.at(node, "NX410", Severity.WARNING, what, fix)


def _report(node: fx.Node, what: str, why: Advice, severity: Severity) -> Finding:
    return Finding.at(node, why.code, severity, f"{what}. {why.becomes}", why.fix)


def _value(node: fx.Node, name: str, uses: frozenset[str]) -> Finding:
    if name in ("equal", "allclose", "is_nonzero"):
        return _report(node, f"{name} gives Python a tensor's value to branch on", advice.CALLS[name], Severity.ERROR)
    ranked = [u for u in _USES if u in uses]
    # Every size is asserted not to be negative: only a number that serves nothing else was read to be checked.
    used = [u for u in ranked if u != "assertion"] or ranked
    if not used:
        return _report(node, "a tensor's value is read into Python", advice.UNUSED, Severity.ERROR)
    why = _USES[used[0]][1]
    severity = Severity.WARNING if used[0] == "assertion" else Severity.ERROR
    return _report(
        node, f"a tensor's value is read into Python and used {' and '.join(_USES[u][0] for u in used)}", why, severity
    )


def _size(node: fx.Node, name: str) -> Finding:
    if name == "repeat_interleave" and _argument(node, "output_size") is not None:
        why = Advice("NX411", advice.HOST, advice.CALLS[name].fix)
        return _report(node, "repeat_interleave with tensor repeats runs on the host", why, Severity.WARNING)
    what, why = _SIZES.get(name, (f"{name} gives", advice.CALLS.get(name, advice.DATA_SIZE)))
    return _report(node, f"{what} a size that depends on data", why, Severity.ERROR)


def _random(node: fx.Node, name: str) -> Finding:
    if name == "multinomial":
        return _report(node, "multinomial draws random indices", advice.MULTINOMIAL, Severity.WARNING)
    if any(part in name for part in _DROPOUTS):
        return _report(
            node, f"{name} draws random numbers: the model is in training mode", advice.DROPOUT, Severity.INFO
        )
    return _report(node, f"{name} draws random numbers", advice.DRAW, Severity.INFO)
