"""Where quantisation is calibrated through the pruned pipeline. Nothing is quantised yet: FP32 and FP16 only."""
