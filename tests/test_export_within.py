"""``quantize_within`` and ``quantize --budget`` on the tiny model: what is written, what is said, what is not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import LAYERS
from PIL import Image

from tokprune.calibration.budget import Budget
from tokprune.calibration.mixed import Times, part_of
from tokprune.calibration.recipe import usual_choices
from tokprune.calibration.sensitivity import SCHEMA
from tokprune.calibration.statistics import FOLDER
from tokprune.calibration.trial import Trial
from tokprune.export.quantize import find_matrices
from tokprune.export.within import SPEED, BudgetMissed, Wanted, quantize_within
from tokprune.runtime.bundle import Bundle, open_bundle
from tokprune.runtime.chat import load
from tokprune.runtime.data import Sample, read_samples
from tokprune.runtime.errors import UserError
from tokprune.runtime.recipe import read_recipe

PARTS = [f"layers.{layer}" for layer in range(LAYERS)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (60, 60, 3), dtype=np.uint8)).save(folder / "noise.png")
    lines = [{"image": "noise.png", "prompt": f"What digit is number {number}?"} for number in range(8)]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder / "data.jsonl"


@pytest.fixture(scope="module")
def samples(data: Path) -> list[Sample]:
    return read_samples(data)


@pytest.fixture
def base(tiny_bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A copy, since what is measured is kept in it."""
    path = tmp_path_factory.mktemp("base")
    for file in tiny_bundle("lofi").iterdir():
        if file.is_file():
            (path / file.name).write_bytes(file.read_bytes())
    return open_bundle(path)


def within(base: Bundle, out: Path, samples: list[Sample], *budgets: Budget, **options):
    wanted = Wanted(budgets, samples=3, **options)
    return quantize_within(base, out, "int4", usual_choices(list(find_matrices(base)), "int4"), samples, wanted)


class TestSearch:
    def test_the_dearest_stay(self, base: Bundle, samples, tmp_path: Path) -> None:
        """A budget below what all cost together: the dearest part stays, the file says so of each matrix."""
        _, _, outcome = within(base, tmp_path / "all", samples, Budget("kl", 1e9))
        assert outcome.found.kept == ()
        limit = max(outcome.found.difference.kl_mean, outcome.verified.kl_mean) * 0.9
        manifest, recipe, outcome = within(base, tmp_path / "out", samples, Budget("kl", limit))
        kept = outcome.found.kept
        assert 1 <= len(kept) < LAYERS
        costs = outcome.sensitivity.parts
        dearest = sorted(costs, key=lambda part: costs[part].difference.kl_mean / costs[part].bytes_saved)
        assert set(kept) == set(dearest[-len(kept) :])
        assert outcome.found.difference.kl_mean <= limit
        assert outcome.verified.kl_mean <= limit
        assert read_recipe(open_bundle(tmp_path / "out", check_hashes=True)) == recipe
        for matrix in recipe.matrices:
            stays = part_of(matrix.name) in kept
            if part_of(matrix.name) in PARTS:
                assert matrix.record.precision == ("fp32" if stays else "int4")
                assert matrix.choice.reason.startswith(f"stays, for kl ≤ {limit:g}" if stays else "saves ")
            else:
                assert matrix.choice.reason is None
        assert recipe.totals()["matrices_kept"] == 7 * len(kept)
        stored = json.loads((tmp_path / "out" / "sensitivity.json").read_text())
        assert list(stored["parts"]) == PARTS
        assert "sensitivity.json" in [file.path for file in manifest.files]
        assert {path.name for path in (tmp_path / "out").iterdir()} == {
            *(file.path for file in manifest.files),
            "tokprune.json",
        }

    def test_verified_as_it_runs_on_others(self, base: Bundle, samples, tmp_path: Path) -> None:
        _, _, outcome = within(base, tmp_path / "out", samples, Budget("kl", 1e9))
        assert outcome.fresh
        assert not set(outcome.questions) & set(outcome.sensitivity.questions)
        trial = Trial(base, base, [samples[number] for number in outcome.questions])
        trial.answer(lambda: None)
        assert trial.of(load(tmp_path / "out", engine="onnxruntime"), lambda: None) == outcome.verified
        trial.close()

    def test_measured_once(self, base: Bundle, samples, tmp_path: Path, monkeypatch) -> None:
        first = within(base, tmp_path / "first", samples, Budget("kl", 1e9))[2]
        (kept,) = (base.path / FOLDER).iterdir()
        assert json.loads(kept.read_text())["schema"] == SCHEMA
        monkeypatch.setattr(Trial, "time", None)  # would be called for what is not known
        again = within(base, tmp_path / "again", samples, Budget("kl", 1e9))[2]
        assert again == first
        names = [path.name for path in (tmp_path / "first").iterdir()]
        for name in names:
            assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
        assert open_bundle(base.path)  # what was kept is no fault of the bundle

    def test_missed(self, base: Bundle, samples, tmp_path: Path) -> None:
        with pytest.raises(BudgetMissed) as caught:
            within(base, tmp_path / "out", samples, Budget("kl", 1e-12))
        outcome = caught.value.outcome
        assert len(outcome.found.kept) == LAYERS - 1
        assert outcome.verified.kl_mean > 1e-12
        assert list(tmp_path.iterdir()) == []

    def test_for_speed(self, base: Bundle, samples, tmp_path: Path, monkeypatch) -> None:
        """Layer 1 is slower rounded, so it stays, though no budget asks for it."""

        def times(self: Trial, parts) -> dict[str, Times]:
            slow = ([1.0], [2.0])
            return {part: Times(*(slow if part == "layers.1" else ([2.0], [1.0]) for _ in range(2))) for part in parts}

        monkeypatch.setattr(Trial, "time", times)
        _, recipe, outcome = within(base, tmp_path / "out", samples, Budget("kl", 1e9), purpose=SPEED)
        assert outcome.found.kept == ("layers.1",)
        (reason,) = {m.choice.reason for m in recipe.matrices if part_of(m.name) == "layers.1"}
        assert reason.startswith("stays, for it was not measured faster: alone KL ")
        assert reason.endswith("0.50× as fast")
        (reason, *_) = {m.choice.reason for m in recipe.matrices if part_of(m.name) == "layers.0"}
        assert reason.startswith("measured faster; alone KL ")

    def test_nothing_is_faster(self, base: Bundle, samples, tmp_path: Path, monkeypatch) -> None:
        slow = ([1.0], [2.0])
        monkeypatch.setattr(Trial, "time", lambda self, parts: {part: Times(slow, slow) for part in parts})
        with pytest.raises(UserError, match="no part of the model was measured faster in int4 here"):
            within(base, tmp_path / "out", samples, Budget("kl", 1e9), purpose=SPEED)
        assert list(tmp_path.iterdir()) == []


