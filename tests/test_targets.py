"""The table of targets: what holds for which generation under which SDK release, and the flags and reports that follow from it."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from typing import Any

import pytest
import torch

import nxfx
from nxfx.errors import UsageError
from nxfx.targets import GENERATIONS, LATEST_SDK, SDKS, Target, get_target
from nxfx.targets.facts import COMPILERS, FACTS, fact

PROPERTIES = [name for name, value in vars(Target).items() if isinstance(value, property) and name != "facts"]
EVERY = [Target(name, sdk) for name in GENERATIONS for sdk in SDKS]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


# --- the table -------------------------------------------------------------------------------------------------------


def test_every_fact_is_known_for_every_generation_and_release_and_has_a_source() -> None:
    for target in EVERY:
        assert [row.name for row in target.facts] == list(dict.fromkeys(f.name for f in FACTS))
        assert all(row.source for row in target.facts)
    assert {f.name for f in FACTS} == set(PROPERTIES)


def test_no_two_rows_speak_of_the_same_generation_and_release() -> None:
    keys = [(f.name, target, f.since) for f in FACTS for target in f.targets]
    assert len(keys) == len(set(keys))
    assert all(f.since in SDKS and f.targets <= set(GENERATIONS) for f in FACTS)
    assert set(COMPILERS.values()) <= set(SDKS)


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (Target("trn1", "2.26"), {"auto_cast": "matmult", "fp32_accumulation": False, "native_int64": False, "integer_downcast_flag": False, "legacy": True}),
        (Target("trn1", "2.31"), {"auto_cast": "none", "fp32_accumulation": True, "native_int64": False, "integer_downcast_flag": False, "legacy": True}),
        (Target("trn2", "2.31"), {"native_int64": False, "integer_downcast_flag": False, "legacy": True, "complex64": False, "sort": False}),
        (Target("trn2", "2.32"), {"native_int64": True, "native_int64_default": "disabled", "integer_downcast_default": "all", "legacy": False, "complex64": True}),
        (Target("trn2", "2.33"), {"native_int64_default": "not established", "integer_downcast_default": "not established", "int32_dot": False}),
        (Target("trn1", "2.33"), {"native_int64": False, "native_int64_default": "disabled", "integer_downcast_flag": True, "int32_dot": True, "sort": True}),
        (Target("trn3"), {"float8": {"float8_e5m2", "float8_e4m3fn", "float8_e8m0fnu"}, "core": "NeuronCore-v4", "saturate_infinity": False}),
        (Target("inf2"), {"float8": {"float8_e5m2"}, "core": "NeuronCore-v2", "saturate_infinity": True}),
    ],
    ids=lambda v: str(v) if isinstance(v, Target) else "facts",
)  # fmt: skip
def test_documented_values(target: Target, expected: dict[str, Any]) -> None:
    assert {name: getattr(target, name) for name in expected} == expected


def test_a_fact_holds_until_the_next_row_of_its_name() -> None:
    assert [fact("auto_cast", "trn1", sdk).value for sdk in SDKS] == ["matmult"] + ["none"] * (len(SDKS) - 1)


def test_target_by_name_by_value_and_under_another_release() -> None:
    assert get_target("trn2") == Target("trn2", LATEST_SDK)
    assert get_target("trn2", "2.31") == Target("trn2", "2.31") == get_target(Target("trn2"), "2.31")
    assert get_target(Target("trn1", "2.30")) == Target("trn1", "2.30")
    assert Target("trn2", "2.31.1").sdk == "2.31"
    assert nxfx.Target is Target
    assert str(Target("trn1", "2.31")) == "trn1, SDK 2.31"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (("trn22",), "Did you mean 'trn2'"), (("gpu",), "inf2, trn1, trn2, trn3"), (("trn2", "2.25"), "2.26"),
        (("trn2", "3.1"), "2.33"), (("trn2", 2.33), "string"), (("trn2", "latest"), "2.33"), (("trn2", ""), "2.33"),
    ],
)  # fmt: skip
def test_unknown_targets_and_releases_are_told_which_there_are(given: tuple[Any, ...], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        get_target(*given)


# --- flags -----------------------------------------------------------------------------------------------------------


class Everything(torch.nn.Module):
    """fp32 and bf16 matrix products, an infinity and a 64-bit hash: every flag has its reason."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, low: torch.Tensor, ids: torch.Tensor) -> Any:
        masked = self.linear(x).masked_fill(x > 0, float("-inf"))
        hashed = (ids * 2654435761) % 1024
        return masked, (low @ low).softmax(-1), hashed


EXAMPLE = (torch.ones(4, 4), torch.ones(4, 4, dtype=torch.bfloat16), torch.tensor([3]))
FLAGS = {
    "cast": "--auto-cast=none",
    "sum": "--enable-mixed-precision-accumulation",
    "inf": "--enable-saturate-infinity",
    "wide": "--native-int64=enabled",
    "down": "--implicit-integer-downcast=none",
}


