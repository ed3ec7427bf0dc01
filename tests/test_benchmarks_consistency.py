"""The consistency study: resumes, pairs, correlates; on a tiny model, and on outcomes made up."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import consistency
import numpy as np
import pytest
from study import analysis, grid, measure, plots, tables

from tokprune.export.checkpoint import find_checkpoint
from tokprune.runtime import UserError
from tokprune.runtime.manifest import Manifest
from tokprune.runtime.metrics import mcnemar_p

FORMS = ["digit", "color"]


def outcomes(name: str, pruned: str, shift: float = 0.0, saved: float = 0.5, kl: float = 0.1) -> dict[str, Any]:
    """Of eight questions whose right answer is "a", the original's "aaaaaabb"; of an IPR that pruning shifts."""
    method, _, rest = name.partition("-")
    stages = rest.partition("-")[0]
    layer = int(stages.partition(":")[0]) if stages else None
    full = np.tile(np.linspace(0.5, 0.8, 8)[:, None], 3)
    ipr = full.copy()
    if layer is not None:
        ipr[:, layer:] -= shift * np.arange(1, 9)[:, None]
    return {
        "name": name,
        "method": method,
        "stages": stages,
        "layer": layer,
        "full": list("aaaaaabb"),
        "pruned": list(pruned),
        "reference": ["a"] * 8,
        "form": FORMS * 4,
        "kl": [[kl * k, kl * k] for k in range(1, 9)],
        "top1": [[True, True]] * 8,
        "ipr_full": full.tolist(),
        "ipr": ipr.tolist(),
        "flops": {"prefill_tflops": 0.01 * (1 - saved), "decoder_reduction": saved},
    }


def made_up() -> list[dict[str, Any]]:
    return [
        outcomes("none", "aaaaaabb", saved=0.0, kl=0.0),
        outcomes("uniform-1:16", "aaaabbba", 0.01, saved=0.8, kl=0.2),
        outcomes("uniform-1:64", "aaaaaabb", 0.005, saved=0.6),
        outcomes("lofi-1:16-r8", "aaaaabac", 0.02, saved=0.7, kl=0.05),
        outcomes("random-1:16-s0", "bbbbbbbb", 0.001, saved=0.8, kl=0.4),
    ]


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    timing = {"decoder_ms_median": 5.0, "decoder_ms_median_full": 20.0, "decoder_speedup": 4.0, "engine": "e"}
    timing |= {"realised_share": 0.9, "theoretical_decoder_speedup": 5.0}
    return analysis.report(made_up(), [None, timing, None, None, None])


def row(report: dict[str, Any], name: str) -> dict[str, Any]:
    return next(item for item in report["rows"] if item["name"] == name)


