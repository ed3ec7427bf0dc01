"""Guidance: what the unpruned model's text attends to, against transformers' own attention; and training by it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_export_lvpruning_train import (  # noqa: F401 the fixtures are used by name
    LAYERS,
    Stop,
    base,
    batch_of,
    checkpoint,
    data,
    modules,
    processor,
    run,
    sequences_of,
    stop_at,
)

from tokprune.export.checkpoint import load_model
from tokprune.export.lvpruning.base import ImageFeatures, Recent
from tokprune.export.lvpruning.module import DROP, KEEP
from tokprune.export.lvpruning.train import Settings, guidance


def looked_at(model, features, sequence):
    """[stages, N] of one sequence, from the weights that transformers' eager attention returns."""
    model.set_attn_implementation("eager")
    language, ids = model.model.language_model, torch.tensor(sequence.ids)
    hidden = language.embed_tokens(ids)[None]
    hidden[0, ids == 3] = features
    weights = language(inputs_embeds=hidden, output_attentions=True, use_cache=False).attentions  # [1, H, S, S] a layer
    text = (ids[: sequence.prompt] != 3).nonzero()[:, 0]
    most = [layer[0][:, text].amax((0, 1))[ids == 3] for layer in weights]
    totals = [sum(most[first : first + 2]) for first in LAYERS]
    return torch.stack([total / total.sum() for total in totals])


@torch.no_grad()
def test_shares_are_those_of_transformers_attention(checkpoint, data, base, modules, processor):  # noqa: F811
    """In a padded batch; the last stage's second layer is not there: the model has three."""
    sequences = sequences_of(checkpoint, data, 0, 5)
    sequences[1] = replace(sequences[1], ids=[*sequences[1].ids, 9, 9, 9])
    scored, shares = base.guided(batch_of(checkpoint, sequences), modules)
    assert [tuple(logits.shape) for logits in scored] == [(2, 16, 2)] * 2
    model = load_model(checkpoint, dtype=torch.float32)
    features = ImageFeatures(model, processor, checkpoint.facts)
    for index, sequence in enumerate(sequences):
        expected = looked_at(model, features(sequence.images[0]), sequence)
        torch.testing.assert_close(shares[:, index], expected, atol=1e-6, rtol=1e-5)
    assert (shares[0] - shares[1]).abs().max() > 1e-3  # the stages differ, and
    assert (shares[:, 0] - shares[:, 1]).abs().max() > 1e-3  # the images


@torch.no_grad()
def test_modules_see_the_unpruned_states(checkpoint, data, base, modules):  # noqa: F811
    batch = batch_of(checkpoint, sequences_of(checkpoint, data, 0, 5))
    seen = []

    def keep_all(stage, logits):
        seen.append(logits)
        return torch.ones(logits.shape[:2])

    base(batch, modules, keep_all)
    scored, _ = base.guided(batch, modules)
    for logits, expected in zip(scored, seen, strict=True):
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_shares_are_sought_once(checkpoint, data, base, modules, monkeypatch):  # noqa: F811
    sequences = sequences_of(checkpoint, data, 0, 1, 5)  # the first two share an image
    _, shares = base.guided(batch_of(checkpoint, sequences), modules)
    assert (shares[:, 0] - shares[:, 1]).abs().max() > 1e-4  # the question matters
    monkeypatch.setattr("tokprune.export.lvpruning.attention._most", None)  # would fail if it were called
    longer = [replace(sequences[2], ids=[*sequences[2].ids, 9, 9]), sequences[1]]  # another order, another padding
    scored, again = base.guided(batch_of(checkpoint, longer), modules)
    assert torch.equal(again, shares[:, [2, 1]])
    assert [tuple(logits.shape) for logits in scored] == [(2, 16, 2)] * 2


