"""benchmarks/scaling.py on the tiny model: its points, that it goes on where it was; and the fit, on times made up."""

import json
import shutil

import numpy as np
import pytest
import scaling

from tokprune.export.checkpoint import find_checkpoint


def row(ms: float, flops: float, attention: float = 0.0, selector: float = 0.0) -> dict:
    return {"ms": ms, "flops": flops, "attention_flops": attention, "selector_ms": selector}


class TestFit:
    def test_times_of_the_model_leave_nothing(self) -> None:
        rows = [row(3 + flops / 50e6, flops) for flops in (1e8, 1e9, 5e9)]
        found = scaling.fit(rows)
        assert found["model"]["overhead_ms"] == pytest.approx(3)
        assert found["model"]["gflops"] == pytest.approx(50)
        assert all(abs(each["deviation"]) < 1e-9 for each in rows)

    def test_slow_attention_and_a_selector_are_told_apart(self) -> None:
        rows = [
            row(2 + flops / 100e6 + attention / 20e6 + selector, flops + attention, attention, selector)
            for flops, attention, selector in (
                (1e9, 1e7, 0),
                (2e9, 8e8, 0),
                (4e9, 4e9, 0),
                (1e9, 1e8, 5.0),
                (3e8, 0, 0),
            )
        ]
        found = scaling.fit(rows)
        assert found["explained"] == pytest.approx(
            {"overhead_ms": 2, "linear_gflops": 100, "attention_gflops": 20}, rel=1e-6
        )
        assert max(abs(each["deviation"]) for each in rows) > scaling.TOLERANCE
        assert all(abs(each["deviation_explained"]) < 1e-6 for each in rows)
        assert rows[3]["shares"]["selector"] == pytest.approx(5 / rows[3]["ms"])
        assert rows[2]["shares"]["attention"] == pytest.approx(200 / rows[2]["ms"])


class TestRun:
    def test_ends_in_tables_and_goes_on(self, tiny_bundle, tiny_checkpoint, tmp_path, capsys, monkeypatch) -> None:
        # bundles that are there: the plan 1:6, and none, of which a batch may have 4 sequences
        for name, value in (("KEPT", (216,)), ("KEEP", 6), ("LAYER", 1), ("LAYERS", (1,)), ("BATCHES", (1, 4))):
            monkeypatch.setattr(scaling, name, value)
        for plan, name in (("none", "none"), ("lofi", "lofi-1-6")):
            shutil.copytree(tiny_bundle(plan), tmp_path / "work" / name)
        page = tmp_path / "page.md"
        page.write_text("<!-- table:scaling -->\nold\n<!-- end -->\n<!-- table:deviations -->\nold\n<!-- end -->\n")
        arguments = [
            "--work",
            str(tmp_path / "work"),
            "--model",
            str(tiny_checkpoint),
            "--rounds",
            "2",
            "--graphs",
            "neutral",
        ]
        assert scaling.main([*arguments, "--docs", str(page)]) == 0
        printed = capsys.readouterr()
        report = json.loads(printed.out.splitlines()[-1])
        assert {each["series"] for each in report["rows"]} >= {"kept tokens", "prune layer", "batch, pruned"}
        assert all(each["ms_low"] <= each["ms"] <= each["ms_high"] for each in report["rows"])
        assert "old" not in page.read_text()
        assert (tmp_path / "page-scaling.png").exists()

        def refuse(*_: object) -> None:
            raise AssertionError("everything was measured before")

        monkeypatch.setattr(scaling, "prefill", refuse)
        assert scaling.main([*arguments, "--json"]) == 0
        again = json.loads(capsys.readouterr().out)
        assert again["rows"] == report["rows"]

    def test_attention_is_what_grows_with_the_square(self, tiny_checkpoint) -> None:
        """FLOPs at three lengths are a quadratic of which it is the highest term."""
        from tokprune.runtime.flops import decoder_flops

        facts = find_checkpoint(str(tiny_checkpoint)).facts
        totals = [decoder_flops(facts, 0, facts.layers, rows, 0, 1) for rows in (10, 20, 30)]
        square = np.polyfit([10, 20, 30], totals, 2)[0]
        assert scaling.attention_flops(facts, scaling.Point("text alone", 20, 0, 0, 20, 0)) == pytest.approx(
            square * 400
        )

    @pytest.mark.parametrize(
        ("extra", "said"), [(["--rounds", "0"], "--rounds 0"), (["--docs", "nowhere.md"], "is no file")]
    )
    def test_bad_input_is_one_sentence(self, extra, said, tmp_path, capsys) -> None:
        assert scaling.main(["--work", str(tmp_path), *extra]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
