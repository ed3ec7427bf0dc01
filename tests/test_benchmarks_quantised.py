"""benchmarks/quantised.py: the tiny model against itself and against its INT4; stopped and resumed; whom it refuses."""

import contextlib
import dataclasses
import io
import json
import os
import shutil

import numpy as np
import onnx_ir as ir
import pytest
import quantised
from PIL import Image

from tokprune.export.quantize import quantize
from tokprune.export.sides import Engine
from tokprune.runtime.bundle import Bundle, open_bundle
from tokprune.runtime.chat import load
from tokprune.runtime.data import read_samples
from tokprune.runtime.errors import UserError


@pytest.fixture(scope="module")
def folder(tiny_bundle, tmp_path_factory):
    """Bundles, and five questions on two images and on none."""
    path = tmp_path_factory.mktemp("quantised")
    shutil.copytree(tiny_bundle("lofi"), path / "copy")
    quantize(open_bundle(tiny_bundle("lofi")), path / "int4", "int4")
    for number in range(2):
        noise = np.random.default_rng(number).integers(0, 256, (60, 81, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path / f"{number}.png")
    lines = [
        {"image": "0.png", "prompt": "How many?", "answer": "7"},
        {"image": "0.png", "prompt": "How many? Count.", "answer": "red"},
        {"image": "1.png", "prompt": "What digit is red?"},
        {"prompt": "No picture here?"},
        {"image": "1.png", "prompt": "What?", "answer": "2"},
    ]
    (path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.fixture(scope="module")
def run(tiny_bundle, folder):
    def run(work, *options, bundles=("copy", "int4"), data="data.jsonl"):
        given = [tiny_bundle("lofi"), *(folder / name for name in bundles), "--data", folder / data, "--work", work]
        return quantised.main([*map(str, given), "--max-new-tokens", "4", "--batch", "2", *options])

    return run


@pytest.fixture(scope="module")
def done(run, folder):
    """The work file of a run to the end, and the JSON that it printed."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert run(folder / "done.jsonl", "--json") == 0
    return folder / "done.jsonl", out.getvalue()


def test_a_copy_is_the_same_and_int4_is_not(done, folder, tiny_bundle) -> None:
    found = json.loads(done[1])
    copy, int4 = found["figures"]["copy"], found["figures"]["int4"]
    assert (copy["questions"], copy["agreement"], copy["flips"]) == (5, 1.0, [])
    assert (copy["kl_mean"], copy["kl_p99"]) == (0.0, 0.0)
    assert (copy["kept_overlap_mean"], copy["kept_overlap_min"]) == (1.0, 1.0)
    assert int4["kl_mean"] > 1e-3
    assert int4["kept_overlap_min"] < 1
    assert (int4["labelled"], int4["accuracy_base"]) == (3, copy["accuracy_base"])
    [pair] = found["pairs"]
    assert pair["kl"] == pytest.approx(-int4["kl_mean"], rel=1e-12)
    assert pair["agreement_points"] == pytest.approx(100 * (1 - int4["agreement"]), rel=1e-12)

    # the answers are those that a bundle gives when it is asked without this command, a question at a time
    rows = [json.loads(line) for line in done[0].read_text().splitlines()][1:]
    asked = read_samples(folder / "data.jsonl")
    ours = {"base": [row["base"] for row in rows], "int4": [row["bundles"]["int4"]["answer"] for row in rows]}
    for name, path in {"base": tiny_bundle("lofi"), "int4": folder / "int4"}.items():
        model = load(path)
        alone = [model.answer([s.prompt], [s.images], max_new_tokens=4)[0].text for s in asked]
        assert ours[name] == alone
    assert ours["base"] != ours["int4"]
    assert [row["bundles"]["int4"]["kept_overlap"] is None for row in rows] == [False, False, False, True, False]


@pytest.mark.parametrize("left", [2.5, 4])
def test_what_was_stopped_ends_in_the_same_bytes(left, done, run, tmp_path, capsys) -> None:
    """Behind so many lines, the header among them: within the first batch, and within the second."""
    whole = done[0].read_bytes()
    lines = whole.splitlines(keepends=True)
    assert len(lines) == 6
    work, at = tmp_path / "work.jsonl", int(left)
    work.write_bytes(b"".join(lines[:at]) + (lines[at][: len(lines[at]) // 2] if left % 1 else b""))
    code = run(work, "--json")
    out, progress = capsys.readouterr()
    assert (code, out) == (0, done[1])
    assert work.read_bytes() == whole
    assert ("2 of 5" in progress) == (left < 3)
    assert "5 of 5" in progress


def test_tables_of_what_is_done_already(done, run, tmp_path, monkeypatch, capsys) -> None:
    work = shutil.copy(done[0], tmp_path / "work.jsonl")
    monkeypatch.setattr(Engine, "forced", None)
    code = run(work)
    out, progress = capsys.readouterr()
    assert (code, progress) == (0, "")
    assert out.startswith("against lofi ")
    assert "\ncopy − int4 " in out
    assert work.read_bytes() == done[0].read_bytes()


def test_work_of_other_data(done, run, folder, tmp_path, capsys) -> None:
    (folder / "other.jsonl").write_text((folder / "data.jsonl").read_text().replace('"7"', '"8"'))
    work = shutil.copy(done[0], tmp_path / "work.jsonl")
    assert run(work, data="other.jsonl") == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error == f"Error: the work file {work} is not this run's, its data differ: name another one, or delete it\n"
    assert work.read_bytes() == done[0].read_bytes()


@pytest.mark.parametrize(
    ("options", "bundles", "words"),
    [
        (("--batch", "5"), ("copy",), "a batch of 5 prompts was given"),
        (("--batch", "0"), ("copy",), "a batch of no prompts"),
        (("--max-new-tokens", "0"), ("copy",), "--max-new-tokens 0 was asked for"),
        ((), ("copy", "copy"), "2 bundles are named copy"),
        ((), ("none",), "none is not there"),
    ],
)
def test_bad_input(options, bundles, words, run, tmp_path, capsys) -> None:
    assert run(tmp_path / "work.jsonl", *options, bundles=bundles) == 2
    out, error = capsys.readouterr()
    assert (out, error.count("\n")) == ("", 1)
    assert words in error
    assert not list(tmp_path.iterdir())


def test_no_place_for_work(run, tmp_path, capsys) -> None:
    assert run(tmp_path / "nowhere" / "work.jsonl") == 2
    assert "nowhere does not exist" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["model", "plan", "prompt"])
def test_bundles_that_are_no_kin(part, folder) -> None:
    base = open_bundle(folder / "copy")
    changes = {"model": {"hidden": 1}, "plan": {"seed": 8}, "prompt": {"user": "{text}"}}[part]
    changed = dataclasses.replace(getattr(base.manifest, part), **changes)
    other = Bundle(folder / "int4", dataclasses.replace(base.manifest, **{part: changed}))
    with pytest.raises(UserError, match=f"int4 was not made from .*copy, its {part} is another"):
        quantised._check([base, other], 1)


def test_features_are_shared_where_the_encoder_is_the_same(folder, tiny_bundle, tmp_path) -> None:
    base, other = open_bundle(tiny_bundle("lofi")), open_bundle(shutil.copytree(folder / "copy", tmp_path / "other"))
    digest = quantised.tower_digest(base, "engine")
    assert quantised.tower_digest(other, "engine") == digest
    assert quantised.tower_digest(base, "engine, fused graphs") != digest
    linked = open_bundle(shutil.copytree(folder / "copy", tmp_path / "linked", copy_function=os.link))
    assert quantised.tower_digest(linked, "engine") == digest
    [*weights] = ir.load(other.file("vision_encoder.onnx")).graph.initializers.values()
    weight = weights[-1].const_value
    with open(weight.path, "r+b") as file:
        file.seek(weight.offset)
        file.write(b"\x01\x02\x03")
    assert quantised.tower_digest(other, "engine") != digest


class TestWorkFile:
    HEADER = {"base": {}, "bundles": [{"name": "a"}, {"name": "b"}], "data": "", "settings": {"batch": 2}}  # noqa: RUF012

    def stored(self, path, count) -> str:
        path.write_text(
            "".join(json.dumps(line) + "\n" for line in (self.HEADER, *({"question": n} for n in range(count))))
        )
        return path.read_text()

    @pytest.mark.parametrize(("found", "kept"), [(0, 0), (1, 0), (2, 2), (3, 2), (4, 4), (5, 5)])
    def test_whole_batches_are_kept(self, found, kept, tmp_path) -> None:
        work = tmp_path / "work.jsonl"
        text = self.stored(work, found)
        assert quantised.open_work(work, self.HEADER, 5) == [{"question": number} for number in range(kept)]
        assert work.read_text() == "".join(text.splitlines(keepends=True)[: 1 + kept])

    def test_a_new_or_empty_one_is_begun(self, tmp_path) -> None:
        work = tmp_path / "work.jsonl"
        assert quantised.open_work(work, self.HEADER, 5) == []
        begun = work.read_text()
        assert json.loads(begun) == self.HEADER
        work.write_text("")
        assert quantised.open_work(work, self.HEADER, 5) == []
        assert work.read_text() == begun

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"bundles": [{"name": "b"}, {"name": "a"}]}, "its bundles differ"),  # in pairs the order counts
            ({"base": {"name": "c"}, "settings": {"batch": 1}}, "its base, settings differ"),
        ],
    )
    def test_of_another_run(self, change, words, tmp_path) -> None:
        work = tmp_path / "work.jsonl"
        text = self.stored(work, 3)
        with pytest.raises(UserError, match=words):
            quantised.open_work(work, self.HEADER | change, 5)
        assert work.read_text() == text

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("notes", "its base, bundles, data, settings differ"),
            ('["a list"]\n', "its base, bundles, data, settings differ"),
            ("not JSON\n", "cannot be read"),
            (json.dumps(HEADER) + '\n{"question": 1}\n', "its questions are not in order"),
        ],
    )
    def test_something_else(self, text, words, tmp_path) -> None:
        work = tmp_path / "work.jsonl"
        work.write_text(text)
        with pytest.raises(UserError, match=words):
            quantised.open_work(work, self.HEADER, 5)
        assert work.read_text() == text
