"""The JUnit XML of ``tokprune verify --junit``: what its readers count, and that any text is fit for XML."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tokprune.export.junit import write_junit
from tokprune.export.verify import Outcome
from tokprune.runtime.data import Sample
from tokprune.runtime.verification import ConsistencySample, ParitySample

EQUAL = ParitySample(3, 1e-6, 1.0, 3, None, 1.0, True, True, 1e-7)
HOSTILE = '</system-out>]]><b a="1">&amp;\x00\x1b\x85\ud800\ufffe'
GATES = [
    {"name": "not_finite", "limit": 0, "value": 0, "passed": True},
    {"name": "min_agreement", "limit": 0.95, "value": 0.9375, "passed": False},
    {"name": "max_kl", "limit": 0.05, "value": None, "passed": False},
]


def outcome(**parity) -> Outcome:
    answers = ConsistencySample("a", "b", None, [0.1], [True])
    return Outcome("c", dataclasses.replace(EQUAL, **parity), answers, True, 9, 0, [])


def written(path: Path, outcomes: list[Outcome], prompt: str = "One?", gates=GATES, **changes) -> ElementTree.Element:
    result = {
        "parity": {"samples": 2, "cosine_min": None},
        "consistency": {"agreement": 0.9375, "agreement_ci95": [0.8, 1.0], "ipr": [{"layer": 0, "full": 0.5}]},
        "remarks": [],
        "gates": gates,
        "passed": all(gate["passed"] for gate in gates),
        "compared": {"bundle": "a/b", "finished": "2026-01-02T03:04:05+00:00"},
        **changes,
    }
    write_junit(path, result, [Sample(prompt)] * len(outcomes), outcomes, 12.3456)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    return ElementTree.parse(path).getroot()


@pytest.fixture
def path(tmp_path) -> Path:
    (tmp_path / "a.xml").write_text("old")
    return tmp_path / "a.xml"


class TestGates:
    def test_each_is_a_test_case(self, path):
        root = written(path, [outcome()])
        assert root.tag == "testsuites"
        (suite,) = root
        for counted in (root, suite):
            counts = [counted.get(key) for key in ("name", "tests", "failures", "errors", "time")]
            assert counts == ["tokprune verify", "4", "2", "0", "12.346"]
        assert suite.get("skipped") == "0"
        assert suite.get("timestamp") == "2026-01-02T03:04:05+00:00"
        cases = suite.findall("testcase")
        assert [case.get("name") for case in cases] == [
            "not_finite",
            "min_agreement",
            "max_kl",
            "samples_equal_pytorch",
        ]
        assert all(case.get("classname") == "tokprune.verify" for case in cases)
        assert [[child.tag for child in case] for case in cases] == [[], ["failure"], ["failure"], []]

    def test_a_failure_says_limit_and_value(self, path):
        root = written(path, [outcome()])
        failures = [failure.get("message") for failure in root.iter("failure")]
        assert failures == ["limit 0.95, value 0.9375", "limit 0.05, value none: nothing was left to compare"]

    def test_the_suite_fails_just_when_verify_does(self, path):
        root = written(path, [outcome(first_divergence=0)], gates=GATES[:1])
        assert root.get("failures") == "0"


class TestProperties:
    def test_all_figures(self, path):
        found = {p.get("name"): p.get("value") for p in written(path, [outcome()]).iter("property")}
        assert found == {
            "parity.samples": "2",
            "consistency.agreement": "0.9375",
            "consistency.agreement_ci95.0": "0.8",
            "consistency.agreement_ci95.1": "1.0",
            "consistency.ipr.0.layer": "0",
            "consistency.ipr.0.full": "0.5",
            "passed": "False",
            "compared.bundle": "a/b",
            "compared.finished": "2026-01-02T03:04:05+00:00",
        }


class TestParity:
    @pytest.mark.parametrize(
        "difference", [{"first_divergence": 2}, {"kept_equal_margin": False}, {"max_abs_logit_diff": math.nan}]
    )
    def test_samples_that_differ_are_listed(self, path, difference):
        root = written(path, [outcome(), outcome(**difference)])
        assert root[0].get("skipped") == "1"
        case = root.findall("testsuite/testcase")[-1]
        assert [child.tag for child in case] == ["skipped", "system-out"]
        assert case[0].get("message").startswith("1 of 2 samples differ from PyTorch")
        assert case[1].text.startswith("sample 2: 'One?': PyTorch 'c', engine 'b'")

    def test_rounding_is_no_difference(self, path):
        assert written(path, [outcome(kept_equal=False, kept_overlap=0.9)])[0].get("skipped") == "0"

    def test_no_more_than_are_read(self, path):
        text = written(path, [outcome(first_divergence=0)] * 100).find("testsuite/testcase/system-out").text
        assert len(text.splitlines()) == 61
        assert text.endswith("\n40 more are left out")


def test_any_text_is_fit_for_xml(path):
    compared = {"bundle": HOSTILE, HOSTILE: "x", "finished": "now"}
    odd = dataclasses.replace(outcome(first_divergence=0), reference=HOSTILE)
    root = written(path, [odd], prompt=HOSTILE, compared=compared, remarks=[HOSTILE])
    shown = '</system-out>]]><b a="1">&amp;\ufffd\ufffd\x85\ufffd\ufffd'
    found = {p.get("name"): p.get("value") for p in root.iter("property")}
    assert found["compared.bundle"] == found["remarks.0"] == shown
    assert found[f"compared.{shown}"] == "x"
    assert "</system-out>]]><b" in root.find("testsuite/testcase/system-out").text
