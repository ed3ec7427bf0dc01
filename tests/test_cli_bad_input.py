"""Every mistake a user can make, through the commands: one sentence, exit code 2, nothing left behind.

In this process where it can be, since starting Python and PyTorch takes seconds; real processes for what
only a process can show: signals, full disks, closed pipes, packages that are missing.
"""

import hashlib
import json
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from tokprune.runtime import cli

ROOT = os.geteuid() == 0


class Result(NamedTuple):
    code: int
    out: str
    err: str

    def refused(self, *words: str) -> None:
        """One sentence with these ``words`` in it, behind progress lines at most."""
        assert self.code == 2, self
        assert self.out == ""
        assert "Traceback" not in self.err
        errors = [line for line in self.err.splitlines() if line.startswith("Error: ")]
        assert errors == self.err.splitlines()[-1:]
        for word in words:
            assert word in errors[0]


def listing(folder: Path) -> list[tuple[str, int]]:
    return sorted(
        (str(path.relative_to(folder)), 0 if path.is_dir() else path.lstat().st_size) for path in folder.rglob("*")
    )


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """Runs ``tokprune`` in this process, and sees to it that a failure leaves ``tmp_path`` as it was."""
    monkeypatch.chdir(tmp_path)

    def call(*args) -> Result:
        monkeypatch.setattr(sys, "argv", ["tokprune", *map(str, args)])
        before = listing(tmp_path)
        with pytest.raises(SystemExit) as done:
            cli.main()
        if done.value.code != 0:
            assert listing(tmp_path) == before
        return Result(done.value.code, *capsys.readouterr())

    return call


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)).save(path)
    return path


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


# checkpoints


def edit_json(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def only_pickle(path):
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


def without_a_weight(path):
    weights = load_file(path / "model.safetensors")
    weights.pop(sorted(weights)[5])
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def with_another_shape(path):
    weights = load_file(path / "model.safetensors")
    name = next(name for name in weights if name.endswith("lm_head.weight"))
    weights[name] = weights[name][:, :-1].copy()
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def index_of(*shards):
    def change(path):
        (path / "model.safetensors").rename(path / "model-1.safetensors")
        index = {"weight_map": {f"weight_{i}": shard for i, shard in enumerate(shards)}}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))

    return change


def truncate(name, size):
    return lambda path: os.truncate(path / name, size)


def write(name, text):
    return lambda path: (path / name).write_text(text)


def config(**changes):
    return lambda path: edit_json(path / "config.json", lambda data: data.update(changes))


def other_image_token(path):
    text = (path / "tokenizer.json").read_text()
    (path / "tokenizer.json").write_text(text.replace("<image>", "<photo>"))
    edit_json(path / "tokenizer_config.json", lambda data: data.update(image_token="<photo>"))


