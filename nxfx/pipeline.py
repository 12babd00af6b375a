"""Passes and the pipeline that runs them: order, options, verification, timing."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import Any, ClassVar

from torch import fx

from nxfx.analysis.bodies import operand_sources
from nxfx.analysis.provenance import Premise, Source
from nxfx.errors import NxfxError, PassError, UsageError
from nxfx.graph import invariants, walk
from nxfx.report.findings import Finding, Severity
from nxfx.report.locations import locate
from nxfx.report.rewrites import Kind, Rewrite
from nxfx.targets import Target, get_target

ENTRY_POINT_GROUP = "nxfx.passes"


@dataclass(frozen=True)
class NoOptions:
    """A pass without options."""


@dataclass
class PassResult:
    """What one run of a pass did. ``changed`` is honest: False means that the graph is untouched."""

    changed: bool = False
    rewrites: list[Rewrite] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)


@dataclass
class PassContext:
    """What a pass may know beyond the graph.

    Attributes:
        target: the Neuron generation.
        sources: placeholder or ``get_attr`` node name → where it comes from. Of a body's placeholders: what is proved of them.
        training: the graph will be differentiated, or is a joint forward/backward graph.
        premises: facts about present buffer values that proofs rest on; passes append.
        requirements: input name → inclusive ``(low, high)`` that the boundary must enforce; passes add.
        is_body: the graph is the body of a higher-order op.
        assumed_sizes: dynamic dimensions that proofs take to stay below 2**31, which the boundary must enforce; passes add.
        float32_products: node name → what it would cost to run this matrix product in a smaller type than float32; passes add.
        float32_uses: node name → an op that magnifies what rounding float32 would do to integers; passes add.
    """

    target: Target = field(default_factory=lambda: get_target("trn2"))
    sources: dict[str, Source] = field(default_factory=dict)
    training: bool = False
    premises: list[Premise] = field(default_factory=list)
    requirements: dict[str, tuple[int, int]] = field(default_factory=dict)
    is_body: bool = False
    assumed_sizes: set[str] = field(default_factory=set)
    float32_products: dict[str, str] = field(default_factory=dict)
    float32_uses: dict[str, str] = field(default_factory=dict)

    def for_body(self, operands: dict[str, Source]) -> PassContext:
        """The context for the body of a higher-order op, with what is known of its operands."""
        return dataclasses.replace(self, sources=operands, is_body=True)


class Pass(ABC):
    """One rewrite or check. Subclass it in a file of its own.

    Class attributes:
        name: id, e.g. ``"narrow-64bit"``.
        Options: a frozen dataclass with defaults.
        targets: the ops it looks for; when the graph holds none of them the pass does not run. None: always run.
        after: ids of passes that must have run before this one, when they are in the pipeline at all.
        requires: ids of passes that must be in the pipeline, before this one.

    A pass edits ``graph_module.graph`` through :class:`nxfx.graph.builder.NodeBuilder` only. It never lints, eliminates dead
    code or recompiles: the pipeline does that once.
    """

    name: ClassVar[str]
    Options: ClassVar[type[Any]] = NoOptions
    targets: ClassVar[frozenset[Any] | None] = None
    after: ClassVar[tuple[str, ...]] = ()
    requires: ClassVar[tuple[str, ...]] = ()

    def __init__(self, options: Any = None) -> None:
        self.options = options if options is not None else self.Options()

    @abstractmethod
    def run(self, graph_module: fx.GraphModule, context: PassContext) -> PassResult:
        """Rewrite one functional graph in place and say what changed."""

    # Shorthands that fill in the pass's own name.
    def rewrite(self, node: fx.Node, rule: str, kind: Kind, before: str, after: str, bound: str = "") -> Rewrite:
        return Rewrite.at(node, self.name, rule, kind, before, after, bound)

    @staticmethod
    def finding(node: fx.Node, code: str, severity: Severity, message: str, fix: str = "") -> Finding:
        return Finding.at(node, code, severity, message, fix)

    def wanted(self, graph: fx.Graph) -> bool:
        """Whether the graph holds anything this pass looks for."""
        if self.targets is None:
            return True
        return any(next(iter(graph.find_nodes(op="call_function", target=t, sort=False)), None) is not None for t in self.targets)


@functools.cache
def available_passes() -> dict[str, type[Pass]]:
    """Every pass by id: nxfx's own in default order, then those of other packages (entry-point group ``nxfx.passes``)."""
    from nxfx.passes import DEFAULT_ORDER

    found: dict[str, type[Pass]] = {cls.name: cls for cls in DEFAULT_ORDER}
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        cls = _load(entry)
        if found.setdefault(cls.name, cls) is not cls:
            raise UsageError(f"two passes are called {cls.name!r}: {_path(found[cls.name])} and {_path(cls)}")
    return found


