"""From a simulated network to an ONNX file, with proof that the file runs as simulated."""
