"""flag-value-dependence: every place in the graph where a tensor's value reaches Python or a shape."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from nxfx.analysis import value_ops
from nxfx.analysis.value_ops import name_of
from nxfx.graph import meta, walk
from nxfx.pipeline import Pass, PassContext, PassResult
from nxfx.report import advice
from nxfx.report.advice import Advice
from nxfx.report.findings import Finding, Severity


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

# A symbolic bound makes these return a fresh symbol: the bound's producer is reported, not the consumer.
_BOUNDED = frozenset(
    {"slice", "slice_copy", "slice_scatter", "narrow", "narrow_copy", "select", "select_copy", "select_scatter"}
)


def _sites(graph: fx.Graph) -> Iterator[_Site]:
    for node in graph.nodes:
        if node.op == "call_function":
            kind = value_ops.kind_of(node.target)
            if kind and _is_site(node, kind):
                yield _Site(node, kind.partition("?")[0])
            elif not kind and "unbacked_bindings" in node.meta and name_of(node.target) not in _BOUNDED:
                yield _Site(node, "size")


def _is_site(node: fx.Node, kind: str) -> bool:
    if kind == "body?":
        module = node.graph.owning_module
        return module is not None and any(walk.bodies(module, node))
    return value_ops.depends(kind, node.target, node.args, node.kwargs, meta.dtype_of)


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
    name = name_of(user.target)
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
_DROPOUTS = ("dropout", "scaled_dot_product", "attention", "lstm", "gru", "rnn", "rrelu")


def _finding(site: _Site, uses: frozenset[str]) -> Finding:
    node, name = site.node, name_of(site.node.target)
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
            node, f"{name} runs on the host", Advice("NX411", advice.HOST, advice.HOST_FIXES[name]), Severity.WARNING
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
    if name == "repeat_interleave" and value_ops.argument(node.target, node.args, node.kwargs, "output_size") is not None:
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
