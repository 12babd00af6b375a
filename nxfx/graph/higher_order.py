"""How values cross the edge of a higher-order op: which operands, body placeholders, body outputs and results are one variable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from nxfx.graph import walk


@dataclass
class Slot:
    """One variable of a higher-order op. Torch wants one dtype for all that it is made of.

    Attributes:
        operands: what the outer graph passes for it: nodes, or Python numbers.
        placeholders: what the bodies call it (an ``xs`` of ``scan`` and ``map`` arrives there without its first dimension).
        outputs: ``(body, position)`` of the values that the bodies return for it.
        result: position among the op's results, None when it is not returned.
    """

    operands: list[Any] = field(default_factory=list)
    placeholders: list[fx.Node] = field(default_factory=list)
    outputs: list[tuple[fx.GraphModule, int]] = field(default_factory=list)
    result: int | None = None

    @property
    def carried(self) -> bool:
        """What a body returns for it comes back to the body's placeholder."""
        return bool(self.placeholders and self.outputs)

    def returned(self) -> list[Any]:
        """The values that the bodies return for it."""
        return [outputs_of(body)[position] for body, position in self.outputs]


@dataclass
class Call:
    """One higher-order op, taken apart.

    Attributes:
        bodies: its graphs, in the order of its arguments.
        condition: the body that says whether a ``while_loop`` goes on.
        length: how often a ``scan`` runs its body (an int or SymInt), None for any other op.
    """

    node: fx.Node
    bodies: list[fx.GraphModule]
    slots: list[Slot]
    condition: fx.GraphModule | None = None
    length: Any = None


def outputs_of(body: fx.GraphModule) -> Sequence[Any]:
    """What ``body`` returns, as a sequence."""
    (output,) = body.graph.find_nodes(op="output")
    results = output.args[0]
    return results if isinstance(results, (list, tuple)) else (results,)


# Higher-order op → number of arguments before its body; the operands follow the body one by one.
_WRAPPERS = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4, "tag_activation_checkpoint": 0}


def take_apart(node: fx.Node) -> Call | None:
    """``node`` as a :class:`Call`; None for a higher-order op whose calling convention is not known, or a body that others run too.

    Conventions as in ``torch/_higher_order_ops`` (torch 2.9 and 2.13).
    """
    if not walk.is_higher_order(node) or node.graph.owning_module is None:
        return None
    named = dict(walk.bodies(node.graph.owning_module, node))
    bodies = list(named.values())
    if not bodies or any(_is_shared(node, name) for name in named):
        return None
    name = node.target.name()  # type: ignore[union-attr]
    if name == "cond":
        call = _branches(node, bodies, node.args[3])
    elif name == "while_loop":
        call = _loop(node, bodies, node.args[2], node.args[3])
    elif name == "scan":
        call = _scan(node, bodies, node.args[1], node.args[2], node.args[3])
    elif name == "map_impl":
        call = _branches(node, bodies, (*node.args[1], *node.args[2]))  # type: ignore[misc]
    elif name in _WRAPPERS:
        call = _branches(node, bodies, node.args[_WRAPPERS[name] + 1 :])
    else:
        return None
    return call if _is_whole(call) else None


def _is_shared(node: fx.Node, body: str) -> bool:
    named = node.graph.find_nodes(op="get_attr", target=body, sort=False)
    return len({user for same in named for user in same.users}) > 1


def _placeholders(body: fx.GraphModule) -> list[fx.Node]:
    return list(body.graph.find_nodes(op="placeholder"))


def _branches(node: fx.Node, bodies: list[fx.GraphModule], operands: Any) -> Call:
    slots = [Slot([value], list(names)) for value, *names in zip(operands, *map(_placeholders, bodies), strict=False)]
    counts = {len(outputs_of(b)) for b in bodies}
    slots += [Slot(outputs=[(b, i) for b in bodies], result=i) for i in range(min(counts))]
    return Call(node, bodies, slots)


def _loop(node: fx.Node, bodies: list[fx.GraphModule], carried: Any, additional: Any) -> Call:
    condition, body = bodies
    slots = [Slot([value], list(names)) for value, *names in zip((*carried, *additional), *map(_placeholders, bodies), strict=False)]
    for position, slot in enumerate(slots[: len(carried)]):
        slot.outputs, slot.result = [(body, position)], position
    return Call(node, bodies, slots, condition)


def _scan(node: fx.Node, bodies: list[fx.GraphModule], init: Any, xs: Any, additional: Any) -> Call:
    (body,) = bodies
    slots = [Slot([value], [name]) for value, name in zip((*init, *xs, *additional), _placeholders(body), strict=False)]
    for position, slot in enumerate(slots[: len(init)]):
        slot.outputs, slot.result = [(body, position)], position
    slots += [Slot(outputs=[(body, i)], result=i) for i in range(len(init), len(outputs_of(body)))]
    first = next((x.meta.get("val") for x in xs if isinstance(x, fx.Node)), None)
    return Call(node, bodies, slots, length=first.shape[0] if isinstance(first, torch.Tensor) else None)


def _is_whole(call: Call) -> bool:
    """Whether every placeholder, output and result has its slot: a convention that torch changed is not guessed at."""
    named = [p for slot in call.slots for p in slot.placeholders]
    returned = [o for slot in call.slots for o in slot.outputs]
    returning = [b for b in call.bodies if b is not call.condition]
    values = call.node.meta.get("val")
    results = [slot.result for slot in call.slots if slot.result is not None]
    return (
        sorted(map(id, named)) == sorted(id(p) for b in call.bodies for p in _placeholders(b))
        and {(id(b), i) for b, i in returned} == {(id(b), i) for b in returning for i in range(len(outputs_of(b)))}
        and isinstance(values, (list, tuple))
        and sorted(results) == list(range(len(values)))
    )
