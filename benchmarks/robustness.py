# python benchmarks/robustness.py --workers 16 --out docs/results/robustness.md
"""Fine-tuning at ordinary learning rates: a recipe against the float network's own fine-tune.

Four small networks are trained in float on scikit-learn's digits. Each is then fine-tuned with
every optimizer, in float and with each recipe, by the same trainer, loader and number of epochs. A
cell holds the difference of the test accuracy to the float fine-tune of the same seed, in points.
Every fine-tuned network is exported, and its file is compared with the simulation on all test
images.
"""

import argparse
import itertools
import json
import multiprocessing
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from common import Report, argument_parser, command
from rich.progress import track
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import qat_tricks

FLOAT = "float"
BATCH, BASE_EPOCHS = 32, 8
TRAINS = 85.0  # in %; float fine-tunes that end below it on average have not trained


# --- networks -------------------------------------------------------------------------------------
def conv(inputs: int, outputs: int, size: int = 3, **settings: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False, **settings)


class Block(nn.Module):
    """Conv, BatchNorm, ReLU, conv, BatchNorm, add, ReLU (He et al. 2015, arXiv 1512.03385)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, outputs, stride=stride), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = conv(outputs, outputs), nn.BatchNorm2d(outputs)
        self.short = nn.Sequential()
        if stride > 1 or inputs != outputs:
            self.short = nn.Sequential(
                conv(inputs, outputs, 1, stride=stride), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.short(x))


class PreActBlock(nn.Module):
    """BatchNorm and ReLU before each conv (He et al. 2016, arXiv 1603.05027)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), conv(inputs, outputs, stride=stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(outputs), conv(outputs, outputs)
        self.short = None
        if stride > 1 or inputs != outputs:
            self.short = conv(inputs, outputs, 1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        short = x if self.short is None else self.short(out)
        return self.conv2(F.relu(self.bn2(self.conv1(out)))) + short


class InvertedResidual(nn.Module):
    """Expand, depthwise, project, with ReLU6 (Sandler et al. 2018, arXiv 1801.04381)."""

    def __init__(self, inputs: int, outputs: int, stride: int, expand: int = 4) -> None:
        super().__init__()
        hidden = inputs * expand
        self.layers = nn.Sequential(
            conv(inputs, hidden, 1),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(),
            conv(hidden, hidden, stride=stride, groups=hidden),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(),
            conv(hidden, outputs, 1),
            nn.BatchNorm2d(outputs),
        )
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.adds else self.layers(x)


class Residual(nn.Module):
    """A stem, three blocks, a pool and a linear."""

    def __init__(self, block: Callable[[int, int, int], nn.Module], *, preact: bool) -> None:
        super().__init__()
        stem: list[nn.Module] = [conv(1, 12, stride=2)]
        if not preact:
            stem += [nn.BatchNorm2d(12), nn.ReLU()]
        self.stem = nn.Sequential(*stem)
        widths = [(12, 12, 1), (12, 24, 2), (24, 48, 2)]
        self.blocks = nn.Sequential(*(block(*width) for width in widths))
        self.last = nn.BatchNorm2d(48) if preact else None
        self.fc = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x))
        if self.last is not None:
            x = F.relu(self.last(x))
        return self.fc(x.mean((2, 3)))


def plain() -> nn.Module:
    """Convs and ReLUs only."""
    layers: list[nn.Module] = []
    for inputs, outputs, stride in [(1, 16, 2), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 48, 2)]:
        layers += [nn.Conv2d(inputs, outputs, 3, stride, 1), nn.ReLU()]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10))
    for layer in net:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
    return net


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "ResNet": lambda: Residual(Block, preact=False),
    "PreAct-ResNet": lambda: Residual(PreActBlock, preact=True),
    "MobileNetV2-like": lambda: Residual(InvertedResidual, preact=False),
    "no BatchNorm": plain,
}
OPTIMIZERS = (
    "SGD 0.1",
    "SGD 0.03",
    "SGD 0.01",
    "SGD 0.005",
    "SGD 0.002",
    "Adam 0.001",
    "OneCycle 0.003",
    "Cosine 0.1",
)


