"""A manifest that contradicts itself is refused when it is read, whatever the contradiction."""

import dataclasses
import json

import pytest
from test_runtime_manifest import MANIFEST

from tokprune.runtime.contract import check_manifest, contracts
from tokprune.runtime.errors import UserError
from tokprune.runtime.manifest import FileFacts, FlopsTerm, Manifest, SegmentFacts, SegmentWeights, TensorFacts
from tokprune.runtime.plan import Module, Plan, Rank, Stage

PLANS = {
    "none": Plan("none"),
    "one": Plan("random", (Stage(1, 6),), seed=4),
    "at 0": Plan("uniform", (Stage(0, 6),)),
    "fastv": Plan("fastv", (Stage(1, 6), Stage(2, 3))),
    "lvpruning": Plan("lvpruning", (Stage(1, 6), Stage(2, 3)), module=Module(8, 2, 12)),
    "two": Plan("lofi", (Stage(1, 6), Stage(2, 3)), Rank(components=5)),
}


def manifest_of(plan: Plan, precision: str = "fp32", base: str | None = None) -> Manifest:
    """A whole manifest without any file: what the contract says, with the open lengths filled in."""
    bare = dataclasses.replace(
        MANIFEST, plan=plan, precision=precision, base=base or precision, segments=(), files=(), memory=()
    )

    def tensors(wanted):
        return tuple(
            TensorFacts(name, tuple("past_sequence + sequence" if dim is None else dim for dim in shape), dtype)
            for name, (shape, dtype) in wanted.items()
        )

    segments = tuple(
        SegmentFacts(
            contract.name,
            f"{contract.name}.onnx",
            contract.layers,
            tensors(contract.inputs),
            tensors(contract.outputs),
            (FlopsTerm(2, dict.fromkeys(sorted(contract.axes), 1)),),
            contract.plugin_file,
        )
        for contract in contracts(bare)
    )
    paths = ["tokenizer.json", "preprocessor_config.json", *(segment.file for segment in segments)]
    paths += [segment.plugin_file for segment in segments if segment.plugin_file]
    if plan.method == "lvpruning":
        paths += ["modules.safetensors", "modules.json"]
    if precision.startswith("int"):
        paths.append("recipe.json")
    files = tuple(FileFacts(path, 1, "0" * 64) for path in paths)
    memory = tuple(SegmentWeights(segment.name, 3, "weight", 2) for segment in segments)
    return dataclasses.replace(bare, segments=segments, files=files, memory=memory)


def names_of(plan):
    return [segment.name for segment in manifest_of(plan).segments]


def test_segments_follow_from_the_plan():
    first = ["vision_encoder", "embed_tokens"]
    assert names_of(PLANS["none"]) == [*first, "decoder_0"]
    assert names_of(PLANS["one"]) == [*first, "decoder_0", "select_0", "decoder_1"]
    assert names_of(PLANS["at 0"]) == [*first, "select_0", "decoder_1"]
    assert names_of(PLANS["two"]) == [*first, "decoder_0", "select_0", "decoder_1", "select_1", "decoder_2"]


def test_tensors_follow_from_model_and_plan():
    """Spelled out once by hand, so that the contract itself is held against something."""
    _, _, decoder_0, select_0, _, select_1, decoder_2 = manifest_of(PLANS["two"], "fp16").segments
    assert decoder_0.inputs == (
        TensorFacts("inputs_embeds", ("batch", "sequence", 64), "float16"),
        TensorFacts("position_ids", ("batch", "sequence"), "int64"),
        TensorFacts("attention_mask", ("batch", "total_sequence"), "int64"),
        TensorFacts("past_key_values.0.key", ("batch", 2, "past_sequence", 16), "float16"),
        TensorFacts("past_key_values.0.value", ("batch", 2, "past_sequence", 16), "float16"),
    )
    assert [tensor.name for tensor in decoder_0.outputs] == ["last_hidden_state", "present.0.key", "present.0.value"]
    assert select_0.inputs[2] == TensorFacts("visual_index", ("images", 16), "int64")
    assert select_0.outputs[2] == TensorFacts("kept_indices", ("images", 6), "int64")
    assert select_1.inputs[2] == TensorFacts("visual_index", ("images", 6), "int64")
    assert select_1.outputs[3] == TensorFacts("scores", ("images", 6), "float32")
    assert decoder_2.layers == (2, 3)
    assert decoder_2.inputs[0].name == "hidden_states"
    assert decoder_2.inputs[3] == TensorFacts("logits_index", ("batch", "logits_count"), "int64")
    assert decoder_2.outputs[0] == TensorFacts("logits", ("batch", "logits_count", 576), "float32")


