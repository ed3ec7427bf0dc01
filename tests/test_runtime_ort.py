"""ONNX Runtime's engines: what they need, what they are told, and outputs that stay in a device's memory.

There is no GPU here, so CUDA's path runs with the host as the device.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tokprune.runtime import UserError, ort
from tokprune.runtime.bundle import open_bundle
from tokprune.runtime.chat import load
from tokprune.runtime.making import NO_FLASH, making_sessions
from tokprune.runtime.pipeline import Meter
from tokprune.runtime.session import make_backend


def logits(path: Path) -> np.ndarray:
    pipeline = load(path, engine="onnxruntime").pipeline
    features = np.random.default_rng(1).standard_normal((1, 16, 64)).astype(np.float32)
    state = pipeline.new_state()
    found, _ = pipeline.forward(state, [[0, 7, *[3] * 16, 9]], Meter(), image_features=features)
    return np.concatenate([found, pipeline.forward(state, [[20]], Meter())[0]])


def test_bound_outputs_are_what_copied_ones_are(tiny_bundle, monkeypatch):
    expected = logits(tiny_bundle("lofi"))
    calls = []

    def bound(session, feeds, outputs, spare):
        calls.append(outputs)
        return dict(zip(outputs, ort.run_bound(session._session, feeds, outputs, "cpu"), strict=True))

    monkeypatch.setattr(ort._Session, "run", bound)
    np.testing.assert_array_equal(logits(tiny_bundle("lofi")), expected)
    assert len(calls) == 4 + 3  # prefill without the tower, and a step without the selector


@pytest.mark.parametrize(
    ("engine", "provider"),
    [("onnxruntime-cuda", "CUDAExecutionProvider"), ("onnxruntime-tensorrt", "TensorrtExecutionProvider")],
)
class TestProviders:
    def test_missing(self, tiny_bundle, engine, provider):
        with pytest.raises(UserError, match=rf"'{engine}' needs ONNX Runtime's {provider}, this one has .*CPU.*: pip"):
            load(tiny_bundle("none"), engine=engine)

    @pytest.mark.filterwarnings("ignore:Specified provider")
    def test_that_does_not_start(self, tiny_bundle, tmp_path, monkeypatch, engine, provider):
        """ONNX Runtime goes on with the CPU; we do not."""
        monkeypatch.setattr("onnxruntime.get_available_providers", lambda: [provider, "CPUExecutionProvider"])
        path = shutil.copytree(tiny_bundle("none"), tmp_path / "bundle")  # the provider's cache has a folder there
        with pytest.raises(UserError, match=f"{provider} did not start, CPUExecutionProvider would run vision_encoder"):
            load(path, engine=engine)


def test_the_tensorrt_providers_cache_has_a_parent(tiny_bundle, tmp_path, monkeypatch):
    """The provider makes one directory, not those above it."""
    path = shutil.copytree(tiny_bundle("lofi"), tmp_path / "bundle")
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: [ort.TENSORRT])
    bundle = open_bundle(path)
    segment = bundle.manifest.segment("decoder_1")
    options = ort.OnnxRuntime("onnxruntime-tensorrt")._provider_options(ort.TENSORRT, bundle, segment)
    assert Path(options["trt_engine_cache_path"]).parent.is_dir()
    assert ort.OnnxRuntime("onnxruntime-tensorrt")._provider_options(ort.CUDA, bundle, segment) == {}


def test_options_of_the_tensorrt_provider(tiny_bundle):
    """Its profiles are those that our own engines have, both of them for a decoder."""
    bundle = open_bundle(tiny_bundle("lofi"))
    options = ort.provider_options(bundle, bundle.manifest.segment("decoder_1"), Path("plugins.so"))
    assert options["trt_extra_plugin_lib_paths"] == "plugins.so"
    shapes = [options[f"trt_profile_{which}_shapes"].split(",") for which in ("min", "opt", "max")]
    assert "hidden_states:1x1x64" in shapes[0]
    assert shapes[0].count("past_key_values.1.key:1x2x0x16") == 1
    assert shapes[0].count("past_key_values.1.key:1x2x1x16") == 1
    assert "hidden_states:1x42x64" in shapes[1]
    assert "hidden_states:4x128x64" in shapes[2]
    assert len(set(map(len, shapes))) == 1
    assert options["trt_fp16_enable"] == "0"
    tower = ort.provider_options(bundle, bundle.manifest.segment("vision_encoder"), None)
    assert "trt_extra_plugin_lib_paths" not in tower
    assert tower["trt_profile_min_shapes"] == "pixel_values:1x3x56x56"


@pytest.mark.parametrize("engine", ["auto", "onnxruntime", "onnxruntime-cuda", "tensorrt"])
def test_plugins_for_an_engine_that_takes_none(tiny_bundle, engine):
    with pytest.raises(UserError, match=f"--plugins was given with engine '{engine}': it is for onnxruntime-tensorrt"):
        make_backend(engine, open_bundle(tiny_bundle("none")), plugins=Path("x.so"))


def test_without_onnxruntime(tiny_bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"engine 'auto' needs onnxruntime, which is not there .*: pip install"):
        load(tiny_bundle("none"))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_freed_blocks_go_back_to_the_system_while_sessions_are_made():
    """Blocks of 8 MB, every other one freed, after glibc has seen one freed and would raise its threshold."""
    code = """
import ctypes
from tokprune.runtime.making import making_sessions
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
def block():
    found = libc.malloc(8 << 20)
    ctypes.memset(found, 1, 8 << 20)
    return found
libc.free(block())
with making_sessions():
    before = resident()
    blocks = [block() for _ in range(16)]
    full = resident()
    for each in blocks[::2]:
        libc.free(each)
    print((full - resident()) / (full - before))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(("flash", "value"), [(False, "1"), (True, "0")])
def test_the_form_of_attention_stays_until_the_last_session_is_made(flash, value, monkeypatch):
    monkeypatch.delenv(NO_FLASH, raising=False)
    with making_sessions(flash):
        with making_sessions(not flash):
            assert os.environ[NO_FLASH] == value
        assert os.environ[NO_FLASH] == value
    assert NO_FLASH not in os.environ
    monkeypatch.setenv(NO_FLASH, "0")
    with making_sessions():
        assert os.environ[NO_FLASH] == "0"
    assert os.environ[NO_FLASH] == "0"
