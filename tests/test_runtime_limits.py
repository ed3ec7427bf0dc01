"""Limits: the defaults, what contradicts, and that an export writes what was asked for."""

import json

import pytest

from tokprune.runtime.bundle import read_manifest
from tokprune.runtime.errors import UserError
from tokprune.runtime.limits import make_limits
from tokprune.runtime.manifest import Limits


@pytest.mark.parametrize(
    ("given", "limits"),
    [
        ({}, Limits(4, 128, 128)),
        ({"max_batch": 1, "max_kv_capacity": 100}, Limits(1, 100, 100)),
        ({"max_input_length": 60}, Limits(4, 60, 128)),
        ({"max_batch": 9, "max_input_length": 60, "max_kv_capacity": 60}, Limits(9, 60, 60)),
    ],
)
def test_what_is_not_given_is_as_large_as_it_may_be(given, limits):
    assert make_limits(128, **given) == limits


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"max_batch": 0}, "largest batch is 0"),
        ({"max_kv_capacity": 129}, "longer than the model's context of 128"),
        ({"max_input_length": 61, "max_kv_capacity": 60}, "inputs of 61 tokens do not fit a KV cache of 60"),
        ({"max_input_length": 129}, "inputs of 129 tokens do not fit a KV cache of 128"),
    ],
)
def test_contradictions(given, words):
    with pytest.raises(UserError, match=f"{words}.*: give others with --max-batch-size"):
        make_limits(128, **given)


@pytest.fixture
def export(call, traced, tiny_checkpoint):
    options = ["--method", "random", "--layer", "1", "--keep", "5", "--out", "bundle"]
    return lambda *more: call("export", "--model", tiny_checkpoint, *options, *more)


def test_an_export_has_what_was_asked_for_and_run_holds_to_it(call, export, picture, tmp_path):
    done = export("--max-batch-size", 2, "--max-input-len", 40, "--max-kv-cache-capacity", 50)
    assert done.code == 0, done
    assert read_manifest(tmp_path / "bundle").limits == Limits(2, 40, 50)
    ask = ["run", "bundle", "--max-new-tokens", 2, "--prompt"]
    assert call(*ask, "x", "--image", picture).code == 0
    call(*ask, "x", "--image", picture, "--image", picture).refused("40 at most", "--max-input-len")
    call(*ask, "digit " * 60).refused("KV cache holds 50", "--max-kv-cache-capacity")
    (tmp_path / "data.jsonl").write_text('{"prompt": "a"}')
    call("verify", "bundle", "--reference", "demo", "--data", "data.jsonl", "--batch-size", 3).refused(
        "batch of 3", "2 at most"
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--max-kv-cache-capacity", 1000], ["1000", "context of 128"]),
        (["--max-input-len", 100, "--max-kv-cache-capacity", 50], ["inputs of 100", "50"]),
        (["--max-batch-size", 0], ["--max-batch-size"]),
    ],
)
def test_an_export_refuses(export, options, words):
    export(*options).refused(*words)


def test_several_images_in_a_prompt(call, tiny_bundle, picture, tmp_path):
    """All are the first prompt's: each is pruned, and has a picture of its own."""
    images = ["--image", picture, "--image", picture]
    result = call(
        "run", tiny_bundle("random-2"), *images, "--prompt", "x", "--prompt", "y", "--max-new-tokens", 2,
        "--overlay", "kept.png", "--json",
    )  # fmt: skip
    assert result.code == 0, result
    first, second = json.loads(result.out)["turns"]
    stages = [(s["layer"], s["image"], s["kept"], s["total"]) for s in first["pruning"]["stages"]]
    assert stages == [(1, 0, 9, 16), (1, 1, 9, 16), (2, 0, 4, 9), (2, 1, 4, 9)]
    assert first["prompt_tokens"] > 32
    assert second["pruning"] == {"applied": False, "reason": "the prompt has no image", "stages": []}
    assert sorted(path.name for path in tmp_path.glob("kept*")) == ["kept-0.png", "kept-1.png"]
    text = call("run", tiny_bundle("random-2"), *images, "--prompt", "x", "--max-new-tokens", 2)
    assert "image 1, layer 2: kept 4 of 9 visual tokens" in text.err
