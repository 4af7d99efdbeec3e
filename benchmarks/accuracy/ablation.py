# python benchmarks/accuracy/ablation.py --calibration PATH/imagenet_calib1000 \
#     --test-images PATH/imagenette160/val --cifar10 PATH/cifar10.pt --weights PATH/weights \
#     --runs PATH/runs --out docs/results/ablation.md
"""Each trick of our recipes added alone and each left out, on every network, per bits.

*Plain* is the recipe with its tricks for folding BatchNorm, placing quantizers and calibrating
only. The cells are those of ``harness.py``, in the same folder of runs.
"""

import argparse
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from harness import COLUMNS, Runs, about, cells_of_seeds, our_options, row, run_parser
from methods import Bits
from metrics import change
from networks import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
sys.path.insert(0, str(ROOT))

from common import Report, table_row
from methods.ours import RECIPES

from qat_tricks.recipes.recipe import load_recipe

PLAIN = ("fold_batchnorm", "quantize", "calibrate")
NEEDED = ("quantize", "calibrate")  # without them nothing is quantized


class Variant(NamedTuple):
    """A recipe with some of its tricks."""

    title: str
    trick: str | None  # the one that is left out
    options: dict[str, Any]  # of our method


def variants(args: argparse.Namespace, bits: str) -> Iterator[Variant]:
    """The whole recipe, plain, plain with each trick, and whole without each."""
    given = our_options(args, bits)
    name, own = (given["recipe"], []) if "recipe" in given else RECIPES[Bits.of(bits)]
    overrides = [*own, *given.get("overrides", [])]
    stage = load_recipe(name, overrides).stages[0]
    tricks = [trick.name for trick in stage.tricks]
    more = [trick for trick in tricks if trick not in PLAIN]

    def without(left_out: list[str]) -> dict[str, Any]:
        removed = [f"~stages.{stage.name}.tricks.{trick}" for trick in left_out]
        return {"recipe": name, "overrides": [*overrides, *removed]}

    # as the harness names the whole recipe, so that its cells are found
    yield Variant("whole recipe", None, given)
    yield Variant("plain", None, without(more))
    for trick in more:
        yield Variant(f"plain + {trick}", None, without([t for t in more if t != trick]))
    for trick in tricks:
        if trick not in NEEDED:
            yield Variant(f"without {trick}", trick, without([trick]))


def verdicts(runs: Runs, args: argparse.Namespace, bits: str) -> Iterator[str]:
    """A row a trick: what leaving it out does, over the networks and seeds."""
    found = list(variants(args, bits))
    for variant in found:
        if variant.trick is None:
            continue
        lost, harder, count = [], 0, 0
        for network in args.networks:
            whole = cells_of_seeds(args, network, bits, "ours", found[0].options)
            left_out = cells_of_seeds(args, network, bits, "ours", variant.options)
            for with_it, without_it in zip(whole, left_out, strict=True):
                ours, less = runs.results.get(with_it.name), runs.results.get(without_it.name)
                if not (ours and less and "kl" in ours and "kl" in less):
                    continue
                count += 1
                harder += less["kl"] > ours["kl"]
                difference = change(
                    runs.logits(with_it), runs.logits(without_it), runs.labels(network)
                )
                lost.append(100 * difference.mean().item())
        if count:
            worst, best = min(lost), max(lost)
            yield table_row(
                bits,
                variant.trick,
                f"{harder} of {count}",
                f"{sum(lost) / count:+.2f}",
                f"{worst:+.2f} to {best:+.2f}",
            )


def main() -> None:
    args = run_parser(__doc__).parse_args()
    torch.set_num_threads(args.threads)
    runs = Runs(args)
    report = Report(
        "Each trick added alone, each left out",
        [
            *about(args, runs),
            "",
            f"Plain: {', '.join(PLAIN)}. The tricks are those of the default recipe of the bits.",
        ],
        COLUMNS,
        args.out,
    )
    for network in args.networks:
        for bits in args.bits:
            for variant in variants(args, bits):
                cells = cells_of_seeds(args, network, bits, "ours", variant.options)
                cells_row = row(runs, variant.title, cells)
                if cells_row is not None:
                    report.add(*cells_row)
    report.add_lines(
        "",
        "What leaving a trick out does, over networks and seeds: where KL grows, the trick helped.",
        "",
        "| bits | left out | KL grows in | top-1, points, mean | least to most |",
        "|---|---|--:|--:|--:|",
    )
    for bits in args.bits:
        report.add_lines(*verdicts(runs, args, bits))


if __name__ == "__main__":
    main()