class TestCommand:
    def test_kept(self, call, base: Bundle, data: Path, tmp_path: Path) -> None:
        options = ("--precision", "int4", "--data", data, "--budget", "kl=100", "--budget", "kl=50")
        found = json.loads(call("quantize", base.path, *options, "--out", "out", "--json").out)
        assert found["met"]
        assert found["budget"] == ["kl ≤ 100", "kl ≤ 50"]
        assert found["verified"]["others"]
        assert list(found["parts"]) == PARTS
        table = call("quantize", base.path, *options, "--out", "table")
        assert "layers.1" in table.out
        assert "verified: answers equal" in table.out
        assert "cost of each part" not in table.err  # it was known

    def test_with_activations(self, call, base: Bundle, data: Path, tmp_path: Path) -> None:
        """Parts that are calibrated, put back one by one: what is folded in a layer is not when it stays."""
        options = ("--precision", "int8", "--scheme", "smoothquant", "--data", data, "--samples", "4", "--for", "size")
        found = json.loads(call("quantize", base.path, *options, "--budget", "kl=100", "--out", "all", "--json").out)
        assert list(found["parts"]) == ["vision", *PARTS]
        assert found["kept"] == []
        limit = 0.9 * max(found[which]["kl_mean"] for which in ("measured", "verified"))
        budget = ("--budget", f"kl={limit}")
        fewer = json.loads(call("quantize", base.path, *options, *budget, "--out", "fewer", "--json").out)
        assert fewer["kept"]
        recipe = read_recipe(open_bundle(tmp_path / "fewer", check_hashes=True))
        for matrix in recipe.matrices:
            stays = part_of(matrix.name) in (*fewer["kept"], "lm_head")
            assert (matrix.record.activation is None) == stays, matrix.name
        kept = [part for part in fewer["kept"] if part != "vision"]
        for name in recipe.folded:
            assert not name.startswith(tuple(f"language_model.{part}." for part in kept)), name

    def test_missed(self, call, base: Bundle, data: Path, tmp_path: Path) -> None:
        options = ("--precision", "int4", "--data", data, "--budget", "kl=1e-12", "--out", "out")
        result = call("quantize", base.path, *options)
        assert (result.code, result.out) == (1, "")
        assert "no recipe keeps to kl ≤ 1e-12: nothing was written" in result.err
        assert "MISSED" in result.err
        assert not (tmp_path / "out").exists()
        result = call("quantize", base.path, *options, "--json")
        assert (result.code, json.loads(result.out)["met"]) == (1, False)

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (["--budget", "loss=1", "--data", "DATA"], ["--budget loss=1 is none"]),
            (["--budget", "kl=1"], ["--data was not given"]),
            (["--for", "speed"], ["--for speed was given without --budget"]),
            (["--budget", "kl=1", "--data", "DATA", "--samples", "9"], ["9 questions were asked for, the data has 8"]),
        ],
    )
    def test_mistakes(self, call, tiny_bundle, data: Path, options: list[str], words: list[str]) -> None:
        given = [str(data) if option == "DATA" else option for option in options]
        call("quantize", tiny_bundle("lofi"), "--precision", "int4", *given, "--out", "out").refused(*words)
