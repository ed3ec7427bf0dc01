"""Traced segments against the same torch modules in eager mode, and against transformers' own forward."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from transformers import AttentionInterface

from tokprune.export.checkpoint import Checkpoint, find_checkpoint, load_model
from tokprune.export.segments import ATTENTION, Decoder, EmbedTokens, VisionEncoder, attention
from tokprune.export.skeleton import skeleton
from tokprune.export.store import Store
from tokprune.export.trace import OPSET, save_segment, trace_decoder, trace_embed, trace_vision
from tokprune.export.weights import Weights
from tokprune.runtime import names

# FP32 products in another order: a few ulp of activations of order 1, over some layers
TOLERANCE = 2e-5

LAYERS = {"decoder_0": range(0, 1), "decoder_1": range(1, 3), "decoder_row": range(0, 2)}  # the last one for fastv


def store_of(checkpoint: Checkpoint, directory: Path, precision: str) -> Store:
    return Store(directory, Weights(checkpoint.path, checkpoint.shards), precision)


@pytest.fixture(scope="module")
def traced(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory):
    """Eager modules and the ONNX sessions traced from them: vision, embedding, the decoders of ``LAYERS``."""
    AttentionInterface.register(ATTENTION, attention)
    checkpoint = find_checkpoint(str(tiny_checkpoint))
    facts = checkpoint.facts
    model = load_model(checkpoint, dtype=torch.float32, attention=ATTENTION)
    directory = tmp_path_factory.mktemp("segments")
    modules = {
        "vision_encoder": VisionEncoder(model, facts.vision.layers),
        "embed_tokens": EmbedTokens(model),
        "decoder_0": Decoder(model, 0, 1),
        "decoder_1": Decoder(model, 1, facts.layers),
        "decoder_row": Decoder(model, 0, 2, last_row=True),
    }
    hollow, store = skeleton(checkpoint, torch.float32), store_of(checkpoint, directory, "fp32")
    graphs = {
        "vision_encoder": trace_vision(hollow, facts),
        "embed_tokens": trace_embed(hollow),
        "decoder_0": trace_decoder(hollow, facts, 0, 1),
        "decoder_1": trace_decoder(hollow, facts, 1, facts.layers),
        "decoder_row": trace_decoder(hollow, facts, 0, 2, last_row=True),
    }
    segments = {name: save_segment(graph, store, name, None) for name, graph in graphs.items()}
    sessions = {name: onnxruntime.InferenceSession(directory / f"{name}.onnx") for name in graphs}
    # transformers makes no mask for an attention it does not know, so its own forward needs its own attention
    return facts, load_model(checkpoint, dtype=torch.float32), modules, segments, sessions, directory


def decoder_inputs(facts, name: str, batch: int, rows: int, past: int, padded: int = 0):
    """Random feeds by tensor name; the first ``padded`` keys of sequence 0 are masked out."""
    generator = torch.Generator().manual_seed(rows * 31 + past)
    mask = torch.ones(batch, past + rows, dtype=torch.int64)
    mask[0, :padded] = 0
    feeds = {
        names.HIDDEN_STATES if name == "decoder_1" else names.INPUTS_EMBEDS: torch.randn(
            batch, rows, facts.hidden, generator=generator
        ),
        names.POSITION_IDS: torch.arange(past, past + rows).repeat(batch, 1) + 3,
        names.ATTENTION_MASK: mask,
    }
    if name == "decoder_1":
        feeds[names.LOGITS_INDEX] = torch.randint(0, rows, (batch, 2), generator=generator)
    for layer in LAYERS[name]:
        for which in ("key", "value"):
            shape = (batch, facts.kv_heads, past, facts.head_dim)
            feeds[names.past(layer, which)] = torch.randn(shape, generator=generator)
    return feeds


class TestTracedDecoder:
    @pytest.mark.parametrize(
        ("batch", "rows", "past", "padded"), [(1, 9, 0, 0), (1, 1, 12, 0), (3, 4, 5, 2), (2, 1, 1, 0), (2, 6, 0, 3)]
    )
    @pytest.mark.parametrize("name", list(LAYERS))
    def test_equals_eager_at_lengths_it_was_not_traced_at(self, traced, name, batch, rows, past, padded):
        facts, _, modules, segments, sessions, _ = traced
        feeds = decoder_inputs(facts, name, batch, rows, past, padded)
        with torch.inference_mode():
            expected = modules[name](*feeds.values())
        outputs = sessions[name].run(None, {key: value.numpy() for key, value in feeds.items()})
        assert [tensor.name for tensor in segments[name].inputs] == list(feeds)
        # rows that may attend to nothing but padding have no meaning
        meaningful = slice(padded, None) if past == 0 else slice(None)
        for tensor, ours, theirs in zip(segments[name].outputs, outputs, expected, strict=True):
            theirs = theirs.numpy()
            if padded and past == 0 and tensor.name != names.LOGITS:
                axis = 2 if tensor.name.startswith("present") else 1
                ours, theirs = (np.moveaxis(a, axis, 1)[0, meaningful] for a in (ours, theirs))
            np.testing.assert_allclose(ours, theirs, atol=TOLERANCE, rtol=1e-4, err_msg=tensor.name)

    def test_padding_changes_nothing(self, traced):
        """A sequence behind two padded rows gives what it gives without them."""
        facts, _, _, _, sessions, _ = traced
        feeds = decoder_inputs(facts, "decoder_0", 1, 7, 0, padded=2)
        plain = {
            names.INPUTS_EMBEDS: feeds[names.INPUTS_EMBEDS][:, 2:],
            names.POSITION_IDS: feeds[names.POSITION_IDS][:, 2:],
            names.ATTENTION_MASK: feeds[names.ATTENTION_MASK][:, 2:],
        }
        empty = {key: value for key, value in feeds.items() if key.startswith("past")}
        run = lambda inputs: sessions["decoder_0"].run(  # noqa: E731
            [names.LAST_HIDDEN_STATE], {key: value.numpy() for key, value in inputs.items()}
        )[0]
        padded, unpadded = run(feeds), run({**plain, **empty})
        np.testing.assert_allclose(padded[:, 2:], unpadded, atol=TOLERANCE, rtol=1e-4)

    def test_future_is_not_seen(self, traced):
        facts, _, _, _, sessions, _ = traced
        feeds = {k: v.numpy() for k, v in decoder_inputs(facts, "decoder_0", 1, 6, 3).items()}
        before = sessions["decoder_0"].run([names.LAST_HIDDEN_STATE], feeds)[0]
        feeds[names.INPUTS_EMBEDS] = feeds[names.INPUTS_EMBEDS].copy()
        feeds[names.INPUTS_EMBEDS][:, -1] += 1
        after = sessions["decoder_0"].run([names.LAST_HIDDEN_STATE], feeds)[0]
        np.testing.assert_array_equal(before[:, :-1], after[:, :-1])
        assert np.abs(before[:, -1] - after[:, -1]).max() > 0.1


class TestAgainstTransformers:
    def test_vision_encoder(self, traced):
        facts, model, _, _, sessions, _ = traced
        size = facts.vision.image_size
        pixels = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            expected = torch.stack(list(model.get_image_features(pixel_values=pixels).pooler_output))
        ours = sessions["vision_encoder"].run(None, {names.PIXEL_VALUES: pixels.numpy()})[0]
        np.testing.assert_allclose(ours, expected.numpy(), atol=TOLERANCE, rtol=1e-4)

    def test_segments_chained(self, traced):
        """Embedding and both decoders one after the other are the whole language model."""
        facts, model, _, _, sessions, _ = traced
        ids = torch.randint(4, 200, (2, 11), generator=torch.Generator().manual_seed(1))
        with torch.inference_mode():
            expected = model(input_ids=ids).logits.numpy()
        hidden = sessions["embed_tokens"].run(None, {names.INPUT_IDS: ids.numpy()})[0]
        common = {
            names.POSITION_IDS: np.arange(11)[None].repeat(2, 0),
            names.ATTENTION_MASK: np.ones((2, 11), dtype=np.int64),
        }
        empty = np.zeros((2, facts.kv_heads, 0, facts.head_dim), dtype=np.float32)
        for name in ("decoder_0", "decoder_1"):
            feeds = dict(common)
            feeds[names.INPUTS_EMBEDS if name == "decoder_0" else names.HIDDEN_STATES] = hidden
            feeds.update({names.past(layer, which): empty for layer in LAYERS[name] for which in ("key", "value")})
            if name == "decoder_1":
                feeds[names.LOGITS_INDEX] = np.arange(11)[None].repeat(2, 0)
            hidden = sessions[name].run(None, feeds)[0]
        np.testing.assert_allclose(hidden, expected, atol=5 * TOLERANCE, rtol=1e-4)


class TestLastRow:
    """The attention row that fastv scores by, out of decoder_row: layers 0 and 1, so the row is layer 1's."""

    @pytest.mark.parametrize("past", [0, 1, 6])
    def test_is_transformers_own_attention(self, traced, tiny_checkpoint: Path, past):
        """``output_attentions`` over the whole sequence; the graph gets it in two calls if there is a past."""
        facts, _, _, segments, sessions, _ = traced
        eager = load_model(find_checkpoint(str(tiny_checkpoint)), dtype=torch.float32, attention="eager")
        ids = torch.randint(4, 200, (2, 11), generator=torch.Generator().manual_seed(2))
        with torch.inference_mode():
            whole = eager(input_ids=ids, output_attentions=True).attentions[1]  # [B, H, S, S]
            embeds = eager.model.language_model.embed_tokens(ids).numpy()
        expected = whole[:, :, -1].mean(dim=1)[:, past:].numpy()
        outputs = [tensor.name for tensor in segments["decoder_row"].outputs]
        assert outputs[:2] == [names.LAST_HIDDEN_STATE, names.LAST_ROW_ATTENTION]
        empty = np.zeros((2, facts.kv_heads, 0, facts.head_dim), dtype=np.float32)
        caches = {tensor.name: empty for tensor in segments["decoder_row"].inputs if tensor.name.startswith("past")}
        row = np.empty(0)
        for begin, end in ((0, past), (past, 11)) if past else ((0, 11),):
            feeds = {
                names.INPUTS_EMBEDS: embeds[:, begin:end],
                names.POSITION_IDS: np.arange(begin, end)[None].repeat(2, 0),
                names.ATTENTION_MASK: np.ones((2, end), dtype=np.int64),
                **caches,
            }
            _, row, *presents = sessions["decoder_row"].run(None, feeds)
            caches = dict(zip(caches, presents, strict=True))
        assert row.dtype == np.float32
        assert row.shape == (2, 11 - past)
        # shares of order 0.1 after an FP32 softmax: the sums of a few products in another order
        np.testing.assert_allclose(row, expected, atol=1e-6, rtol=1e-4)
        assert expected.std() > 0.01  # a flat row would let wrong rows and columns pass
        total = 1 if past == 0 else 1 - whole[:, :, -1, :past].sum(-1).mean(1).numpy()
        np.testing.assert_allclose(row.sum(axis=1), total, atol=1e-5)  # the past's share is not spread over the call

    def test_padding_on_the_left_gets_nothing(self, traced):
        facts, _, _, _, sessions, _ = traced
        feeds = {key: value.numpy() for key, value in decoder_inputs(facts, "decoder_row", 2, 7, 0, padded=3).items()}
        row = sessions["decoder_row"].run([names.LAST_ROW_ATTENTION], feeds)[0]
        assert (row[0, :3] == 0).all()
        assert (row[0, 3:] > 0).all()
        assert (row[1] > 0).all()

    def test_is_computed_beside_the_attention(self, traced):
        """The weights of a layer go into its product with the values alone, so that an engine may fuse them away."""
        graph = onnx.load(traced[5] / "decoder_row.onnx", load_external_data=False).graph
        readers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for value in node.input:
                readers.setdefault(value, []).append(node)
        softmaxes = [node for node in graph.node if node.op_type == "Softmax"]
        uses = [[reader.op_type for reader in readers[node.output[0]]] for node in softmaxes]
        assert sorted(uses) == [["MatMul"], ["MatMul"], ["ReduceMean"]]

    def test_fp16(self, traced, tiny_checkpoint: Path, tmp_path: Path):
        facts, _, modules, _, _, _ = traced
        checkpoint = find_checkpoint(str(tiny_checkpoint))
        graph = trace_decoder(skeleton(checkpoint, torch.float16), facts, 0, 2, last_row=True)
        segment = save_segment(graph, store_of(checkpoint, tmp_path, "fp16"), "decoder_0", None)
        assert (segment.outputs[1].name, segment.outputs[1].dtype) == (names.LAST_ROW_ATTENTION, "float32")
        assert segment.outputs[1].shape == (names.BATCH, names.SEQUENCE)
        feeds = decoder_inputs(facts, "decoder_row", 2, 23, 9)
        with torch.inference_mode():
            expected = modules["decoder_row"](*feeds.values())[1].numpy()
        halved = {key: (value.half() if value.is_floating_point() else value).numpy() for key, value in feeds.items()}
        row = onnxruntime.InferenceSession(tmp_path / "decoder_0.onnx").run([names.LAST_ROW_ATTENTION], halved)[0]
        assert np.isfinite(row).all()
        # logits of some units are off by 2^-11 of themselves each way: shares, 0.2 at most, by less than 1 % of that
        np.testing.assert_allclose(row, expected, atol=2e-3)
        assert expected.std() > 0.01


