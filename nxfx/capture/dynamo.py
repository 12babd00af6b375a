"""``torch.compile(model, backend="nxfx")``: Dynamo captures, nxfx cleans, an inner compiler compiles.

AOTAutograd makes the graph functional. An inference graph is cleaned as it comes. In training the *joint* graph of
forward and backward is cleaned before it is split, so that both halves agree on the dtypes of what is saved.

Parameters, buffers and everything else reach a Dynamo graph as inputs, and Dynamo guards their shapes, not their
values. So no proof rests on a present value here: an integer buffer is checked on each call like any other input,
and nothing is known of a float.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

import torch
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch._functorch._aot_autograd.descriptors import BufferAOTInput, ParamAOTInput, PlainAOTInput
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._guards import TracingContext, detect_fake_mode, tracing
from torch.utils._python_dispatch import _disable_current_modes

from nxfx import reproducer
from nxfx.analysis.dtype_rules import integer_bounds, is_integral, is_wide
from nxfx.analysis.provenance import Role, Source
from nxfx.analysis.wide_edges import wide_edges
from nxfx.boundary import Boundary, Check, InputRule, hoist
from nxfx.capture.dynamo_frame import graph_breaks, user_names
from nxfx.environment import native_backend, native_registered
from nxfx.errors import CompilerError, NxfxError, PassError, PrepareError, RangeError, UsageError
from nxfx.graph import meta, walk
from nxfx.graph.builder import NodeBuilder, refresh
from nxfx.pipeline import PassContext, Pipeline
from nxfx.report import Finding, Report, Severity
from nxfx.report.failures import explain
from nxfx.targets import Target, get_target
from nxfx.targets.flags import compiler_args, together

aten = torch.ops.aten

Compiled = Callable[..., Any]
Inner = Callable[..., Compiled]  # (graph_module, example_inputs), and options where there are any

_AS_STRIDED = (aten.as_strided.default, aten.as_strided_copy.default, aten.as_strided_scatter.default)
_KEPT_REPORTS = 256
_reports: deque[Report] = deque(maxlen=_KEPT_REPORTS)


def reports() -> list[Report]:
    """The reports of what ``torch.compile(..., backend="nxfx")`` compiled in this process, oldest first (the last 256).

    One per Dynamo graph: a model with a graph break, or one that was compiled again for another shape, has several.
    """
    return list(_reports)


def nxfx_backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Compiled:
    """The Dynamo backend ``"nxfx"``.

    Args:
        gm, example_inputs: what Dynamo hands to a backend.
        options: as given to ``torch.compile(model, backend="nxfx", options={...})``; see :class:`BackendOptions`.
        mode: only ``"default"``.

    What nxfx refuses (:class:`~nxfx.errors.NxfxError`) is raised by the first call of the compiled function: an
    exception raised here would reach the user wrapped in Dynamo's ``BackendCompilerFailed``.
    """
    try:
        job = _Job(BackendOptions.read(options, mode), gm, example_inputs)
        return job.compile()
    except NxfxError as error:
        return _refusing(error)


def _refusing(error: NxfxError) -> Compiled:
    trace = error.__traceback__

    def refuse(*args: Any) -> Any:
        raise error.with_traceback(trace)

    return refuse


@dataclasses.dataclass(frozen=True)
class BackendOptions:
    """The keys of ``torch.compile(..., backend="nxfx", options={...})``.

    Attributes:
        inner: the compiler of the cleaned graph: the name of a Dynamo backend or
            ``compiler(graph_module, example_inputs)``. Default: ``"neuron"`` where it is registered; else, and with
            ``"eager"``, the cleaned graph runs as it is.
        inner_options: handed to the inner compiler as its ``options``.
        target: ``"inf2"``, ``"trn1"``, ``"trn2"`` or ``"trn3"``.
        sdk: the Neuron SDK release that compiles; default: the latest known.
        pipeline: a :class:`~nxfx.pipeline.Pipeline` or its text.
        ranges: input name → inclusive ``(low, high)`` that an integer input can hold; enforced on each call.
        check: when the boundary checks integer ranges: ``"always"`` (host tensors), ``"first"`` or ``"never"``.
        strict: error findings become :class:`~nxfx.errors.PrepareError`.
        verify_each: check the graph's invariants after every pass (slow).
    """

    inner: str | Inner | None = None
    inner_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    target: str | Target = "trn2"
    sdk: str | None = None
    pipeline: str | Pipeline | None = None
    ranges: Mapping[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    check: Check = "always"
    strict: bool = False
    verify_each: bool = False

    @classmethod
    def read(cls, options: Mapping[str, Any] | None, mode: str | None) -> BackendOptions:
        """From what ``torch.compile`` was given.

        Raises:
            UsageError: an unknown option, or a value that an option does not take.
        """
        if mode not in (None, "default"):
            raise UsageError(
                f"backend 'nxfx' has no mode {mode!r}: set it on the inner compiler, options={{'inner': ...}}"
            )
        known = [f.name for f in dataclasses.fields(cls)]
        for name in options or {}:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, n=1)
                raise UsageError(
                    f"backend 'nxfx' has no option {name!r}."
                    + (f" Did you mean {near[0]!r}?" if near else f" It has: {', '.join(known)}.")
                )
        found = cls(**dict(options or {}))
        if found.check not in get_args(Check):
            raise UsageError(f"option 'check' is one of {', '.join(get_args(Check))}, not {found.check!r}")
        for name, bounds in found.ranges.items():
            if not (isinstance(bounds, (tuple, list)) and len(bounds) == 2 and bounds[0] <= bounds[1]):
                raise UsageError(f"option 'ranges': {name!r} wants (low, high), not {bounds!r}")
        return found


def inner_compiler(inner: str | Inner | None, target: Target, options: Mapping[str, Any] | None = None) -> tuple[str, Inner | None]:
    """``inner``'s name and the compiler itself, with ``options`` for it; ``("", None)`` when the graph is to run as it is.

    Raises:
        UsageError: no such backend, or options for none.
        NeuronNotFound: ``"neuron"`` is not registered; tells what to install for ``target``.
    """
    name, compiler = _inner_compiler(inner, target)
    if not options:
        return name, compiler
    if compiler is None:
        raise UsageError("inner_options are for an inner compiler, and the cleaned graph runs as it is: name one with inner=")
    return name, functools.partial(compiler, options=dict(options))


def _inner_compiler(inner: str | Inner | None, target: Target) -> tuple[str, Inner | None]:
    if callable(inner) and inner is not nxfx_backend:
        return getattr(inner, "__name__", type(inner).__name__), inner
    if inner is None:
        inner = "neuron" if native_registered() else ""
    elif inner == "neuron":
        native_backend(target.name)
    registered = torch._dynamo.list_backends(None)
    if inner in ("", "eager"):
        return "", None
    if inner in ("nxfx", nxfx_backend):
        raise UsageError("the inner compiler of 'nxfx' cannot be 'nxfx' itself")
    if inner not in registered:
        near = difflib.get_close_matches(str(inner), registered, n=1)
        listed = torch._dynamo.list_backends()
        raise UsageError(
            f"no inner compiler {inner!r} is registered with torch.compile."
            + (f" Did you mean {near[0]!r}?" if near else f" There are: {', '.join(b for b in listed if b != 'nxfx')}.")
        )
    assert isinstance(inner, str)
    return inner, torch._dynamo.lookup_backend(inner)


class _Job:
    """One Dynamo graph on its way to the inner compiler."""

    def __init__(self, options: BackendOptions, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
        self.gm, self.example_inputs, self.options = gm, example_inputs, options
        self.target = get_target(options.target, options.sdk)
        self.inner_name, self.inner = inner_compiler(options.inner, self.target, options.inner_options)
        self.pipeline = _pipeline(options.pipeline, self.target)
        # Containers (compiled autograd) are flattened on the way: positions then say nothing, every input is opaque.
        flat = all(isinstance(x, (torch.Tensor, int, float, torch.SymInt, torch.SymFloat)) for x in example_inputs)
        self.names = user_names(gm) if flat else []
        self.report = Report(self.target.name, str(self.pipeline), sdk=self.target.sdk, captured_by="dynamo")
        self.context = PassContext(self.target)
        self.limits: dict[str, InputRule] = {}

    def compile(self) -> Compiled:
        self.report.add([], graph_breaks(self.gm, _told()) + self._unknown_ranges())
        _reports.append(self.report)
        try:
            return self._autograd(self.clean)
        except PassError as error:
            self._reproduce(error)
            raise

    def _autograd(self, clean: Callable[[fx.GraphModule, bool], None]) -> Compiled:
        """The compiled function; ``clean(graph_module, training)`` sees each functional graph once."""

        def inference(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Compiled:
            clean(gm, False)
            return self._hand_over(gm, "inference", self.context.sources)

        def partition(joint: fx.GraphModule, joint_inputs: Any, **kwargs: Any) -> Any:
            clean(joint, True)
            return min_cut_rematerialization_partition(joint, joint_inputs, **kwargs)

        def forward(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Compiled:
            return self._hand_over(gm, "forward", self.context.sources)

        def backward(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Compiled:
            return self._hand_over(gm, "backward", {})

        # No decompositions of our own: what is left is what the passes know, and the inner compiler has its own table.
        backend = aot_autograd(
            fw_compiler=forward,
            bw_compiler=backward,
            inference_compiler=inference,
            partition_fn=partition,
            decompositions={},
        )
        compiled: Compiled = backend(self.gm, self.example_inputs)
        return compiled

    # -- cleaning ----------------------------------------------------------------------------------------------------

    def clean(self, gm: fx.GraphModule, training: bool) -> None:
        """Run the pipeline on a functional graph in place and write the report.

        Raises:
            PassError: a pass failed.
            PrepareError: strict mode found errors.
        """
        context, report = self._context(gm, training), self.report
        report.nodes["before"], before = len(gm.graph.nodes), wide_edges(gm)
        started = time.perf_counter()
        pipeline, kept = _safe_pipeline(self.pipeline, gm)
        with _disable_current_modes():  # torch 2.9 calls the partition function with its fake mode on
            result = pipeline.run(gm, context, verify_each=self.options.verify_each)
            _settle_strides(gm)
        report.timings |= {"pipeline": time.perf_counter() - started} | {run.name: run.seconds for run in result.runs}
        report.add(result.rewrites, result.findings + kept)
        report.requirements = dict(context.requirements)
        after = wide_edges(gm)
        report.wide_edges = {"before": before["edges"], "after": after["edges"], "forced": after["forced"]}
        report.nodes["after"] = len(gm.graph.nodes)
        if any(rewrite.pass_name == "narrow-64bit" for rewrite in result.rewrites):
            self._limit_integers(gm)
        if self.options.strict and report.errors:
            raise PrepareError(f"{len(report.errors)} error findings\n{report}", report)

    def _context(self, gm: fx.GraphModule, training: bool) -> PassContext:
        sources = {n.name: self._source(n) for n in gm.graph.find_nodes(op="placeholder")}
        for node in gm.graph.find_nodes(op="get_attr"):
            value = getattr(gm, str(node.target), None)
            if isinstance(value, torch.Tensor):
                sources[node.name] = Source(str(node.target), Role.CONSTANT, value)
        self.context = PassContext(self.target, sources, training)
        return self.context

    def _source(self, node: fx.Node) -> Source:
        described = node.meta.get("desc")
        name, role = node.name, Role.OPAQUE
        if isinstance(described, PlainAOTInput) and described.idx < len(self.names):
            name, role = self.names[described.idx]
        elif isinstance(described, (ParamAOTInput, BufferAOTInput)):
            name, role = described.target, Role.PARAMETER if isinstance(described, ParamAOTInput) else Role.BUFFER
        if role is not Role.OPAQUE and is_integral(meta.dtype_of(node)):
            role = Role.INPUT  # nobody guards a buffer's values: the boundary checks them on each call
        bounds = self.options.ranges.get(name) if role is Role.INPUT else None
        return Source(name, role, range=None if bounds is None else (int(bounds[0]), int(bounds[1])))

    def _unknown_ranges(self) -> list[Finding]:
        inputs = [name for name, role in self.names if role is Role.INPUT]
        known = f"it has: {', '.join(inputs) or 'none'}"
        return [
            Finding("NX303", Severity.WARNING, f"ranges= names {name!r}, which is no input of this graph ({known})")
            for name in self.options.ranges
            if name not in dict(self.names)
        ]

    def _limit_integers(self, gm: fx.GraphModule) -> None:
        """Python integers that arrive as symbols: the range analysis takes a size without an upper bound to fit int32.

        To it every symbol that is never negative is a size, so an integer ``n`` behind ``if n > 0`` has to fit too.
        """
        low, high = integer_bounds(torch.int32)
        for node in gm.graph.find_nodes(op="placeholder"):
            value = meta.val(node)
            if isinstance(value, torch.SymInt) and value.node.shape_env.bound_sympy(value.node.expr).lower >= 0:
                self.limits[node.name] = InputRule(self._source(node).name, None, low, high, "int32")

    def _reproduce(self, error: PassError) -> None:
        """Leave a stand-alone script that fails the same way; the graph before the failing pass is captured anew."""
        at = self.pipeline.names.index(error.pass_name)
        failing = Pipeline(self.pipeline.steps[at : at + 1])

        def stop(gm: fx.GraphModule, training: bool) -> None:
            with _disable_current_modes():
                Pipeline(self.pipeline.steps[:at]).run(gm, self._context(gm, training))
            error.reproducer = reproducer.write_reproducer(gm, str(failing), error)
            raise error

        try:
            self._autograd(stop)
        except Exception as again:
            if again is not error:
                return  # the first error is the one to tell
        error.args = (f"{error.args[0]}\nreproducer: {error.reproducer}",)

    # -- handing over ------------------------------------------------------------------------------------------------

    def _hand_over(self, gm: fx.GraphModule, stage: str, sources: Mapping[str, Source]) -> Compiled:
        """Hoist the boundary of one cleaned graph and compile what is inside."""
        placeholders = gm.graph.find_nodes(op="placeholder")
        with _disable_current_modes():
            boundary = _hoist(gm, sources, self.context.requirements)
            _narrow_constants(gm, boundary)
        if stage == "backward":  # what it reads was saved by the forward graph, which has checked its inputs
            for rule in boundary.inputs:
                rule.low = rule.high = None
        constants = _take_constant_outputs(gm)
        self.report.compiler_args = together(self.report.compiler_args, compiler_args(gm, self.target, self.context.float32_products))
        gm.recompile()
        limited = self.limits if stage != "backward" else {}
        limits = [(i, limited[n.name]) for i, n in enumerate(placeholders) if n.name in limited]
        compiled = self._compile_inner(gm, [meta.val(n) for n in placeholders], stage)
        return _with_boundary(compiled, boundary, constants, limits, self.options.check)

    def _compile_inner(self, gm: fx.GraphModule, example_inputs: list[Any], stage: str) -> Compiled:
        if self.inner is None:
            return _as_it_is(gm)
        if self.inner_name == "neuron":
            self._refuse_dynamic(gm)
        gm.meta.pop("dynamo_flat_name_to_original_fqn", None)  # it speaks of the outer graph's placeholders
        mode = detect_fake_mode(example_inputs)
        try:
            # A context of its own: a nested AOTAutograd would write over what the outer one has noted in it.
            with torch.no_grad(), tracing(TracingContext(mode) if mode is not None else None):
                return self.inner(gm, example_inputs)
        except NxfxError:
            raise
        except Exception as error:
            told = f"the inner compiler {self.inner_name!r} failed on the {stage} graph: {type(error).__name__}: {error}"
            told += explain(error, gm, self.report.findings)
            if stage != "inference":
                told += f"\n{self.inner_name!r} may serve inference only: call the model under torch.no_grad()"
            raise CompilerError(told) from error

    def _refuse_dynamic(self, gm: fx.GraphModule) -> None:
        """TorchNeuron refuses dynamic shapes; after a second shape Dynamo makes them by itself.

        Raises:
            UsageError: names the input.
        """
        for node in gm.graph.find_nodes(op="placeholder"):
            value = meta.val(node)
            sizes = [n for n in value.shape if not isinstance(n, int)] if isinstance(value, torch.Tensor) else [value]
            if sizes and not isinstance(sizes[0], (int, float)):
                raise UsageError(
                    f"input {self._source(node).name!r} has a dynamic size, and 'neuron' compiles fixed shapes: "
                    "torch.compile(..., dynamic=False), which compiles once more for each shape"
                )


def _told() -> set[tuple[str, int]]:
    return {(f.location.file, f.location.line) for report in _reports for f in report.findings if f.code == "NX408"}


def _pipeline(pipeline: Pipeline | str | None, target: Target) -> Pipeline:
    if pipeline is None:
        return Pipeline.default(target)
    return Pipeline.parse(pipeline) if isinstance(pipeline, str) else pipeline


def _safe_pipeline(pipeline: Pipeline, gm: fx.GraphModule) -> tuple[Pipeline, list[Finding]]:
    """``pipeline``, without narrowing where the graph reads the memory of wide tensors with gaps: a cast packs them."""
    found = (node for op in _AS_STRIDED for node in gm.graph.find_nodes(op="call_function", target=op))
    strided = [node for node in found if is_wide(meta.dtype_of(node))]
    if not strided or "narrow-64bit" not in pipeline.names:
        return pipeline, []
    wide = (meta.val(n) for n in gm.graph.nodes if is_wide(meta.dtype_of(n)))
    if all(value.is_contiguous() for value in wide):
        return pipeline, []
    message = "as_strided reads the memory of 64-bit tensors, and one is not contiguous: the graph stays in 64 bits"
    kept = Finding.at(strided[0], "NX301", Severity.WARNING, message, "index or slice it instead")
    return pipeline.without("narrow-64bit"), [kept]


def _settle_strides(gm: fx.GraphModule) -> None:
    """Make strides true again behind casts that passes put after tensors which are not dense: a cast's result is.

    A ``view`` that the new strides do not allow gets a contiguous copy, as ``reshape`` would have traced it.
    """
    build = NodeBuilder(gm.graph, "dynamo")
    moved = {n for n in gm.graph.find_nodes(op="call_function", target=aten._to_copy.default) if "nxfx" in n.meta and _packs(n)}
    for node in list(gm.graph.nodes) if moved else ():
        if moved.isdisjoint(node.all_input_nodes):
            continue
        if node.op != "call_function" or not meta.is_tensor(node) or node.meta.get("unbacked_bindings"):
            continue
        before = meta.val(node).stride()
        try:
            refresh(node, build.mode)
        except (ValueError, RuntimeError):
            if node.target is not aten.view.default:
                raise
            (source,) = node.all_input_nodes[:1]
            with build.before(node):
                packed = build.call(aten.clone.default, source, memory_format=torch.contiguous_format)
            node.replace_input_with(source, packed)
            refresh(node, build.mode)
        if meta.val(node).stride() != before:
            moved.add(node)


def _packs(cast: fx.Node) -> bool:
    source = cast.args[0]
    return isinstance(source, fx.Node) and meta.is_tensor(source) and meta.val(source).stride() != meta.val(cast).stride()


def _hoist(gm: fx.GraphModule, sources: Mapping[str, Source], requirements: Mapping[str, tuple[int, int]]) -> Boundary:
    """:func:`~nxfx.boundary.hoist`, with the strides that narrowed inputs will have: ``.to`` packs a view with gaps."""
    given = {node: meta.val(node) for node in gm.graph.find_nodes(op="placeholder")}
    boundary = hoist(gm, sources, requirements)
    mode = meta.fake_mode_of(gm.graph)
    for (node, value), rule in zip(given.items(), boundary.inputs, strict=True):
        if rule.narrow is not None:
            node.meta["val"] = meta.evaluate(mode, aten._to_copy.default, (value,), {"dtype": rule.narrow})
    return boundary


def _narrow_constants(gm: fx.GraphModule, boundary: Boundary) -> None:
    """The 32-bit twins of the constants that the boundary has narrowed, beside the 64-bit ones."""
    for node in gm.graph.find_nodes(op="get_attr"):
        name = str(node.target)
        if name not in boundary.narrowed_buffers or meta.dtype_of(node) == boundary.narrowed_buffers[name]:
            continue
        wide, dtype = getattr(gm, name), meta.dtype_of(node)
        assert dtype is not None
        if is_integral(dtype):
            InputRule(name, dtype, *integer_bounds(dtype), "int32").enforce(wide, "always")
        twin = f"{name}_{str(dtype).removeprefix('torch.')}"
        gm.register_buffer(twin, wide.to(dtype), persistent=False)
        node.target = twin


def _take_constant_outputs(gm: fx.GraphModule) -> list[Any]:
    """Leave only nodes among the outputs; returns what stood there, with ``...`` in the places of nodes.

    A backward graph gives None for inputs without a gradient: a Dynamo backend is never handed such a graph.
    """
    (output,) = gm.graph.find_nodes(op="output")
    outputs = list(output.args[0])
    output.args = (tuple(value for value in outputs if isinstance(value, fx.Node)),)
    for key in ("desc", "output_stack_traces"):
        output.meta.pop(key, None)
    return [... if isinstance(value, fx.Node) else value for value in outputs]


def _as_it_is(gm: fx.GraphModule) -> Compiled:
    """The graph itself, run by torch."""
    walk.reshape_views(gm)
    gm.recompile()
    return gm


def _with_boundary(
    compiled: Compiled, boundary: Boundary, constants: list[Any], limits: list[tuple[int, InputRule]], check: Check
) -> Compiled:
    """``compiled`` in its boundary and boxed, without which a nested AOTAutograd backend fails on torch 2.13."""
    positions = [i for i, value in enumerate(constants) if value is ...]
    dtypes = [boundary.outputs[i] for i in positions]

    def run(args: list[Any]) -> list[Any]:
        for position, rule in limits:
            _enforce_integer(rule, args[position])
        admitted = boundary.admit(args, check)
        args.clear()
        results = list(constants)
        for position, dtype, value in zip(positions, dtypes, compiled(*admitted), strict=True):
            results[position] = value if dtype is None else value.to(dtype)
        return results

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def _enforce_integer(rule: InputRule, value: int) -> None:
    if not isinstance(value, int) or rule.low is None or rule.high is None or rule.low <= value <= rule.high:
        return
    raise RangeError(
        f"input {rule.name!r}: {value} is outside [{rule.low}, {rule.high}]: the graph was narrowed to int32",
        argument=rule.name,
        value=value,
        position=(),
        flat_position=0,
        range=(rule.low, rule.high),
    )
