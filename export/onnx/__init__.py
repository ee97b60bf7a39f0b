"""ONNX files: an optimized module becomes a file, which is checked, run and compared."""
