"""``tokprune quantize``: what it prints, whom it refuses, and how little it needs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import LAYERS

from tokprune.export.quantize import quantize
from tokprune.runtime.bundle import open_bundle
from tokprune.runtime.recipe import read_recipe


class TestCommand:
    def test_report_and_json(self, call, tiny_bundle, tmp_path: Path) -> None:
        source = tiny_bundle("lofi")
        result = call("quantize", source, "--precision", "int8", "--out", "table")
        assert result.code == 0
        assert "int8 on fp32: 21 matrices of" in result.out
        found = json.loads(call("quantize", source, "--precision", "int4", "--out", "json", "--json").out)
        recipe = read_recipe(open_bundle(tmp_path / "json", check_hashes=True))
        assert {key: found[key] for key in recipe.totals()} == recipe.totals()
        assert found["matrices"] == 7 * LAYERS

    @pytest.mark.parametrize(
        ("args", "words"),
        [
            (["BUNDLE", "--precision", "fp8", "--out", "out"], ["'fp8'", "int8"]),
            (["BUNDLE", "--precision", "fp16", "--out", "out"], ["'fp16'", "int4"]),
            (["BUNDLE", "--out", "out"], ["neither --precision nor --recipe"]),
            (["BUNDLE", "--precision", "int4", "--lm-head", "int4", "--out", "out"], ["'int4'", "int8"]),
            (["BUNDLE", "--recipe", "nowhere.json", "--out", "out"], ["nowhere.json", "recipe.json of a quantised"]),
            (["BUNDLE", "--precision", "int4"], ["--out"]),
            (["nowhere", "--precision", "int4", "--out", "out"], ["nowhere", "tokprune-export"]),
            (["BUNDLE", "--precision", "int4", "--out", "BUNDLE"], ["is the bundle itself"]),
        ],
    )
    def test_mistakes(self, call, tiny_bundle, args: list[str], words: list[str]) -> None:
        source = str(tiny_bundle("random"))
        call("quantize", *[source if arg == "BUNDLE" else arg for arg in args]).refused(*words)

    def test_quantized_bundle(self, call, tiny_bundle, tmp_path: Path) -> None:
        quantize(open_bundle(tiny_bundle("none")), tmp_path / "int4", "int4")
        call("quantize", "int4", "--precision", "int8", "--out", "out").refused("is in int4 already")

    def test_recipe_of_another_bundle(self, call, tiny_bundle, tmp_path: Path) -> None:
        """The same bytes come of it; half of its choices taken back, the rest of the bytes do."""
        source = tiny_bundle("lofi")
        first = call(
            "quantize", tiny_bundle("none"), "--precision", "int4", "--lm-head", "int8", "--out", "first", "--json"
        )
        assert json.loads(first.out)["matrices_by_precision"] == {"int8": 1, "int4": 7 * LAYERS}
        call("quantize", source, "--precision", "int4", "--lm-head", "int8", "--out", "asked")
        assert call("quantize", source, "--recipe", "first/recipe.json", "--out", "given").code == 0
        asked, given = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("asked", "given"))
        assert asked == given
        data = json.loads((tmp_path / "first" / "recipe.json").read_text())
        for matrix in data["matrices"]:
            if "layers.1." in matrix["name"]:
                matrix["choice"] = {**matrix["choice"], "precision": "base", "reason": "it is dear"}
        (tmp_path / "mixed.json").write_text(json.dumps(data))
        result = call("quantize", source, "--recipe", "mixed.json", "--out", "mixed")
        assert "it is dear" in result.out
        mixed = read_recipe(open_bundle(tmp_path / "mixed", check_hashes=True))
        assert len(mixed.rounded) == 7 * (LAYERS - 1) + 1
        assert mixed.totals()["matrices_kept"] == 7 + 6  # a tower's layer too, which stays in any case

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (["--lm-head", "int8"], ["--lm-head was given beside a recipe"]),
            (["--precision", "int8"], ["--precision int8 was given beside a recipe in int4"]),
        ],
    )
    def test_recipe_and_more(self, call, tiny_bundle, tmp_path: Path, options, words) -> None:
        quantize(open_bundle(tiny_bundle("none")), tmp_path / "first", "int4")
        recipe = ["--recipe", "first/recipe.json", "--out", "out"]
        call("quantize", tiny_bundle("none"), *recipe, *options).refused(*words)

    def test_head_without_integers(self, call, tiny_checkpoint) -> None:
        options = ("--method", "none", "--precision", "fp16", "--lm-head", "int8", "--out", "out")
        call("export", "--model", tiny_checkpoint, *options).refused("--lm-head", "drop it")
        call("memory", "--model", "7b", "--lm-head", "int8").refused("--lm-head", "'fp16'", "drop it")

    def test_base_without_integers(self, call, tiny_checkpoint) -> None:
        options = ("--method", "none", "--precision", "fp16", "--base", "fp32", "--out", "out")
        call("export", "--model", tiny_checkpoint, *options).refused("--base", "drop it")

    def test_no_room(self, tiny_bundle, tmp_path: Path) -> None:
        """A limit on the size of files, which to a writer looks like a full disk."""
        code = (
            "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000));"
            "from tokprune.runtime.cli import main; main()"
        )
        args = ["quantize", str(tiny_bundle("none")), "--precision", "int4", "--out", str(tmp_path / "out")]
        done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True)
        assert done.returncode == 2
        assert "cannot be written" in done.stderr.splitlines()[-1]
        assert not list(tmp_path.iterdir())

    def test_needs_no_torch(self, tiny_bundle, tmp_path: Path) -> None:
        code = (
            "import sys; sys.modules['torch'] = sys.modules['transformers'] = None;"
            "from tokprune.runtime.cli import main; main()"
        )
        args = ["quantize", str(tiny_bundle("none")), "--precision", "int8", "--out", str(tmp_path / "out")]
        subprocess.run([sys.executable, "-c", code, *args], check=True, capture_output=True)
        assert open_bundle(tmp_path / "out").manifest.precision == "int8"


def test_memory_stays_near_one_matrix(tmp_path: Path) -> None:
    """64 MB of FP32 are rounded in pieces: codes and scales, and some pieces of 16 MB."""
    code = """
import resource, sys, numpy as np
from tokprune.calibration.rounding import round_matrix
pieces = lambda: (np.ones((64, 16384), np.float32) for _ in range(16))
list(pieces())
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
round_matrix(pieces(), (1024, 16384), "int4", 128, "float16")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 64 * 1024  # KiB: 16 of codes, and a piece of 4 in FP32 and FP64 a few times
