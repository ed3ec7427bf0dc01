"""Repeated layers: segments of a deeper model, of which two layers were traced, against its own modules and forward."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import redraw_checkpoint
from transformers import AttentionInterface

from tokprune.export.checkpoint import find_checkpoint, load_model
from tokprune.export.layers import repeat
from tokprune.export.segments import ATTENTION, Decoder, EmbedTokens, VisionEncoder, attention
from tokprune.export.skeleton import skeleton
from tokprune.export.store import Store
from tokprune.export.trace import save_segment, trace_decoder, trace_embed, trace_vision
from tokprune.export.weights import Weights
from tokprune.runtime import names

LAYERS = 6
# FP32 products in another order: a few ulp of activations of order 1, over some layers
TOLERANCE = 2e-5

# by name: layers [first, stop), and whether the last row's attention is asked for
DECODERS = {
    "whole": (0, LAYERS, False),
    "front": (0, 2, False),
    "back": (2, LAYERS, False),
    "front_row": (0, 4, True),
    "middle_row": (2, 5, True),
    "one": (4, 5, False),
}


@pytest.fixture(scope="module")
def deep(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory):
    """Of a checkpoint with six decoder and five tower layers: facts, eager modules, segments, their directory."""
    path = tmp_path_factory.mktemp("deep")
    redraw_checkpoint(
        tiny_checkpoint, path / "model", text={"num_hidden_layers": LAYERS}, vision={"num_hidden_layers": 5}
    )
    AttentionInterface.register(ATTENTION, attention)
    checkpoint = find_checkpoint(str(path / "model"))
    facts = checkpoint.facts
    model = load_model(checkpoint, dtype=torch.float32, attention=ATTENTION)
    hollow = skeleton(checkpoint, torch.float32)
    store = Store(path, Weights(checkpoint.path, checkpoint.shards), "fp32")
    modules = {"vision_encoder": VisionEncoder(model, facts.vision.layers), "embed_tokens": EmbedTokens(model)}
    segments = {
        "vision_encoder": save_segment(trace_vision(hollow, facts), store, "vision_encoder", None),
        "embed_tokens": save_segment(trace_embed(hollow), store, "embed_tokens", None),
    }
    for name, (first, stop, row) in DECODERS.items():
        modules[name] = Decoder(model, first, stop, last_row=row)
        graph = trace_decoder(hollow, facts, first, stop, last_row=row)
        segments[name] = save_segment(graph, store, name, (first, stop))
    return checkpoint, modules, segments, path


def feeds_of(facts, name: str, batch: int, rows: int, past: int, padded: int) -> dict[str, torch.Tensor]:
    """Random feeds by tensor name; the first ``padded`` keys of sequence 0 are masked out."""
    first, stop, _ = DECODERS[name]
    generator = torch.Generator().manual_seed(rows * 31 + past)
    mask = torch.ones(batch, past + rows, dtype=torch.int64)
    mask[0, :padded] = 0
    feeds = {
        names.INPUTS_EMBEDS if first == 0 else names.HIDDEN_STATES: torch.randn(
            batch, rows, facts.hidden, generator=generator
        ),
        names.POSITION_IDS: torch.arange(past, past + rows).repeat(batch, 1) + 3,
        names.ATTENTION_MASK: mask,
    }
    if stop == LAYERS:
        feeds[names.LOGITS_INDEX] = torch.randint(0, rows, (batch, 2), generator=generator)
    for layer in range(first, stop):
        for which in ("key", "value"):
            shape = (batch, facts.kv_heads, past, facts.head_dim)
            feeds[names.past(layer, which)] = torch.randn(shape, generator=generator)
    return feeds


@pytest.mark.parametrize(("batch", "rows", "past", "padded"), [(1, 9, 0, 0), (1, 1, 12, 0), (3, 4, 5, 2), (2, 6, 0, 3)])
@pytest.mark.parametrize("name", DECODERS)
def test_decoder_equals_eager(deep, name, batch, rows, past, padded):
    checkpoint, modules, segments, path = deep
    feeds = feeds_of(checkpoint.facts, name, batch, rows, past, padded)
    with torch.inference_mode():
        expected = modules[name](*feeds.values())
    session = onnxruntime.InferenceSession(path / f"{name}.onnx")
    outputs = session.run(None, {key: value.numpy() for key, value in feeds.items()})
    first, stop, row = DECODERS[name]
    assert [tensor.name for tensor in segments[name].inputs] == list(feeds)
    head = [names.LOGITS if stop == LAYERS else names.LAST_HIDDEN_STATE, *[names.LAST_ROW_ATTENTION] * row]
    presents = [names.present(layer, which) for layer in range(first, stop) for which in ("key", "value")]
    assert [tensor.name for tensor in segments[name].outputs] == head + presents
    for tensor, ours, theirs in zip(segments[name].outputs, outputs, expected, strict=True):
        np.testing.assert_allclose(ours, theirs.numpy(), atol=TOLERANCE, rtol=1e-4, err_msg=tensor.name)


def test_vision_encoder_equals_eager(deep):
    checkpoint, modules, _, path = deep
    size = checkpoint.facts.vision.image_size
    pixels = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = modules["vision_encoder"](pixels).numpy()
    session = onnxruntime.InferenceSession(path / "vision_encoder.onnx")
    (ours,) = session.run(None, {names.PIXEL_VALUES: pixels.numpy()})
    np.testing.assert_allclose(ours, expected, atol=TOLERANCE, rtol=1e-4)


@pytest.mark.parametrize("chain", [["whole"], ["front", "back"]])
def test_chain_is_transformers_own_forward(deep, chain):
    checkpoint, _, _, path = deep
    facts = checkpoint.facts
    model = load_model(checkpoint, dtype=torch.float32)
    ids = torch.randint(4, 200, (2, 11), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = model(input_ids=ids).logits.numpy()
    run = lambda name, feeds: onnxruntime.InferenceSession(path / f"{name}.onnx").run(None, feeds)[0]  # noqa: E731
    hidden = run("embed_tokens", {names.INPUT_IDS: ids.numpy()})
    rows = np.arange(11)[None].repeat(2, 0)
    empty = np.zeros((2, facts.kv_heads, 0, facts.head_dim), dtype=np.float32)
    for name in chain:
        first, stop, _ = DECODERS[name]
        feeds = {
            names.INPUTS_EMBEDS if first == 0 else names.HIDDEN_STATES: hidden,
            names.POSITION_IDS: rows,
            names.ATTENTION_MASK: np.ones((2, 11), dtype=np.int64),
            **{names.past(layer, which): empty for layer in range(first, stop) for which in ("key", "value")},
        }
        if stop == LAYERS:
            feeds[names.LOGITS_INDEX] = rows
        hidden = run(name, feeds)
    np.testing.assert_allclose(hidden, expected, atol=5 * TOLERANCE, rtol=1e-4)


def test_layers_differ(deep):
    """The ground on which the tests above stand: a layer that is left out or put in another's place shows."""
    checkpoint, modules, _, _ = deep
    feeds = feeds_of(checkpoint.facts, "whole", 1, 5, 0, 0)
    hidden, layers = feeds[names.INPUTS_EMBEDS], modules["whole"].layers
    outputs = []
    with torch.inference_mode():
        rotation = modules["whole"].rotary(hidden, feeds[names.POSITION_IDS])
        for order in ((0, 1, 2, 3, 4, 5), (0, 2, 1, 3, 4, 5)):
            state = hidden
            for at in order:
                state = layers[at](state, position_embeddings=rotation)
            outputs.append(state)
    assert (outputs[0] - outputs[1]).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize(("name", "layers"), [("vision_encoder", range(4)), ("whole", range(6)), ("back", range(2, 6))])
