"""Quantized layers in ONNX: one node each while a model is translated, then one of the forms of `FORMS`."""
