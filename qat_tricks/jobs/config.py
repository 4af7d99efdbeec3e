"""The settings of ``conf/train.yaml`` and ``conf/evaluate.yaml``: their defaults and ranges."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any, Literal

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from qat_tricks.deploy.cost.latency import MIN_RUNS
from qat_tricks.deploy.parity.logits import LARGEST_SQNR_DB, MIN_SQNR_DB
from qat_tricks.deploy.targets import NEWEST_OPSET, OPSET
from qat_tricks.evidence.language import check_language
from qat_tricks.settings.ranges import (
    BATCH,
    EPOCHS,
    LEARNING_RATE,
    MAX_DROP,
    NOT_NEGATIVE,
    POSITIVE,
    THREADS,
    Range,
    below,
    between,
    check_ranges,
    counts,
)

MOST_RUNS = 10**6  # the time of each is kept


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """The settings of the float network's training."""

    epochs: int = 10
    lr: float = 0.1  # peak of a one-cycle schedule
    finetune: bool = False  # train even with model.weights
    cache: bool = True  # a network trained here is kept for later runs

    def __post_init__(self) -> None:
        check_ranges(self, epochs=EPOCHS, lr=POSITIVE)


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """SGD with Nesterov momentum, of the baseline and of every stage that trains."""

    momentum: float = 0.9
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        check_ranges(
            self, momentum=below(0, 1), weight_decay=NOT_NEGATIVE, label_smoothing=below(0, 1)
        )


@dataclass(frozen=True, kw_only=True)
class Measure:
    """The settings of measurements: of latency, of memory, and of parity with the simulation."""

    batch_size: int = 1
    threads: int = 2
    runs: int = 200  # timed ones, at most, for one file
    max_seconds: float = 5.0  # for one file
    profile: bool = False  # name the operators that take longest
    min_top1_agreement: float = 0.99  # 0 to 1
    min_sqnr_db: float = MIN_SQNR_DB  # of the simulated logits to their error in the exported file

    def __post_init__(self) -> None:
        check_ranges(self, **self._ranges())

    def _ranges(self) -> dict[str, Range]:
        return {
            "batch_size": BATCH,
            "threads": THREADS,
            "runs": between(MIN_RUNS, MOST_RUNS),
            "max_seconds": POSITIVE,
            "min_top1_agreement": between(0, 1),
            "min_sqnr_db": between(-LARGEST_SQNR_DB, LARGEST_SQNR_DB),
        }


@dataclass(frozen=True, kw_only=True)
class DeviceMeasure(Measure):
    """The settings of an evaluation's measurements, which include throughput.

    Throughput is measured at each number of threads with each batch size.
    """

    batch_sizes: Sequence[int] = (1, 8, 32)
    thread_counts: Sequence[int] = (1, 2)
    point_seconds: float = 0.3  # for one combination of the two

    def _ranges(self) -> dict[str, Range]:
        return {
            **super()._ranges(),
            "batch_sizes": counts(BATCH, "[1,8,32]"),
            "thread_counts": counts(THREADS, "[1,2]"),
            "point_seconds": POSITIVE,
        }


@dataclass(frozen=True, kw_only=True)
class Export:
    """The input and the format of the exported files."""

    normalize: bool = False  # they take uint8 pixels, which the network normalizes itself
    opset: int = OPSET  # ONNX operator set

    def __post_init__(self) -> None:
        check_ranges(self, opset=between(OPSET, NEWEST_OPSET))


@dataclass(frozen=True, kw_only=True)
class Report:
    """The settings of ``report.html`` and ``report.md``."""

    language: str = "en"  # of evidence.language.LANGUAGES

    def __post_init__(self) -> None:
        check_language(self.language)


@dataclass(frozen=True, kw_only=True)
class StageOverride:
    """Settings that replace those of every stage of the recipe; None replaces nothing."""

    epochs: int | None = None  # of the stages that train
    lr: float | Literal["auto"] | None = None  # of the stages that train
    max_drop: float | None = None  # points of accuracy

    def __post_init__(self) -> None:
        check_ranges(self, epochs=EPOCHS.or_null(), lr=LEARNING_RATE, max_drop=MAX_DROP)


def timing(measure: Any) -> dict[str, Any]:
    """Returns the settings of ``measure`` that ``measure_latency`` takes."""
    return {key: measure[key] for key in ("batch_size", "threads", "runs", "max_seconds")}


REPORT = "report.json"
"""The file by which a folder is known to have a report."""
EXPORTED = "model.onnx"
"""The file to which an evaluation exports a checkpoint."""


def settle_root(config: DictConfig) -> None:
    """Makes ``data.root`` absolute: files that say it are read from other folders too."""
    root = OmegaConf.select(config, "data.root")
    if isinstance(root, str) and root:
        OmegaConf.update(config, "data.root", str(Path(root).expanduser().absolute()))


def evaluation_folder(config: DictConfig) -> Path:
    """Returns the folder that ``evaluate.py`` writes to.

    It is ``config.folder``, or ``evaluation`` beside the artifact; ``evaluation_2`` and so on where
    that has a report already.
    """
    if config.folder:
        return Path(config.folder)
    first = Path(config.artifact).parent / "evaluation"
    others = (first.with_name(f"{first.name}_{number}") for number in count(2))
    return next(folder for folder in chain([first], others) if not (folder / REPORT).exists())


def command(name: str) -> str | None:
    """The command line that repeats this job, of a sweep this one job; None without a command line.

    Args:
        name: of the program, ``train`` or ``evaluate``.
    """
    if not HydraConfig.initialized():
        return None
    return shlex.join(["python", f"{name}.py", *HydraConfig.get().overrides.task])
