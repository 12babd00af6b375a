"""The comparison catches every kind of difference, calls equal what is equal, and says where and how much."""

from __future__ import annotations

import collections
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from nxfx.errors import UsageError
from nxfx.verification.equivalence import Comparison, ErrorStats, compare, error_against, ulp_distance
from tests.tools import corner_inputs, float_corners, int_corners, nasty_like, random_like

INF, NAN = math.inf, math.nan
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
FP8 = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]
INTS = [torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64, torch.uint64]
COMPLEX = [torch.complex64, torch.complex128]
ALL_DTYPES = [*FLOATS, *FP8, *INTS, *COMPLEX, torch.bool]
INEXACT = ["refines", "reassociated", "close"]
LOOSE = {"max_abs": 1e300, "mean_abs": 1e300, "max_ulp": 2**62}

Point = collections.namedtuple("Point", "x y")


@dataclass
class Boxed:
    logits: Any
    loss: Any = None


class Cache:
    """What a key/value cache looks like: no pytree node, no dataclass, no ``__eq__``."""

    def __init__(self, *keys: torch.Tensor, seen: int = 0) -> None:
        self.layers = [{"keys": key} for key in keys]
        self.seen = seen
        self.owner = self  # a cycle


class Slotted:
    __slots__ = ("__secret", "value")

    def __init__(self, value: torch.Tensor, secret: int) -> None:
        self.value = value
        self.__secret = secret


class Tagged(dict):  # type: ignore[type-arg]
    """A mapping that carries state outside its items."""

    def __init__(self, items: dict[str, Any], tag: str) -> None:
        super().__init__(items)
        self.tag = tag


def name_of(value: object) -> str:
    return str(value).removeprefix("torch.")


