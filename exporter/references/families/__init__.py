"""One file per family that transformers has modules for: stock layers, positions and preprocessing of their own."""
