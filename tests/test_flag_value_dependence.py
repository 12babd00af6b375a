"""flag-value-dependence: every producer is found once, at its line, with its code; clean graphs cost and say nothing."""

from __future__ import annotations

import contextlib
import inspect
import io
import operator
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from harness import apply_pass, golden, graph_of, run_passes
from torch import fx

from nxfx.graph import walk
from nxfx.passes.flag_value_dependence import FlagValueDependence
from nxfx.pipeline import PassContext, Pipeline
from nxfx.report.findings import CODES, Finding, Severity

NEW = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 13)
X = torch.arange(12.0).reshape(4, 3)
I = torch.tensor([1, 2, 0])  # noqa: E741
N = torch.tensor(2)
PASS = FlagValueDependence()


class Located(torch.nn.Module):
    """Runs functions on copies of the same arguments (torch reads the value of one tensor once).

    torch remembers the lines of functions called ``forward`` only, so that is what they become.
    """

    def __init__(self, *functions: Callable[..., Any]) -> None:
        super().__init__()
        self.functions = [
            types.FunctionType(
                f.__code__.replace(co_name="forward"), f.__globals__, "forward", f.__defaults__, f.__closure__
            )
            for f in functions
        ]

    def forward(self, *args: torch.Tensor) -> Any:
        return [function(*(a.clone() for a in args)) for function in self.functions]


def found(model: Any, *args: torch.Tensor, **options: Any) -> list[Finding]:
    """The findings on ``model``; the graph must be left as it was."""
    model = model if isinstance(model, torch.nn.Module) else Located(model)
    with contextlib.redirect_stderr(io.StringIO()):
        captured = graph_of(model, args, **options)
    before = golden(captured)
    result = run_passes(captured, PASS)
    assert not result.changed
    assert golden(captured) == before
    return result.findings


def codes(findings: list[Finding]) -> list[str]:
    return [f.code for f in findings]


def line_of(function: Callable[..., Any], text: str) -> int:
    lines, first = inspect.getsourcelines(function)
    return first + next(i for i, line in enumerate(lines) if text in line)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


# --- one construct each ----------------------------------------------------------------------------------------------


def item_operand(n: torch.Tensor, x: torch.Tensor) -> Any:
    return x * n.item()  # here


def item_size(n: torch.Tensor, x: torch.Tensor) -> Any:
    return torch.zeros(n.item()), x  # here


def item_arange(n: torch.Tensor, x: torch.Tensor) -> Any:
    return torch.arange(n.item()), x  # here


def item_fill(n: torch.Tensor, x: torch.Tensor) -> Any:
    return torch.full((2,), n.item()), x  # here


def item_result(n: torch.Tensor, x: torch.Tensor) -> Any:
    return n.item(), x + 1  # here


def item_arithmetic_size(n: torch.Tensor, x: torch.Tensor) -> Any:
    k = n.item()  # here
    torch._check(k >= 0)
    return x.new_zeros(2 * k + 1)


def item_checked(n: torch.Tensor, x: torch.Tensor) -> Any:
    torch._check(n.item() > 0)  # here
    return x + 1


def expand_by_value(n: torch.Tensor, x: torch.Tensor) -> Any:
    return x.unsqueeze(0).expand(n.item(), -1, -1)  # here


def topk_by_value(n: torch.Tensor, x: torch.Tensor) -> Any:
    return x.flatten().topk(n.item()).values  # here


def mask_read(n: torch.Tensor, x: torch.Tensor) -> Any:
    return x[x > n]  # here


def mask_read_rows(n: torch.Tensor, x: torch.Tensor) -> Any:
    return x[x[:, 0] > n]  # here


def masked_select(n: torch.Tensor, x: torch.Tensor) -> Any:
    return x.masked_select(x > n)  # here


def nonzero(n: torch.Tensor, x: torch.Tensor) -> Any:
    return (x > n).nonzero()  # here


def where_one_argument(n: torch.Tensor, x: torch.Tensor) -> Any:
    return torch.where(x > n)[0]  # here


