"""Checkpoints: config.json, tensors, tokenizer, image processor."""
