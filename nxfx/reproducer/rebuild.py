"""What a reproducer script builds its graph with.

Private torch API used here: ``torch.fx.experimental.symbolic_shapes`` (``ShapeEnv`` and its symbol constructors) and
``torch._dynamo.source``, tested on torch 2.9 and 2.13.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import sympy
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils._sympy import functions as sympy_functions

from nxfx.analysis.provenance import Role, Source
from nxfx.errors import PassError
from nxfx.graph import walk
from nxfx.graph.meta import FakeTensorMode, val
from nxfx.pipeline import Pass, PassContext, Pipeline
from nxfx.report.locations import Location
from nxfx.targets import get_target

_RANDOM_ELEMENTS = 1 << 20  # a tensor of more elements than this is rebuilt without data


class Rebuild:
    """Builds the graph of a reproducer node by node, each with the name and the value it had.

    Not through :class:`nxfx.graph.builder.NodeBuilder`, which evaluates: a reproducer must hold a wrong ``val`` too.
    """

    def __init__(self, script: str) -> None:
        self.shapes = ShapeEnv()
        self.mode = FakeTensorMode(shape_env=self.shapes, allow_non_fake_inputs=True)
        self.graph = fx.Graph()
        self.root = torch.nn.Module()
        self._symbols: dict[str, Any] = {}
        self._hints: dict[Any, int] = {}
        self._where = Location()
        self._context = PassContext()
        stored = Path(script).with_name("tensors.pt")
        self._stored: dict[str, torch.Tensor] = torch.load(stored, weights_only=True) if stored.exists() else {}

    # -- values ---------------------------------------------------------------------------------------------

    def symbol(self, name: str, hint: int | None, low: int | None, high: int | None) -> None:
        """Declare a symbolic size; without a hint it is unbacked."""
        env = self.shapes
        if hint is None:
            symbol = env.create_unbacked_symint().node.expr
        else:
            from torch._dynamo.source import ConstantSource  # seconds to import, and only scripts need it

            symbol = env.create_symbol(
                hint,
                ConstantSource(f"reproducer_{name}"),
                dynamic_dim=DimDynamic.DYNAMIC,
                do_not_specialize_zero_one=True,
            )
            self._hints[symbol] = hint
        if low is not None and high is not None:
            env.constrain_symbol_range(symbol, low, high)
        self._symbols[name] = symbol

    def symbolic(self, kind: str, expression: str) -> Any:
        """A SymInt, SymFloat or SymBool of declared symbols."""
        env = self.shapes
        names = {**vars(sympy), **vars(sympy_functions), **self._symbols}
        value = sympy.sympify(eval(expression, {"__builtins__": {}}, names))  # our own printed expression
        if kind == "SymBool":
            return env.create_symboolnode(value)
        hint = value.subs(self._hints)
        create: Callable[..., Any] = env.create_symintnode if kind == "SymInt" else env.create_symfloatnode
        number = int if kind == "SymInt" else float
        return create(value, hint=number(hint) if hint.is_number else None)

    def tensor(
        self, dtype: torch.dtype, shape: tuple[Any, ...], *, device: str = "cpu", stride: tuple[Any, ...] | None = None
    ) -> Any:
        """A fake tensor."""
        with self.mode:
            if stride is None:
                return torch.empty(shape, dtype=dtype, device=device)
            return torch.empty_strided(shape, stride, dtype=dtype, device=device)

    # -- nodes ----------------------------------------------------------------------------------------------

    def at(self, file: str, line: int, function: str, source: str, module: str) -> None:
        """The user's line of the nodes that follow."""
        self._where = Location(file, line, source, module, function)

    def _node(self, op: str, name: str, target: Any, args: Any, kwargs: Any, value: Any, made_by: str = "") -> fx.Node:
        node = self.graph.create_node(op, target, args, kwargs, name=name)
        node.meta["val"] = value
        where = self._where
        if where.file and op != "placeholder":
            node.meta["stack_trace"] = (
                f'  File "{where.file}", line {where.line}, in {where.function}\n    {where.source}\n'
            )
            if where.module:
                node.meta["nn_module_stack"] = {where.module: (where.module, torch.nn.Module)}
        if made_by:
            node.meta["nxfx"] = {"made_by": made_by, "origin": name}
        return node

    def input(self, name: str, target: str, value: Any) -> fx.Node:
        """A placeholder."""
        return self._node("placeholder", name, target, (), {}, value)

    def attribute(self, name: str, target: str, value: Any, *, parameter: bool) -> fx.Node:
        """A weight, buffer or constant: its stored value, else random data, else none."""
        if isinstance(value, torch.Tensor):
            tensor = self._data(target, value)
            *path, leaf = target.split(".")
            module = self.root
            for step in path:
                if step not in module._modules:
                    module.add_module(step, torch.nn.Module())
                child = module._modules[step]
                assert child is not None
                module = child
            if parameter:
                module.register_parameter(leaf, torch.nn.Parameter(tensor, requires_grad=False))
            else:
                module.register_buffer(leaf, tensor)
        return self._node("get_attr", name, target, (), {}, value)

    def _data(self, name: str, like: torch.Tensor) -> torch.Tensor:
        if name in self._stored:
            return self._stored[name]
        shape = [s if isinstance(s, int) else 2 for s in like.shape]
        if torch.Size(shape).numel() > _RANDOM_ELEMENTS:
            return torch.empty(shape, dtype=like.dtype, device="meta")
        wide = (
            torch.randn(shape) if like.dtype.is_floating_point or like.dtype.is_complex else torch.randint(0, 2, shape)
        )
        return wide.to(like.dtype)

    def body(self, name: str, target: str, build: Callable[[Rebuild], Any]) -> fx.Node:
        """The body of a higher-order op, built by ``build``."""
        graph, root, where = self.graph, self.root, self._where
        self.graph, self.root = fx.Graph(), torch.nn.Module()
        build(self)
        made = fx.GraphModule(self.root, self.graph)
        self.graph, self.root, self._where = graph, root, where
        self.root.add_module(target, made)
        return self._node("get_attr", name, target, (), {}, None)

    def call(
        self,
        name: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        value: Any,
        *,
        op: str = "call_function",
        made_by: str = "",
    ) -> fx.Node:
        """A call."""
        return self._node(op, name, target, args, kwargs, value, made_by)

    def output(self, results: Any) -> None:
        """What the graph returns."""
        self.graph.output(results)

    # -- running --------------------------------------------------------------------------------------------

    def context(self, *, target: str, sdk: str, training: bool) -> None:
        """The target and mode the pass ran for."""
        self._context.target, self._context.training = get_target(target, sdk), training

    def source(
        self, node: str, name: str, role: str, *, known: bool, mutated: bool, range: tuple[int, int] | None, recomputed: bool = False
    ) -> None:
        """What a placeholder or ``get_attr`` node stands for."""
        value = None
        if known:
            (found,) = (n for n in self.graph.nodes if n.name == node)
            value = self._stored[name] if name in self._stored else self._data(name, val(found))
        self._context.sources[node] = Source(name, Role(role), value, mutated, range, recomputed=recomputed)

    @staticmethod
    def imported(module: str, file: str, name: str, options: dict[str, Any]) -> Pass:
        """A pass that is not registered, imported from its module, or from its file when the module cannot be found."""
        import importlib
        import importlib.util

        try:
            found: Any = importlib.import_module(module)
            found = found if hasattr(found, name.partition(".")[0]) else None
        except ImportError:
            found = None
        if found is None:
            spec = importlib.util.spec_from_file_location("nxfx_reproducer_pass", file)
            assert spec is not None and spec.loader is not None
            found = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(found)
        for part in name.split("."):
            found = getattr(found, part)
        step: Pass = found(found.Options(**options))
        return step

    def stored(self, position: int) -> torch.Tensor:
        """An input that was stored with the script."""
        return self._stored[f"input {position}"]

    def compare(self, *steps: Pass | str, inputs: list[Any], exact: bool) -> None:
        """Run the graph on ``inputs`` before and after the passes.

        Raises:
            PassError: the outputs differ by more than the passes promise.
        """
        from nxfx.verification.bisect import differences, run_graph
        from nxfx.verification.precision import Precision

        gm = fx.GraphModule(self.root, self.graph)
        before = run_graph(gm, inputs)
        truth = [] if exact else Precision(torch.float64).run(gm, inputs)
        pipeline = self._pipeline(steps)
        pipeline.run(gm, self._context)
        wrong = differences(before, run_graph(gm, inputs), lambda: truth, exact=exact)
        if wrong:
            name = pipeline.names[-1]
            raise PassError(f"pass {name!r} changes what the graph computes:\n" + "\n".join(wrong), pass_name=name)
        print("the graph computes the same before and after")

    @staticmethod
    def _pipeline(steps: tuple[Pass | str, ...]) -> Pipeline:
        some = Pipeline()  # a pass alone, without what it requires before it: the graph is past that
        some.steps = tuple(p for s in steps for p in (Pipeline.parse(s).steps if isinstance(s, str) else (s,)))
        return some

    def run(self, *steps: Pass | str, verify_each: bool) -> None:
        """Run the passes.

        Raises:
            PassError: as the original run did.
        """
        gm = fx.GraphModule(self.root, self.graph)
        self._pipeline(steps).run(gm, self._context, verify_each=verify_each)
        nodes = sum(len(s.graph_module.graph.nodes) for s in walk.scopes(gm))
        print(f"the passes ran on {nodes} nodes and did not fail")
