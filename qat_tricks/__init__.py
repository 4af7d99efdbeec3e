"""Quantization-aware training and pruning for PyTorch Lightning.

The results are int8, sparse classifiers in ONNX files, with measurements of accuracy and cost.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from qat_tricks.version import __version__

if TYPE_CHECKING:
    from qat_tricks.deploy.export import export_onnx
    from qat_tricks.errors import QatTricksError
    from qat_tricks.jobs.evaluation import evaluate
    from qat_tricks.jobs.guideline import guideline
    from qat_tricks.jobs.guideline_result import Guideline
    from qat_tricks.jobs.validate_deployed import ValidateDeployed
    from qat_tricks.recipes.callbacks import Recipe, recipe
    from qat_tricks.recipes.ptq import quantize
    from qat_tricks.recipes.stages import run_stages
    from qat_tricks.trainer.checkpoints import load_from_checkpoint
    from qat_tricks.trainer.compiling import CompileNetwork
    from qat_tricks.trainer.log_layers import LogLayers


__all__ = [
    "CompileNetwork",
    "Guideline",
    "LogLayers",
    "QatTricksError",
    "Recipe",
    "ValidateDeployed",
    "__version__",
    "evaluate",
    "export_onnx",
    "guideline",
    "load_from_checkpoint",
    "quantize",
    "recipe",
    "run_stages",
]

_HOME = {
    "CompileNetwork": "trainer.compiling",
    "Guideline": "jobs.guideline_result",
    "LogLayers": "trainer.log_layers",
    "QatTricksError": "errors",
    "Recipe": "recipes.callbacks",
    "ValidateDeployed": "jobs.validate_deployed",
    "evaluate": "jobs.evaluation",
    "export_onnx": "deploy.export",
    "guideline": "jobs.guideline",
    "load_from_checkpoint": "trainer.checkpoints",
    "quantize": "recipes.ptq",
    "recipe": "recipes.callbacks",
    "run_stages": "recipes.stages",
}


def __getattr__(name: str) -> Any:
    # Loaded on first use: measuring an .onnx file on a device needs neither torch nor Lightning.
    if name in _HOME:
        return getattr(import_module(f"qat_tricks.{_HOME[name]}"), name)
    raise AttributeError(f"module 'qat_tricks' has no attribute {name!r}")
