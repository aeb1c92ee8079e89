"""Modules on fake tensors to finished ONNX graphs."""
