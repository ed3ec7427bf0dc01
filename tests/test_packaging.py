"""The installed wheel, since a package missing from its list shows nowhere else.

The wheel goes into an environment of its own that borrows the other packages of this one.
"""

import shutil
import site
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from tokprune.plugins.build import SOURCES, source_files

ROOT = Path(__file__).parent.parent
FOLDERS = ("runtime", "plugins", "calibration", "export")


def run(*args, **options) -> str:
    done = subprocess.run([*map(str, args)], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy of the sources, so that no build folder is left among them, nor an old one used."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    files = run("git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", cwd=ROOT).split("\0")
    for name in filter(None, files):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, source)
    (made,) = out.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The ``bin`` folder of an environment with the wheel in it."""
    path = tmp_path_factory.mktemp("environment")
    venv.create(path, with_pip=False, symlinks=True)
    (packages,) = path.glob("lib/python*/site-packages")
    run(sys.executable, "-m", "pip", "--python", path / "bin" / "python", "install", "--no-deps", "--no-index", wheel)
    # Plain paths: the .pth file that makes this tree importable is not read from there. Behind the wheel's own.
    (packages / "borrowed.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    return path / "bin"


def test_wheel_holds_every_file(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        f"tokprune/{path.relative_to(ROOT).as_posix()}"
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".safetensors", ".html", ".css") or path.parent.name == "checkpoint"
    }
    wanted |= {f"tokprune/plugins/{path.relative_to(SOURCES).as_posix()}" for path in source_files()}
    assert "tokprune/plugins/CMakeLists.txt" in wanted
    assert "tokprune/plugins/leverage_topk/launch.cu" in wanted
    assert "tokprune/export/demo/modules/default/modules.safetensors" in wanted
    assert "tokprune/export/demo/checkpoint/model.safetensors" in wanted
    assert wanted - names == set()
    assert {name.split("/")[0] for name in names if "dist-info" not in name} == {"tokprune"}


def test_wheel_is_what_runs(installed, tmp_path):
    code = "import tokprune.export.pipeline as e, tokprune.runtime as r; print(e.__file__); print(r.__file__)"
    for path in run(installed / "python", "-c", code, cwd=tmp_path).split():
        assert Path(path).is_relative_to(installed.parent)


def test_export_and_run(installed, tiny_checkpoint, tmp_path):
    assert "--method" in run(installed / "tokprune-export", "--help", cwd=tmp_path)
    run(
        *(installed / "tokprune-export", "--model", tiny_checkpoint, "--method", "lofi"),
        *("--layer", 0, "--keep", 6, "--rank", 4, "--out", "bundle"),
        cwd=tmp_path,
    )
    answer = run(
        installed / "tokprune", "run", "bundle", "--prompt", "x", "--max-new-tokens", 2, "--json", cwd=tmp_path
    )
    assert '"pruning": {"applied": false, "reason": "the prompt has no image"' in answer
    assert "demo" in run(installed / "tokprune", "flops", cwd=tmp_path)
