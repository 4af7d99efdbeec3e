"""The runtimes that run an ONNX file, all called in one way."""
