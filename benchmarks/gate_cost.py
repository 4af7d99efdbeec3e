# python benchmarks/gate_cost.py --networks mobilenet_v2 resnet18
"""The share of the time of ``int8_ptq`` that the equivalence gate takes.

The networks are torchvision's, with random weights and images: only time is measured. The gate's
time includes the steps that it tries on a copy, which the recipe makes once more on the network.
"""

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any

import torch
import torchvision
from common import Report, argument_parser, command

import qat_tricks
from qat_tricks.graph.equivalence import Gate

MEASURED = ("__post_init__", "measure", "note_change", "apply_kept")


class Watch:
    """Adds up the seconds that methods of classes take, without those called by each other."""

    def __init__(self, methods: dict[type, tuple[str, ...]]) -> None:
        self.seconds, self.depth = 0.0, 0
        for kind, names in methods.items():
            for name in names:
                setattr(kind, name, self._timed(getattr(kind, name)))

    def _timed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            self.depth += 1
            try:
                return method(*args, **kwargs)
            finally:
                self.depth -= 1
                if self.depth == 0:
                    self.seconds += time.perf_counter() - started

        return timed


def main() -> None:
    parser = argument_parser(__doc__, threads=2)
    parser.add_argument("--networks", nargs="+", default=["mobilenet_v2", "resnet18"])
    parser.add_argument("--images", type=int, default=512)
    args: argparse.Namespace = parser.parse_args()
    torch.set_num_threads(args.threads)
    watch = Watch({Gate: MEASURED})
    report = Report(
        "What the equivalence gate costs",
        [f"{command(args, 'images', 'threads')}, torch {torch.__version__}, 224 px."],
        ("network", "int8_ptq:", "gate:", "share:"),
        args.out,
    )
    for name in args.networks:
        torch.manual_seed(0)
        net = getattr(torchvision.models, name)(weights=None).eval()
        images = [torch.randn(32, 3, 224, 224) for _ in range(args.images // 32)]
        watch.seconds, started = 0.0, time.perf_counter()
        qat_tricks.quantize(net, images)
        total = time.perf_counter() - started
        share = f"{watch.seconds / total:.1%}"
        report.add(name, f"{total:.1f} s", f"{watch.seconds:.2f} s", share)


if __name__ == "__main__":
    main()
