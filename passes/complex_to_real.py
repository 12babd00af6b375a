"""complex-to-real: complex values become pairs of real ones."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import fx

from nxfx.analysis.float_ops import METADATA, op_name
from nxfx.analysis.provenance import Role
from nxfx.analysis.uniform import UniformValues
from nxfx.graph import meta
from nxfx.graph.builder import NodeBuilder
from nxfx.pipeline import Pass, PassContext, PassResult
from nxfx.real_pairs import READERS, REAL, RULES, SIZES, RealPairs, aten, is_complex
from nxfx.report.rewrites import Kind


class ComplexToReal(Pass):
    """Complex arithmetic becomes arithmetic on pairs of real and imaginary parts, as in a complex rotary embedding.

    All of what hangs together is rewritten or none of it: from ``view_as_complex``, ``polar``, ``complex``, ``exp(1j * x)`` or a complex
    buffer, by products, sums, quotients, squares and cubes, exponentials, conjugates and whatever moves, chooses, writes or pads elements,
    to ``view_as_real``, ``real``, ``imag``, ``abs`` or ``angle``. A complex buffer (``freqs_cis``) enters the graph as a real one with a
    last dimension of two, kept up to date with the model's. What is left complex (an FFT, a matrix product, an index by booleans, a
    complex input or output) is reported by check-constraints, NX502.
    Class: ``refines``: the same products and sums, rounded as real ones, in the dtypes of the complex ones. A product with a real number is
    two: where a complex kernel makes nan of the one part, as it multiplies an infinity in the other by the zero that it adds, none is made.

    Given::

        %view_as_complex : complex64[1, 8, 32] = aten.view_as_complex(%pairs)
        %polar : complex64[8, 32] = aten.polar(%ones_like, %angles)
        %mul : complex64[1, 8, 32] = aten.mul(%view_as_complex, %polar)
        %view_as_real : float32[1, 8, 32, 2] = aten.view_as_real(%mul)

    Result::

        %select : float32[1, 8, 32] = aten.select(%pairs, -1, 0)
        %select_1 : float32[1, 8, 32] = aten.select(%pairs, -1, 1)
        %cos : float32[8, 32] = aten.cos(%angles)
        %sin : float32[8, 32] = aten.sin(%angles)
        %mul : float32[1, 8, 32] = aten.mul(%select, %cos)
        %real : float32[1, 8, 32] = aten.addcmul(%mul, %select_1, %sin, value=-1)
        %mul_1 : float32[1, 8, 32] = aten.mul(%select, %sin)
        %imaginary : float32[1, 8, 32] = aten.addcmul(%mul_1, %select_1, %cos, value=1)
        %view_as_real : float32[1, 8, 32, 2] = aten.stack([%real, %imaginary], -1)
    """

    name = "complex-to-real"
    after: ClassVar[tuple[str, ...]] = ("mask-slice-writes", "lift-int-casts")

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> PassResult:
        result = PassResult()
        members = [n for n in graph_module.graph.nodes if n.op != "output" and is_complex(n)]
        build = _Undoable(graph_module.graph, self.name) if members else None
        for component in _components(members):
            if build is None or not all(_can_be_pair(node, context) for node in component):
                continue
            made = _Made(build, context)
            if made.pairs_of(component):
                first, readers = component[0], made.finish(component)
                before, after = f"complex numbers, from {op_name(first)}", f"real and imaginary parts, read {readers} times"
                result.rewrites.append(self.rewrite(_told(component), "complex.pairs", Kind.REFINES, before, after))
        result.changed = bool(result.rewrites)
        return result


def _told(component: list[fx.Node]) -> fx.Node:
    """The node whose line tells most: a product."""
    return next((n for n in component if n.target is aten.mul.Tensor), component[-1])


def _components(members: list[fx.Node]) -> list[list[fx.Node]]:
    """Complex nodes that hang together, each in graph order."""
    complexes, seen, found = set(members), set(), []
    for start in members:
        if start in seen:
            continue
        stack, component = [start], []
        seen.add(start)
        while stack:
            node = stack.pop()
            component.append(node)
            near = [n for n in (*node.all_input_nodes, *node.users) if n in complexes and n not in seen]
            seen.update(near)
            stack += near
        found.append(sorted(component))
    return found


def _can_be_pair(node: fx.Node, context: PassContext) -> bool:
    values = meta.val(node)
    if any(not isinstance(v, torch.Tensor) or v.dtype not in REAL for v in (values if isinstance(values, (list, tuple)) else (values,))):
        return False  # half precision
    if node.meta.get("unbacked_bindings"):
        return False  # the data decide the size: of two parts each would have a size of its own
    if node.op == "call_function":
        known = node.target in RULES
    else:
        source = context.sources.get(node.name)
        known = node.op == "get_attr" and source is not None and source.role in (Role.BUFFER, Role.CONSTANT) and not source.mutated
    return known and all(_reads_pair(user) for user in node.users)


def _reads_pair(user: fx.Node) -> bool:
    if user.op != "call_function" or is_complex(user):
        return user.op == "call_function"
    if user.target in METADATA:
        return user.target in SIZES or not user.users  # a part is laid out otherwise
    return user.target in READERS


class _Undoable(NodeBuilder):
    """A builder that can take back what it made since the last ``begin``."""

    def begin(self) -> None:
        self._made: list[fx.Node] = []

    def undo(self) -> None:
        for node in reversed(self._made):
            self.graph.erase_node(node)

    def _finish(self, node: fx.Node, value: Any) -> fx.Node:
        self._made.append(node)
        return super()._finish(node, value)


class _Made:
    """One component in real numbers."""

    def __init__(self, build: _Undoable, context: PassContext) -> None:
        self.build = build
        self.pairs = RealPairs(build, UniformValues(context.sources))
        self.origins: dict[fx.Node, fx.Node] = {}

    def origin(self, node: fx.Node) -> fx.Node:
        """The node whose line is that of ``node``: a view that capture took again, after a write, has none of its own."""
        if "stack_trace" not in node.meta and node.all_input_nodes:
            nearest = node.all_input_nodes[-1]
            return self.origins.get(nearest, nearest)
        return node

    def pairs_of(self, component: list[fx.Node]) -> bool:
        """Build the pairs; False, and nothing built, when one of the nodes cannot be one."""
        self.build.begin()
        for node in component:
            self.origins[node] = self.origin(node)
            with self.build.before(node.next, self.origins[node]):
                if node.op == "get_attr":
                    parts = self.build.call(aten.view_as_real.default, node)
                    pair = tuple(self.build.call(aten.select.int, parts, -1, i) for i in (0, 1))
                else:
                    pair = RULES[node.target](self.pairs, node)  # type: ignore[assignment]
                if pair is None:
                    break
                self.pairs.pairs[node] = pair  # type: ignore[assignment]
                if isinstance(like := meta.val(node), torch.Tensor):
                    if not self.pairs.knows_sizes(node):
                        break
                    whole = (self.pairs.whole(p, node, like.dtype) if isinstance(p, fx.Node) else p for p in pair)
                    self.pairs.pairs[node] = tuple(whole)  # type: ignore[assignment]
        else:
            return True
        self.build.undo()
        return False

    def finish(self, component: list[fx.Node]) -> int:
        """Let readers read the pairs and take the complex nodes out; how many readers there are."""
        count = 0
        for node in reversed(component):
            for user in list(node.users):
                if user.target in SIZES and user.users:
                    with self.build.before(user, self.origin(user)):
                        user.args = (*self.pairs.read(user, 0), *user.args[1:])
                    continue
                if user.target in READERS and not is_complex(user):
                    if node.op == "get_attr" and user.meta.get("nxfx", {}).get("made_by") == self.build.made_by:
                        continue
                    with self.build.before(user, self.origin(user)):
                        real = READERS[user.target](self.pairs, user)
                    user.replace_all_uses_with(real)
                    count += 1
                if not is_complex(user):
                    self.build.graph.erase_node(user)
            if not node.users:
                self.build.graph.erase_node(node)
        return count
