"""Graphs for ONNX Runtime's CPU provider: a bundle's segments with its fused operators. Knows graphs and their numbers.

widen      FP16 graphs in FP32
rules      what a layer has wherever it is: matrices as they lie, norms, gates, rotary embeddings
attention  attention of the decoder, over caches in place, and of the tower
build      a bundle's slot of such graphs, each checked against the neutral one
check      how far the two are apart, on seeded inputs
"""
