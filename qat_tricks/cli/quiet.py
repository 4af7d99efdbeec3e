"""Silences the messages that libraries print at every run, and no others."""

import logging
import warnings

_CHATTY = (
    "pytorch_lightning",
    "lightning_fabric",
    "lightning.pytorch",
    "lightning.fabric",
    "torch.onnx",
    "onnxscript",
    "onnx_ir",
    "matplotlib",
    # Not "optuna" itself, whose level Optuna sets when it is loaded.
    "optuna.storages",
    "optuna.study",
)

_KNOWN = (
    r".*does not have many workers.*",  # the images are in memory
    r".*number of training batches .* is smaller than the logging interval.*",
    r".*`isinstance\(treespec, LeafSpec\)` is deprecated.*",  # Lightning's own use of torch
    r".*GPU available but not used.*",  # the user chose trainer.accelerator
    r".*Checkpoint directory .* exists and is not empty.*",
)


def quiet() -> None:
    """Sets the loggers of talkative libraries to warnings, and filters known, useless warnings."""
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
    # It repeats, as a warning, what the failed job has told.
    logging.getLogger("hydra_plugins.hydra_optuna_sweeper").setLevel(logging.ERROR)
    for message in _KNOWN:
        warnings.filterwarnings("ignore", message=message)
