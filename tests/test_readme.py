"""The README's example, command by command, as a reader would type it."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
(CONSOLE,) = re.findall(r"```console\n(.*?)```", README, re.S)
(PYTHON,) = re.findall(r"```python\n(.*?)```", README, re.S)
COMMANDS = [line[2:] for line in CONSOLE.splitlines() if line.startswith("$ ")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("readme")


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(command, cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_example_runs(command: str, folder: Path):
    """In the order of the page: later commands use what earlier ones wrote."""
    done = run(shlex.split(command), folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_the_python_example_runs(folder: Path):
    assert (folder / "bundle").is_dir()
    done = run([sys.executable, "-c", PYTHON], folder)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^\[[\d\s]+\]$", done.stdout.split("\n", 1)[1].strip().replace("\n", " "))


def test_the_other_commands_have_the_options_that_are_shown():
    shown = re.findall(r"\| `(tokprune[^`]*)` \|", README)
    assert len(shown) >= 4
    for command in shown:
        words = shlex.split(command)
        verb = words[:1] if words[0] == "tokprune-export" else words[:2]
        text = run([*verb, "--help"], ROOT).stdout
        for option in (word for word in words if word.startswith("--")):
            assert option in text, command


@pytest.mark.parametrize("target", ["demo", "test"])
def test_the_two_commands_are_targets(target: str):
    assert f"make {target}" in README
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M)


def test_links_lead_somewhere():
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", README):
        assert (ROOT / link).exists(), link
