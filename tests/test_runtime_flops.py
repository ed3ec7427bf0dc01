"""FLOPs: against lists of matrix products written out by hand, and against published figures."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from tokprune.runtime import flops, leverage, names
from tokprune.runtime.bundle import open_bundle
from tokprune.runtime.cli.flops import command
from tokprune.runtime.errors import UserError
from tokprune.runtime.manifest import (
    SCHEMA,
    FlopsTerm,
    Limits,
    Manifest,
    ModelFacts,
    PromptFormat,
    SegmentFacts,
    TensorFacts,
    VisionFacts,
)
from tokprune.runtime.plan import Plan, Rank, Stage

# every size another number, grouped keys, heads·head_dim ≠ hidden: a swapped factor cannot hide
TINY = ModelFacts(
    name="tiny",
    layers=5,
    hidden=48,
    intermediate=112,
    heads=6,
    kv_heads=2,
    head_dim=10,
    vocabulary=101,
    context=64,
    vision=VisionFacts(image_size=28, patch_size=7, layers=3, hidden=24, intermediate=56, heads=4),
    image_token_id=99,
    bos_token_id=1,
    eos_token_ids=(2,),
)
TWO_STAGES = Plan("lofi", (Stage(1, 9), Stage(3, 4)), Rank(components=2))


def products(*shapes: tuple[int, int, int]) -> int:
    """FLOPs of matrix products [a, b] @ [b, c]."""
    return sum(2 * a * b * c for a, b, c in shapes)


def layer_products(rows: int, past: int) -> int:
    projections = products((rows, 48, 60), (rows, 48, 20), (rows, 48, 20), (rows, 60, 48))
    attention = 6 * products((rows, 10, past + rows), (rows, past + rows, 10))
    return projections + attention + products((rows, 48, 112), (rows, 48, 112), (rows, 112, 48))


class TestClosedForm:
    @pytest.mark.parametrize(("rows", "past"), [(1, 0), (7, 0), (1, 23), (5, 11)])
    def test_decoder_layer(self, rows: int, past: int) -> None:
        assert flops.decoder_layer_flops(TINY, rows, past) == layer_products(rows, past)

    def test_head_counts_only_in_the_segment_with_the_last_layer(self) -> None:
        assert flops.decoder_flops(TINY, 1, 3, 7, 2, 4) == 2 * layer_products(7, 2)
        assert flops.decoder_flops(TINY, 3, 5, 7, 2, 4) == 2 * layer_products(7, 2) + products((4, 48, 101))

    def test_vision_encoder(self) -> None:
        layer = products(*[(17, 24, 24)] * 4, (17, 24, 56), (17, 56, 24))
        layer += 4 * products((17, 6, 17), (17, 17, 6))
        image = products((16, 3 * 7 * 7, 24), (16, 24, 48), (16, 48, 48)) + 3 * layer
        assert flops.vision_encoder_flops(TINY) == image
        assert flops.vision_encoder_flops(TINY, images=3) == 3 * image

    def test_prefill_shrinks_behind_each_stage(self) -> None:
        counts = flops.closed_form(TINY, TWO_STAGES).prefill(text_tokens=6)
        assert counts == {
            "vision_encoder": flops.vision_encoder_flops(TINY),
            "embed_tokens": 0,
            "decoder_0": layer_products(6 + 16, 0),
            "select_0": leverage.flops(16, 48, 2),
            "decoder_1": 2 * layer_products(6 + 9, 0),
            "select_1": leverage.flops(9, 48, 2),
            "decoder_2": 2 * layer_products(6 + 4, 0) + products((1, 48, 101)),
        }
        assert list(counts) == [
            "vision_encoder", "embed_tokens", "decoder_0", "select_0", "decoder_1", "select_1", "decoder_2"
        ]  # fmt: skip

    def test_decode_reads_each_decoders_own_cache(self) -> None:
        counter = flops.closed_form(TINY, TWO_STAGES)
        head = products((1, 48, 101))
        pruned = layer_products(1, 25) + 2 * layer_products(1, 18) + 2 * layer_products(1, 13) + head
        assert counter.decode(text_tokens=6, generated=3) == pruned
        assert counter.unpruned_decode(text_tokens=6, generated=3) == 5 * layer_products(1, 25) + head

    def test_unpruned_is_the_model_without_a_plan(self) -> None:
        pruned, plain = (flops.closed_form(TINY, plan) for plan in (TWO_STAGES, Plan("none")))
        assert sum(pruned.unpruned_prefill(6).values()) == sum(plain.prefill(6).values())
        assert pruned.unpruned_decode(6) == plain.decode(6)

    def test_images(self) -> None:
        counter = flops.closed_form(TINY, TWO_STAGES)
        assert counter.rows(6, images=2) == [38, 24, 14]
        assert counter.prefill(6, images=2)["select_1"] == 2 * leverage.flops(9, 48, 2)
        text_only = counter.prefill(6, images=0)
        assert list(text_only) == ["embed_tokens", "decoder_0", "decoder_1", "decoder_2"]
        assert text_only["decoder_1"] == 2 * layer_products(6, 0)

    def test_stage_at_layer_0_has_no_decoder_0(self) -> None:
        counts = flops.closed_form(TINY, Plan("uniform", (Stage(0, 4),))).prefill(6)
        assert list(counts) == ["vision_encoder", "embed_tokens", "select_0", "decoder_1"]
        assert counts["select_0"] == 0  # no product is needed for an even grid
        assert counts["decoder_1"] == 5 * layer_products(10, 0) + products((1, 48, 101))

    def test_fastv_adds_a_row_to_the_decoders_in_front_of_a_stage(self) -> None:
        counter = flops.closed_form(TINY, Plan("fastv", (Stage(1, 9), Stage(3, 4))))
        head = products((1, 48, 101))
        counts = counter.prefill(text_tokens=6)
        assert counts["decoder_0"] == layer_products(22, 0) + 6 * products((1, 10, 22))
        assert counts["decoder_1"] == 2 * layer_products(15, 0) + 6 * products((1, 10, 15))
        assert counts["decoder_2"] == 2 * layer_products(10, 0) + head
        step = layer_products(1, 25) + 2 * layer_products(1, 18) + 2 * layer_products(1, 13) + head
        assert counter.decode(text_tokens=6, generated=3) == step + 6 * products((1, 10, 26), (1, 10, 19))


def manifest() -> Manifest:
    """A bundle whose graphs were counted: terms with each axis, in numbers that are easy to add up."""

    def segment(name: str, *terms: tuple[int, dict[str, int]]) -> SegmentFacts:
        tensor = TensorFacts("x", (1,), "float32")
        counted = tuple(FlopsTerm(coefficient, powers) for coefficient, powers in terms)
        return SegmentFacts(name, f"{name}.onnx", None, (tensor,), (tensor,), counted)

    decoder = (10, {names.SEQUENCE: 1}), (1, {names.SEQUENCE: 2}), (1, {names.SEQUENCE: 1, names.PAST: 1})
    return Manifest(
        schema=SCHEMA,
        tools={},
        source={},
        model=TINY,
        plan=Plan("lofi", (Stage(2, 4),), Rank(components=2)),
        precision="fp32",
        base="fp32",
        prompt=PromptFormat("", "{text}", ""),
        limits=Limits(1, 64, 64),
        segments=(
            segment("vision_encoder", (5, {names.IMAGES: 1})),
            segment("embed_tokens"),
            segment("decoder_0", *decoder),
            segment("select_0", (7, {names.IMAGES: 1}), (1, {names.ROWS: 1})),
            segment("decoder_1", *decoder, (3, {names.LOGITS_COUNT: 1})),
        ),
        files=(),
        memory=(),
    )


class TestManifest:
    def test_counts_come_from_the_graphs(self) -> None:
        counter = flops.from_manifest(manifest())
        assert counter.prefill(6) == {
            "vision_encoder": 5,
            "embed_tokens": 0,
            "decoder_0": 10 * 22 + 22**2,
            "select_0": 7 + 10,
            "decoder_1": 10 * 10 + 10**2 + 3,
        }
        assert counter.decode(6, generated=1) == (10 + 1 + 23) + (10 + 1 + 11 + 3)
        assert sum(counter.unpruned_prefill(6).values()) == 5 + 2 * (10 * 22 + 22**2) + 3


class TestLiterature:
    """To the printed digit, n being 612 tokens: 576 visual and 36 of text."""

    @pytest.mark.parametrize(
        ("facts", "full_layers", "removed", "published"),
        [
            (flops.SEVEN_B, 32, 0.0, "99.3"),
            (flops.THIRTEEN_B, 40, 0.0, "154.6"),
            (flops.THIRTEEN_B, 2, 0.90, "29.7"),
            (flops.THIRTEEN_B, 2, 0.75, "50.2"),
            (flops.THIRTEEN_B, 2, 0.50, "84.6"),
        ],
    )
    def test_fastv(self, facts: ModelFacts, full_layers: int, removed: float, published: str) -> None:
        spans = [(full_layers, 576.0), (facts.layers - full_layers, 576 * (1 - removed))]
        assert f"{flops.fastv_gflops_per_layer(facts, spans, 36):.1f}" == published

    def test_fastv_needs_n_612_and_no_rounding_of_tokens(self) -> None:
        def printed(text_tokens: int, kept: float) -> str:
            spans = [(2, 576.0), (38, kept)]
            return f"{flops.fastv_gflops_per_layer(flops.THIRTEEN_B, spans, text_tokens):.1f}"

        assert [printed(text, 57.6) for text in (35, 36, 37)] == ["29.5", "29.7", "30.0"]
        assert [printed(36, kept) for kept in (57, 58)] == ["29.6", "29.8"]

    @pytest.mark.parametrize(("tokens", "published"), [(576, "3.82"), (192, "1.25")])
    def test_pyramid(self, tokens: int, published: str) -> None:
        assert f"{flops.pyramid_tmacs(flops.SEVEN_B, [(32, tokens)]):.2f}" == published

    def test_spans_of_a_plan(self) -> None:
        assert flops.visual_spans(TINY, TWO_STAGES) == [(1, 16), (2, 9), (2, 4)]
        assert flops.visual_spans(TINY, Plan("uniform", (Stage(0, 4),))) == [(5, 4)]


def run_json(*arguments: str) -> dict:
    result = CliRunner().invoke(command, [*arguments, "--json"], catch_exceptions=False)
    assert result.exit_code == 0
    return json.loads(result.stdout)


class TestCommand:
    def test_json(self) -> None:
        found = run_json("--model", "7b", "--stage", "2:192", "--stage", "16:64")
        documented = {
            "text_tokens", "visual_tokens", "prefill_tflops", "prefill_tflops_unpruned", "reduction", "segments",
            "segments_unpruned", "form_a_gflops_per_layer", "form_b_tmacs",
        }  # fmt: skip
        assert documented <= set(found)
        assert (found["text_tokens"], found["visual_tokens"]) == (36, 576)
        assert found["prefill_tflops"] == pytest.approx(sum(found["segments"].values()), rel=1e-12)
        assert found["prefill_tflops_unpruned"] == pytest.approx(sum(found["segments_unpruned"].values()), rel=1e-12)
        assert {name for name in found["segments"] if "select" not in name} == set(found["segments_unpruned"])
        rate = found["prefill_tflops"] / found["prefill_tflops_unpruned"]
        assert found["reduction"] == pytest.approx(1 - rate, rel=1e-12)
        # the tower is no part of what a decoder's pruning can save
        tower = found["segments"]["vision_encoder"]
        rate = (found["prefill_tflops"] - tower) / (found["prefill_tflops_unpruned"] - tower)
        assert found["decoder_reduction"] == pytest.approx(1 - rate, rel=1e-12)
        assert found["segments"]["select_0"] == leverage.flops(576, 4096, 8) / 1e12
        assert found["selectors"] == "in closed form"

    def test_without_a_stage_nothing_is_saved(self) -> None:
        found = run_json("--model", "7b")
        assert found["reduction"] == 0
        assert round(found["form_a_gflops_per_layer"], 1) == 99.3
        assert round(found["form_b_tmacs"], 2) == 3.82

    def test_layer_and_keep_are_one_stage(self) -> None:
        assert run_json("--layer", "2", "--keep", "0.25") == run_json("--stage", "2:144")

    def test_rank(self) -> None:
        def selector(*rank: str) -> float:
            return run_json("--model", "7b", "--stage", "2:64", *rank)["segments"]["select_0"]

        assert selector() == selector("--rank", "8") < selector("--rank", "16") < selector("--rank", "0.9")

    def test_demo_counts_the_shipped_config(self) -> None:
        found = run_json("--model", "demo", "--method", "uniform", "--stage", "2:64")
        assert found["segments"]["select_0"] == 0
        assert found["visual_tokens"] == 576

    def test_fastv_costs_one_row_more_than_an_even_grid(self) -> None:
        found, grid = (run_json("--model", "7b", "--method", m, "--stage", "2:64") for m in ("fastv", "uniform"))
        more = found["prefill_tflops"] - grid["prefill_tflops"]
        assert more * 1e12 == pytest.approx(2 * 4096 * 612, rel=1e-3)  # a difference of two rounded sums
        assert found["segments"]["select_0"] == 0

    def test_lvpruning_alone_saves_what_its_paper_says(self) -> None:
        found = run_json("--model", "7b", "--method", "lvpruning")
        assert found["text_tokens"] == 36
        assert found["reduction"] == pytest.approx(0.621, abs=0.005)  # arXiv 2501.13652
        assert found["stages"] == [{"layer": layer, "kept": kept} for layer, kept in ((1, 346), (8, 230), (16, 58))]

    def test_a_method_alone_has_its_default_stages(self) -> None:
        assert run_json("--model", "7b", "--method", "uniform") == run_json(
            "--model", "7b", "--method", "uniform", "--stage", "2:64"
        )

    def test_bundle_brings_its_plan(self, tiny_bundle) -> None:
        path = tiny_bundle("uniform")
        found = run_json("--model", str(path), "--text-tokens", "6")
        (stage,) = open_bundle(path).manifest.plan.stages
        assert found["stages"] == [{"layer": stage.layer, "kept": stage.keep}]
        assert found["selectors"] == "counted from the graph"
        other = run_json("--model", str(path), "--text-tokens", "6", "--stage", "1:3")
        assert other["stages"] == [{"layer": 1, "kept": 3}]
        assert other["prefill_tflops_unpruned"] == found["prefill_tflops_unpruned"]

    def test_table(self) -> None:
        result = CliRunner().invoke(command, ["--model", "7b", "--layer", "2", "--keep", "64"])
        lines = [line.split() for line in result.stdout.splitlines()]
        assert ["select_0", "1.29", "GFLOP", "0.1", "%"] in lines
        assert ["prefill,", "unpruned", "8.51", "TFLOP"] in lines

    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            (["--model", "nowhere"], "--model nowhere is neither"),
            (["--model", "7b", "--stage", "2"], "--stage 2 does not have the form L:K"),
            (["--model", "7b", "--stage", "32:64"], "layer 32 was asked for, but the decoder has 32 layers"),
            (["--model", "7b", "--stage", "2:577"], "asks to keep 577 of 576"),
            (["--model", "7b", "--layer", "2"], "--layer and --keep name one stage together"),
            (["--model", "7b", "--layer", "2", "--keep", "9", "--stage", "3:4"], "--stage was given beside"),
            (["--model", "7b", "--rank", "4"], "--rank 4 was given without a stage"),
            (["--model", "7b", "--stage", "2:9", "--method", "uniform", "--rank", "4"], "belongs to lofi only"),
            (["--model", "7b", "--text-tokens", "0"], "choose 1 to 3520"),
            (["--model", "7b", "--text-tokens", "3521"], "room for 4096 tokens"),
        ],
    )
    def test_mistakes_are_named(self, arguments: list[str], sentence: str) -> None:
        with pytest.raises(UserError, match=sentence):
            command.main(arguments, standalone_mode=False)

    @pytest.mark.parametrize(
        ("text", "sentence"),
        [("{", "config.json is not valid JSON"), ("[]", "holds no JSON object"), ('{"model_type": "opt"}', "'opt'")],
    )
    def test_bad_config(self, tmp_path, text: str, sentence: str) -> None:
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=sentence):
            command.main(["--model", str(tmp_path)], standalone_mode=False)

    def test_exit_code_and_one_sentence(self) -> None:
        call = [sys.executable, "-c", "from tokprune.runtime.cli import main; main()", "flops", "--model", "nowhere"]
        done = subprocess.run(call, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2
        assert done.stdout == ""
        assert done.stderr.startswith("Error: --model nowhere is neither")
        assert done.stderr.count("\n") == 1

    def test_no_heavy_import(self) -> None:
        code = (
            "import sys\n"
            "from tokprune.runtime.cli.flops import command\n"
            "command.main(['--model', 'demo'], standalone_mode=False)\n"
            "heavy = {'torch', 'transformers', 'onnx', 'scipy', 'tokprune.export', 'tokprune.plugins'}\n"
            "print(sorted(heavy & set(sys.modules)), file=sys.stderr)\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
        assert done.stderr == "[]\n"

    def test_presets_differ_only_in_size(self) -> None:
        grown = dataclasses.replace(
            flops.SEVEN_B, name="LLaVA-1.5-13B", layers=40, hidden=5120, intermediate=13824, heads=40, kv_heads=40
        )
        assert grown == flops.THIRTEEN_B
