"""A LLaVA-1.5 small enough to be traced in seconds, and bundles made from it; each is made once a session."""

import functools
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from commands import Result, listing
from PIL import Image

from tokprune.runtime.manifest import Manifest
from tokprune.runtime.plan import Module, Plan, Rank, Stage, make_plan

LAYERS, TOKENS, CONTEXT = 3, 16, 128  # images of 56 pixels in patches of 14
MODULE = Module(width=8, heads=2, intermediate=12)

PLANS: dict[str, Plan] = {
    "none": Plan("none"),
    **{
        key: make_plan(method, stages, layers=LAYERS, visual_tokens=TOKENS, rank=rank, seed=7, module=MODULE)
        for key, method, stages, rank in (
            ("random", "random", [(1, 5)], None),
            ("random-0", "random", [(0, 5)], None),
            ("random-2", "random", [(1, 9), (2, 4)], None),
            ("uniform", "uniform", [(1, 4)], None),
            ("lvpruning", "lvpruning", [(1, 9), (2, 4)], None),
            ("fastv", "fastv", [(1, 6)], None),
            ("fastv-2", "fastv", [(1, 9), (2, 4)], None),
            ("lofi", "lofi", [(1, 6)], Rank(components=4)),
            ("lofi-energy", "lofi", [(1, 6)], Rank(energy=0.9)),
            ("lofi-2", "lofi", [(1, 9), (2, 4)], Rank(components=3)),
        )
    },
}


def random_modules(hidden: int, layers: int, tokens: int, stages: tuple[Stage, ...], sizes: Module):
    """Modules as training would give them, their weights drawn: scores spread over some units."""
    from tokprune.export.lvpruning.modules import Modules, weight_shapes

    rng = np.random.default_rng(11)
    weights = {}
    for name, shape in weight_shapes(hidden, sizes, len(stages)).items():
        drawn = rng.standard_normal(shape) * (shape[1] ** -0.5 if len(shape) == 2 else 0.3) + ("norm" in name)
        weights[name] = drawn.astype(np.float32)
    return Modules("tiny", hidden, layers, tokens, stages, sizes, weights, {"steps": 0})


@pytest.fixture(scope="session")
def tiny_modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Modules for the plan "lvpruning" of the tiny checkpoint, to be read only."""
    from tokprune.export.lvpruning.modules import save_modules

    path = tmp_path_factory.mktemp("modules") / "modules"
    save_modules(path, random_modules(64, LAYERS, TOKENS, PLANS["lvpruning"].stages, MODULE))
    return path


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as transformers saves it: seeded weights, the demo model's tokenizer, grouped-query attention."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    from tokprune.export.demo import checkpoint_dir

    path = tmp_path_factory.mktemp("checkpoint") / "tiny"
    # ten times the usual spread: with less, attention is flat and a wrong mask or position would not show
    spread = 0.2
    text = LlamaConfig(
        vocab_size=576,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=spread,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        projection_dim=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=56,
        patch_size=14,
        initializer_range=spread,
    )
    config = LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=3,
        image_seq_length=TOKENS,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(checkpoint_dir() / name, path)
    processor = json.loads((checkpoint_dir() / "processor_config.json").read_text())
    processor["image_processor"] |= {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
    (path / "processor_config.json").write_text(json.dumps(processor))
    return path


def redraw_checkpoint(source: Path, path: Path, *, text: dict | None = None, vision: dict | None = None) -> Path:
    """A checkpoint with ``source``'s files, another architecture as the configurations say, and other weights.

    Norms and biases are drawn too, which transformers would all make alike.
    """
    import torch
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    shutil.copytree(source, path)
    config = LlavaConfig.from_pretrained(path)
    for part, changes in ((config.text_config, text or {}), (config.vision_config, vision or {})):
        for name, value in changes.items():
            setattr(part, name, value)
    torch.manual_seed(1)
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(path)
    return path


def recast_checkpoint(source: Path, path: Path, dtype, change: Callable[[dict], None] = lambda tensors: None) -> Path:
    """``source`` with its weights in another torch ``dtype``, and as ``change`` makes them, by canonical name."""
    from safetensors.torch import load_file, save_file

    from tokprune.export.weights import canonical

    shutil.copytree(source, path)
    stored = {key: tensor.to(dtype) for key, tensor in load_file(source / "model.safetensors").items()}
    tensors = {canonical(key): tensor for key, tensor in stored.items()}
    change(tensors)
    save_file({key: tensors[canonical(key)] for key in stored}, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.fixture(scope="session")
def graphs_folder(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """Where the session's processes keep what they have traced."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "traced"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def export_traced(graphs_folder: Path) -> Callable[..., Manifest]:
    """`export` for tests of what comes after tracing: no segment is traced that was traced in this session."""
    from traces import SharedGraphs

    return SharedGraphs(graphs_folder).export


@pytest.fixture
def traced(export_traced: Callable[..., Manifest], monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line's exports are `export_traced`."""
    from tokprune.export import pipeline

    monkeypatch.setattr(pipeline, "export", export_traced)


@pytest.fixture(scope="session")
def tiny_bundle(
    tiny_checkpoint: Path, tiny_modules: Path, export_traced, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """Gives the bundle of one of ``PLANS`` in a precision, to be read only: copy it before changing anything."""
    from tokprune.export.checkpoint import find_checkpoint
    from tokprune.export.lvpruning.modules import load_modules

    folder = tmp_path_factory.mktemp("bundles")

    @functools.cache
    def bundle(plan: str, precision: str = "fp32") -> Path:
        modules = load_modules(tiny_modules) if PLANS[plan].method == "lvpruning" else None
        out = folder / precision / plan
        export_traced(find_checkpoint(str(tiny_checkpoint)), PLANS[plan], out, precision=precision, modules=modules)
        return out

    return bundle


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """Runs ``tokprune`` in this process, and sees to it that a failure leaves ``tmp_path`` as it was."""
    from tokprune.runtime.cli import main

    monkeypatch.chdir(tmp_path)

    def call(*args) -> Result:
        monkeypatch.setattr(sys, "argv", ["tokprune", *map(str, args)])
        before = listing(tmp_path)
        with pytest.raises(SystemExit) as done:
            main()
        if done.value.code != 0:
            assert listing(tmp_path) == before
        return Result(done.value.code, *capsys.readouterr())

    return call


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)).save(path)
    return path