def argwhere(n: torch.Tensor, x: torch.Tensor) -> Any:
    return torch.argwhere(x > n)  # here


def unique(n: torch.Tensor, x: torch.Tensor) -> Any:
    return torch.unique(x)  # here


def unique_rows(n: torch.Tensor, x: torch.Tensor) -> Any:
    return torch.unique(x, dim=0)  # here


def unique_consecutive(n: torch.Tensor, x: torch.Tensor) -> Any:
    return torch.unique_consecutive(x)  # here


def repeat_interleave(n: torch.Tensor, x: torch.Tensor) -> Any:
    return x.repeat_interleave(n.expand(4), dim=0)  # here


def bincount(n: torch.Tensor, x: torch.Tensor) -> Any:
    return torch.bincount(x.long().flatten())  # here


def mask_write(n: torch.Tensor, x: torch.Tensor) -> Any:
    return torch.ops.aten.index_put(x, [x > n], n.to(x.dtype))  # here


def repeat_known_total(n: torch.Tensor, x: torch.Tensor) -> Any:
    return x.repeat_interleave(n.expand(4), dim=0, output_size=8)  # here


def bucketize(n: torch.Tensor, x: torch.Tensor) -> Any:
    return torch.bucketize(x, x[0])  # here


def searchsorted(n: torch.Tensor, x: torch.Tensor) -> Any:
    return torch.searchsorted(x[0], x[1])  # here


def multinomial(n: torch.Tensor, x: torch.Tensor) -> Any:
    return x.softmax(-1).multinomial(1)  # here


def rand_like(n: torch.Tensor, x: torch.Tensor) -> Any:
    return x + torch.rand_like(x)  # here


def randn(n: torch.Tensor, x: torch.Tensor) -> Any:
    return x + torch.randn(3)  # here


def randperm(n: torch.Tensor, x: torch.Tensor) -> Any:
    return x[torch.randperm(4)]  # here


def bernoulli(n: torch.Tensor, x: torch.Tensor) -> Any:
    return torch.bernoulli(x.softmax(-1))  # here


def normal(n: torch.Tensor, x: torch.Tensor) -> Any:
    return torch.normal(x, 1.0)  # here


def dropout(n: torch.Tensor, x: torch.Tensor) -> Any:
    return F.dropout(x, 0.5, True)  # here


def attention_dropout(n: torch.Tensor, x: torch.Tensor) -> Any:
    return F.scaled_dot_product_attention(x[None], x[None], x[None], dropout_p=0.1)  # here


def random_relu(n: torch.Tensor, x: torch.Tensor) -> Any:
    return F.rrelu(x, training=True)  # here


CONSTRUCTS = [
    (item_operand, "NX402", Severity.ERROR),
    (item_size, "NX403", Severity.ERROR),
    (item_arange, "NX403", Severity.ERROR),
    (item_fill, "NX402", Severity.ERROR),
    (item_result, "NX402", Severity.ERROR),
    (item_arithmetic_size, "NX403", Severity.ERROR),
    (item_checked, "NX407", Severity.WARNING),
    (expand_by_value, "NX403", Severity.ERROR),
    (topk_by_value, "NX403", Severity.ERROR),
    (mask_read, "NX403", Severity.ERROR),
    (mask_read_rows, "NX403", Severity.ERROR),
    (masked_select, "NX403", Severity.ERROR),
    (nonzero, "NX403", Severity.ERROR),
    (where_one_argument, "NX403", Severity.ERROR),
    (argwhere, "NX403", Severity.ERROR),
    (unique, "NX403", Severity.ERROR),
    (unique_rows, "NX403", Severity.ERROR),
    (unique_consecutive, "NX403", Severity.ERROR),
    (repeat_interleave, "NX403", Severity.ERROR),
    (bincount, "NX403", Severity.ERROR),
    (mask_write, "NX403", Severity.ERROR),
    (repeat_known_total, "NX411", Severity.WARNING),
    (bucketize, "NX411", Severity.WARNING),
    (searchsorted, "NX411", Severity.WARNING),
    (multinomial, "NX405", Severity.WARNING),
    (rand_like, "NX405", Severity.INFO),
    (randn, "NX405", Severity.INFO),
    (randperm, "NX405", Severity.INFO),
    (bernoulli, "NX405", Severity.INFO),
    (normal, "NX405", Severity.INFO),
    (dropout, "NX405", Severity.INFO),
    (attention_dropout, "NX405", Severity.INFO),
    (random_relu, "NX405", Severity.INFO),
]


