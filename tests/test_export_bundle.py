"""Writing a bundle: it appears whole or not at all, and nothing of anybody else's is lost."""

import errno
import fcntl
import os

import pytest

from tokprune.export.bundle import check_out, describe_files, staged
from tokprune.runtime.errors import UserError

MANIFEST = '{"schema": 1, "files": [{"path": "weights/a"}]}'


def make(path, text="old"):
    (path / "weights").mkdir(parents=True)
    (path / "weights" / "a").write_text(text)
    (path / "tokprune.json").write_text(MANIFEST)


def names_in(path):
    return sorted(entry.name for entry in path.iterdir())


class TestWhole:
    def test_new(self, tmp_path):
        with staged(tmp_path / "a" / "b" / "out") as stage:
            assert not (tmp_path / "a" / "b" / "out").exists()
            (stage / "file").write_text("x")
        assert names_in(tmp_path / "a" / "b") == ["out"]
        assert names_in(tmp_path / "a" / "b" / "out") == ["file"]

    def test_in_an_empty_directory(self, tmp_path):
        (tmp_path / "out").mkdir()
        with staged(tmp_path / "out") as stage:
            (stage / "file").write_text("x")
        assert names_in(tmp_path) == ["out"]
        assert names_in(tmp_path / "out") == ["file"]

    def test_over_a_bundle(self, tmp_path):
        make(tmp_path / "out")
        with staged(tmp_path / "out") as stage:
            (stage / "file").write_text("x")
            assert (tmp_path / "out" / "weights" / "a").read_text() == "old"
        assert names_in(tmp_path) == ["out"]
        assert names_in(tmp_path / "out") == ["file"]

    def test_relative(self, tmp_path, monkeypatch):
        from pathlib import Path

        monkeypatch.chdir(tmp_path)
        with staged(Path("out")) as stage:
            (stage / "file").write_text("x")
            monkeypatch.chdir("/")  # what ``out`` means was settled at the start
        assert names_in(tmp_path / "out") == ["file"]

    def test_through_a_link(self, tmp_path):
        make(tmp_path / "real")
        (tmp_path / "out").symlink_to("real")
        with staged(tmp_path / "out") as stage:
            (stage / "file").write_text("x")
        assert (tmp_path / "out").is_symlink()
        assert names_in(tmp_path / "real") == ["file"]

    def test_mode_is_what_the_umask_leaves(self, tmp_path):
        before = os.umask(0o027)
        try:
            with staged(tmp_path / "out"):
                pass
        finally:
            os.umask(before)
        assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750


class TestNotAtAll:
    @pytest.mark.parametrize("error", [ValueError, UserError, KeyboardInterrupt, SystemExit])
    def test_new(self, tmp_path, error):
        def work():
            with staged(tmp_path / "a" / "b" / "out") as stage:
                (stage / "file").write_text("x")
                raise error("stop")

        with pytest.raises(error):
            work()
        assert names_in(tmp_path) == []  # not even the directories above

    def test_directories_above_stay_if_they_were_there(self, tmp_path):
        (tmp_path / "a").mkdir()
        with pytest.raises(KeyError), staged(tmp_path / "a" / "b" / "out"):
            raise KeyError
        assert names_in(tmp_path) == ["a"]
        assert names_in(tmp_path / "a") == []

    def test_over_a_bundle(self, tmp_path):
        make(tmp_path / "out")
        with pytest.raises(KeyboardInterrupt), staged(tmp_path / "out"):
            raise KeyboardInterrupt
        assert names_in(tmp_path) == ["out"]
        assert (tmp_path / "out" / "weights" / "a").read_text() == "old"

    @pytest.mark.parametrize("stopped", [KeyboardInterrupt, OSError(errno.EIO, "broken")])
    def test_between_the_renames(self, tmp_path, monkeypatch, stopped):
        """The old bundle has been moved aside, the new one is not in its place yet."""
        make(tmp_path / "out")
        rename = type(tmp_path).rename

        def second_fails(self, target):
            if "partial" in self.name and "partial" not in target.name and not self.name.endswith(".old"):
                raise stopped
            return rename(self, target)

        monkeypatch.setattr(type(tmp_path), "rename", second_fails)
        with pytest.raises((KeyboardInterrupt, OSError)), staged(tmp_path / "out"):
            pass
        assert names_in(tmp_path) == ["out"]
        assert (tmp_path / "out" / "weights" / "a").read_text() == "old"


