"""One file per model family: checkpoint names and config.json to `ModelSpec`."""
