"""Quantization-aware training and pruning for PyTorch Lightning."""
