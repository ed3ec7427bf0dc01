"""Makes what contestants run, once: checkpoint, images, bundles, conversions. Keeps what making took beside it."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from contest.contestants import QUANTIZED, Contestant, Pruning
from contest.jobs import Failed, run_command, run_job, say, size_bytes

HERE = Path(__file__).resolve().parent.parent
TOKPRUNE = [sys.executable, "-c", "from tokprune.runtime.cli import main; main()"]
WITHOUT_VISION = ("hf_onnx", "llama_peer")  # modules of peers that are given the prompt's embeddings
EMBEDDINGS = Contestant("embeddings", "embeddings", "fp32", "fp32")
CALIBRATION = range(1000, 1008)  # numbers of the images that nobody is asked about
SOURCES = ("runtime", "plugins", "calibration", "export")


class Workshop:
    """``work`` holds all that is made. ``model`` is a checkpoint's directory, None for the reference of that size."""

    def __init__(self, work: Path, model: Path | None, size: str, task: dict[str, Any], pythons: dict[str, str]):
        self.work, self.task, self._pythons = work, task, pythons
        self.checkpoint = model or self._reference(size)
        self.images: list[str] = []
        self._data = work / "calibration.jsonl"
        self._sources = digest(HERE.parent)

    def draw(self, count: int, pixels: int) -> None:
        """Images to be asked about, and questions about others to calibrate on."""
        folder = self.work / f"images-{pixels}"
        folder.mkdir(parents=True, exist_ok=True)
        self.images = [str(_drawn(folder, number, pixels)) for number in range(count)]
        lines = [
            {"image": str(_drawn(folder, number, pixels).relative_to(self.work)), "prompt": self.task["text"]}
            for number in CALIBRATION
        ]
        self._data.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

    def python(self, contestant: Contestant) -> str:
        """The interpreter that has its library. Raises Failed where none was named."""
        name = contestant.environment
        if not name:
            return sys.executable
        if name not in self._pythons:
            raise Failed(f"not installed: give --peer-python {name}=PATH of a Python that has it")
        return self._pythons[name]

    def job(self, contestant: Contestant, path: str, images: list[str]) -> dict[str, Any]:
        """What a worker is told; who does what with it adds ``do`` and ``to``."""
        module, options = f"contest.{contestant.module}", dict(contestant.options)
        if contestant.is_ours:
            options["engine"] = "auto" if options["graphs"] == "slot" else "onnxruntime"
        if contestant.module in WITHOUT_VISION:
            options["embeddings"] = str(self.work / "made" / "embeddings")
        return {"module": module, "path": path, "options": options, "images": images, "task": self.task}

    def prepare(self, contestant: Contestant) -> dict[str, Any]:
        """{path, key, seconds, cpu_s, peak_bytes, size_bytes} of all steps from the checkpoint. Raises Failed."""
        if contestant.module == "pytorch":
            size = size_bytes(self.checkpoint)
            none = {"seconds": 0.0, "cpu_s": 0.0, "peak_bytes": 0}
            return {"key": "", "path": str(self.checkpoint), "size_bytes": size, **none}
        if contestant.is_ours:
            return self._bundle(contestant)
        python, out = self.python(contestant), self.work / "made" / contestant.name
        if contestant.module in WITHOUT_VISION:
            self.prepare(EMBEDDINGS)
        if contestant.name == "openvino-bf16":  # the same file, without the hint
            out = out.with_name("openvino-fp32")

        def convert(to: Path) -> dict[str, Any]:
            job = self.job(contestant, str(self.checkpoint), self.images)
            return run_job(python, job | {"do": "convert", "to": str(to)}, self._log(out.name).with_suffix(".json"))

        return self._made(out, "", convert)

    def _bundle(self, contestant: Contestant) -> dict[str, Any]:
        pruning, precision = contestant.pruning, contestant.precision
        base = self._made(self.work / "made" / f"{pruning}-fp32", self._sources, lambda to: self._export(pruning, to))
        if precision != "fp32":
            asked = [word.format(data=self._data) for word in QUANTIZED[precision]]
            command = [*TOKPRUNE, "quantize", base["path"], *asked, "--out"]
            out = self.work / "made" / f"{pruning}-{precision}"
            mine = self._made(out, self._sources, lambda to: self._tokprune([*command, str(to)], out.name))
            base = _steps(base, mine)
        if contestant.options["graphs"] == "neutral":
            return base

        def build(to: Path) -> dict[str, Any]:
            shutil.copytree(base["path"], to, copy_function=_link)
            return self._tokprune([*TOKPRUNE, "build", str(to), "--target", "cpu"], to.name.lstrip("."))

        slot = self._made(self.work / "made" / f"{pruning}-{precision}-slot", self._sources, build)
        return _steps(base, slot)

    def _export(self, pruning: Pruning, to: Path) -> dict[str, Any]:
        command = [*TOKPRUNE, "export", "--model", str(self.checkpoint), "--method", pruning.method]
        if pruning.keep:
            command += ["--layer", str(pruning.layer), "--keep", str(pruning.keep)]
            command += ["--rank", str(pruning.options["rank"])]
        return self._tokprune([*command, "--precision", "fp32", "--out", str(to)], f"{pruning}-fp32")

    def _tokprune(self, command: list[str], name: str) -> dict[str, Any]:
        return run_command(command, self._log(name), self.task["threads"])

    def _made(self, out: Path, key: str, make: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        """What is at ``out``, made anew unless it is there, whole, from the same ``key``."""
        note = out.with_name(f"{out.name}.json")
        if note.exists() and out.exists():
            record = json.loads(note.read_text(encoding="utf-8"))
            if record["key"] == key:
                return record
        note.unlink(missing_ok=True)
        partial = out.with_name(f".{out.name}")
        for old in (out, partial):
            shutil.rmtree(old, ignore_errors=True)
        partial.parent.mkdir(parents=True, exist_ok=True)
        say(f"making {out.name}")
        took = make(partial)
        partial.rename(out)
        record = {"key": key, "path": str(out), "size_bytes": size_bytes(out)}
        record |= {name: took[name] for name in ("seconds", "cpu_s", "peak_bytes")}
        note.write_text(json.dumps(record), encoding="utf-8")
        return record

    def _reference(self, size: str) -> Path:
        out = self.work / f"checkpoint-{Path(size).stem}"
        if not out.exists():
            self.work.mkdir(parents=True, exist_ok=True)
            say(f"making {out.name}")
            command = [sys.executable, str(HERE / "make_checkpoint.py"), "--size", size, "--dtype", "float32"]
            run_command([*command, "--out", str(out)], self._log(out.name), self.task["threads"])
        return out

    def _log(self, name: str) -> Path:
        folder = self.work / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{name}.log"


def _drawn(folder: Path, number: int, pixels: int) -> Path:
    """An image of blurred noise; no two numbers have the same: a prefix cache would find nothing."""
    file = folder / f"{number}.png"
    if not file.exists():
        coarse = np.random.default_rng(number).integers(0, 256, (12, 12, 3), dtype=np.uint8)
        partial = file.with_suffix(".partial")
        Image.fromarray(coarse).resize((pixels, pixels), Image.Resampling.BICUBIC).save(partial, "PNG")
        partial.rename(file)
    return file


def _steps(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Two steps' record: what is left is the second's, what it took both."""
    peak = max(first["peak_bytes"], second["peak_bytes"])
    return second | {key: first[key] + second[key] for key in ("seconds", "cpu_s")} | {"peak_bytes": peak}


def _link(source: str, target: str) -> None:
    Path(target).hardlink_to(source)


def digest(root: Path) -> str:
    """Of the sources that write bundles: other sources, other bundles."""
    found = hashlib.sha256()
    for file in sorted(path for folder in SOURCES for path in (root / folder).rglob("*.py")):
        found.update(file.read_bytes())
    return found.hexdigest()