def expected_flags(target: Target) -> list[str]:
    """From the release notes, spelled out a second time."""
    release = SDKS.index(target.sdk)
    old_core, integers = target.name in ("inf2", "trn1"), release >= SDKS.index("2.32")
    wanted = {"cast": release < SDKS.index("2.27"), "sum": target.sdk == "2.26", "inf": old_core, "wide": integers and not old_core, "down": integers}
    return [flag for key, flag in FLAGS.items() if wanted[key]]


@pytest.mark.parametrize("target", [Target(n, s) for n in GENERATIONS for s in ("2.26", "2.31", "2.32", "2.33")], ids=str)
def test_flags_follow_the_table_and_each_is_explained(target: Target) -> None:
    prepared = nxfx.prepare(Everything(), EXAMPLE, target=target, pipeline="narrow-64bit")
    assert prepared.compiler_args == expected_flags(target)
    assert all(len(why) > 20 for why in prepared.report.compiler_args.values())
    assert all(flag in str(prepared.report) for flag in prepared.compiler_args)


def test_the_integer_flags_are_explicit_even_for_a_graph_without_integers() -> None:
    prepared = nxfx.prepare(torch.nn.ReLU(), (torch.ones(2),), target="trn2", sdk="2.33")
    assert prepared.compiler_args == ["--native-int64=disabled", "--implicit-integer-downcast=none"]
    assert nxfx.prepare(torch.nn.ReLU(), (torch.ones(2),), target="trn2", sdk="2.31").compiler_args == []


@pytest.mark.parametrize(("causal", "mask", "asked"), [(True, None, True), (False, torch.ones(3, 3).bool(), True), (False, torch.zeros(3, 3), False)])
def test_attention_that_masks_by_itself_holds_infinities(causal: bool, mask: torch.Tensor | None, asked: bool) -> None:
    class Attend(torch.nn.Module):
        def forward(self, q: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask, is_causal=causal)

    prepared = nxfx.prepare(Attend(), (torch.ones(1, 3, 4),), target="trn1", sdk="2.31")
    assert ("--enable-saturate-infinity" in prepared.compiler_args) is asked


