"""What differs between TensorRTs, with stand-ins for those that are not here; build tests have the real RTX one."""

from __future__ import annotations

import json
import types

import fake_tensorrt
import pytest

from tokprune.runtime import UserError
from tokprune.runtime.engines import child, versions


class Builder:
    def create_network(self, flags: int) -> int:
        return flags


@pytest.mark.parametrize(("flags", "expected"), [({"STRONGLY_TYPED": 1}, 2), ({}, 0)], ids=["10.3", "without the flag"])
def test_networks_are_strongly_typed(flags, expected):
    trt = types.SimpleNamespace(NetworkDefinitionCreationFlag=types.SimpleNamespace(**flags))
    assert versions.create_network(trt, Builder()) == expected


@pytest.mark.parametrize("version", ["8.6.1", "10.0.1", "10.2.0.19"])
def test_too_old(monkeypatch, version):
    fake_tensorrt.install(monkeypatch, version=version)
    with pytest.raises(UserError, match=rf"tensorrt {version} was found, 10\.3 or newer is needed: upgrade it"):
        versions.load(versions.TENSORRT)


@pytest.mark.parametrize("version", ["10.3.0", "10.16.1.11", "11.4.0.106"])
def test_new_enough(monkeypatch, version):
    trt = fake_tensorrt.install(monkeypatch, version=version)
    assert versions.load(versions.TENSORRT) is trt


class TestPlugins:
    @pytest.fixture
    def trt(self, monkeypatch) -> types.SimpleNamespace:
        """As TensorRT's registry does, it takes no operator twice."""
        loaded: list[str] = []
        load = lambda path: None if loaded or "broken" in path else loaded.append(path) or object()  # noqa: E731
        monkeypatch.setattr(versions, "_registered", {})
        registry = types.SimpleNamespace(load_library=load)
        return types.SimpleNamespace(__name__="tensorrt", get_plugin_registry=lambda: registry, loaded=loaded)

    def test_that_do_not_load(self, trt, tmp_path):
        (tmp_path / "broken.so").write_bytes(b"no library")
        with pytest.raises(UserError, match=r"broken\.so cannot be loaded as a library of plugins"):
            versions.load_plugins(trt, tmp_path / "broken.so")
        (tmp_path / "x.so").write_bytes(b"a library")
        versions.load_plugins(trt, tmp_path / "x.so")  # the refused one is not taken for registered
        assert trt.loaded == [str(tmp_path / "x.so")]

    def test_of_two_bundles_in_a_process(self, trt, tmp_path):
        for name, content in (("a.so", b"a library"), ("b.so", b"a library"), ("c.so", b"another")):
            (tmp_path / name).write_bytes(content)
        for name in ("a.so", "a.so", "b.so"):
            versions.load_plugins(trt, tmp_path / name)
        assert trt.loaded == [str(tmp_path / "a.so")]
        with pytest.raises(UserError, match=r"c\.so is another library of plugins than the one that this process has"):
            versions.load_plugins(trt, tmp_path / "c.so")


def test_contexts_say_what_they_need():
    context = types.SimpleNamespace(update_device_memory_size_for_shapes=lambda: 9)
    assert versions.context_bytes(context) == 9


class TestLayers:
    """The account of an engine: TensorRT's own where it loads, else the network's with the reason."""

    LAYER = types.SimpleNamespace(name="a", type=types.SimpleNamespace(name="SHUFFLE"), num_outputs=0)
    NETWORK = types.SimpleNamespace(num_layers=1, get_layer=lambda index: TestLayers.LAYER)

    def report(self, loaded, inspect: bool = True) -> dict:
        trt = types.SimpleNamespace(
            Runtime=lambda logger: types.SimpleNamespace(deserialize_cuda_engine=lambda engine: loaded),
            LayerInformationFormat=types.SimpleNamespace(JSON="json"),
        )
        logger = types.SimpleNamespace(kept=[(True, "out of memory")])
        return json.loads(child._layers(trt, self.NETWORK, b"engine", inspect, logger))

    def test_of_the_engine(self):
        inspector = types.SimpleNamespace(get_engine_information=lambda form: json.dumps({"as": form}))
        assert self.report(types.SimpleNamespace(create_engine_inspector=lambda: inspector)) == {"as": "json"}

    @pytest.mark.parametrize(("inspect", "reason"), [(True, "out of memory"), (False, "no device to load it on")])
    def test_of_the_network(self, inspect, reason):
        found = self.report(None, inspect)
        assert (found["layers_of"], found["reason"]) == ("network", reason)
        assert found["layers"] == [{"name": "a", "type": "SHUFFLE", "outputs": []}]
