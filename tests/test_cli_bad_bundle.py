"""Bundles that are broken: one sentence, exit code 2, nothing left behind."""

import hashlib
import shutil

import pytest
from commands import edit_json, edit_manifest, truncate, write


def replace(name, content):
    """Replace a file, and correct the manifest, as if it had been exported so."""

    def change(path):
        (path / name).write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        files = {"size": len(content), "sha256": digest}
        edit_json(
            path / "tokprune.json",
            lambda data: next(file for file in data["files"] if file["path"] == name).update(files),
        )

    return change


def flip_a_byte(name):
    def change(path):
        content = bytearray((path / name).read_bytes())
        content[len(content) // 2] ^= 1
        (path / name).write_bytes(content)

    return change


def leaving_link(path):
    outside = path.parent / "outside"
    (path / "model.safetensors").rename(outside)
    (path / "model.safetensors").symlink_to(outside)


def linked_manifest(path):
    (path / "tokprune.json").rename(path.parent / "outside")
    (path / "tokprune.json").symlink_to("../outside")


def link_in_a_circle(path):
    (path / "model.safetensors").unlink()
    (path / "model.safetensors").symlink_to("model.safetensors")


def as_segment(name, other):
    return lambda path: replace(name, (path / other).read_bytes())(path)


def file_path(value):
    """Of the weights, which no segment names."""

    def change(data):
        next(file for file in data["files"] if file["path"] == "model.safetensors").update(path=value)

    return edit_manifest(change)


BUNDLES = {
    "no manifest": (lambda path: (path / "tokprune.json").unlink(), ["is not a bundle"]),
    "file missing": (lambda path: (path / "model.safetensors").unlink(), ["lacks its file model.safetensors"]),
    "tokenizer missing": (lambda path: (path / "tokenizer.json").unlink(), ["lacks its file tokenizer.json"]),
    "truncated": (truncate("model.safetensors", 100), ["model.safetensors", "100 bytes"]),
    "longer": (truncate("model.safetensors", 10_000_000), ["model.safetensors", "10000000 bytes"]),
    "altered": (flip_a_byte("model.safetensors"), ["model.safetensors", "altered"]),
    "altered graph": (flip_a_byte("decoder_1.onnx"), ["decoder_1.onnx", "altered"]),
    "schema 2": (edit_manifest(lambda data: data.update(schema=2)), ["schema version 2", "version 5"]),
    "schema true": (edit_manifest(lambda data: data.update(schema=True)), ["schema version True"]),
    "no schema": (edit_manifest(lambda data: data.pop("schema")), ["schema version None"]),
    "manifest cut": (truncate("tokprune.json", 1000), ["not valid JSON"]),
    "manifest empty": (truncate("tokprune.json", 0), ["not valid JSON"]),
    "manifest is a list": (write("tokprune.json", "[1]"), ["schema"]),
    "manifest is nested too deep": (write("tokprune.json", "[" * 100_000), ["not valid JSON"]),
    "manifest is binary": (lambda path: (path / "tokprune.json").write_bytes(b"\xff\xfe\x00"), ["cannot be read"]),
    "absolute path": (file_path("/etc/passwd"), ["/etc/passwd", "outside"]),
    "path to the parent": (file_path("../outside"), ["../outside", "outside"]),
    "path with NUL": (file_path("a\0b"), ["cannot be"]),
    "link leaving": (leaving_link, ["model.safetensors", "outside"]),
    "manifest linked": (linked_manifest, ["tokprune.json", "outside"]),
    "link in a circle": (link_in_a_circle, ["bundle"]),
    "garbage graph": (replace("decoder_1.onnx", b"garbage" * 99), ["decoder_1.onnx", "ONNX Runtime cannot load"]),
    "empty graph": (replace("decoder_1.onnx", b""), ["decoder_1.onnx"]),
    "another segment's graph": (as_segment("decoder_1.onnx", "decoder_0.onnx"), ["decoder_1.onnx"]),
    "garbage tokenizer": (replace("tokenizer.json", b"{}"), ["tokenizer.json"]),
    "garbage preprocessor": (replace("preprocessor_config.json", b"["), ["preprocessor_config.json"]),
    "preprocessor of another size": (
        replace("preprocessor_config.json", b'{"crop_size": {"height": 42, "width": 42}}'),
        ["42", "56"],
    ),
    "key missing": (edit_manifest(lambda data: data.pop("plan")), ["manifest.plan"]),
    "key unknown": (edit_manifest(lambda data: data["model"].update(colour=1)), ["manifest.model.colour"]),
    "segment missing": (edit_manifest(lambda data: data["segments"].pop(3)), ["contradicts itself", "select_0"]),
    "ranges do not tile": (edit_manifest(lambda data: data["segments"][4].update(layers=[2, 3])), ["decoder_1"]),
    "negative size": (edit_manifest(lambda data: data["files"][0].update(size=-1)), ["-1 bytes"]),
    "plan of another layer": (edit_manifest(lambda data: data["plan"]["stages"][0].update(layer=2)), ["decoder_0"]),
    "plan keeps more": (edit_manifest(lambda data: data["plan"]["stages"][0].update(keep=17)), ["keep 17 of 16"]),
    "plan keeps fewer": (edit_manifest(lambda data: data["plan"]["stages"][0].update(keep=4)), ["select_0"]),
}


@pytest.mark.parametrize("kind", BUNDLES)
def test_bundle(call, tiny_bundle, picture, tmp_path, kind):
    break_it, words = BUNDLES[kind]
    shutil.copytree(tiny_bundle("random"), tmp_path / "bundle")
    break_it(tmp_path / "bundle")
    call("run", "bundle", "--image", picture, "--prompt", "What is this?").refused("bundle", *words)


@pytest.mark.parametrize("verb", ["run", "bench", "verify"])
def test_bundle_is_not_there(call, verb):
    call(verb, "nowhere", *(["--prompt", "x"] if verb == "run" else [])).refused("nowhere", "tokprune-export")


def test_bundle_is_a_file(call, picture):
    call("run", picture, "--prompt", "x").refused("a file")


def test_flops_of_a_bundle_that_contradicts_itself(call, tiny_bundle, tmp_path):
    shutil.copytree(tiny_bundle("random"), tmp_path / "bundle")
    edit_manifest(lambda data: data["segments"].pop(3))(tmp_path / "bundle")
    call("flops", "--model", "bundle").refused("contradicts itself")
