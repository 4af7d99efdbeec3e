# python benchmarks/callback_overhead.py --out docs/results/callback_overhead.md
"""The cost of our callbacks in a training step, without that of their quantizers.

Three trainers train the same network, its quantizers placed and disabled: one with the callbacks of
``int8_prune50`` (without distillation, whose teacher is no overhead but work), two without any,
whose difference shows how far the figures can be trusted. They run in one process, each in a thread
that computes alone, and take turns step by step, so that a machine that speeds up or slows down
does so for all. A step lasts from one batch to the request for the next, in its thread's CPU time.
What noise hides in whole steps shows in the part of them that Lightning spends calling callbacks,
which is measured too.
"""

import copy
import logging
import platform
import statistics
import threading
import time
import warnings
from collections.abc import Iterator
from itertools import chain
from typing import Any

import pytorch_lightning as pl
import torch
import torchvision
from common import Report, argument_parser, command
from modules import Module
from pytorch_lightning.trainer import call
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import qat_tricks
from qat_tricks.graph.layers import activation_quantizers, layers
from qat_tricks.tricks.prune import Prune, prune

RECIPE, OVERRIDES = "int8_prune50", ["~stages.prune_qat.tricks.distill"]
BAR = 0.01
SCHEDULE = 5000  # steps of the fit that the schedules are made for; the benchmark ends earlier


class Hooks:
    """Measures, while it is entered, the seconds that a thread spends in Lightning's calls of
    callbacks.
    """

    def __init__(self) -> None:
        self.of = threading.local()
        self.own = call._call_callback_hooks

    def __enter__(self) -> "Hooks":
        call._call_callback_hooks = self.timed
        return self

    def __exit__(self, *_: Any) -> None:
        call._call_callback_hooks = self.own

    def timed(self, *args: Any, **kwargs: Any) -> None:
        started = time.thread_time()
        self.own(*args, **kwargs)
        self.of.seconds = self.seconds + time.thread_time() - started

    @property
    def seconds(self) -> float:
        return getattr(self.of, "seconds", 0.0)


class Turns:
    """Gives the same batch again and again to several fits, a step to each in turn, and keeps their
    seconds.
    """

    def __init__(
        self, batch: tuple[Tensor, Tensor], contenders: int, steps: int, hooks: Hooks
    ) -> None:
        self.batch, self.steps, self.hooks = batch, steps, hooks
        # of a step, and in hooks
        self.seconds: list[list[tuple[float, float]]] = [[] for _ in range(contenders)]
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
            started, in_hooks = time.thread_time(), turns.hooks.seconds
            yield turns.batch
            turns.seconds[own].append(
                (time.thread_time() - started, turns.hooks.seconds - in_hooks)
            )
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
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(accelerator="cpu", max_epochs=1, callbacks=callbacks, **quiet)


def one_round(
    module: Module, data: tuple[Tensor, Tensor], last: int, steps: int, warmup: int
) -> list[Any]:
    """Seconds of each step, and of them in hooks: of two trainers without callbacks, and of one
    with, in place ``last``.
    """
    hooks = Hooks()
    turns = Turns(data, 3, warmup + steps, hooks)
    callbacks = qat_tricks.recipe(RECIPE, OVERRIDES)
    (schedule,) = (callback for callback in callbacks if isinstance(callback, Prune))
    # renewals of the masks, a few in a whole fit, are measured by themselves
    schedule.start, schedule.end = 0.9, 1.0
    modules = [copy.deepcopy(module) for _ in turns.seconds]

    def fit(place: int) -> None:
        trainer(callbacks if place == last else []).fit(modules[place], turns.loader(place))

    threads = [threading.Thread(target=fit, args=(place,)) for place in range(len(modules))]
    with hooks:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    places = [place for place in range(3) if place != last] + [last]
    return [turns.seconds[place][warmup:] for place in places]


def measure(
    network: torch.nn.Module, data: tuple[Tensor, Tensor], steps: int, warmup: int
) -> dict[str, float]:
    """Medians: a step's seconds without callbacks, by how much two such trainers differ, what
    callbacks add to their mean, and the seconds of one renewal of all masks. The places in the turn
    rotate, for each has its own place in memory.
    """
    module = prepare(network, data)
    rounds = [one_round(module, data, last, steps // 6, warmup) for last in (0, 1, 2) * 2]
    plain, again, ours = (list(chain(*seconds)) for seconds in zip(*rounds, strict=True))
    started = time.thread_time()
    prune(module.network, 0.25)
    renewal = time.thread_time() - started
    control = statistics.median(b - a for (a, _), (b, _) in zip(plain, again, strict=True))
    triples = list(zip(plain, again, ours, strict=True))
    added, in_hooks = (
        statistics.median(c[i] - (a[i] + b[i]) / 2 for a, b, c in triples) for i in (0, 1)
    )
    step = statistics.median(seconds for seconds, _ in plain + again)
    return {
        "plain": step,
        "control": control,
        "added": added,
        "hooks": in_hooks,
        "renewal": renewal,
    }


def tiny(classes: int = 1000) -> torch.nn.Module:
    """A network whose step lasts so short that the callbacks show."""
    nn = torch.nn
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, classes),
    )


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--models", nargs="+", default=["tiny", "resnet18", "mobilenet_v2"])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--warmup", type=int, default=3)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    processor = platform.processor() or platform.machine()
    report = Report(
        "Cost of the callbacks",
        [
            command(args, "batch", "size", "steps"),
            f"on {processor}, torch {torch.__version__}, Lightning {pl.__version__}.",
            "The same step with and without the callbacks of `int8_prune50` (no distillation), "
            "quantizers disabled, in turns; CPU",
            "time, medians. Noise: what two trainers without callbacks differ by;",
            "in hooks: by how much longer Lightning is busy calling callbacks.",
        ],
        (
            "network",
            "step ms",
            "noise ms",
            "callbacks add ms",
            "in hooks ms",
            "their share",
            "bar",
            "all masks once ms",
        ),
        args.out,
    )
    for name in args.models:
        torch.manual_seed(0)
        images = torch.randn(args.batch, 3, args.size, args.size)
        data = (images, torch.randint(0, 1000, (args.batch,)))
        network = tiny() if name == "tiny" else getattr(torchvision.models, name)()
        seconds = measure(network, data, args.steps, args.warmup)
        ms = {key: 1e3 * value for key, value in seconds.items()}
        report.add(
            name,
            f"{ms['plain']:.1f}",
            *(f"{ms[key]:+.2f}" for key in ("control", "added", "hooks")),
            f"**{ms['hooks'] / ms['plain']:.2%}**",
            # the tiny network is there for its milliseconds, which are the same for all
            "" if name == "tiny" else f"{BAR:.0%}",
            f"{ms['renewal']:.0f}",
        )
    report.add_lines(
        "",
        "Masks are renewed `updates` times a fit (50 by default), however long it is; such a step "
        "costs that more.",
    )


if __name__ == "__main__":
    main()
