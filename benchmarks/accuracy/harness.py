# python benchmarks/accuracy/harness.py --calibration PATH/imagenet_calib1000 \
#     --test-images PATH/imagenette160/val --cifar10 PATH/cifar10.pt --weights PATH/weights \
#     --environments PATH/environments --runs PATH/runs --out docs/results/accuracy.md
"""Accuracy of networks x bits x methods x seeds, without training: ours and peers.

Each cell runs in a process and an environment of its own, with the same weights, the same images
and the same metric. A cell that ``--runs`` has is not run again.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from images import prepare
from methods import METHODS, Method
from metrics import agreement, change, kl_divergence, paired_interval
from networks import NETWORKS, ROOT

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import Report, command

TEST_BATCH = 50


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run: what decides its result."""

    network: str
    bits: str
    method: str
    seed: int
    images: int
    test: int
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """A short name that differs for each cell."""
        key = json.dumps(self.__dict__, sort_keys=True)
        digest = hashlib.sha256(key.encode()).hexdigest()[:8]
        return f"{self.network}_{self.bits}_{self.method}_{self.seed}_{digest}"


class Runs:
    """The results so far, in a folder: ``cells.jsonl``, and the logits of each cell.

    Args:
        args: the options of ``run_parser``.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.folder: Path = args.runs
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file = self.folder / "cells.jsonl"
        self.results: dict[str, dict[str, Any]] = {}
        if self.file.is_file():
            for line in self.file.read_text(encoding="utf-8").splitlines():
                result = json.loads(line)
                self.results[result["name"]] = result  # a later line takes the place of an earlier
        self.done_again: set[str] = set()

    def result(self, cell: Cell) -> dict[str, Any] | None:
        """The cell's result, run now if it is not there; None with ``--only-table``."""
        found = self.results.get(cell.name)
        if self.args.only_table or (found and not self._wanted_again(cell, found)):
            return found
        result = {"name": cell.name, **cell.__dict__, **self._run(cell)}
        self.done_again.add(cell.name)
        self.results[cell.name] = result
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
        return result

    def _wanted_again(self, cell: Cell, found: dict[str, Any]) -> bool:
        if cell.name in self.done_again:
            return False
        return cell.method in self.args.again or (self.args.retry_failed and "failed" in found)

    def logits(self, cell: Cell) -> torch.Tensor:
        """The quantized network's logits ``[test, classes]``."""
        return torch.load(self.folder / "cells" / cell.name / "logits.pt", weights_only=True)

    def data(self, network: str) -> Path:
        """File of the network's images."""
        args = self.args
        return prepare(
            NETWORKS[network], self.folder, args.calibration, args.test_images, args.cifar10
        )

    def labels(self, network: str) -> torch.Tensor:
        """Right classes of the test images."""
        data = torch.load(self.data(network), weights_only=True, mmap=True)
        return data["labels"][: self.args.test].clone()

    def float_logits(self, network: str) -> torch.Tensor:
        """The float network's logits of the test images, computed once."""
        path = self.folder / "float" / f"{network}_{self.args.test}.pt"
        if not path.is_file():
            path.parent.mkdir(exist_ok=True)
            found = NETWORKS[network]
            net = found.load(self._weights(network))
            data = torch.load(self.data(network), weights_only=True, mmap=True)
            with torch.no_grad():
                parts = [
                    net(found.normalize(part))
                    for part in data["test"][: self.args.test].split(TEST_BATCH)
                ]
            torch.save(torch.cat(parts), path)
        return torch.load(path, weights_only=True)

    def _weights(self, network: str) -> Path:
        """The first of the folders of weights that has the network's."""
        for folder in self.args.weights:
            if (folder / NETWORKS[network].weights).is_file():
                return folder
        raise SystemExit(
            f"no folder of --weights has {NETWORKS[network].weights}, which {network} needs: leave "
            "the network out of --networks, or train it with train_networks.py"
        )

    def _run(self, cell: Cell) -> dict[str, Any]:
        method = METHODS[cell.method]
        python = self._python(method)
        if not python.is_file():
            return {"cannot": f"no environment {method.environment} in --environments"}
        folder = self.folder / "cells" / cell.name
        folder.mkdir(parents=True, exist_ok=True)
        described = {
            **cell.__dict__,
            "module": method.module,
            "package": method.package,
            "options": {**method.options, **cell.options},
            "weights": str(self._weights(cell.network).absolute()),
            "data": str(self.data(cell.network).absolute()),
            "threads": self.args.threads,
        }
        (folder / "cell.json").write_text(json.dumps(described), encoding="utf-8")
        (folder / "result.json").unlink(missing_ok=True)
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.args.threads)}
        environment["PYTHONPATH"] = "" if method.environment else str(ROOT)
        script = Path(__file__).with_name("cell.py")
        print(f"… {cell.name}", file=sys.stderr, flush=True)
        with (folder / "log.txt").open("w", encoding="utf-8") as log:
            try:
                code = subprocess.run(
                    [str(python), str(script), str(folder.absolute())],
                    env=environment,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    timeout=60 * self.args.minutes,
                ).returncode
            except subprocess.TimeoutExpired:
                return {"failed": f"stopped after {self.args.minutes} minutes"}
        for left_over in folder.glob("*.onnx"):
            if not self.args.keep:
                left_over.unlink()
        if not (folder / "result.json").is_file():
            return {"failed": f"the process ended with {code}"}
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        if "judge" in result:
            result |= self._measured(cell)
        return result

    def _python(self, method: Method) -> Path:
        if not method.environment:
            return Path(sys.executable)
        return self.args.environments / method.environment / "bin" / "python"

    def _measured(self, cell: Cell) -> dict[str, Any]:
        expected, got = self.float_logits(cell.network), self.logits(cell)
        mean, low, high = paired_interval(change(expected, got, self.labels(cell.network)))
        return {
            "change": 100 * mean,
            "interval": [100 * low, 100 * high],
            "agreement": agreement(expected, got),
            "kl": kl_divergence(expected, got),
        }


