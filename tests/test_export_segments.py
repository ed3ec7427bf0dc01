"""Traced segments against the same torch modules in eager mode, and against transformers' own forward."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from transformers import AttentionInterface

from tokprune.export.checkpoint import find_checkpoint, load_model
from tokprune.export.segments import ATTENTION, Decoder, EmbedTokens, VisionEncoder, attention
from tokprune.export.trace import OPSET, save_segment, trace_decoder, trace_embed, trace_vision
from tokprune.runtime import names

# FP32 products in another order: a few ulp of activations of order 1, over some layers
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def traced(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory):
    """Eager modules and the ONNX sessions traced from them: vision, embedding, first and last decoder."""
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
    }
    graphs = {
        "vision_encoder": trace_vision(modules["vision_encoder"], facts, torch.float32),
        "embed_tokens": trace_embed(modules["embed_tokens"]),
        "decoder_0": trace_decoder(modules["decoder_0"], facts, torch.float32),
        "decoder_1": trace_decoder(modules["decoder_1"], facts, torch.float32),
    }
    segments = {name: save_segment(graph, directory, name, None) for name, graph in graphs.items()}
    sessions = {name: onnxruntime.InferenceSession(directory / f"{name}.onnx") for name in graphs}
    # transformers makes no mask for an attention it does not know, so its own forward needs its own attention
    return facts, load_model(checkpoint, dtype=torch.float32), modules, segments, sessions, directory


def decoder_inputs(facts, name: str, layers: range, batch: int, rows: int, past: int, padded: int = 0):
    """Random feeds by tensor name; the first ``padded`` keys of sequence 0 are masked out."""
    generator = torch.Generator().manual_seed(rows * 31 + past)
    mask = torch.ones(batch, past + rows, dtype=torch.int64)
    mask[0, :padded] = 0
    feeds = {
        names.INPUTS_EMBEDS if name == "decoder_0" else names.HIDDEN_STATES: torch.randn(
            batch, rows, facts.hidden, generator=generator
        ),
        names.POSITION_IDS: torch.arange(past, past + rows).repeat(batch, 1) + 3,
        names.ATTENTION_MASK: mask,
    }
    if name != "decoder_0":
        feeds[names.LOGITS_INDEX] = torch.randint(0, rows, (batch, 2), generator=generator)
    for layer in layers:
        for which in ("key", "value"):
            shape = (batch, facts.kv_heads, past, facts.head_dim)
            feeds[names.past(layer, which)] = torch.randn(shape, generator=generator)
    return feeds


class TestTracedDecoder:
    @pytest.mark.parametrize(
        ("batch", "rows", "past", "padded"), [(1, 9, 0, 0), (1, 1, 12, 0), (3, 4, 5, 2), (2, 1, 1, 0), (2, 6, 0, 3)]
    )
    @pytest.mark.parametrize("name", ["decoder_0", "decoder_1"])
    def test_equals_eager_at_lengths_it_was_not_traced_at(self, traced, name, batch, rows, past, padded):
        facts, _, modules, segments, sessions, _ = traced
        layers = range(0, 1) if name == "decoder_0" else range(1, facts.layers)
        feeds = decoder_inputs(facts, name, layers, batch, rows, past, padded)
        with torch.inference_mode():
            expected = modules[name](*feeds.values())
        outputs = sessions[name].run(None, {key: value.numpy() for key, value in feeds.items()})
        assert [tensor.name for tensor in segments[name].inputs] == list(feeds)
        # rows that may attend to nothing but padding have no meaning
        meaningful = slice(padded, None) if past == 0 else slice(None)
        for tensor, ours, theirs in zip(segments[name].outputs, outputs, expected, strict=True):
            theirs = theirs.numpy()
            if padded and past == 0 and tensor.name != names.LOGITS:
                axis = 1 if tensor.name == names.LAST_HIDDEN_STATE else 2
                ours, theirs = (np.moveaxis(a, axis, 1)[0, meaningful] for a in (ours, theirs))
            np.testing.assert_allclose(ours, theirs, atol=TOLERANCE, rtol=1e-4, err_msg=tensor.name)

    def test_padding_changes_nothing(self, traced):
        """A sequence behind two padded rows gives what it gives without them."""
        facts, _, _, _, sessions, _ = traced
        feeds = decoder_inputs(facts, "decoder_0", range(0, 1), 1, 7, 0, padded=2)
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
        feeds = {k: v.numpy() for k, v in decoder_inputs(facts, "decoder_0", range(0, 1), 1, 6, 3).items()}
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
        for name, layers in (("decoder_0", range(0, 1)), ("decoder_1", range(1, facts.layers))):
            feeds = dict(common)
            feeds[names.INPUTS_EMBEDS if name == "decoder_0" else names.HIDDEN_STATES] = hidden
            feeds.update({names.past(layer, which): empty for layer in layers for which in ("key", "value")})
            if name == "decoder_1":
                feeds[names.LOGITS_INDEX] = np.arange(11)[None].repeat(2, 0)
            hidden = sessions[name].run(None, feeds)[0]
        np.testing.assert_allclose(hidden, expected, atol=5 * TOLERANCE, rtol=1e-4)


# Attention, RMSNormalization and the like came to TensorRT after 10.3
TENSORRT_10_3 = {
    *("Add", "And", "Cast", "Concat", "Constant", "Conv", "Cos", "Div", "Equal", "Erf", "Expand", "Gather"),
    *("GatherElements", "Gelu", "Gemm", "Identity", "LayerNormalization", "LessOrEqual", "MatMul", "Mul", "Neg"),
    *("Not", "Pow", "Range", "Reciprocal", "ReduceMean", "Reshape", "Shape", "Sigmoid", "Sin", "Slice", "Softmax"),
    *("Split", "Sqrt", "Squeeze", "Sub", "Tanh", "Transpose", "Unsqueeze", "Where"),
}


class TestGraphs:
    @pytest.mark.parametrize("name", ["vision_encoder", "embed_tokens", "decoder_0", "decoder_1"])
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


def test_fp16_graphs_are_fp16_outside_norms_and_softmax(tiny_checkpoint: Path, tmp_path: Path):
    AttentionInterface.register(ATTENTION, attention)
    checkpoint = find_checkpoint(str(tiny_checkpoint))
    model = load_model(checkpoint, dtype=torch.float16, attention=ATTENTION)
    module = Decoder(model, 0, checkpoint.facts.layers)
    segment = save_segment(trace_decoder(module, checkpoint.facts, torch.float16), tmp_path, "decoder_0", None)
    graph = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "decoder_0.onnx")).graph
    kinds = {item.name: item.type.tensor_type.elem_type for item in [*graph.value_info, *graph.input, *graph.output]}
    half, single = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    by_op: dict[str, set[int]] = {}
    for node in graph.node:
        by_op.setdefault(node.op_type, set()).add(kinds[node.output[0]])
    assert by_op["Softmax"] == {single}
    assert by_op["ReduceMean"] == {single}
    assert half in by_op["MatMul"]
    assert all(tensor.dtype in ("float16", "int64") for tensor in segment.inputs)
    assert segment.outputs[0].dtype == "float32"
