"""Opening a bundle: which files are looked at, how far, and what is said when one is at fault."""

import dataclasses
import hashlib
import shutil

import pytest
from test_runtime_contract import PLANS, manifest_of

from tokprune.runtime import bundle as module
from tokprune.runtime.bundle import open_bundle, read_manifest, sha256
from tokprune.runtime.errors import UserError
from tokprune.runtime.manifest import FileFacts


@pytest.fixture
def bundle(tmp_path):
    """A bundle whose manifest fits its files; what is in them is of no matter here."""
    path = tmp_path / "bundle"
    path.mkdir()
    manifest = manifest_of(PLANS["one"])
    files = []
    for facts in manifest.files:
        content = facts.path.encode() * 3
        (path / facts.path).write_bytes(content)
        files.append(FileFacts(facts.path, len(content), hashlib.sha256(content).hexdigest()))
    write(path, dataclasses.replace(manifest, files=tuple(files)))
    return path


def write(path, manifest):
    (path / "tokprune.json").write_text(manifest.to_json())


def with_file(bundle, **facts):
    manifest = read_manifest(bundle)
    write(bundle, dataclasses.replace(manifest, files=(*manifest.files, FileFacts(**facts))))


def test_opens(bundle):
    opened = open_bundle(str(bundle))
    assert opened.manifest.plan == PLANS["one"]
    assert opened.file("decoder_0.onnx").read_bytes() == b"decoder_0.onnx" * 3


def test_more_files_than_listed_do_not_matter(bundle):
    (bundle / "notes.txt").write_text("mine")
    open_bundle(bundle)


def test_opens_through_a_link(bundle, tmp_path):
    (tmp_path / "link").symlink_to(bundle)
    open_bundle(tmp_path / "link")


def test_links_within_are_allowed(bundle):
    (bundle / "decoder_0.onnx").rename(bundle / "elsewhere")
    (bundle / "decoder_0.onnx").symlink_to("elsewhere")
    open_bundle(bundle)


def test_hard_links_are_allowed(bundle, tmp_path):
    """An FP16 export links the checkpoint's shards in this way."""
    (tmp_path / "shard").hardlink_to(bundle / "decoder_0.onnx")
    open_bundle(bundle)


class TestHashes:
    """Small files are hashed always, large ones on request; sizes are checked always."""

    @pytest.fixture(autouse=True)
    def alter(self, bundle):
        content = bytearray((bundle / "decoder_0.onnx").read_bytes())
        content[5] ^= 1
        (bundle / "decoder_0.onnx").write_bytes(content)

    def test_small(self, bundle):
        with pytest.raises(UserError, match=r"decoder_0\.onnx was altered"):
            open_bundle(bundle)

    def test_large(self, bundle, monkeypatch):
        monkeypatch.setattr(module, "ALWAYS_HASHED", 10)
        open_bundle(bundle)
        with pytest.raises(UserError, match=r"decoder_0\.onnx was altered"):
            open_bundle(bundle, check_hashes=True)

    def test_sizes(self, bundle, monkeypatch):
        monkeypatch.setattr(module, "ALWAYS_HASHED", 10)
        with (bundle / "decoder_0.onnx").open("ab") as file:
            file.write(b"x")
        with pytest.raises(UserError, match=r"decoder_0\.onnx has 43 bytes, its manifest says 42"):
            open_bundle(bundle)


@pytest.mark.parametrize("name", ["/etc/hostname", "../other", "a/../../other", "link/other"])
def test_paths_that_leave(bundle, tmp_path, name):
    (tmp_path / "other").write_bytes(b"x")
    (bundle / "link").symlink_to(tmp_path)
    with_file(bundle, path=name, size=1, sha256=hashlib.sha256(b"x").hexdigest())
    with pytest.raises(UserError, match=f"names the file {name}, which is outside it: do not use it"):
        open_bundle(bundle)


def test_paths_that_come_back(bundle):
    """Inside it, but by a way that another copy of it would not have."""
    with_file(bundle, path="../bundle/tokenizer.json", size=1, sha256="0" * 64)
    with pytest.raises(UserError, match="outside"):
        open_bundle(bundle)


@pytest.mark.parametrize("name", ["a\0b", "a\ud800b", "x" * 300])
def test_names_that_no_file_can_have(bundle, name):
    with_file(bundle, path=name, size=1, sha256="0" * 64)
    with pytest.raises(UserError):
        open_bundle(bundle)


def test_a_directory_where_a_file_should_be(bundle):
    (bundle / "decoder_0.onnx").unlink()
    (bundle / "decoder_0.onnx").mkdir()
    with pytest.raises(UserError, match=r"lacks its file decoder_0\.onnx"):
        open_bundle(bundle)


def test_not_there(tmp_path):
    with pytest.raises(UserError, match="is not there: make one with tokprune-export"):
        open_bundle(tmp_path / "bundle")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        open_bundle(tmp_path / "file")
    with pytest.raises(UserError, match=r"has no tokprune\.json"):
        open_bundle(tmp_path)


def test_manifest_alone_can_be_read(bundle, tmp_path):
    """``tokprune flops`` needs no weights, so a manifest without its files will do."""
    (tmp_path / "alone").mkdir()
    shutil.copy(bundle / "tokprune.json", tmp_path / "alone")
    assert read_manifest(tmp_path / "alone").plan == PLANS["one"]
    with pytest.raises(UserError, match="lacks its file"):
        open_bundle(tmp_path / "alone")


def test_sha256_of_more_than_one_piece(tmp_path):
    content = bytes(range(256)) * 10_000
    (tmp_path / "file").write_bytes(content)
    assert sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()