def test_fastv_hands_an_attention_row_from_decoder_to_selector():
    _, _, decoder_0, select_0, decoder_1, select_1, decoder_2 = manifest_of(PLANS["fastv"], "fp16").segments
    row = TensorFacts("last_row_attention", ("batch", "sequence"), "float32")
    for decoder in (decoder_0, decoder_1):
        assert decoder.outputs[0].name == "last_hidden_state"
        assert decoder.outputs[1] == row
    for selector in (select_0, select_1):
        assert selector.inputs[-1] == row
    assert row not in decoder_2.outputs


def test_lvpruning_tells_selectors_where_the_text_is():
    segments = manifest_of(PLANS["lvpruning"], "fp16").segments
    text = TensorFacts("text_index", ("images", "text_rows"), "int64")
    assert [segment.name for segment in segments if text in segment.inputs] == ["select_0", "select_1"]
    assert segments[3].inputs[4] == text
    assert not [segment.name for segment in manifest_of(PLANS["two"]).segments if text in segment.inputs]


@pytest.mark.parametrize(
    ("precision", "base"), [("fp32", "fp32"), ("fp16", "fp16"), ("int8", "fp32"), ("int8", "fp16"), ("int4", "fp16")]
)
@pytest.mark.parametrize("plan", PLANS)
def test_whole_manifests_pass(plan, precision, base):
    manifest = manifest_of(PLANS[plan], precision, base)
    check_manifest(manifest, "here")
    assert manifest.segments[-1].inputs[0].dtype == {"fp32": "float32", "fp16": "float16"}[base]


def test_integers_need_a_recipe():
    manifest = manifest_of(PLANS["one"], "int4", "fp16")
    files = tuple(file for file in manifest.files if file.path != "recipe.json")
    with pytest.raises(UserError, match=r"does not list the file recipe.json"):
        check_manifest(dataclasses.replace(manifest, files=files), "here")


@pytest.mark.parametrize("plan", ["random", "random-0", "random-2", "fastv-2", "lvpruning"])
def test_exported_manifests_pass(tiny_bundle, plan):
    check_manifest(Manifest.from_json((tiny_bundle(plan) / "tokprune.json").read_text(), "here"), "here")


def swap(items, i, j):
    items[i], items[j] = items[j], items[i]


