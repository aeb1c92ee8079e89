"""Measured times: bundles, PyTorch, and the machine's own rates."""
