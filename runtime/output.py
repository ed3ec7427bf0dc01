"""Files that a command was asked for: whether one can go there, and writing it whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from tokprune.runtime.errors import UserError


def check_file(path: Path, what: str) -> None:
    """Raise UserError if ``what``, such as "overlay", cannot be written to ``path``; cheap enough before a long run.

    An existing file may be replaced, nothing else may: renaming would put a file in a device's place.
    """
    with _refusals(path, what):
        if path.is_dir():
            raise UserError(f"the {what} {path} is a directory: name a file in it")
        if not path.parent.is_dir():
            raise UserError(f"the {what}'s directory {path.parent} does not exist: create it, or choose another")
        if path.exists() and not path.is_file():
            raise UserError(f"the {what} {path} is no regular file and would be replaced by one: choose another")
        partial = _partial(path)
        partial.touch()  # permissions do not tell: the file system may be read-only, or the name too long
        partial.unlink()


@contextlib.contextmanager
def whole_file(path: Path, what: str) -> Iterator[Path]:
    """Give a name beside ``path`` to write to; it becomes ``path`` when the block ends well, and goes if it does not.

    Raises UserError where the file system refuses.
    """
    partial = _partial(path)
    try:
        with _refusals(path, what):
            yield partial
            partial.replace(path)
    finally:
        with contextlib.suppress(FileNotFoundError):  # renamed, or never begun
            partial.unlink()


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial-{os.getpid()}")


@contextlib.contextmanager
def _refusals(path: Path, what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"the {what} {path} cannot be written ({error.strerror or error}): choose another") from error
