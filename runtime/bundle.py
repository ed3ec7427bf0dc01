"""Opens a bundle: reads its manifest and checks its files. Knows no session and runs nothing."""

from __future__ import annotations

import hashlib
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tokprune.runtime import names
from tokprune.runtime.contract import check_manifest
from tokprune.runtime.errors import UserError
from tokprune.runtime.manifest import FileFacts, Manifest

ALWAYS_HASHED = 64 << 20  # bytes; smaller files are hashed at every opening, which costs some 50 ms at most each


@dataclass(frozen=True)
class Bundle:
    """A bundle whose files are all there, with the sizes (and, if small or asked for, hashes) it states."""

    path: Path
    manifest: Manifest

    def file(self, name: str) -> Path:
        """Path of one of the bundle's files."""
        return self.path / name


def open_bundle(path: Path | str, *, check_hashes: bool = False) -> Bundle:
    """Open the bundle at ``path``. With ``check_hashes``, files of any size are hashed.

    Raises UserError naming the file that is missing, truncated, altered, or outside the bundle, or the part
    of the manifest that contradicts another.
    """
    path = Path(path)
    manifest = read_manifest(path)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing runs outside Python's lock
        for _ in pool.map(lambda facts: _check_file(path, facts, check_hashes), manifest.files):
            pass  # raises what the file at fault has raised
    return Bundle(path, manifest)


def read_manifest(path: Path) -> Manifest:
    """The checked manifest of the bundle at ``path``, whose other files are not looked at. Raises UserError."""
    manifest_path = path / names.MANIFEST_FILE
    if not path.is_dir():
        found = "a file, not a bundle's directory" if path.exists() else "not there"
        raise UserError(f"the bundle {path} is {found}: make one with tokprune-export --out DIR")
    if not manifest_path.is_file():
        raise UserError(f"{path} is not a bundle, it has no {names.MANIFEST_FILE}: make one with tokprune-export")
    _check_inside(path, names.MANIFEST_FILE)
    try:
        text = manifest_path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(f"{manifest_path} cannot be read ({error}): export the bundle again") from None
    manifest = Manifest.from_json(text, str(manifest_path))
    check_manifest(manifest, str(manifest_path))
    return manifest


def _check_inside(path: Path, name: str) -> Path:
    """The file ``name`` of the bundle at ``path``, if neither name nor symbolic links lead out of it."""
    pure = PurePosixPath(name)
    try:
        resolved = (path / name).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle, a name that none can have
        raise UserError(f"the bundle {path} names a file that cannot be ({error}): do not use it") from None
    if pure.is_absolute() or ".." in pure.parts or not resolved.is_relative_to(path.resolve()):
        raise UserError(f"the bundle {path} names the file {name}, which is outside it: do not use it")
    return path / name


def _check_file(path: Path, facts: FileFacts, check_hashes: bool) -> None:
    file = _check_inside(path, facts.path)
    try:
        status = file.stat()
    except OSError:
        status = None
    if status is None or not stat.S_ISREG(status.st_mode):
        raise UserError(f"the bundle {path} lacks its file {facts.path}: export it, or copy it, again")
    size = status.st_size
    if size != facts.size:
        raise UserError(
            f"{file} has {size} bytes, its manifest says {facts.size}: export the bundle, or copy it, again"
        )
    if not check_hashes and size > ALWAYS_HASHED:
        return
    try:
        found = sha256(file)
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): check its permissions and the disk") from None
    if found != facts.sha256:
        raise UserError(
            f"{file} was altered, its SHA-256 is not the one in the manifest: export the bundle, or copy it, again"
        )


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