def floats(*values: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def only_mismatch(result: Comparison) -> str:
    assert not result.ok
    assert not result
    assert len(result.mismatches) == 1, str(result)
    return result.mismatches[0]


def flip_lowest_bit(t: torch.Tensor, *index: int) -> torch.Tensor:
    """``t`` with one bit changed in one element."""
    changed = t.clone(memory_format=torch.contiguous_format)
    raw = changed.reshape(-1).view(torch.uint8).reshape(*t.shape, t.element_size())
    raw[(*index, 0)] ^= 1
    return raw.reshape(-1).view(t.dtype).reshape(t.shape)


# --- structure -------------------------------------------------------------------------------------------------------

T = torch.ones(2)
STRUCTURES = {
    "one-output-fewer": ((T, T), (T,), "output: structure differs: expected 2 item(s), actual 1: missing [1]"),
    "one-output-more": ([T], [T, T], "output: structure differs: expected 1 item(s), actual 2: unexpected [1]"),
    "no-outputs": ((T,), (), "output: structure differs: expected 1 item(s), actual 0: missing [0]"),
    "tensor-for-tuple": (T, (T,), "output: structure differs: expected Tensor float32 [2], actual tuple of 1 item(s)"),
    "list-for-tuple": ((T,), [T], "expected tuple of 1 item(s), actual list of 1 item(s)"),
    "tuple-for-namedtuple": (Point(T, T), (T, T), "expected Point of 2 item(s), actual tuple of 2 item(s)"),
    "None-for-tensor": (
        {"a": T},
        {"a": None},
        "output['a']: structure differs: expected Tensor float32 [2], actual None",
    ),
    "key-missing": ({"a": T, "b": T}, {"a": T}, "missing ['b']"),
    "key-renamed": ({"a": T}, {"b": T}, "missing ['a']; unexpected ['b']"),
    "key-of-another-type": ({1: T}, {"1": T}, "missing [1]; unexpected ['1']"),
    "keys-in-another-order": (
        {"a": T, "b": T},
        {"b": T, "a": T},
        "expected order ['a'], ['b'], actual order ['b'], ['a']",
    ),
    "nested-count": ((T, [T, T]), (T, [T]), "output[1]: structure differs: expected 2 item(s), actual 1"),
    "dataclass-field-None": (Boxed(T, T), Boxed(T), "output.loss: structure differs: expected Tensor float32 [2]"),
    "fewer-layers-in-cache": (Cache(T, T), Cache(T), "output.layers: structure differs: expected 2 item(s), actual 1"),
    "number-for-0-d-tensor": (torch.tensor(1.0), 1.0, "expected Tensor float32 [], actual float 1.0"),
}


@pytest.mark.parametrize(("expected", "actual", "message"), STRUCTURES.values(), ids=STRUCTURES)
@pytest.mark.parametrize("kind", ["exact", "close"])
def test_structure_difference_is_caught(expected: Any, actual: Any, message: str, kind: Any) -> None:
    assert message in only_mismatch(compare(expected, actual, kind=kind, **(LOOSE if kind == "close" else {})))


def test_outputs_are_still_compared_where_the_structure_differs() -> None:
    result = compare({"a": floats(1), "b": floats(1)}, {"a": floats(2)})
    assert len(result.mismatches) == 2
    assert "missing ['b']" in result.mismatches[0]
    assert result.mismatches[1].startswith("output['a']: bits differ")


LEAVES = {
    "int": (1, 2, "output: value differs: expected 1, actual 2"),
    "int-for-bool": (True, 1, "output: structure differs: expected bool True, actual int 1"),
    "int-for-float": (1.0, 1, "expected float 1.0, actual int 1"),
    "string": (["x"], ["y"], "output[0]: value differs: expected 'x', actual 'y'"),
    "float-by-one-bit": (1.0, 1.0 + 2**-52, "output: bits differ"),
    "float-sign-of-zero": (0.0, -0.0, "output: signs of zeros differ"),
    "float-nan": (NAN, 1.0, "output: NaN positions differ"),
    "complex-sign-of-zero": (complex(1, 0.0), complex(1, -0.0), "output: signs of zeros differ"),
    "dtype-object": (torch.int32, torch.int64, "expected torch.int32, actual torch.int64"),
    "device-object": (torch.device("cpu"), torch.device("meta"), "output: device differs: expected cpu, actual meta"),
    "torch.Size": (torch.Size([2, 3]), torch.Size([2, 4]), "output[1]: value differs: expected 3, actual 4"),
    "set": ({1, 2}, {1, 3}, "expected {1, 2}, actual {1, 3}"),
    "numpy-dtype": (np.ones(2, np.float32), np.ones(2, np.float64), "output: dtype differs"),
    "numpy-values": (np.array([1, 2]), np.array([1, 3]), "output: values differ at 1 of 2 element(s), first at [1]"),
    "numpy-strings": (np.array(["a"]), np.array(["b"]), "output: value differs"),
    "dataclass-field": (Boxed(T, 1), Boxed(T, 2), "output.loss: value differs: expected 1, actual 2"),
    "attribute": (Cache(T, seen=1), Cache(T, seen=2), "output.seen: value differs: expected 1, actual 2"),
    "private-slot": (Slotted(T, 1), Slotted(T, 2), "output._Slotted__secret: value differs: expected 1, actual 2"),
    "attribute-of-mapping": (Tagged({"a": T}, "x"), Tagged({"a": T}, "y"), "output.tag: value differs"),
}


@pytest.mark.parametrize(("expected", "actual", "message"), LEAVES.values(), ids=LEAVES)
def test_python_value_difference_is_caught(expected: Any, actual: Any, message: str) -> None:
    assert message in only_mismatch(compare(expected, actual))


CONTAINERS = {
    "tuple": lambda t: (T, t),
    "list": lambda t: [T, t],
    "dict": lambda t: {"a": T, "b": t},
    "namedtuple": lambda t: Point(T, t),
    "OrderedDict": lambda t: collections.OrderedDict(a=T, b=t),
    "deque": lambda t: collections.deque([T, t]),
    "dataclass": lambda t: Boxed(T, t),
    "cache-like-object": lambda t: Cache(T, t),
    "slots": lambda t: Slotted(t, 1),
    "mapping-with-attributes": lambda t: Tagged({"a": T, "b": t}, "x"),
    "torch.return_types": lambda t: torch.return_types.max([T, t]),
    "jagged-nested-tensor": lambda t: torch.nested.nested_tensor([t, t[:1]], layout=torch.jagged),
}


@pytest.mark.parametrize("build", CONTAINERS.values(), ids=CONTAINERS)
def test_tensors_are_found_in_every_container(build: Any) -> None:
    assert compare(build(floats(1, 2)), build(floats(1, 2))).ok
    assert "bits differ" in str(compare(build(floats(1, 2)), build(flip_lowest_bit(floats(1, 2), 0))))


class Registered:
    """A pytree node: its children and context are the output, its scratch space is not."""

    def __init__(self, value: torch.Tensor, context: str) -> None:
        self.value, self.context, self.scratch = value, context, object()


torch.utils._pytree.register_pytree_node(
    Registered, lambda node: ([node.value], node.context), lambda children, context: Registered(*children, context)
)


def test_pytree_node_is_compared_by_children_and_context() -> None:
    assert compare(Registered(T, "a"), Registered(T, "a")).ok
    assert "output[0]: bits differ" in only_mismatch(compare(Registered(T, "a"), Registered(2 * T, "a")))
    assert "output.<context>: value differs" in only_mismatch(compare(Registered(T, "a"), Registered(T, "b")))


def test_cycle_is_walked_once() -> None:
    one, other = Cache(T), Cache(T)
    one.owner, other.owner = Cache(T), other
    one.owner.owner = one  # twice as long a cycle, the same values all the way round
    assert compare(one, other).ok
    one.owner.seen = 1
    assert only_mismatch(compare(one, other)).startswith("output.owner.seen: value differs")


def test_transformers_outputs_and_caches_are_searched() -> None:
    transformers = pytest.importorskip("transformers")
    outputs = pytest.importorskip("transformers.modeling_outputs")

    def output(logit: float, key: float) -> Any:
        cache = transformers.DynamicCache()
        cache.update(torch.full((1, 1, 2, 2), float(key)), torch.ones(1, 1, 2, 2), 0)
        return outputs.CausalLMOutputWithPast(logits=floats(logit), past_key_values=cache)

    assert compare(output(1, 1), output(1, 1)).ok
    assert only_mismatch(compare(output(1, 1), output(2, 1))).startswith("output['logits']: bits differ")
    name = next(k for k in ("cache", "past_key_values") if k in output(1, 1))  # renamed in transformers 5.24
    assert only_mismatch(compare(output(1, 1), output(1, 2))).startswith(
        f"output['{name}'].layers[0].keys: bits differ at 4 of 4 element(s), first at [0, 0, 0, 0]"
    )


# --- tensors, exact --------------------------------------------------------------------------------------------------

METADATA = {
    "dtype-wider": (floats(1, 2), floats(1, 2).double(), ["dtype differs: expected float32, actual float64"]),
    "dtype-narrower-int": (torch.ones(2, dtype=torch.int64), torch.ones(2, dtype=torch.int32), ["dtype differs"]),
    "dtype-of-equal-bits": (floats(0), torch.zeros(1, dtype=torch.int32), ["dtype differs"]),
    "shape-broadcastable": (torch.ones(2, 3), torch.ones(1, 3), ["shape differs: expected [2, 3], actual [1, 3]"]),
    "shape-0-d": (torch.ones(1), torch.ones(()), ["shape differs: expected [1], actual []"]),
    "shape-same-numel": (torch.ones(2, 3), torch.ones(3, 2), ["shape differs"]),
    "shape-of-empty": (torch.ones(0, 3), torch.ones(3, 0), ["shape differs: expected [0, 3], actual [3, 0]"]),
    "layout": (torch.eye(2), torch.eye(2).to_sparse(), ["layout differs"]),
    "meta": (
        torch.ones(2),
        torch.ones(2, device="meta"),
        ["device differs: expected cpu, actual meta", "cannot compare"],
    ),
    "dtype-and-shape": (floats(1), torch.ones(2, dtype=torch.int64), ["dtype differs", "shape differs"]),
}


@pytest.mark.parametrize(("expected", "actual", "messages"), METADATA.values(), ids=METADATA)
@pytest.mark.parametrize("kind", ["exact", "close"])
def test_metadata_difference_is_caught(expected: Any, actual: Any, messages: list[str], kind: Any) -> None:
    result = compare(expected, actual, kind=kind, **(LOOSE if kind == "close" else {}))
    assert len(result.mismatches) == len(messages)
    for line, message in zip(result.mismatches, messages, strict=True):
        assert line.startswith(f"output: {message}")


def test_two_meta_tensors_are_never_called_equal() -> None:
    meta = torch.ones(2, device="meta")
    result = compare(meta, meta)
    assert len(result.mismatches) == 2
    assert all("cannot compare values" in line for line in result.mismatches)


def test_fake_tensors_are_never_called_equal() -> None:
    with torch._subclasses.fake_tensor.FakeTensorMode() as mode:
        fake = mode.from_tensor(torch.ones(2))
    assert "actual is a meta, fake or quantized tensor" in only_mismatch(compare(torch.ones(2), fake))


def test_device_check_can_be_left_out() -> None:
    assert compare(torch.device("cpu"), torch.device("meta"), check_device=False).ok
    meta = compare(torch.ones(2), torch.ones(2, device="meta"), check_device=False)
    assert "cannot compare values" in only_mismatch(meta)


SPECIAL = {
    "nan-appears": ((1, 2, 3), (1, NAN, 3), "NaN positions", "at [1]: expected 2.0, actual nan"),
    "nan-vanishes": ((NAN, 2, 3), (0, 2, 3), "NaN positions", "at [0]: expected nan, actual 0.0"),
    "inf-to-nan": ((INF, 2, 3), (NAN, 2, 3), "NaN positions", "at [0]: expected inf, actual nan"),
    "inf-sign": ((1, 2, INF), (1, 2, -INF), "infinities", "at [2]: expected inf, actual -inf"),
    "inf-appears": ((1, 2, 3), (1, INF, 3), "infinities", "at [1]: expected 2.0, actual inf"),
    "inf-vanishes": ((-INF, 2, 3), (-9, 2, 3), "infinities", "at [0]: expected -inf, actual -9.0"),
    "minus-zero": ((0.0, 1, 1), (-0.0, 1, 1), "signs of zeros", "at [0]: expected 0.0, actual -0.0"),
    "plus-zero": ((1, 1, -0.0), (1, 1, 0.0), "signs of zeros", "at [2]: expected -0.0, actual 0.0"),
}


@pytest.mark.parametrize(("expected", "actual", "what", "where"), SPECIAL.values(), ids=SPECIAL)
@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("kind", ["exact", *INEXACT])
def test_special_value_difference_is_caught_in_every_kind(
    expected: tuple[float, ...], actual: tuple[float, ...], what: str, where: str, dtype: torch.dtype, kind: Any
) -> None:
    bounds = {} if kind == "exact" else LOOSE
    result = compare(floats(*expected, dtype=dtype), floats(*actual, dtype=dtype), kind=kind, **bounds)
    assert only_mismatch(result) == f"output: {what} differ at 1 of 3 element(s), first {where}"


def test_moved_nan_is_caught_though_the_count_agrees() -> None:
    line = only_mismatch(compare(floats(1, NAN, 1), floats(1, 1, NAN)))
    assert line == "output: NaN positions differ at 2 of 3 element(s), first at [1]: expected nan, actual 1.0"


@pytest.mark.parametrize("component", ["real", "imag"])
@pytest.mark.parametrize(
    ("value", "message"),
    [(NAN, "NaN positions"), (INF, "infinities"), (-0.0, "signs of zeros"), (1e-3, "bits")],
    ids=["nan", "inf", "minus-zero", "bits"],
)
def test_complex_difference_is_caught_in_either_component(component: str, value: float, message: str) -> None:
    expected, actual = torch.zeros(2, 2, dtype=torch.complex64), torch.zeros(2, 2, dtype=torch.complex64)
    getattr(actual, component)[1, 0] = value
    line = only_mismatch(compare(expected, actual))
    assert line.startswith(f"output: {message} differ at 1 of 4 element(s), first at [1, 0]")


@pytest.mark.parametrize("dtype", [*FLOATS, *FP8, *INTS, *COMPLEX], ids=name_of)
def test_one_bit_is_caught_and_located(dtype: torch.dtype) -> None:
    expected = torch.tensor([[1, 2, 3], [4, 5, 6]]).to(dtype)
    line = only_mismatch(compare((T, expected), (T, flip_lowest_bit(expected, 1, 0))))
    assert line.startswith("output[1]: ")
    assert "differ at 1 of 6 element(s), first at [1, 0]: expected" in line


def test_exact_message_gives_both_values_and_the_size_of_the_error() -> None:
    line = only_mismatch(compare({"logits": floats(1, 2)}, {"logits": floats(1, 2 + 2**-22)}))
    assert line == (
        "output['logits']: bits differ at 1 of 2 element(s), first at [1]: "
        "expected 2.0, actual 2.000000238418579 (largest error 2.38419e-07, 1 ulp)"
    )


def test_one_tensor_can_have_several_named_differences() -> None:
    lines = compare(floats(NAN, INF, 0.0, 1), floats(0, -INF, -0.0, 2)).mismatches
    named = [line.removeprefix("output: ").split(" differ")[0] for line in lines]
    assert named == ["NaN positions", "infinities", "signs of zeros", "bits"]
    assert all("at 1 of 4 element(s)" in line for line in lines)


def test_subnormals_are_not_zero() -> None:
    assert "bits differ" in only_mismatch(compare(floats(2**-149), floats(0)))


def test_bool_difference_is_caught() -> None:
    line = only_mismatch(compare(torch.tensor([True, False]), torch.tensor([True, True])))
    assert line == "output: values differ at 1 of 2 element(s), first at [1]: expected False, actual True"


def test_0_d_difference_is_caught() -> None:
    assert "at 1 of 1 element(s), first at []: expected 1, actual 2" in only_mismatch(
        compare(torch.tensor(1), torch.tensor(2))
    )


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint64], ids=name_of)
def test_large_integers_are_compared_without_rounding(dtype: torch.dtype) -> None:
    one, other = torch.tensor([2**62], dtype=dtype), torch.tensor([2**62 + 1], dtype=dtype)
    assert f"expected {2**62}, actual {2**62 + 1}" in only_mismatch(compare(one, other))


