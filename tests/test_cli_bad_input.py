"""Mistakes in what is typed, in images and in data files, one sentence, exit code 2."""

import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

ROOT = os.geteuid() == 0


def test_good_input_is_answered(call, tiny_bundle, picture):
    """The ground on which the refusals below stand: without the mistake, there is an answer."""
    result = call("run", tiny_bundle("random"), "--image", picture, "--prompt", "What is this?", "--max-new-tokens", 4)
    assert result.code == 0
    assert result.out.strip()


# images


def bomb(path):
    """A PNG of a few bytes that says it has 50 000 × 50 000 pixels."""
    content = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")):
        content += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    path.write_bytes(content)


def truncated(path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:4000])


IMAGES = {
    "missing": (lambda path: None, "cannot be opened"),
    "text": (lambda path: path.write_text("a photograph of a cat"), "is none of PNG"),
    "empty": (lambda path: path.write_bytes(b""), "is none of PNG"),
    "truncated": (truncated, "damaged or cut short"),
    "bomb": (bomb, "scale it down"),
    "directory": (lambda path: path.mkdir(), "is a directory"),
}


@pytest.mark.parametrize("kind", IMAGES)
def test_image(call, tiny_bundle, tmp_path, kind):
    make, words = IMAGES[kind]
    make(tmp_path / "image.png")
    call("run", tiny_bundle("random"), "--image", "image.png", "--prompt", "What is this?").refused("image.png", words)


@pytest.mark.skipif(ROOT, reason="root may read every file")
def test_image_that_may_not_be_read(call, tiny_bundle, picture):
    picture.chmod(0)
    call("run", tiny_bundle("random"), "--image", picture, "--prompt", "What is this?").refused("Permission denied")


# prompts and options of run


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--prompt", "digit " * 200], ["context", "128", "shorter"]),
        (["--prompt", " "], ["the prompt is empty"]),
        (["--prompt", "what <image> is"], ["<image>"]),
        ([], ["--prompt", "tokprune run --help"]),
        (["--prompt", "x", "--max-new-tokens", "0"], ["0 new tokens"]),
        (["--prompt", "x", "--temperature", "-1"], ["temperature -1"]),
        (["--prompt", "x", "--temperature", "nan"], ["temperature nan"]),
        (["--prompt", "x", "--top-p", "0"], ["top-p 0"]),
        (["--prompt", "x", "--seed", "-1"], ["seed"]),
        (["--prompt", "x", "--threads", "-1"], ["threads"]),
        (["--prompt", "x", "--engine", "abacus"], ["abacus"]),
        (["--prompt", "x", "--nonsense"], ["--nonsense", "--help"]),
        (["--prompt", "x", "--overlay", "kept.gif"], ["kept.gif", "extension"]),
        (["--prompt", "x", "--overlay", "nowhere/kept.png"], ["nowhere", "does not exist"]),
    ],
)
def test_run_options(call, tiny_bundle, picture, options, words):
    call("run", tiny_bundle("random"), "--image", picture, *options).refused(*words)


def test_overlay_without_image(call, tiny_bundle):
    call("run", tiny_bundle("random"), "--prompt", "x", "--overlay", "kept.png").refused("--overlay", "--image")


# plans


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--method", "random", "--layer", "3", "--keep", "4"], ["layer 3", "3 layers", "0 to 2"]),
        (["--method", "random", "--layer", "-1", "--keep", "4"], ["layer -1"]),
        (["--method", "random", "--keep", "17"], ["keep 17 of 16"]),
        (["--method", "random", "--keep", "0"], ["keep 0 of 16"]),
        (["--method", "random"], ["keep 64 of 16"]),  # the default, made for 576 tokens
        (["--method", "random", "--keep", "1.5"], ["1.5"]),
        (["--method", "random", "--keep", "nan"], ["nan"]),
        (["--method", "random", "--keep", "many"], ["many is no number"]),
        (["--method", "random", "--stage", "1:4", "--stage", "2:5"], ["keep 5 of 4"]),
        (["--method", "random", "--stage", "2:5", "--stage", "1:4"], ["ascending"]),
        (["--method", "random", "--stage", "2:5", "--stage", "2:4"], ["ascending"]),
        (["--method", "random", "--stage", "2"], ["L:K"]),
        (["--method", "random", "--stage", "2:5", "--keep", "4"], ["--stage", "--keep"]),
        (["--method", "random", "--keep", "4", "--rank", "2"], ["--rank", "lofi"]),
        (["--method", "random", "--keep", "4", "--seed", "-1"], ["seed"]),
        (["--method", "none", "--keep", "4"], ["none", "--keep"]),
        (["--method", "lofi", "--keep", "4", "--rank", "16"], ["rank 16", "16 visual tokens", "1 to 15"]),
        (["--method", "lofi", "--keep", "4", "--rank", "0"], ["rank 0"]),
        (["--method", "lofi", "--keep", "4", "--rank", "1.0"], ["rank 1.0"]),
        (["--method", "lofi", "--stage", "1:6", "--stage", "2:4", "--rank", "6"], ["rank 6", "layer 2"]),
        (["--method", "lottery"], ["lottery"]),
        ([], ["--method"]),
        (["--method", "none", "--precision", "fp8"], ["fp8"]),
    ],
)
def test_plan(call, tiny_checkpoint, options, words):
    call("export", "--model", tiny_checkpoint, *options, "--out", "bundle").refused(*words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model", "8b"], ["8b"]),
        (["--text-tokens", "0"], ["--text-tokens 0"]),
        (["--stage", "99:4"], ["layer 99"]),
        (["--layer", "2"], ["--keep"]),
    ],
)
def test_flops_options(call, options, words):
    call("flops", *options).refused(*words)


def test_bench_against_a_bundle_that_prunes(call, tiny_bundle):
    call("bench", tiny_bundle("random"), "--against", tiny_bundle("random")).refused("prunes", "none")


@pytest.mark.parametrize("verb", ["bench", "run"])
def test_a_context_that_is_too_short(call, tiny_bundle, picture, verb):
    options = ["--text-tokens", "200"] if verb == "bench" else ["--image", picture, "--prompt", "x " * 200]
    call(verb, tiny_bundle("random"), *options).refused("128")


# data files


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("", ["holds no samples"]),
        ('{"prompt": "a"}\n{"prompt": ', ["line 2", "not valid JSON"]),
        ('{"question": "a"}', ["line 1", '"prompt"']),
        ('{"prompt": "a", "image": "nowhere.png"}', ["line 1", "nowhere.png"]),
    ],
)
def test_data(call, tiny_checkpoint, tiny_bundle, tmp_path, lines, words):
    (tmp_path / "data.jsonl").write_text(lines)
    call("verify", tiny_bundle("random"), "--reference", tiny_checkpoint, "--data", "data.jsonl").refused(
        "data.jsonl", *words
    )


def test_verify_against_another_checkpoint(call, tiny_bundle, tmp_path):
    (tmp_path / "data.jsonl").write_text('{"prompt": "a"}')
    call("verify", tiny_bundle("random"), "--reference", "demo", "--data", "data.jsonl").refused("was not made from")


# the command line itself


def test_unknown_verb(call):
    call("prune").refused("prune", "tokprune --help")


def test_no_verb_shows_the_verbs(call):
    result = call()
    assert result.code == 0
    assert "export" in result.out