@pytest.fixture(scope="module")
def all_constructs() -> list[Finding]:
    """One model with every construct: exporting each alone would take the time of the whole suite."""
    return found(Located(*(function for function, _, _ in CONSTRUCTS)), N, X)


@pytest.mark.parametrize(("function", "code", "severity"), CONSTRUCTS, ids=[c[0].__name__ for c in CONSTRUCTS])
def test_each_producer_is_found_once_at_its_line(
    all_constructs: list[Finding], function: Callable[..., Any], code: str, severity: Severity
) -> None:
    line = line_of(function, "# here")
    (finding,) = [f for f in all_constructs if f.location.line == line]
    assert (finding.code, finding.severity, finding.location.file) == (code, severity, __file__)
    assert "# here" in finding.location.source
    assert finding.fix
    assert finding.node


def test_no_site_is_invented_and_order_is_execution_order(all_constructs: list[Finding]) -> None:
    assert codes(all_constructs) == [code for _, code, _ in CONSTRUCTS]


def test_core_aten_graphs_are_understood() -> None:
    functions = (item_operand, mask_read, nonzero, unique, bincount, rand_like)
    assert codes(found(Located(*functions), N, X, core_aten=True)) == [
        "NX402",
        "NX403",
        "NX403",
        "NX403",
        "NX403",
        "NX405",
    ]


# --- what is not reported --------------------------------------------------------------------------------------------

CLEAN: list[tuple[str, Callable[..., Any]]] = [
    ("arithmetic", lambda n, x: (x * n).softmax(-1)),
    ("where", lambda n, x: torch.where(x > n, x, 0.0)),
    ("integer-index", lambda n, x: x[torch.tensor([0, 2])]),
    ("tensor-position", lambda n, x: x.index_select(0, n.reshape(1))),
    ("index-put-rows", lambda n, x: x.index_put((torch.tensor([0, 2]),), x[0])),
    ("masked-fill", lambda n, x: x.masked_fill(x > n, 0.0)),
    ("masked-scatter", lambda n, x: x.masked_scatter(x > n, x)),
    ("one-hot-with-classes", lambda n, x: F.one_hot(n, 5)),
    ("repeat-by-a-python-int", lambda n, x: x.repeat_interleave(2, dim=0)),
    ("topk", lambda n, x: x.topk(2).values),
    ("sort", lambda n, x: x.sort().indices),
    ("dropout-eval", lambda n, x: F.dropout(x, 0.5, False)),
    ("dropout-zero", lambda n, x: F.dropout(x, 0.0, True)),
    ("attention", lambda n, x: F.scaled_dot_product_attention(x[None], x[None], x[None])),
    ("rrelu-eval", lambda n, x: F.rrelu(x, training=False)),
    ("count-nonzero", lambda n, x: x.count_nonzero()),
    ("static-slice", lambda n, x: x[1:-1, ::2]),
    ("literal-item", lambda n, x: x * torch.tensor(3).item()),
]


def test_what_stays_on_the_device_is_not_reported() -> None:
    findings = found(Located(*(model for _, model in CLEAN)), N, X)
    assert findings == []


def test_a_clean_graph_does_not_run_the_pass() -> None:
    captured = graph_of(lambda x: x.softmax(-1), (X,))
    result = run_passes(captured, PASS)
    assert not result.runs[0].ran


def test_dynamic_shapes_are_not_data_dependence() -> None:
    dim = torch.export.Dim("b", min=2, max=64)
    model = lambda x: x.reshape(-1)[: x.shape[0]] + torch.arange(x.shape[0])  # noqa: E731
    assert found(model, X, dynamic_shapes={"args": ({0: dim},)}) == []


