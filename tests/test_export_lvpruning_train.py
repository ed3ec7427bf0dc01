"""Training on the tiny checkpoint: what a decision does, what is learned, what is left alone, how it is resumed."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tokprune.export.checkpoint import find_checkpoint, load_model, load_processor
from tokprune.export.lvpruning import base as base_module
from tokprune.export.lvpruning import train as train_module
from tokprune.export.lvpruning.base import Base, ImageFeatures
from tokprune.export.lvpruning.batch import Encoder, TokenSequence, collate
from tokprune.export.lvpruning.data import read_examples
from tokprune.export.lvpruning.module import KEEP, SelectorModule
from tokprune.export.lvpruning.modules import load_modules
from tokprune.export.lvpruning.state import state_path
from tokprune.export.lvpruning.train import Batches, Settings, choose_device, gumbel_decisions, rate_at, train
from tokprune.runtime.errors import UserError
from tokprune.runtime.plan import Module, make_plan

SIZES = Module(width=16, heads=2, intermediate=32)
LAYERS = [1, 2]
CPU, FP32 = torch.device("cpu"), torch.float32


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint):
    return find_checkpoint(str(tiny_checkpoint))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    lines = []
    for index in range(7):
        Image.fromarray(random.integers(0, 256, (60, 70, 3), dtype=np.uint8)).save(folder / f"{index}.png")
        for color in ("red", "blue"):
            row = {"image": f"{index}.png", "prompt": f"What digit is {color}?", "answer": str(index)}
            lines.append(json.dumps(row))
    (folder / "data.jsonl").write_text("\n".join(lines))
    return read_examples(folder / "data.jsonl")


@pytest.fixture(scope="module")
def processor(checkpoint):
    return load_processor(checkpoint)


@pytest.fixture
def base(checkpoint, processor):
    return Base(load_model(checkpoint, dtype=FP32), processor, checkpoint.facts, LAYERS)


@pytest.fixture
def modules(checkpoint):
    made = [SelectorModule(checkpoint.facts.hidden, SIZES) for _ in LAYERS]
    random = torch.Generator().manual_seed(0)
    for module in made:
        module.initialise(random)
    return nn.ModuleList(made)


def plan_for(checkpoint, stages=((1, 8), (2, 4))):
    facts = checkpoint.facts
    return make_plan("lvpruning", stages, layers=facts.layers, visual_tokens=facts.vision.tokens, module=SIZES)


def batch_of(checkpoint, sequences):
    return collate(sequences, checkpoint.facts.image_token_id, checkpoint.facts.vision.tokens)


def sequences_of(checkpoint, data, *indices):
    encoder = Encoder(checkpoint)
    return [encoder(data.examples[index]) for index in indices]


# what a decision does


def fixed(decisions):
    return lambda stage, logits: decisions[stage]


def without(model, ids, features, kept):
    """Logits [S', V] and their rows when visual rows are removed for good before layers 1 and 2, positions kept."""
    language = model.model.language_model
    ids = torch.tensor(ids)
    hidden = language.embed_tokens(ids)[None]
    hidden[0, ids == 3] = features
    rows, visual = torch.arange(len(ids)), (ids == 3).nonzero()[:, 0]
    for number, layer in enumerate(language.layers):
        if number in LAYERS:
            dropped = visual[kept[LAYERS.index(number)] == 0]
            stays = ~torch.isin(rows, dropped)
            hidden, rows = hidden[:, stays], rows[stays]
        hidden = layer(hidden, position_embeddings=language.rotary_emb(hidden, rows[None]), attention_mask=None)
    return model.lm_head(language.norm(hidden))[0], rows


@torch.no_grad()
def test_a_dropped_row_is_as_good_as_removed(checkpoint, data, base, modules, processor):
    """Fixed decisions in a padded batch against physical removal, sequence by sequence, with transformers' sdpa."""
    sequences = sequences_of(checkpoint, data, 0, 5)
    sequences[1] = replace(sequences[1], ids=[*sequences[1].ids, 9, 9, 9])  # lengths differ, and with them padding
    random = torch.Generator().manual_seed(3)
    first, second = ((torch.rand(2, 16, generator=random) < share).float() for share in (0.6, 0.5))
    outcome = base(batch := batch_of(checkpoint, sequences), modules, fixed([first, second]))
    assert torch.equal(outcome.kept[1], first * second)  # dropped stays dropped
    model = load_model(checkpoint, dtype=FP32)
    features = ImageFeatures(model, processor, checkpoint.facts)
    size = batch.ids.shape[1]
    for index, sequence in enumerate(sequences):
        logits, rows = without(
            model, sequence.ids, features(sequence.images[0]), [kept[index] for kept in outcome.kept]
        )
        own = batch.predicting // size == index
        at = torch.searchsorted(rows, batch.predicting[own] - index * size)
        # logits reach 10
        torch.testing.assert_close(outcome.logits[own], logits[at], atol=1e-4, rtol=0)
        untouched, _ = without(model, sequence.ids, features(sequence.images[0]), torch.ones(2, 16))
        assert (untouched[batch.predicting[own] - index * size] - outcome.logits[own]).abs().max() > 0.1


def seen_logits(base, modules, batch):
    """Every stage's logits while all is kept."""
    seen = []

    def decide(stage, logits):
        seen.append(logits.detach())
        return torch.ones(logits.shape[:2])

    return base(batch, modules, decide), seen


def test_modules_do_not_see_the_answer(checkpoint, data, base, modules):
    """An answer that leaked would tell the module what to keep. Neither its tokens nor its length matter."""
    (sequence,) = sequences_of(checkpoint, data, 0)
    other = replace(sequence, ids=[*sequence.ids[: sequence.prompt], 50, 60, 70, 80, 90])
    _, seen = seen_logits(base, modules, batch_of(checkpoint, [sequence]))
    _, changed = seen_logits(base, modules, batch_of(checkpoint, [other]))
    for a, b in zip(seen, changed, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)  # another length, another order of summing
    asked = replace(sequence, ids=[*sequence.ids[: sequence.prompt - 3], 77, *sequence.ids[sequence.prompt - 2 :]])
    _, moved = seen_logits(base, modules, batch_of(checkpoint, [asked]))
    assert (moved[1] - seen[1]).abs().max() > 1e-3  # a word of the question does matter


def test_padding_and_company_change_nothing(checkpoint, data, base, modules):
    sequences = sequences_of(checkpoint, data, 0, 3)
    long = replace(sequences[1], ids=[*sequences[1].ids, *[11] * 9])
    together, seen = seen_logits(base, modules, batch_of(checkpoint, [sequences[0], long]))
    alone, expected = seen_logits(base, modules, batch_of(checkpoint, sequences[:1]))
    torch.testing.assert_close(together.logits[: len(alone.logits)], alone.logits, atol=5e-5, rtol=0)
    for a, b in zip(seen, expected, strict=True):
        torch.testing.assert_close(a[:1], b, atol=5e-5, rtol=0)  # FP32 sums of values around 10


@pytest.mark.parametrize("layout", ["image first", "text first", "two images", "text between"])
def test_layouts(checkpoint, data, base, modules, layout):
    """Wherever images stand, their rows and no others are decided on, and every module gets a gradient."""
    images = tuple(dict.fromkeys(example.images[0] for example in data.examples))[:2]
    picture, text, answer = [3] * 16, [20, 21, 22, 23], [30, 1]
    ids = {
        "image first": [0, *picture, *text],
        "text first": [0, *text, *picture],
        "two images": [0, *picture, *picture, *text],
        "text between": [0, *picture, *text, *picture, *text],
    }[layout]
    count = ids.count(3) // 16
    batch = batch_of(
        checkpoint,
        [
            TokenSequence(ids + answer, len(ids), images[:count]),
            TokenSequence([0, *picture, 9, *answer], 18, images[:1]),
        ],
    )
    seen = []

    def decide(stage, logits):
        seen.append(logits)
        return gumbel_decisions(0, 0, 0)(stage, logits)

    outcome = base(batch, modules, decide)
    assert [tuple(logits.shape) for logits in seen] == [(count + 1, 16, 2)] * 2
    loss = nn.functional.cross_entropy(outcome.logits, batch.targets)
    assert torch.isfinite(loss)
    loss.backward()
    for parameter in modules.parameters():
        assert torch.isfinite(parameter.grad).all()
    assert all(module.visual_proj.weight.grad.abs().max() > 0 for module in modules)
    visual = batch.ids.flatten() == 3
    dropped, columns = base._decided(batch, torch.zeros(count + 1, 16))
    assert torch.equal(dropped.flatten(), visual)
    assert torch.equal(columns.flatten() < -20, visual)


def test_checkpointing_gives_the_same_gradients(checkpoint, data, processor, modules):
    batch = batch_of(checkpoint, sequences_of(checkpoint, data, 0, 1))
    found = []
    for checkpointing in (False, True):
        model = load_model(checkpoint, dtype=FP32)
        base = Base(model, processor, checkpoint.facts, LAYERS, checkpointing=checkpointing)
        modules.zero_grad()
        base(batch, modules, gumbel_decisions(0, 0, 0)).logits.square().sum().backward()
        found.append([p.grad.clone() for p in modules.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_decisions_are_hard_with_a_soft_gradient():
    logits = torch.tensor([[[0.3, -0.2]] * 4000], requires_grad=True)
    decisions = gumbel_decisions(5, 6, 7)(1, logits)
    assert set(decisions.detach().round(decimals=6).unique().tolist()) == {0.0, 1.0}
    # P(keep) of a Gumbel sample is the softmax: σ(0.5) = 0.622; four standard errors of 4000 draws
    assert decisions.mean().item() == pytest.approx(0.622, abs=0.031)
    decisions.sum().backward()
    assert (logits.grad[..., KEEP] > 0).all()
    assert torch.equal(decisions, gumbel_decisions(5, 6, 7)(1, logits))
    for other in ((4, 6, 7), (5, 7, 7), (5, 6, 8)):
        assert not torch.equal(decisions, gumbel_decisions(*other)(1, logits))
    assert not torch.equal(decisions, gumbel_decisions(5, 6, 7)(0, logits))


# image features


def test_image_features_are_kept_within_bounds(checkpoint, data, processor, monkeypatch):
    model = load_model(checkpoint, dtype=FP32)
    monkeypatch.setattr(base_module, "FEATURE_BYTES", 2 * 16 * 64 * 4)
    features = ImageFeatures(model, processor, checkpoint.facts)
    paths = list(dict.fromkeys(example.images[0] for example in data.examples))[:3]
    expected = model.get_image_features(
        processor.image_processor(images=Image.open(paths[0]), return_tensors="pt")["pixel_values"]
    ).pooler_output[0]
    torch.testing.assert_close(features(paths[0]), expected, atol=1e-5, rtol=0)  # sums of values around 1, batched
    first = features(paths[0])
    second = features(paths[1])
    assert features(paths[0]) is first
    features(paths[2])  # the second is the least recently used now
    assert features(paths[0]) is first
    assert features(paths[1]) is not second


# training


def run(checkpoint, data, out, settings, *, dtype=FP32, **options):
    reports = []
    plan = options.pop("plan", None) or plan_for(checkpoint)
    options.setdefault("report", reports.append)
    modules = train(checkpoint, plan, data, settings, out, device=CPU, dtype=dtype, **options)
    return modules, reports


@pytest.fixture
def few_recent(monkeypatch):
    monkeypatch.setattr(train_module, "RECENT", 20)


@pytest.mark.usefixtures("few_recent")
def test_reaches_the_target_and_leaves_the_base_alone(checkpoint, data, tmp_path, monkeypatch):
    loaded = []

    def load(*args, **kwargs):
        loaded.append(load_model(*args, **kwargs))
        return loaded[-1]

    monkeypatch.setattr(train_module, "load_model", load)
    # a model of random weights has large language-model losses; the weight of the shares has to match them
    settings = Settings(steps=80, batch_size=4, learning_rate=3e-3, ratio_weight=20)
    modules, reports = run(checkpoint, data, tmp_path / "m", settings)
    assert reports[0].kept[0] > 0.75  # keeps most at first
    assert reports[-1].loss < 0.7 * reports[0].loss
    # 20 steps of 4 images of 16 rows: a standard error of 0.014; other seeds end within 0.05
    assert modules.training["final"]["kept"] == pytest.approx([8 / 16, 4 / 16], abs=0.07)
    assert [report.step for report in reports] == list(range(1, 81))
    before, after = load_model(checkpoint, dtype=FP32).state_dict(), loaded[0].state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.grad is None for parameter in loaded[0].parameters())
    assert not state_path(tmp_path / "m").exists()
    stored = load_modules(tmp_path / "m")
    assert stored.stages == plan_for(checkpoint).stages
    assert all(np.array_equal(stored.weights[name], modules.weights[name]) for name in modules.weights)


@pytest.mark.usefixtures("few_recent")
def test_learns_to_keep_what_answers_need(checkpoint, data, tmp_path):
    """Without a target, the gradient through hard decisions alone lowers the language model's loss."""
    settings = Settings(steps=100, batch_size=4, learning_rate=3e-3, ratio_weight=1e-6)
    _, reports = run(checkpoint, data, tmp_path / "m", settings)
    # measured: by 0.42 and 0.46 with two seeds; decisions at random stay within 0.1
    assert reports[-1].lm < reports[19].lm - 0.25


class Stop(Exception):
    pass


def stop_at(step):
    def report(now):
        if now.step == step:
            raise Stop

    return report


def test_resumed_training_ends_in_the_same_bits(checkpoint, data, tmp_path):
    """Six steps at once, and three, stop, three: over an epoch's end (14 examples), with accumulation."""
    settings = Settings(steps=6, batch_size=2, accumulate=2)
    whole, _ = run(checkpoint, data, tmp_path / "whole", settings, save_seconds=0)
    with pytest.raises(Stop):
        run(checkpoint, data, tmp_path / "parts", settings, save_seconds=0, report=stop_at(3))
    assert not (tmp_path / "parts").exists()
    parts, reports = run(checkpoint, data, tmp_path / "parts", settings, save_seconds=0)
    assert [report.step for report in reports] == [4, 5, 6]
    one, other = (tmp_path / name / "modules.safetensors" for name in ("whole", "parts"))
    assert one.read_bytes() == other.read_bytes()
    assert whole.training["final"] == parts.training["final"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts", "whole"]


@pytest.fixture
def stopped(checkpoint, data, tmp_path):
    settings = Settings(steps=4, batch_size=2)
    with pytest.raises(Stop):
        run(checkpoint, data, tmp_path / "m", settings, save_seconds=0, report=stop_at(2))
    return settings


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 1}, ["seed 0", "1 was asked for"]),
        ({"steps": 5}, ["steps 4", "5 was asked for"]),
        ({"learning_rate": 0.5}, ["learning_rate", "0.5"]),
    ],
)
def test_other_settings_do_not_resume(checkpoint, data, tmp_path, stopped, change, words):
    with pytest.raises(UserError) as error:
        run(checkpoint, data, tmp_path / "m", replace(stopped, **change))
    for word in ("--restart", *words):
        assert word in str(error.value)


