"""One file per token reduction: settings, stages, graphs."""
