"""Causal language models with a cache, as folders that ONNX Runtime generates text with."""
