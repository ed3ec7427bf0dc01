"""A TensorRT that is not there, on ``fake_cuda``: engines run their graphs in ONNX Runtime.

Stands, with it, below Polygraphy's own DeviceArray and Stream, and behind the names of TensorRT's Python package, so
that all of our code runs as it is. Stricter than the real ones where a fault would otherwise stay unseen: every address
must lie in memory that is held and begin where a tensor may, no output may touch an input, shapes must fit the profile
in use. Of caches, engines write the new rows only, as those do that a build makes. No engine may be recorded for a CUDA
graph that has not run before in its shapes, or have others when its graph is launched.
"""

from __future__ import annotations

import ctypes
import json
import math
import sys
import types
from pathlib import Path

import numpy as np
import onnxruntime
from fake_cuda import ALIGNMENT, POISON, FakeCuda

from tokprune.runtime import names
from tokprune.runtime.bundle import Bundle, open_bundle, sha256
from tokprune.runtime.engines import slot, versions
from tokprune.runtime.engines.profiles import segment_profiles


class Severity:
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class ILogger(Severity):
    pass


class FakeTensorRt(types.ModuleType):
    """In place of the package ``tensorrt``."""

    ILogger = ILogger
    ExecutionContextAllocationStrategy = types.SimpleNamespace(USER_MANAGED="user managed")

    def __init__(self, cuda: FakeCuda, version: str) -> None:
        super().__init__("tensorrt")
        self.__version__, self.cuda, self.plugins, self.contexts = version, cuda, [], {}
        self.refuses = ""  # the segment that does not run
        self.refuses_recording = False

    def Runtime(self, logger):
        return types.SimpleNamespace(deserialize_cuda_engine=lambda plan: self._engine(logger, bytes(plan)))

    def _engine(self, logger, plan):
        facts = json.loads(plan)
        if "fault" in facts:
            logger.log(Severity.ERROR, facts["fault"])
            return None
        return FakeEngine(self, logger, facts)

    def get_plugin_registry(self):
        def load_library(path):
            if self.plugins:
                return None  # an operator that is registered already
            self.plugins.append(path)
            return object()

        return types.SimpleNamespace(load_library=load_library)


class FakeEngine:
    def __init__(self, trt, logger, facts) -> None:
        self.trt, self.logger, self.facts = trt, logger, facts
        self.names = [name for name, _, _ in facts["inputs"] + facts["outputs"]]
        self.num_io_tensors, self.num_optimization_profiles = len(self.names), len(facts["profiles"])

    def get_tensor_name(self, index):
        return self.names[index]

    def create_execution_context(self, strategy):
        assert strategy == "user managed"
        self.trt.contexts[self.facts["name"]] = context = FakeContext(self)
        return context


