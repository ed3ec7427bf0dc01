"""What export takes at full size, whether NVIDIA's parser reads the graphs, and parity over the first layers.

    python benchmarks/full_size.py --size 7b --work DIR                         # FP16, 14 GB of checkpoint
    python benchmarks/full_size.py --size 13b --work DIR --layers 0             # export and parser only
    python benchmarks/full_size.py --size 7b --work DIR --precision fp32        # 28 GB more: weights are converted

A seeded random checkpoint is made in DIR unless it is there. Export runs in a process of its own, which is measured:
wall time, peak resident memory, and how much less room the disk has afterwards. Wall time depends on what else runs;
the peak and the disk do not. One JSON line at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from tokprune.export.demo.scenes import demo_data
from tokprune.runtime.bundle import read_manifest
from tokprune.runtime.engines import compiler

HERE = Path(__file__).parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="7b", help="7b, 13b, or a JSON file (see make_checkpoint.py)")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--precision", choices=("fp16", "fp32"), default="fp16")
    parser.add_argument("--layers", type=int, default=4, help="of the few-layer check; 0 leaves it out")
    parser.add_argument("--samples", type=int, default=2)
    arguments = parser.parse_args()
    name = Path(arguments.size).stem
    checkpoint, bundle = arguments.work / name, arguments.work / f"{name}-lofi-{arguments.precision}"
    if not checkpoint.exists():
        _run([sys.executable, str(HERE / "make_checkpoint.py"), "--size", arguments.size, "--out", str(checkpoint)])
    result: dict[str, Any] = {"size": name, "precision": arguments.precision}
    result["export"] = _export(checkpoint, bundle, arguments.precision)
    result["parser"] = _parse(bundle)
    if arguments.layers:
        result["few_layers"] = _verify(checkpoint, bundle, arguments)
    print(json.dumps(result))
    return 0 if all(graph["accepted"] for graph in result["parser"].values()) else 1


def _export(checkpoint: Path, bundle: Path, precision: str) -> dict[str, float]:
    shutil.rmtree(bundle, ignore_errors=True)
    os.sync()
    free, began = shutil.disk_usage(checkpoint).free, time.monotonic()
    command = [sys.executable, "-c", "from tokprune.runtime.cli import main_export; main_export()"]
    options = ["--model", str(checkpoint), "--method", "lofi", "--precision", precision, "--out", str(bundle)]
    process = subprocess.Popen([*command, *options])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"export ended with {os.waitstatus_to_exitcode(status)}")
    seconds = time.monotonic() - began
    os.sync()
    return {
        "seconds": round(seconds, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_rss_mb": round(usage.ru_maxrss / 1024),
        "disk_mb": round((free - shutil.disk_usage(checkpoint).free) / 1e6, 1),
    }


def _parse(bundle: Path) -> dict[str, dict[str, Any]]:
    found = {}
    for segment in read_manifest(bundle).segments:
        report = compiler.parse(bundle / segment.file)
        found[segment.name] = {
            "accepted": report.accepted,
            "seconds": round(report.seconds, 2),
            "refusals": [str(refusal) for refusal in report.refusals],
        }
    return found


def _verify(checkpoint: Path, bundle: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    data = arguments.work / f"questions-{arguments.samples}"
    if not data.exists():
        demo_data(arguments.samples, data, 3)
    command = [sys.executable, "-c", "from tokprune.runtime.cli import main; main()", "verify", str(bundle)]
    command += ["--reference", str(checkpoint), "--layers", str(arguments.layers), "--data", str(data / "data.jsonl")]
    command += ["--max-new-tokens", "3", "--spectrum-samples", "0", "--json"]
    parity = json.loads(_run(command))["parity"]
    keys = ("samples", "max_rel_logit_diff", "greedy_agreement", "kept_equal", "kept_equal_margin", "kept_overlap")
    return {"layers": arguments.layers, **{key: parity[key] for key in keys}}


def _run(command: list[str]) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    sys.exit(main())
