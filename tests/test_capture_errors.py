"""capture.errors.translate: whatever torch.export raises becomes one error with the construct and the user's own line.

``>>>`` marks the line that the error has to name.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import math
import pickle
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

import nxfx
from nxfx.capture.errors import lost_tensor, translate
from nxfx.errors import CaptureError
from nxfx.report import syntax
from nxfx.report.findings import Severity

NEW = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 13)
OLD_ONLY = pytest.mark.skipif(NEW, reason="torch 2.13 captures it")
X = torch.arange(6.0).reshape(2, 3)
I = torch.tensor([1, 2, 0])  # noqa: E741
N = torch.tensor(2)
_INTERNAL = ("torch/_export", "torch/export", "fake_tensor.py", "Traceback", "FakeTensor", "TORCH_LOGS", "GuardOnData")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


class Model(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


def refused(model: nn.Module, args: tuple[Any, ...], *, strict: bool = False, **options: Any) -> BaseException:
    """What torch raises: at export, or when the graph is made functional."""
    with contextlib.redirect_stderr(io.StringIO()), torch.no_grad():
        try:
            program = torch.export.export(model, args, strict=strict, **options)
            problem = lost_tensor(program)
            if problem is not None:
                return problem
            program.run_decompositions({})
        except Exception as error:
            return error
    raise AssertionError("torch.export takes it")


def marked_line(function: Any) -> int:
    lines, first = inspect.getsourcelines(function)
    return first + next(i for i, line in enumerate(lines) if ">>>" in line)


def check(error: CaptureError, construct: str, code: str, where: Any) -> None:
    """One short message with the construct, the line, its text and a fix; no word of torch's own machinery."""
    message = str(error)
    assert error.construct.startswith(construct), error.construct
    (finding,) = error.report.findings if error.report else ()
    assert (finding.code, finding.severity) == (code, Severity.ERROR)
    assert not [word for word in _INTERNAL if word in message], message
    assert len(message.splitlines()) <= 6
    assert all(len(line) < 420 for line in message.splitlines())
    if where is not None:
        line = marked_line(where)
        assert (finding.location.file, finding.location.line) == (__file__, line)
        assert f"{__file__}:{line}: " in message
        assert finding.location.source in message


# --- what reads a tensor's value -------------------------------------------------------------------------------------


def if_statement(x: Tensor) -> Tensor:
    if x.sum() > 0:  # >>>
        return x
    return -x


def elif_statement(x: Tensor) -> Tensor:
    if x.shape[0] == 7:
        return x
    elif x.any():  # >>> # noqa: RET505
        return x + 1
    return -x


def while_statement(x: Tensor) -> Tensor:
    while x.sum() > 0:  # >>>
        x = x - 1
    return x


def conditional_expression(x: Tensor) -> Tensor:
    return x if not x.any() else -x  # >>>


def and_in_an_if(x: Tensor) -> Tensor:
    if x.shape[0] == 2 and x.sum() > 0:  # >>>
        return x
    return -x


def or_on_its_own(x: Tensor) -> Any:
    flag = x.any() or x.sum()  # >>>
    return x + flag


def not_on_its_own(x: Tensor) -> Any:
    flag = not x.any()  # >>>
    return x + flag


def in_a_comprehension(x: Tensor) -> Tensor:
    return torch.stack([row for row in x if row.sum() > 0])  # >>>


def contains(x: Tensor) -> Tensor:
    found = 3.0 in x  # >>>
    return x + found


def bool_call(x: Tensor) -> Any:
    flag = bool(x.sum() > 0)  # >>>
    return x + flag


def int_as_bound(n: Tensor, x: Tensor) -> Tensor:
    return x[:, : int(n)]  # >>>


def float_as_operand(n: Tensor, x: Tensor) -> Tensor:
    return x * float(n)  # >>>


def item_in_an_if(n: Tensor, x: Tensor) -> Tensor:
    count = n.item()
    if count > 1:  # >>>
        return x
    return -x


