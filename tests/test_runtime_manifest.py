"""The manifest as a file format: pinned to the byte, and read strictly."""

import json

import pytest

from tokprune.runtime import manifest as module
from tokprune.runtime.errors import UserError
from tokprune.runtime.manifest import (
    SCHEMA,
    FileFacts,
    FlopsTerm,
    Limits,
    Manifest,
    ModelFacts,
    PromptFormat,
    SegmentFacts,
    SegmentWeights,
    TensorFacts,
    VisionFacts,
)
from tokprune.runtime.plan import Plan, Rank, Stage

MANIFEST = Manifest(
    schema=5,
    tools={"tokprune": "0.1.0"},
    source={"model": "tïny"},
    model=ModelFacts(
        name="tïny",
        layers=3,
        hidden=64,
        intermediate=96,
        heads=4,
        kv_heads=2,
        head_dim=16,
        vocabulary=576,
        context=128,
        vision=VisionFacts(image_size=56, patch_size=14, layers=2, hidden=32, intermediate=64, heads=4),
        image_token_id=3,
        bos_token_id=None,
        eos_token_ids=(1, 2),
    ),
    plan=Plan("lofi", (Stage(1, 6),), Rank(energy=0.9)),
    precision="fp32",
    base="fp32",
    prompt=PromptFormat(image="<image>\n", user="USER: {text} ", assistant="ASSISTANT:"),
    limits=Limits(max_batch=4, max_input_length=100, max_kv_capacity=120),
    segments=(
        SegmentFacts(
            name="decoder_0",
            file="decoder_0.onnx",
            layers=(0, 1),
            inputs=(TensorFacts("position_ids", ("batch", "sequence"), "int64"),),
            outputs=(TensorFacts("scores", ("images", 16), "float32"),),
            flops=(FlopsTerm(2**60 + 1, {"batch": 1, "sequence": 2}),),
        ),
        SegmentFacts("embed_tokens", "embed_tokens.onnx", None, (), (), (), "embed_tokens.plugin.onnx"),
    ),
    files=(FileFacts("tokenizer.json", 23915, "ab" * 32),),
    memory=(SegmentWeights("decoder_0", 2**40, "lm_head.weight", 2**30),),
)

# What version 5 of the schema looks like: a change here is a change of the format, and needs a new version.
TEXT = """{
 "schema": 5,
 "tools": {
  "tokprune": "0.1.0"
 },
 "source": {
  "model": "t\\u00efny"
 },
 "model": {
  "name": "t\\u00efny",
  "layers": 3,
  "hidden": 64,
  "intermediate": 96,
  "heads": 4,
  "kv_heads": 2,
  "head_dim": 16,
  "vocabulary": 576,
  "context": 128,
  "vision": {
   "image_size": 56,
   "patch_size": 14,
   "layers": 2,
   "hidden": 32,
   "intermediate": 64,
   "heads": 4
  },
  "image_token_id": 3,
  "bos_token_id": null,
  "eos_token_ids": [
   1,
   2
  ]
 },
 "plan": {
  "method": "lofi",
  "stages": [
   {
    "layer": 1,
    "keep": 6
   }
  ],
  "rank": {
   "components": null,
   "energy": 0.9
  },
  "seed": 0,
  "module": null
 },
 "precision": "fp32",
 "base": "fp32",
 "prompt": {
  "image": "<image>\\n",
  "user": "USER: {text} ",
  "assistant": "ASSISTANT:"
 },
 "limits": {
  "max_batch": 4,
  "max_input_length": 100,
  "max_kv_capacity": 120
 },
 "segments": [
  {
   "name": "decoder_0",
   "file": "decoder_0.onnx",
   "layers": [
    0,
    1
   ],
   "inputs": [
    {
     "name": "position_ids",
     "shape": [
      "batch",
      "sequence"
     ],
     "dtype": "int64"
    }
   ],
   "outputs": [
    {
     "name": "scores",
     "shape": [
      "images",
      16
     ],
     "dtype": "float32"
    }
   ],
   "flops": [
    {
     "coefficient": 1152921504606846977,
     "powers": {
      "batch": 1,
      "sequence": 2
     }
    }
   ],
   "plugin_file": null
  },
  {
   "name": "embed_tokens",
   "file": "embed_tokens.onnx",
   "layers": null,
   "inputs": [],
   "outputs": [],
   "flops": [],
   "plugin_file": "embed_tokens.plugin.onnx"
  }
 ],
 "files": [
  {
   "path": "tokenizer.json",
   "size": 23915,
   "sha256": "abababababababababababababababababababababababababababababababab"
  }
 ],
 "memory": [
  {
   "segment": "decoder_0",
   "total": 1099511627776,
   "largest": "lm_head.weight",
   "largest_bytes": 1073741824
  }
 ]
}
"""


