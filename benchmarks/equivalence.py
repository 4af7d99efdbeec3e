# python benchmarks/equivalence.py --calibration PATH/imagenet_calib1000 \
#     --out docs/results/equivalence.md
"""How much of the user's network each step of ``int8_ptq`` leaves, in dB, in both modes.

The float function after each step is compared with the user's own network, as the gate does it at
each run: in evaluation mode, and in training mode with the same random state. The networks are
those of coverage.py, with weights made of real images, and the small structures of the tests. The
last column of figures is of the rebuilt network: the spec and the state dict of the quantized one,
in a network made anew.
"""

import argparse
import re
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import Report, argument_parser, command
from coverage import NAMES, SIZES, give_weights, load
from torch import Tensor, nn

from qat_tricks.errors import QatTricksError
from qat_tricks.graph.equivalence import Gate, buffers_kept, sqnr, tensors_in
from qat_tricks.graph.modes import float_mode
from qat_tricks.graph.random_state import seed_all
from qat_tricks.graph.spec import spec_of
from qat_tricks.graph.surgery import rebuild
from qat_tricks.graph.workbench import Workbench
from qat_tricks.models.build import build_model
from qat_tricks.tricks import Calibrate, Equalize, FoldBatchnorm, Quantize

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.helpers.modes import MODAL
from tests.helpers.structures import STRUCTURES

STEPS = ("traced", "folded", "BatchNorms made convs", "equalized", "biases absorbed")
STEPS += ("caps filled", "quantizers placed")
IMAGES = 16  # that give a network its weights; the first 8 of them also equalize it


def measure(name: str, net: nn.Module, again: nn.Module, images: Tensor) -> list[str]:
    """The cells of one network.

    Args:
        name: of the network.
        net: with weights that mean something; it is changed.
        again: the same network made anew.
        images: ``[N, C, H, W]``, of which the gate takes the first.
    """
    work = Workbench(net, lambda count: [images])
    for trick in (FoldBatchnorm(), Equalize(num_images=8), Quantize(), Calibrate(num_images=8)):
        trick.apply_once(work)
    steps = {step["name"]: step for step in spec_of(work.network)["equivalence"]}
    left_out = [f"{part} ({name})" for name, step in steps.items() for part in step["undone"]]
    rebuilt = rebuild(again, spec_of(work.network))
    rebuilt.load_state_dict(work.network.state_dict())
    figures = [_rebuilt(work.network, rebuilt, images[:2], training=mode) for mode in (False, True)]
    return [
        name,
        *(_cell(steps.get(step)) for step in STEPS),
        _both(*figures),
        ", ".join(left_out) or "nothing",
    ]


def _rebuilt(network: nn.Module, again: nn.Module, images: Tensor, *, training: bool) -> float:
    outputs = []
    for net in (network, again):
        net.train(training)
        seed_all(0)
        with float_mode(net), buffers_kept(net), torch.no_grad():
            outputs.append(tensors_in(net(images)))
    return sqnr(*outputs)


def _cell(step: dict[str, Any] | None) -> str:
    return "" if step is None else _both(step["evaluation_db"], step["training_db"])


def _both(evaluation: float, training: float | None) -> str:
    return f"{evaluation:.0f} / {'-' if training is None else f'{training:.0f}'}"


def big(name: str, folder: Path) -> Sequence[Any]:
    """A network of coverage.py, and images for it."""
    batch = load(folder, IMAGES, SIZES.get(name, 224))
    labelled = [(images, labels % 10) for images, labels in batch]
    torch.manual_seed(0)
    net = give_weights(build_model(name, num_classes=10), [labelled[0][0][:8]], labelled)
    return name, net, build_model(name, num_classes=10), labelled[0][0][:8]


def small() -> list[Sequence[Any]]:
    """The structures of the tests, and networks that act on their mode."""
    rows: list[Sequence[Any]] = []
    for name, (build, shape) in STRUCTURES.items():
        images = torch.randn(8, *shape, generator=torch.Generator().manual_seed(0))
        rows.append((name, build(), build(), images))
    for kind in MODAL:
        torch.manual_seed(0)
        rows.append((kind.__name__, kind(), kind(), torch.randn(8, 3, 16, 16)))
    return rows


def main() -> None:
    parser = argument_parser(__doc__, threads=2)
    parser.add_argument("--calibration", type=Path, required=True, help="a folder a class")
    parser.add_argument("--networks", nargs="*", default=NAMES)
    args: argparse.Namespace = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")  # what is left out stands in the last column
    report = Report(
        "Each step against the user's network",
        [
            f"{command(args, 'threads')}, torch {torch.__version__}.",
            "",
            "SQNR in dB, in evaluation / in training mode, at most 200 (no bit differs). A step "
            f"below {Gate.least_db:g} dB is left out or refused. From `folded` on, training mode "
            "is compared with the BatchNorms of the user's network frozen. `caps filled` may "
            "change the function by design, for images unlike those seen. An empty cell: the "
            "network has nothing for that step. The last rows are small structures of the tests.",
        ],
        ("network", *(f"{step}:" for step in STEPS), "rebuilt:", "left out"),
        args.out,
    )
    lowest = {"evaluation": 200.0, "training": 200.0}
    started = time.perf_counter()
    tasks = [lambda name=name: big(name, args.calibration) for name in args.networks]
    tasks += [lambda row=row: row for row in small()]
    for task in tasks:
        name, net, again, images = task()
        try:
            cells = measure(name, net, again, images)
        except QatTricksError as error:
            # Without the folders of this machine.
            report.add(name, "refused: " + re.sub(r"/\S*/site-packages/", "", str(error)))
            continue
        report.add(*cells)
        for cell in cells[1:-1]:
            for mode, figure in zip(lowest, cell.split(" / "), strict=False):
                if figure not in ("", "-"):
                    lowest[mode] = min(lowest[mode], float(figure))
        del net, again
    report.add_lines(
        "",
        f"{len(tasks)} networks in {time.perf_counter() - started:.0f} s. The lowest figure is "
        f"{lowest['evaluation']:.0f} dB in evaluation and {lowest['training']:.0f} dB in training.",
    )


if __name__ == "__main__":
    main()
