"""Portable graphs to graphs for ONNX Runtime; needs nothing else of the exporter."""