def range_over(n: Tensor, x: Tensor) -> Tensor:
    for _ in range(n):  # >>>
        x = x + 1
    return x


def list_index(n: Tensor, x: Tensor) -> Tensor:
    return [x, x + 1, x + 2][n]  # >>>


def dict_key(n: Tensor, x: Tensor) -> Tensor:
    return {2: x, 1: -x}[n.item()]  # >>>


def to_numpy(x: Tensor) -> Tensor:
    return torch.from_numpy(x.numpy() + 1)  # >>>


def to_numpy_over_cpu(x: Tensor) -> Tensor:
    y = x * 2
    z = (
        y.detach().cpu().numpy()  # >>>
    )
    return torch.from_numpy(z)


def numpy_array(x: Tensor) -> Tensor:
    return torch.tensor(np.array(x))  # >>>


def numpy_function(x: Tensor) -> Any:
    return torch.as_tensor(np.sqrt(x))  # >>>


def math_function(n: Tensor, x: Tensor) -> Tensor:
    return x * math.sqrt(n)  # >>>


def list_of_positions(i: Tensor, x: Tensor) -> Tensor:
    return x[:, i.tolist()]  # >>>


def python_sorted(i: Tensor, x: Tensor) -> Tensor:
    return x + sorted(i)[0]  # >>>


def python_max(i: Tensor, x: Tensor) -> Tensor:
    return x + max(i)  # >>>


def formatted(x: Tensor) -> Any:
    text = f"{x.sum():.3f}"  # >>>
    return x + len(text)


def write_with_bound(n: Tensor, x: Tensor) -> Tensor:
    y = x.clone()
    y[:, :n] = 0  # >>>
    return y


def read_with_bound(n: Tensor, x: Tensor) -> Tensor:
    return x[:, :n].sum()  # >>>


def narrow(n: Tensor, x: Tensor) -> Tensor:
    return x.narrow(1, n, 1)  # >>>


def size_of_a_mask(x: Tensor) -> Tensor:
    y = x[x > 2]
    if y.numel() > 0:  # >>>
        return y
    return x


def range_over_a_mask(x: Tensor) -> Any:
    y = x[x > 2]
    total = 0
    for k in range(y.shape[0]):  # >>>
        total = total + y[k]
    return total


def loop_over_nonzero(x: Tensor) -> Tensor:
    for row, _ in (x > 2).nonzero():  # >>>
        x = x + row
    return x


def length_of_nonzero(x: Tensor) -> Tensor:
    hits = x.nonzero()
    return x * len(hits)  # >>>


def torch_equal(x: Tensor) -> Tensor:
    if torch.equal(x, x + 1):  # >>>
        return x
    return -x


def torch_allclose(x: Tensor) -> Tensor:
    if torch.allclose(x, x + 1):  # >>>
        return x
    return -x


def one_hot(i: Tensor) -> Tensor:
    return F.one_hot(i)  # >>>


def split_by_value(i: Tensor, x: Tensor) -> Tensor:
    return torch.split(x, i[0].item(), dim=1)[0]  # >>>


def convolution_of_a_mask(x: Tensor) -> Tensor:
    rows = x[x[:, 0] > 1].unsqueeze(0)
    return F.conv1d(rows.transpose(1, 2), torch.ones(2, 3, 1))  # >>>