# Segments of "two": 0 vision, 1 embed, 2 decoder_0, 3 select_0, 4 decoder_1, 5 select_1, 6 decoder_2.
CONTRADICTIONS = {
    "no layers": (lambda m: m["model"].update(layers=0), "layers is 0"),
    "negative hidden": (lambda m: m["model"].update(hidden=-64), "hidden is -64"),
    "no image": (lambda m: m["model"]["vision"].update(image_size=0), "image_size is 0"),
    "negative token": (lambda m: m["model"].update(image_token_id=-1), "image_token_id is -1"),
    "patches do not tile": (lambda m: m["model"]["vision"].update(patch_size=15), "patches of 15"),
    "image token": (lambda m: m["model"].update(image_token_id=576), "token 576"),
    "eos": (lambda m: m["model"].update(eos_token_ids=[600]), "token 600"),
    "method": (lambda m: m["plan"].update(method="dice"), "method 'dice' is unknown"),
    "no stages": (lambda m: m["plan"].update(stages=[]), "at least one stage"),
    "layer": (lambda m: m["plan"]["stages"][1].update(layer=3), "layer 3"),
    "keep": (lambda m: m["plan"]["stages"][1].update(keep=7), "keep 7 of 6"),
    "rank": (lambda m: m["plan"]["rank"].update(components=6), "rank 6"),
    "no rank": (lambda m: m["plan"].update(rank=None), "needs a rank"),
    "seed of lofi": (lambda m: m["plan"].update(seed=3), "a rank, a seed or a module"),
    "negative seed": (lambda m: m["plan"].update(seed=-3), "seed -3"),
    "no batch": (lambda m: m["limits"].update(max_batch=0), "largest batch is 0"),
    "no input": (lambda m: m["limits"].update(max_input_length=0), "largest input length is 0"),
    "negative cache": (lambda m: m["limits"].update(max_kv_capacity=-1), "largest KV cache capacity is -1"),
    "input beyond the cache": (lambda m: m["limits"].update(max_input_length=121), "inputs of 121 tokens"),
    "cache beyond the context": (lambda m: m["limits"].update(max_kv_capacity=129), "the model's context of 128"),
    "precision": (lambda m: m.update(precision="fp8"), "'fp8'"),
    "base": (lambda m: m.update(base="int8"), "its base is 'int8'"),
    "precision and base": (lambda m: m.update(base="fp16"), "its precision is fp32, on a base of fp16"),
    "source": (lambda m: m.update(source={}), "names no model"),
    "prompt without text": (lambda m: m["prompt"].update(user="USER:"), "prompt format"),
    "prompt with two": (lambda m: m["prompt"].update(user="{text}{text}"), "prompt format"),
    "prompt with another": (lambda m: m["prompt"].update(user="{text}{name}"), "prompt format"),
    "prompt that reaches in": (lambda m: m["prompt"].update(user="{text.__class__}"), "prompt format"),
    "prompt that is cut": (lambda m: m["prompt"].update(user="{text} {"), "prompt format"),
    "segment missing": (lambda m: m["segments"].pop(3), "needs the segments"),
    "segment twice": (lambda m: m["segments"].append(m["segments"][6]), "needs the segments"),
    "segments in another order": (lambda m: swap(m["segments"], 2, 4), "needs the segments"),
    "layers overlap": (lambda m: m["segments"][4].update(layers=[0, 2]), "decoder_1 has the layers"),
    "layers of none": (lambda m: m["segments"][4].update(layers=None), "decoder_1 has the layers None"),
    "layers of a selector": (lambda m: m["segments"][3].update(layers=[0, 1]), "select_0 has the layers"),
    "input missing": (lambda m: m["segments"][2]["inputs"].pop(), "decoder_0 reads not"),
    "no inputs": (lambda m: m["segments"][0].update(inputs=[]), "vision_encoder reads not"),
    "output missing": (lambda m: m["segments"][3]["outputs"].pop(0), "select_0 writes not"),
    "outputs in another order": (lambda m: swap(m["segments"][2]["outputs"], 1, 2), "decoder_0 writes not"),
    "input of another type": (lambda m: m["segments"][1]["inputs"][0].update(dtype="int32"), "input_ids of embed"),
    "unknown type": (lambda m: m["segments"][0]["inputs"][0].update(dtype="object"), "pixel_values of vision"),
    "unknown axis": (
        lambda m: m["segments"][2]["inputs"][3].update(shape=["batch", 2, "yesterday", 16]),
        "past_key_values.0.key",
    ),
    "negative length": (lambda m: m["segments"][2]["inputs"][3].update(shape=["batch", -2, "past_sequence", 16]), "-2"),
    "a length fewer": (lambda m: m["segments"][6]["outputs"][0].update(shape=["batch", "logits_count"]), "logits of"),
    "flops of an unknown axis": (
        lambda m: m["segments"][0].update(flops=[{"coefficient": 1, "powers": {"sequence": 1}}]),
        "FLOPs of vision_encoder",
    ),
    "negative power": (
        lambda m: m["segments"][0].update(flops=[{"coefficient": 1, "powers": {"images": -1}}]),
        "FLOPs of vision_encoder",
    ),
    "negative flops": (
        lambda m: m["segments"][0].update(flops=[{"coefficient": -1, "powers": {}}]),
        "FLOPs of vision_encoder",
    ),
    "file twice": (lambda m: m["files"].append(m["files"][0]), "twice"),
    "negative size": (lambda m: m["files"][0].update(size=-1), "-1 bytes"),
    "no hash": (lambda m: m["files"][0].update(sha256="x"), "no SHA-256"),
    "tokenizer not listed": (lambda m: m["files"].pop(0), "tokenizer.json, which it needs"),
    "weights of a segment missing": (lambda m: m["memory"].pop(), "weights of each segment"),
    "weights in another order": (lambda m: swap(m["memory"], 1, 2), "weights of each segment"),
    "largest weight": (lambda m: m["memory"][2].update(largest_bytes=4), "of decoder_0 has 4 of 3 bytes"),
    "negative weight": (lambda m: m["memory"][2].update(largest_bytes=-1), "of decoder_0 has -1 of 3 bytes"),
    "no plugin graph": (lambda m: m["segments"][3].update(plugin_file=None), "plugin's graph None, its plan select_0"),
    "plugin graph of a decoder": (lambda m: m["segments"][2].update(plugin_file="d.onnx"), "plugin's graph d.onnx"),
    "plugin graph not listed": (
        lambda m: m.update(files=[f for f in m["files"] if f["path"] != "select_1.plugin.onnx"]),
        "list the file select_1.plugin.onnx",
    ),
    "graph not listed": (lambda m: m["segments"][0].update(file="v.onnx"), "v.onnx, which it needs"),
}


