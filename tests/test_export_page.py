"""The page of ``tokprune verify --html``, read by a parser: what it holds, what it must not, and where it goes."""

from __future__ import annotations

import base64
import dataclasses
import errno
import io
import itertools
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from pages import Page
from PIL import Image

from tokprune.export.checkpoint import find_checkpoint
from tokprune.export.page import document
from tokprune.export.page.document import PICTURES, SHOWN, render_page, write_page
from tokprune.export.verify import Outcome, verify
from tokprune.runtime import report
from tokprune.runtime.chat import Model, load
from tokprune.runtime.data import Sample
from tokprune.runtime.errors import UserError
from tokprune.runtime.verification import consistency_summary, gates

COMPARED = {
    "bundle": "some/bundle",
    "manifest_sha256": "ab" * 32,
    "reference": "the-original",
    "data": "questions.jsonl",
    "max_new_tokens": 3,
    "batch_size": 1,
    "layers": None,
    "versions": {"tokprune": "1.2.3", "torch": "4.5.6"},
    "finished": "2026-01-02T03:04:05+00:00",
}


class Verified(NamedTuple):
    """A verification; ``changed`` gives the same one with other samples and outcomes."""

    model: Model
    result: dict
    samples: list[Sample]
    outcomes: list[Outcome]

    def changed(self, samples: list[Sample], outcomes: list[Outcome], **limits: float) -> Verified:
        ipr = self.result["consistency"]["ipr"]
        consistency = consistency_summary([outcome.consistency for outcome in outcomes], ipr)
        held = gates(self.result["parity"], consistency, **limits)
        passed = all(gate["passed"] for gate in held)
        return Verified(
            self.model,
            {**self.result, "consistency": consistency, "gates": held, "passed": passed},
            samples,
            outcomes,
        )

    def page(self) -> Page:
        return Page(self.text())

    def text(self) -> str:
        return render_page(self.result, self.samples, self.outcomes, self.model)


def answered(outcome: Outcome, full: str, pruned: str, correct: str | None, kl: float = 0.5) -> Outcome:
    changes = {"full": full, "pruned": pruned, "reference": correct, "kl": [kl, kl]}
    return dataclasses.replace(outcome, consistency=dataclasses.replace(outcome.consistency, **changes))


