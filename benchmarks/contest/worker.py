"""One contestant's process: converts, or loads and answers, and writes what that took to a JSON file.

    python worker.py JOB.json RESULT.json

Runs in the contestant's own environment, where tokprune may not be, so it imports what the job names and no more.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import re
import resource
import sys
import time
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    result = {"convert": convert, "logits": logits, "measure": measure}[job["do"]](job)
    result["peak_bytes"] = peak_bytes()
    result["cpu_s"] = sum(os.times()[:4])
    target = Path(sys.argv[2])
    partial = target.with_name(f".{target.name}.partial")
    partial.write_text(json.dumps(result), encoding="utf-8")
    partial.rename(target)


def convert(job: dict[str, Any]) -> dict[str, Any]:
    """Make ``job["to"]`` of the checkpoint; seconds are without importing the module."""
    module = importlib.import_module(job["module"])
    begin = time.perf_counter()
    module.convert(job)
    return {"seconds": time.perf_counter() - begin}


def logits(job: dict[str, Any]) -> dict[str, Any]:
    """The first token's logits for the first image, into a file, and the greedy tokens."""
    import numpy as np

    from contest.task import Task

    module = importlib.import_module(job["module"])
    found, tokens = module.first_logits(job, Task(**job["task"]))
    np.save(job["to"], np.asarray(found, dtype=np.float32))
    return {"tokens": tokens}


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Load, warm up on the first image, whose first logits go to a file, answer about each of the others once."""
    import numpy as np

    from contest.task import Task

    if job["path"]:  # "" of the machine itself
        read_through(Path(job["path"]))
    begin = time.perf_counter()
    module = importlib.import_module(job["module"])
    imported = time.perf_counter()
    runner = module.load(job)
    loaded = time.perf_counter()
    task, (warm, *images) = Task(**job["task"]), job["images"]
    first = runner.answer(warm, dataclasses.replace(task, new_tokens=job["warm_tokens"]))
    if first.logits is not None:
        np.save(job["to"], np.asarray(first.logits, dtype=np.float32))
    return {
        "import_s": imported - begin,
        "load_s": loaded - imported,
        "first": first.record(),
        "answers": [runner.answer(image, task).record() for image in images],
        "versions": runner.versions,
        "facts": runner.facts,
    }


def read_through(path: Path) -> None:
    """Have the files there in the page cache: all contestants' together are more than it holds."""
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            with file.open("rb", buffering=0) as opened:
                while opened.read(16 << 20):
                    pass


def peak_bytes() -> int | None:
    """The most that this process, or one that it started, had resident, mapped files included. None if not told."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return 1024 * max(int(found[1]), children) if found else None


if __name__ == "__main__":
    main()
