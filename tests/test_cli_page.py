"""``tokprune verify --html --junit``: what goes where, and what is refused before the long work."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from pages import Page

from tokprune.export.page import document
from tokprune.export.page.flips import Flip
from tokprune.export.verify import Outcome
from tokprune.runtime import report
from tokprune.runtime.data import Sample
from tokprune.runtime.errors import UserError


def a_flip(sample: Sample, outcome: Outcome) -> Flip:
    return Flip(1, "changed", sample, outcome, 0.5)


class TestCommand:
    """``tokprune verify --html --junit``, with the tiny model."""

    @pytest.fixture
    def arguments(self, tiny_bundle, tiny_checkpoint, picture, tmp_path):
        (tmp_path / "data.jsonl").write_text(
            f'{{"image": "{picture.name}", "prompt": "One?"}}\n{{"prompt": "None?"}}\n'
        )
        data = ("--data", "data.jsonl", "--max-new-tokens", 3)
        return ("verify", tiny_bundle("lofi-2"), "--reference", tiny_checkpoint, *data)

    def test_both_files(self, call, arguments, tmp_path):
        (tmp_path / "a.html").write_text("old")
        before = {path.name for path in tmp_path.iterdir()}
        result = call(*arguments, "--html", "a.html", "--junit", "a.xml", "--json")
        assert result.code == 0, result
        assert {path.name for path in tmp_path.iterdir()} == before | {"a.xml"}
        page, said = Page((tmp_path / "a.html").read_text(encoding="utf-8")), json.loads(result.out)
        assert page.texts("h1") == ["✓ passed lofi-2"]
        assert said["compared"]["manifest_sha256"] in page.texts("td")
        assert said["compared"]["data"] == "data.jsonl"
        assert said["compared"]["versions"]["torch"]
        assert report.percent(said["consistency"]["agreement"]) in page.texts("dd")
        properties = ElementTree.parse(tmp_path / "a.xml").iter("property")
        assert {p.get("name"): p.get("value") for p in properties}["plan"] == said["plan"]

    def test_a_failed_gate_is_shown_too(self, call, arguments, tmp_path_factory):
        out = tmp_path_factory.mktemp("out")
        result = call(*arguments, "--html", out / "a.html", "--junit", out / "a.xml", "--max-logit-diff", -1)
        assert result.code == 1
        assert Page((out / "a.html").read_text(encoding="utf-8")).texts("h1") == ["✗ FAILED lofi-2"]
        assert ElementTree.parse(out / "a.xml").getroot().get("failures") == "1"

    @pytest.mark.parametrize("option", ["--html", "--junit"])
    @pytest.mark.parametrize(
        ("out", "words"),
        [
            ("folder", "folder is a directory: name a file in it"),
            ("", "is a directory"),
            ("nowhere/a", "directory nowhere does not exist: create it"),
            ("data.jsonl/a", "directory data.jsonl does not exist"),
            ("/dev/null", "/dev/null is no regular file and would be replaced by one"),
            ("a" * 250, "cannot be written (File name too long)"),
        ],
    )
    def test_a_place_where_no_file_can_go(self, call, arguments, tmp_path, option, out, words):
        (tmp_path / "folder").mkdir()
        result = call(*arguments, option, out)
        result.refused(words)
        assert "loading" not in result.err  # before the long work

    def test_no_permission(self, call, arguments, monkeypatch):
        def barred(path, *_, **__):
            raise PermissionError(errno.EACCES, "Permission denied")

        monkeypatch.setattr(Path, "touch", barred)  # root may write everywhere
        result = call(*arguments, "--html", "a.html")
        result.refused("the page a.html cannot be written (Permission denied): choose another")
        assert "loading" not in result.err

    def test_one_file_for_both(self, call, arguments):
        call(*arguments, "--html", "a", "--junit", "./a").refused("--html and --junit both name a")

    def test_an_image_that_is_gone_by_then_costs_the_page_only(self, call, arguments, monkeypatch, tmp_path_factory):
        out = tmp_path_factory.mktemp("out")

        def gone(*_):
            raise UserError("the image picture.png cannot be opened")

        monkeypatch.setattr(document, "draw_pictures", gone)
        monkeypatch.setattr(document, "find_flips", lambda samples, outcomes: [a_flip(samples[0], outcomes[0])])
        result = call(*arguments, "--html", out / "a.html", "--junit", out / "a.xml")
        assert result.code == 2
        assert "\n\npassed\n" in result.out
        assert [path.name for path in out.iterdir()] == ["a.xml"]

    def test_what_cannot_be_written_in_the_end_costs_the_file_only(self, call, arguments, monkeypatch):
        def full(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(Path, "replace", full)
        result = call(*arguments, "--html", "a.html")
        assert result.code == 2
        assert "\n\npassed\n" in result.out
        assert result.err.splitlines()[-1].startswith(
            "Error: the page a.html cannot be written (No space left on device)"
        )
