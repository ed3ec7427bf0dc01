"""Reads checkpoints, traces segments, writes bundles and verifies them against PyTorch."""