def _load(entry: EntryPoint) -> type[Pass]:
    try:
        cls = entry.load()
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        raise UsageError(f"the pass {entry.name!r} ({entry.value}) cannot be loaded: {why}") from error
    if not (isinstance(cls, type) and issubclass(cls, Pass) and isinstance(getattr(cls, "name", None), str)):
        raise UsageError(f"the pass {entry.name!r} ({entry.value}) is not a subclass of nxfx.Pass with a name")
    return cls


def _path(cls: type[Pass]) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _pass_class(name: str) -> type[Pass]:
    passes = available_passes()
    if name not in passes:
        near = difflib.get_close_matches(name, passes, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else f" Available: {', '.join(passes)}."
        raise UsageError(f"unknown pass {name!r}.{hint}")
    return passes[name]


def _with_options(step: Pass, changes: Mapping[str, Any]) -> Pass:
    known = {f.name: f for f in dataclasses.fields(step.Options)}
    values = {}
    for key, value in changes.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else f" It has: {', '.join(known) or 'none'}."
            raise UsageError(f"pass {step.name!r} has no option {key!r}.{hint}")
        read = _parse if isinstance(value, str) else _checked
        values[key] = read(step.name, known[key], value)
    try:
        return type(step)(dataclasses.replace(step.options, **values))
    except (TypeError, ValueError) as error:
        raise UsageError(f"pass {step.name!r}: {error}") from None


def _checked(pass_name: str, spec: dataclasses.Field[Any], value: Any) -> Any:
    wanted = {bool: (bool,), int: (int,), float: (int, float), str: (str,)}.get(type(spec.default))
    if wanted is not None and (not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted)):
        raise UsageError(f"pass {pass_name!r}: option {spec.name!r} wants {type(spec.default).__name__}, not {value!r}")
    return value


def _parse(pass_name: str, spec: dataclasses.Field[Any], text: str) -> Any:
    default = spec.default
    if isinstance(default, bool):
        if text.lower() not in ("on", "off", "true", "false", "yes", "no", "1", "0"):
            raise UsageError(f"pass {pass_name!r}: option {spec.name!r} wants on or off, not {text!r}")
        return text.lower() in ("on", "true", "yes", "1")
    if isinstance(default, (int, float)):
        try:
            return type(default)(text)
        except ValueError:
            raise UsageError(f"pass {pass_name!r}: option {spec.name!r} wants a number, not {text!r}") from None
    return text


def _text(value: Any) -> str:
    return ("on" if value else "off") if isinstance(value, bool) else str(value)


@dataclass
class PassRun:
    """Statistics of one pass in one pipeline run."""

    name: str
    seconds: float = 0.0
    ran: bool = False
    changed: bool = False
    rewrites: int = 0
    findings: int = 0
    nodes_before: int = 0
    nodes_after: int = 0


@dataclass
class PipelineResult:
    """Everything a pipeline run did."""

    rewrites: list[Rewrite] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    runs: list[PassRun] = field(default_factory=list)

    @property
    def changed(self) -> bool:
        return any(run.changed for run in self.runs)


