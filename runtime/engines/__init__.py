"""Engines: segments compiled by TensorRT or TensorRT-RTX, and run by it. Knows no text and no images.

versions   all that differs between the TensorRTs
compiler   one graph into one engine, in a process of its own (``child``)
targets    what can be built for on this machine, or why not
profiles   the sizes that a segment's engine is made for
slot       where a bundle's engines lie, and which of them fit here
build      every segment of a bundle
cuda       the GPU and its memory
tensorrt   engines behind the runtime's sessions
fused      slots of ONNX Runtime's own graphs, which are no engines, and their decoders' sessions
"""
