"""``--scheme`` and its companions, of ``tokprune quantize`` and ``tokprune-export``: what is written, who refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import LAYERS
from PIL import Image

from tokprune.runtime.bundle import open_bundle
from tokprune.runtime.recipe import Range, read_recipe

TOWER = 2 * 6 + 2


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Three questions, in the directory that the commands run in."""
    lines = []
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (60, 70, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        lines.append(json.dumps({"image": f"{number}.png", "prompt": "What digit is red?", "answer": "7"}))
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def base(tiny_bundle, tmp_path: Path) -> Path:
    shutil.copytree(tiny_bundle("random"), tmp_path / "base")
    return tmp_path / "base"


class TestQuantize:
    def test_activations(self, call, base: Path, data: Path, tmp_path: Path) -> None:
        options = ("--precision", "int8", "--scheme", "smoothquant", "--range", "percentile", "--data", data)
        found = json.loads(call("quantize", base, *options, "--out", "out", "--json").out)
        assert found["matrices"] == 7 * LAYERS + TOWER
        recipe = read_recipe(open_bundle(tmp_path / "out", check_hashes=True))
        assert {matrix.choice.activation for matrix in recipe.rounded} == {Range("percentile", 99.99)}
        assert len(list((base / "calibration").iterdir())) == 1
        again = call("quantize", base, *options, "--samples", "3", "--seed", "0", "--through", "pruned", "--out", "two")
        assert again.code == 0
        assert len(list((base / "calibration").iterdir())) == 1  # the same samples, seen once
        assert (tmp_path / "two" / "weights.data").read_bytes() == (tmp_path / "out" / "weights.data").read_bytes()

    def test_a_recipe_says_it_too(self, call, base: Path, data: Path, tmp_path: Path) -> None:
        options = ("--precision", "int4", "--scheme", "awq", "--data", data)
        assert call("quantize", base, *options, "--out", "one").code == 0
        assert call("quantize", base, "--recipe", "one/recipe.json", "--data", data, "--out", "two").code == 0
        for name in ("recipe.json", "weights.data", "decoder_1.onnx"):
            assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
        again = ("quantize", base, "--recipe", "one/recipe.json", "--out", "three")
        call(*again).refused("the recipe looks at activations", "--data was not given")
        call(*again, "--scheme", "awq", "--data", data).refused("--scheme was given beside a recipe")

    def test_a_bundle_that_was_observed_is_replaced_whole(self, call, base: Path, data: Path, tiny_bundle) -> None:
        options = ("--precision", "int8", "--scheme", "awq", "--data", data, "--out", "out")
        assert call("quantize", base, *options).code == 0
        assert call("quantize", tiny_bundle("random"), "--precision", "int8", "--out", base).code == 0
        assert not (base / "calibration").exists()

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (["--scheme", "awq"], ["scheme 'awq' looks at activations", "--data was not given"]),
            (["--scheme", "smoothquant"], ["scheme 'smoothquant' looks at activations", "--data was not given"]),
            (["--scheme", "gptq", "--data", "DATA"], ["'gptq'", "smoothquant"]),
            (["--data", "DATA"], ["--data was given for scheme 'round'", "drop it"]),
            (["--samples", "3"], ["--samples was given for scheme 'round'"]),
            (["--seed", "3"], ["--seed was given for scheme 'round'"]),
            (["--scheme", "round", "--through", "unpruned"], ["--through was given for scheme 'round'"]),
            (["--range", "max"], ["--range was given for scheme 'round'"]),
            (["--scheme", "awq", "--range", "mse", "--data", "DATA"], ["--range was given for scheme 'awq'"]),
            (["--scheme", "awq", "--data", "none.jsonl"], ["none.jsonl", "cannot be read"]),
            (["--scheme", "awq", "--data", "DATA", "--samples", "4"], ["4 samples were asked for, the data has 3"]),
            (["--scheme", "awq", "--data", "DATA", "--samples", "0"], ["0", "x>=1"]),
        ],
    )
    def test_mistakes(self, call, base: Path, data: Path, tmp_path: Path, options: list[str], words: list[str]) -> None:
        given = [str(data) if option == "DATA" else option for option in options]
        call("quantize", base, "--precision", "int8", *given, "--out", "out").refused(*words)
        assert not (tmp_path / "out").exists()

    def test_activations_are_int8(self, call, base: Path, data: Path) -> None:
        options = ("--precision", "int4", "--scheme", "smoothquant", "--data", data, "--out", "out")
        call("quantize", base, *options).refused("int4 was asked for", "--precision int8, or --scheme awq")


class TestExport:
    def test_in_one_go(self, call, traced, tiny_checkpoint, base: Path, data: Path, tmp_path: Path) -> None:
        """The same bytes as in two steps."""
        plan = ("--model", tiny_checkpoint, "--method", "random", "--keep", "5", "--layer", "1", "--seed", "7")
        options = ("--precision", "int8", "--scheme", "smoothquant", "--data", data)
        assert call("export", *plan, *options, "--base", "fp32", "--out", "one").code == 0
        assert call("quantize", base, *options, "--out", "two").code == 0
        names = {path.name for path in (tmp_path / "one").iterdir()}
        assert names == {path.name for path in (tmp_path / "two").iterdir()}
        for name in names:
            assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (["--scheme", "awq"], ["--scheme was given for precision 'fp32'", "int8 and int4 only"]),
            (["--precision", "fp16", "--data", "x"], ["--data was given for precision 'fp16'"]),
            (["--precision", "int4", "--scheme", "awq"], ["--data was not given"]),
            (["--precision", "int4", "--scheme", "smoothquant", "--data", "x"], ["int4 was asked for"]),
        ],
    )
    def test_mistakes(self, call, tiny_checkpoint, options: list[str], words: list[str]) -> None:
        call("export", "--model", tiny_checkpoint, "--method", "none", *options, "--out", "out").refused(*words)


def test_memory_of_the_tower(call) -> None:
    found = [
        json.loads(call("memory", "--model", "7b", "--precision", "int8", *options, "--json").out)["weights_bytes"]
        for options in ((), ("--tower", "int8"))
    ]
    assert found[1]["vision_encoder"] < 0.52 * found[0]["vision_encoder"]
    assert found[1]["decoder_0"] == found[0]["decoder_0"]
    call("memory", "--model", "7b", "--precision", "int4", "--tower", "int8").refused(
        "--tower int8", "'int4'", "drop it"
    )
