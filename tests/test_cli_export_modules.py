"""``tokprune export --method lvpruning``: whose stages count, and what is refused in one sentence."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from commands import Result, edit_manifest
from conftest import MODULE, random_modules

from tokprune.export import demo
from tokprune.export.checkpoint import find_checkpoint
from tokprune.export.cli.export import _modules
from tokprune.export.lvpruning.modules import check_fits, load_modules, save_modules
from tokprune.runtime.bundle import open_bundle
from tokprune.runtime.errors import UserError
from tokprune.runtime.plan import Stage, lvpruning_stages


@pytest.fixture
def export(call, traced, tiny_checkpoint):
    return lambda *args: call("export", "--model", tiny_checkpoint, "--method", "lvpruning", *args)


def test_stages_are_those_of_the_modules(export, tiny_modules, tmp_path):
    result = export("--modules", tiny_modules, "--out", "bundle", "--json")
    assert result.code == 0, result
    assert json.loads(result.out)["stages"] == [{"layer": 1, "kept": 9}, {"layer": 2, "kept": 4}]
    bundle = open_bundle(tmp_path / "bundle", check_hashes=True)
    assert bundle.manifest.plan.module == MODULE
    for name in ("modules.safetensors", "modules.json"):
        assert (tmp_path / "bundle" / name).read_bytes() == (tiny_modules / name).read_bytes()
    assert load_modules(bundle.path).stages == (Stage(1, 9), Stage(2, 4))


def test_keeps_may_be_others(export, tiny_modules, tmp_path):
    result = export("--modules", tiny_modules, "--stage", "1:0.25", "--stage", "2:1", "--out", "bundle")
    assert result.code == 0, result
    assert open_bundle(tmp_path / "bundle").manifest.plan.stages == (Stage(1, 4), Stage(2, 1))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--stage", "1:4"], ["the layers 1 ", "the layers 1, 2"]),
        (["--stage", "1:4", "--stage", "3:2"], ["the layers 1, 3 ", "1, 2"]),
        (["--stage", "1:4", "--stage", "2:5"], ["keep 5 of 4"]),
        (["--stage", "1:17", "--stage", "2:5"], ["keep 17 of 16"]),
        (["--layer", "1"], ["--stage L:K"]),
        (["--keep", "4"], ["--stage L:K"]),
        (["--rank", "4"], ["lofi only"]),
        (["--seed", "4"], ["random only"]),
    ],
)
def test_plan(export, tiny_modules, options, words):
    export("--modules", tiny_modules, "--out", "bundle", *options).refused(*words)


@pytest.mark.parametrize("method", ["lofi", "fastv", "none"])
def test_modules_of_another_method(call, tiny_checkpoint, tiny_modules, method):
    call("export", "--model", tiny_checkpoint, "--method", method, "--modules", tiny_modules).refused(
        "--modules", f"'{method}'", "lvpruning only"
    )


def test_no_modules(export):
    export("--out", "bundle").refused("--modules was not given", "'tokprune train'")


def test_demo_has_modules_of_its_own(call, monkeypatch, tmp_path):
    """They are found without --modules, and only by the demo model: these here are of a wrong size, and refused."""
    save_modules(tmp_path / "modules", random_modules(8, 3, 16, (Stage(1, 4),), MODULE))
    monkeypatch.setattr(demo, "modules_dir", lambda name: tmp_path / "modules")
    call("export", "--method", "lvpruning", "--out", "bundle").refused("hidden size is 8", "demo")


@pytest.mark.parametrize("name", demo.MODULES)
def test_shipped_modules_fit_the_demo_model(name):
    facts = find_checkpoint("demo").facts
    modules = load_modules(demo.modules_dir(name))
    check_fits(modules, facts)
    if name == "default":
        stages = [(stage.layer, stage.keep) for stage in modules.stages]
        assert stages == lvpruning_stages(facts.layers, facts.vision.tokens)


def broken(change):
    def change_info(path):
        data = json.loads((path / "modules.json").read_text())
        change(data)
        (path / "modules.json").write_text(json.dumps(data))

    return change_info


def cut(path):
    with open(path / "modules.safetensors", "r+b") as file:
        file.truncate(1000)


MODULES = {
    "not there": (shutil.rmtree, ["does not exist", "tokprune train"]),
    "no info": (lambda path: (path / "modules.json").unlink(), ["no modules.json"]),
    "no weights": (lambda path: (path / "modules.safetensors").unlink(), ["no modules.safetensors"]),
    "cut": (cut, ["modules.safetensors"]),
    "another width": (broken(lambda data: data["module"].update(width=16)), ["float32"]),
    "another model": (broken(lambda data: data["model"].update(layers=5)), ["layers is 5", "3"]),
    "another image": (broken(lambda data: data["model"].update(visual_tokens=25)), ["visual tokens is 25", "16"]),
}


@pytest.mark.parametrize("kind", MODULES)
def test_modules(export, tiny_modules, tmp_path, kind):
    change, words = MODULES[kind]
    shutil.copytree(tiny_modules, tmp_path / "mine")
    change(tmp_path / "mine")
    export("--modules", "mine", "--out", "bundle").refused(*words)


# bundles


def other_weight(path):
    """One weight of the file, which the graph points into."""
    content = bytearray((path / "modules.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "modules.safetensors").write_bytes(content)


BUNDLES = {
    "altered weights": (other_weight, ["modules.safetensors was altered"]),
    "no weights": (lambda path: (path / "modules.safetensors").unlink(), ["lacks its file modules.safetensors"]),
    "no module in the plan": (edit_manifest(lambda data: data["plan"].update(module=None)), ["contradicts itself"]),
}


@pytest.mark.parametrize("kind", BUNDLES)
def test_bundle(call, tiny_bundle, tmp_path, kind):
    change, words = BUNDLES[kind]
    shutil.copytree(tiny_bundle("lvpruning"), tmp_path / "bundle")
    change(tmp_path / "bundle")
    call("run", "bundle", "--prompt", "What is this?").refused("bundle", *words)


def test_a_bundle_answers(call, tiny_bundle, tmp_path):
    from PIL import Image

    Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    result: Result = call(
        "run", tiny_bundle("lvpruning"), "--image", "a.png", "--prompt", "x", "--max-new-tokens", 3, "--json"
    )
    stages = json.loads(result.out)["pruning"]["stages"]
    assert [(stage["layer"], stage["kept"], stage["total"]) for stage in stages] == [(1, 9, 16), (2, 4, 9)]


def test_sets_that_ship_with_the_demo_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    facts = find_checkpoint("demo").facts
    for path, stages in ((None, 3), (Path("default"), 3), (Path("early"), 1)):
        assert len(_modules(facts, "demo", path).stages) == stages
    Path("early").mkdir()  # one's own comes first
    with pytest.raises(UserError, match="early"):
        _modules(facts, "demo", Path("early"))
    with pytest.raises(UserError, match="late"):
        _modules(facts, "demo", Path("late"))