def test_other_data_or_stages_do_not_resume(checkpoint, data, tmp_path, stopped):
    with pytest.raises(UserError, match="data_sha256"):
        run(checkpoint, replace(data, sha256="0" * 64), tmp_path / "m", stopped)
    with pytest.raises(UserError, match="stages"):
        run(checkpoint, data, tmp_path / "m", stopped, plan=plan_for(checkpoint, ((1, 8), (2, 5))))


def test_restart(checkpoint, data, tmp_path, stopped):
    _, reports = run(checkpoint, data, tmp_path / "m", replace(stopped, seed=1), restart=True)
    assert [report.step for report in reports] == [1, 2, 3, 4]


def test_a_damaged_state_is_refused(checkpoint, data, tmp_path, stopped):
    path = state_path(tmp_path / "m")
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(UserError, match="--restart"):
        run(checkpoint, data, tmp_path / "m", stopped)


def test_modules_that_are_there_are_replaced_only_at_the_end(checkpoint, data, tmp_path):
    run(checkpoint, data, tmp_path / "m", Settings(steps=1, batch_size=1))
    before = (tmp_path / "m" / "modules.safetensors").read_bytes()
    settings = Settings(steps=2, batch_size=1, seed=1)
    with pytest.raises(Stop):
        run(checkpoint, data, tmp_path / "m", settings, report=stop_at(1))
    assert (tmp_path / "m" / "modules.safetensors").read_bytes() == before
    run(checkpoint, data, tmp_path / "m", settings)
    assert (tmp_path / "m" / "modules.safetensors").read_bytes() != before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_base(checkpoint, data, tmp_path, dtype):
    """The base in half precision, as on a GPU; with FP16 comes loss scaling, whose state is resumed too."""
    settings = Settings(steps=4, batch_size=2)
    modules, reports = run(checkpoint, data, tmp_path / "whole", settings, dtype=dtype)
    assert all(np.isfinite(weight).all() and weight.dtype == np.float32 for weight in modules.weights.values())
    assert np.isfinite([report.loss for report in reports]).all()
    with pytest.raises(Stop):
        run(checkpoint, data, tmp_path / "parts", settings, dtype=dtype, save_seconds=0, report=stop_at(2))
    parts, _ = run(checkpoint, data, tmp_path / "parts", settings, dtype=dtype)
    assert all(np.array_equal(parts.weights[name], modules.weights[name]) for name in modules.weights)
    full, _ = run(checkpoint, data, tmp_path / "full", settings)
    assert full.training["final"]["lm"] != modules.training["final"]["lm"]  # it was another base indeed


