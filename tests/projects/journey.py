"""What every project goes through once it has taken up a recipe, and the digits that it reads.

A project is a script as people write them. The lines that it takes to adopt a recipe end with the
mark ``# adopted``.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import qat_tricks
from qat_tricks.graph import activation_quantizers, layers
from tests.helpers.lit import differences

CLASSES, MARK = 10, "# adopted"


@cache
def digits() -> tuple[Tensor, Tensor]:
    """Images ``[1797, 1, 8, 8]`` from 0 to 1, and labels, shuffled once."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    return x[order], torch.tensor(labels)[order]


def dataset(split: str) -> TensorDataset:
    """512 digits to train on, 256 others to validate or test on."""
    x, y = digits()
    place = slice(0, 512) if split == "train" else slice(512, 768)
    return TensorDataset(x[place], y[place])


def batches(split: str, **settings: Any) -> DataLoader:
    """A loader of digits, which shuffles those to train on."""
    return DataLoader(dataset(split), batch_size=64, shuffle=split == "train", **settings)


def convnet(width: int = 12) -> nn.Sequential:
    """A small network for digits, with BatchNorms."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2 * width * 16, CLASSES),
    )


@dataclass
class Ran:
    """What a project's script has in hand at its end."""

    trainer: Any
    module: Any
    data: Any  # what it would test on: loaders or a data module
    checkpoint: Path  # of the first epoch


def check_journey(
    train: Any,
    folder: Path,
    *,
    network: str = "self",
    accuracy: float = 0.8,
    weights_only: bool | None = None,
) -> Ran:
    """Fits, tests, resumes, reloads, exports and evaluates a project.

    Args:
        train: its script, ``train(folder, ckpt_path)``, from the trained float weights to the end.
        folder: for its files.
        network: the attribute that holds the network, "self" for the module itself.
        accuracy: the least that it reaches, 0..1.
        weights_only: False for a checkpoint with objects among its hyperparameters.
    """
    ran = train(folder / "whole", None)
    module, kind = ran.module, type(ran.module)
    within = module if network == "self" else module.get_submodule(network)
    assert all(layer.is_quantizing for layer in layers(within).values())
    assert len(layers(within)) >= 3
    assert activation_quantizers(within)
    (tested,) = ran.trainer.test(module, ran.data, verbose=False)
    assert max(tested.values()) >= accuracy

    resumed = train(folder / "resumed", ran.checkpoint)
    assert differences(module.state_dict(), resumed.module.state_dict()) == []

    path = folder / "end.ckpt"
    ran.trainer.save_checkpoint(path)
    back = qat_tricks.load_from_checkpoint(kind, path, weights_only=weights_only)
    assert differences(module.state_dict(), back.state_dict()) == []
    within = back if network == "self" else back.get_submodule(network)
    x, _ = dataset("test")[:64]
    report = qat_tricks.export_onnx(within, folder / "model.onnx", x)
    assert report.top1_agreement == 1.0
    loader = batches("test")
    figures = [qat_tricks.evaluate(what, loader) for what in (back, folder / "model.onnx")]
    assert figures[0].accuracy == figures[1].accuracy >= accuracy
    return ran
