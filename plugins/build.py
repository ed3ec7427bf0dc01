"""``build-plugins``: the sources in this folder to a library of TensorRT plugins, by CMake, kept in a cache.

Needs neither torch nor transformers nor onnx, so that it runs on a device. What is built for the same sources, versions
and architectures is built once.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tokprune.plugins.toolchain import NATIVE, Toolchain, find_toolchain
from tokprune.runtime.bundle import sha256
from tokprune.runtime.errors import UserError

SOURCES = Path(__file__).parent
LIBRARY, REGISTERING = "libtokprune_plugins.so", "libtokprune_plugins_register.so"
TARGETS = (LIBRARY.removeprefix("lib").removesuffix(".so"), REGISTERING.removeprefix("lib").removesuffix(".so"))
_RECORD, _PARTIAL, _LOCK = "build.json", ".partial-", ".lock"
_ERROR = re.compile(r"\berror\b ?[:#]|CMake Error")  # as g++, nvcc, ld and cmake have it; -Werror is none
_SUFFIXES = (".cu", ".cuh", ".cpp", ".h")


@dataclass(frozen=True)
class Built:
    """A built library; hashes are SHA-256. ``cached`` says that it was there already."""

    library: Path
    registering: Path  # registers the other one when it is loaded
    sha256: str  # of ``library``
    sources: str
    tensorrt: str
    cuda: str
    architectures: tuple[int, ...]
    cached: bool

    def record(self) -> dict[str, Any]:
        """All of it, as ``tokprune build-plugins --json`` prints it."""
        return asdict(self) | {"library": str(self.library), "registering": str(self.registering)}


def source_files() -> list[Path]:
    """All that the library is made of."""
    found = [path for path in SOURCES.rglob("*") if path.suffix in _SUFFIXES]
    return sorted([SOURCES / "CMakeLists.txt", *found])


def source_hash() -> str:
    """SHA-256 of the sources, names and contents."""
    digest = hashlib.sha256()
    for path in source_files():
        content = path.read_bytes()
        digest.update(f"{path.relative_to(SOURCES).as_posix()} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def build_plugins(
    architectures: str = NATIVE,
    headers: Path | None = None,
    out: Path | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Built:
    """Build the library, or take it from the cache, and copy it into the directory ``out`` if that is given.

    ``architectures`` and ``headers`` are `find_toolchain`'s; ``progress`` hears each line of the build. Raises
    UserError for what is missing, and for sources that do not compile.
    """
    tools = find_toolchain(architectures, headers)
    made = _cached(tools, progress)
    return made if out is None else _copied(made, out)


def cache_folder() -> Path:
    """Where built libraries are kept: XDG's cache directory."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "tokprune" / "plugins"


def find_built() -> list[Built]:
    """The libraries in the cache that were built from the sources that are here."""
    found = [_open(folder, cached=True) for folder in sorted(cache_folder().glob("*")) if folder.is_dir()]
    sources = source_hash()
    return [built for built in found if built is not None and built.sources == sources]


def _cached(tools: Toolchain, progress: Callable[[str], None]) -> Built:
    facts = {
        "sources": source_hash(),
        "tensorrt": tools.tensorrt,
        "cuda": tools.cuda,
        "architectures": list(tools.architectures),
    }
    key = hashlib.sha256(json.dumps([facts, platform.machine()], sort_keys=True).encode()).hexdigest()[:16]
    target = cache_folder() / key
    if (found := _open(target, cached=True)) is not None:
        return found
    target.parent.mkdir(parents=True, exist_ok=True)
    with _partial(target.parent, key) as folder:
        compile_sources(tools, Path(folder, "build"), TARGETS, progress, log=target.with_suffix(".log"))
        whole = Path(folder, "whole")
        whole.mkdir()
        for name in (LIBRARY, REGISTERING):
            shutil.move(Path(folder, "build", name), whole / name)
        hashes = {name: sha256(whole / name) for name in (LIBRARY, REGISTERING)}
        (whole / _RECORD).write_text(json.dumps({**facts, "files": hashes}, indent=1) + "\n", encoding="utf-8")
        if target.exists():  # another process was as fast, or what lay there was damaged
            target.rename(Path(folder, "old"))
        whole.rename(target)
    found = _open(target, cached=False)
    assert found is not None  # it was just written
    return found


