"""Commands in the workflow and on the page about verification: verbs and options exist, values are of their types."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from tokprune.runtime.cli import load_verb

DOCS = Path(__file__).resolve().parent.parent / "docs"
WORKFLOW = yaml.safe_load((DOCS / "examples" / "verify.yml").read_text(encoding="utf-8"))
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", (DOCS / "verification.md").read_text(encoding="utf-8"), re.DOTALL)


def commands(script: str) -> list[list[str]]:
    """tokprune's own lines of a shell script; what is behind ``>`` or ``||`` is the shell's."""
    found = []
    for line in script.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words and words[0] in ("tokprune", "tokprune-export"):
            ends = [at for at, word in enumerate(words) if word in (">", "||")]
            found.append(words[: min(ends, default=len(words))])
    return found


def options(words: list[str]) -> dict:
    """What the command makes of ``words``; raises click's own exceptions for unknown options and bad values."""
    verb, args = ("export", words[1:]) if words[0] == "tokprune-export" else (words[1], words[2:])
    return load_verb(verb).make_context(verb, args).params


STEPS = WORKFLOW["jobs"]["verify"]["steps"]
SCRIPTS = [
    *(step["run"] for step in STEPS if "run" in step),
    *(text for kind, text in BLOCKS if kind in ("", "sh")),
    *(line for kind, text in BLOCKS if kind == "yaml" for line in yaml.safe_load(text)["verify"]["script"]),
]


@pytest.mark.parametrize("words", [words for script in SCRIPTS for words in commands(script)], ids=" ".join)
def test_the_command_line_takes_it(words):
    options(words)


def test_the_workflow_is_a_gate_that_keeps_its_reports():
    (verify,) = [words for step in STEPS for words in commands(step.get("run", "")) if words[1] == "verify"]
    taken = options(verify)
    limits = ("min_agreement", "max_kl", "max_logit_diff", "min_greedy_agreement")
    assert all(taken[name] is not None for name in limits)
    (upload,) = [step for step in STEPS if "upload-artifact" in step.get("uses", "")]
    assert upload["with"]["path"].split() == [str(taken["html"]), str(taken["junit"])]
    assert upload["if"] == "${{ !cancelled() }}"  # a failed gate ends the steps that do not say so


def test_its_steps_find_what_those_before_have_written():
    data, export, verify = (options(words) for step in STEPS for words in commands(step.get("run", "")))
    assert verify["bundle"] == export["out"]
    assert verify["data"] == data["out"] / "data.jsonl"
    assert verify["reference"] == export["model"] == "$MODEL"
    assert WORKFLOW["jobs"]["verify"]["runs-on"] == "ubuntu-latest"