class TestRun:
    def test_a_second_run_does_no_work(
        self,
        tiny_checkpoint: Path,
        export_traced: Callable[..., Manifest],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setattr(measure, "ROUNDS", 1)
        monkeypatch.setattr(measure, "export", export_traced)
        page = tmp_path / "page.md"
        page.write_text("<!-- table:results -->\nold\n<!-- end -->\n")
        arguments = ["--work", str(tmp_path / "work"), "--model", str(tiny_checkpoint), "--questions", "4"]
        arguments += ["--config", "none", "uniform-1:4", "random-1:4-s3", "--docs", str(page)]
        consistency.main([*arguments, "--timing"])
        first = capsys.readouterr()
        report = json.loads(first.out.splitlines()[-1])
        assert [item["name"] for item in report["rows"]] == ["none", "uniform-1:4", "random-1:4-s3"]
        none, uniform, random = report["rows"]
        # FP32 rounding apart, the unpruned engine is the original
        assert (none["agreement"], none["delta_ipr"], none["saved"]) == (1.0, 0.0, 0.0)
        assert none["kl_mean"] < 1e-6 < uniform["kl_mean"]
        assert uniform["delta_ipr"] > 0
        assert uniform["timing"]["decoder_ms_median"] > 0
        assert random["against_uniform"].keys() >= {"accuracy_mcnemar_p", "agreement_mcnemar_p"}
        assert "| uniform-1:4 |" in page.read_text()
        assert (tmp_path / "consistency-flops.png").exists()
        assert not list((tmp_path / "work").rglob("*.onnx"))  # bundles are not kept

        def refuse(*_: object, **__: object) -> None:
            raise AssertionError("everything was measured before")

        for name in ("export", "load_model", "demo_data"):
            monkeypatch.setattr(measure, name, refuse)
        consistency.main([*arguments, "--json"])
        assert json.loads(capsys.readouterr().out) == report

    def test_a_name_of_no_plan(self, tiny_checkpoint: Path) -> None:
        facts = find_checkpoint(str(tiny_checkpoint)).facts
        with pytest.raises(UserError, match="layer 7"):
            grid.named("lofi-7:4-r2", facts)
        with pytest.raises(UserError, match="needs a rank"):
            grid.named("lofi-1:4", facts)


class TestGrid:
    def test_default_names_are_of_different_plans(self) -> None:
        facts = find_checkpoint("demo").facts
        found = [grid.named(name, facts) for name in grid.default_grid(facts)]
        assert len({str(c.plan) + repr(c.plan) for c in found}) == len(found)
        for configuration in found:
            assert configuration.name.startswith(f"{configuration.plan.method}-{configuration.stages}".rstrip("-"))
        pruned = {configuration.stages for configuration in found} - {""}
        for stages in pruned:  # every method has its control
            assert f"uniform-{stages}" in {configuration.name for configuration in found}

    def test_names_hold_rank_seed_and_stages(self) -> None:
        facts = find_checkpoint("demo").facts
        plan = grid.named("lofi-1:346,2:230-r16", facts).plan
        assert ([(s.layer, s.keep) for s in plan.stages], plan.rank.components) == ([(1, 346), (2, 230)], 16)
        assert grid.named("random-0:16-s2", facts).plan.seed == 2


class TestAnalysis:
    def test_against_uniform_is_paired(self, report: dict[str, Any]) -> None:
        # right: lofi on 1–5 and 7, uniform on 1–4 and 8; as the original: lofi on 1–5, uniform on 1–4 and 7
        paired = row(report, "lofi-1:16-r8")["against_uniform"]
        assert (paired["accuracy_won"], paired["accuracy_lost"]) == (2, 1)
        assert paired["accuracy_mcnemar_p"] == mcnemar_p(1, 2)
        assert (paired["agreement_won"], paired["agreement_lost"]) == (1, 1)
        assert paired["accuracy_difference"] == pytest.approx(1 / 8)
        assert row(report, "uniform-1:16")["against_uniform"] is None
        assert row(report, "none")["against_uniform"] is None

    def test_uniform_at_equal_flops(self, report: dict[str, Any]) -> None:
        # 0.7 lies halfway between uniform's 0.6 (8 of 8 equal) and 0.8 (5 of 8)
        assert row(report, "lofi-1:16-r8")["uniform_at_equal_flops"] == pytest.approx((1 + 5 / 8) / 2)
        assert row(report, "uniform-1:16")["uniform_at_equal_flops"] is None

    def test_forms(self, report: dict[str, Any]) -> None:
        forms = row(report, "lofi-1:16-r8")["forms"]  # digit a a a a, color a a b c
        assert (forms["digit"]["accuracy_pruned"], forms["color"]["accuracy_pruned"]) == (1.0, 0.5)
        assert (forms["digit"]["agreement"], forms["color"]["agreement"]) == (0.75, 0.5)

    def test_most_consistent(self, report: dict[str, Any]) -> None:
        entry = next(item for item in report["most_consistent"] if item["saved"] == 0.6)
        assert entry["methods"]["uniform"]["name"] == "uniform-1:64"
        assert set(entry["methods"]) == {"uniform", "lofi", "random"}

    def test_silent(self, report: dict[str, Any]) -> None:
        # three right answers changed hands in lofi, accuracy went from 6 to 6; random lost all six, p = 0.03
        assert row(report, "lofi-1:16-r8")["accuracy_change"] == 0
        assert "lofi-1:16-r8" in report["silent"]
        assert not {"random-1:16-s0", "none", "uniform-1:64"} & set(report["silent"])

    def test_delta_ipr_is_of_the_layers_behind(self, report: dict[str, Any]) -> None:
        found = row(report, "lofi-1:16-r8")
        assert found["delta_ipr"] == pytest.approx(0.02 * 4.5)
        assert found["delta_ipr_signed"] == pytest.approx(-0.02 * 4.5)
        assert found["ipr"][0]["full"] == found["ipr"][0]["pruned"]

    def test_correlations(self, report: dict[str, Any]) -> None:
        rho = {(e["over"], e["by"], e["outcome"]): e["rho"] for e in report["ipr"]}
        # the further the IPR moves, the smaller the KL at 1:16; across all four, 1:64 breaks the order
        assert rho["same stages", "delta_ipr", "kl_mean"] == pytest.approx(-1)
        assert rho["configurations", "delta_ipr", "kl_mean"] == pytest.approx(-0.8)
        # within each configuration both grow with the question's number
        samples = next(e for e in report["ipr"] if e["over"] == "samples" and e["outcome"] == "kl_mean")
        assert (samples["rho"], samples["n"], samples["above"], samples["below"]) == (pytest.approx(1), 4, 4, 0)


class TestPage:
    def test_tables_go_between_their_markers(self, report: dict[str, Any], tmp_path: Path) -> None:
        page = tmp_path / "page.md"
        page.write_text("a\n<!-- table:ipr -->\nold\n<!-- end -->\nb\n<!-- table:other -->\nstays\n<!-- end -->\n")
        found = tables.all_tables(report)
        tables.put(page, found)
        tables.put(page, found)
        assert page.read_text() == (
            f"a\n<!-- table:ipr -->\n{found['ipr']}\n<!-- end -->\nb\n<!-- table:other -->\nstays\n<!-- end -->\n"
        )

    def test_every_line_of_a_table_has_its_columns(self, report: dict[str, Any]) -> None:
        for name, table in tables.all_tables(report).items():
            counts = {line.replace("\\|", "").count("|") for line in table.splitlines()}
            assert len(counts) == 1, name

    def test_plots_are_small(self, report: dict[str, Any], tmp_path: Path) -> None:
        saved = plots.save_all(report, tmp_path)
        assert [path.name.split("-")[1] for path in saved] == ["flops.png", "accuracy.png", "ipr.png", "forms.png"]
        for path in saved:
            assert 5_000 < path.stat().st_size < 150_000

    def test_nothing_pruned_makes_no_plot(self, tmp_path: Path) -> None:
        assert plots.save_all(analysis.report(made_up()[:1], [None]), tmp_path) == []
