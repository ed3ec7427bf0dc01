"""The tests' own exports of graphs that were traced before: the bundle is, to the byte, that of tracing them anew."""

import pytest
from conftest import PLANS
from traces import SharedGraphs

from tokprune.export import pipeline
from tokprune.export.checkpoint import find_checkpoint


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_bundles_are_the_same(tiny_checkpoint, tiny_bundle, graphs_folder, tmp_path, monkeypatch, precision):
    checkpoint, plan = find_checkpoint(str(tiny_checkpoint)), PLANS["fastv"]
    pipeline.export(checkpoint, plan, tmp_path / "anew", precision=precision)
    tiny_bundle("fastv", precision)  # traced by whichever process, from here on in files

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("everything was traced before")

    for name in ("trace_vision", "trace_embed", "trace_decoder"):
        monkeypatch.setattr(pipeline, name, refuse)
    SharedGraphs(graphs_folder).export(checkpoint, plan, tmp_path / "read", precision=precision)
    anew, read = ({file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("anew", "read"))
    assert anew == read
