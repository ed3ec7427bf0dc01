"""What engines can be built for here: by the libraries and the GPU that are there, or are put in their place."""

from __future__ import annotations

import sys

import fake_tensorrt
import pytest

from tokprune.runtime import UserError
from tokprune.runtime.engines import targets
from tokprune.runtime.engines.targets import find_target


class TestTargets:
    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("jetson-orin", "tensorrt not found .* on the Jetson itself, after sudo apt install python3-libnvinfer"),
            ("datacenter", r"tensorrt not found .* with the GPU, after pip install 'tokprune\[gpu\]'"),
        ],
    )
    def test_without_tensorrt(self, name, words):
        with pytest.raises(UserError, match=words):
            find_target(name)

    def test_auto_without_tensorrt(self):
        assert find_target("auto") == find_target("rtx")

    def test_auto_without_anything(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "tensorrt_rtx_bindings", None)
        with pytest.raises(UserError, match=r"no engine can be built here: tensorrt was .*; or tensorrt-rtx was"):
            find_target("auto")

    @pytest.mark.parametrize(
        ("capability", "fits", "other"), [((8, 7), "jetson-orin", "datacenter"), ((9, 0), "datacenter", "jetson-orin")]
    )
    def test_with_tensorrt_and_a_gpu(self, monkeypatch, capability, fits, other):
        trt = fake_tensorrt.install(monkeypatch, fake_tensorrt.FakeCuda(capability))
        trt.__spec__ = object()  # what makes Python find it
        monkeypatch.setattr(targets.compiler, "version", lambda library: "10.3.0.26")
        arch = f"sm{capability[0]}{capability[1]}"
        assert find_target("auto").slot == f"tensorrt-10.3.0-{arch}"
        assert find_target(fits).has_gpu
        with pytest.raises(UserError, match=f"--target {other} was given, .* is {arch}: give --target {fits}"):
            find_target(other)