def test_states_between_layers_and_weights_have_their_layers_number(deep, name, layers):
    """So that a graph can be cut before a layer, and each layer reads its own weights."""
    graph = onnx.load(deep[3] / f"{name}.onnx", load_external_data=False).graph
    written = {value for node in graph.node for value in node.output}
    assert {names.state(layer) for layer in list(layers)[1:]} <= written
    prefix = "vision_tower.encoder.layers." if name == "vision_encoder" else "language_model.layers."
    by_layer: dict[int, set[str]] = {}
    for weight in graph.initializer:
        if weight.name.startswith(prefix):
            layer, _, rest = weight.name.removeprefix(prefix).partition(".")
            by_layer.setdefault(int(layer), set()).add(rest)
    assert sorted(by_layer) == list(layers)
    assert len({frozenset(found) for found in by_layer.values()}) == 1
    assert {len(found) for found in by_layer.values()} == {16 if name == "vision_encoder" else 9}
    places = [tuple((entry.key, entry.value) for entry in weight.external_data) for weight in graph.initializer]
    stored = [place for place in places if place]
    assert len(set(stored)) == len(stored)  # no two read the same bytes


def test_a_graph_without_layers_is_refused(deep):
    graph = trace_embed(skeleton(deep[0], torch.float32))
    with pytest.raises(ValueError, match=r"layers \[\] were traced, wanted are 0 to 5"):
        repeat(graph, 0, LAYERS)
