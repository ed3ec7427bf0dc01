"""Memory plans: weights against real tensors, caches against published figures, estimates that grow as they must."""

from __future__ import annotations

import dataclasses
import json
import struct
from pathlib import Path

import pytest
from click.testing import CliRunner

from tokprune.export.demo import checkpoint_dir
from tokprune.runtime import names
from tokprune.runtime.cli.memory import command
from tokprune.runtime.cli.models import read_model
from tokprune.runtime.errors import UserError
from tokprune.runtime.flops import SEVEN_B, THIRTEEN_B
from tokprune.runtime.manifest import ModelFacts
from tokprune.runtime.memory import Work, activation_bytes, kv_bytes, kv_bytes_per_token, memory_plan
from tokprune.runtime.plan import Module, Plan, Rank, Stage
from tokprune.runtime.weights import closed_weights, segment_weights

MIB = 2**20
LOFI = Plan("lofi", (Stage(2, 64),), Rank(8))
STAGES = Plan("lofi", (Stage(2, 192), Stage(5, 64)), Rank(8))


def totals(facts: ModelFacts, plan: Plan, precision: str) -> dict[str, int]:
    return {segment.segment: segment.total for segment in closed_weights(facts, plan, precision)}


def demo_tensors() -> dict[str, int]:
    """Bytes of every tensor in the demo checkpoint, which is FP16, by name."""
    with open(checkpoint_dir() / "model.safetensors", "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    del header["__metadata__"]
    return {name: entry["data_offsets"][1] - entry["data_offsets"][0] for name, entry in header.items()}


class TestWeights:
    def test_are_the_checkpoints_tensors_to_the_byte(self) -> None:
        tensors, facts = demo_tensors(), read_model("demo")

        def real(*prefixes: str) -> int:
            return sum(size for name, size in tensors.items() if name.startswith(prefixes))

        layers = [f"language_model.model.layers.{layer}." for layer in range(facts.layers)]
        unread = real("vision_tower.post_layernorm", f"vision_tower.encoder.layers.{facts.vision.layers}.")
        assert totals(facts, STAGES, "fp16") == {
            "vision_encoder": real("vision_tower", "multi_modal_projector") - unread,
            "embed_tokens": real("language_model.model.embed_tokens"),
            "decoder_0": real(*layers[:2]),
            "select_0": 0,
            "decoder_1": real(*layers[2:5]),
            "select_1": 0,
            "decoder_2": real(*layers[5:], "language_model.model.norm", "language_model.lm_head"),
        }

    def test_of_7b_are_those_published(self) -> None:
        # of the language model alone: 13.5, 6.8 (half of it; here tables stay FP16) and about 3.9 GB
        for precision, gigabytes in (("fp16", 13.5), ("int8", 6.8), ("int4", 3.9)):
            found = totals(SEVEN_B, LOFI, precision)
            language = sum(found.values()) - found["vision_encoder"]
            assert language / 1e9 == pytest.approx(gigabytes, rel=0.04), precision
        assert sum(totals(SEVEN_B, LOFI, "fp32").values()) == 2 * sum(totals(SEVEN_B, LOFI, "fp16").values())

    def test_do_not_depend_on_the_plan(self) -> None:
        for precision in ("fp32", "fp16", "int8", "int4"):
            sums = {sum(totals(SEVEN_B, plan, precision).values()) for plan in (Plan("none"), LOFI, STAGES)}
            assert len(sums) == 1

    def test_of_a_module_are_its_tensors(self) -> None:
        path = checkpoint_dir().parent / "modules" / "default"
        module = Module(**json.loads((path / "modules.json").read_text())["module"])
        with open(path / "modules.safetensors", "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        sizes = [e["data_offsets"][1] - e["data_offsets"][0] for n, e in header.items() if n.startswith("stages.0.")]
        plan = Plan("lvpruning", (Stage(1, 346),), module=module)
        assert totals(read_model("demo"), plan, "fp16")["select_0"] == sum(sizes) > 0

    def test_largest(self) -> None:
        plan = memory_plan(SEVEN_B, LOFI, "fp16")
        assert (plan.largest_weight.largest, plan.largest_weight.largest_bytes) == ("lm_head.weight", 32064 * 4096 * 2)
        assert segment_weights("select_0", []).largest_bytes == 0
        assert segment_weights("a", [("x", 3), ("y", 5)]).total == 8

    def test_stage_at_layer_0_leaves_no_first_decoder(self) -> None:
        found = totals(SEVEN_B, Plan("uniform", (Stage(0, 64),)), "fp16")
        assert list(found) == ["vision_encoder", "embed_tokens", "select_0", "decoder_1"]


class TestCaches:
    def test_of_7b_are_those_published(self) -> None:
        assert sum(kv_bytes_per_token(SEVEN_B, LOFI, "fp16").values()) == MIB / 2
        for tokens, mebibytes in ((576, 288), (64, 32)):
            assert tokens * sum(kv_bytes_per_token(SEVEN_B, LOFI, "fp16").values()) == mebibytes * MIB

    def test_are_full_before_a_stage_and_short_behind_it(self) -> None:
        found = kv_bytes(SEVEN_B, LOFI, "fp16", Work(text_tokens=36, new_tokens=100))
        assert found == {"decoder_0": (36 + 576 + 100) * MIB // 32, "decoder_1": (36 + 64 + 100) * 30 * MIB // 64}
        assert sum(kv_bytes(SEVEN_B, Plan("none"), "fp16", Work(36, 100)).values()) == 712 * MIB // 2

    def test_grow_with_batch_images_and_width(self) -> None:
        one = sum(kv_bytes(SEVEN_B, LOFI, "fp16", Work()).values())
        assert sum(kv_bytes(SEVEN_B, LOFI, "fp16", Work(batch=3)).values()) == 3 * one
        assert sum(kv_bytes(SEVEN_B, LOFI, "fp32", Work()).values()) == 2 * one
        assert sum(kv_bytes(SEVEN_B, LOFI, "int4", Work()).values()) == one
        two = sum(kv_bytes(SEVEN_B, LOFI, "fp16", Work(images=2)).values())
        assert two - one == 576 * MIB // 32 + 64 * 30 * MIB // 64


class TestActivations:
    def test_of_7b_are_mostly_scores(self) -> None:
        found = activation_bytes(SEVEN_B, LOFI, "fp16", Work())
        scores = 2 * 4 * 32 * 612**2
        assert 0.7 < scores / found["decoder_0"] < 1
        assert found["decoder_1"] < found["decoder_0"] / 10  # 100 rows instead of 612
        assert list(found) == ["vision_encoder", "embed_tokens", "decoder_0", "select_0", "decoder_1"]

    def test_without_an_image_no_tower_and_no_selector_runs(self) -> None:
        assert list(activation_bytes(SEVEN_B, LOFI, "fp16", Work(images=0))) == [
            "embed_tokens",
            "decoder_0",
            "decoder_1",
        ]

    def test_selectors(self) -> None:
        module = Module(256, 8, 1024)
        plans = [LOFI, Plan("lvpruning", LOFI.stages, module=module), Plan("fastv", LOFI.stages)]
        lofi, lvpruning, fastv = (activation_bytes(SEVEN_B, plan, "fp16", Work())["select_0"] for plan in plans)
        states = 2 * 4096 * (612 + 100)
        assert fastv == states + 4 * 2 * 576
        assert min(lofi, lvpruning) > states + 2 * 4 * 576 * 4096  # X and one more of its size, in FP32


class TestPeaks:
    def test_add_up(self) -> None:
        plan = memory_plan(SEVEN_B, LOFI, "fp16")
        caches, activations = plan.caches.values(), plan.activations.values()
        weights = sum(segment.total for segment in plan.weights)
        wider = activation_bytes(SEVEN_B, LOFI, "fp32", Work()).values()
        assert plan.onnxruntime_cpu_bytes == round(1.2 * (2 * weights + sum(caches) + max(caches) + sum(wider)))
        for precision, base, head, tower in (("int4", "fp16", None, None), ("int8", "fp32", "int8", "int8")):
            rounded = memory_plan(SEVEN_B, LOFI, precision, base=base, head=head, tower=tower)
            other = memory_plan(SEVEN_B, LOFI, base)
            # 7B by hand: 32 layers of 4 · 4096² + 3 · 4096 · 11008 weights, their codes, and scales of the base's width
            count, bits, per_scale = 32 * (4 * 4096**2 + 3 * 4096 * 11008), 4 if precision == "int4" else 8, 128
            scales = count // per_scale if precision == "int4" else 32 * (5 * 4096 + 2 * 11008)
            integers = count * bits // 8 + scales * (2 if base == "fp16" else 4)
            if head:
                integers += 32064 * 4096 + 4 * 32064
                tower_weights = 23 * (4 * 1024**2 + 2 * 1024 * 4096) + 1024 * 4096 + 4096**2
                integers += tower_weights + 4 * (23 * (5 * 1024 + 4096) + 2 * 4096)
            assert rounded.integers == integers
            floats = (rounded.weights_bytes - integers) * (2 if base == "fp16" else 1)
            rest = other.onnxruntime_cpu_bytes - round(1.2 * other.weights_bytes * (2 if base == "fp16" else 1))
            assert rounded.onnxruntime_cpu_bytes == pytest.approx(1.2 * (integers + floats) + rest, abs=2)
        full = [2 * MIB // 64 * 4096, 30 * MIB // 64 * (4096 - 576 + 64)]  # half a MiB a token for all 32 layers
        assert plan.tensorrt_cache_bytes == sum(full) + MIB // 2  # and the row that a step writes
        assert plan.tensorrt_bytes == weights + sum(full) + MIB // 2 + max(activations)
        assert plan.build_bytes == 4 * max(segment.total for segment in plan.weights)

    def test_pruning_pays_in_caches(self) -> None:
        pruned, full = (memory_plan(SEVEN_B, plan, "fp16") for plan in (LOFI, Plan("none")))
        saved = full.tensorrt_cache_bytes - pruned.tensorrt_cache_bytes
        assert saved == (576 - 64) * 30 * MIB // 64

    def test_tensorrts_caches_are_made_for_the_capacity(self) -> None:
        """However short prompt and answer are."""
        short, long = (memory_plan(SEVEN_B, LOFI, "fp16", Work(new_tokens=n), capacity=1500) for n in (1, 800))
        assert short.tensorrt_cache_bytes == long.tensorrt_cache_bytes
        assert long.tensorrt_cache_bytes < memory_plan(SEVEN_B, LOFI, "fp16").tensorrt_cache_bytes / 2
        with pytest.raises(UserError, match=r"1501 tokens were asked for, .* but the KV cache has room for 1500"):
            memory_plan(SEVEN_B, LOFI, "fp16", Work(new_tokens=889), capacity=1500)


def test_usual_work_fits_every_model() -> None:
    for context, text, new, images in ((4096, 36, 128, 1), (700, 36, 88, 1), (600, 24, 0, 1), (500, 36, 128, 0)):
        facts = dataclasses.replace(SEVEN_B, context=context)
        assert memory_plan(facts, LOFI, "fp16").work == Work(text, new, images)
        assert memory_plan(SEVEN_B, LOFI, "fp16", capacity=context).work == Work(text, new, images)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"text_tokens": 0}, "0 text tokens were asked for: give 1 or more"),
        ({"new_tokens": -1}, "-1 new tokens"),
        ({"images": -1}, "-1 images"),
        ({"batch": 0}, "0 batch"),
        ({"new_tokens": 4000}, "4612 tokens were asked for, 576 of them visual"),
        ({"images": 8}, "room for 4096"),
    ],
)
def test_work_that_cannot_be(values: dict[str, int], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        memory_plan(SEVEN_B, LOFI, "fp16", Work(**values))


def run(*arguments: str) -> str:
    result = CliRunner().invoke(command, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


class TestCommand:
    def test_json(self) -> None:
        found = json.loads(run("--model", "7b", "--stage", "2:64", "--new-tokens", "100", "--json"))
        plan = memory_plan(SEVEN_B, LOFI, "fp16", Work(new_tokens=100))
        assert found["precision"] == "fp16"
        assert found["kv_bytes"] == plan.caches
        assert found["kv_bytes_unpruned"] == 712 * MIB // 2
        assert sum(found["weights_bytes"].values()) == plan.weights_bytes
        assert found["peak_bytes"] == {"onnxruntime_cpu": plan.onnxruntime_cpu_bytes, "tensorrt": plan.tensorrt_bytes}
        assert [module["name"] for module in found["modules"]][-1] == "Orin Nano 8"

    def test_table(self) -> None:
        lines = [line.split() for line in run("--model", "13b", "--precision", "int4").splitlines()]
        assert lines[0][0] == THIRTEEN_B.name + ","
        assert ["decoder_0", "6.87", "GB"] in [line[:3] for line in lines]
        assert ["AGX", "Orin", "32", "29.4", "GB", "fits", "fits"] in lines
        assert ["Orin", "NX", "16", "14.2", "GB", "fits", "no"] in lines

    def test_demo_is_planned_from_its_config(self) -> None:
        found = json.loads(run("--precision", "fp16", "--json"))
        assert sum(found["weights_bytes"].values()) < sum(demo_tensors().values())
        assert all(module["run"] and module["build"] for module in found["modules"])

    def test_capacity(self) -> None:
        found = [json.loads(run("--model", "7b", *more, "--json")) for more in ((), ("--max-kv-cache-capacity", "800"))]
        assert [each["max_kv_capacity"] for each in found] == [4096, 800]
        assert found[1]["kv_bytes_tensorrt"] == (800 + 1) * MIB // 2
        difference = found[0]["peak_bytes"]["tensorrt"] - found[1]["peak_bytes"]["tensorrt"]
        assert difference == (4096 - 800) * MIB // 2

    def test_a_bundles_plan(self, tiny_bundle) -> None:
        path = str(tiny_bundle("uniform"))
        small = ("--text-tokens", "6", "--new-tokens", "4")
        own = json.loads(run("--model", path, *small, "--json"))
        other = json.loads(run("--model", path, *small, "--precision", "fp16", "--json"))
        assert (own["precision"], other["precision"]) == ("fp32", "fp16")
        assert own["plan"] == other["plan"]
        constants = 4096  # bytes of scalars, shapes and rotary frequencies, which are no weights
        assert 0 <= sum(own["weights_bytes"].values()) - 2 * sum(other["weights_bytes"].values()) < constants
        assert names.select(0) in own["weights_bytes"]

    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            (["--model", "nowhere"], "--model nowhere is neither"),
            (["--model", "7b", "--stage", "40:64"], "layer 40"),
            (["--model", "7b", "--batch", "0"], "0 batch"),
            (["--model", "7b", "--text-tokens", "4096"], "room for 4096"),
            (["--model", "7b", "--max-kv-cache-capacity", "5000"], "longer than the model's context of 4096"),
            (["--model", "7b", "--max-kv-cache-capacity", "700"], "KV cache has room for 700"),
        ],
    )
    def test_mistakes_are_named(self, arguments: list[str], sentence: str) -> None:
        with pytest.raises(UserError, match=sentence):
            command.main(arguments, standalone_mode=False)


def test_documented() -> None:
    """What docs/jetson.md says in numbers."""
    page = (Path(__file__).resolve().parent.parent / "docs" / "jetson.md").read_text(encoding="utf-8")
    plan = memory_plan(SEVEN_B, LOFI, "fp16")
    assert f"{plan.tensorrt_bytes / 1e9:.1f} GB" in page
    assert f"{plan.build_bytes / 1e9:.1f} GB" in page
