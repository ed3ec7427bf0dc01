"""One folder per operator: its schema, its float64 reference, its body in standard ONNX operators."""
