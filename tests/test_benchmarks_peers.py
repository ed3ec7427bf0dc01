"""benchmarks/peers.py: a contestant on the tiny model, in processes of its own; figures and bars on made-up rounds."""

import json
import math
import shutil

import numpy as np
import peers
import pytest
from contest import analysis, bars, tables, workshop
from contest.contestants import Contestant, Pruning, contestants
from contest.jobs import Failed, run_command

from tokprune.runtime.flops import SEVEN_B
from tokprune.runtime.memory import Work, kv_bytes
from tokprune.runtime.plan import Plan

TASK = {"text": "", "prompt": "", "tokens": 616, "new_tokens": 32, "threads": 2}
MACHINE = {"gemm_fp32": 1e12, "gemm_bf16": 4e12, "read": {1 << 27: 40e9, 1 << 35: 20e9}}
LOGITS = {"max_abs": 0.0, "max_rel": 0.0, "cosine": 1.0, "top1": True, "same_tokens": 32, "tokens": 32}


def turn(vision: float | None, prefill: float, decode: float, peak: float = 2e9) -> dict:
    ttft = None if vision is None else vision + prefill + 5
    answer = {"ttft": ttft, "vision": vision, "prefill": prefill, "decode": decode, "tokens": [1]}
    facts = {"decode_bytes": 20e9, "least_bytes": 1.8e9}
    taken = {"load_s": 1.0, "import_s": 0.5, "answers": [answer, answer], "first": answer, "peak_bytes": peak}
    return {**taken, "facts": facts, "versions": {"library": "1"}}


def row(name: str, *turns: dict) -> dict:
    known = {each.name: each for each in contestants(2, [64, 192], has_slot=True)}
    made = {"seconds": 1.0, "cpu_s": 1.0, "peak_bytes": 1e9, "size_bytes": 3e9}
    return analysis.row(known[name], made, turns, LOGITS, MACHINE, SEVEN_B, TASK)


class TestAnalysis:
    @pytest.mark.parametrize(("count", "low"), [(2, 0), (6, 0), (8, 0), (9, 1), (20, 5)])
    def test_the_interval_holds_the_median_with_95_percent(self, count: int, low: int) -> None:
        """Low ends as tables of the sign test have them: the 1st of 6 to 8, the 2nd of 9, the 6th of 20."""
        found = analysis.spread(reversed(range(count)))
        assert (found["low"], found["high"]) == (low, count - 1 - low)
        if count >= 6:
            assert 1 - 2 * sum(math.comb(count, i) for i in range(low + 1)) / 2**count >= 0.95
        assert analysis.spread([None]) is None

    def test_logits_are_compared_relative_to_the_greatest(self) -> None:
        found = analysis.compared(np.array([1.0, 2.0, -3.5]), np.array([1.0, 2.0, -4.0]))
        assert (found["max_abs"], found["max_rel"], found["top1"]) == (0.5, 0.125, True)

    def test_shares_are_of_the_limits(self) -> None:
        found = row("pytorch", turn(400.0, 8000.0, 1e3))
        assert found["prefill_share"] == pytest.approx(found["prefill_flops"] / 8 / 1e12)
        read = 20e9 + sum(kv_bytes(SEVEN_B, Plan("none"), "fp32", Work(40, 16, 1)).values())
        assert found["decode_share"] == pytest.approx(read / 20e9)  # the limit is the nearest working set's
        assert row("hf-onnx", turn(None, 8000.0, 1e3))["vision_share"] is None

    def test_ratios_are_paired_by_round(self) -> None:
        """The machine was half as fast in the second round, for both."""
        mine = row("lofi-2-64-fp32-slot", turn(400, 100, 40), turn(800, 200, 80))
        other = row("pytorch", turn(400, 400, 50), turn(800, 800, 100))
        found = analysis.ratio(mine, other, lambda times: times["prefill"])
        assert (found["low"], found["high"]) == (0.25, 0.25)


