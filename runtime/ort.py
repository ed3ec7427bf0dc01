"""ONNX Runtime behind the runtime's sessions: on the CPU, the default on every machine, or by CUDA or TensorRT.

Selectors run as the standard operators that their graphs hold, by every provider: ONNX Runtime knows plugins under a
domain of its own only, which ours are not in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tokprune.runtime.bundle import Bundle
from tokprune.runtime.engines.profiles import segment_profiles
from tokprune.runtime.engines.slot import FOLDER as ENGINES
from tokprune.runtime.errors import UserError
from tokprune.runtime.manifest import SegmentFacts

CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
# engine: the provider that must run it, those behind it for what it leaves, the memory that tensors are in
_PROVIDERS = {
    "onnxruntime": ((CPU,), "cpu"),
    "onnxruntime-cuda": ((CUDA, CPU), "cuda"),
    "onnxruntime-tensorrt": ((TENSORRT, CUDA, CPU), "cuda"),
}

# ONNX Runtime joins DequantizeLinear and MatMul to a product of its own. Level 1 computes it in FP32, 4 rounds the
# activations to INT8 as well, BLOCK of them to a scale: with INT8 weights that decodes 7 times as fast as FP32, and
# level 1, for which ONNX Runtime 1.31 has no kernel, 14 times as slowly. INT4 has one, and stays exact
# (docs/methods.md).
ACCURACY = {"fp32": 1, "fp16": 1, "int8": 4, "int4": 1}
BLOCK = 128
INTEGER = f"ONNX Runtime may round what INT8 matrices are multiplied with to INT8 as well, {BLOCK} values to a scale"

MIXED = "the TensorRT provider may compute in FP16 what an FP16 bundle's graphs have in FP32, layer norms excepted"


class OnnxRuntime:
    """ONNX Runtime with the providers of one of its engines."""

    def __init__(
        self,
        engine: str = "onnxruntime",
        *,
        threads: int = 0,
        plugins: Path | None = None,
        remarks: tuple[str, ...] = (),
    ) -> None:
        """``threads`` 0 leaves the number to ONNX Runtime: one for each physical core.

        Raises ImportError, or UserError if the engine's provider is not in this ONNX Runtime.
        """
        import onnxruntime

        self._ort = onnxruntime
        self._providers, self._device = _PROVIDERS[engine]
        available = onnxruntime.get_available_providers()
        if self._providers[0] not in available:
            raise UserError(
                f"engine '{engine}' needs ONNX Runtime's {self._providers[0]}, this one has {', '.join(available)}: "
                "pip install onnxruntime-gpu in place of onnxruntime (on a Jetson, NVIDIA's own wheel of it)"
            )
        self.name = f"onnxruntime-{onnxruntime.__version__}-{engine.removeprefix('onnxruntime').strip('-') or 'cpu'}"
        self.remarks = remarks + ((MIXED,) if self._providers[0] == TENSORRT else ())
        self.peak_tflops: float | None = None
        self._plugins = plugins
        self._threads = threads

    def load(self, bundle: Bundle, segment: SegmentFacts) -> _Session:
        path = bundle.file(segment.file)
        providers = [(name, self._provider_options(name, bundle, segment)) for name in self._providers]
        if ACCURACY[bundle.manifest.precision] == 4 and INTEGER not in self.remarks:
            self.remarks += (INTEGER,)
        try:
            options = self._options(bundle.manifest.precision)
            session = self._ort.InferenceSession(path, options, providers=providers)
        except Exception as error:  # ONNX Runtime's exceptions have no narrower base
            raise UserError(f"ONNX Runtime cannot load {path} ({error}): export the bundle again") from error
        if self._providers[0] not in session.get_providers():  # it goes on without one that does not start
            raise UserError(
                f"ONNX Runtime's {self._providers[0]} did not start, {', '.join(session.get_providers())} would run "
                f"{segment.name} instead: install the CUDA, cuDNN or TensorRT libraries that it names above"
            )
        return _Session(session, path, self._device)

    def _options(self, precision: str) -> Any:
        options = self._ort.SessionOptions()
        # Each session has threads of its own. Left spinning after a run, they take the cores from the next segment's:
        # on two cores everything was 2.5 times slower (docs/log.md).
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", str(ACCURACY[precision]))
        options.add_session_config_entry("session.qdq_matmulnbits_block_size", str(BLOCK))
        options.intra_op_num_threads = self._threads
        options.log_severity_level = 3  # errors; what they say reaches the user as an exception
        return options

    def _provider_options(self, provider: str, bundle: Bundle, segment: SegmentFacts) -> dict[str, str]:
        if provider != TENSORRT:
            return {}
        (bundle.path / ENGINES).mkdir(exist_ok=True)  # the provider makes its cache's own directory, no parent
        return provider_options(bundle, segment, self._plugins)

    def to_device(self, array: np.ndarray) -> Any:
        return self._ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), self._device, 0)

    def to_host(self, tensor: Any) -> np.ndarray:
        return tensor.numpy()

    def shape(self, tensor: Any) -> tuple[int, ...]:
        return tuple(tensor.shape())

    def place(self, states: Any, rows: np.ndarray, features: Any) -> Any:
        host = self.to_host(states).copy()  # ONNX Runtime copies no part of a tensor
        host.reshape(-1, host.shape[-1])[rows] = self.to_host(features)
        return self.to_device(host)


class _Session:
    def __init__(self, session: Any, path: Path, device: str) -> None:
        self._session, self._path, self._device = session, path, device

    def run(self, feeds: Mapping[str, Any], outputs: Sequence[str], spare: int = 0) -> dict[str, Any]:
        try:
            if self._device == "cpu":
                values = self._session.run_with_ort_values(list(outputs), dict(feeds))
            else:
                values = run_bound(self._session, feeds, outputs, self._device)
        except Exception as error:  # as above; what is fed follows from the manifest, so the graph is another one
            raise UserError(f"ONNX Runtime cannot run {self._path} ({error}): export the bundle again") from error
        return dict(zip(outputs, values, strict=True))


def run_bound(session: Any, feeds: Mapping[str, Any], outputs: Sequence[str], device: str) -> list[Any]:
    """Run with outputs left in the memory of ``device``: without a binding they would come to the host."""
    binding = session.io_binding()
    for name, value in feeds.items():
        binding.bind_ortvalue_input(name, value)
    for name in outputs:
        binding.bind_output(name, device, 0)
    session.run_with_iobinding(binding)
    binding.synchronize_outputs()
    return binding.get_outputs()


def provider_options(bundle: Bundle, segment: SegmentFacts, plugins: Path | None) -> dict[str, str]:
    """Options of the TensorRT provider: our profiles, its own cache of engines in the bundle, the plugins' library.

    The provider's networks are not strongly typed, so FP16 has to be allowed (MIXED).
    """
    cache = bundle.path / ENGINES / "onnxruntime-tensorrt"
    fp16 = "1" if bundle.manifest.base == "fp16" else "0"
    options = {
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(cache),
        "trt_engine_cache_prefix": segment.name,
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(cache),
        "trt_fp16_enable": fp16,
        "trt_layer_norm_fp32_fallback": fp16,
    }
    profiles = segment_profiles(bundle.manifest, segment).values()
    for which, key in enumerate(("min", "opt", "max")):
        shapes = [f"{name}:{'x'.join(map(str, ranges[which]))}" for each in profiles for name, ranges in each.items()]
        options[f"trt_profile_{key}_shapes"] = ",".join(shapes)
    if plugins is not None:
        options["trt_extra_plugin_lib_paths"] = str(plugins)
    return options
