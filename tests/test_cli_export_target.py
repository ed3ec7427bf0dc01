"""``tokprune export --target jetson-orin``: FP16 unless said otherwise, and what to do on the device."""

import pytest

from tokprune.runtime.bundle import open_bundle


@pytest.mark.parametrize(
    ("method", "options", "precision", "words"),
    [
        ("lofi", ["--target", "jetson-orin"], "fp16", "--target jetson-orin --plugins plugins/libtokprune_plugins.so"),
        ("none", ["--target", "jetson-orin"], "fp16", "on the Jetson: tokprune build bundle --target jetson-orin\n"),
        ("none", ["--target", "jetson-orin", "--precision", "fp32"], "fp32", "on the Jetson"),
        ("none", [], "fp32", None),
    ],
)
def test_target(call, traced, tiny_checkpoint, tmp_path, method, options, precision, words):
    rest = ["--rank", "4", "--layer", "1", "--keep", "4"] if method == "lofi" else []
    result = call("export", "--model", tiny_checkpoint, "--method", method, "--out", "bundle", *rest, *options)
    assert result.code == 0, result
    assert open_bundle(tmp_path / "bundle").manifest.precision == precision
    assert words is None or words in result.err
    assert ("Jetson:" in result.err) == (words is not None)
    assert ("build-plugins" in result.err) == (method == "lofi")