class TestBars:
    def test_each_is_met_or_not(self) -> None:
        rows = [
            row("none-fp32-slot", turn(2000, 10000, 40, 2.2e9)),
            row("lofi-2-64-fp32-slot", turn(2000, 2500, 38)),
            row("none-int8-slot", turn(2000, 10000, 16)),
            row("none-int4-slot", turn(2000, 10000, 10)),
            row("none-w8a8-slot", turn(1000, 1000, 18, 1.8e9)),
            row("lofi-2-64-w8a8-slot", turn(1000, 300, 15, 1.7e9)),
            row("pytorch", turn(2500, 12000, 60, 3e9)),
            row("pytorch-fastv-2-64", turn(2500, 2600, 55)),
            row("openvino-fp32", turn(1900, 9000, 36, 2e9)),
            row("openvino-int8", turn(1000, 900, 17, 1.9e9)),
            analysis.missing(Contestant("hf-onnx", "hf_onnx", "fp32", "fp32"), "not there"),
        ]
        found = {bar["bar"]: bar for bar in bars.bars(rows, MACHINE, 2, 64)}
        met = {name: bar["met"] for name, bar in found.items()}
        assert met["decoder prefill, lofi 2:64, against the best peer's"] is True  # 2500 of 9000: fastv is no rival
        assert found["decoder prefill, lofi 2:64, against the best peer's"]["against"] == "openvino-fp32"
        assert met["time to first token, lofi 2:64, against the best peer's"] is True
        assert met["vision + unpruned prefill FP32, against the fastest peer"] is False
        assert met["decode FP32 at full context, against the best FP32 peer"] is False
        assert met["decode INT8 against OpenVINO INT8"] is True
        assert met["decode INT4 against our INT8"] is True
        assert met["decode W8A8 against OpenVINO INT8"] is False
        assert met["time to first token W8A8, none, against OpenVINO INT8"] is False
        assert met["time to first token W8A8, lofi 2:64, against OpenVINO INT8"] is True
        assert met["peak memory, generation included, INT8, against the leanest peer"] is True
        assert met["peak memory, generation included, of weights + KV + largest activation"] is True
        assert met["peak memory, generation included, FP32, against the leanest peer"] is False
        assert met["bundle to ready, warm, the slowest of ours"] is True
        report = {"rows": rows, "bars": list(found.values())}
        assert "**not met**" in tables._bars(report["bars"])

    def test_without_peers_nothing_is_met(self) -> None:
        found = bars.bars([row("none-fp32-slot", turn(2000, 10000, 40))], MACHINE, 2, 64)
        assert [bar["met"] for bar in found if "peer" in bar["bar"]] == [None] * 6


class TestRun:
    def test_a_contestant_ends_in_a_report_and_is_not_measured_again(
        self, tiny_bundle, tiny_checkpoint, tmp_path, monkeypatch, capsys
    ) -> None:
        monkeypatch.setattr(peers, "WORKING_SETS", [1 << 22])
        monkeypatch.setattr(peers, "LIMIT_SECONDS", 0.01)
        monkeypatch.setattr(workshop, "digest", lambda root: "these sources")
        work, page = tmp_path / "work", tmp_path / "page.md"
        page.write_text("".join(f"<!-- table:{name} -->\nold\n<!-- end -->\n" for name in ("speed", "absent")))
        bundle = work / "made" / "none-fp32"  # as if it had been exported
        shutil.copytree(tiny_bundle("none"), bundle)
        record = {"key": "these sources", "path": str(bundle), "size_bytes": 1}
        bundle.with_name("none-fp32.json").write_text(
            json.dumps(record | {"seconds": 1.0, "cpu_s": 1.0, "peak_bytes": 1})
        )
        arguments = [
            "--work",
            str(work),
            "--model",
            str(tiny_checkpoint),
            "--layer",
            "1",
            "--keep",
            "6",
            "--rounds",
            "1",
        ]
        arguments += [
            "--new-tokens",
            "3",
            "--only",
            "none-fp32-neutral",
            "openvino-fp32",
            "--docs",
            str(page),
            "--json",
        ]
        assert peers.main(arguments) == 0
        report = json.loads(capsys.readouterr().out)
        ours, absent = report["rows"]
        assert ours["ttft_ms"]["n"] == 2
        assert ours["ttft_ms"]["median"] > ours["prefill_ms"]["median"] > 0
        assert ours["peak_bytes"] > ours["facts"]["least_bytes"]
        assert (ours["logits"]["same_tokens"], ours["logits"]["top1"]) == (3, True)
        assert 0 < ours["logits"]["max_rel"] < 1e-4
        assert "--peer-python openvino" in absent["reason"]
        assert "none-fp32-neutral" in page.read_text()
        assert "old" not in page.read_text()
        assert page.with_suffix(".png").exists()

        def refuse(python: str, *_: object) -> None:
            raise AssertionError("everything was measured before")

        monkeypatch.setattr(peers, "run_job", refuse)
        assert peers.main(arguments) == 0
        assert json.loads(capsys.readouterr().out)["rows"] == report["rows"]

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["--docs", "nowhere.md"], "is no file"),
            (["--model", "nowhere"], "has no config.json"),
            (["--peer-python", "openvino=/nowhere"], "is not openvino=PATH"),
            (["--size", "99b"], "checkpoint could not be made"),
        ],
    )
    def test_bad_input_is_one_sentence(self, arguments, said, tmp_path, capsys) -> None:
        assert peers.main(["--work", str(tmp_path / "work"), *arguments]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("Error: ")
        assert said in error

    def test_a_failed_command_says_its_last_line(self, tmp_path) -> None:
        with pytest.raises(Failed, match="no such thing"):
            run_command(["sh", "-c", "echo no such thing >&2; exit 3"], tmp_path / "log.log", 1)

    def test_prunings_of_a_name(self) -> None:
        names = [each.name for each in contestants(2, [64, 192], has_slot=False)]
        assert len(names) == len(set(names))
        assert str(Pruning("lofi", 2, 64)) == "lofi-2-64"
        assert not any(name.endswith("-slot") for name in names)
