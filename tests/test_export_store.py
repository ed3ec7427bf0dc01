"""A bundle's weights: linked, copied or converted, exactly; what does not fit is named; checkpoints stay whole."""

import errno
import hashlib
import math
import os
import resource
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import PLANS, recast_checkpoint, redraw_checkpoint
from safetensors.torch import save_file

from tokprune.export import store as store_module
from tokprune.export.checkpoint import find_checkpoint
from tokprune.export.skeleton import skeleton
from tokprune.export.store import CONVERTED, Source, Store
from tokprune.export.trace import save_segment, trace_decoder
from tokprune.export.weights import Weights
from tokprune.runtime import names
from tokprune.runtime.errors import UserError

TYPES = {"fp16": torch.float16, "fp32": torch.float32}


@pytest.fixture
def make(tmp_path):
    """Gives the store of a bundle in ``precision``, of a checkpoint with these tensors in one shard."""

    def make(tensors: dict[str, torch.Tensor], precision: str) -> Store:
        (tmp_path / "model").mkdir()
        (tmp_path / "out").mkdir()
        shard = tmp_path / "model" / "model.safetensors"
        save_file(tensors, shard)
        return Store(tmp_path / "out", Weights(shard.parent, [shard]), precision)

    return make


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


class TestShards:
    def test_linked(self, make, tmp_path, monkeypatch):
        monkeypatch.setattr(store_module, "COPIED", 0)
        placed = make({"w": drawn(5, 7).half()}, "fp16").place(Source("w"))
        original, ours = tmp_path / "model" / "model.safetensors", tmp_path / "out" / "model.safetensors"
        assert os.stat(ours).st_ino == os.stat(original).st_ino
        assert placed.location == "model.safetensors"
        # read here, as onnx_ir takes a linked file for an attack
        data = np.fromfile(ours, np.float16, 35, offset=placed.offset or 0)
        np.testing.assert_array_equal(data.reshape(5, 7), drawn(5, 7).half().numpy())

    def test_of_the_hub_cache_the_file_is_linked_not_its_link(self, make, tmp_path, monkeypatch):
        """ONNX Runtime refuses symbolic links that leave the bundle."""
        monkeypatch.setattr(store_module, "COPIED", 0)
        store = make({"w": drawn(5, 7).half()}, "fp16")
        shard = tmp_path / "model" / "model.safetensors"
        shard.rename(tmp_path / "blob")
        shard.symlink_to("../blob")
        store.place(Source("w"))
        ours = tmp_path / "out" / "model.safetensors"
        assert not ours.is_symlink()
        assert os.stat(ours).st_ino == os.stat(tmp_path / "blob").st_ino

    @pytest.mark.parametrize("pieces", [False, True])
    def test_small_ones_are_copied(self, make, tmp_path, monkeypatch, pieces):
        if pieces:
            monkeypatch.setattr(store_module, "_PIECE", 16)
        placed = make({"w": drawn(5, 7).half()}, "fp16").place(Source("w"))
        original, ours = tmp_path / "model" / "model.safetensors", tmp_path / "out" / "model.safetensors"
        assert os.stat(ours).st_ino != os.stat(original).st_ino
        assert ours.read_bytes() == original.read_bytes()
        np.testing.assert_array_equal(placed.numpy(), drawn(5, 7).half().numpy())

    @pytest.mark.parametrize("code", [errno.EXDEV, errno.EPERM, errno.EMLINK])
    def test_copied_where_links_cannot_be(self, make, tmp_path, monkeypatch, code):
        tried = []

        def refuse(source, target):
            tried.append(target)
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(store_module, "COPIED", 0)
        monkeypatch.setattr(os, "link", refuse)
        make({"w": drawn(5, 7).half()}, "fp16").place(Source("w"))
        original, ours = tmp_path / "model" / "model.safetensors", tmp_path / "out" / "model.safetensors"
        assert tried == [ours]
        assert os.stat(ours).st_ino != os.stat(original).st_ino
        assert ours.read_bytes() == original.read_bytes()

    def test_other_failures_are_not_hidden(self, make, monkeypatch):
        def refuse(source, target):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(store_module, "COPIED", 0)
        monkeypatch.setattr(os, "link", refuse)
        with pytest.raises(OSError, match="No space left"):
            make({"w": drawn(5, 7).half()}, "fp16").place(Source("w"))

    def test_nothing_is_copied_that_is_not_used(self, make, tmp_path):
        make({"w": drawn(5, 7).half(), "v": drawn(4)}, "fp16").place(Source("v"))
        assert [path.name for path in (tmp_path / "out").iterdir()] == [CONVERTED]