def row(runs: Runs, title: str, cells: Sequence[Cell]) -> tuple[str, ...] | None:
    """The row of cells that differ in their seeds only; None where none was run.

    The interval is that of the mean over the seeds, with the images as what varies.
    """
    first = cells[0]
    results = [(cell, result) for cell in cells if (result := runs.result(cell)) is not None]
    if not results:
        return None
    head = (first.network, first.bits, title)
    done = [(cell, result) for cell, result in results if "change" in result]
    if not done:
        last = results[-1][1]
        reason = f"cannot: {last['cannot']}" if "cannot" in last else f"failed: {last['failed']}"
        return (*head, reason.replace("|", "/"), "", "", "", "", "")
    expected, labels = runs.float_logits(first.network), runs.labels(first.network)
    each = torch.stack([change(expected, runs.logits(cell), labels) for cell, _ in done])
    mean, low, high = paired_interval(each.mean(0))
    of_seeds = [f"{result['change']:+.2f}" for _, result in done]
    count = len(done)

    def average(key: str) -> float:
        return sum(result[key] for _, result in done) / count

    return (
        *head,
        f"{100 * mean:+.2f}",
        f"{100 * low:+.2f} to {100 * high:+.2f}",
        " ".join(of_seeds) if count > 1 else "",
        f"{average('agreement'):.4f}",
        f"{average('kl'):.4f}",
        f"{average('seconds'):.0f}" + ("" if done[0][1]["judge"] == "ONNX Runtime" else ", sim."),
    )


COLUMNS = (
    "network",
    "bits",
    "method",
    "top-1 change:",
    "95 % interval:",
    "each seed:",
    "agreement with float:",
    "KL:",
    "seconds:",
)


def chosen_cells(args: argparse.Namespace) -> Iterator[list[Cell]]:
    """For each network, bits and method the cells of all seeds."""
    for network in args.networks:
        for bits in args.bits:
            for method in args.methods:
                options = our_options(args, bits) if method == "ours" else {}
                yield cells_of_seeds(args, network, bits, method, options)


def cells_of_seeds(
    args: argparse.Namespace, network: str, bits: str, method: str, options: dict[str, Any]
) -> list[Cell]:
    """The cells that differ in the seed only."""
    return [
        Cell(
            network=network,
            bits=bits,
            method=method,
            seed=seed,
            images=args.images,
            test=args.test,
            options=options,
        )
        for seed in args.seeds
    ]