# Attention, RMSNormalization and the like came to TensorRT after 10.3
TENSORRT_10_3 = {
    *("Add", "And", "Cast", "Concat", "Constant", "Conv", "Cos", "Div", "Equal", "Erf", "Expand", "Gather"),
    *("GatherElements", "Gelu", "Gemm", "Identity", "LayerNormalization", "LessOrEqual", "MatMul", "Mul", "Neg"),
    *(
        "Not",
        "Or",
        "Pow",
        "Range",
        "Reciprocal",
        "ReduceMean",
        "Reshape",
        "Shape",
        "Sigmoid",
        "Sin",
        "Slice",
        "Softmax",
    ),
    *("Split", "Sqrt", "Squeeze", "Sub", "Tanh", "Transpose", "Unsqueeze", "Where"),
}


class TestGraphs:
    @pytest.mark.parametrize("name", ["vision_encoder", "embed_tokens", *LAYERS])
    def test_operators_and_opset(self, traced, name):
        model = onnx.load(traced[5] / f"{name}.onnx", load_external_data=False)
        assert {node.op_type for node in model.graph.node} <= TENSORRT_10_3
        assert [(item.domain, item.version) for item in model.opset_import] == [("", OPSET)]

    @pytest.mark.parametrize("name", ["vision_encoder", "decoder_1"])
    def test_no_trace_of_the_exporting_machine(self, traced, name):
        data = (traced[5] / f"{name}.onnx").read_bytes()
        assert b".py" not in data
        assert b"site-packages" not in data

    def test_the_last_tower_layer_is_not_there(self, traced):
        facts, model = traced[0], traced[1]
        assert facts.vision.layers == model.config.vision_config.num_hidden_layers - 1