VALUES = [
    (if_statement, (X,), "if on a tensor's value", "NX401"),
    (elif_statement, (X,), "if on a tensor's value", "NX401"),
    (while_statement, (X,), "while on a tensor's value", "NX401"),
    (conditional_expression, (X,), "conditional expression on a tensor's value", "NX401"),
    (and_in_an_if, (X,), "if on a tensor's value", "NX401"),
    (or_on_its_own, (X,), "and/or on a tensor's value", "NX401"),
    (not_on_its_own, (X,), "not on a tensor's value", "NX401"),
    (in_a_comprehension, (X,), "if on a tensor's value", "NX401"),
    (contains, (X,), "in with a tensor's value", "NX401"),
    (bool_call, (X,), "bool() of a tensor", "NX401"),
    (int_as_bound, (N, X), "int() of a tensor", "NX402"),
    (float_as_operand, (N, X), "float() of a tensor", "NX402"),
    (item_in_an_if, (N, X), "if on a tensor's value", "NX401"),
    (range_over, (N, X), "range() of a tensor", "NX402"),
    (list_index, (N, X), "indexing with a tensor's value", "NX402"),
    (dict_key, (N, X), "indexing with a tensor's value", "NX402"),
    (to_numpy, (X,), ".numpy() of a tensor", "NX402"),
    (to_numpy_over_cpu, (X,), ".numpy() of a tensor", "NX402"),
    (numpy_array, (X,), "np.array() of a tensor", "NX402"),
    (numpy_function, (X,), "np.sqrt() takes a tensor to numpy", "NX402"),
    (math_function, (N, X), "math.sqrt() with a tensor's value as a Python number", "NX402"),
    (list_of_positions, (I, X), "indexing with a tensor's value", "NX402"),
    (python_sorted, (I, X), "sorted() of a tensor", "NX402"),
    (python_max, (I, X), "max() of a tensor", "NX402"),
    (formatted, (X,), "formatting a tensor's value", "NX402"),
    (write_with_bound, (N, X), "an assignment to a slice with a tensor as bound", "NX404"),
    pytest.param(read_with_bound, (N, X), "a slice with a tensor as bound", "NX404", marks=OLD_ONLY),
    (narrow, (N, X), ".narrow() of a tensor", "NX404"),
    (size_of_a_mask, (X,), "if on a size that depends on data", "NX403"),
    (range_over_a_mask, (X,), "range() of a size that depends on data", "NX403"),
    (loop_over_nonzero, (X,), "a loop over a tensor whose size depends on data", "NX403"),
    (length_of_nonzero, (X,), "len() of a tensor", "NX403"),
    (torch_equal, (X,), "torch.equal() of a tensor", "NX401"),
    (torch_allclose, (X,), "torch.allclose() of a tensor", "NX401"),
    (one_hot, (I,), "F.one_hot() of a tensor", "NX403"),
    (split_by_value, (I, X), "torch.split() of a tensor", "NX403"),
    pytest.param(
        convolution_of_a_mask, (X,), "F.conv1d() on a tensor whose size depends on data", "NX403", marks=OLD_ONLY
    ),
]


def _ids(case: Any) -> str:
    return str((case.values if hasattr(case, "values") and not isinstance(case, dict) else case)[0].__name__)


@pytest.mark.parametrize(("function", "args", "construct", "code"), VALUES, ids=[_ids(c) for c in VALUES])
def test_reading_a_value_names_the_construct(function: Any, args: tuple[Any, ...], construct: str, code: str) -> None:
    error = refused(Model(function), args)
    translated = translate(error, model_name="Model")
    check(translated, construct, code, function)
    assert translated.__cause__ is error
    assert "legacy trace" in str(translated)
    assert "Write instead: " in str(translated)


# --- what cannot be traced -------------------------------------------------------------------------------------------


@torch.library.custom_op("nxfx_test_errors::no_fake", mutates_args=())
def no_fake(x: Tensor) -> Tensor:
    return x.clone()


_LIBRARY = torch.library.Library("nxfx_test_errors", "FRAGMENT")
_LIBRARY.define("compiled(Tensor x) -> Tensor")
_LIBRARY.impl("compiled", lambda x: x.clone(), "CPU")


def python_custom_op(x: Tensor) -> Any:
    return torch.ops.nxfx_test_errors.no_fake(x)  # >>>


def compiled_custom_op(x: Tensor) -> Any:
    return torch.ops.nxfx_test_errors.compiled(x)  # >>>


class InNumpy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.from_numpy(x.detach().numpy() * 2)  # >>>

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients


