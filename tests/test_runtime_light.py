"""What goes onto a device stays light: no heavy package, quick to start, Python 3.10.

Start-up is measured in processor time of the child, the least of several runs: wall time and single runs
depend on what else the machine does.
"""

import ast
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import tokprune.runtime

FOLDER = Path(tokprune.runtime.__file__).parent
MODULES = [module.name for module in pkgutil.walk_packages([str(FOLDER)], "tokprune.runtime.")]

ANSWER = """
import importlib, json, sys
bundle, image, *modules = sys.argv[1:]
for module in modules:
    importlib.import_module(module)
from tokprune.runtime.chat import load
chat = load(bundle).chat()
pieces = list(chat.ask("What is this?", [image], max_new_tokens=4))
print(json.dumps({"tokens": chat.last.token_ids, "pruned": len(chat.last.pruned), "modules": sorted(sys.modules)}))
"""
HEAVY = ("torch", "transformers", "onnx", "onnxscript", "onnx_ir", "safetensors", "sklearn", "scipy", "sympy")
HEAVY += ("tensorrt", "tensorrt_rtx_bindings", "polygraphy")  # where engines are built or run
SIBLINGS = ("tokprune.plugins", "tokprune.calibration", "tokprune.export")


def python(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, check=True)


def test_every_module_is_found():
    assert "tokprune.runtime.cli.run" in MODULES
    assert len(MODULES) == len(list(FOLDER.rglob("*.py"))) - 1  # all but the package itself


def test_answers_without_anything_heavy(tiny_bundle, tmp_path):
    import json

    Image.fromarray(np.full((70, 90, 3), 127, np.uint8)).save(tmp_path / "image.png")
    done = python("-c", ANSWER, str(tiny_bundle("random")), str(tmp_path / "image.png"), *MODULES)
    result = json.loads(done.stdout)
    assert result["tokens"]
    assert result["pruned"] == 1
    assert "tokprune.runtime.pipeline" in result["modules"]
    loaded = [
        module
        for module in result["modules"]
        if module.split(".")[0] in HEAVY or ".".join(module.split(".")[:2]) in SIBLINGS
    ]
    assert loaded == []


def processor_seconds(*args: str) -> float:
    """User and system time of a fresh interpreter, the least of five runs; without one's own start-up."""
    return min(_child_seconds(*args) for _ in range(5)) - min(_child_seconds("-c", "") for _ in range(5))


def _child_seconds(*args: str) -> float:
    before = os.times()
    python(*args)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def test_import_is_quick():
    assert processor_seconds("-c", "import tokprune.runtime") < 0.3


def test_help_is_quick():
    main = "import sys; from tokprune.runtime.cli import main; sys.argv = ['tokprune', '--help']; main()"
    assert processor_seconds("-c", main) < 0.5


@pytest.mark.parametrize("path", sorted(FOLDER.rglob("*.py")), ids=lambda path: str(path.relative_to(FOLDER)))
def test_python_3_10(path):
    """JetPack 6 has 3.10. The parser knows its syntax; what is newer in the library, it does not."""
    ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 10))
