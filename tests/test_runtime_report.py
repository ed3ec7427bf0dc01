"""Reports: what people read says what the JSON says, in columns that line up."""

from __future__ import annotations

from typing import Any

import pytest

from tokprune.runtime import report


def cells(text: str) -> dict[str, list[str]]:
    """Lines of a report: first column -> the other columns."""
    split = [[cell for cell in line.split("  ") if cell] for line in text.splitlines()]
    return {line[0].strip(): [cell.strip() for cell in line[1:]] for line in split if line}


class TestTable:
    def test_columns_line_up(self) -> None:
        assert report.table([("a", 1), ("long", 1000)], ("name", "n")) == (
            "name     n\n"
            "----  ----\n"
            "a        1\n"
            "long  1000"
        )  # fmt: skip

    def test_no_rows(self) -> None:
        assert report.table([], ("a", "b")) == "a  b\n-  -"

    def test_a_row_of_another_length_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"\['a', '1'\] has 2 cells"):
            report.table([("a", 1)], ("name",))


class TestUnits:
    @pytest.mark.parametrize(
        ("count", "text"),
        [
            (0, "0 FLOP"),
            (999, "999 FLOP"),
            (2.5e6, "2.50 MFLOP"),
            (13.25e9, "13.2 GFLOP"),
            (999.9e9, "1000 GFLOP"),
            (8.514e12, "8.51 TFLOP"),
            (1.234e15, "1234 TFLOP"),
            (None, "-"),
        ],
    )
    def test_flops(self, count: float | None, text: str) -> None:
        assert report.flops(count) == text

    @pytest.mark.parametrize(
        ("value", "text"), [(0.123, "0.12 ms"), (9.5, "9.50 ms"), (123.45, "123.5 ms"), (None, "-")]
    )
    def test_milliseconds(self, value: float | None, text: str) -> None:
        assert report.milliseconds(value) == text

    def test_percent(self) -> None:
        assert report.percent(0.9375) == "93.8 %"
        assert report.percent(0.9375, [0.9, 0.97]) == "93.8 % [90.0, 97.0]"
        assert report.percent(None) == "-"
        assert [report.percent(1999 / 2000), report.percent(1.0)] == ["99.9 %", "100.0 %"]  # one differs, none does

    def test_megabytes_and_number(self) -> None:
        assert (report.megabytes(1234.6), report.number(0.000123456)) == ("1235 MB", "0.0001235")


def run_result(**changes: Any) -> dict[str, Any]:
    return {
        "answer": "A red ball.",
        "token_ids": [5, 6],
        "prompt_tokens": 612,
        "pruning": {
            "applied": True,
            "reason": "lofi",
            "stages": [{"layer": 2, "image": 0, "kept": 64, "total": 576, "indices": list(range(64))}],
        },
        "timing_ms": {"ttft": 321.0, "decode_per_token": 12.25, "segments": {"decoder_0": 200.5}},
        "peak_rss_mb": 812.3,
        "flops": {"prefill": 2.1e12, "decode_per_token": 13.3e9},
        "engine": "onnxruntime",
        "remarks": [],
    } | changes


class TestRun:
    def test_says_what_it_took_and_what_was_pruned(self) -> None:
        text = report.run_report(run_result())
        assert "layer 2: kept 64 of 576 visual tokens" in text
        found = cells(text)
        assert found["first token"] == ["321.0 ms"]
        assert found["decoder_0"] == ["200.5 ms"]
        assert found["each further token"] == ["12.2 ms"]
        assert found["peak memory"] == ["812 MB"]
        assert found["prefill"] == ["2.10 TFLOP"]

    def test_remarks_of_the_engine_are_shown(self) -> None:
        assert "no CUDA graph" in report.run_report(run_result(remarks=["no CUDA graph"])).splitlines()

    def test_never_silent_when_nothing_was_pruned(self) -> None:
        pruning = {"applied": False, "reason": "the prompt has no image", "stages": []}
        assert "not pruned: the prompt has no image" in report.run_report(run_result(pruning=pruning))

    def test_one_token_has_no_decode(self) -> None:
        timing = {"ttft": 1.0, "decode_per_token": None, "segments": {}}
        counts = {"prefill": 1e12, "decode_per_token": None}
        found = cells(report.run_report(run_result(timing_ms=timing, flops=counts)))
        assert found["each further token"] == found["decode, each token"] == ["-"]


