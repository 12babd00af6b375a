"""Tables that were rounded to low precision before capture, computed again in float32 by the module that made them.

Nothing is guessed: what a module gives is taken only where, rounded, it is bit for bit the table that the model holds.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from nxfx.analysis import dtype_rules, ranges
from nxfx.analysis.integer_origin import IntegerOrigins
from nxfx.analysis.provenance import Premise, Role, Source
from nxfx.analysis.rounded_tables import magnified_tables, rounded_to
from nxfx.graph import meta
from nxfx.graph.attributes import new_constant
from nxfx.graph.builder import NodeBuilder
from nxfx.lifting.words import short
from nxfx.report.rewrites import Kind, Rewrite

_FEW = 1 << 16  # elements of parameters, up to which a module is made again for its table


def restore_tables(graph_module: fx.GraphModule, sources: dict[str, Source], model: torch.nn.Module) -> tuple[list[Rewrite], list[Premise]]:
    """Give ``graph_module`` the float32 origin of each rounded table whose module knows it. ``sources`` learns of the new constants.

    A low-precision table whose rounding is magnified becomes a cast of its origin, which lift-int-casts leaves out there; one in
    float32 that holds rounded numbers is replaced. The model itself keeps what it has.

    Returns:
        A record for each table, and the premises that it does not change.
    """
    build = NodeBuilder(graph_module.graph, "lift-int-casts")
    rewrites, premises = [], []

    @functools.cache
    def magnified() -> set[fx.Node]:
        return magnified_tables(IntegerOrigins(graph_module, sources, lambda: ranges.analyse(graph_module, sources, {})))

    for node in graph_module.graph.find_nodes(op="get_attr"):
        source = sources.get(node.name)
        if source is None or not source.is_known or not source.is_table or source.role is Role.CONSTANT:
            continue
        users = [user for user in node.users if user.op != "output"]
        low = rounded_to(source.value, meta.dtype_of(node)) if users else None
        if low is None or (low is meta.dtype_of(node) and node not in magnified()):
            continue
        found = _origin(model, source, low)
        if found is None:
            continue
        origin, how = found
        name = new_constant(graph_module, origin)
        with build.after(node):
            constant = build.get_attr(name, meta.retype(meta.val(node), torch.float32))
            restored = build.cast(constant, meta.val(node).dtype)
        sources[constant.name] = Source(name, Role.CONSTANT, origin, recomputed=True)
        for user in users:
            user.replace_input_with(node, restored)
        premises.append(Premise(source.name, "value"))
        before, after = f"{source.name!r}, rounded to {short(low)}", f"computed again in float32 by {how}"
        rewrites.append(Rewrite.at(users[0], "lift-int-casts", "lift.table", Kind.REFINES, before, after))
    return rewrites, premises


def _origin(model: torch.nn.Module, source: Source, low: torch.dtype) -> tuple[torch.Tensor, str] | None:
    """A float32 table that, rounded, is the one held, and who computed it."""
    path, _, leaf = source.name.rpartition(".")
    try:
        owner = model.get_submodule(path)
    except AttributeError:
        return None
    held = source.value
    assert held is not None
    for found, how in _candidates(owner, leaf):
        if isinstance(found, torch.Tensor) and found.dtype in (torch.float32, torch.float64) and found.shape == held.shape:
            table = found.detach().to(torch.float32).to(held.device)
            if torch.equal(table.to(low).to(held.dtype), held) and not dtype_rules.is_low_precision(table.dtype):
                return table.clone(), how
    return None


def _candidates(owner: torch.nn.Module, leaf: str) -> Iterator[tuple[Any, str]]:
    """What may be the table as it was: the module's own copy, its own function, and a module made like it."""
    kind = type(owner).__name__
    yield getattr(owner, f"original_{leaf}", None), f"{kind}.original_{leaf}"
    function = getattr(owner, "rope_init_fn", None)
    if callable(function):
        yield _tried(lambda: function(getattr(owner, "config", None), torch.device("cpu"))[0]), f"{kind}.rope_init_fn"
    weights = list(owner.parameters())
    if not any(weight.requires_grad for weight in weights) and sum(weight.numel() for weight in weights) <= _FEW:
        yield _tried(lambda: getattr(_made_like(owner), leaf)), f"a new {kind}"


def _made_like(module: torch.nn.Module) -> torch.nn.Module:
    """A module of the same class, with the arguments that ``module`` keeps under their own names."""
    arguments = {}
    for name, parameter in inspect.signature(type(module)).parameters.items():
        if name in ("device", "dtype") or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        kept = next((held for key in (name, f"_{name}") if (held := vars(module).get(key)) is not None), None)
        if kept is not None:
            arguments[name] = kept
        elif parameter.default is parameter.empty:
            raise AttributeError(name)
    return type(module)(**arguments)


def _tried(make: Any) -> Any:
    """What ``make`` gives in float32, with the random state put back; None where it fails."""
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float32)
        with torch.random.fork_rng(devices=[]), torch.no_grad(), torch.device("cpu"):
            return make()
    except Exception:  # any constructor may want what is not there: then the table stays, and NX102 says so
        return None
    finally:
        torch.set_default_dtype(default)
