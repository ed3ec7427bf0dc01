"""A GPU and a TensorRT that are not there: CUDA's memory is the host's, engines run their graphs in ONNX Runtime.

Stands below Polygraphy's own DeviceArray and Stream, and behind the names of TensorRT's Python package, so that all of
our code runs as it is. Stricter than the real ones where a fault would otherwise stay unseen: every address must lie
in memory that is held and begin where a tensor may, no output may touch an input, new memory is NaN, shapes must fit
the profile in use. Of caches, engines write the new rows only, as those do that a build makes.
"""

from __future__ import annotations

import ctypes
import json
import math
import sys
import types
from collections import Counter
from pathlib import Path

import numpy as np
import onnxruntime
from polygraphy.exception import PolygraphyException

from tokprune.runtime import names
from tokprune.runtime.bundle import Bundle, open_bundle, sha256
from tokprune.runtime.engines import slot, versions
from tokprune.runtime.engines.profiles import segment_profiles

POISON = 0xFF  # NaN in every width of float
ALIGNMENT = 256  # of CUDA's memory, and what TensorRT wants of tensors
NO_MEMORY = "CUDA Error: 2. To figure out what this means, refer to a page."


class FakeCuda:
    """In place of Polygraphy's wrapper of the CUDA runtime; ``limit`` is the memory of the GPU."""

    def __init__(self, capability=(8, 7), limit=1 << 30) -> None:
        self.limit, self.memory, self.copied, self.synchronized = limit, {}, Counter(), 0
        values = {13: 1_300_000, 16: 16, 75: capability[0], 76: capability[1]}
        self.handle = types.SimpleNamespace(
            cudaGetDeviceCount=lambda out: self._give(out, 1),
            cudaDeviceGetAttribute=lambda out, key, device: self._give(out, values[key]),
            cudaMemGetInfo=lambda free, total: self._give(free, self.free_bytes) or self._give(total, limit),
            cudaMemcpy2DAsync=self._copy_pieces,
            cudaMemset2DAsync=self._set_pieces,
        )

    @staticmethod
    def _give(out, value) -> int:
        out._obj.value = value
        return 0

    @property
    def free_bytes(self) -> int:
        return self.limit - sum(len(buffer) for buffer in self.memory.values())

    def check(self, status) -> None:
        assert status == 0

    def malloc(self, nbytes) -> int:
        if nbytes > self.free_bytes:
            raise PolygraphyException(NO_MEMORY)
        room = (ctypes.c_ubyte * (nbytes + ALIGNMENT))()
        buffer = (ctypes.c_ubyte * nbytes).from_buffer(room, -ctypes.addressof(room) % ALIGNMENT)
        ctypes.memset(buffer, POISON, nbytes)
        self.memory[ctypes.addressof(buffer)] = buffer
        return ctypes.addressof(buffer)

    def free(self, address) -> None:
        assert self.memory.pop(address, None) is not None or not address

    def create_stream(self) -> int:
        return 77

    def stream_synchronize(self, stream) -> None:
        assert stream == 77
        self.synchronized += 1

    def memcpy(self, dst, src, nbytes, kind, stream_ptr=None) -> None:
        assert stream_ptr == 77
        name = {1: "to device", 2: "to host", 3: "on device"}[kind.value]
        if kind.value in (1, 3):
            self.check_held(dst, nbytes)
        if kind.value in (2, 3):
            self.check_held(src, nbytes)
        self.copied[name] += nbytes
        ctypes.memmove(dst, src, nbytes)

    def _copy_pieces(self, dst, dpitch, src, spitch, width, height, kind, stream) -> int:
        assert (kind.value, stream.value) == (3, 77)
        target, source = self._pieces(dst, dpitch, width, height), self._pieces(src, spitch, width, height)
        ends = [(each[0], each[-1] + width.value) for each in (target, source)]
        assert ends[0][1] <= ends[1][0] or ends[1][1] <= ends[0][0], "pieces overlap"
        self.copied["on device"] += width.value * height.value
        for to, begin in zip(target, source, strict=True):
            ctypes.memmove(to, begin, width.value)
        return 0

    def _set_pieces(self, dst, pitch, value, width, height, stream) -> int:
        assert stream.value == 77
        for begin in self._pieces(dst, pitch, width, height):
            ctypes.memset(begin, value.value, width.value)
        return 0

    def _pieces(self, address, pitch, width, height) -> range:
        """Where each piece begins; all lie in one piece of memory that is held."""
        assert 0 < width.value <= pitch.value
        begins = range(address.value, address.value + height.value * pitch.value, pitch.value)
        self.check_held(address.value, begins[-1] + width.value - address.value)
        return begins

    def check_held(self, address, nbytes) -> None:
        assert any(start <= address and address + nbytes <= start + len(held) for start, held in self.memory.items())


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
    """Counts ``runs``, and in ``switches`` notes each choice of a profile."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine, self.facts, self.cuda = engine, engine.facts, engine.trt.cuda
        self.session = onnxruntime.InferenceSession(self.facts["graph"], providers=["CPUExecutionProvider"])
        self.shapes, self.addresses, self.profile = {}, {}, 0
        self.device_memory, self.switches, self.runs, self.bound = 0, [], 0, []
        self.most_needed = 0

    def set_optimization_profile_async(self, index, stream) -> bool:
        self.profile, self.shapes = index, {}
        self.switches.append(index)
        return stream == 77

    def set_input_shape(self, name, shape) -> bool:
        least, _, most = self.facts["profiles"][self.profile].get(name, (shape, shape, shape))
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
        ctypes.memset(address, POISON, size)
        self.device_memory = size

    def execute_async_v3(self, stream) -> bool:
        assert stream == 77
        assert self.device_memory >= self.needed
        if self.engine.trt.refuses == self.facts["name"]:
            self.engine.logger.log(Severity.ERROR, "an illegal value")
            return False
        feeds = {name: self._array(name, self.shapes[name], dtype) for name, _, dtype in self.facts["inputs"]}
        outputs = [(name, self._array(name, self.get_tensor_shape(name), dtype)) for name, _, dtype in self._outputs]
        everything = [*feeds.items(), *outputs]
        for name, out in outputs:
            for other, array in everything:
                assert name == other or not np.shares_memory(out, array), f"{name} lies upon {other}"
        appended = self.facts["appended"]  # present and past, by the name of the new rows
        asked = [appended.get(name, [name])[0] for name, _ in outputs]
        values = self.session.run(asked, {name: array.copy() for name, array in feeds.items()})
        for (name, out), value in zip(outputs, values, strict=True):
            if name in appended:
                value = value[:, :, feeds[appended[name][1]].shape[2] :]
            assert out.shape == value.shape, name
            out[...] = value
        self.runs += 1
        self.bound.append(dict(self.addresses))
        return True

    @property
    def _outputs(self):
        return self.facts["outputs"]

    def _array(self, name, shape, dtype) -> np.ndarray:
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        self.cuda.check_held(self.addresses[name], nbytes)
        raw = (ctypes.c_ubyte * nbytes).from_address(self.addresses[name])
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
