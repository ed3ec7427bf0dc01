"""Runs ``tokprune`` for tests, in a process of its own or not, and breaks files in the ways that users do."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple


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


def edit_json(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def edit_manifest(change):
    return lambda path: edit_json(path / "tokprune.json", change)


def truncate(name, size):
    return lambda path: os.truncate(path / name, size)


def write(name, text):
    return lambda path: (path / name).write_text(text)