@pytest.mark.parametrize("dtype", [torch.float8_e8m0fnu, torch.float4_e2m1fn_x2], ids=name_of)
def test_floats_without_arithmetic_are_compared_by_bits(dtype: torch.dtype) -> None:
    one, copy, other = (torch.tensor([3, last], dtype=torch.uint8).view(dtype) for last in (4, 4, 5))
    for options in ({}, {"kind": "close", **LOOSE}):
        assert compare(one, copy, **options).ok
        line = only_mismatch(compare(one, other, **options))
        assert line == "output: values differ at 1 of 2 element(s), first at [1]: expected 0x4, actual 0x5"


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=name_of)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (2, 40)], ids=str)
def test_copies_of_nasty_tensors_are_equal(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    t = nasty_like(torch.zeros(shape, dtype=dtype), seed=1)
    assert compare(t, t.clone()).ok
    assert compare(t, t.clone(), kind="close", max_abs=0, mean_abs=0, max_rel=0, max_ulp=0).ok


def test_nan_payload_and_sign_do_not_count() -> None:
    payloads = torch.tensor([0x7FC00000, 0x7FC00001, -0x400000], dtype=torch.int32).view(torch.float32).split(1)
    assert all(bool(t.isnan()) for t in payloads)
    assert compare(payloads[0], payloads[1]).ok
    assert compare(payloads[0], payloads[2]).ok


STRIDES = {
    "transposed": lambda t: t.t().contiguous().t(),
    "every-second": lambda t: t.repeat_interleave(2, 0)[::2],
    "offset": lambda t: torch.cat([t[:1], t])[1:],
    "requires-grad": lambda t: t.clone().requires_grad_(),
    "parameter": lambda t: torch.nn.Parameter(t.clone()),
    "lazy-negative": lambda t: torch._neg_view(-t),
}


@pytest.mark.parametrize("restride", STRIDES.values(), ids=STRIDES)
def test_memory_layout_and_gradients_do_not_count_but_values_do(restride: Any) -> None:
    t = random_like(torch.zeros(3, 4), seed=0)
    assert compare(t, restride(t)).ok
    assert "at 1 of 12 element(s), first at [2, 1]" in only_mismatch(compare(t, restride(flip_lowest_bit(t, 2, 1))))


def test_lazy_conjugate_is_resolved() -> None:
    z = random_like(torch.zeros(3, dtype=torch.complex64), seed=0)
    assert compare(z.conj().resolve_conj(), z.conj()).ok
    assert "bits differ at 3 of 3" in only_mismatch(compare(z, z.conj()))


def test_sparse_tensors_are_compared_by_value() -> None:
    eye, other = torch.eye(2).to_sparse(), (2 * torch.eye(2)).to_sparse()
    assert compare(eye, eye.clone()).ok
    assert "bits differ at 2 of 4 element(s), first at [0, 0]" in only_mismatch(compare(eye, other))


# --- tensors, with bounds --------------------------------------------------------------------------------------------

BOUNDS = {
    "max_abs": (floats(1, 2, 4), floats(1, 2.5, 4.25), 0.5, "max_abs 0.5 > 0.25 at 1 of 3 element(s), first at [1]"),
    "mean_abs": (floats(1, 2, 4, 8), floats(1, 2, 4, 10), 0.5, "mean_abs 0.5 > 0.25"),
    "max_rel": (floats(1, -2, 4), floats(1, -3, 4.5), 0.5, "max_rel 0.5 > 0.25 at 1 of 3 element(s), first at [1]"),
    "max_ulp": (floats(1, 2), floats(1, 2 + 2**-20), 4, "max_ulp 4 > 2 at 1 of 2 element(s), first at [1]"),
}


@pytest.mark.parametrize("kind", INEXACT)
@pytest.mark.parametrize(("bound", "case"), BOUNDS.items(), ids=BOUNDS)
def test_bound_holds_at_the_error_and_fails_below_it(bound: str, case: Any, kind: Any) -> None:
    expected, actual, error, message = case
    assert compare(expected, actual, kind=kind, **{bound: error}).ok
    result = compare(expected, actual, kind=kind, **{bound: error / 2})
    assert only_mismatch(result).startswith(f"output: {message}")


def test_every_bound_given_must_hold() -> None:
    result = compare(floats(1), floats(2), kind="close", max_abs=10, max_rel=0.5, max_ulp=1)
    assert [line.split()[1] for line in result.mismatches] == ["max_rel", "max_ulp"]


def test_relative_error_of_zero_is_infinite() -> None:
    assert "max_rel inf > 1000" in only_mismatch(compare(floats(0), floats(1e-30), kind="close", max_rel=1000))


def test_special_values_do_not_dilute_the_mean() -> None:
    expected, actual = floats(NAN, INF, -INF, 1), floats(NAN, INF, -INF, 2)
    result = compare(expected, actual, kind="close", mean_abs=0.75)
    assert "mean_abs 1 > 0.75" in only_mismatch(result)
    assert result.measures["output"].mean_abs == 1.0


def test_overflowing_difference_is_an_infinite_error() -> None:
    largest = torch.finfo(torch.float64).max
    pair = (floats(largest, dtype=torch.float64), floats(-largest, dtype=torch.float64))
    assert "max_abs inf > 1e+300" in only_mismatch(compare(*pair, kind="close", max_abs=1e300))


@pytest.mark.parametrize("dtype", [*INTS, torch.bool], ids=name_of)
def test_integers_get_no_tolerance(dtype: torch.dtype) -> None:
    one, other = torch.zeros(2, dtype=dtype), torch.ones(2, dtype=dtype)
    assert "values differ at 2 of 2" in only_mismatch(compare(one, other, kind="close", **LOOSE))


@pytest.mark.parametrize("dtype", [*FP8, *COMPLEX], ids=name_of)
def test_bounds_reach_fp8_and_complex(dtype: torch.dtype) -> None:
    one, other = floats(1, 1).to(dtype), floats(1, 1.5).to(dtype)
    assert compare(one, other, kind="close", max_abs=0.5, max_rel=0.5).ok
    assert "max_abs 0.5 > 0.25" in only_mismatch(compare(one, other, kind="close", max_abs=0.25))


def test_python_floats_obey_bounds() -> None:
    assert compare([1.0], [1.5], kind="close", max_abs=0.5).ok
    assert "output[0]: max_abs 0.5 > 0.25" in only_mismatch(compare([1.0], [1.5], kind="close", max_abs=0.25))


def test_signs_of_zeros_can_be_left_out_of_bounded_kinds() -> None:
    assert compare(floats(0.0), floats(-0.0), kind="close", max_abs=0, signed_zeros=False).ok
    assert not compare(floats(0.0), floats(-0.0), kind="close", max_abs=0)


def test_measures_are_kept_for_the_report() -> None:
    result = compare({"a": floats(1, 2), "n": 3}, {"a": floats(1, 2.5), "n": 3}, kind="close", max_abs=1)
    assert result.ok
    assert result.leaves == 2
    assert list(result.measures) == ["output['a']"]
    measures = result.measures["output['a']"]
    assert (measures.max_abs, measures.mean_abs, measures.max_rel, measures.max_ulp) == (0.5, 0.25, 0.25, 2**21)


def test_text_of_the_verdict() -> None:
    assert str(compare((T, 1), (T, 1))) == "exact: 2 output(s) agree"
    assert str(compare(1, 2)) == "exact: 1 mismatch(es)\n  output: value differs: expected 1, actual 2"


MISUSES = {
    "unknown-kind": {"kind": "equal"},
    "bound-for-exact": {"max_abs": 1.0},
    "unsigned-zeros-for-exact": {"signed_zeros": False},
    "close-without-bound": {"kind": "close"},
    "refines-without-bound": {"kind": "refines"},
    "reference-for-close": {"kind": "close", "max_abs": 1.0, "reference": floats(1)},
    "negative-bound": {"kind": "close", "max_abs": -1.0},
    "nan-bound": {"kind": "close", "max_abs": NAN},
    "infinite-bound": {"kind": "close", "max_abs": INF},
}


@pytest.mark.parametrize("options", MISUSES.values(), ids=MISUSES)
def test_options_that_would_not_be_applied_are_refused(options: Any) -> None:
    with pytest.raises(UsageError):
        compare(floats(1), floats(1), **options)


# --- against float64 -------------------------------------------------------------------------------------------------


def refine(eager: torch.Tensor, refined: torch.Tensor, reference: torch.Tensor) -> Comparison:
    return compare({"y": eager}, {"y": refined}, kind="refines", reference={"y": reference})


def test_refinement_may_differ_from_eager_as_long_as_it_is_nearer_the_truth() -> None:
    truth = torch.linspace(0, 1, 1000, dtype=torch.float64)
    near, far = (truth + 1e-4).float(), (truth + 1e-3).float()
    assert refine(far, near, truth).ok
    lines = refine(near, far, truth).mismatches
    assert len(lines) == 2
    assert lines[0].startswith("output['y']: mean error against float64 grew from 0.0001 to 0.001")
    assert lines[1].startswith("output['y']: 99.9th percentile of the error against float64 grew")


def test_refinement_has_two_percent_of_slack() -> None:
    truth = torch.zeros(1000, dtype=torch.float64)
    eager = torch.full((1000,), 1.0)
    assert refine(eager, torch.full((1000,), 1.0195), truth).ok
    assert not refine(eager, torch.full((1000,), 1.0205), truth)


def test_refinement_tail_counts_apart_from_the_mean() -> None:
    truth = torch.zeros(1000, dtype=torch.float64)
    eager, refined = torch.ones(1000), torch.full((1000,), 0.5)
    refined[:2] = 10.0
    assert "99.9th percentile" in only_mismatch(refine(eager, refined, truth))
    refined[1] = 0.5  # a single element may lose by luck
    assert refine(eager, refined, truth).ok


def test_refinement_shared_overflow_does_not_hide_other_errors() -> None:
    truth = floats(1e6, 1.0, dtype=torch.float64)
    eager, refined = floats(INF, 1.0, dtype=torch.float16), floats(INF, 2.0, dtype=torch.float16)
    assert refine(eager, eager, truth).ok
    assert "grew from 0 to 1" in str(refine(eager, refined, truth))


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ({"z": floats(1).double()}, "missing ['y']"),
        ({"y": floats(1)}, "the reference must be float64 or complex128, not float32"),
        ({"y": floats(1, 1).double()}, "shapes differ: reference [2], value [1]"),
        ({}, "no reference for this output"),
    ],
    ids=["other-name", "float32", "other-shape", "absent"],
)
def test_unusable_reference_is_a_mismatch(reference: Any, message: str) -> None:
    assert message in str(compare({"y": floats(1)}, {"y": floats(1)}, kind="refines", reference=reference))


