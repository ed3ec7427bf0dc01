"""ONNX Runtime behind the runtime's sessions: on the CPU, the default on every machine, or by CUDA or TensorRT.

Selectors run as the standard operators that their graphs hold, by every provider: ONNX Runtime knows plugins under a
domain of its own only, which ours are not in.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from tokprune.runtime.bundle import Bundle
from tokprune.runtime.engines.fused import Found, FusedDecoder, find_fused
from tokprune.runtime.engines.profiles import segment_profiles
from tokprune.runtime.engines.slot import FOLDER as ENGINES
from tokprune.runtime.errors import UserError
from tokprune.runtime.making import making_sessions
from tokprune.runtime.manifest import SegmentFacts
from tokprune.runtime.recipe import Recipe, Record, read_recipe, segment_of
from tokprune.runtime.session import ONNXRUNTIME, Session

CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
# engine: the provider that must run it, those behind it for what it leaves, the memory that tensors are in
_PROVIDERS = {
    ONNXRUNTIME: ((CPU,), "cpu"),
    "onnxruntime-neutral": ((CPU,), "cpu"),
    "onnxruntime-cuda": ((CUDA, CPU), "cuda"),
    "onnxruntime-tensorrt": ((TENSORRT, CUDA, CPU), "cuda"),
}

# ONNX Runtime joins DequantizeLinear and MatMul to a product of its own. Level 1 computes it in FP32, 4 rounds the
# activations to INT8 as well, BLOCK of them to a scale: with INT8 weights that decodes 7 times as fast as FP32, and
# level 1, for which ONNX Runtime 1.31 has no kernel, 14 times as slowly. INT4 has one, and stays exact
# (docs/methods.md). The level is a segment's: one INT8 matrix in it, and INT4 beside it is computed so too. Fused
# graphs have such products already, all at level 4 (export/fusion/blocks.py).
ACCURACY = {"int8": 4, "int4": 1}
BLOCK = 128
INTEGER = (
    f"ONNX Runtime may round what INT8 matrices are multiplied with to INT8 as well, {BLOCK} values to a scale; and "
    "what INT4 matrices are multiplied with, in segments that have both and in fused graphs"
)

MIXED = "the TensorRT provider may compute in FP16 what an FP16 bundle's graphs have in FP32, layer norms excepted"


def open_onnxruntime(
    bundle: Bundle, engine: str, *, threads: int = 0, plugins: Path | None = None, remarks: tuple[str, ...] = ()
) -> OnnxRuntime:
    """The backend for ``bundle``, with the graphs of its slot if ``engine`` takes them and it fits; it says why not.

    Raises ImportError, or UserError as `OnnxRuntime` does.
    """
    import onnxruntime

    slot, reasons = find_fused(bundle, onnxruntime.__version__) if engine == ONNXRUNTIME else (None, ())
    return OnnxRuntime(engine, threads=threads, plugins=plugins, remarks=remarks + reasons, slot=slot)


class OnnxRuntime:
    """ONNX Runtime with the providers of one of its engines."""

    def __init__(
        self,
        engine: str = "onnxruntime",
        *,
        threads: int = 0,
        plugins: Path | None = None,
        remarks: tuple[str, ...] = (),
        slot: Found | None = None,
    ) -> None:
        """``threads`` 0 leaves the number to ONNX Runtime: one for each physical core. ``slot`` has graphs to prefer.

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
        kind = "cpu" if self._providers == (CPU,) else engine.removeprefix("onnxruntime-")
        self.name = f"onnxruntime-{onnxruntime.__version__}-{kind}{'' if slot is None else ', fused graphs'}"
        self.remarks = remarks + ((MIXED,) if self._providers[0] == TENSORRT else ())
        self.peak_tflops: float | None = None
        self._plugins = plugins
        self._threads = threads
        self._slot = slot
        self._flash = slot is not None and slot.flash
        self._recipes: dict[Path, Recipe | None] = {}

    def load_all(self, bundle: Bundle, segments: Sequence[SegmentFacts]) -> list[Session]:
        """On a CPU as many at once as there are threads: to pack weights is a core's work, and memory's."""
        for segment in segments:
            self._remark(bundle, segment)
        threads = self._threads or os.cpu_count() or 1
        with making_sessions(self._flash), ThreadPoolExecutor(threads if self._device == "cpu" else 1) as pool:
            return list(pool.map(lambda segment: self.load(bundle, segment), segments))

    def load(self, bundle: Bundle, segment: SegmentFacts) -> Session:
        self._remark(bundle, segment)
        fused = None if self._slot is None else self._slot.graph(segment.name)
        path = fused or bundle.file(segment.file)
        providers = [(name, self._provider_options(name, bundle, segment)) for name in self._providers]
        options = self.segment_options(bundle, segment)
        try:
            model: Path | bytes = path
            if fused is not None:  # its weights are the bundle's, which only a graph from memory may have elsewhere
                options.add_session_config_entry(
                    "session.model_external_initializers_file_folder_path", str(bundle.path)
                )
                model = fused.read_bytes()
            with making_sessions(self._flash):
                session = self._ort.InferenceSession(model, options, providers=providers)
        except Exception as error:  # ONNX Runtime's exceptions have no narrower base
            again = "export the bundle again" if fused is None else "build the slot again with tokprune build"
            raise UserError(f"ONNX Runtime cannot load {path} ({error}): {again}") from error
        if self._providers[0] not in session.get_providers():  # it goes on without one that does not start
            raise UserError(
                f"ONNX Runtime's {self._providers[0]} did not start, {', '.join(session.get_providers())} would run "
                f"{segment.name} instead: install the CUDA, cuDNN or TensorRT libraries that it names above"
            )
        if fused is not None and segment.layers is not None:
            return FusedDecoder(self._ort, session, segment, path)
        return _Session(session, path, self._device)

    def _remark(self, bundle: Bundle, segment: SegmentFacts) -> None:
        is_fused = self._slot is not None and self._slot.graph(segment.name) is not None
        exact = all(record.activation is not None for record in self._rounded(bundle, segment))
        rounds = not exact if is_fused else _accuracy(self._rounded(bundle, segment)) == ACCURACY["int8"]
        if rounds and INTEGER not in self.remarks:
            self.remarks += (INTEGER,)

    def segment_options(self, bundle: Bundle, segment: SegmentFacts) -> Any:
        """Of a session that runs the segment, or a part of it."""
        rounded = self._rounded(bundle, segment)
        options = self._options(_accuracy(rounded))
        if any(record.activation is not None for record in rounded):
            _keep_pairs(options)
        return options

    def _rounded(self, bundle: Bundle, segment: SegmentFacts) -> list[Record]:
        """Of the segment's matrices that became integers. A bundle's recipe is read once."""
        if bundle.path not in self._recipes:
            self._recipes[bundle.path] = read_recipe(bundle)
        recipe = self._recipes[bundle.path]
        matrices = () if recipe is None else recipe.rounded
        return [each.record for each in matrices if segment_of(each.name, bundle.manifest) == segment.name]

    def _options(self, accuracy: int) -> Any:
        options = self._ort.SessionOptions()
        # Each session has threads of its own. Left spinning after a run, they take the cores from the next segment's:
        # on two cores everything was 2.5 times slower (docs/log.md).
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", str(accuracy))
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


def _accuracy(rounded: Sequence[Record]) -> int:
    """The greatest level that matrices need, but for those whose activations the graph itself rounds."""
    needed = (ACCURACY[record.precision] for record in rounded if record.activation is None)
    return max(needed, default=ACCURACY["int4"])


def _keep_pairs(options: Any) -> None:
    """Have products of rounded activations computed in integers, and exactly.

    ONNX Runtime joins a product only with a QuantizeLinear and DequantizeLinear that nothing else reads; first it would
    make one of the pairs behind one tensor. Without VNNI, x86 adds two of its 8-bit products in 16 bits, which overflow
    (onnxruntime#12088): other kernels, half as fast, do not.
    """
    options.add_session_config_entry(
        "optimization.disable_specified_optimizers", "CommonSubexpressionElimination;ConstantSharing"
    )
    if may_overflow():
        options.add_session_config_entry("session.x64quantprecision", "1")


def may_overflow() -> bool:
    """Whether this is an x86 without VNNI, or one that does not say."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return False
    try:
        return "vnni" not in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return True


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