@contextlib.contextmanager
def _partial(cache: Path, key: str) -> Iterator[str]:
    """A directory in ``cache`` that ends with the block; those that killed builds have left go first.

    Whoever builds holds a lock in his directory, which ends with the process, however that ends.
    """
    with contextlib.ExitStack() as stack:
        with _locked(cache, fcntl.LOCK_EX):  # so that no one finds a directory that is not locked yet
            for left in cache.glob(f".*{_PARTIAL}*"):
                with contextlib.suppress(BlockingIOError), _locked(left, fcntl.LOCK_EX | fcntl.LOCK_NB):
                    shutil.rmtree(left)
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix=f".{key}{_PARTIAL}", dir=cache))
            stack.enter_context(_locked(Path(folder), fcntl.LOCK_EX))
        yield folder


@contextlib.contextmanager
def _locked(folder: Path, how: int) -> Iterator[None]:
    """Hold a lock in ``folder``. Raises BlockingIOError if another process has it, and ``how`` is not to wait."""
    handle = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(handle, how)
        yield
    finally:
        os.close(handle)


def compile_sources(
    tools: Toolchain, folder: Path, targets: tuple[str, ...], progress: Callable[[str], None], log: Path
) -> None:
    """Have CMake make ``targets`` in ``folder``; ``log`` gets all it says. Raises UserError if it fails."""
    configure = [str(tools.cmake), "-S", str(SOURCES), "-B", str(folder), "-G", tools.generator]
    configure += ["-DCMAKE_BUILD_TYPE=Release", f"-DCMAKE_CUDA_COMPILER={tools.nvcc}"]
    configure += [f"-DTENSORRT_INCLUDE_DIR={tools.headers}"]
    configure += [f"-DCMAKE_CUDA_ARCHITECTURES={';'.join(f'{arch}-real' for arch in tools.architectures)}"]
    make = [str(tools.cmake), "--build", str(folder), "--parallel", "--target", *targets]
    with log.open("w", encoding="utf-8") as file:
        for command in (configure, make):
            lines = []
            with subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
            ) as process:
                assert process.stdout is not None
                for line in process.stdout:
                    file.write(line)
                    lines.append(line.strip())
                    progress(lines[-1])
            if process.returncode:
                reason = next(filter(_ERROR.search, lines), lines[-1] if lines else "it said nothing")
                raise UserError(f"the plugin library was not built ({reason}): all that was said is in {log}")


def _open(folder: Path, *, cached: bool) -> Built | None:
    """What ``folder`` holds, if it is whole and as it was written."""
    try:
        facts = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
        if any(sha256(folder / name) != digest for name, digest in facts["files"].items()):
            return None
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None  # not there, cut or edited: it is built again
    return Built(
        library=folder / LIBRARY,
        registering=folder / REGISTERING,
        sha256=facts["files"][LIBRARY],
        sources=facts["sources"],
        tensorrt=facts["tensorrt"],
        cuda=facts["cuda"],
        architectures=tuple(facts["architectures"]),
        cached=cached,
    )


def _copied(made: Built, out: Path) -> Built:
    """``made`` with its files in ``out``, each put there by one rename, once all have been copied."""
    names = (LIBRARY, REGISTERING, _RECORD)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=out) as folder:
            for name in names:
                shutil.copy2(made.library.parent / name, folder)
            for name in names:
                Path(folder, name).rename(out / name)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written ({error.strerror}): choose another --out") from None
    found = _open(out, cached=made.cached)
    assert found is not None  # it was just written
    return found