def test_error_against_counts_and_measures() -> None:
    reference = torch.zeros(2000, dtype=torch.float64)
    value = torch.zeros(2000, dtype=torch.bfloat16)
    value[:3] = torch.tensor([4.0, 2.0, 1.0])
    assert error_against(reference, value) == ErrorStats(max=4.0, mean=7 / 2000, p999=1.0, nan_mismatch=0)


def test_error_against_special_values() -> None:
    reference = floats(NAN, NAN, 1, INF, INF, INF, dtype=torch.float64)
    value = floats(NAN, 1, NAN, INF, INF, INF)
    assert error_against(reference, value) == ErrorStats(0.0, 0.0, 0.0, nan_mismatch=2)
    value[3] = -INF
    assert error_against(reference, value).max == INF
    value[3] = 5.0
    assert error_against(reference, value).max == INF


def test_error_against_complex_and_empty() -> None:
    reference, value = torch.tensor([3 + 4j], dtype=torch.complex128), torch.tensor([0j], dtype=torch.complex64)
    assert error_against(reference, value).max == 5.0
    infinite = torch.tensor([complex(INF, 1), complex(INF, 2)], dtype=torch.complex128)
    assert error_against(infinite[:1], infinite[1:]).max == INF  # the difference itself is nan
    assert error_against(infinite, infinite.clone()).max == 0.0
    empty = torch.zeros(0, 2, dtype=torch.float64)
    assert error_against(empty, empty.half()) == ErrorStats(0.0, 0.0, 0.0, 0)
    with pytest.raises(UsageError, match="needs a complex128 reference"):
        error_against(torch.zeros(1, dtype=torch.float64), value)


