"""A list of ONNX nodes in the making: unique names, constants shared by value. Knows no operator."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import NodeProto, TensorProto, helper, numpy_helper

OPSET = 20  # what TensorRT 10.3 (JetPack 6.2) documents
DOMAIN = "tokprune"  # of our operators, and their plugins' namespace


class Nodes:
    """Nodes of a graph or of a function; constants are Constant nodes, as functions have no initializers."""

    FLOAT, INT32, INT64 = TensorProto.FLOAT, TensorProto.INT32, TensorProto.INT64

    def __init__(self, prefix: str) -> None:
        """Every name made here starts with ``prefix``."""
        self.protos: list[NodeProto] = []
        self._prefix = prefix
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}

    def add(self, op_type: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        """Append a node with one output and return that output's name."""
        output = output or self._name()
        self.protos.append(helper.make_node(op_type, inputs, [output], **attributes))
        return output

    def add_many(self, op_type: str, count: int, *inputs: str, **attributes: Any) -> list[str]:
        """Append a node with ``count`` outputs and return their names."""
        outputs = [f"{self._name()}_{index}" for index in range(count)]
        self.protos.append(helper.make_node(op_type, inputs, outputs, **attributes))
        return outputs

    def constant(self, value: npt.NDArray[Any]) -> str:
        """The name of a tensor that holds ``value``."""
        key = (value.dtype.str, value.shape, value.tobytes())
        if key not in self._constants:
            self._constants[key] = self.add("Constant", value=numpy_helper.from_array(value))
        return self._constants[key]

    def float32(self, value: float) -> str:
        return self.constant(np.array(value, dtype=np.float32))

    def int64(self, value: list[int] | int) -> str:
        return self.constant(np.array(value, dtype=np.int64))

    def _name(self) -> str:
        return f"{self._prefix}_{len(self.protos)}"


def for_plugin(node: NodeProto, version: int) -> NodeProto:
    """A copy of ``node`` that TensorRT gives to the plugin of that version; the model must hold no function for it.

    Parsers from 10.15 on look for a plugin only where a node has a namespace; older ones take "" if none is said.
    """
    copy = NodeProto()
    copy.CopyFrom(node)
    copy.attribute.append(helper.make_attribute("plugin_version", str(version)))
    copy.attribute.append(helper.make_attribute("plugin_namespace", DOMAIN))
    return copy
