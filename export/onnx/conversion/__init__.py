"""An ONNX file of any origin as another file: in another opset, precision or runtime, and held against it."""
