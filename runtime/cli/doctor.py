"""``tokprune doctor``: says which backends this machine has, and what the others lack."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
from typing import Any

import click

from tokprune.runtime.report import table
from tokprune.runtime.version import __version__

EXTRAS = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "safetensors", "sklearn", "sympy")


@click.command("doctor", epilog="Example: tokprune doctor --json")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(as_json: bool) -> None:
    """Say what this machine can run, and why it cannot run the rest."""
    result: dict[str, Any] = {
        "tokprune": __version__,
        "platform": {
            "system": platform.platform(),
            "machine": platform.machine(),
            "python": platform.python_version(),
            "cpus": os.cpu_count(),
        },
        "backends": [_onnxruntime()],
        "export": _export(),
    }
    if as_json:
        click.echo(json.dumps(result))
        return
    rows = [
        (item["name"], _yes(item["available"]), item["version"] or "-", item["reason"]) for item in result["backends"]
    ]
    rows.append(("export", _yes(result["export"]["available"]), "-", result["export"]["reason"]))
    click.echo(f"tokprune {__version__} on {platform.platform()}, Python {platform.python_version()}\n")
    click.echo(table(rows, ("", "available", "version", "")))


def _onnxruntime() -> dict[str, Any]:
    name = "onnxruntime-cpu"
    try:
        import onnxruntime
    except ImportError as error:
        return {
            "name": name,
            "available": False,
            "version": None,
            "reason": f"{error}: pip install onnxruntime",
        }
    providers = ", ".join(onnxruntime.get_available_providers())
    return {
        "name": name,
        "available": True,
        "version": onnxruntime.__version__,
        "reason": f"providers: {providers}",
    }


def _export() -> dict[str, Any]:
    missing = [name for name in EXTRAS if importlib.util.find_spec(name) is None]
    if missing:
        return {
            "available": False,
            "reason": f"{', '.join(missing)} not installed: pip install 'tokprune[export]'",
        }
    return {"available": True, "reason": "export, verify and demo-data can run"}


def _yes(value: bool) -> str:
    return "yes" if value else "no"