class Pipeline:
    """An immutable, ordered list of passes. A pipeline is data: ids, options, order, and the same as text.

    Raises:
        UsageError: unknown pass, unknown option, unparsable value, or an order constraint that does not hold.
    """

    def __init__(self, steps: Iterable[Pass | type[Pass] | str] = ()) -> None:
        self.steps: tuple[Pass, ...] = tuple(self._step(s) for s in steps)
        self._check_order()

    @staticmethod
    def _step(step: Pass | type[Pass] | str) -> Pass:
        if isinstance(step, str):
            return _pass_class(step)()
        return step() if isinstance(step, type) else step

    def _check_order(self) -> None:
        names = self.names
        repeated = {n for n in names if names.count(n) > 1}
        if repeated:
            raise UsageError(f"pass {sorted(repeated)[0]!r} stands twice in the pipeline")
        for position, step in enumerate(self.steps):
            for needed in step.requires:
                if needed not in names[:position]:
                    raise UsageError(f"pass {step.name!r} requires {needed!r} to run before it")
            for earlier in step.after:
                if earlier in names[position + 1 :]:
                    raise UsageError(f"pass {step.name!r} must come after {earlier!r}")

    @classmethod
    def default(cls, target: str | Target = "trn2") -> Pipeline:
        """The passes nxfx runs unless told otherwise."""
        get_target(target)
        return cls(available_passes().values())

    @classmethod
    def parse(cls, text: str) -> Pipeline:
        """From text: ``"lift-int-casts,mask-slice-writes{multiply=off}"``.

        ``"default"`` stands for the default passes; a pass named after it sets options there: ``"default,narrow-64bit{mode=proved}"``.
        """
        pipeline: list[Pass] = []
        default: list[Pass] = []  # what "default" stands for, less what has been named since
        position, text = 0, text.strip()
        pattern = re.compile(r"\s*([\w.-]+)\s*(?:\{([^}]*)\})?\s*(?:,|$)")
        while position < len(text):
            match = pattern.match(text, position)
            if match is None:
                raise UsageError(f"cannot read the pipeline at {text[position:]!r}: expected name{{option=value;...}},name,...")
            name, options = match.groups()
            position = match.end()
            if name == "default" and options is None:
                default = list(cls.default().steps)
                pipeline.extend(default)
                continue
            changes = {}
            for item in filter(None, (o.strip() for o in re.split(r"[;,]", options or ""))):
                key, separator, value = item.partition("=")
                if not separator:
                    raise UsageError(f"pass {name!r}: write option=value, not {item!r}")
                if key.strip() in changes:
                    raise UsageError(f"pass {name!r}: option {key.strip()!r} is given twice")
                changes[key.strip()] = value.strip()
            step = _with_options(_pass_class(name)(), changes)
            replaced = next((given for given in default if given.name == name), None)
            if replaced is None or not changes:
                pipeline.append(step)
            else:
                pipeline[pipeline.index(replaced)] = step
                default.remove(replaced)
        return cls(pipeline)

    @property
    def names(self) -> list[str]:
        return [s.name for s in self.steps]

    def without(self, *names: str) -> Pipeline:
        """This pipeline less the named passes."""
        for name in names:
            self._position(name)
        return Pipeline(s for s in self.steps if s.name not in names)

    def only(self, *names: str) -> Pipeline:
        """The named passes of this pipeline, in this pipeline's order."""
        for name in names:
            self._position(name)
        return Pipeline(s for s in self.steps if s.name in names)

    def part(self, start: int, stop: int) -> Pipeline:
        """The passes from ``start`` up to ``stop``, without asking whether what they require is among them."""
        some = Pipeline()
        some.steps = self.steps[start:stop]
        return some

    def with_options(self, name: str, **options: Any) -> Pipeline:
        """This pipeline with options of one pass changed."""
        at = self._position(name)
        return Pipeline((*self.steps[:at], _with_options(self.steps[at], options), *self.steps[at + 1 :]))

    def with_pass(self, step: Pass | type[Pass] | str, *, before: str | None = None, after: str | None = None) -> Pipeline:
        """This pipeline with one more pass: at the end, or next to the named one."""
        at = len(self.steps)
        if before is not None:
            at = self._position(before)
        elif after is not None:
            at = self._position(after) + 1
        return Pipeline((*self.steps[:at], self._step(step), *self.steps[at:]))

    def _position(self, name: str) -> int:
        if name not in self.names:
            near = difflib.get_close_matches(name, self.names, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else f" It has: {', '.join(self.names)}."
            raise UsageError(f"the pipeline has no pass {name!r}.{hint}")
        return self.names.index(name)

    def __iter__(self) -> Iterator[Pass]:
        return iter(self.steps)

    def __len__(self) -> int:
        return len(self.steps)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pipeline) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __str__(self) -> str:
        """Textual form; ``Pipeline.parse(str(p)) == p``. Also the cache key of a capture: it holds every option."""
        parts = []
        for step in self.steps:
            default = step.Options()
            fields = [f.name for f in dataclasses.fields(step.Options)]
            changed = [f"{f}={_text(getattr(step.options, f))}" for f in fields if getattr(step.options, f) != getattr(default, f)]
            parts.append(step.name + ("{" + ";".join(changed) + "}" if changed else ""))
        return ",".join(parts)

    def __repr__(self) -> str:
        return f"Pipeline.parse({str(self)!r})"

    def run(
        self,
        graph_module: fx.GraphModule,
        context: PassContext,
        *,
        verify_each: bool = False,
        observer: Callable[[Pass, fx.GraphModule, PassRun], None] | None = None,
        finish: Callable[[], None] | None = None,
    ) -> PipelineResult:
        """Run every pass on ``graph_module`` and the bodies of its higher-order ops, in place.

        Args:
            verify_each: check the invariants after each pass that changed something (slow: every node is re-evaluated).
            observer: called after each pass, e.g. to print the graph.
            finish: a last edit of the graph, before dead code is eliminated and the module is recompiled (once).

        Raises:
            PassError: a pass raised or broke an invariant; names the pass, the node and the user's line.
        """
        result = PipelineResult()
        scopes = list(walk.scopes(graph_module))
        contracts = [invariants.contract_of(s.graph_module) for s in scopes]
        for step in self.steps:
            run = PassRun(step.name, nodes_before=sum(len(s.graph_module.graph.nodes) for s in scopes))
            drawn = [invariants.drawing(s.graph_module) for s in scopes] if verify_each else []
            started = time.perf_counter()
            wanted = [scope for scope in scopes if step.wanted(scope.graph_module.graph)]
            operands = operand_sources(graph_module, context.sources, context.requirements) if any(s.is_body for s in wanted) else {}
            for scope in wanted:
                run.ran = True
                within = context.for_body(operands.get(scope.graph_module, {})) if scope.is_body else context
                outcome = _run_one(step, scope, within)
                run.changed |= outcome.changed
                run.rewrites += len(outcome.rewrites)
                run.findings += len(outcome.findings)
                result.rewrites += outcome.rewrites
                result.findings += outcome.findings
            run.seconds = time.perf_counter() - started
            run.nodes_after = sum(len(s.graph_module.graph.nodes) for s in scopes)
            result.runs.append(run)
            if verify_each and run.changed:
                _verify(step, scopes, contracts)
            elif verify_each and drawn != [invariants.drawing(s.graph_module) for s in scopes]:
                raise PassError(f"pass {step.name!r} edited the graph and reported no change", pass_name=step.name)
            if observer is not None:
                observer(step, graph_module, run)
        if finish is not None:
            finish()
        if result.changed or finish is not None:
            for scope in scopes:
                scope.graph_module.graph.eliminate_dead_code()
                scope.graph_module.graph.lint()
                scope.graph_module.recompile()
        return result


def _run_one(step: Pass, scope: walk.Scope, context: PassContext) -> PassResult:
    try:
        return step.run(scope.graph_module, context)
    except NxfxError:
        raise
    except Exception as error:
        node = getattr(error, "nxfx_node", None)
        where = f" at node {node.name} ({locate(node)}: {locate(node).source})" if isinstance(node, fx.Node) else ""
        raise PassError(
            f"pass {step.name!r} failed{where}: {type(error).__name__}: {error}",
            pass_name=step.name,
            node=node.name if isinstance(node, fx.Node) else "",
        ) from error


def _verify(step: Pass, scopes: list[walk.Scope], contracts: list[invariants.Contract]) -> None:
    for scope, contract in zip(scopes, contracts, strict=True):
        broken = invariants.check(scope.graph_module, contract, may_narrow=scope.is_body)
        if broken:
            first = broken[0]
            node = next((n for n in scope.graph_module.graph.nodes if n.name == first.node), None)
            where = f" at {locate(node)}: {locate(node).source}" if node is not None and locate(node).file else ""
            more = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
            raise PassError(
                f"pass {step.name!r} broke an invariant: {first}{where}{more}",
                pass_name=step.name,
                node=first.node,
            )