# --- one fit --------------------------------------------------------------------------------------
class Classifier(pl.LightningModule):
    """An ordinary module: cross-entropy, one optimizer, perhaps a schedule."""

    def __init__(self, net: nn.Module, optimizer: str) -> None:
        super().__init__()
        self.net, self.optimizer = net, optimizer

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def configure_optimizers(self) -> Any:
        kind, rate = self.optimizer.split()
        lr, parameters = float(rate), self.parameters()
        if kind in ("SGD", "Cosine"):
            sgd = torch.optim.SGD(parameters, lr, momentum=0.9, weight_decay=5e-4)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, self.trainer.max_epochs)
            return [sgd], [schedule] if kind == "Cosine" else []
        if kind == "Adam":
            return torch.optim.Adam(parameters, lr)
        optimizer = torch.optim.AdamW(parameters, lr)
        steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=int(steps))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def data() -> tuple[TensorDataset, TensorDataset]:
    """The digits at 32x32: 900 to train on, 897 to test on."""
    source = load_digits()
    images = torch.from_numpy(source.images).float()[:, None] / 16
    images = F.interpolate(images, size=32, mode="bilinear")
    images, labels = (images - 0.3) / 0.35, torch.from_numpy(source.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[:900], order[900:]
    return TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test])


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One fine-tune."""

    network: str
    optimizer: str
    precision: str
    seed: int
    recipe: str


def trainer(epochs: int, precision: str, device: str, callbacks: list[Any]) -> pl.Trainer:
    return pl.Trainer(
        max_epochs=epochs,
        precision=precision,  # type: ignore[arg-type]
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def loader(train: TensorDataset) -> DataLoader[Any]:
    return DataLoader(train, BATCH, shuffle=True, drop_last=True)


def train_base(network: str, seed: int, folder: str, device: str) -> None:
    """Trains a float network and keeps its weights."""
    _quiet()
    pl.seed_everything(seed, verbose=False)
    # A net without BatchNorm does not bear the rate of the others from scratch.
    rate = "OneCycle 0.003" if network == "no BatchNorm" else "OneCycle 0.01"
    module = Classifier(NETWORKS[network](), rate)
    trainer(BASE_EPOCHS, "32-true", device, []).fit(module, loader(data()[0]))
    torch.save(module.net.state_dict(), Path(folder) / f"{network}_{seed}.pt")


def run(cell: Cell, folder: str, epochs: int, device: str, export: bool) -> dict[str, Any]:
    """Fine-tunes; returns the accuracy on the test images, and how the file compares."""
    _quiet()
    train, test = data()
    net = NETWORKS[cell.network]()
    net.load_state_dict(torch.load(Path(folder) / f"{cell.network}_{cell.seed}.pt"))
    pl.seed_everything(cell.seed, verbose=False)
    module = Classifier(net, cell.optimizer)
    callbacks = [] if cell.recipe == FLOAT else qat_tricks.recipe(cell.recipe, report=False)
    result: dict[str, Any] = asdict(cell)
    try:
        trainer(epochs, cell.precision, device, callbacks).fit(module, loader(train))
        module.cpu().eval()
        images, labels = test.tensors
        with torch.no_grad():
            result["accuracy"] = float((module(images).argmax(1) == labels).double().mean())
        if cell.recipe != FLOAT and export:
            path = Path(folder) / f"{abs(hash(cell))}.onnx"
            parity = qat_tricks.export_onnx(module.net, path, images[:8], images=[images])
            result |= {
                "agreement": parity.top1_agreement,
                "sqnr_db": parity.sqnr_db,
                "differing": max(tensor.differing for tensor in parity.layers),
            }
            path.unlink()
    except (qat_tricks.QatTricksError, ValueError) as error:
        result |= {"accuracy": result.get("accuracy", 0.0), "error": str(error)[:300]}
    return result


def _quiet() -> None:
    import logging

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in ("pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)


# --- all fits -------------------------------------------------------------------------------------
def all_cells(args: argparse.Namespace) -> list[Cell]:
    # In the order of importance, so that an interrupted run has whole rows.
    choices = itertools.product(
        args.precisions, args.optimizers, args.networks, range(args.seeds), [FLOAT, *args.recipes]
    )
    return [
        Cell(network=network, optimizer=optimizer, precision=precision, seed=seed, recipe=recipe)
        for precision, optimizer, network, seed, recipe in choices
    ]


def run_all(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    context = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(args.workers, mp_context=context) as pool,
    ):
        bases = [
            pool.submit(train_base, network, seed, folder, args.device)
            for network in args.networks
            for seed in range(args.seeds)
        ]
        for base in track(bases, "train in float"):
            base.result()
        arguments = (folder, args.epochs, args.device, args.export)
        fits = [pool.submit(run, cell, *arguments) for cell in all_cells(args)]
        for fit in track(as_completed(fits), "fine-tune", total=len(fits)):
            yield fit.result()


def rows(args: argparse.Namespace, results: list[dict[str, Any]]) -> Iterator[list[str]]:
    by_cell = {tuple(r[k] for k in Cell.__dataclass_fields__): r for r in results}
    for network, optimizer, precision in itertools.product(
        args.networks, args.optimizers, args.precisions
    ):
        seeds = [(network, optimizer, precision, seed) for seed in range(args.seeds)]
        kinds = [FLOAT, *args.recipes]
        if any((*seed, kind) not in by_cell for seed in seeds for kind in kinds):
            continue  # of a run that was interrupted
        floats = [100 * by_cell[(*seed, FLOAT)]["accuracy"] for seed in seeds]
        trains = statistics.mean(floats) >= TRAINS
        cells = [network, optimizer, precision, " ".join(f"{a:.1f}" for a in floats)]
        for recipe in args.recipes:
            ours = [100 * by_cell[(*seed, recipe)]["accuracy"] for seed in seeds]
            gains = [a - b for a, b in zip(ours, floats, strict=True)]
            mean, error = statistics.mean(gains), standard_error(gains)
            text = f"{mean:+.1f} ± {error:.1f} ({' '.join(f'{a:.1f}' for a in ours)})"
            cells.append(f"**{text}**" if trains and mean < -1 else text)
        cells.append("" if trains else "float does not train")
        yield cells


def standard_error(values: list[float]) -> float:
    """Of the mean of ``values``; 0 for a single one."""
    if len(values) < 2:
        return 0.0
    return statistics.stdev(values) / len(values) ** 0.5


def parity_line(results: list[dict[str, Any]]) -> str:
    ours = [r for r in results if r["recipe"] != FLOAT]
    exported = [r for r in ours if "agreement" in r]
    exact = sum(r["differing"] == 0 for r in exported)
    least = min((r["agreement"] for r in exported), default=float("nan"))
    decibels = min((r["sqnr_db"] for r in exported), default=float("nan"))
    return (
        f"{len(exported)} of {len(ours)} networks exported; in {exact} of them no integer of any "
        f"quantized tensor differs between the simulation and ONNX Runtime; smallest agreement of "
        f"the class {least:.4f}, smallest SQNR of the logits {decibels:.0f} dB."
    )


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--optimizers", nargs="+", default=list(OPTIMIZERS))
    parser.add_argument("--precisions", nargs="+", default=["32-true", "bf16-mixed"])
    parser.add_argument("--recipes", nargs="+", default=["int8_qat", "int8_prune50"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--no-export", dest="export", action="store_false")
    parser.add_argument("--json", type=Path, help="file for the single results")
    args = parser.parse_args()
    results = []
    for result in run_all(args):
        results.append(result)
        if args.json:  # as it grows, so that an interrupted run leaves its results
            args.json.write_text(json.dumps(results, indent=1), encoding="utf-8")
    report = Report(
        "Fine-tuning at ordinary learning rates",
        [
            command(args, "seeds", "epochs", "device"),
            f"with torch {torch.__version__}, pytorch-lightning {pl.__version__}.",
            "",
            "Test accuracy in %: of the float fine-tune, one figure a seed; of a recipe the mean "
            "difference to it in points, with its standard error, and one figure a seed. Bold: "
            f"more than a point below where float trains (at least {TRAINS:.0f} %).",
        ],
        ("network", "optimizer", "precision", "float", *args.recipes, ""),
        args.out,
    )
    for cells in rows(args, results):
        report.add(*cells)
    report.add_lines("", parity_line(results))
    errors = sorted({r["error"] for r in results if "error" in r})
    if errors:
        report.add_lines("", *(f"- {error}" for error in errors))


if __name__ == "__main__":
    main()
