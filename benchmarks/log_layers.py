# python benchmarks/log_layers.py --out docs/results/log_layers.md
"""The cost of ``qat_tricks.LogLayers``: a training step that is looked at against one that is not.

One fit of ``int8_prune50``'s training stage, in which every other step is looked at, so that both
kinds take turns and a machine that speeds up or slows down does so for both. A step lasts from the
first hook of a batch to the last one, logging included: in CPU time of its thread, or, on a GPU, in
time until the GPU is done.
"""

import argparse
import io
import logging
import platform
import statistics
import tempfile
import time
import warnings
from contextlib import redirect_stdout
from typing import Any

import pytorch_lightning as pl
import torch
import torchvision
from common import Report, argument_parser, command
from modules import Module
from torch.utils.data import DataLoader

import qat_tricks
from qat_tricks.models.build import build_model
from qat_tricks.trainer.log_layers import EVERY_N_STEPS, LogLayers

RECIPE, OVERRIDES = (
    "int8_prune50",
    [
        "~stages.prune_qat.tricks.distill",
        "prove=false",  # what comes before the training is quick
        "stages.ptq.tricks.calibrate.num_images=32",
        "~stages.ptq.tricks.correct_bias",
    ],
)
BAR = 0.02
NETWORKS = {
    "resnet20": (1, 8),  # of train.py, on digits: channels and pixels of its images
    "mobilenet_v2": (3, 64),
}


class Clock(pl.Callback):
    """Keeps the seconds of each step, from the first hook of a batch to the last."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.seconds: list[float] = []

    def now(self) -> float:
        """On a CPU the time that this thread computes, for others share the machine."""
        if self.device == "cpu":
            return time.thread_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def on_train_batch_start(self, *_: Any) -> None:
        self.started = self.now()


class Stop(pl.Callback):
    """Ends the step of a clock, behind all other callbacks."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_train_batch_end(self, *_: Any) -> None:
        self.clock.seconds.append(self.clock.now() - self.clock.started)


def logger_of(name: str, folder: str) -> Any:
    """One of Lightning's loggers, offline."""
    if name == "csv":
        return pl.loggers.CSVLogger(folder)
    if name == "tensorboard":
        return pl.loggers.TensorBoardLogger(folder)
    return pl.loggers.WandbLogger(save_dir=folder, offline=True)


def measure(name: str, logger: str, args: argparse.Namespace) -> tuple[float, float, int]:
    """Medians: the seconds of a step that is not looked at, and how much longer one is that is.

    Returns:
        Seconds, their ratio minus 1, and the number of figures that are logged.
    """
    torch.manual_seed(0)
    channels, size = NETWORKS[name]
    batch = (torch.randn(args.batch, channels, size, size), torch.randint(0, 10, (args.batch,)))
    # A dataset of batches: Lightning takes a list of them for several loaders.
    loader = DataLoader([batch] * (args.warmup + 2 * args.steps), batch_size=None)
    if name == "resnet20":
        network = build_model(name, num_classes=10, in_channels=channels)
    else:
        network = getattr(torchvision.models, name)(num_classes=10)
    with tempfile.TemporaryDirectory() as folder:
        own, clock = logger_of(logger, folder), Clock(args.device)
        logged: list[int] = []
        log_metrics = own.log_metrics
        own.log_metrics = lambda found, step=None: (
            logged.append(len(found)),
            log_metrics(found, step),
        )
        trainer = pl.Trainer(
            accelerator="gpu" if args.device == "cuda" else "cpu",
            devices=1,
            max_epochs=1,
            logger=own,
            callbacks=[clock, *qat_tricks.recipe(RECIPE, OVERRIDES), LogLayers(2), Stop(clock)],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        with redirect_stdout(io.StringIO()):  # the recipe's table
            trainer.fit(Module(network).train(), loader)
    seconds = clock.seconds[args.warmup + args.warmup % 2 : -1]  # begins with one looked at
    # The last step is left out, for the recipe ends there.
    looked, plain = seconds[0::2], seconds[1::2]
    ratio = statistics.median(a / b for a, b in zip(looked, plain, strict=False))
    return statistics.median(plain), ratio - 1, max(logged)


def main() -> None:
    parser = argument_parser(__doc__, threads=1)
    parser.add_argument("--models", nargs="+", default=list(NETWORKS))
    parser.add_argument("--loggers", nargs="+", default=["csv", "tensorboard", "wandb"])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=30, help="of each kind")
    parser.add_argument("--warmup", type=int, default=6)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.set_num_threads(args.threads)
    processor = platform.processor() or platform.machine()
    if args.device == "cuda":
        processor = torch.cuda.get_device_name()
    report = Report(
        "Cost of logging the layers",
        [
            command(args, "batch", "steps", "device", "threads"),
            f"on {processor}, torch {torch.__version__}, Lightning {pl.__version__}.",
            "A step of `int8_prune50` (no distillation) that is looked at, in turns with one that "
            "is not, in one fit; medians.",
            f"On average: of one look in {EVERY_N_STEPS} steps, the default of "
            "`qat_tricks.LogLayers`.",
        ],
        ("network", "logger", "figures:", "step ms:", "a look adds:", "on average:", "bar:"),
        args.out,
    )
    for name in args.models:
        for logger in args.loggers:
            seconds, added, figures = measure(name, logger, args)
            report.add(
                name,
                logger,
                figures,
                f"{1e3 * seconds:.1f}",
                f"{added:+.0%}",
                f"**{added / EVERY_N_STEPS:.2%}**",
                f"{BAR:.0%}",
            )


if __name__ == "__main__":
    main()
