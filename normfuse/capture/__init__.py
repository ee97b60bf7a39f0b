"""From a model to the graph of ATen calls that the passes rewrite."""