ULP = {
    "neighbours": (1.0, None, 1),
    "zeros": (0.0, -0.0, 0),
    "both-nan": (NAN, NAN, 0),
    "one-nan": (NAN, 1.0, 2**63 - 1),
    "same-infinity": (INF, INF, 0),
}


@pytest.mark.parametrize(("a", "b", "distance"), ULP.values(), ids=ULP)
@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
def test_ulp_distance(a: float, b: float | None, distance: int, dtype: torch.dtype) -> None:
    one = floats(a, dtype=dtype)
    other = floats(1 + torch.finfo(dtype).eps if b is None else b, dtype=dtype)
    assert ulp_distance(one, other).tolist() == ulp_distance(other, one).tolist() == [distance]


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
def test_ulp_distance_crosses_zero_and_reaches_infinity(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    smallest = info.tiny * info.eps
    one, other = floats(smallest, info.max, -info.max, dtype=dtype), floats(-smallest, INF, -INF, dtype=dtype)
    assert ulp_distance(one, other).tolist() == [2, 1, 1]


def test_ulp_distance_saturates_instead_of_wrapping() -> None:
    one, other = floats(-INF, dtype=torch.float64), floats(INF, dtype=torch.float64)
    assert ulp_distance(one, other).tolist() == ulp_distance(other, one).tolist() == [2**63 - 1]


def test_ulp_distance_agrees_with_counting_every_bfloat16() -> None:
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    ordered = every[~every.isnan()].double().unique().to(torch.bfloat16)  # one zero
    steps = ulp_distance(ordered[:-1], ordered[1:])
    assert steps.tolist() == [1] * (len(ordered) - 1)
    assert int(ulp_distance(ordered[:1], ordered[-1:])) == len(ordered) - 1


@pytest.mark.parametrize(
    ("a", "b"),
    [(floats(1), floats(1).half()), (floats(1, 1), floats(1)), (torch.tensor([1]), torch.tensor([1]))],
    ids=["dtypes", "broadcastable-shapes", "integers"],
)
def test_ulp_distance_refuses_what_it_cannot_measure(a: torch.Tensor, b: torch.Tensor) -> None:
    with pytest.raises(UsageError):
        ulp_distance(a, b)


# --- the generators of tests/tools.py --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
def test_nasty_floats_hold_every_corner(dtype: torch.dtype) -> None:
    t = nasty_like(torch.zeros(8, 8, dtype=dtype), seed=0)
    info = torch.finfo(dtype)
    assert t.dtype == dtype
    assert t.shape == (8, 8)
    assert bool(t.isnan().any())
    present = {(value, math.copysign(1, value)) for value in t.flatten().tolist()}
    smallest = info.tiny * info.eps
    for value in (INF, -INF, 0.0, -0.0, info.max, info.min, info.tiny, smallest, -smallest, 1.0, -1.0):
        assert (value, math.copysign(1, value)) in present
    assert len(set(float_corners(dtype))) == 16  # nan, zero once, and seven magnitudes with both signs


@pytest.mark.parametrize("dtype", INTS, ids=name_of)
def test_nasty_integers_hold_the_corners_within_the_range(dtype: torch.dtype) -> None:
    info = torch.iinfo(dtype)
    assert {0, 1, info.min, info.max} <= set(nasty_like(torch.zeros(8, 8, dtype=dtype), seed=0).flatten().tolist())
    bounded = set(nasty_like(torch.zeros(8, 8, dtype=dtype), seed=0, bounds=(3, 50)).flatten().tolist())
    assert {3, 4, 49, 50} <= bounded
    assert bounded <= set(range(3, 51))
    assert int_corners(dtype, (7, 7)) == [7]


def test_seeds_reproduce_and_differ() -> None:
    t = torch.zeros(4, 4)
    for make in (nasty_like, random_like):
        assert compare(make(t, 1), make(t, 1)).ok
        assert not compare(make(t, 1), make(t, 2))


def test_generators_keep_strides_and_gradients() -> None:
    t = torch.zeros(3, 4).t().requires_grad_()
    for make in (nasty_like, random_like):
        made = make(t, 0)
        assert (made.stride(), made.requires_grad, made.is_leaf) == (t.stride(), True, True)


def test_corner_inputs_stay_within_declared_and_example_ranges() -> None:
    example = {"ids": torch.tensor([[3, 4]]), "index": torch.tensor([0, 2]), "x": (torch.zeros(2), None), "n": 5}
    cases = dict(corner_inputs(example, {"ids": (0, 1000)}))
    assert list(cases) == ["example", "lowest", "highest", "nasty-0", "random-0", "nasty-1", "random-1"]
    assert compare(cases["example"], example).ok
    assert cases["lowest"]["ids"].tolist() == [[0, 0]]
    assert cases["highest"]["ids"].tolist() == [[1000, 1000]]
    for case in cases.values():
        assert case["n"] == 5
        assert case["x"][1] is None
        assert 0 <= int(case["ids"].min()) <= int(case["ids"].max()) <= 1000
        assert 0 <= int(case["index"].min()) <= int(case["index"].max()) <= 2


def test_corner_inputs_take_positions_and_refuse_unknown_names() -> None:
    cases = dict(corner_inputs((torch.tensor([1]), torch.zeros(1, dtype=torch.bool)), {0: (5, 9)}, seeds=0))
    assert list(cases) == ["example", "lowest", "highest"]
    assert compare(cases["highest"], (torch.tensor([9]), torch.tensor([True]))).ok
    with pytest.raises(KeyError, match="ids"):
        corner_inputs((torch.tensor([1]),), {"ids": (0, 1)})
