"""Writes a bundle, or another directory, whole or not at all. Knows files and the manifest, no models."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tokprune.runtime import names
from tokprune.runtime.bundle import sha256
from tokprune.runtime.errors import UserError
from tokprune.runtime.manifest import FileFacts

_FULL = {
    errno.ENOSPC: "the disk is full: free some space, or choose another --out",
    errno.EDQUOT: "the disk quota is used up: free some space, or choose another --out",
    errno.EFBIG: "a file would pass the size that is allowed there: raise the limit, or choose another --out",
    errno.EROFS: "the file system is read-only: choose another --out",
}
_BARRED = {
    **_FULL,
    errno.EACCES: "access is not permitted: choose another --out",
    errno.EPERM: "access is not permitted: choose another --out",
    errno.ENOTDIR: "a part of the path is a file: choose another --out",
    errno.EEXIST: "a part of the path is a file: choose another --out",
    errno.ENOENT: "no directory can be made there: choose another --out",
    errno.ENAMETOOLONG: "the name is too long: choose another --out",
    errno.ELOOP: "its symbolic links lead in a circle: choose another --out",
}


def check_out(out: Path) -> None:
    """Raise UserError if ``out`` exists and is neither an empty directory nor a bundle and nothing but that."""
    with _refusals(out, _BARRED):
        if not os.path.lexists(out):
            return
        if not out.is_dir():
            raise UserError(f"--out {out} is not a directory: choose another --out")
        found = {path.name for path in out.iterdir()}
        if found and names.MANIFEST_FILE not in found:
            raise UserError(
                f"--out {out} exists and is not a bundle (it has no {names.MANIFEST_FILE}): "
                "choose another --out, or remove it yourself"
            )
        foreign = sorted(found - _own(out)) if found else []
    if foreign:
        raise UserError(
            f"--out {out} holds {foreign[0]}, which is no part of the bundle there and would be lost: "
            "move it away, or choose another --out"
        )


def _own(out: Path) -> set[str]:
    """What at the top of the bundle ``out`` belongs to it, by its manifest: of any version, so read leniently."""
    own = {names.MANIFEST_FILE, "plugins", "engines", "calibration"}
    try:
        data = json.loads((out / names.MANIFEST_FILE).read_text(encoding="utf-8"))
        return own | {file["path"].partition("/")[0] for file in data["files"]}
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return own  # no manifest at all: every other file is foreign


@contextlib.contextmanager
def staged(out: Path, check: Callable[[Path], None] = check_out) -> Iterator[Path]:
    """Give a fresh directory beside ``out``; when the block ends well, it becomes ``out`` in one rename.

    What ``out`` may be before is for ``check`` to say, which raises UserError. If the block fails or is interrupted,
    nothing of it stays, and what ``out`` was stays as it was; what a killed process left is removed by the next
    one for the same ``out``.
    Raises UserError where the file system refuses: full, read-only, not permitted.
    """
    check(out)
    target = Path(os.path.realpath(out))  # of a symbolic link, what it points to is replaced
    stage = target.with_name(f".{target.name}.partial-{secrets.token_hex(4)}")
    with _refusals(out, _BARRED):
        missing = [parent for parent in target.parents if not parent.exists()]  # the nearest first
    try:
        with _refusals(out, _BARRED):
            target.parent.mkdir(parents=True, exist_ok=True)
            _sweep(target)
            stage.mkdir()
        with _locked(stage):
            with _refusals(out, _FULL):  # what else fails in here may be another file's fault
                yield stage
            with _refusals(out, _BARRED):
                _replace(stage, target)
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)  # what cannot be removed now is swept by the next export
        for parent in missing:
            with contextlib.suppress(OSError):  # never made, or by now in use
                parent.rmdir()
        raise


@contextlib.contextmanager
def _refusals(out: Path, reasons: Mapping[int, str]) -> Iterator[None]:
    """Turn what a file system says to a writer into a sentence."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.errno not in reasons:
            raise
        raise UserError(f"--out {out} cannot be written, {reasons[error.errno]}") from error


@contextlib.contextmanager
def _locked(stage: Path) -> Iterator[None]:
    """Hold a lock on ``stage``, which ends with the process, however that ends."""
    handle = os.open(stage, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _sweep(target: Path) -> None:
    """Remove what killed processes left of earlier exports to the same place; those at work hold a lock."""
    for leftover in target.parent.glob(f".{glob.escape(target.name)}.partial-*"):
        handle = os.open(leftover, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        finally:
            os.close(handle)
        if leftover.suffix == ".old" and not target.exists():
            leftover.rename(target)  # killed between the two renames of ``_replace``
        else:
            shutil.rmtree(leftover)


def _replace(stage: Path, target: Path) -> None:
    if not target.exists() or not any(target.iterdir()):
        stage.rename(target)
        return
    # a directory that is not empty cannot be renamed over
    old = stage.with_name(f"{stage.name}.old")
    try:
        target.rename(old)
        stage.rename(target)
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)
        raise
    shutil.rmtree(old)


def describe_files(directory: Path, paths: Iterable[Path]) -> tuple[FileFacts, ...]:
    """Size and SHA-256 of each file, with its path relative to ``directory``."""
    files = sorted(paths)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing runs outside Python's lock
        hashes = pool.map(sha256, files)
    return tuple(
        FileFacts(path.relative_to(directory).as_posix(), path.stat().st_size, digest)
        for path, digest in zip(files, hashes, strict=True)
    )