def test_int64_values_that_fit_32_bits_do_not_ask_for_native_int64() -> None:
    class Best(torch.nn.Module):
        def forward(self, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
            return x.argmax(-1) + x.index_copy(0, at, x).argmin(-1)  # index_copy takes int64 positions only

    prepared = nxfx.prepare(Best(), (torch.randn(3, 3), torch.tensor([2, 0, 1])), target="trn2")
    assert "--native-int64=disabled" in prepared.compiler_args


# --- four reports ----------------------------------------------------------------------------------------------------


class Mixed(torch.nn.Module):
    """One thing for each row of the table that a graph can show."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, low: torch.Tensor, ids: torch.Tensor) -> Any:
        left, right = self.linear(x).chunk(2, -1)
        turned = torch.view_as_real(torch.polar(left, right).sqrt())
        hashed = (ids * 2654435761) % 1024
        ordered = torch.sort(x.masked_fill(x > 0, float("-inf"))).values
        small = x.to(torch.float8_e4m3fn).to(torch.float32)
        return turned, (low @ low).softmax(-1), hashed, ordered, small, x.to(torch.float8_e5m2).float()


FOUR = {
    "trn1 2.26": Target("trn1", "2.26"), "trn1 2.31": Target("trn1", "2.31"),
    "trn2 2.32": Target("trn2", "2.32"), "trn2 2.33": Target("trn2", "2.33"),
}  # fmt: skip
# What the table says of each, and nothing else: its flags, its findings (code, severity), its rewrites by check-constraints.
BOTH = {("NX301", "warning"), ("NX503", "error")}
SAYS = {
    "trn1 2.26": (["cast", "sum", "inf"], {("NX502", "error"), ("NX510", "error")}, {"constraints.split-views"}),
    "trn1 2.31": (["inf"], {("NX502", "error"), ("NX510", "error")}, {"constraints.split-views"}),
    "trn2 2.32": (["wide", "down"], {("NX502", "warning"), ("NX506", "warning")}, set()),
    "trn2 2.33": (["wide", "down"], {("NX502", "warning"), ("NX506", "warning")}, set()),
}


def comparable(report: nxfx.Report) -> dict[str, Any]:
    """The report less what no two runs have in common, and less what the table decides."""
    data = report.to_dict()
    for key in ("timings", "target", "sdk", "compiler_args"):
        del data[key]
    data["findings"] = [{**f, "node": ""} for f in data["findings"] if f["code"][:3] != "NX5"]
    data["rewrites"] = [r for r in data["rewrites"] if r["pass_name"] != "check-constraints"]
    data["nodes"].pop("after")  # split views are other nodes than slices
    return data


def test_the_four_reports_differ_where_the_table_says_and_nowhere_else() -> None:
    reports = {name: nxfx.check(Mixed(), EXAMPLE, target=target) for name, target in FOUR.items()}
    for name, report in reports.items():
        flags, findings, rewrites = SAYS[name]
        assert list(report.compiler_args) == [FLAGS[f] for f in flags], name
        told = {(f.code, f.severity.value) for f in report.findings if f.severity.value != "info"}
        assert told == BOTH | findings, name
        assert {r.rule for r in report.rewrites if r.pass_name == "check-constraints"} == rewrites, name
        assert (report.target, report.sdk) == (FOUR[name].name, FOUR[name].sdk)
        assert f"target {FOUR[name].name}, SDK {FOUR[name].sdk}" in str(report)
    first = comparable(reports["trn1 2.26"])
    for name, report in reports.items():
        assert comparable(report) == first, name
    differing = {f.name for a in FOUR.values() for b in FOUR.values() for f in a.facts if f.value != fact(f.name, b.name, b.sdk).value}
    assert differing == set(PROPERTIES) - {"float8"}  # Trn3 alone has other 8-bit floats; every other row is told apart above


def test_two_releases_that_no_row_tells_apart_give_the_same_report() -> None:
    reports = [nxfx.check(Mixed(), EXAMPLE, target="trn1", sdk=sdk).to_dict() for sdk in ("2.29", "2.31")]
    for report in reports:
        report.pop("timings"), report.pop("sdk")
    assert reports[0] == reports[1]


# --- everywhere a target is named ------------------------------------------------------------------------------------


def test_sdk_is_an_option_of_prepare_check_compile_and_the_backend() -> None:
    linear, x = torch.nn.Linear(2, 2), torch.ones(1, 2)
    assert nxfx.prepare(linear, (x,), target="trn1", sdk="2.30").report.sdk == "2.30"
    assert nxfx.check(linear, (x,), target=Target("trn1", "2.30")).sdk == "2.30"
    compiled = nxfx.compile(linear, inner="eager", target="trn1", sdk="2.30")
    compiled(x)
    assert compiled.report.sdk == "2.30"
    with pytest.raises(UsageError, match=r"2\.33"):
        nxfx.prepare(linear, (x,), sdk="9.9")
    with pytest.raises(UsageError, match=r"2\.33"):
        nxfx.compile(linear, sdk="9.9")


def test_a_report_keeps_its_sdk_through_json() -> None:
    report = nxfx.check(torch.nn.ReLU(), (torch.ones(2),), sdk="2.32")
    assert nxfx.Report.from_dict(report.to_dict()).sdk == "2.32"
    old = {k: v for k, v in report.to_dict().items() if k != "sdk"}
    assert nxfx.Report.from_dict(old).sdk == ""


def test_a_pass_sees_the_sdk() -> None:
    seen: list[Target] = []

    class Look(nxfx.Pass):
        name = "look"

        def run(self, graph_module: Any, context: nxfx.PassContext) -> nxfx.PassResult:
            seen.append(context.target)
            return nxfx.PassResult()

    nxfx.prepare(torch.nn.ReLU(), (torch.ones(2),), target="trn1", sdk="2.28", pipeline=nxfx.Pipeline([Look]))
    assert seen == [Target("trn1", "2.28")]


# --- doctor ----------------------------------------------------------------------------------------------------------


def test_doctor_tells_what_holds_for_a_target_with_its_sources_and_how_to_install_for_it() -> None:
    from nxfx.cli import doctor

    for target, route in ((Target("trn1", "2.31"), "torch-neuronx<2.10"), (Target("trn2"), "torch 2.13")):
        diagnosis = doctor.diagnose(target)
        assert route in diagnosis.install
        assert {n: r["source"] for n, r in diagnosis.facts.items()} == {f.name: f.source for f in target.facts}
        assert f"Target {target}" in str(diagnosis)
    assert not doctor.diagnose().facts


def test_doctor_says_when_the_installed_compiler_is_of_another_release(monkeypatch: pytest.MonkeyPatch) -> None:
    from nxfx.cli import doctor

    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.26.6360.0+f1" if name == "neuronx-cc" else real(name))
    assert [p for p in doctor.diagnose(Target("trn2", "2.33")).problems if "sdk='2.31'" in p]
    assert not [p for p in doctor.diagnose(Target("trn2", "2.31")).problems if "sdk=" in p]


def test_targets_are_values() -> None:
    assert dataclasses.replace(Target("trn1"), sdk="2.26") == Target("trn1", "2.26")
    assert len({Target("trn1"), Target("trn1", LATEST_SDK), Target("trn2")}) == 2