# subnormal in FP16, FP16's largest, halfway cases, the last that still rounds to 65504
SPECIAL = [0.0, -0.0, 6e-8, 5.9e-6, 1 + 2**-11, 1 + 3 * 2**-11, 65504.0, -65504.0, 65519.0, math.inf, -math.inf]


class TestConversion:
    @pytest.mark.parametrize(
        ("dtype", "precision"),
        [
            (torch.bfloat16, "fp32"),
            (torch.float16, "fp32"),
            (torch.float32, "fp16"),
            (torch.bfloat16, "fp16"),
        ],
    )
    def test_values_are_torchs(self, make, tmp_path, monkeypatch, dtype, precision):
        monkeypatch.setattr(store_module, "_PIECE", 64)
        # BF16 has no numbers that near to FP16's largest
        special = torch.tensor([value for value in SPECIAL if dtype != torch.bfloat16 or not 65e3 < abs(value) < 66e3])
        tensors = {"a": torch.cat([special.to(dtype), 100 * drawn(90).to(dtype)]), "b": drawn(9, 33).to(dtype)}
        store = make(tensors, precision)
        for name, tensor in tensors.items():
            placed, expected = store.place(Source(name)), tensor.to(TYPES[precision]).numpy()
            assert placed.location == CONVERTED
            assert placed.offset is not None
            assert placed.offset % 64 == 0
            assert tuple(placed.shape) == expected.shape
            assert placed.numpy().tobytes() == expected.tobytes()  # bit for bit
        used = (tmp_path / "out" / CONVERTED).stat().st_size
        assert store.place(Source("a")) is store.place(Source("a"))  # once is enough
        assert (tmp_path / "out" / CONVERTED).stat().st_size == used

    def test_rows(self, make):
        tensor = drawn(9, 33)
        store = make({"w": tensor}, "fp16")
        for begin, end in ((0, 4), (4, 9)):
            placed = store.place(Source("w", (begin, end)))
            np.testing.assert_array_equal(placed.numpy(), tensor[begin:end].half().numpy())

    @pytest.mark.parametrize(("dtype", "value"), [(torch.float32, 65520.0), (torch.bfloat16, -131072.0)])
    def test_overflow_names_tensor_and_value(self, make, monkeypatch, dtype, value):
        monkeypatch.setattr(store_module, "_PIECE", 64)
        tensor = drawn(9, 33)
        tensor[7, 30] = value
        store = make({"fine": drawn(3).to(dtype), "layers.0.up": tensor.to(dtype)}, "fp16")
        store.place(Source("fine"))
        with pytest.raises(
            UserError, match=rf"^layers\.0\.up has the value {value:.6g}, which FP16 cannot hold .*fp32$"
        ):
            store.place(Source("layers.0.up"))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_of_a_checkpoint_that_overflows_nothing_is_left_behind(
        self, tiny_checkpoint, export_traced, tmp_path, dtype
    ):
        name = "vision_tower.encoder.layers.1.mlp.fc2.weight"

        def plant(tensors):
            tensors[name][3, 5] = 1e5

        model = recast_checkpoint(tiny_checkpoint, tmp_path / "model", dtype, plant)
        before = digests(model)
        value = torch.tensor(1e5).to(dtype).item()
        with pytest.raises(UserError, match=rf"{name} has the value {value:.6g}, which FP16 cannot hold"):
            export_traced(find_checkpoint(str(model)), PLANS["none"], tmp_path / "new" / "out", precision="fp16")
        assert [path.name for path in tmp_path.iterdir()] == ["model"]
        assert digests(model) == before

    def test_no_room(self, make, tmp_path):
        store = make({"w": drawn(2348).half()}, "fp32")  # 9392 bytes: two pages, and a third that is not full
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
        try:
            with pytest.raises(OSError, match="File too large"):
                store.place(Source("w"))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


