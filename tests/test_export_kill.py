"""Exports that are killed: nothing loads, the checkpoint is as it was, and the next export clears up."""

import hashlib
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import PLANS, recast_checkpoint

from tokprune.export import store
from tokprune.export.checkpoint import find_checkpoint
from tokprune.runtime.bundle import open_bundle
from tokprune.runtime.errors import UserError

# with shards linked, however small: what a killed process leaves is the checkpoint's own file then
EXPORT = (
    "import sys; from tokprune.export import store; from tokprune.runtime.cli import main; "
    "store.COPIED = 0; sys.argv[0] = 'tokprune'; main()"
)


def start(model: Path, out: Path) -> subprocess.Popen:
    arguments = ["--model", str(model), "--method", "lofi", "--layer", "1", "--keep", "6", "--precision", "fp16"]
    return subprocess.Popen(
        [sys.executable, "-c", EXPORT, "export", *arguments, "--out", str(out)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_killed_at_any_moment(tiny_checkpoint, export_traced, tmp_path, monkeypatch):
    """Three moments: a random while after the first, a middle and the last traced segment have begun."""
    model = recast_checkpoint(tiny_checkpoint, tmp_path / "model", torch.float16)
    before, generator = digests(model), random.Random(17)
    folder = tmp_path / "new"
    out = folder / "bundle"
    for step in ("vision_encoder", "decoder_0", "decoder_1"):
        child = start(model, out)
        assert child.stderr is not None
        assert any(step in line for line in child.stderr), f"the export ended before {step}"
        time.sleep(generator.uniform(0, 0.5))
        child.kill()
        child.communicate()
        assert child.returncode == -signal.SIGKILL
        left = list(folder.iterdir())
        assert len(left) == 1  # the one before was swept
        assert left[0].name.startswith(".bundle.partial-")
        for path in (out, left[0]):
            with pytest.raises(UserError, match=r"is not a bundle|not there"):
                open_bundle(path)
        assert digests(model) == before
    assert (left[0] / "model.safetensors").samefile(model / "model.safetensors")  # a link was left behind
    monkeypatch.setattr(store, "COPIED", 0)
    export_traced(find_checkpoint(str(model)), PLANS["lofi"], out, precision="fp16")
    open_bundle(out)
    assert list(folder.iterdir()) == [out]
    assert digests(model) == before
    assert (model / "model.safetensors").stat().st_nlink == 2