PARITY = {
    "samples": 8, "max_abs_logit_diff": 0.00031, "max_rel_logit_diff": 0.00002, "cosine_min": 0.99999,
    "greedy_agreement": 1.0, "kept_overlap": 0.995, "kept_equal_margin": 1.0,
}  # fmt: skip
CONSISTENCY = {
    "samples": 64, "agreement": 0.9375, "agreement_ci95": [0.87, 0.98], "accuracy_full": 0.9, "accuracy_pruned": None,
    "correct_to_wrong": 3, "wrong_to_correct": 0, "wrong_to_other": None, "mcnemar_p": 0.25, "top1_agreement": 0.97,
    "kl_mean": 0.0123, "kl_median": 0.001, "kl_p99": None, "ipr": [{"layer": 2, "full": 0.51, "pruned": 0.62}],
}  # fmt: skip


class TestVerify:
    def test_all_parts(self) -> None:
        gates = [{"name": "min_agreement", "limit": 0.95, "value": 0.9375, "passed": False}]
        text = report.verify_report(
            {
                "parity": PARITY,
                "consistency": CONSISTENCY,
                "gates": gates,
                "remarks": ["no CUDA graph"],
                "passed": False,
            }
        )
        assert text.endswith("\n\nno CUDA graph\nFAILED")
        found = cells(text)
        assert found["max |Δlogit|"] == ["0.00031"]
        assert found["as a share of the largest"] == ["2e-05"]
        assert found["kept tokens shared"] == ["99.5 %"]
        assert found["answers equal"] == ["93.8 % [87.0, 98.0]"]
        assert found["accuracy, pruned"] == ["-"]
        assert found["correct → wrong"] == ["3"]
        assert found["wrong → correct"] == ["0"]
        assert found["wrong → other wrong"] == ["-"]
        assert found["KL mean / median / p99"] == ["0.0123 / 0.001 / -"]
        assert found["IPR in layer 2"] == ["0.51 → 0.62"]
        assert found["min_agreement"] == ["0.95", "0.9375", "FAILED"]

    def test_parts_not_asked_for_are_left_out(self) -> None:
        text = report.verify_report({"parity": PARITY, "consistency": None, "gates": [], "remarks": [], "passed": True})
        assert "consistency" not in text
        assert "gate" not in text
        assert text.endswith("\n\npassed")


class TestBuild:
    @pytest.mark.parametrize(("difference", "last"), [(None, "prefill, decode"), (2.7e-6, "2.7e-06")])
    def test_engines_and_their_slot(self, difference: float | None, last: str) -> None:
        segment = {
            "name": "decoder_0",
            "built": True,
            "bytes": 5_260_000,
            "seconds": 1.66,
            "profiles": ["prefill", "decode"],
            "difference": difference,
        }
        text = report.build_report(
            {
                "segments": [segment],
                "library": "tensorrt",
                "version": "10.3.0",
                "arch": "sm87",
                "selector": "plugin",
                "bytes": 5_260_000,
                "slot": "bundle/engines/a",
            }
        )
        assert cells(text)["decoder_0"] == ["yes", "1.7 s", "5.26 MB", last]
        assert text.endswith("tensorrt 10.3.0 for sm87, selector plugin; 5.26 MB in bundle/engines/a")


class TestBench:
    @pytest.mark.parametrize(
        ("peak", "share", "shown"), [(None, None, []), (42.6, 0.0029, ["0.3 %"])], ids=["cpu", "gpu"]
    )
    def test_realised_share(self, peak: float | None, share: float | None, shown: list[str]) -> None:
        segment = {"name": "decoder_0", "ms_median": 12.5, "ms_p90": 13.0, "gflops": 508.0, "achieved_tflops": 0.1234}
        text = report.bench_report(
            {
                "segments": [segment | {"peak_share": share}],
                "remarks": [],
                "peak_tflops": peak,
                "selector_share": 0.012,
                "decoder_speedup": 1.5,
                "theoretical_decoder_speedup": 3.8,
                "realised_share": 0.452,
            }
        )
        assert cells(text)["decoder_0"] == ["12.5 ms", "13.0 ms", "508 GFLOP", "0.123", *shown]
        assert "selectors: 1.2 % of prefill" in text
        assert ("peak: 42.6 TFLOP/s" in text) == (peak is not None)
        assert "speed-up: 1.50×, in theory 3.80×; 45.2 % of the theoretical saving realised" in text
