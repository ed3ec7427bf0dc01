"""The GPU's memory and facts, with a GPU that is not there (``fake_tensorrt``)."""

from __future__ import annotations

import os

import fake_tensorrt
import numpy as np
import pytest
from fake_cuda import FakeCuda

from tokprune.runtime import UserError
from tokprune.runtime.engines import cuda


@pytest.fixture
def trt(monkeypatch) -> fake_tensorrt.FakeTensorRt:
    return fake_tensorrt.install(monkeypatch)


class TestMemory:
    def test_a_dropped_tensor_gives_its_memory_to_the_next(self, trt):
        memory = cuda.Memory()
        one = memory.upload(np.arange(100.0))
        address = one.address
        np.testing.assert_array_equal(memory.download(one), np.arange(100.0))
        other = memory.upload(np.arange(100.0))
        assert other.address != address
        del one
        assert memory.upload(np.arange(90.0)).address == address  # of the same power of two
        assert memory.held_bytes == 2 * 1024

    def test_what_lies_unused_is_given_back_before_memory_is_short(self, monkeypatch):
        trt = fake_tensorrt.install(monkeypatch, FakeCuda(limit=10_000))
        memory = cuda.Memory()
        kept = memory.empty((500,), np.dtype(np.float32))
        memory.empty((1000,), np.dtype(np.float32))  # dropped at once
        assert (memory.held_bytes, trt.cuda.free_bytes) == (2048 + 4096, 10_000 - 2048 - 4096)
        memory.empty((7000,), np.dtype(np.uint8), room=7000)
        assert (memory.held_bytes, trt.cuda.free_bytes) == (2048 + 7000, 10_000 - 2048 - 7000)
        assert kept.address in trt.cuda.memory
        with pytest.raises(UserError, match=r"the GPU has no 0\.0 MB left beside the 0\.0 MB"):
            memory.empty((9000,), np.dtype(np.uint8), room=9000)

    def test_host_memory_is_read_before_it_may_go(self, trt):
        """CUDA may read pageable memory after the call returns: nothing is under way when `upload` does."""
        memory = cuda.Memory()
        trt.cuda.synchronized = 0
        memory.upload(np.arange(10.0))
        assert trt.cuda.synchronized == 1

    def test_empty_tensors_have_addresses(self, trt):
        tensor = cuda.Memory().upload(np.empty((1, 2, 0, 4), np.float32))
        assert tensor.address
        assert tensor.nbytes == 0


def test_a_gpu_that_is_full(trt):
    trt.cuda.handle.cudaMemGetInfo = lambda free, total: 2
    with pytest.raises(UserError, match=r"CUDA cannot start on it \(error 2, no memory\): close what else uses it"):
        cuda.find_gpu()


def test_gpu_of_an_orin(trt):
    gpu = cuda.find_gpu()
    assert (gpu.arch, gpu.processors, gpu.free_bytes) == ("sm87", 16, trt.cuda.limit)
    assert cuda.find_capability() == gpu.capability
    assert gpu.peak_tflops == pytest.approx(42.6, abs=0.05)  # AGX Orin 64, FACTS: 64 tensor cores, 1.30 GHz
    assert cuda.Gpu((8, 6), 84, 1.7, 0).peak_tflops is None
    assert cuda.Gpu((8, 0), 108, 1.41, 0).peak_tflops == pytest.approx(312, abs=0.5)


@pytest.mark.parametrize("before", [None, "/some/where"])
def test_cuda_of_a_wheel_is_found(monkeypatch, tmp_path, before):
    """CUDA 13's wheels have it where Polygraphy does not look; the environment stays as it was."""
    (tmp_path / "nvidia" / "cu13" / "lib").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    if before is not None:
        monkeypatch.setenv("LD_LIBRARY_PATH", before)
    seen = []
    monkeypatch.setattr("polygraphy.cuda.wrapper", lambda: seen.append(os.environ["LD_LIBRARY_PATH"].split(os.pathsep)))
    cuda._runtime()
    assert str(tmp_path / "nvidia" / "cu13" / "lib") in seen[0]
    assert ("/some/where" in seen[0]) == (before is not None)
    assert os.environ.get("LD_LIBRARY_PATH") == before
