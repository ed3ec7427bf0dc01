"""The files of trained modules: what is written is what is read, and nothing else is."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tokprune.export.checkpoint import find_checkpoint
from tokprune.export.lvpruning.modules import (
    Modules,
    check_fits,
    check_modules_out,
    load_modules,
    save_modules,
    weight_shapes,
)
from tokprune.runtime.errors import UserError
from tokprune.runtime.names import MODULES_FILE, MODULES_INFO_FILE
from tokprune.runtime.plan import Module, Stage

SIZES = Module(width=8, heads=2, intermediate=12)


@pytest.fixture
def modules():
    random = np.random.default_rng(0)
    weights = {
        name: random.standard_normal(shape).astype(np.float32) for name, shape in weight_shapes(64, SIZES, 2).items()
    }
    return Modules("tiny", 64, 3, 16, (Stage(1, 8), Stage(2, 4)), SIZES, weights, {"steps": 5})


@pytest.fixture
def saved(modules, tmp_path):
    save_modules(tmp_path / "m", modules)
    return tmp_path / "m"


def test_round_trip(modules, saved):
    found = load_modules(saved)
    assert replace(found, weights={}) == replace(modules, weights={})
    assert found.weights.keys() == modules.weights.keys()
    assert all(np.array_equal(found.weights[name], weight) for name, weight in modules.weights.items())
    assert sorted(path.name for path in saved.iterdir()) == [MODULES_INFO_FILE, MODULES_FILE]
    assert [path.name for path in saved.parent.iterdir()] == ["m"]  # nothing temporary is left
    assert len({path.stat().st_mode for path in saved.iterdir()}) == 1  # what may read one file may read the other


def test_the_files_names_are_fixed(saved):
    """Bundles and other tools rely on these names and keys."""
    info = json.loads((saved / "modules.json").read_text())
    assert {key: info[key] for key in ("schema", "method", "model", "stages", "module")} == {
        "schema": 1,
        "method": "lvpruning",
        "model": {"name": "tiny", "hidden": 64, "layers": 3, "visual_tokens": 16},
        "stages": [{"layer": 1, "keep": 8}, {"layer": 2, "keep": 4}],
        "module": {"width": 8, "heads": 2, "intermediate": 12},
    }
    tensors = load_file(saved / "modules.safetensors")
    assert {name.removeprefix("stages.1."): w.shape for name, w in tensors.items() if name.startswith("stages.1.")} == {
        "visual_norm.weight": (64,),
        "text_norm.weight": (64,),
        "visual_proj.weight": (8, 64),
        "text_proj.weight": (8, 64),
        "q_proj.weight": (8, 8),
        "k_proj.weight": (8, 8),
        "v_proj.weight": (8, 8),
        "o_proj.weight": (8, 8),
        "mlp_norm.weight": (8,),
        "up_proj.weight": (12, 8),
        "up_proj.bias": (12,),
        "down_proj.weight": (8, 12),
        "down_proj.bias": (8,),
        "head_norm.weight": (8,),
        "head.weight": (2, 8),
        "head.bias": (2,),
    }


def test_weights_of_a_stage(modules):
    stage = modules.of_stage(1)
    assert np.array_equal(stage["head.bias"], modules.weights["stages.1.head.bias"])
    assert len(stage) == len(modules.weights) // 2


def test_replaced_whole_or_not_at_all(modules, saved, monkeypatch):
    before = (saved / MODULES_FILE).read_bytes()
    changed = {name: weight + 1 for name, weight in modules.weights.items()}

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("tokprune.export.lvpruning.modules.save", fail)
        with pytest.raises(UserError, match="disk is full"):
            save_modules(saved, replace(modules, weights=changed))
    assert (saved / MODULES_FILE).read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == ["m"]
    save_modules(saved, replace(modules, weights=changed))
    assert (saved / MODULES_FILE).read_bytes() != before
    assert [path.name for path in saved.parent.iterdir()] == ["m"]


def test_out(modules, saved, tmp_path):
    check_modules_out(tmp_path / "new")
    check_modules_out(saved)
    (tmp_path / "empty").mkdir()
    check_modules_out(tmp_path / "empty")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="not a directory"):
        check_modules_out(tmp_path / "file")
    (saved / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"notes\.txt"):
        save_modules(saved, modules)
    assert (saved / "notes.txt").read_text() == "mine"


def edit(change):
    def apply(path):
        info = json.loads((path / MODULES_INFO_FILE).read_text())
        change(info)
        (path / MODULES_INFO_FILE).write_text(json.dumps(info))

    return apply


def tensors(change):
    def apply(path):
        weights = load_file(path / MODULES_FILE)
        change(weights)
        save_file(weights, path / MODULES_FILE)

    return apply


def put(name, value):
    return lambda weights: weights.update({name: value})


HEAD = "stages.0.head.bias"
BROKEN = {
    "no json": (lambda path: (path / MODULES_INFO_FILE).unlink(), ["no modules.json"]),
    "no tensors": (lambda path: (path / MODULES_FILE).unlink(), ["no modules.safetensors"]),
    "json cut": (lambda path: (path / MODULES_INFO_FILE).write_text('{"schema'), ["modules.json", "JSON"]),
    "json nested": (lambda path: (path / MODULES_INFO_FILE).write_text("[" * 100_000), ["modules.json", "JSON"]),
    "json list": (lambda path: (path / MODULES_INFO_FILE).write_text("[1]"), ["no object"]),
    "schema 2": (edit(lambda info: info.update(schema=2)), ["schema 2", "schema 1"]),
    "schema true": (edit(lambda info: info.update(schema=True)), ["schema True"]),
    "method": (edit(lambda info: info.update(method="lofi")), ["lofi"]),
    "key missing": (edit(lambda info: info.pop("stages")), ["lacks stages"]),
    "key unknown": (edit(lambda info: info["model"].update(colour=1)), ["model.colour"]),
    "key missing inside": (edit(lambda info: info["stages"][1].pop("keep")), ["lacks stages.1.keep"]),
    "no number": (edit(lambda info: info["module"].update(heads="2")), ["module.heads", "'2'"]),
    "true": (edit(lambda info: info["model"].update(layers=True)), ["model.layers", "True"]),
    "zero": (edit(lambda info: info["module"].update(width=0)), ["module.width"]),
    "name": (edit(lambda info: info["model"].update(name=3)), ["model.name"]),
    "training": (edit(lambda info: info.update(training=None)), ["training"]),
    "stages": (edit(lambda info: info.update(stages={})), ["stages"]),
    "no stage": (edit(lambda info: info.update(stages=[])), ["contradicts itself"]),
    "layer": (edit(lambda info: info["stages"][1].update(layer=3)), ["contradicts itself", "layer 3"]),
    "keeps more": (edit(lambda info: info["stages"][1].update(keep=9)), ["contradicts itself", "keep 9 of 8"]),
    "heads": (edit(lambda info: info["module"].update(heads=3)), ["contradicts itself", "3 heads"]),
    "tensors cut": (
        lambda path: (path / MODULES_FILE).write_bytes((path / MODULES_FILE).read_bytes()[:900]),
        ["no whole safetensors file"],
    ),
    "tensor missing": (tensors(lambda weights: weights.pop(HEAD)), ["lacks", HEAD]),
    "tensor unknown": (tensors(put("stages.2.x", np.zeros(2, np.float32))), ["stages.2.x", "no stage"]),
    "shape": (tensors(put(HEAD, np.zeros(3, np.float32))), [HEAD, "[3]", "[2]"]),
    "dtype": (tensors(put(HEAD, np.zeros(2, np.float16))), [HEAD, "float16"]),
    "infinite": (tensors(put(HEAD, np.array([0, np.inf], np.float32))), [HEAD, "not finite"]),
    "nan": (tensors(put(HEAD, np.array([0, np.nan], np.float32))), [HEAD, "not finite"]),
    "other width": (edit(lambda info: info["module"].update(width=10)), ["stages.0.visual_proj.weight", "[10, 64]"]),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken(saved, kind):
    break_it, words = BROKEN[kind]
    break_it(saved)
    with pytest.raises(UserError) as error:
        load_modules(saved)
    for word in words:
        assert word in str(error.value)


def test_not_there(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_modules(tmp_path / "m")
    (tmp_path / "m").write_text("")
    with pytest.raises(UserError, match="is a file"):
        load_modules(tmp_path / "m")


def test_bfloat16_is_refused(modules, saved):
    """NumPy has no bfloat16: safetensors raises another error there."""
    import torch
    from safetensors.torch import save_file as save_torch

    save_torch({n: torch.from_numpy(w).bfloat16() for n, w in modules.weights.items()}, saved / MODULES_FILE)
    with pytest.raises(UserError, match=r"modules\.safetensors"):
        load_modules(saved)


def test_fits(modules, tiny_checkpoint):
    facts = find_checkpoint(str(tiny_checkpoint)).facts
    check_fits(modules, facts)
    for change, words in (
        ({"hidden": 65}, ["hidden size is 65", "64"]),
        ({"layers": 4}, ["decoder layers is 4", "3"]),
        ({"visual_tokens": 576}, ["visual tokens is 576", "16"]),
    ):
        with pytest.raises(UserError) as error:
            check_fits(replace(modules, **change), facts)
        for word in words:
            assert word in str(error.value)


def test_a_link_is_followed(modules, saved, tmp_path):
    (tmp_path / "link").symlink_to(saved)
    save_modules(tmp_path / "link", replace(modules, training={}))
    assert (tmp_path / "link").is_symlink()
    assert load_modules(saved).training == {}
    shutil.rmtree(saved)