class TestFormat:
    def test_written_to_the_byte(self):
        assert MANIFEST.to_json() == TEXT

    def test_read(self):
        assert Manifest.from_json(TEXT, "here") == MANIFEST

    def test_of_an_export_round_trips_to_the_byte(self, tiny_bundle):
        text = (tiny_bundle("random") / "tokprune.json").read_text(encoding="utf-8")
        assert Manifest.from_json(text, "here").to_json() == text


def changed(change):
    data = json.loads(TEXT)
    change(data)
    return json.dumps(data)


class TestReading:
    @pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '{"schema": ' + "1" * 5000 + "}"])
    def test_no_json(self, text):
        with pytest.raises(UserError, match="here is not valid JSON"):
            Manifest.from_json(text, "here")

    @pytest.mark.parametrize("schema", [0, SCHEMA + 1, -1, 1.0, True, "1", None, [1], {}])
    def test_schema(self, schema):
        with pytest.raises(UserError, match=r"here has schema version .*, this tokprune reads version 5"):
            Manifest.from_json(changed(lambda data: data.update(schema=schema)), "here")

    @pytest.mark.parametrize("text", ["[]", "3", "null", '"schema"', "{}"])
    def test_no_manifest(self, text):
        with pytest.raises(UserError, match="schema version None"):
            Manifest.from_json(text, "here")

    @pytest.mark.parametrize(
        ("change", "key"),
        [
            (lambda data: data.pop("files"), "manifest.files"),
            (lambda data: data.update(extra=1), "manifest.extra"),
            (lambda data: data.update(tools=["torch"]), "manifest.tools"),
            (lambda data: data["tools"].update(torch=2), "manifest.tools.torch"),
            (lambda data: data["model"].pop("hidden"), "manifest.model.hidden"),
            (lambda data: data["model"].update(hidden="64"), "manifest.model.hidden"),
            (lambda data: data["model"].update(hidden=64.0), "manifest.model.hidden"),
            (lambda data: data["model"].update(hidden=True), "manifest.model.hidden"),
            (lambda data: data["model"].update(hidden=None), "manifest.model.hidden"),
            (lambda data: data["model"].update(bos_token_id="0"), "manifest.model.bos_token_id"),
            (lambda data: data["model"].update(eos_token_ids=[1, None]), "manifest.model.eos_token_ids\\[1\\]"),
            (lambda data: data["model"]["vision"].update(tokens=16), "manifest.model.vision.tokens"),
            (lambda data: data["plan"]["stages"][0].pop("keep"), "manifest.plan.stages\\[0\\].keep"),
            (lambda data: data["plan"]["rank"].update(energy="0.9"), "manifest.plan.rank.energy"),
            (lambda data: data["segments"][0].update(layers=[0]), "manifest.segments\\[0\\].layers"),
            (lambda data: data["segments"][0].update(layers=[0, 1, 2]), "manifest.segments\\[0\\].layers"),
            (lambda data: data["segments"][0]["inputs"][0].update(shape=["batch", 0.5]), "inputs\\[0\\].shape\\[1\\]"),
            (lambda data: data["segments"][0]["flops"][0].update(powers={"batch": "1"}), "flops\\[0\\].powers.batch"),
            (lambda data: data.update(files={}), "manifest.files"),
            (lambda data: data["files"][0].update(size=None), "manifest.files\\[0\\].size"),
        ],
    )
    def test_names_the_key_at_fault(self, change, key):
        with pytest.raises(UserError, match=f"^here has an unexpected or missing value at .*{key}: export"):
            Manifest.from_json(changed(change), "here")

    def test_an_integer_where_a_fraction_may_stand(self):
        text = changed(lambda data: data["plan"]["rank"].update(energy=1))
        energy = Manifest.from_json(text, "here").plan.rank.energy
        assert (energy, type(energy)) == (1.0, float)


class TestFacts:
    def test_segment(self):
        assert MANIFEST.segment("decoder_0").layers == (0, 1)
        with pytest.raises(KeyError, match="select_0"):
            MANIFEST.segment("select_0")

    def test_flops_are_exact_integers(self):
        """Past 2^53 a float would round."""
        assert MANIFEST.segment("decoder_0").count_flops(batch=1, sequence=3) == (2**60 + 1) * 9
        terms = (FlopsTerm(2, {"a": 1, "b": 2}), FlopsTerm(5, {}))
        assert SegmentFacts("s", "s.onnx", None, (), (), terms).count_flops(a=3, b=7, unused=1) == 2 * 3 * 49 + 5

    def test_visual_tokens(self):
        assert module.VisionFacts(336, 14, 23, 1024, 4096, 16).tokens == 576
        assert MANIFEST.model.vision.grid == (4, 4)
