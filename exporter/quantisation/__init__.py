"""Checkpoint to checkpoint with INT4 matrices, calibrated on images."""