@torch.no_grad()
def test_a_prompt_that_is_there_twice_is_kept_once(checkpoint, data, base, modules):  # noqa: F811
    _, shares = base.guided(batch_of(checkpoint, sequences_of(checkpoint, data, 3, 3)), modules)
    assert base._shares._bytes == shares[:, 0].nbytes
    assert sum(kept.untyped_storage().nbytes() for kept in base._shares._kept.values()) == base._shares._bytes


def test_guidance_is_a_divergence():
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 2, generator=random, requires_grad=True)
    shares = torch.rand(1, 3, 5, generator=random)
    shares /= shares.sum(2, keepdim=True)
    odds = (logits[..., KEEP] - logits[..., DROP]).detach().double().numpy()
    q = np.exp(odds) / np.exp(odds).sum(1, keepdims=True)
    p = shares[0].double().numpy()
    assert guidance([logits], shares).item() == pytest.approx((p * np.log(p / q)).sum(1).mean(), rel=1e-5)
    exact = torch.stack([shares[0].log() + 7, torch.full((3, 5), 2.0)], -1)  # any constant added
    assert guidance([exact], shares).item() == pytest.approx(0, abs=1e-6)
    assert guidance([logits, logits], shares.repeat(2, 1, 1)).item() == pytest.approx(
        2 * guidance([logits], shares).item()
    )
    certain = torch.eye(5)[None, :3]  # a share of 0 has no logarithm, and needs none
    assert guidance([logits], certain).isfinite()


def test_guided_steps_learn_what_is_looked_at(checkpoint, data, tmp_path):  # noqa: F811
    settings = Settings(steps=60, batch_size=4, learning_rate=5e-3, guided_steps=60)
    modules, reports = run(checkpoint, data, tmp_path / "m", settings)  # noqa: F811
    assert all(report.lm is None for report in reports)
    assert reports[-1].guidance < 0.5 * reports[0].guidance
    assert modules.training["final"].keys() == {"loss", "guidance", "kept"}
    assert modules.training["guided_steps"] == 60
    assert reports[-1].kept[0] < 0.8 < reports[0].kept[0]  # the target counts from the start


def test_guidance_stays_beside_the_answers(checkpoint, data, tmp_path):  # noqa: F811
    settings = Settings(steps=4, batch_size=2, guided_steps=2, guidance_weight=0.5, ratio_weight=1e-9)
    _, reports = run(checkpoint, data, tmp_path / "m", settings)
    assert [report.lm is None for report in reports] == [True, True, False, False]
    last = reports[-1]
    assert last.loss == pytest.approx(last.lm + 0.5 * last.guidance, rel=1e-5)
    _, reports = run(checkpoint, data, tmp_path / "n", replace(settings, guidance_weight=0.0))
    assert reports[-1].guidance is None


def test_resumed_between_its_two_parts(checkpoint, data, tmp_path):  # noqa: F811
    settings = Settings(steps=6, batch_size=2, accumulate=2, guided_steps=3, guidance_weight=0.5)
    run(checkpoint, data, tmp_path / "whole", settings, save_seconds=0)
    for step in (2, 4):
        with pytest.raises(Stop):
            run(checkpoint, data, tmp_path / "parts", settings, save_seconds=0, report=stop_at(step))
    run(checkpoint, data, tmp_path / "parts", settings, save_seconds=0)
    one, other = (tmp_path / name / "modules.safetensors" for name in ("whole", "parts"))
    assert one.read_bytes() == other.read_bytes()


def test_recent_forgets_the_least_recently_asked_for():
    kept = Recent(24)
    for key in "abc":
        kept.put(key, torch.full((2,), ord(key), dtype=torch.int32))  # 8 bytes
    assert kept.get("a") is not None
    kept.put("d", torch.zeros(2, dtype=torch.int32))
    assert [kept.get(key) is not None for key in "abcd"] == [True, False, True, True]
    kept.put("e", torch.zeros(100, dtype=torch.int32))  # larger than all
    assert [kept.get(key) is not None for key in "abcde"] == [False] * 4 + [True]