@pytest.mark.parametrize("name", ["vision_encoder", "decoder_0"])
def test_fp16_graphs_are_fp16_outside_norms_and_softmax(tiny_checkpoint: Path, tmp_path: Path, name):
    checkpoint = find_checkpoint(str(tiny_checkpoint))
    facts, hollow = checkpoint.facts, skeleton(checkpoint, torch.float16)
    is_vision = name == "vision_encoder"
    traced = trace_vision(hollow, facts) if is_vision else trace_decoder(hollow, facts, 0, facts.layers)
    segment = save_segment(traced, store_of(checkpoint, tmp_path, "fp16"), name, None)
    graph = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / f"{name}.onnx")).graph
    kinds = {item.name: item.type.tensor_type.elem_type for item in [*graph.value_info, *graph.input, *graph.output]}
    half, single = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    by_op: dict[str, set[int]] = {}
    for node in graph.node:
        by_op.setdefault(node.op_type, set()).add(kinds[node.output[0]])
    assert by_op["Softmax"] == {single}
    norms = ("LayerNormalization",) if is_vision else ("Pow", "ReduceMean")
    assert [by_op[norm] for norm in norms] == [{single}] * len(norms)
    assert half in by_op["MatMul"]
    assert all(tensor.dtype in ("float16", "int64") for tensor in segment.inputs)
    assert segment.outputs[0].dtype == ("float16" if is_vision else "float32")