class TestLeftovers:
    def test_of_killed_processes_go(self, tmp_path):
        make(tmp_path / ".out.partial-0a1b2c3d")
        with staged(tmp_path / "out"):
            pass
        assert names_in(tmp_path) == ["out"]

    def test_of_processes_at_work_stay(self, tmp_path):
        with staged(tmp_path / "out") as first:
            (first / "file").write_text("first")
            with staged(tmp_path / "out") as second:
                (second / "file").write_text("second")
                (second / "tokprune.json").write_text('{"files": [{"path": "file"}]}')
            assert (tmp_path / "out" / "file").read_text() == "second"
        assert (tmp_path / "out" / "file").read_text() == "first"
        assert names_in(tmp_path) == ["out"]

    def test_killed_between_the_renames(self, tmp_path):
        """Then the old bundle lies beside; it is put back, and is there still if the next export fails."""
        make(tmp_path / ".out.partial-0a1b2c3d.old")
        make(tmp_path / ".out.partial-0a1b2c3d", "new")
        with pytest.raises(KeyError), staged(tmp_path / "out"):
            raise KeyError
        assert names_in(tmp_path) == ["out"]
        assert (tmp_path / "out" / "weights" / "a").read_text() == "old"

    def test_of_other_bundles_stay(self, tmp_path):
        make(tmp_path / ".other.partial-0a1b2c3d")
        make(tmp_path / ".o*t.partial-0a1b2c3d")
        with staged(tmp_path / "out"):
            pass
        assert names_in(tmp_path) == [".o*t.partial-0a1b2c3d", ".other.partial-0a1b2c3d", "out"]

    def test_lock_is_held_during_the_work(self, tmp_path):
        with staged(tmp_path / "out") as stage:
            handle = os.open(stage, os.O_RDONLY)
            with pytest.raises(BlockingIOError):
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.close(handle)


class TestCheckOut:
    def test_bundle_with_what_belongs_to_it(self, tmp_path):
        make(tmp_path / "out")
        (tmp_path / "out" / "engines").mkdir()
        (tmp_path / "out" / "plugins").mkdir()
        check_out(tmp_path / "out")

    @pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"files": [3]}', '{"files": [{"path": 3}]}', "[" * 100_000])
    def test_without_a_manifest_that_says_so_nothing_belongs_to_it(self, tmp_path, text):
        make(tmp_path / "out")
        (tmp_path / "out" / "tokprune.json").write_text(text)
        with pytest.raises(UserError, match="holds weights, which is no part of the bundle"):
            check_out(tmp_path / "out")

    def test_old_schema_can_be_exported_over(self, tmp_path):
        make(tmp_path / "out")
        (tmp_path / "out" / "tokprune.json").write_text(MANIFEST.replace('"schema": 1', '"schema": 0'))
        check_out(tmp_path / "out")


class TestRefusals:
    @pytest.mark.parametrize(
        ("code", "words"),
        [
            (errno.ENOSPC, "the disk is full: free some space"),
            (errno.EDQUOT, "quota"),
            (errno.EFBIG, "size that is allowed"),
            (errno.EROFS, "read-only"),
        ],
    )
    def test_within(self, tmp_path, code, words):
        with pytest.raises(UserError, match=f"out cannot be written, .*{words}"), staged(tmp_path / "out"):
            raise OSError(code, os.strerror(code))
        assert names_in(tmp_path) == []

    @pytest.mark.parametrize("code", [errno.EACCES, errno.ENOENT, errno.EIO, None])
    def test_of_another_file_pass(self, tmp_path, code):
        """A shard that may not be read says nothing about ``out``."""
        with pytest.raises(OSError, match="shard"), staged(tmp_path / "out"):
            raise OSError(code, "shard") if code else OSError("shard")
        assert names_in(tmp_path) == []


def test_describe_files(tmp_path):
    make(tmp_path / "out", "abc")
    files = describe_files(tmp_path / "out", [path for path in (tmp_path / "out").rglob("*") if path.is_file()])
    assert [(file.path, file.size) for file in files] == [("tokprune.json", len(MANIFEST)), ("weights/a", 3)]
    assert files[1].sha256 == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, B.1