def nested(x: Tensor) -> Tensor:
    return torch.nested.nested_tensor([x, x[:1]])  # >>>


def deep_copy(x: Tensor) -> Tensor:
    return copy.deepcopy(x) + 1  # >>>


def pointer(x: Tensor) -> Tensor:
    return x + x.untyped_storage().data_ptr()  # >>>


def data_attribute(x: Tensor) -> Tensor:
    return x.data + 1  # >>>


def tensor_of_tensors(x: Tensor) -> Tensor:
    return torch.tensor([x.sum(), x.mean()])  # >>>


def inner_backward(x: Tensor) -> Any:
    y = x.clone().requires_grad_()
    (y * y).sum().backward()  # >>>
    return y.grad


def pinned(x: Tensor) -> Tensor:
    return x.pin_memory()  # >>>


UNTRACEABLE = [
    (python_custom_op, "the custom operator nxfx_test_errors::no_fake without a fake implementation"),
    (compiled_custom_op, "the custom operator nxfx_test_errors::compiled without a fake implementation"),
    (nested, "a nested tensor"),
    (deep_copy, "copy.deepcopy() of a tensor"),
    (pointer, "the memory of a tensor"),
    (data_attribute, "a tensor that tracing cannot follow"),
    (tensor_of_tensors, "torch.tensor() of tensors"),
    (inner_backward, "autograd inside forward"),
    (pinned, "the operator aten._pin_memory"),
]


@pytest.mark.parametrize(("function", "construct"), UNTRACEABLE, ids=[_ids(c) for c in UNTRACEABLE])
def test_what_cannot_be_traced_is_named(function: Any, construct: str) -> None:
    check(translate(refused(Model(function), (X,))), construct, "NX409", function)


def own_generator(x: Tensor) -> Tensor:
    return x + torch.randn(x.shape, generator=GENERATOR)  # >>>


def packed_weights(x: Tensor) -> Any:
    return torch.ops.quantized.linear_dynamic(x, PACKED)  # >>>


GENERATOR = torch.Generator()
PACKED = torch.ops.quantized.linear_prepack(torch.quantize_per_tensor(torch.ones(4, 3), 0.1, 0, torch.qint8), None)
OBJECTS = [(own_generator, "a torch.Generator in forward", "NX405"), (packed_weights, "a TorchScript object", "NX409")]


@pytest.mark.parametrize(("function", "construct", "code"), OBJECTS, ids=[_ids(c) for c in OBJECTS])
def test_an_object_that_an_operator_takes_is_named(function: Any, construct: str, code: str) -> None:
    """torch.export makes it an input of the graph, which no compiler takes."""
    with pytest.raises(CaptureError) as caught:
        nxfx.prepare(Model(function), (X,))
    check(caught.value, construct, code, function)


def data_of_a_buffer(model: Any, x: Tensor) -> Any:
    model.held.data = x  # >>>
    return model.held * 2


def data_of_a_value(model: Any, x: Tensor) -> Any:
    y = x * 1
    y.data = x + 1  # >>>
    return y * 2


@pytest.mark.parametrize("function", [data_of_a_buffer, data_of_a_value])
def test_data_that_is_assigned_is_refused(function: Any) -> None:
    """torch.export goes on with what the tensor held before, and says nothing."""

    class Holder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("held", torch.zeros(4, 3))

        def forward(self, x: Tensor) -> Any:
            return function(self, x)

    with pytest.raises(CaptureError) as caught:
        nxfx.prepare(Holder(), (torch.ones(4, 3),))
    check(caught.value, "an assignment to .data", "NX409", function)


def test_a_generator_that_no_operator_takes_is_no_matter() -> None:
    model = Model(lambda x: x + 1)
    model.generator = torch.Generator()
    assert torch.equal(nxfx.prepare(model, (X,))(X), X + 1)


