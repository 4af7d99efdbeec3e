"""What an ONNX file costs to run: sessions, latency, memory, integer coverage, weights."""
