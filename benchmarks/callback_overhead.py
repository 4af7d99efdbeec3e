# python benchmarks/callback_overhead.py --out docs/results/callback_overhead.md
"""What our callbacks cost a training step, their quantizers left out of it.

Two trainers train the same network, its quantizers placed and disabled: one with the callbacks of ``int8_prune50`` (without
distillation, whose teacher is no overhead but work), one without any. They run in one process and take turns step by step,
so that a machine that speeds up or slows down does so for both. A step lasts from one batch to the request for the next.
"""

import argparse
import copy
import logging
import platform
import statistics
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytorch_lightning as pl
import torch
import torchvision
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import qat_tricks
from qat_tricks.graph import activation_quantizers, layers
from qat_tricks.tricks import Prune

RECIPE, OVERRIDES = "int8_prune50", ["~stages.prune_qat.tricks.distill"]
BAR = 0.01
SCHEDULE = 5000  # steps of the fit that the schedules are made for; the benchmark ends earlier


class Module(pl.LightningModule):
    """A classifier as users write it."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-5, momentum=0.9)


class Turns:
    """Gives the same batch again and again to several fits, a step to each in turn, and keeps their seconds."""

    def __init__(self, batch: tuple[Tensor, Tensor], contenders: int, steps: int) -> None:
        self.batch, self.steps = batch, steps
        self.seconds: list[list[float]] = [[] for _ in range(contenders)]
        self.turn = [threading.Semaphore(int(i == 0)) for i in range(contenders)]

    def loader(self, contender: int) -> "Turn":
        return Turn(self, contender)


class Turn:
    """One contender's loader."""

    def __init__(self, turns: Turns, contender: int) -> None:
        self.turns, self.contender = turns, contender

    def __len__(self) -> int:
        return SCHEDULE

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        turns, own = self.turns, self.contender
        for _ in range(turns.steps):
            turns.turn[own].acquire()
            started = time.perf_counter()
            yield turns.batch
            turns.seconds[own].append(time.perf_counter() - started)
            turns.turn[(own + 1) % len(turns.turn)].release()


def prepare(network: torch.nn.Module, batch: tuple[Tensor, Tensor]) -> Module:
    """The network as ``int8_prune50`` trains it, after one step, its quantizers disabled."""
    module = Module(network).train()
    loader = DataLoader(TensorDataset(*batch), batch_size=len(batch[1]))
    trainer(qat_tricks.recipe(RECIPE, OVERRIDES)).fit(module, loader)
    for layer in layers(module.network).values():
        if layer.weight_quantizer is not None:
            layer.weight_quantizer.enabled = False
    for quantizer in activation_quantizers(module.network).values():
        quantizer.enabled = False
    return module


def trainer(callbacks: list[pl.Callback]) -> pl.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(accelerator="cpu", max_epochs=1, callbacks=callbacks, **quiet)


def measure(name: str, *, batch: int, size: int, steps: int, warmup: int) -> tuple[float, float, float, float]:
    """Returns a step's median seconds without callbacks, the median of what they add as a share of it, half the width of the
    middle half of that, and the seconds of one renewal of all masks."""
    torch.manual_seed(0)
    data = torch.randn(batch, 3, size, size), torch.randint(0, 1000, (batch,))
    module = prepare(getattr(torchvision.models, name)(), data)
    turns = Turns(data, 2, warmup + steps)
    callbacks = qat_tricks.recipe(RECIPE, OVERRIDES)
    (prune,) = (callback for callback in callbacks if isinstance(callback, Prune))
    prune.start = 0.9  # renewals of the masks, a few in a whole fit, are measured by themselves
    prune.end = 1.0
    modules = [module, copy.deepcopy(module)]

    def fit(contender: int) -> None:
        trainer([[], callbacks][contender]).fit(modules[contender], turns.loader(contender))

    threads = [threading.Thread(target=fit, args=(contender,)) for contender in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    plain, ours = (seconds[warmup:] for seconds in turns.seconds)
    added = sorted(b / a - 1 for a, b in zip(plain, ours, strict=True))
    quarter = len(added) // 4
    started = time.perf_counter()
    qat_tricks.tricks.prune.prune(module.network, 0.25)
    renewal = time.perf_counter() - started
    return statistics.median(plain), statistics.median(added), (added[-1 - quarter] - added[quarter]) / 2, renewal


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["resnet18", "mobilenet_v2"])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--warmup", type=int, default=10)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.set_num_threads(args.threads)
    command = " ".join(f"--{key} {getattr(args, key)}" for key in ("batch", "size", "threads", "steps"))
    lines = [
        "# Cost of the callbacks",
        "",
        f"`python benchmarks/callback_overhead.py {command}`",
        f"on {platform.processor() or platform.machine()}, torch {torch.__version__}, Lightning {pl.__version__}.",
        "The same step with and without the callbacks of `int8_prune50` (no distillation), quantizers disabled, in turns.",
        "",
        "| network | step ms | callbacks add (median of pairs) | middle half of the pairs | bar | one renewal of all masks ms |",
        "|---|---|---|---|---|---|",
    ]
    for name in args.models:
        plain, added, half, renewal = measure(name, batch=args.batch, size=args.size, steps=args.steps, warmup=args.warmup)
        row = f"| {name} | {plain * 1e3:.0f} | **{added:+.2%}** | ± {half:.2%} | {BAR:.0%} | {renewal * 1e3:.0f} |"
        lines.append(row)
        print(row, flush=True)
    lines += ["", "Masks are renewed `updates` times a fit (50 by default), however long it is."]
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
