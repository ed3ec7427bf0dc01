"""benchmarks/whole_model.py on the tiny model: its figures, that it goes on where it was, and that it can fail."""

import json
import shutil

import numpy as np
import pytest
import whole_model
from PIL import Image


@pytest.fixture
def run(tiny_bundle, tiny_checkpoint, tmp_path, capsys):
    for number in range(3):
        noise = np.random.default_rng(number).integers(0, 256, (60, 81, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{number}.png")
    lines = [{"image": f"{number}.png", "prompt": "How many?" + number * " Count."} for number in range(3)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))

    def call(reference=tiny_checkpoint):
        files = ["--data", tmp_path / "data.jsonl", "--work", tmp_path / "work.jsonl", "--reference", reference]
        options = ["--batch-sizes", 1, 2, "--max-new-tokens", 4]
        code = whole_model.main([str(each) for each in (tiny_bundle("lofi"), *files, *options)])
        printed = capsys.readouterr()
        return code, json.loads(printed.out), printed.err

    return call


def test_both_batch_sizes_agree_with_pytorch(run, tmp_path):
    code, found, progress = run()
    assert code == 0
    assert set(found) == {"1", "2"}
    for figures in found.values():
        assert (figures["samples"], figures["greedy_agreement"], figures["kept_equal_margin"]) == (3, 1, 1)
        assert 0 < figures["max_rel_logit_diff"] < 1e-4
        assert figures["tokens"] >= 3
    assert "3 of 3" in progress
    work = tmp_path / "work.jsonl"
    lines = work.read_text().splitlines(keepends=True)
    assert [json.loads(line)["batch"] for line in lines] == [1, 1, 2, 2, 1, 2]
    work.write_text("".join(lines[:4]))  # stopped behind the first two questions
    code, again, progress = run()
    assert (code, again) == (0, found)
    assert "2 of 3" not in progress


def test_another_model_is_told_from_this_one(run, tiny_checkpoint, tmp_path):
    """With other weights greedy tokens differ."""
    from safetensors.numpy import load_file, save_file

    other = shutil.copytree(tiny_checkpoint, tmp_path / "other")
    for path in other.glob("*.safetensors"):
        weights = load_file(path)
        save_file({name: value[::-1].copy() if "lm_head" in name else value for name, value in weights.items()}, path)
    code, found, _ = run(other)
    assert code == 1
    assert found["1"]["greedy_agreement"] < 1
