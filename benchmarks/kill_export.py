"""Kills exports with SIGKILL at random moments: what is left must not load, and the checkpoint must stay as it was.

    python benchmarks/kill_export.py --model DIR --precision fp16 [--kills 20] [--seed 0] [--method lofi]

One export runs to its end first, whose time T is measured; then each of the others is killed after a random time in
[0, T], drawn one from each of as many equal parts of it. All write to the same place, beside the checkpoint unless
--work says otherwise, so that shards are linked. After each kill: no bundle at --out unless the export had ended by
then, in which case it is a whole one; nothing else there that loads; the checkpoint's files with their sizes, times and
inodes. At the end: one more export, which must sweep what was left, and the checkpoint's SHA-256 as before.
Prints one line per kill, and at the end one JSON line. Exit code 1 if anything is not as it must be.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tokprune.runtime.bundle import open_bundle, sha256
from tokprune.runtime.errors import UserError

EXPORT = "import sys; from tokprune.runtime.cli import main_export; sys.argv[0] = 'tokprune-export'; main_export()"


def start(options: argparse.Namespace, out: Path) -> subprocess.Popen[bytes]:
    """An export in a process of its own."""
    arguments = ["--model", str(options.model), "--method", options.method, "--precision", options.precision]
    command = [sys.executable, "-c", EXPORT, *arguments, "--out", str(out)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(child: subprocess.Popen[bytes]) -> None:
    """Wait for an export that nobody kills."""
    _, errors = child.communicate()
    if child.returncode != 0:
        raise SystemExit(f"an export failed by itself: {errors.decode()}")


def loads(path: Path) -> bool:
    """Whether there is a bundle at ``path``, or what passes for one."""
    try:
        open_bundle(path)
    except UserError:
        return False
    return True


def stats(model: Path) -> dict[str, tuple[int, int, int]]:
    """Size, time of the last change and inode of each file."""
    found = {path.name: path.stat() for path in sorted(model.iterdir()) if path.is_file()}
    return {name: (stat.st_size, stat.st_mtime_ns, stat.st_ino) for name, stat in found.items()}


def digests(model: Path) -> dict[str, str]:
    """SHA-256 of each file."""
    return {path.name: sha256(path) for path in sorted(model.iterdir()) if path.is_file()}


def run(options: argparse.Namespace, folder: Path) -> dict[str, object]:
    """All kills, in the empty ``folder``; the record of what was found."""
    out = folder / "bundle"
    before, content = stats(options.model), digests(options.model)
    begin = time.perf_counter()
    finish(start(options, out))
    whole = time.perf_counter() - begin
    shutil.rmtree(out)
    generator = random.Random(options.seed)
    faults: list[str] = []
    ended = left_behind = 0
    parts = list(range(options.kills))
    generator.shuffle(parts)
    for number, part in enumerate(parts, 1):
        moment = whole * (part + generator.random()) / options.kills
        child = start(options, out)
        try:
            child.communicate(timeout=moment)
        except subprocess.TimeoutExpired:
            child.kill()
            child.communicate()
        entries = sorted(folder.iterdir())
        if out.exists():  # it was renamed before the kill, or ended by itself: then it is a whole one
            ended += 1
            if not loads(out):
                faults.append(f"kill {number}: the bundle that appeared does not load")
        elif child.returncode != -signal.SIGKILL:
            faults.append(f"kill {number}: the export ended with code {child.returncode}")
        for path in entries:
            if path != out:
                left_behind += 1
                if loads(path):
                    faults.append(f"kill {number}: {path.name} loads")
        if len(entries) > 1:
            faults.append(f"kill {number}: {len(entries)} leftovers, earlier ones were not swept")
        if stats(options.model) != before:
            faults.append(f"kill {number}: the checkpoint was touched")
        print(f"kill {number}/{options.kills} at {moment:.1f} of {whole:.1f} s: {[path.name for path in entries]}")
        shutil.rmtree(out, ignore_errors=True)
    finish(start(options, out))
    if sorted(folder.iterdir()) != [out] or not loads(out):
        faults.append("the last export did not sweep what was left, or does not load")
    if digests(options.model) != content:
        faults.append("the checkpoint has other bytes than before")
    return {
        "model": options.model.name,
        "precision": options.precision,
        "kills": options.kills,
        "export_seconds": round(whole, 1),
        "ended_before_the_kill": ended,
        "left_something_behind": left_behind,
        "faults": faults,
        "passed": not faults,
    }


def main() -> int:
    """Parse, kill, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint directory")
    parser.add_argument("--precision", choices=("fp32", "fp16"), default="fp16")
    parser.add_argument("--method", choices=("lofi", "none", "random", "uniform", "fastv"), default="lofi")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="directory to work in, of the checkpoint's file system")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(
        prefix="kill-export-", dir=options.work or options.model.resolve().parent
    ) as folder:
        record = run(options, Path(folder))
    print(json.dumps(record))
    return 0 if record["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
