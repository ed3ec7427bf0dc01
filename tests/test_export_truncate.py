"""A bundle's first layers with its head, against PyTorch with as many layers."""

import dataclasses
import hashlib
import json

import numpy as np
import pytest
from PIL import Image

from tokprune.export.checkpoint import find_checkpoint
from tokprune.export.truncate import truncate
from tokprune.export.verify import verify
from tokprune.runtime.bundle import open_bundle
from tokprune.runtime.chat import Model
from tokprune.runtime.data import read_samples
from tokprune.runtime.errors import UserError


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    pixels = np.random.default_rng(5).integers(0, 256, (2, 60, 70, 3), dtype=np.uint8)
    lines = []
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{index}.png")
        lines.append(json.dumps({"image": f"{index}.png", "prompt": "Which digit is highest?"}))
    (folder / "data.jsonl").write_text("\n".join(lines))
    return read_samples(folder / "data.jsonl")


@pytest.mark.parametrize(
    ("plan", "layers", "stages"),
    [
        ("none", 2, 0),
        ("lofi", 2, 1),  # its second decoder is cut and keeps its head
        ("lofi", 1, 0),  # the stage is at layer 1
        ("lofi-2", 2, 1),  # the head comes from the third decoder
        ("fastv-2", 2, 1),  # the second decoder's attention row has no reader any more
        ("lvpruning", 2, 1),
        ("random-0", 1, 1),
    ],
)
def test_parity_with_as_many_layers_in_pytorch(tiny_bundle, tiny_checkpoint, samples, tmp_path, plan, layers, stages):
    path = tiny_bundle(plan)
    before = {file: hashlib.sha256(file.read_bytes()).digest() for file in path.iterdir()}
    cut = truncate(open_bundle(path), layers, tmp_path)
    assert (cut.manifest.model.layers, len(cut.manifest.plan.stages)) == (layers, stages)
    checkpoint = find_checkpoint(str(tiny_checkpoint))
    checkpoint = dataclasses.replace(checkpoint, facts=dataclasses.replace(checkpoint.facts, layers=layers))
    result, _ = verify(Model(cut, "auto", 0), checkpoint, samples, max_new_tokens=5, spectrum_samples=0)
    assert result["parity"]["max_rel_logit_diff"] < 1e-5  # FP32 sums in another order, over three layers
    assert result["parity"]["greedy_agreement"] == 1
    assert result["parity"]["kept_equal_margin"] == 1
    assert {file: hashlib.sha256(file.read_bytes()).digest() for file in path.iterdir()} == before


def test_layers_make_a_difference(tiny_bundle, tiny_checkpoint, samples, tmp_path):
    """Against a reference with another number of layers, parity must fail."""
    cut = truncate(open_bundle(tiny_bundle("none")), 2, tmp_path)
    checkpoint = find_checkpoint(str(tiny_checkpoint))
    three = Model(open_bundle(tiny_bundle("none")), "auto", 0)
    two, full = (
        model.answer([samples[0].prompt], [list(samples[0].images)], max_new_tokens=5)
        for model in (Model(cut, "auto", 0), three)
    )
    assert two[0].generation.token_ids != full[0].generation.token_ids
    with pytest.raises(UserError, match="their configurations differ"):
        verify(Model(cut, "auto", 0), checkpoint, samples, max_new_tokens=5, spectrum_samples=0)


@pytest.mark.parametrize("layers", [0, 3, 4])
def test_as_many_as_there_are_is_no_cut(tiny_bundle, tmp_path, layers):
    with pytest.raises(UserError, match=f"the first {layers} layers were asked for, the bundle has 3: give 1 to 2"):
        truncate(open_bundle(tiny_bundle("lofi")), layers, tmp_path)
    assert not list(tmp_path.iterdir())
