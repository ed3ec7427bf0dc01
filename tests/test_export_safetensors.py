"""Safetensors files that are broken, as downloads and forgers break them: one sentence, never a traceback."""

import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import redraw_checkpoint
from safetensors.torch import save_file

from tokprune.export.weights import read_header
from tokprune.runtime import cli
from tokprune.runtime.errors import UserError


def header(change):
    """Change the header of a safetensors file; its length is set right, the data stay as they are."""

    def break_it(path: Path) -> None:
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        entries = json.loads(content[8 : 8 + length])
        changed = json.dumps(change(entries) or entries).encode()
        path.write_bytes(len(changed).to_bytes(8, "little") + changed + content[8 + length :])

    return break_it


def raw_header(text: bytes):
    return lambda path: path.write_bytes(len(text).to_bytes(8, "little") + text)


def entry(**changes):
    """Change the entry of the tensor that lies last."""

    def change(entries):
        name = max((name for name in entries if name != "__metadata__"), key=lambda n: entries[n]["data_offsets"])
        entries[name].update(changes)

    return header(change)


def shift(begin: int, end: int):
    def change(entries):
        name = max((name for name in entries if name != "__metadata__"), key=lambda n: entries[n]["data_offsets"])
        offsets = entries[name]["data_offsets"]
        entries[name]["data_offsets"] = [offsets[0] + begin, offsets[1] + end]

    return header(change)


def cut(size: int):
    return lambda path: path.write_bytes(path.read_bytes()[:size])


BROKEN = {
    "empty": cut(0),
    "length cut": cut(5),
    "header cut": cut(300),
    "data cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "data too long": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "header too long": lambda path: path.write_bytes((101 << 20).to_bytes(8, "little") + path.read_bytes()[8:]),
    "header beyond any file": lambda path: path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:]),
    "not JSON": raw_header(b"{'a': 1}"),
    "no UTF-8": raw_header(b'{"\xff": 1}'),
    "a list": raw_header(b"[]"),
    "a number": raw_header(b"1"),
    "nested too deep": raw_header(b"[" * 100_000),
    "number too long": raw_header(b'{"a": ' + b"1" * 10_000 + b"}"),
    "entry is no object": raw_header(b'{"a": 1}'),
    "entry without offsets": raw_header(b'{"a": {"dtype": "F32", "shape": [1]}}'),
    "offsets beyond the file": shift(0, 1 << 40),
    "offset before the data": shift(-(1 << 40), 0),
    "offsets that overlap": shift(-4, 0),
    "offsets that leave a gap": shift(4, 0),
    "end before begin": entry(data_offsets=[64, 0]),
    "offsets are fractions": entry(data_offsets=[0.0, 4.0]),
    "offsets are text": entry(data_offsets=["0", "4"]),
    "three offsets": entry(data_offsets=[0, 4, 8]),
    "shape is a number": entry(shape=4),
    "shape is text": entry(shape="abc"),
    "shape is negative": entry(shape=[-1]),
    "type is a list": entry(dtype=["F32"]),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_refused_in_one_sentence(tmp_path, kind):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(30, 4), "b": torch.zeros(7), "c": torch.zeros(9, 5)}, path)
    read_header(path)
    BROKEN[kind](path)
    with pytest.raises(UserError, match=r"model\.safetensors is no whole safetensors file .*: fetch") as refusal:
        read_header(path)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (BROKEN["offsets beyond the file"], "no whole safetensors file"),
        (BROKEN["type is a list"], "no whole safetensors file"),
        (entry(dtype="I32"), "in I32, only F16, BF16, F32 are read"),
        (entry(dtype="BF16"), "contradicts itself at"),
        (entry(shape=[1]), "with the shape [1], its config.json says"),
    ],
)
def test_by_the_command(tiny_checkpoint, tmp_path, monkeypatch, capsys, break_it, words):
    redraw_checkpoint(tiny_checkpoint, tmp_path / "model")
    break_it(tmp_path / "model" / "model.safetensors")
    arguments = ["export", "--model", str(tmp_path / "model"), "--method", "none", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["tokprune", *arguments])
    with pytest.raises(SystemExit) as done:
        cli.main()
    assert done.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    errors = [line for line in captured.err.splitlines() if line.startswith("Error: ")]
    assert errors == captured.err.splitlines()[-1:]
    assert words in errors[0]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