def test_a_custom_autograd_function_is_named_by_the_line_inside_it() -> None:
    error = translate(refused(Model(InNumpy.apply), (X,)))
    check(error, ".numpy() of a tensor", "NX402", InNumpy)


def test_a_lost_tensor_is_refused_before_it_ends_the_process() -> None:
    """``x.data`` gives a graph that does not read ``x``, and run_decompositions on that graph kills Python."""
    program = torch.export.export(Model(data_attribute), (X,), strict=True)
    problem = lost_tensor(program, model_name="Model")
    assert problem is not None
    check(problem, "a tensor that tracing cannot follow", "NX409", None)
    assert lost_tensor(torch.export.export(Model(lambda x: x + torch.ones(3)), (X,), strict=False)) is None
    with pytest.raises(CaptureError, match="a tensor that tracing cannot follow"):
        nxfx.prepare(Model(data_attribute), (X,))


# --- the model's own errors ------------------------------------------------------------------------------------------


def own_value_error(x: Tensor) -> Tensor:
    if x.shape[0] != 5:
        raise ValueError("expected 5 rows\nand more")  # >>>
    return x


def own_key_error(x: Tensor) -> Any:
    return {"a": x}["b"]  # >>>


def own_division(x: Tensor) -> Tensor:
    return x / (1 // 0)  # >>>


def own_attribute_error(x: Tensor) -> Any:
    return x.no_such_thing  # >>>


def own_type_error(x: Tensor) -> Any:
    return x + "a"  # >>>


def own_recursion(x: Tensor) -> Any:
    return own_recursion(x)  # >>>


def own_import(x: Tensor) -> Tensor:
    import no_such_module  # type: ignore[import-not-found]  # noqa: F401  # >>>

    return x


def out_of_memory(x: Tensor) -> Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 TiB")  # >>>


def wrong_matmul(x: Tensor) -> Tensor:
    return x @ x  # >>>


def wrong_broadcast(x: Tensor) -> Tensor:
    return x + torch.ones(4)  # >>>


def wrong_view(x: Tensor) -> Tensor:
    return x.view(4, -1)  # >>>


def wrong_index(x: Tensor) -> Tensor:
    return x[7]  # >>>


def wrong_call(x: Tensor) -> Tensor:
    return own_key_error(x, x)  # type: ignore[call-arg,no-any-return]  # >>>


OWN = [
    (own_value_error, "the model raises ValueError: expected 5 rows"),
    (own_key_error, "the model raises KeyError: 'b'"),
    (own_division, "the model raises ZeroDivisionError: integer division or modulo by zero"),
    (own_attribute_error, "the model raises AttributeError: 'Tensor' object has no attribute 'no_such_thing'"),
    (
        own_type_error,
        "an operation that does not fit its operands: unsupported operand type(s) for +: 'Tensor' and 'str'",
    ),
    (own_recursion, "the model raises RecursionError"),
    (own_import, "the model raises ModuleNotFoundError: No module named 'no_such_module'"),
    (out_of_memory, "memory ran out"),
    (wrong_matmul, "an operation that does not fit its operands: a and b must have same reduction dim"),
    (wrong_broadcast, "an operation that does not fit its operands: "),
    (wrong_view, "an operation that does not fit its operands: shape '[4, -1]' is invalid for input of size 6"),
    (wrong_index, "an operation that does not fit its operands: index 7 is out of bounds"),
    (wrong_call, "a call whose arguments do not fit: takes 1 positional argument but 2 were given"),
]


@pytest.mark.parametrize(("function", "construct"), OWN, ids=[_ids(c) for c in OWN])
def test_the_models_own_error_is_told_as_such(function: Any, construct: str) -> None:
    check(translate(refused(Model(function), (X,))), construct, "NX409", function)


def test_assertions_are_told_apart(tmp_path: Any) -> None:
    """An assert on a shape is the model's own error; one on a tensor reads a value."""
    file = tmp_path / "asserting.py"
    on_value_source = "def on_value(x):\n    assert x.sum() > 0, 'no'\n    return x\n"
    on_shape_source = "def on_shape(x):\n    assert x.shape[0] == 9, 'nine'\n    return x\n"
    file.write_text(on_value_source + "\n" + on_shape_source)
    namespace: dict[str, Any] = {}
    exec(compile(file.read_text(), str(file), "exec"), namespace)
    on_value = translate(refused(Model(namespace["on_value"]), (X,)))
    assert (on_value.construct, on_value.report.findings[0].code) == ("assert on a tensor's value", "NX407")  # type: ignore[union-attr]
    assert f"{file}:2: assert x.sum() > 0" in str(on_value)
    on_shape = translate(refused(Model(namespace["on_shape"]), (X,)))
    assert on_shape.construct == "the model raises AssertionError: nine"
    assert f"{file}:6: " in str(on_shape)


# --- boundary, state, dynamic shapes ---------------------------------------------------------------------------------


@dataclass
class Unknown:
    value: Any


class ReturnsUnknown(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return Unknown(x)  # >>>


class TakesUnknown(nn.Module):
    def forward(self, x: Tensor, other: Unknown) -> Tensor:  # >>>
        return x + other.value  # type: ignore[no-any-return]


class WritesPlainTensor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cache = torch.zeros(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.cache[0] = x[0]  # >>>
        return self.cache + x


class AssignsTensor(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        self.last = x * 2  # >>>
        return x + 1


class GrowsList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)  # >>>
        return x + 1


class LazyModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.LazyLinear(3)

    def forward(self, x: Tensor) -> Any:  # >>>
        return self.linear(x)


class TakesTwo(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


BOUNDARY = [
    (ReturnsUnknown, (X,), "an output of type Unknown", "NX409"),
    (TakesUnknown, (X, Unknown(X)), "an input of type Unknown", "NX409"),
    (WritesPlainTensor, (X,), "a write to the plain tensor attribute cache", "NX406"),
    pytest.param(AssignsTensor, (X,), "assignment to self.last in forward", "NX406", marks=OLD_ONLY),
    pytest.param(GrowsList, (X,), "a list or dict of the model that grows in forward", "NX406", marks=OLD_ONLY),
    (LazyModel, (X,), "a lazy module without its shapes", "NX409"),
]


@pytest.mark.parametrize(("model", "args", "construct", "code"), BOUNDARY, ids=[_ids(c) for c in BOUNDARY])
def test_refusals_without_a_frame_find_the_line_in_the_model(model: Any, args: Any, construct: str, code: str) -> None:
    instance = model()
    error = refused(instance, args)
    check(translate(error, model=instance), construct, code, model)
    without = translate(error)
    assert without.construct.startswith(construct)
    assert not without.report.findings[0].location.file  # type: ignore[union-attr]


def test_wrong_number_of_inputs() -> None:
    error = translate(refused(TakesTwo(), (X,)), model_name="TakesTwo")
    check(error, "a call whose arguments do not fit: missing a required argument: 'y'", "NX409", None)


@pytest.mark.parametrize(
    "tensor", [torch.nested.nested_tensor([X[0], X[1, :2]]), torch.quantize_per_tensor(X, 0.1, 0, torch.qint8)]
)
def test_kinds_of_tensors_that_cannot_be_inputs(tensor: Tensor) -> None:
    expected = "a nested tensor" if tensor.is_nested else "a quantised tensor"
    check(translate(refused(Model(lambda x: x + 1), (tensor,))), expected, "NX409", None)


class Fixed(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # >>>
        return x.view(2, 3) + 1


class Same(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # >>>
        return x + y


class Limited(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # >>>
        return x if x.shape[0] > 4 else -x


class Multiple(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # >>>
        return x.view(4, -1, 3)


@pytest.mark.parametrize(
    ("model", "rows", "limit", "construct", "fix"),
    [
        (Fixed, 2, None, "the dynamic dimension b can only be 2", "b = 2"),
        (Same, 8, None, "the dynamic dimension c (dimension 0 of y) must always equal b", "c = b"),
        (
            Limited,
            8,
            100,
            "the dynamic dimension b (dimension 0 of x) must be at least 5 and at most 100",
            "min=5, max=100",
        ),
        (Multiple, 8, None, "the dynamic dimension b (dimension 0 of x) must have the form 4*_b", "b = 4*_b"),
    ],
    ids=["fixed", "equal", "range", "multiple"],
)
def test_dynamic_shapes_name_the_dimension_and_the_constraint(
    model: Any, rows: int, limit: int | None, construct: str, fix: str
) -> None:
    b = Dim("b", min=2, max=limit) if limit else Dim("b")
    shapes = {"x": {0: b}, "y": {0: Dim("c")}}
    instance = model()
    error = refused(instance, (torch.ones(rows, 3), torch.ones(rows, 3)), dynamic_shapes=shapes)
    translated = translate(error, model=instance)
    check(translated, construct, "NX409", model)
    assert fix in translated.report.findings[0].fix  # type: ignore[union-attr]


def test_dynamic_shapes_for_an_argument_that_is_not_there() -> None:
    error = refused(TakesTwo(), (X, X), dynamic_shapes={"z": {0: Dim("b")}})
    check(translate(error), "dynamic_shapes that do not fit the inputs", "NX409", None)


# --- strict export, causes, unknown errors ---------------------------------------------------------------------------

STRICT = [
    (if_statement, (X,), "if on a tensor's value", "NX401"),
    (while_statement, (X,), "while on a tensor's value", "NX401"),
    (range_over, (N, X), "range() of a tensor", "NX402"),
    (torch_equal, (X,), "torch.equal() of a tensor", "NX401"),
    (wrong_matmul, (X,), "an operation that does not fit its operands: a and b must have same reduction dim", "NX409"),
]


@pytest.mark.parametrize(("function", "args", "construct", "code"), STRICT, ids=[_ids(c) for c in STRICT])
def test_strict_export_tells_the_same(function: Any, args: tuple[Any, ...], construct: str, code: str) -> None:
    check(translate(refused(Model(function), args, strict=True)), construct, code, function)


def test_an_unknown_error_is_told_with_its_line_and_first_line() -> None:
    class Strange(Exception):
        pass

    Strange.__module__ = "torch.somewhere"

    text = "a /usr/lib/python3/site-packages/torch/_export/x.py problem\n" + "wall of text\n" * 100

    def strange(x: Tensor) -> Tensor:
        raise Strange(text)  # >>>

    error = translate(refused(Model(strange), (X,)), model_name="Model")
    check(error, "an operation that torch.export refuses (Strange: a torch problem)", "NX409", strange)


def test_a_threads_tensor_has_no_line_but_a_name() -> None:
    def threaded(x: Tensor) -> Tensor:
        results: list[Tensor] = []
        thread = threading.Thread(target=lambda: results.append(x + 1))
        thread.start()
        thread.join()
        return results[0]

    error = translate(refused(Model(threaded), (X,)))
    assert error.construct.startswith("a tensor that tracing cannot follow")


def test_a_capture_error_is_returned_as_it_is_also_when_torch_wrapped_it() -> None:
    original = CaptureError("told already", construct="something")
    assert translate(original) is original
    wrapped = RuntimeError("torch's words")
    wrapped.__cause__ = original
    assert translate(wrapped) is original


def test_an_error_that_the_model_wrapped_is_unwrapped() -> None:
    def wrapping(x: Tensor) -> Tensor:
        try:
            if x.sum() > 0:  # >>>
                return x
        except Exception as error:
            raise ValueError("cannot decide") from error
        return -x

    check(translate(refused(Model(wrapping), (X,))), "if on a tensor's value", "NX401", wrapping)


def test_library_code_is_named_below_the_users_line(tmp_path: Any) -> None:
    """The user's own frame is preferred; the line at fault inside an installed library is told as well."""
    package = tmp_path / "site-packages"
    package.mkdir()
    library = package / "library.py"
    library.write_text("def helper(x):\n    if x.sum() > 0:\n        return x\n    return -x\n")
    namespace: dict[str, Any] = {}
    exec(compile(library.read_text(), str(library), "exec"), namespace)

    def calls_library(x: Tensor) -> Any:
        return namespace["helper"](x)  # >>>

    error = translate(refused(Model(calls_library), (X,)), model_name="Model")
    check(error, "if on a tensor's value", "NX401", calls_library)
    assert f"in library code: {library}:2: if x.sum() > 0:" in str(error)


def test_the_error_can_be_pickled_and_its_report_written() -> None:
    error = translate(refused(Model(if_statement), (X,)), model_name="Model")
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error)
    assert again.construct == error.construct
    assert "NX401" in str(again.report)
    assert "if on a tensor's value" in again.report.to_json()


# --- syntax ----------------------------------------------------------------------------------------------------------


class Refuses:
    """Stands for a tensor: whatever asks for its value raises."""

    def _no(self, *_: Any) -> Any:
        raise LookupError

    __bool__ = __int__ = __float__ = __index__ = __len__ = __iter__ = __contains__ = __format__ = _no
    __getitem__ = __setitem__ = item = _no

    def any(self) -> Refuses:
        return self

    def __gt__(self, other: Any) -> Refuses:
        return self


SNIPPETS = [
    ("if t.any(): pass", "if", ""),
    ("while not t.any(): pass", "while", ""),
    ("x = 1 if t and True else 2", "conditional", ""),
    ("x = not t", "not", ""),
    ("x = t and 1", "and-or", ""),
    ("x = [q for q in [1] if t > q]", "if", ""),
    ("x = 3 in t", "in", ""),
    ("x = int(t)", "call", "int"),
    ("if isinstance(t, int) or int(t) > 3: pass", "call", "int"),
    ("x = max(\n        [float(t)])", "call", "float"),
    ("x = (t.any()\n       .item())", "call", ".item"),
    ("for i in range(t): pass", "call", "range"),
    ("for a in t: pass", "loop", ""),
    ("a, b = t", "loop", ""),
    ("x = f'{t:.3f}'", "format", ""),
    ("x = t[0]", "read", ""),
    ("x = t[1:n]", "slice", ""),
    ("x = [1, 2][t]", "read", ""),
    ("t[:n] = 4", "write", ""),
    ("raise LookupError", "raise", ""),
    ("x = ('ä' * 3, int(t))", "call", "int"),
]


@pytest.mark.parametrize(("code", "kind", "name"), SNIPPETS, ids=[s[0].split("\n")[0] for s in SNIPPETS])
def test_the_construct_is_read_from_the_syntax(tmp_path: Any, code: str, kind: str, name: str) -> None:
    """Run by whatever Python runs the tests: bytecode and column information differ from one version to the next."""
    file = tmp_path / "snippet.py"
    file.write_text(f"n = 2\ndef run(t):\n    {code}\n", encoding="utf-8")
    namespace: dict[str, Any] = {}
    exec(compile(file.read_text(encoding="utf-8"), str(file), "exec"), namespace)
    with pytest.raises(LookupError) as caught:
        namespace["run"](Refuses())
    trace = caught.value.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_name != "run":
        trace = trace.tb_next
    while trace is not None and trace.tb_next is not None and trace.tb_next.tb_frame.f_code.co_filename == str(file):
        trace = trace.tb_next
    assert trace is not None
    place = syntax.Place(str(file), trace.tb_lineno, "run", *syntax.instruction(trace.tb_frame.f_code, trace.tb_lasti))
    found = syntax.construct_at(place)
    assert (found.kind, found.name) == (kind, name)


def test_a_file_without_source_gives_no_construct() -> None:
    assert syntax.construct_at(syntax.Place("<nowhere>", 3)).kind == ""
