"""Runs one job in a process of its own, in a contestant's environment; keeps its result, its log and what it took."""

from __future__ import annotations

import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tokprune.runtime.device import memory_facts

WORKER = Path(__file__).with_name("worker.py")
TIMEOUT_S = 900


class Failed(Exception):
    """A job, or a command, that did not end well; the text is the row's reason."""


def say(text: str) -> None:
    """Progress, on stderr."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def run_job(python: str, job: dict[str, Any], result: Path) -> dict[str, Any]:
    """The worker's result, also in the file ``result``, beside the log. Raises Failed."""
    result.parent.mkdir(parents=True, exist_ok=True)
    given = result.with_suffix(".job")
    given.write_text(json.dumps(job), encoding="utf-8")
    command = [python, str(WORKER), str(given), str(result)]
    run_command(command, result.with_suffix(".log"), job["task"]["threads"], passive=job["do"] != "measure")
    return json.loads(result.read_text(encoding="utf-8"))


def run_command(command: list[str], log: Path, threads: int, *, passive: bool = True) -> dict[str, Any]:
    """Run to the end: {seconds, cpu_s, peak_bytes, output}. Raises Failed with the last line that it said.

    ``passive`` OpenMP threads do not spin while they wait, which is slower, and kinder where others work too.
    """
    environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    if passive:
        environment["OMP_WAIT_POLICY"] = "PASSIVE"
    # nothing is fetched, and each library has as many threads as the others
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
    environment |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    begin, output = time.perf_counter(), log.with_suffix(".out")
    with log.open("w", encoding="utf-8") as errors, output.open("w", encoding="utf-8") as said:
        try:
            process = subprocess.Popen(command, stdout=said, stderr=errors, env=environment)
        except OSError as error:
            raise Failed(f"{command[0]} does not start ({error})") from None
        status, taken = _wait(process)
    seconds = time.perf_counter() - begin
    if status is None:
        raise Failed(f"was stopped after {TIMEOUT_S} s")
    if status < 0:
        raise Failed(f"was ended by {signal.Signals(-status).name}")
    if status:
        lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        raise Failed(lines[-1].strip()[:300] if lines else f"ended with {status}")
    return {"seconds": seconds, **taken, "output": output.read_text(encoding="utf-8")}


def _wait(process: subprocess.Popen[bytes]) -> tuple[int | None, dict[str, float]]:
    """(exit status, None if it took too long; {cpu_s, peak_bytes} of it and of the processes that it waited for)."""
    until = time.perf_counter() + TIMEOUT_S
    try:
        while time.perf_counter() < until:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                process.returncode = os.waitstatus_to_exitcode(status)  # it is gone: nobody is to wait again
                taken = {"cpu_s": usage.ru_utime + usage.ru_stime, "peak_bytes": 1024 * usage.ru_maxrss}
                return process.returncode, taken
            time.sleep(0.02)
    except BaseException:
        process.kill()
        raise
    process.kill()
    process.wait()
    return None, {}


def size_bytes(path: Path, without: tuple[str, ...] = ()) -> int:
    """Bytes of a file, or of all files below a directory."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file() and file.name not in without)


def host(load: float) -> dict[str, Any]:
    """This machine, and how busy it was: ``load`` is the mean of a minute before the first round."""
    cpu = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": cpu[1] if cpu else platform.processor(),
        "memory": memory_facts().get("MemTotal"),
        "python": platform.python_version(),
        "load": round(load, 2),
    }