class FakeContext:
    """Counts ``runs``, and in ``switches`` notes each choice of a profile.

    ``told`` counts changes of shapes; ``settled`` is its number when an engine last ran by itself.
    """

    def __init__(self, engine: FakeEngine) -> None:
        self.engine, self.facts, self.cuda = engine, engine.facts, engine.trt.cuda
        self.session = onnxruntime.InferenceSession(self.facts["graph"], providers=["CPUExecutionProvider"])
        self.shapes, self.addresses, self.profile = {}, {}, 0
        self.device_memory, self.switches, self.runs = (0, 0), [], 0
        self.most_needed = self.told = self.settled = 0

    def set_optimization_profile_async(self, index, stream) -> bool:
        self.profile, self.shapes = index, {}
        self.told += 1
        self.switches.append(index)
        return stream == 77

    def set_input_shape(self, name, shape) -> bool:
        least, _, most = self.facts["profiles"][self.profile].get(name, (shape, shape, shape))
        self.told += self.shapes.get(name) != shape
        self.shapes[name] = shape
        return all(low <= dim <= high for low, dim, high in zip(least, shape, most, strict=True))

    def set_tensor_address(self, name, address) -> bool:
        assert address % ALIGNMENT == 0
        self.addresses[name] = address
        return address != 0

    def get_tensor_shape(self, name):
        axes = {}
        for tensor, shape, _ in self.facts["inputs"]:
            for dim, size in zip(shape, self.shapes[tensor], strict=True):
                assert dim == size if isinstance(dim, int) else axes.setdefault(dim, size) == size
        (shape,) = [shape for tensor, shape, _ in self.facts["outputs"] if tensor == name]
        return [dim if isinstance(dim, int) else eval(dim, {}, axes) for dim in shape]  # a sum of axes

    def update_device_memory_size_for_shapes(self):
        assert set(self.shapes) == {name for name, _, _ in self.facts["inputs"]}
        self.needed = 10_001 * (1 + len(self.facts["name"]) + self.shapes[self.facts["inputs"][0][0]][1])
        self.most_needed = max(self.most_needed, self.needed)
        return self.needed

    def set_device_memory(self, address, size) -> None:
        self.cuda.check_held(address, size)
        self.device_memory = (address, size)

    def execute_async_v3(self, stream) -> bool:
        assert stream == 77
        assert self.device_memory[1] >= self.needed
        if self.engine.trt.refuses == self.facts["name"]:
            self.engine.logger.log(Severity.ERROR, "an illegal value")
            return False
        if self.cuda.recording is None:
            self.settled = self.told
        elif self.engine.trt.refuses_recording:
            self.engine.logger.log(Severity.ERROR, "operation not permitted when stream is capturing")
            self.cuda.invalid = True
            return False
        assert self.settled == self.told, "recorded before it has run in these shapes"
        shapes = self.shapes | {name: self.get_tensor_shape(name) for name, _, _ in self.facts["outputs"]}
        recorded = (dict(self.addresses), shapes, self.device_memory, self.told)
        self.cuda.put(lambda: self._work(*recorded))
        return True

    def _work(self, addresses, shapes, scratch, told) -> None:
        assert told == self.told, "launched in other shapes than were recorded"
        self.cuda.check_held(*scratch)
        ctypes.memset(scratch[0], POISON, scratch[1])
        feeds, outputs = (
            {name: self._array(addresses[name], shapes[name], dtype) for name, _, dtype in self.facts[which]}
            for which in ("inputs", "outputs")
        )
        everything = [*feeds.items(), *outputs.items()]
        for name, out in outputs.items():
            for other, array in everything:
                assert name == other or not np.shares_memory(out, array), f"{name} lies upon {other}"
        appended = self.facts["appended"]  # present and past, by the name of the new rows
        asked = [appended.get(name, [name])[0] for name in outputs]
        values = self.session.run(asked, {name: array.copy() for name, array in feeds.items()})
        for (name, out), value in zip(outputs.items(), values, strict=True):
            if name in appended:
                value = value[:, :, feeds[appended[name][1]].shape[2] :]
            assert out.shape == value.shape, name
            out[...] = value
        self.runs += 1

    def _array(self, address, shape, dtype) -> np.ndarray:
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        self.cuda.check_held(address, nbytes)
        raw = (ctypes.c_ubyte * nbytes).from_address(address)
        return np.frombuffer(raw, dtype).reshape(shape)


def install(monkeypatch, cuda: FakeCuda | None = None, version: str = "10.3.0") -> FakeTensorRt:
    """Put a GPU and a TensorRT in place for one test."""
    import polygraphy.cuda.cuda

    cuda = cuda or FakeCuda()
    trt = FakeTensorRt(cuda, version)
    monkeypatch.setattr(polygraphy.cuda.cuda, "G_CUDA", cuda)
    monkeypatch.setattr(versions, "_registered", {})
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    return trt


def _written(tensor) -> list:
    """The shape of an output as engines have it."""
    if not tensor.name.startswith("present."):
        return tensor.shape
    batch, heads, _, width = tensor.shape
    return [batch, heads, names.SEQUENCE, width]


def write_slot(path: Path, *, version: str = "10.3.0", arch: str = "sm87", plugins: bytes | None = None) -> Path:
    """Engines for the bundle at ``path`` as a build would leave them, of the fake's kind; their folder."""
    bundle: Bundle = open_bundle(path)
    folder = slot.slot_folder(path, f"tensorrt-{version}-{arch}")
    folder.mkdir(parents=True)
    segments = []
    for segment in bundle.manifest.segments:
        profiles = segment_profiles(bundle.manifest, segment)
        presents = [tensor.name for tensor in segment.outputs if tensor.name.startswith("present.")]
        new = {present: names.beside_present(present)[1] for present in presents}
        facts = {
            "name": segment.name,
            "graph": str(bundle.file(segment.file).resolve()),
            "inputs": [(tensor.name, tensor.shape, tensor.dtype) for tensor in segment.inputs],
            "outputs": [
                (new.get(tensor.name, tensor.name), _written(tensor), tensor.dtype) for tensor in segment.outputs
            ],
            "appended": {new[present]: (present, names.beside_present(present)[0]) for present in presents},
            "profiles": list(profiles.values()),
        }
        file = folder / f"{segment.name}.engine"
        file.write_text(json.dumps(facts))
        size, digest = file.stat().st_size, sha256(file)
        segments.append(slot.SegmentEngine(segment.name, "", file.name, size, digest, 0.0, 1, profiles))
    digest = None
    if plugins is not None:
        (folder / slot.PLUGIN_LIBRARY).write_bytes(plugins)
        digest = sha256(folder / slot.PLUGIN_LIBRARY)
    selector = "native" if plugins is None else "plugin"
    bundle_hash = slot.manifest_hash(path)
    slot.write_json(
        folder / slot.FILE,
        slot.Slot(slot.SCHEMA, "tensorrt", version, arch, selector, digest, bundle_hash, tuple(segments)),
    )
    return folder
