"""What an ONNX file costs to run: latency, memory, size, and the share of work done in integers."""
