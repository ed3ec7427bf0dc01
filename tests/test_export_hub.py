"""Models of the Hugging Face hub, from a cache as huggingface_hub lays it out; there is no network in tests."""

import functools
import shutil

import pytest

from tokprune.export import checkpoint as checkpoint_module
from tokprune.export.checkpoint import find_checkpoint, load_processor
from tokprune.runtime.errors import UserError

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tiny_checkpoint, tmp_path, monkeypatch):
    """The tiny checkpoint as org/tiny in a cache of its own: links in a snapshot that lead to blobs."""
    repo = tmp_path / "hub" / "models--org--tiny"
    snapshot = repo / "snapshots" / REVISION
    for directory in (snapshot, repo / "blobs", repo / "refs"):
        directory.mkdir(parents=True)
    (repo / "refs" / "main").write_text(REVISION)
    for file in tiny_checkpoint.iterdir():
        shutil.copy(file, repo / "blobs" / f"blob-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/blob-{file.name}")
    offline = functools.partial(checkpoint_module.snapshot_download, cache_dir=tmp_path / "hub", local_files_only=True)
    monkeypatch.setattr(checkpoint_module, "snapshot_download", offline)
    return snapshot


def test_from_the_cache(cache):
    checkpoint = find_checkpoint("org/tiny")
    assert checkpoint.path == cache
    assert checkpoint.facts.name == "org/tiny"
    assert checkpoint.facts.layers == 3
    assert load_processor(checkpoint).image_processor is not None


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("model", ["org/other", "tiny/org", "a..b/--", "org/tiny "])
def test_not_there(model):
    with pytest.raises(UserError, match="give a checkpoint's directory") as caught:
        find_checkpoint(model)
    assert str(caught.value).startswith((f"{model} is no directory here, and could not be had", "the model directory"))
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("cache")
def test_a_directory_comes_first(tiny_checkpoint, tmp_path, monkeypatch):
    (tmp_path / "org").mkdir()
    shutil.copytree(tiny_checkpoint, tmp_path / "org" / "tiny")
    monkeypatch.chdir(tmp_path)
    assert find_checkpoint("org/tiny").facts.name == "tiny"


@pytest.mark.parametrize("model", ["nowhere", "./no/where", "/no/where", "a/b/c", "../x"])
def test_what_is_no_id_is_not_asked_for(model, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoint_module, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(UserError, match="does not exist: give a checkpoint's directory, a hub id"):
        find_checkpoint(model)