@pytest.fixture(scope="module")
def verified(tiny_bundle, tiny_checkpoint, tmp_path_factory) -> Verified:
    """Two stages, samples with one image, two, and none; not one answer changed, by their texts."""
    folder = tmp_path_factory.mktemp("images")
    images = []
    for number in range(2):
        noise = np.random.default_rng(number).integers(0, 256, (60, 90, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
        images.append(folder / f"{number}.png")
    samples = [Sample("One?", (images[0],)), Sample("Two?", tuple(images)), Sample("None?")]
    model = load(tiny_bundle("lofi-2"))
    result, outcomes = verify(model, find_checkpoint(str(tiny_checkpoint)), samples, max_new_tokens=3)
    result |= {"compared": COMPARED, "remarks": ["no CUDA graph"]}
    return Verified(model, result, samples, []).changed(samples, [answered(o, "7", "7", "7") for o in outcomes])


@pytest.fixture(scope="module")
def flipped(verified) -> Verified:
    """A flip of each kind."""
    one, two, none = verified.samples
    first, second, third = verified.outcomes
    outcomes = [
        answered(first, "seven", "eight", "seven"),
        answered(second, "red", "green", "green"),
        answered(third, "up", "down", "left"),
        answered(first, "yes", "no", None),
    ]
    return verified.changed([one, two, none, one], outcomes, min_agreement=0.5, max_kl=9.0)


class TestPage:
    def test_its_structure(self, flipped):
        page = flipped.page()
        levels = [int(tag[1]) for tag, *_ in page.tags if re.fullmatch("h[1-6]", tag)]
        assert levels[0] == 1
        assert levels.count(1) == 1
        assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
        ids = [attrs["id"] for _, attrs, _ in page.tags if "id" in attrs]
        assert len(ids) == len(set(ids))
        wanted = [attrs["href"].removeprefix("#") for attrs, _ in page.all("a")]
        wanted += [attrs["aria-labelledby"] for _, attrs, _ in page.tags if "aria-labelledby" in attrs]
        assert set(wanted) <= set(ids)
        assert all(attrs.get("scope") in ("row", "col") for attrs, _ in page.all("th"))
        assert len(page.all("caption")) == len(page.all("table")) > 5
        assert all(attrs.get("aria-hidden") == "true" or attrs["role"] == "img" for attrs, _ in page.all("svg"))
        assert page.all("html")[0][0] == {"lang": "en"}

    def test_it_has_the_figures_of_the_result(self, flipped):
        page, result = flipped.page(), flipped.result
        cells = page.texts("td")
        for _, value in [*report.parity_rows(result["parity"]), *report.consistency_rows(result["consistency"])]:
            assert value in cells
        assert "[0.0, 49.0]" in cells  # Wilson's, of none in four
        for entry in result["consistency"]["ipr"]:
            assert {report.number(entry["full"]), report.number(entry["pruned"])} <= set(cells)
        assert len(result["consistency"]["ipr"]) == 3
        counts = result["flops"]
        for value in [*counts["segments"].values(), *counts["segments_unpruned"].values()]:
            assert report.flops(1e12 * value) in cells
        assert report.flops(1e12 * counts["prefill_tflops_unpruned"]) in cells
        for value in ("some/bundle", "ab" * 32, "the-original", "questions.jsonl", result["plan"], result["engine"]):
            assert value in cells
        assert "tokprune 1.2.3, torch 4.5.6" in cells
        assert "no CUDA graph" in page.texts("li")

    def test_the_gates(self, flipped):
        page = flipped.page()
        assert "Gates: 2 of 3 passed" in page.texts("caption")
        rows = [text for text in page.texts("tr") if text.endswith(("passed", "FAILED"))]
        assert rows == ["not_finite00✓ passed", "min_agreement0.50✗ FAILED", "max_kl90.5✓ passed"]
        assert page.texts("h1") == ["✗ FAILED bundle"]
        assert page.texts("title")[0].startswith("FAILED: bundle")

    def test_bars_are_in_proportion(self, flipped):
        counts = flipped.result["flops"]
        bars = [float(attrs["width"].rstrip("%")) for attrs, _ in flipped.page().all("rect") if "%" in attrs["width"]]
        pairs = [(counts["segments_unpruned"].get(name, 0.0), value) for name, value in counts["segments"].items()]
        expected = np.array(pairs).ravel()
        drawn = expected.reshape(-1, 2).any(axis=1).repeat(2)
        assert 4 < len(bars) < expected.size
        np.testing.assert_allclose(bars, 99 * expected[drawn] / expected.max(), atol=0.01)

    def test_the_chart_is_in_proportion(self, flipped):
        page = flipped.page()
        marks = [float(a["cy"].rstrip("%")) for a, _ in page.all("circle") if "%" in a["cy"]]
        full = [entry["full"] for entry in flipped.result["consistency"]["ipr"]]
        np.testing.assert_allclose([(88 - y) / 84 for y in marks], full, atol=2e-4)  # places have two digits
        stages = [attrs for attrs, _ in page.all("line") if attrs["class"] == "stage"]
        assert [attrs["x1"] for attrs in stages] == ["33.33%", "66.67%"]  # layers 1 and 2 of 3


class TestFlips:
    def test_each_kind_with_its_texts(self, flipped):
        page = flipped.page()
        assert [text for text in page.texts("h3") if ":" in text] == [
            "Correct → wrong: 1",
            "Wrong → correct: 1",
            "Wrong → another wrong one: 1",
            "Changed, no answer expected: 1",
        ]
        articles = page.texts("article")
        assert [text.split()[1] for text in articles] == ["1", "2", "3", "4"]
        for text, words in zip(
            articles, (("seven", "eight"), ("red", "green"), ("up", "down", "left"), ("yes", "no")), strict=True
        ):
            assert all(word in text for word in words)
            assert "0.5" in text  # KL
        assert "One?" in articles[0]
        assert "expected" not in articles[3]

    def test_pytorchs_answer_with_the_same_pruning_where_it_is_another(self, verified):
        outcomes = [dataclasses.replace(answered(verified.outcomes[0], "a", "b", None), reference="neither")]
        assert "pruned, in PyTorch" in verified.changed(verified.samples[:1], outcomes).text()
        outcomes[0].reference = "b"
        assert "pruned, in PyTorch" not in verified.changed(verified.samples[:1], outcomes).text()

    def test_the_pictures_are_those_of_the_kept_sets(self, flipped):
        pictures = flipped.page().all("img")
        assert len(pictures) == (1 + 2) * (1 + 2 + 1)  # the original and two stages, of one image, two, one
        first, second, *_ = flipped.outcomes
        for number, (outcome, order) in enumerate([(first, 0), (second, 0), (second, 1)]):
            original, *stages = pictures[3 * number : 3 * number + 3]
            assert "original" in original[0]["alt"]
            assert decoded(original[0]).size == (432, 288)
            for (attrs, _), kept in zip(stages, [item for item in outcome.kept if item.image == order], strict=True):
                self.is_of(kept, attrs)

    def is_of(self, kept, attrs):
        image = decoded(attrs)
        assert image.size == (288, 288) == (int(attrs["width"]), int(attrs["height"]))
        cells = np.asarray(image, dtype=int).reshape(4, 72, 4, 72, 3)[:, 8:-8, :, 8:-8]
        spread = np.ptp(cells, axis=-1).mean(axis=(1, 3)).ravel()  # noise is colourful, dropped patches are grey
        assert np.flatnonzero(spread > 30).tolist() == kept.indices.tolist()
        assert f"layer {kept.layer}: {kept.kept} of 16" in attrs["alt"]

    def test_none(self, verified):
        page = verified.page()
        assert "All 3 answers are the original's." in page.texts("p")
        assert page.all("img") == page.all("article") == []

    def test_no_image_at_all(self, verified, tiny_checkpoint):
        samples = [Sample("None?"), Sample("Nothing?")]
        result, outcomes = verify(verified.model, find_checkpoint(str(tiny_checkpoint)), samples, max_new_tokens=2)
        assert result["flops"] == {}
        bare = verified._replace(result=result | {"compared": COMPARED})
        page = bare.changed(samples, [answered(outcome, "a", "b", None) for outcome in outcomes]).page()
        assert len(page.all("article")) == 2
        assert page.all("img") == []
        assert any("No spectrum was taken" in text for text in page.texts("p"))

    def test_of_a_thousand_those_with_the_greatest_kl_are_shown(self, verified):
        base = verified.outcomes[0]
        outcomes = [answered(base, "a", f"b{n}", "a" if n % 2 else None, kl=(n * 7919) % 1000) for n in range(1000)]
        text = verified.changed([verified.samples[0]] * 1000, outcomes).text()
        page = Page(text)
        expected = {n + 1 for n in range(1000) if (n * 7919) % 1000 >= 1000 - SHOWN}
        assert {int(title.split()[1]) for title in page.texts("h4")} == expected
        assert any(
            f"The {SHOWN} with the greatest KL are shown, {1000 - SHOWN} are left out." in p for p in page.texts("p")
        )
        assert any(title.startswith("Correct → wrong: 500 (") for title in page.texts("h3"))
        assert len(text) < 10e6

    def test_values_that_are_not_finite_come_first(self, verified):
        base = verified.outcomes[0]
        outcomes = [answered(base, "a", "b", None, kl) for kl in (1.0, float("nan"), 2.0)]
        page = verified.changed([verified.samples[0]] * 3, outcomes).page()
        assert page.texts("h4") == ["Sample 2", "Sample 3", "Sample 1"]
        assert "not finite" in page.texts("article")[0]

    def test_more_pictures_than_a_page_holds(self, verified):
        many = Sample("Many?", verified.samples[0].images * (PICTURES // 3 + 1))
        base = verified.outcomes[0]
        outcomes = [answered(base, "a", "b", None, 2.0), answered(base, "c", "d", None, 1.0)]
        page = verified.changed([many, verified.samples[0]], outcomes).page()
        assert len(page.all("img")) == 3  # of the second sample
        assert sum("pictures are left out" in text for text in page.texts("article")) == 1

    def test_texts_longer_than_a_page_should_hold(self, verified):
        outcome = answered(verified.outcomes[2], "a", "b" * 100_000, None)
        text = verified.changed([Sample("p" * 5000)], [outcome]).text()
        assert "(98000 more characters)" in text
        assert "(3000 more characters)" in text


class TestParity:
    def test_samples_that_differ(self, verified):
        parity = dataclasses.replace(verified.outcomes[1].parity, first_divergence=1, max_abs_logit_diff=float("nan"))
        outcomes = list(verified.outcomes)
        outcomes[1] = dataclasses.replace(outcomes[1], parity=parity, reference="in <PyTorch>")
        (row,) = [
            text for text in verified.changed(verified.samples, outcomes).page().texts("tr") if "PyTorch>" in text
        ]
        assert "in <PyTorch>" in row
        assert "not finite" in row
        assert "engine and PyTorch differ" not in verified.text()


HOSTILE = '</bdi><script>alert(1)</script>"><img src=x onerror=1>\x00\x1b\ud800&amp;'


class TestSafety:
    def test_all_texts_are_escaped(self, verified, tmp_path):
        image = tmp_path / "<b>&.png"
        Image.new("RGB", (60, 60)).save(image)
        outcome = dataclasses.replace(
            answered(verified.outcomes[0], HOSTILE, HOSTILE + "!x", HOSTILE), reference=HOSTILE
        )
        outcome.parity = dataclasses.replace(outcome.parity, first_divergence=0)
        page = verified.changed([Sample(HOSTILE, (image,))], [outcome])
        compared = {
            **COMPARED,
            "bundle": HOSTILE,
            "reference": HOSTILE,
            "data": HOSTILE,
            "versions": {HOSTILE: HOSTILE},
        }
        page = page._replace(result=page.result | {"remarks": [HOSTILE], "compared": compared, "plan": HOSTILE})
        write_page(tmp_path / "a.html", page.result, page.samples, page.outcomes, page.model)
        found = Page((tmp_path / "a.html").read_text(encoding="utf-8"))
        assert "script" not in {tag for tag, *_ in found.tags}
        assert all(attrs["src"].startswith("data:image/jpeg;base64,") for attrs, _ in found.all("img"))
        assert not any(name.startswith("on") for _, attrs, _ in found.tags for name in attrs)
        shown = HOSTILE.replace("\x00", "\ufffd").replace("\x1b", "\ufffd").replace("\ud800", "\ufffd")
        (article,) = found.texts("article")
        assert article.count(shown) == 5  # prompt, expected, unpruned, pruned, in PyTorch
        assert any("<b>&.png" in attrs["alt"] for attrs, _ in found.all("img"))

    def test_it_refers_to_nothing_outside(self, flipped):
        text = flipped.text()
        assert not re.search(
            r"https?:|//\w|@import|url\(|<script|<link|<iframe|srcset", re.sub('base64,[^"]*', "", text)
        )
        assert "default-src 'none'" in text

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_contrast(self, scheme):
        """WCAG 2.2, 1.4.3: 4.5 for text, against the page and against a card."""
        style = (Path(document.__file__).parent / "style.css").read_text(encoding="utf-8")
        light, dark = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
        colours = dict(re.findall(r"--(\w+): (#\w{6});", {"light": light, "dark": dark}[scheme]))
        assert len(colours) == 10
        for ink in ("ink", "faint", "full", "pruned", "pass", "fail", "link"):
            for paper in ("paper", "card"):
                bright, dim = sorted((luminance(colours[ink]), luminance(colours[paper])), reverse=True)
                assert (bright + 0.05) / (dim + 0.05) >= 4.5, (ink, paper)


class TestFile:
    def test_a_full_disk_leaves_the_old_page_and_nothing_else(self, verified, tmp_path, monkeypatch):
        (tmp_path / "a.html").write_text("old")

        def full(path, text, **_):
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(Path, "write_text", full)
        with pytest.raises(UserError, match="No space left"):
            write_page(tmp_path / "a.html", verified.result, verified.samples, verified.outcomes, verified.model)
        assert [path.name for path in tmp_path.iterdir()] == ["a.html"]
        assert (tmp_path / "a.html").read_bytes() == b"old"


def decoded(attrs: dict) -> Image.Image:
    kind, _, data = attrs["src"].partition(",")
    assert kind == "data:image/jpeg;base64"
    image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
    image.load()
    assert image.format == "JPEG"
    return image


def luminance(colour: str) -> float:
    """WCAG's relative luminance."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