class Recurrent(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = torch.nn.LSTM(3, 3, num_layers=2, dropout=0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.lstm(x)[0]
        return output


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.skipif(not NEW, reason="torch 2.9 cannot export an LSTM's flat weights")
def test_recurrent_dropout_counts_in_training_only(training: bool) -> None:
    assert codes(found(Recurrent().train(training), X)) == ["NX405"] * training


# --- one finding a producer ------------------------------------------------------------------------------------------


def test_one_producer_many_consumers() -> None:
    def model(x: torch.Tensor) -> Any:
        y = x[x > 2]  # here
        return y.sum(), y * 2, y.cumsum(0), torch.cat([y, y]), y.softmax(0), y.relu().mean()

    (finding,) = found(model, X)
    assert finding.location.line == line_of(model, "# here")


def test_reads_of_several_elements_on_one_line_are_one_finding_with_a_count() -> None:
    def model(i: torch.Tensor, x: torch.Tensor) -> Any:
        a, b, c = i.tolist()
        return x * a * b * c

    from nxfx.report.findings import merge

    (finding,) = merge(found(model, I, X))
    assert (finding.code, finding.count) == ("NX402", 3)


def test_a_number_used_in_two_ways_says_both() -> None:
    def model(n: torch.Tensor, x: torch.Tensor) -> Any:
        k = n.item()
        return torch.zeros(k), x * k

    (finding,) = found(model, N, X)
    assert finding.code == "NX403"
    assert "as a size and as an operand" in finding.message


@pytest.mark.skipif(not NEW, reason="torch 2.9 refuses the slice")
def test_a_read_with_a_tensor_bound_is_told_once_as_a_bound() -> None:
    def model(n: torch.Tensor, x: torch.Tensor) -> Any:
        return x[: n.item()].sum()  # here

    (finding,) = found(model, N, X)
    assert (finding.code, finding.location.line) == ("NX404", line_of(model, "# here"))
    assert "as a bound" in finding.message


def test_a_size_that_later_becomes_known_is_still_data() -> None:
    """``view(3)`` makes the symbol a constant and the node loses its binding; the read is no less value dependent."""

    def model(x: torch.Tensor) -> Any:
        return x[x > 8].view(3)

    assert codes(found(model, X)) == ["NX403"]


def test_a_boolean_input_as_index() -> None:
    assert codes(found(lambda x, m: x[m], X, X[:, 0] > 2)) == ["NX403"]


def test_several_sites_are_all_listed_in_order() -> None:
    def model(n: torch.Tensor, x: torch.Tensor) -> Any:
        a = x * n.item()
        b = a + torch.rand_like(x)
        c = b[b > 0]
        return c.sum(), torch.unique(x), x.softmax(-1).multinomial(1)

    assert codes(found(model, N, X)) == ["NX402", "NX405", "NX403", "NX403", "NX405"]


# --- custom and higher-order ops -------------------------------------------------------------------------------------


@torch.library.custom_op("nxfx_test_values::positive", mutates_args=())
def positive(x: torch.Tensor) -> torch.Tensor:
    return x[x > 0].clone()


@positive.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    size = torch.library.get_ctx().new_dynamic_size()
    return x.new_empty(size)


def test_a_custom_op_with_a_data_dependent_size_is_found() -> None:
    (finding,) = found(lambda x: torch.ops.nxfx_test_values.positive(x), X)
    assert finding.code == "NX403"
    assert "positive gives a size that depends on data" in finding.message


def test_cond_passes_through_and_its_bodies_are_looked_at() -> None:
    """Trap 29: bodies of higher-order ops are walked."""

    def model(x: torch.Tensor) -> Any:
        return torch.cond(x.sum() > 0, lambda x: x + torch.rand_like(x), lambda x: x - 1, (x,))

    assert codes(found(model, X)) == ["NX405"]


def test_a_higher_order_op_nxfx_does_not_know_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap 29: a body that is not rewritten is never passed over silently."""
    captured = graph_of(lambda x: torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,)), (X,))
    from nxfx.analysis import value_ops

    monkeypatch.setattr(walk, "KNOWN_HIGHER_ORDER_OPS", frozenset())
    value_ops.kind_of.cache_clear()
    try:
        (finding,) = PASS.run(captured.gm, captured.context).findings
        assert PASS.wanted(captured.gm.graph)
    finally:
        monkeypatch.undo()
        value_ops.kind_of.cache_clear()
    assert (finding.code, finding.severity) == ("NX410", Severity.WARNING)
    assert "cond" in finding.message


# --- other forms of graphs -------------------------------------------------------------------------------------------


def test_aot_joint_graphs() -> None:
    from torch._functorch.aot_autograd import aot_function, make_boxed_func

    seen: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, _: Any) -> Any:
        seen.append(gm)
        return make_boxed_func(gm.forward)

    aot_function(lambda x: F.dropout(x, 0.5, True) * torch.rand_like(x), keep, keep)(
        X.clone().requires_grad_()
    ).sum().backward()
    forward, backward = (PASS.run(gm, PassContext(training=True)) for gm in seen)
    assert codes(forward.findings) and set(codes(forward.findings)) == {"NX405"}
    assert not backward.findings


def test_assertions_on_tensors() -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        torch.ops.aten._assert_async.msg(x.sum() > 0, "no")  # here
        return x + 1

    (finding,) = found(model, X)
    assert (finding.code, finding.severity, finding.location.line) == (
        "NX407",
        Severity.WARNING,
        line_of(model, "# here"),
    )


# --- the engine's demands --------------------------------------------------------------------------------------------


def test_given_and_result() -> None:
    """The class's docstring."""

    def model(n: torch.Tensor, x: torch.Tensor) -> Any:
        return x[x > 0].sum(), x * n.item(), torch.rand_like(x)

    (_, result) = apply_pass(
        PASS, lambda n, x: (x[x > 0].sum(), x * n.item()), (N, X), more_inputs=[(N + 1, -X), (N, X * 0)]
    )
    assert not result.changed
    captured = graph_of(Located(model), (N, X))
    findings = run_passes(captured, PASS).findings
    own_guards = ("sym_", "_assert_scalar", " = <")
    assert_expected_inline(
        "\n".join(line for line in golden(captured).splitlines() if not any(guard in line for guard in own_guards)),
        """\
%args_0 : int64[] = placeholder[args_0]
%args_1 : float32[4, 3] = placeholder[args_1]
%clone : int64[] = aten.clone.default(args_0)
%clone_1 : float32[4, 3] = aten.clone.default(args_1)
%gt : bool[4, 3] = aten.gt.Scalar(clone_1, 0)
%index : float32[u0] = aten.index.Tensor(clone_1, [gt])
%sum_1 : float32[] = aten.sum.default(index)
%item : SymInt = aten.item.default(clone)
%mul_1 : float32[4, 3] = aten.mul.Tensor(clone_1, item)
%rand_like : float32[4, 3] = aten.rand_like.default(clone_1, pin_memory=False)
return (sum_1, mul_1, rand_like)""",
    )
    assert_expected_inline(
        "\n".join(f"{f.code} {f.severity.value}: {f.message}\n  {f.fix}".replace(". ", ".\n  ") for f in findings),
        """\
NX403 error: reading through a boolean mask gives a size that depends on data.
  A legacy trace freezes the example's size; TorchNeuron (fullgraph=True) refuses it; torch.compile breaks the graph here.
  keep the full shape: torch.where(mask, x, 0), and divide sums by mask.sum()
NX402 error: a tensor's value is read into Python and used as an operand.
  A legacy trace bakes in the example's value; TorchNeuron (fullgraph=True) refuses it; torch.compile breaks the graph here.
  use the 0-d tensor itself: x * t instead of x * t.item() (t.to(x.dtype) where t would promote x)
NX405 info: rand_like draws random numbers.
  The device draws from its own generator: other numbers than a CPU's under the same seed, so compare by statistics.
  to compare with a CPU, draw the noise outside and pass it in as an input""",
    )


def test_findings_survive_the_report_and_json(all_constructs: list[Finding]) -> None:
    from nxfx.report.report import Report

    report = Report(findings=all_constructs)
    assert Report.from_dict(report.to_dict()).findings == report.findings
    assert f"{__file__}:{line_of(mask_read, '# here')}" in str(report)


def test_a_chain_of_numbers_is_told_once_per_read() -> None:
    """However many reads feed one chain, each is one finding (its cost is measured by tests/bench)."""
    read = fx.Graph()
    source = read.placeholder("x")
    numbers = [read.call_function(torch.ops.aten.item.default, (source,)) for _ in range(1000)]
    total = numbers[0]
    for number in numbers[1:]:
        total = read.call_function(operator.add, (total, number))
    read.output((total,))
    for node in read.nodes:
        node.meta["val"] = 1
    gm = fx.GraphModule(torch.nn.Module(), read)
    assert codes(PASS.run(gm, PassContext()).findings) == ["NX402"] * 1000


def test_the_pass_stands_in_the_default_pipeline_after_those_that_remove_what_it_flags() -> None:
    names = Pipeline.default().names
    assert names.index("flag-value-dependence") > max(names.index(n) for n in ("mask-slice-writes", "lift-int-casts", "narrow-64bit"))
    assert names[-1] == "check-constraints"


# --- the pages of the codes ------------------------------------------------------------------------------------------

PAGES = Path(__file__).resolve().parents[1] / "docs" / "codes"


def test_every_code_has_its_page_and_every_page_a_code() -> None:
    assert {page.stem for page in PAGES.glob("*.md")} == set(CODES)


@pytest.mark.parametrize("code", CODES)
def test_a_page_says_what_happens_where_and_what_to_write_instead(code: str) -> None:
    text = (PAGES / f"{code}.md").read_text(encoding="utf-8")
    assert text.splitlines()[0] == f"# {code}: {CODES[code]}"
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    assert headings == ["## Example", "## On Neuron", "## What to write instead"]
    assert "Severity: **" in text
    assert "```python" in text


# --- the fixes ------------------------------------------------------------------------------------------------------


def test_what_the_fixes_say_is_equal_to_what_they_replace() -> None:
    """Advice that is wrong would be worse than none."""
    x = torch.tensor([3.0, -1.0, 0.5, 3.0, 2.0])
    boundaries = torch.tensor([-1.0, 0.5, 2.5])
    below = (boundaries < x[..., None]).sum(-1)
    assert torch.equal(below, torch.bucketize(x, boundaries))
    assert torch.equal((boundaries <= x[..., None]).sum(-1), torch.bucketize(x, boundaries, right=True))
    assert torch.equal(below, torch.searchsorted(boundaries, x))
    counted = torch.tensor([3, 0, 1, 3, 2])
    counts = (counted[:, None] == torch.arange(5)).sum(0)
    assert torch.equal(counts, torch.bincount(counted, minlength=5))
    assert torch.equal(counts.float(), torch.histc(counted.float(), 5, 0, 4))
    repeats = torch.tensor([2, 0, 3, 1, 0])
    gathered = x[(torch.arange(6)[:, None] >= repeats.cumsum(0)).sum(1)]
    assert torch.equal(gathered, x.repeat_interleave(repeats))
    assert torch.equal(torch.where(x > 0, x, 0).sum() / (x > 0).sum(), x[x > 0].mean())
    for n in (0, 2, 5, 9):
        written = x.clone()
        written[:n] = 7
        assert torch.equal(torch.where(torch.arange(x.shape[-1]) < n, 7, x), written)
    assert torch.equal(torch.stack([x, x + 1])[torch.tensor(1)], [x, x + 1][1])
    assert torch.equal((x == 3).any(), torch.tensor(3 in x))
    start = torch.tensor(1)
    assert torch.equal(x[start + torch.arange(3)], x.narrow(0, start, 3))