def test_a_training_that_diverges_is_told(checkpoint, data, tmp_path):
    with pytest.raises(UserError, match="--learning-rate"):
        run(checkpoint, data, tmp_path / "m", Settings(steps=20, batch_size=1, learning_rate=1e30))
    assert not (tmp_path / "m").exists()


def test_every_epoch_takes_every_example_once(checkpoint, data):
    settings = Settings(steps=1, batch_size=3, accumulate=2, seed=5)
    batches = Batches(Encoder(checkpoint), data, checkpoint, settings)
    first = [batches._index(place) for place in range(14)]
    second = [batches._index(place) for place in range(14, 28)]
    assert sorted(first) == sorted(second) == list(range(14))
    assert first != second
    assert [batches._index(place) for place in range(14)] == first  # whatever was asked before
    assert [len(batch.ids) for batch in batches(1)] == [3, 3]


def test_rates():
    settings = Settings(steps=100, learning_rate=2.0)
    rates = [rate_at(step, settings) for step in range(100)]
    assert rates[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    assert rates[5] == 2.0
    assert rates[-1] < 0.01
    assert rates[5:] == sorted(rates[5:], reverse=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_device_that_is_not_there():
    assert choose_device("auto") == (CPU, FP32)
    with pytest.raises(UserError, match="cuda"):
        choose_device("cuda")
