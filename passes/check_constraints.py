"""check-constraints: what the Neuron compiler would refuse, known before it is asked."""

from __future__ import annotations

from typing import ClassVar

from torch import fx

from nxfx.constraints import integers, operators, pooling, values, views
from nxfx.constraints.base import Checker
from nxfx.pipeline import Pass, PassContext, PassResult
from nxfx.real_pairs import crosses_as_pairs

_RULES = {**operators.RULES, **integers.RULES, **pooling.RULES, **views.RULES}


class CheckConstraints(Pass):
    """Predicts the errors of the Neuron compiler from the graph, and rewrites what has an exact and cheap other form.

    Which rules hold, and how grave they are, depends on the target and its SDK release (``nxfx doctor --target``). Each finding
    names the compiler's own error code, as AWS's list of Neuron Compiler Error Codes has it: NX501 operators, NX502 complex numbers,
    NX503 float formats, NX504 convolutions, NX505 pooling, NX506 top-k and sort, NX507 scatters that reduce, NX508 shifts, NX509
    positions, NX510 constants, NX511 sizes. Integer products and sums that the device computes in fp32 are NX305's.

    Given, on trn1::

        %ids : int32[6] = placeholder                       # declared: [0, 99]
        %x : float32[2, 4] = placeholder
        %topk = aten.topk.default(%ids, 3)
        %values : int32[3] = operator.getitem(%topk, 0)
        %split = aten.split.Tensor(%x, 2, -1)
        %half : float32[2, 2] = operator.getitem(%split, 1)
        %polar : complex64[2, 2] = aten.polar.default(%half, %half)
        return (%values, %polar)

    Result::

        %_to_copy : float32[6] = aten._to_copy.default(%ids, dtype=float32)
        %topk = aten.topk.default(%_to_copy, 3)
        %getitem : float32[3] = operator.getitem(%topk, 0)
        %values : int32[3] = aten._to_copy.default(%getitem, dtype=int32)
        %half : float32[2, 2] = aten.slice.Tensor(%x, 1, 2, 4)
        %polar : complex64[2, 2] = aten.polar.default(%half, %half)

        NX502 warning: `polar` is complex64: complex64 is supported in a list of operations only, ... (NCC_EVRF004)

    The rules with a rewrite: top-k, sort and argsort of integers, and scatters that reduce integers, run in fp32 where every value
    (and every partial result) is proved to be within 2^24; a shift of 8 or 16 bits runs in 32; dilated max-pooling becomes a maximum
    of strided slices; on the legacy route split, chunk and unbind become slices.
    """

    name = "check-constraints"
    after: ClassVar[tuple[str, ...]] = (
        "mask-slice-writes",
        "lift-int-casts",
        "complex-to-real",
        "narrow-64bit",
        "exact-integer-sums",
        "flag-value-dependence",
        "finite-masks",
    )

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> PassResult:
        check = Checker(self, graph_module, context)
        constants = not context.target.native_int64
        for node in graph_module.graph.nodes:
            if node.op == "call_function":
                rule = _RULES.get(node.target)
                if rule is not None:
                    rule(check, node)
                if constants:
                    values.check_constants(check, node)
            elif node.op == "placeholder":
                values.check_sizes(check, node)
            if constants and node.op in ("placeholder", "get_attr"):
                values.check_held_constant(check, node)
            for dtype in values.dtypes_of(node) if not crosses_as_pairs(node) else ():
                values.check_dtype(check, node, dtype)
        return check.finish()