def our_options(args: argparse.Namespace, bits: str) -> dict[str, Any]:
    """Recipe and overrides of our own cells, where the command line gives them."""
    options: dict[str, Any] = {}
    recipes = dict(_pair(text) for text in args.recipes)
    if bits in recipes:
        options["recipe"] = recipes[bits]
    if args.override:
        options["overrides"] = args.override
    return options


def _pair(text: str) -> tuple[str, str]:
    bits, mark, recipe = text.partition("=")
    if not mark:
        raise SystemExit(f"--recipes {text}: give BITS=RECIPE, such as W4A8=w4a8_ptq")
    return bits, recipe


def run_parser(description: str | None) -> argparse.ArgumentParser:
    """The options that the harness and the ablation share."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="Markdown file to write, as in docs/results")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--calibration", type=Path, help="ImageNet images, a folder a class")
    parser.add_argument("--test-images", type=Path, help="ImageNet images, of some classes")
    parser.add_argument("--cifar10", type=Path, help="file of tensors, or folder of train and test")
    parser.add_argument("--weights", type=Path, nargs="+", required=True, help="folders of weights")
    parser.add_argument("--runs", type=Path, required=True, help="folder that keeps the results")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--bits", nargs="+", default=["W8A8", "W4A8", "W4A4"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the images' choice")
    parser.add_argument("--images", type=int, default=512, help="that calibrate")
    parser.add_argument("--test", type=int, default=2000, help="test images, at most")
    parser.add_argument("--minutes", type=int, default=60, help="a cell may take")
    parser.add_argument("--keep", action="store_true", help="keep the ONNX files")
    parser.add_argument("--recipes", nargs="*", default=[], help="ours, of the bits: W4A8=w4a8_ptq")
    parser.add_argument("--override", nargs="*", default=[], help="of our recipes, as Hydra's")
    parser.add_argument(
        "--again", nargs="*", default=[], choices=METHODS, help="run these methods' cells again"
    )
    parser.add_argument("--retry-failed", action="store_true", help="run failed cells again")
    parser.add_argument("--only-table", action="store_true", help="run nothing")
    return parser


def about(args: argparse.Namespace, runs: Runs) -> list[str]:
    """The lines above a table: command, networks, versions."""
    lines = [
        f"{command(args, 'images', 'test', 'threads')}, and where the images, weights and "
        "environments are.",
        "",
        "Change of top-1 in points against the float network, paired on the test images, "
        "with its 95 % interval; with",
        "several seeds (which choose the calibration images) the mean, and each seed's. KL: of the "
        "float network's output to the",
        "quantized one's, in nats. Below 8 bits the first and the last layer have 8, where a "
        "method can. Judged by ONNX Runtime's output of the",
        "exported file; `sim.` where only a method's own simulation is to be had. Beside other "
        "jobs the seconds are upper bounds.",
        "",
    ]
    floats = []
    for network in args.networks:
        right = runs.float_logits(network).argmax(1) == runs.labels(network)
        floats.append(f"{network} {100 * right.float().mean().item():.2f} ({len(right)} images)")
    return [*lines, f"Float top-1: {', '.join(floats)}."]


def versions(results: Iterable[dict[str, Any]]) -> str:
    """The packages that made these results."""
    found = {
        f"{name} {version}"
        for result in results
        for name, version in result.get("versions", {}).items()
        if version
    }
    return f"Versions: {', '.join(sorted(found))}." if found else ""


def main() -> None:
    parser = run_parser(__doc__)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument(
        "--environments", type=Path, default=Path("environments"), help="a folder a peer"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    runs = Runs(args)
    report = Report(
        "Accuracy without training, against peers", about(args, runs), COLUMNS, args.out
    )
    missing: dict[str, list[str]] = {}
    used = []
    for cells in chosen_cells(args):
        title = METHODS[cells[0].method].title
        cells_row = row(runs, title, cells)
        if cells_row is None:
            missing.setdefault(title, []).append(f"{cells[0].network} {cells[0].bits}")
        else:
            report.add(*cells_row)
            used += [runs.results[cell.name] for cell in cells if cell.name in runs.results]
    report.add_lines("", versions(used))
    if missing:
        every = len(args.networks) * len(args.bits)
        report.add_lines("", "Not run here:", "")
        for title, cells_missing in missing.items():
            where = "all" if len(cells_missing) == every else ", ".join(cells_missing)
            report.add_lines(f"- {title}: {where}.")


if __name__ == "__main__":
    main()
