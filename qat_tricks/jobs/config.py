"""The settings of ``conf/train.yaml`` and ``conf/evaluate.yaml``."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from qat_tricks.deploy.cost.latency import MIN_RUNS
from qat_tricks.deploy.targets import OPSET
from qat_tricks.errors import QatTricksError


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """How the float network is trained."""

    epochs: int = 10
    lr: float = 0.1  # peak of a one-cycle schedule
    finetune: bool = False  # also train when model.weights is given
    cache: bool = True  # keep what was trained

    def __post_init__(self) -> None:
        _allow(
            self,
            epochs=(self.epochs >= 0, "0 or more"),
            lr=(0 < self.lr < math.inf, "a number above 0"),
        )


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """SGD with Nesterov momentum, of the baseline and of every stage that trains."""

    momentum: float = 0.9
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        _allow(
            self,
            momentum=(0 <= self.momentum < 1, "0 to below 1"),
            weight_decay=(0 <= self.weight_decay < math.inf, "0 or more"),
            label_smoothing=(0 <= self.label_smoothing < 1, "0 to below 1"),
        )


@dataclass(frozen=True, kw_only=True)
class Measure:
    """How latency and memory are measured, and how closely ONNX Runtime must follow the simulated
    network.
    """

    batch_size: int = 1
    threads: int = 2
    runs: int = 200
    max_seconds: float = 5.0  # for one file
    min_top1_agreement: float = 0.99  # 0 to 1

    def __post_init__(self) -> None:
        _allow(
            self,
            batch_size=(self.batch_size >= 1, "1 or more"),
            threads=(self.threads >= 1, "1 or more"),
            runs=(self.runs >= MIN_RUNS, f"{MIN_RUNS} or more"),
            max_seconds=(0 < self.max_seconds < math.inf, "a number above 0"),
            min_top1_agreement=(0 <= self.min_top1_agreement <= 1, "0 to 1"),
        )


@dataclass(frozen=True, kw_only=True)
class DeviceMeasure(Measure):
    """What an evaluation measures besides: throughput at each number of threads with each size of
    batch.
    """

    batch_sizes: Sequence[int] = (1, 8, 32)
    thread_counts: Sequence[int] = (1, 2)
    point_seconds: float = 0.3  # of one such combination

    def __post_init__(self) -> None:
        super().__post_init__()
        _allow(
            self,
            batch_sizes=(
                _counts(self.batch_sizes),
                "a list of whole numbers, 1 or more, as in [1,8,32]",
            ),
            thread_counts=(
                _counts(self.thread_counts),
                "a list of whole numbers, 1 or more, as in [1,2]",
            ),
            point_seconds=(0 < self.point_seconds < math.inf, "a number above 0"),
        )


@dataclass(frozen=True, kw_only=True)
class Export:
    """What the exported files take and are made of."""

    normalize: bool = False  # uint8 pixels, which the network normalizes itself
    opset: int = OPSET  # ONNX operator set

    def __post_init__(self) -> None:
        _allow(self, opset=(self.opset >= OPSET, f"{OPSET} or more"))


@dataclass(frozen=True, kw_only=True)
class StageOverride:
    """What every stage of the recipe does instead of its own setting; None leaves it."""

    epochs: int | None = None  # of the stages that train
    lr: float | None = None  # of the stages that train
    max_drop: float | None = None  # points of accuracy

    def __post_init__(self) -> None:
        _allow(
            self,
            epochs=(self.epochs is None or self.epochs >= 0, "0 or more, or null"),
            lr=(self.lr is None or 0 < self.lr < math.inf, "a number above 0, or null"),
            max_drop=(
                self.max_drop is None or self.max_drop >= 0,
                "0 or more points of accuracy, or null",
            ),
        )


def _counts(values: Sequence[int]) -> bool:
    return len(values) > 0 and min(values) >= 1


def _allow(settings: Any, **rules: tuple[bool, str]) -> None:
    problems = [
        f"{name}={getattr(settings, name)} is not allowed: give {allowed}"
        for name, (holds, allowed) in rules.items()
        if not holds
    ]
    if problems:
        raise QatTricksError("; ".join(problems))


def timing(measure: Any) -> dict[str, Any]:
    """How long, and under what, each file is timed: the settings of ``measure`` that
    ``measure_latency`` takes.
    """
    return {key: measure[key] for key in ("batch_size", "threads", "runs", "max_seconds")}


def evaluation_folder(config: DictConfig) -> Path:
    """Where ``evaluate.py`` writes: ``folder``, or ``evaluation`` beside the artifact."""
    return Path(config.folder) if config.folder else Path(config.artifact).parent / "evaluation"
