"""``tokprune train``: what it writes and says, its mistakes, and how it is stopped and taken up again."""

import json
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tokprune.runtime import cli

MAIN = "import sys; from tokprune.runtime.cli import main; sys.argv[0] = 'tokprune'; main()"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with three questions about one picture."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    picture = np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "images" / "a.png")
    rows = [{"image": "images/a.png", "prompt": f"What digit is {c}?", "answer": "3"} for c in ("red", "blue", "green")]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    turns = [{"from": "human", "value": "<image>\nWhat digit is red?"}, {"from": "gpt", "value": "3"}]
    entries = [{"id": "1", "image": "a.png", "conversations": turns}, {"id": "2", "conversations": turns}]
    (tmp_path / "conversations.json").write_text(json.dumps(entries))
    return tmp_path


@pytest.fixture
def call(monkeypatch, capsys, tiny_checkpoint):
    def call(*args):
        options = ["--model", tiny_checkpoint, "--device", "cpu", *args]
        monkeypatch.setattr(sys, "argv", ["tokprune", "train", *map(str, options)])
        with pytest.raises(SystemExit) as done:
            cli.main()
        return done.value.code, *capsys.readouterr()

    return call


def test_trains(call, folder):
    code, out, err = call("--data", "data.jsonl", "--steps", 2, "--batch-size", 2, "--out", "modules")
    assert code == 0
    assert "modules: lvpruning: 6 visual tokens from layer 1 on, 2 visual tokens from layer 2 on" in out
    assert "--method lvpruning --modules modules" in out
    assert "step 2/2" in err
    assert "3 questions" in err
    info = json.loads((folder / "modules" / "modules.json").read_text())
    assert info["module"] == {"width": 64, "heads": 2, "intermediate": 256}
    assert info["model"]["name"] == "tiny"
    assert info["training"]["steps"] == 2
    assert sorted(path.name for path in folder.iterdir()) == ["conversations.json", "data.jsonl", "images", "modules"]


def test_options_and_json(call, folder):
    options = ["--stage", "1:0.5", "--width", 32, "--intermediate", 40, "--accumulate", 2, "--checkpointing", "--json"]
    data = ["--data", "conversations.json", "--images", "images", "--steps", 1, "--batch-size", 1, "--out", "a/b"]
    code, out, err = call(*data, *options)
    assert code == 0
    result = json.loads(out)
    assert result["modules"] == "a/b"
    assert result["stages"] == [{"layer": 1, "kept": 8}]
    assert result["steps"] == 1
    assert set(result["final"]) == {"loss", "lm", "kept"}
    assert "left out for want of an image: 1" in err
    info = json.loads((folder / "a" / "b" / "modules.json").read_text())
    assert info["module"] == {"width": 32, "heads": 1, "intermediate": 40}
    assert info["training"]["accumulate"] == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--data", "nowhere.jsonl"], ["nowhere.jsonl"]),
        (["--images", "images"], ["--images", "JSON lines"]),
        (["--data", "conversations.json"], ["entry 1", "a.png", "--images"]),
        (["--stage", "9:4"], ["layer 9"]),
        (["--steps", "3", "--guided-steps", "4"], ["4 guided steps of 3"]),
        (["--guidance-weight", "-1"], ["--guidance-weight -1"]),
        (["--guidance-weight", "nan"], ["--guidance-weight nan"]),
        (["--stage", "1:99"], ["keep 99 of 16"]),
        (["--stage", "1"], ["L:K"]),
        (["--width", "30", "--heads", "4"], ["width 30", "4 heads"]),
        (["--width", "0"], ["width 0"]),
        (["--intermediate", "-1"], ["-1"]),
        (["--learning-rate", "0"], ["--learning-rate", "0.0"]),
        (["--learning-rate", "nan"], ["--learning-rate", "nan"]),
        (["--ratio-weight", "-1"], ["--ratio-weight"]),
        (["--steps", "0"], ["--steps"]),
        (["--model", "nowhere"], ["nowhere"]),
        (["--out", "data.jsonl"], ["data.jsonl", "not a directory"]),
        (["--out", "images"], ["a.png", "choose another --out"]),
    ],
)
def test_refused(call, folder, options, words):
    before = sorted(folder.rglob("*"))
    code, out, err = call("--data", "data.jsonl", "--out", "modules", "--steps", 1, *options)
    assert code == 2, err
    assert out == ""
    last = err.splitlines()[-1]
    assert last.startswith("Error: ")
    assert "Traceback" not in err
    for word in words:
        assert word in last
    assert sorted(folder.rglob("*")) == before


def test_damaged_image(call, folder):
    (folder / "images" / "a.png").write_bytes(b"no picture")
    code, _, err = call("--data", "data.jsonl", "--out", "modules", "--steps", 1)
    assert code == 2
    assert "a.png" in err.splitlines()[-1]
    assert not (folder / "modules").exists()


def test_memory_of_the_gpu(call, folder, monkeypatch):
    import torch

    def train(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("tokprune.export.lvpruning.train.train", train)
    code, _, err = call("--data", "data.jsonl", "--out", "modules")
    assert code == 2
    assert all(word in err.splitlines()[-1] for word in ("--batch-size 8", "--accumulate", "--checkpointing"))


def test_out_and_data_are_required(call, folder):
    for option in ("--data", "--out"):
        code, _, err = call(option, "data.jsonl")
        assert code == 2
        assert ("--out" if option == "--data" else "--data") in err


def test_stopped_and_taken_up(call, folder, tiny_checkpoint):
    """Ctrl-C in a process of its own: told what to do; what was saved stays and is taken up."""
    from tokprune.export.lvpruning import train as training

    options = ["--data", "data.jsonl", "--steps", 100_000, "--batch-size", 1, "--out", "modules"]
    code = f"import tokprune.export.lvpruning.train as t; t.train.__kwdefaults__['save_seconds'] = 0; {MAIN}"
    arguments = ["train", "--model", tiny_checkpoint, "--device", "cpu", *options]
    child = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stderr is not None
    for line in child.stderr:
        if line.startswith("step"):
            break
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=120)
    assert child.returncode == 130
    assert out == ""
    assert err.splitlines()[-1].startswith("Stopped at step")
    assert "Traceback" not in err
    assert training.state_path(folder / "modules").is_file()
    assert not (folder / "modules").exists()
    code, _, err = call("--data", "data.jsonl", "--steps", 3, "--batch-size", 1, "--out", "modules")
    assert code == 2
    assert "steps 100000, 3 was asked for" in err.splitlines()[-1]
    code, _, err = call("--data", "data.jsonl", "--steps", 3, "--batch-size", 1, "--out", "modules", "--restart")
    assert code == 0
    assert not training.state_path(folder / "modules").exists()