PIECES, VOCABULARY = 3, 577


@pytest.fixture(scope="module")
def heads(tiny_checkpoint, tmp_path_factory):
    """A checkpoint, and its last layer with the head in so many pieces."""
    path = tmp_path_factory.mktemp("heads") / "model"
    redraw_checkpoint(tiny_checkpoint, path, text={"vocab_size": VOCABULARY})
    checkpoint = find_checkpoint(str(path))
    facts, hollow = checkpoint.facts, skeleton(checkpoint, torch.float32)
    last = facts.layers - 1, facts.layers
    return path, {pieces: trace_decoder(hollow, facts, *last, head_pieces=pieces) for pieces in (1, PIECES)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_split_head(heads, tmp_path, dtype):
    """In pieces of rows of the one tensor, the shard's or converted ones: the same logits."""
    whole, graphs = heads
    checkpoint = find_checkpoint(str(recast_checkpoint(whole, tmp_path / "model", dtype)))
    facts = checkpoint.facts
    assert facts.vocabulary == VOCABULARY
    assert VOCABULARY % PIECES != 0
    generator = np.random.default_rng(5)
    empty = np.zeros((2, facts.kv_heads, 0, facts.head_dim), dtype=np.float32)
    feeds = {
        names.HIDDEN_STATES: generator.standard_normal((2, 7, facts.hidden)).astype(np.float32),
        names.POSITION_IDS: np.arange(7)[None].repeat(2, 0),
        names.ATTENTION_MASK: np.ones((2, 7), dtype=np.int64),
        names.LOGITS_INDEX: np.array([[0, 6], [3, 6]]),
        **{names.past(facts.layers - 1, which): empty for which in ("key", "value")},
    }
    logits = {}
    for pieces, graph in graphs.items():
        out = tmp_path / f"out-{pieces}"
        out.mkdir()
        store = Store(out, Weights(checkpoint.path, checkpoint.shards), "fp32")
        save_segment(graph, store, "decoder", None)
        logits[pieces] = onnxruntime.InferenceSession(out / "decoder.onnx").run([names.LOGITS], feeds)[0]
        heads = [
            math.prod(weight.dims) * 4
            for weight in onnx.load(out / "decoder.onnx", load_external_data=False).graph.initializer
            if weight.name.startswith("lm_head.weight")
        ]
        assert len(heads) == pieces
        assert sum(heads) == VOCABULARY * facts.hidden * 4
        assert max(heads) <= math.ceil(VOCABULARY / pieces) * facts.hidden * 4
    assert logits[1].shape == (2, 2, VOCABULARY)
    # each logit is the same 64 products, but a matrix of another size may be summed in another order
    np.testing.assert_allclose(logits[PIECES], logits[1], rtol=1e-5, atol=1e-5)
    assert np.abs(logits[1]).max() > 0.1


@pytest.mark.parametrize(("dtype", "precision"), [(torch.float16, "fp16"), (torch.bfloat16, "fp32")])
def test_checkpoints_stay_as_they_are(tiny_checkpoint, export_traced, tmp_path, monkeypatch, dtype, precision):
    """Linked to a bundle or read for it, and after the bundle is replaced and removed."""
    monkeypatch.setattr(store_module, "COPIED", 0)
    model = recast_checkpoint(tiny_checkpoint, tmp_path / "model", dtype)
    before, shard = digests(model), model / "model.safetensors"
    for _ in range(2):
        export_traced(find_checkpoint(str(model)), PLANS["none"], tmp_path / "out", precision=precision)
        assert shard.stat().st_nlink == (2 if precision == "fp16" else 1)
        assert (tmp_path / "out" / CONVERTED).exists() == (precision == "fp32")
        assert digests(model) == before
    shutil.rmtree(tmp_path / "out")
    assert shard.stat().st_nlink == 1
    assert digests(model) == before