CHECKPOINTS = {
    "no weights": (lambda path: (path / "model.safetensors").unlink(), ["has no weights"]),
    "pickle": (only_pickle, ["pickle", "pytorch_model.bin", "safetensors"]),
    "truncated": (truncate("model.safetensors", 50_000), ["model.safetensors"]),
    "pointer": (write("model.safetensors", "version https://git-lfs.github.com/spec/v1\n"), ["safetensors"]),
    "weight missing": (without_a_weight, ["lacks"]),
    "weight of another shape": (with_another_shape, ["shape", "lm_head"]),
    "shard missing": (index_of("model-1.safetensors", "model-2.safetensors"), ["lacks its shard model-2"]),
    "shard outside": (index_of("../model-1.safetensors"), ["outside the checkpoint"]),
    "shard is the parent": (index_of(".."), ["outside the checkpoint"]),
    "shard is no text": (index_of(7), ["no map of weights"]),
    "index without map": (write("model.safetensors.index.json", "{}"), ["no map of weights"]),
    "no config": (lambda path: (path / "config.json").unlink(), ["no config.json"]),
    "config is no JSON": (write("config.json", "{"), ["not valid JSON"]),
    "config is nested too deep": (write("config.json", "[" * 100_000), ["not valid JSON"]),
    "config is a list": (write("config.json", "[]"), ["no JSON object"]),
    "architecture": (config(model_type="llama"), ["llama", "llava"]),
    "llava-next": (config(model_type="llava_next"), ["llava_next"]),
    "text_config": (config(text_config=[1]), ["text_config"]),
    "quantized": (config(quantization_config={"quant_method": "awq"}), ["quantized"]),
    "image token": (config(image_token_index=9), ["<image>", "token 3", "9"]),
    "image token outside": (config(image_token_index=576), ["576"]),
    "eos": (write("generation_config.json", '{"eos_token_id": "x"}'), ["eos_token_id"]),
    "no tokenizer": (lambda path: (path / "tokenizer.json").unlink(), ["no tokenizer.json"]),
    "tokenizer": (write("tokenizer.json", '{"model": 3}'), ["processor"]),
    "other tokenizer": (other_image_token, ["<image>"]),
    "no processor": (lambda path: (path / "processor_config.json").unlink(), ["processor"]),
    "processor of another size": (
        lambda path: edit_json(
            path / "processor_config.json",
            lambda data: data["image_processor"].update(crop_size={"height": 336, "width": 336}),
        ),
        ["336", "56"],
    ),
    "chat template": (write("chat_template.jinja", "[INST]{{ messages }}"), ["chat template"]),
    "broken chat template": (write("chat_template.jinja", "{% if %}"), ["chat template"]),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_checkpoint(call, tiny_checkpoint, tmp_path, kind):
    break_it, words = CHECKPOINTS[kind]
    shutil.copytree(tiny_checkpoint, tmp_path / "model")
    if kind == "index without map":
        (tmp_path / "model" / "model.safetensors").unlink()
    break_it(tmp_path / "model")
    call("export", "--model", "model", "--method", "none", "--out", "new/bundle").refused("model", *words)


def test_pickle_is_never_opened(call, tiny_checkpoint, tmp_path):
    """Beside safetensors a pickle is ignored; one that runs code when opened must not run."""
    shutil.copytree(tiny_checkpoint, tmp_path / "model")
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch opened'\ntR.")
    truncate("model.safetensors", 50_000)(tmp_path / "model")
    call("export", "--model", "model", "--method", "none", "--out", "bundle").refused("model.safetensors")
    assert not (tmp_path / "opened").exists()


def test_model_is_not_there(call):
    call("export", "--model", "nowhere", "--method", "none").refused("nowhere does not exist")


def test_model_is_a_file(call, picture):
    call("export", "--model", picture, "--method", "none").refused("is a file")


# where to write


def test_out_holds_something_else(call, tiny_checkpoint, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("my only copy")
    call("export", "--model", tiny_checkpoint, "--method", "none", "--out", "out").refused("is not a bundle")


def test_out_is_a_bundle_with_something_else_in_it(call, tiny_checkpoint, tiny_bundle, tmp_path):
    shutil.copytree(tiny_bundle("random"), tmp_path / "out")
    (tmp_path / "out" / "thesis.tex").write_text("my only copy")
    call("export", "--model", tiny_checkpoint, "--method", "none", "--out", "out").refused("thesis.tex", "lost")


def test_out_is_a_file(call, tiny_checkpoint, picture):
    call("export", "--model", tiny_checkpoint, "--method", "none", "--out", picture).refused("is not a directory")


def test_out_is_below_a_file(call, tiny_checkpoint, picture):
    call("export", "--model", tiny_checkpoint, "--method", "none", "--out", picture / "b").refused("is a file")


def test_out_is_a_link_to_nothing(call, tiny_checkpoint, tmp_path):
    (tmp_path / "out").symlink_to("nowhere")
    call("export", "--model", tiny_checkpoint, "--method", "none", "--out", "out").refused("is not a directory")


def test_out_has_too_long_a_name(call, tiny_checkpoint):
    call("export", "--model", tiny_checkpoint, "--method", "none", "--out", "x" * 300).refused("too long")


def test_out_is_the_checkpoint(call, tiny_checkpoint, tmp_path):
    shutil.copytree(tiny_checkpoint, tmp_path / "model")
    call("export", "--model", "model", "--method", "none", "--out", "model").refused("is not a bundle")


# bundles


def edit_manifest(change):
    return lambda path: edit_json(path / "tokprune.json", change)


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


# what only a process can show


MAIN = "import sys; from tokprune.runtime.cli import main; sys.argv[0] = 'tokprune'; main()"


def process(*args, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", MAIN, *map(str, args)],
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8", **options},
    )


def finish(child: subprocess.Popen) -> Result:
    out, err = child.communicate(timeout=300)
    return Result(child.returncode, out or "", err)


def started(child: subprocess.Popen, step: str) -> None:
    """Wait until the export has told of ``step``."""
    assert child.stderr is not None
    for line in child.stderr:
        if step in line:
            return
    raise AssertionError(f"the export ended before '{step}'")


def test_interrupt(tiny_checkpoint, tmp_path):
    child = process("export", "--model", tiny_checkpoint, "--method", "none", "--out", tmp_path / "new" / "bundle")
    started(child, "vision_encoder")
    assert any((tmp_path / "new").iterdir())  # there is something that could be left behind
    child.send_signal(signal.SIGINT)
    result = finish(child)
    assert result.code == 130
    assert result.out == ""
    assert result.err.splitlines()[-1] == "Interrupted: nothing unfinished was left behind."
    assert "Traceback" not in result.err
    assert not listing(tmp_path)


def test_kill(tiny_checkpoint, tiny_bundle, tmp_path):
    """What kill -9 leaves does not load, and the next one to export there sweeps it; an old bundle stays."""
    from tokprune.export.bundle import staged
    from tokprune.runtime.bundle import open_bundle
    from tokprune.runtime.errors import UserError

    shutil.copytree(tiny_bundle("random"), tmp_path / "bundle")
    child = process("export", "--model", tiny_checkpoint, "--method", "none", "--out", tmp_path / "bundle")
    started(child, "embed_tokens")
    child.kill()
    assert finish(child).code == -signal.SIGKILL
    left = [path for path in tmp_path.iterdir() if path.name != "bundle"]
    assert len(left) == 1
    with pytest.raises(UserError, match="is not a bundle"):
        open_bundle(left[0])
    open_bundle(tmp_path / "bundle")
    with staged(tmp_path / "bundle") as stage:
        (stage / "tokprune.json").write_text("{}")
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_full_disk(call, tiny_checkpoint, tmp_path):
    """A file system of its own that fills up while weights are written."""
    small = tmp_path / "small"
    small.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", small], capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"no file system may be mounted here: {mount.stderr.strip()}")
    try:
        call("export", "--model", tiny_checkpoint, "--method", "none", "--out", small / "bundle").refused(
            "disk is full"
        )
        subprocess.run(["mount", "-o", "remount,ro", small], check=True)
        call("export", "--model", tiny_checkpoint, "--method", "none", "--out", small / "bundle").refused("read-only")
    finally:
        subprocess.run(["umount", small], check=True)


def test_file_size_limit(tiny_checkpoint, tmp_path):
    """Runs everywhere; to a writer it looks like a full disk."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    child = process(
        "export", "--model", tiny_checkpoint, "--method", "none", "--out", tmp_path / "bundle", preexec_fn=limit
    )
    finish(child).refused("cannot be written", "size")
    assert not listing(tmp_path)


@pytest.mark.skipif(not ROOT, reason="only root may become another user")
def test_out_where_writing_is_not_permitted(tiny_checkpoint, tmp_path, monkeypatch):
    from tokprune.export.bundle import staged
    from tokprune.runtime.errors import UserError

    tmp_path.chmod(0o755)
    monkeypatch.chdir(tmp_path)  # reached without the folders above, which only root may pass
    os.seteuid(65534)
    try:
        with pytest.raises(UserError, match="not permitted"), staged(Path("bundle")):
            pass
    finally:
        os.seteuid(0)


def test_closed_pipe():
    child = process("flops", "--json")
    assert child.stdout is not None
    child.stdout.close()
    assert child.stderr is not None
    assert child.stderr.read() == ""
    assert child.wait(timeout=60) == 141


def test_output_to_a_full_device():
    with open("/dev/full", "w") as full:
        finish(process("flops", stdout=full)).refused("No space left")


def test_terminal_without_unicode(tiny_bundle):
    """What the terminal cannot show of an answer is shown in escapes."""
    latin = {"env": {**os.environ, "PYTHONIOENCODING": "latin-1"}, "encoding": "latin-1"}
    result = finish(process("run", tiny_bundle("random"), "--prompt", "x", "--max-new-tokens", 40, **latin))
    assert result.code == 0
    assert "\\ufffd" in result.out


WITHOUT = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name == {0!r} or name.startswith({0!r} + "."):
            raise ModuleNotFoundError("No module named " + repr(name), name=name)
sys.meta_path.insert(0, Missing())
from tokprune.runtime.cli import main
sys.argv[0] = "tokprune"
main()
"""


@pytest.mark.parametrize(
    ("args", "package", "words"),
    [
        (["export", "--method", "none"], "torch", ["torch", "tokprune[export]"]),
        (["export", "--method", "none"], "tokprune.export", ["tokprune.export", "tokprune[export]"]),
        (["verify", "bundle", "--data", "data.jsonl", "--reference", "demo"], "torch", ["torch", "tokprune[export]"]),
        (["demo-data", "--n", "1", "--out", "scenes"], "sklearn", ["scikit-learn"]),
        (["run", "bundle", "--prompt", "x"], "tokenizers", ["tokenizers", "--upgrade tokprune"]),
        (["run", "bundle", "--prompt", "x"], "onnxruntime", ["onnxruntime"]),
    ],
)
def test_package_missing(tiny_bundle, tmp_path, args, package, words):
    (tmp_path / "data.jsonl").write_text('{"prompt": "a"}')
    before = listing(tmp_path)
    args = [str(tiny_bundle("random")) if arg == "bundle" else arg for arg in args]
    child = subprocess.run(
        [sys.executable, "-c", WITHOUT.format(package), *args], capture_output=True, text=True, cwd=tmp_path
    )
    Result(child.returncode, child.stdout, child.stderr).refused("pip install", *words)
    assert listing(tmp_path) == before
