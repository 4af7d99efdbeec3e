"""Evaluates what a run wrote: ``python evaluate.py artifact=PATH``, a .onnx or .ckpt."""

from qat_tricks.cli.main import evaluate

if __name__ == "__main__":
    evaluate()
