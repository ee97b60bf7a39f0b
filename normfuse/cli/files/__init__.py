"""Files that are given where a model is expected, or to be run."""
