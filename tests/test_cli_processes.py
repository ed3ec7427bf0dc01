"""What only a process can show of mistakes: signals, full disks, closed pipes, packages that are missing."""

import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from commands import Result, finish, listing, process, started

ROOT = os.geteuid() == 0


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


def test_full_disk(call, traced, tiny_checkpoint, tmp_path):
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
