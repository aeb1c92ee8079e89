"""Checkpoint to bundle: graphs, one weights file, manifest."""