@pytest.mark.parametrize("kind", CONTRADICTIONS)
def test_contradiction(kind):
    change, words = CONTRADICTIONS[kind]
    data = json.loads(manifest_of(PLANS["two"]).to_json())
    change(data)
    with pytest.raises(UserError, match=r"^here contradicts itself .*: export the bundle again$") as refusal:
        check_manifest(Manifest.from_json(json.dumps(data), "here"), "here")
    assert words in str(refusal.value)


MODULE_CONTRADICTIONS = {
    "no module": (lambda m: m["plan"].update(module=None), "needs trained modules"),
    "heads": (lambda m: m["plan"]["module"].update(heads=3), "3 heads"),
    "module of another method": (lambda m: m["plan"].update(method="uniform"), "a rank, a seed or a module"),
    "weights not listed": (lambda m: m["files"].pop(-2), "modules.safetensors, which it needs"),
    "facts of the weights not listed": (lambda m: m["files"].pop(-1), "modules.json, which it needs"),
    "no text": (lambda m: m["segments"][3]["inputs"].pop(), "select_0 reads not"),
}


@pytest.mark.parametrize("kind", MODULE_CONTRADICTIONS)
def test_contradiction_about_modules(kind):
    change, words = MODULE_CONTRADICTIONS[kind]
    data = json.loads(manifest_of(PLANS["lvpruning"]).to_json())
    change(data)
    with pytest.raises(UserError, match="contradicts itself") as refusal:
        check_manifest(Manifest.from_json(json.dumps(data), "here"), "here")
    assert words in str(refusal.value)


def test_method_none_has_no_stages():
    plan = Plan("none", (Stage(1, 4),))
    with pytest.raises(UserError, match="prunes nothing"):
        check_manifest(dataclasses.replace(manifest_of(PLANS["one"]), plan=plan), "here")
