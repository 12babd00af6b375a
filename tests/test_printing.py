"""Renderings of a graph: stable, complete (bodies too), linear, and safe to show."""

from __future__ import annotations

import ast
import json
import os
import re
import runpy
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from harness import graph_of
from torch import fx

from nxfx.errors import PassError
from nxfx.graph import printing
from nxfx.graph.builder import NodeBuilder
from nxfx.graph.escaping import printable
from nxfx.pipeline import NoOptions, Pass, PassContext, PassResult, Pipeline
from nxfx.reproducer import Rebuild, write_reproducer
from nxfx.targets import get_target

aten = torch.ops.aten


class Positions(torch.nn.Module):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return ids.cumsum(-1).masked_fill(ids == 0, float("inf")) * 2


class Branch(torch.nn.Module):
    def forward(self, flag: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.cond(flag, lambda a: a.sin(), lambda a: a.cos(), (x,))


def positions() -> fx.GraphModule:
    return graph_of(Positions(), (torch.ones(2, 3),)).gm


def branch() -> fx.GraphModule:
    return graph_of(Branch(), (torch.tensor(True), torch.ones(3))).gm


def narrowed() -> fx.GraphModule:
    gm = positions()
    (mul,) = gm.graph.find_nodes(op="call_function", target=aten.mul.Tensor)
    build = NodeBuilder(gm.graph, "lift-int-casts")
    with build.after(mul):
        cast = build.cast(mul, torch.float64)
    (output,) = gm.graph.find_nodes(op="output")
    output.args = ((cast,),)
    return gm


def where(node: fx.Node) -> str:
    return "model.py:7: evil \x1b[31m\nline" if node.op == "call_function" else ""


def test_text_is_one_line_a_node() -> None:
    assert_expected_inline(
        printing.text(positions()),
        """\
%ids : float32[2, 3] = placeholder[ids]
%cumsum : float32[2, 3] = aten.cumsum.default(ids, -1)
%eq : bool[2, 3] = aten.eq.Scalar(ids, 0)
%masked_fill : float32[2, 3] = aten.masked_fill.Scalar(cumsum, eq, inf)
%mul : float32[2, 3] = aten.mul.Tensor(masked_fill, 2)
return (mul,)""",
    )


def test_bodies_of_higher_order_ops_are_printed() -> None:
    assert_expected_inline(
        printing.text(branch()),
        """\
%flag : bool[] = placeholder[flag]
%x : float32[3] = placeholder[x]
%true_graph_0 = get_attr[true_graph_0]
%false_graph_0 = get_attr[false_graph_0]
%cond : (float32[3]) = cond(flag, true_graph_0, false_graph_0, (x,))
%getitem : float32[3] = operator.getitem(cond, 0)
return (getitem,)
true_graph_0:
    %x : float32[3] = placeholder[x]
    %sin : float32[3] = aten.sin.default(x)
    return (sin,)
false_graph_0:
    %x : float32[3] = placeholder[x]
    %cos : float32[3] = aten.cos.default(x)
    return (cos,)""",
    )


def test_code_names_the_line_and_the_pass() -> None:
    text = printing.code(narrowed(), lambda n: "model.py:7: x" if n.op == "call_function" else "")
    assert_expected_inline(
        text,
        """\
class GraphModule(torch.nn.Module):
    def forward(self, ids: "float32[2, 3]"):
        # model.py:7: x
        cumsum: "float32[2, 3]" = torch.ops.aten.cumsum.default(ids, -1)
        eq: "bool[2, 3]" = torch.ops.aten.eq.Scalar(ids, 0)
        masked_fill: "float32[2, 3]" = torch.ops.aten.masked_fill.Scalar(cumsum, eq, inf)
        mul: "float32[2, 3]" = torch.ops.aten.mul.Tensor(masked_fill, 2)
        # [lift-int-casts] model.py:7: x
        _to_copy_default: "float64[2, 3]" = torch.ops.aten._to_copy.default(mul, dtype=torch.float64)
        return (_to_copy_default,)""",
    )


@pytest.mark.parametrize("graph", [positions, branch, narrowed])
def test_code_is_python_and_computes_the_same(graph: Any) -> None:
    gm = graph()
    gm.recompile()
    inputs = [torch.tensor(True), torch.randn(3)] if graph is branch else [torch.randn(2, 3)]
    scope = {
        "torch": torch,
        "operator": __import__("operator"),
        "inf": float("inf"),
        "nan": float("nan"),
        "device": torch.device,
    }
    exec(printing.code(gm), scope)
    module = scope["GraphModule"]()
    for name, body in gm.named_children():
        setattr(scope["GraphModule"], name, body)  # in place of the nested class, which cannot be called
    assert torch.equal(module.forward(*inputs)[0], gm(*inputs)[0])


def test_hostile_source_lines_stay_comments_and_drive_no_terminal() -> None:
    for render in (printing.code, printing.table, printing.dot):
        text = render(narrowed(), where)
        assert "\x1b" not in text
        assert not any(line.startswith("line") for line in text.splitlines())
    ast.parse(printing.code(narrowed(), where))
    assert json.loads(printing.to_json(narrowed(), where))["nodes"][1]["where"] == where(
        SimpleNamespace(op="call_function")
    )  # type: ignore[arg-type]


def test_bidirectional_and_control_characters_become_escapes() -> None:
    assert printable("a\u202eb\x1b[2J\tc\n") == "a\\u202eb\\x1b[2J\tc\n"
    assert printable("déjà ≤ 視") == "déjà ≤ 視"


def test_json_holds_what_json_lacks_as_literals() -> None:
    data = json.loads(printing.to_json(narrowed()), parse_constant=lambda c: pytest.fail(f"not JSON: {c}"))
    by_name = {n["name"]: n for n in data["nodes"]}
    assert by_name["masked_fill"]["args"] == [{"node": "cumsum"}, {"node": "eq"}, {"literal": "inf"}]
    assert by_name["_to_copy_default"]["kwargs"] == {"dtype": {"literal": "torch.float64"}}
    assert by_name["_to_copy_default"]["made_by"] == "lift-int-casts"
    assert by_name["_to_copy_default"]["value"] == {"dtype": "float64", "shape": [2, 3], "device": "cpu"}
    assert data["inputs"] == ["ids"] and data["outputs"] == [{"node": "_to_copy_default"}]
    assert set(json.loads(printing.to_json(branch()))["bodies"]) == {"true_graph_0", "false_graph_0"}


def test_table_has_one_aligned_row_a_node_bodies_included() -> None:
    lines = printing.table(branch()).splitlines()
    assert len(lines) == 2 + 7 + 2 * 3
    column = lines[0].index("value")
    assert all(line[column - 1] == " " for line in lines)
    assert any(line.startswith("true_graph_0.sin") for line in lines)


def test_dot_marks_wide_edges_and_new_nodes() -> None:
    text = printing.dot(narrowed())
    assert '"_to_copy_default" -> "output" [color="#c00000"' in text
    assert '"mul" -> "_to_copy_default";' in text
    assert 'fillcolor="#d5f5d5"' in next(
        line for line in text.splitlines() if line.startswith('  "_to_copy_default" [')
    )
    assert text.count("{") == text.count("}")


def test_diff_shows_only_what_changed() -> None:
    assert_expected_inline(
        printing.diff(printing.text(positions()), printing.text(narrowed()), "captured", "prepared", context=0),
        """\
--- captured
+++ prepared
@@ -6 +6,2 @@
-return (mul,)
+%_to_copy_default : float64[2, 3] = aten._to_copy.default(mul, dtype=torch.float64)
+return (_to_copy_default,)""",
    )
    assert printing.diff("a", "a") == ""


def test_symbolic_sizes_and_odd_attributes_are_spelled() -> None:
    gm = graph_of(
        lambda x: x + x.shape[0], (torch.ones(3, 2),), dynamic_shapes={"args": ({0: torch.export.Dim("rows", min=2)},)}
    ).gm
    assert ": SymInt(s" in printing.text(gm)
    assert printing.attribute("layers.0.weight") == "getattr(self.layers, '0').weight"
    assert printing.literal([1, (2,), slice(None, 3), {"a": float("-inf")}, complex(0, float("nan")), torch.int32]) == (
        "[1, (2,), slice(None, 3, None), {'a': -inf}, complex(0.0, nan), torch.int32]"
    )


def chain(length: int) -> fx.GraphModule:
    gm = positions()
    (last,) = gm.graph.find_nodes(op="call_function", target=aten.mul.Tensor)
    (output,) = gm.graph.find_nodes(op="output")
    build = NodeBuilder(gm.graph, "")
    with build.before(output, last):
        for _ in range(length):
            last = build.cast(last, torch.float64 if last.meta["val"].dtype == torch.float32 else torch.float32)
    output.args = ((last,),)
    return gm


@pytest.mark.parametrize("render", [printing.text, printing.code, printing.table, printing.to_json, printing.dot])
def test_trap_34_renderings_are_linear(render: Any) -> None:
    small, large = chain(800), chain(3200)

    def seconds(gm: fx.GraphModule) -> float:
        best = float("inf")
        for _ in range(3):
            started = time.process_time()
            render(gm)
            best = min(best, time.process_time() - started)
        return best

    assert seconds(large) / seconds(small) < 10  # 4 when linear, 16 when quadratic


# -- the reproducer of a failing pass ----------------------------------------------------------------------


class Fails(Pass):
    """Fails at the first cosine."""

    name = "fails-at-cos"

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> PassResult:
        for node in graph_module.graph.find_nodes(op="call_function", target=aten.cos.default):
            assert context.target.name == "trn1" or context.is_body
            with NodeBuilder(graph_module.graph, self.name).before(
                node
            ) as build:  # the pipeline then names node and line
                build.call(aten.squeeze.dim, node.args[0], 99)
        return PassResult()


class BreaksValues(Pass):
    """Leaves a wrong ``val`` behind."""

    name = "breaks-values"

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> PassResult:
        for node in graph_module.graph.find_nodes(op="call_function", target=aten.cos.default):
            node.meta["val"] = node.meta["val"].new_empty(7)
            return PassResult(changed=True)
        return PassResult()


class Rotary(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)
        self.register_buffer("inv_freq", torch.tensor([1.0, 0.5, 0.25, 0.125]))

    def forward(self, x: torch.Tensor, flag: torch.Tensor) -> torch.Tensor:
        x = torch.cond(flag, lambda a: a.sin(), lambda a: a.exp(), (self.linear(x),))
        return (x[:, 1:] * self.inv_freq[1:]).cos() + x.shape[0] * 2


def failure(step: type[Pass], context_target: str = "trn1") -> tuple[PassError, str]:
    rows = torch.export.Dim("rows", min=2, max=64)
    inputs = (torch.randn(3, 4), torch.tensor(True))
    captured = graph_of(Rotary(), inputs, dynamic_shapes={"x": {0: rows}, "flag": None})
    captured.context.target = get_target(context_target)
    again = graph_of(Rotary(), inputs, dynamic_shapes={"x": {0: rows}, "flag": None})
    again.context.target = captured.context.target
    with pytest.raises(PassError) as caught:
        Pipeline([step]).run(captured.gm, captured.context, verify_each=True)
    return caught.value, write_reproducer(again.gm, Pipeline([step]), caught.value, again.context)


@pytest.mark.parametrize("step", [Fails, BreaksValues])
def test_a_reproducer_fails_the_same_way(step: type[Pass], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NXFX_REPRODUCER_DIR", str(tmp_path / "new" / "place"))
    error, path = failure(step)
    assert Path(path).is_file() and Path(path).is_relative_to(tmp_path)
    with pytest.raises(PassError) as again:
        runpy.run_path(path, run_name="__main__")
    assert _anonymous(str(again.value)) == _anonymous(str(error))
    assert (again.value.pass_name, again.value.node) == (error.pass_name, error.node)


def test_a_reproducer_stands_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It needs the pass's own source file, and not that its module can be imported."""
    monkeypatch.setenv("NXFX_REPRODUCER_DIR", str(tmp_path))
    error, path = failure(Fails)
    run = subprocess.run([sys.executable, path], capture_output=True, text=True, cwd=tmp_path, env=_environment())
    assert run.returncode == 1, run.stdout
    told = run.stderr.strip().splitlines()[-1].removeprefix("nxfx.errors.PassError: ")
    assert _anonymous(told) == _anonymous(str(error))


def _environment() -> dict[str, str]:
    root = str(Path(__file__).parents[1])
    return {**os.environ, "PYTHONPATH": os.pathsep.join([root, str(Path(__file__).parent)])}


def test_a_reproducer_rebuilds_the_graph_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NXFX_REPRODUCER_DIR", str(tmp_path))
    rows = torch.export.Dim("rows", min=2, max=64)
    inputs = (torch.randn(3, 4), torch.tensor(True))
    captured = graph_of(Rotary(), inputs, dynamic_shapes={"x": {0: rows}, "flag": None})
    error = PassError('quoted """ and \\ \x1b[31m', pass_name="../evil name")
    path = write_reproducer(captured.gm, "narrow-64bit", error, captured.context)
    assert Path(path).is_relative_to(tmp_path)
    scope: dict[str, Any] = {"__name__": "reproducer", "__file__": path}
    exec(compile(Path(path).read_text(), path, "exec"), scope)
    rebuilt = Rebuild(path)
    for line in Path(path).read_text().splitlines():
        if line.startswith("    g.symbol("):
            exec(line.strip(), {"g": rebuilt})
    scope["build_graph_0"](rebuilt)
    gm = fx.GraphModule(rebuilt.root, rebuilt.graph)
    assert _anonymous(printing.text(gm)) == _anonymous(printing.text(captured.gm))
    assert [n.name for n in gm.graph.nodes] == [n.name for n in captured.gm.graph.nodes]


def _anonymous(text: str) -> str:
    """Symbols renamed in order of appearance."""
    names: dict[str, str] = {}
    return re.sub(r"\b[su]\d+\b", lambda m: names.setdefault(m[0], f"sym{len(names)}"), text)


def test_a_reproducer_holds_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NXFX_REPRODUCER_DIR", str(tmp_path))
    captured = graph_of(Rotary(), (torch.randn(3, 4), torch.tensor(True)))
    path = write_reproducer(captured.gm, "narrow-64bit", PassError("x", pass_name="narrow-64bit"), captured.context)
    stored = torch.load(Path(path).with_name("tensors.pt"), weights_only=True)
    assert set(stored) == {"inv_freq"}
    assert torch.equal(stored["inv_freq"], torch.tensor([1.0, 0.5, 0.25, 0.125]))


def test_options_of_an_unregistered_pass_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NXFX_REPRODUCER_DIR", str(tmp_path))
    step = Fails(NoOptions())
    path = write_reproducer(positions(), Pipeline([step]), PassError("x", pass_name=step.name))
    assert "'Fails', {}" in Path(path).read_text()
