# python benchmarks/accuracy/qat.py --data cifar10.pt --networks resnet20=cifar10_resnet20.pt \
#     --finetune-epochs 15 --jobs w4a4_qat w2a4_qat \
#     "int8_prune50 stages.prune_qat.tricks.prune.sparsity=0.7" --seeds 0 1 2 \
#     --device cuda --workers 8 --runs outputs/qat --out docs/results/qat.md
"""Fine-tuned recipes on CIFAR-10, judged on ONNX Runtime's output for the test images.

The float network is fine-tuned to these images first, once for each network; then each recipe is
trained from it with each seed, in an ordinary trainer. All are processes of their own, several at
once. A job is the name of a recipe, then overrides of it; ``epochs=6``, ``lr=0.01`` and
``batch=256`` replace what the recipe and the options say for this job alone, and ``average=0.998``
adds Lightning's ``EMAWeightAveraging`` with that decay. What has its result in
``--runs`` already is not run again, and a job that fails or takes too long ends no other.

Data and networks stay on the device; each step's images are shifted by up to 4 pixels and half of
them mirrored. SGD with Nesterov momentum 0.9, weight decay 5e-4, one-cycle schedule, as
``train.py`` has it by default.
"""

import argparse
import copy
import hashlib
import json
import math
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the benchmarks' common parts

from common import table_row
from networks import NETWORKS

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SHIFT = 4  # pixels, each way
OWN_WORDS = ("epochs", "lr", "batch", "average")  # of a job, and no overrides
Z95 = 1.959964  # of a two-sided interval of 95 %
COLUMNS = (
    "network",
    "job",
    "seed",
    "float",
    "quantized",
    "change, points (95 %)",
    "agreement",
    "zeros",
    "s an epoch",
    "minutes",
)
MEANS = ("network", "job", "seeds", "change, points: mean", "least", "most", "agreement")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one process does: fine-tune a float network, or train a recipe from it."""

    network: str
    weights: str  # of the network before it was fine-tuned
    float_file: str  # of the network fine-tuned: weights, and its classes of the test images
    data: str
    result: str  # JSON
    recipe: tuple[str, ...] = ()  # its name, then overrides; of none the float network is trained
    seed: int = 0
    device: str = "cpu"
    threads: int = 1
    epochs: int | None = None  # None: as the recipe says
    lr: float | None = None
    batch: int = 128
    average: float | None = None  # decay of averaged weights
    precision: str = "32"  # of Lightning's trainer
    limit: int | None = None  # train images
    test_images: int | None = None

    @property
    def title(self) -> str:
        """The job as it was asked for."""
        return " ".join(self.recipe) or f"float, {self.epochs} epochs"


# The data


class Images:
    """Batches of train images on a device, augmented and in a new order in each epoch.

    Args:
        images: uint8 ``[N, 3, H, W]``, on the device.
        labels: int64 ``[N]``.
        batch: images in a batch; a last, smaller one is left out.
        seed: of order and augmentation.
    """

    def __init__(self, images: Tensor, labels: Tensor, batch: int, seed: int) -> None:
        self.images, self.labels, self.batch = images, labels, batch
        self.random = torch.Generator(images.device).manual_seed(seed)

    def __len__(self) -> int:
        return max(1, len(self.images) // self.batch)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        options: dict[str, Any] = {"generator": self.random, "device": self.images.device}
        order = torch.randperm(len(self.images), **options)
        for index in range(len(self)):
            rows = order[index * self.batch : (index + 1) * self.batch]
            images = self.images[rows]
            height, width = images.shape[-2:]
            windows = F.pad(images, [SHIFT] * 4).unfold(2, height, 1).unfold(3, width, 1)
            top, left = torch.randint(2 * SHIFT + 1, (2, len(rows)), **options)
            every = torch.arange(len(rows), device=images.device)
            images = windows[every, :, top, left]
            mirrored = torch.rand(len(rows), 1, 1, 1, **options) < 0.5
            yield normalized(torch.where(mirrored, images.flip(-1), images)), self.labels[rows]


def normalized(images: Tensor) -> Tensor:
    """uint8 images as the networks take them."""
    mean, std = (
        torch.tensor(values, device=images.device).view(3, 1, 1) * 255 for values in (MEAN, STD)
    )
    return (images.float() - mean) / std


def read_data(path: Path) -> dict[str, Tensor]:
    """Images uint8 ``[N, 3, 32, 32]`` and labels ``[N]``, as ``train_x``, ``train_y``, ``test_x``
    and ``test_y``."""
    content = torch.load(path, weights_only=True)
    return {
        key: torch.as_tensor(content[key]) for key in ("train_x", "train_y", "test_x", "test_y")
    }


def tensors_of_folder(folder: Path, file: Path) -> Path:
    """Decodes ``folder``, with ``train`` and ``test`` and a folder a class, into ``file``."""
    from rich.progress import track
    from torchvision.datasets import ImageFolder
    from torchvision.transforms.functional import pil_to_tensor

    if not file.is_file():
        content: dict[str, Tensor] = {}
        for part in ("train", "test"):
            images = ImageFolder(str(folder / part), pil_to_tensor)
            with ThreadPoolExecutor() as pool:  # Pillow decodes outside of Python's lock
                decoded = pool.map(images.__getitem__, range(len(images)))
                pairs = list(track(decoded, f"decoding {part}", len(images), transient=True))
            content[f"{part}_x"] = torch.stack([image for image, _ in pairs])
            content[f"{part}_y"] = torch.tensor([label for _, label in pairs])
        torch.save(content, file)
    return file


# One job, in a process of its own


def run_job(job: Job) -> dict[str, Any]:
    """Trains as ``job`` says and measures on the test images."""
    import pytorch_lightning as pl

    torch.set_num_threads(job.threads)
    pl.seed_everything(job.seed, workers=True, verbose=False)
    start = time.perf_counter()
    data = read_data(Path(job.data))
    # Files may be sorted by class. The same test images in every job.
    some = torch.randperm(len(data["test_x"]), generator=torch.Generator().manual_seed(0))
    some = some[: job.test_images].sort().values
    test_x, test_y = data["test_x"][some], data["test_y"][some]
    device = torch.device(job.device)
    order = torch.randperm(len(data["train_x"]), generator=torch.Generator().manual_seed(job.seed))
    order = order[: job.limit]
    train_x, train_y = data["train_x"][order].to(device), data["train_y"][order].to(device)
    loaded = _DataModule(Images(train_x, train_y, job.batch, job.seed))
    if not job.recipe:
        return _finetune(job, loaded, test_x, test_y)
    known = torch.load(job.float_file, weights_only=True)
    network = _build(job.network, known["weights"])
    quantized, seconds = _train_recipe(job, network, loaded)
    classes = _onnx_classes(job, quantized, test_x)
    from qat_tricks.recipes.fit_report import zeros

    plain, ours = known["classes"] == test_y, classes == test_y
    low, change, high = paired_change(plain, ours)
    return {
        "float": float(plain.double().mean()),
        "quantized": float(ours.double().mean()),
        "change": change,
        "change_low": low,
        "change_high": high,
        "agreement": float((classes == known["classes"]).double().mean()),
        "zeros": zeros(quantized),
        "epoch_seconds": statistics.median(seconds) if seconds else 0.0,
        "seconds": time.perf_counter() - start,
    }


def _finetune(job: Job, data: Any, test_x: Tensor, test_y: Tensor) -> dict[str, Any]:
    """Fine-tunes the float network and keeps it."""
    start = time.perf_counter()
    network = _build(job.network, torch.load(job.weights, weights_only=True))
    before = _float_classes(network, test_x)
    module, seconds = _Module(network, job.lr or 0.02), []
    if job.epochs:
        _trainer(job, job.epochs, seconds).fit(module, datamodule=data)
    network.cpu().eval()
    classes = _float_classes(network, test_x)
    file = Path(job.float_file)
    draft = file.with_suffix(".draft")
    torch.save({"weights": network.state_dict(), "classes": classes}, draft)
    draft.replace(file)
    return {
        "before": float((before == test_y).double().mean()),
        "float": float((classes == test_y).double().mean()),
        "epoch_seconds": statistics.median(seconds) if seconds else 0.0,
        "seconds": time.perf_counter() - start,
    }


def _train_recipe(job: Job, network: nn.Module, data: Any) -> tuple[nn.Module, list[float]]:
    """The network after the recipe, and the seconds of each epoch."""
    from qat_tricks import run_stages
    from qat_tricks.recipes.recipe import load_recipe

    name, *overrides = job.recipe
    staged = load_recipe(name, overrides)
    stages = [
        replace(stage, lr=job.lr or stage.lr, epochs=stage.epochs and (job.epochs or stage.epochs))
        for stage in staged.stages
    ]
    seconds: list[float] = []
    settings = _settings(job) | {"callbacks": [_epoch_clock(seconds)]}
    if job.average is not None:
        from pytorch_lightning.callbacks import EMAWeightAveraging

        settings["callbacks"].append(EMAWeightAveraging(decay=job.average))
    module = _Module(network, job.lr or 0.02)
    run_stages(module, data, replace(staged, stages=stages), trainer=settings)
    print(f"rate: {module.lr:.4g}", flush=True)
    return module.network.cpu().eval(), seconds


def _settings(job: Job) -> dict[str, Any]:
    on_gpu = job.device.startswith("cuda")
    return {
        "accelerator": "gpu" if on_gpu else "cpu",
        "devices": 1,
        "precision": job.precision,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "limit_val_batches": 0,
    }


def _trainer(job: Job, epochs: int, seconds: list[float]) -> Any:
    import pytorch_lightning as pl

    return pl.Trainer(max_epochs=epochs, callbacks=[_epoch_clock(seconds)], **_settings(job))


def _epoch_clock(seconds: list[float]) -> Any:
    """A callback that notes the seconds of each epoch, and prints them into the job's log."""
    import pytorch_lightning as pl

    class Clock(pl.Callback):
        def on_train_epoch_start(self, *_: Any) -> None:
            self.start = time.perf_counter()

        def on_train_epoch_end(self, trainer: Any, *_: Any) -> None:
            seconds.append(time.perf_counter() - self.start)
            # Those that tricks log at an epoch's end are of the epoch before.
            logged = {key: f"{float(v):.4f}" for key, v in trainer.callback_metrics.items()}
            print(f"epoch {trainer.current_epoch}: {seconds[-1]:.1f} s {logged}", flush=True)

    return Clock()


def _build(name: str, weights: dict[str, Tensor]) -> nn.Module:
    from qat_tricks.models.build import build_model

    network = NETWORKS[name].build() if name in NETWORKS else build_model(name, num_classes=10)
    counters = {k: v for k, v in network.state_dict().items() if k.endswith("num_batches_tracked")}
    network.load_state_dict(counters | weights)
    return network.eval()


@torch.no_grad()
def _float_classes(network: nn.Module, images: Tensor) -> Tensor:
    """The classes ``[N]`` of uint8 images, in float32 on the CPU."""
    network = copy.deepcopy(network).cpu().eval()
    return torch.cat([network(normalized(part)).argmax(1) for part in images.split(250)])


def _onnx_classes(job: Job, network: nn.Module, images: Tensor) -> Tensor:
    """The classes that ONNX Runtime gives the exported network, ``[N]``."""
    import onnxruntime

    from qat_tricks import export_onnx

    path = Path(job.result).with_suffix(".onnx")
    export_onnx(network, path, normalized(images[:100]))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = job.threads
    session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    feed = session.get_inputs()[0].name
    outputs = [
        torch.from_numpy(session.run(None, {feed: normalized(part).numpy()})[0]).argmax(1)
        for part in images.split(250)
    ]
    return torch.cat(outputs)


def paired_change(before: Tensor, after: Tensor) -> tuple[float, float, float]:
    """The change of accuracy between two classifiers on the same images, with its interval.

    Only images that one of them has right and the other wrong tell of a difference (McNemar); the
    interval is that of a difference of paired shares (Wald).

    Args:
        before: whether each image is classified rightly, bool ``[N]``.
        after: the same of the other classifier.

    Returns:
        Lower end, change and upper end, -1..1.
    """
    gained = int((after & ~before).sum())
    lost = int((before & ~after).sum())
    change = (gained - lost) / len(before)
    error = Z95 * math.sqrt(gained + lost - (gained - lost) ** 2 / len(before)) / len(before)
    return change - error, change, change + error


def _lightning_parts() -> tuple[type, type]:
    """Lightning's classes are read only in processes that train."""
    import pytorch_lightning as pl

    class Module(pl.LightningModule):
        """A plain module, as users write it."""

        def __init__(self, network: nn.Module, lr: float) -> None:
            super().__init__()
            self.network, self.lr = network.train(), lr

        def forward(self, images: Tensor) -> Tensor:
            return self.network(images)

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            images, labels = batch
            loss = F.cross_entropy(self(images), labels)
            self.log("loss", loss, on_step=False, on_epoch=True)
            return loss

        def configure_optimizers(self) -> Any:
            steps = max(6, int(self.trainer.estimated_stepping_batches))
            optimizer = torch.optim.SGD(
                self.parameters(), lr=self.lr, momentum=0.9, weight_decay=5e-4, nesterov=True
            )
            schedule = torch.optim.lr_scheduler.OneCycleLR(
                optimizer, self.lr, total_steps=steps, pct_start=0.2, cycle_momentum=False
            )
            once_a_step = {"scheduler": schedule, "interval": "step"}
            return {"optimizer": optimizer, "lr_scheduler": once_a_step}

    class DataModule(pl.LightningDataModule):
        """Train images for the fit, and for calibration as they are."""

        def __init__(self, images: Images) -> None:
            super().__init__()
            self.images = images

        def train_dataloader(self) -> Images:
            return self.images

        def calibration_loader(self, num_images: int) -> list[tuple[Tensor, Tensor]]:
            images, labels = self.images.images[:num_images], self.images.labels[:num_images]
            parts = zip(images.split(64), labels.split(64), strict=True)
            return [(normalized(part), of_part) for part, of_part in parts]

    return Module, DataModule


def _Module(network: nn.Module, lr: float) -> Any:  # noqa: N802
    return _lightning_parts()[0](network, lr)


def _DataModule(images: Images) -> Any:  # noqa: N802
    return _lightning_parts()[1](images)


# All jobs


def main() -> None:
    args = _arguments()
    if args.job:
        _be_a_job(args.job)
        return
    signal.signal(signal.SIGTERM, _end)
    args.runs.mkdir(parents=True, exist_ok=True)
    if args.data.is_dir():
        args.data = tensors_of_folder(args.data, args.runs / "data.pt")
    table = _Table(args)
    begin = time.monotonic()

    def run(job: Job, after: "Future[Any] | None" = None) -> dict[str, Any]:
        if after is not None and "failed" in after.result():
            return {"failed": f"the float network: {after.result()['failed']}"}
        left = args.total_limit - (time.monotonic() - begin)
        return _run_process(job, min(args.time_limit, left), args)

    with ThreadPoolExecutor(args.workers) as pool:
        # Those that others wait for come first in the queue.
        of_network = {
            name: _float_job(name, weights, args) for name, weights in args.networks.items()
        }
        floats = {name: pool.submit(run, job) for name, job in of_network.items()}
        futures = {future: of_network[name] for name, future in floats.items()}
        for seed in args.seeds:
            for text in args.jobs:
                for name, float_job in of_network.items():
                    job = _recipe_job(text, seed, float_job, args)
                    futures[pool.submit(run, job, floats[name])] = job
        for future in as_completed(futures):
            table.add(futures[future], future.result())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--job", help=argparse.SUPPRESS)  # of this script's own processes
    parser.add_argument(
        "--data",
        type=Path,
        help="a file of tensors train_x, train_y, test_x, test_y (uint8 images), or a folder with "
        "train/ and test/, each with a folder of images a class",
    )
    parser.add_argument(
        "--networks", nargs="+", default=[], metavar="NAME=WEIGHTS", help="such as resnet20=FILE"
    )
    parser.add_argument(
        "--jobs", nargs="+", default=["w4a4_qat"], help="recipe and overrides, quoted"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--epochs", type=int, help="of all jobs; as their recipes say by default")
    parser.add_argument("--lr", type=float, help="of all jobs; as their recipes say by default")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--precision", default="32", help="of the recipes' fits: bf16-mixed, …")
    parser.add_argument("--finetune-epochs", type=int, default=0)
    parser.add_argument("--finetune-lr", type=float, default=0.02)
    parser.add_argument(
        "--finetuned", type=Path, help="folder of fine-tuned networks; --runs by default"
    )
    parser.add_argument("--limit", type=int, help="train images; all by default")
    parser.add_argument("--test-images", type=int, help="all by default")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=1, help="processes at once")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--time-limit", type=float, default=math.inf, help="of a job, seconds")
    parser.add_argument("--total-limit", type=float, default=math.inf, help="of all, seconds")
    parser.add_argument("--runs", type=Path, default=Path("outputs/qat"))
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    args = parser.parse_args()
    if args.job is None and not (args.data and args.networks):
        parser.error("give --data and --networks")
    args.networks = dict(pair.split("=", 1) for pair in args.networks)
    args.finetuned = args.finetuned or args.runs
    args.finetuned.mkdir(parents=True, exist_ok=True)
    return args


def _float_job(name: str, weights: str, args: argparse.Namespace) -> Job:
    settings = {
        "network": name,
        "weights": weights,
        "data": str(args.data),
        "seed": 0,
        "device": args.device,
        "threads": args.threads,
        "epochs": args.finetune_epochs,
        "lr": args.finetune_lr,
        "batch": 128,
        "limit": args.limit,
        "test_images": args.test_images,
    }
    key = _key({k: v for k, v in settings.items() if k not in ("device", "threads", "data")})
    stem = args.finetuned / f"float_{name}_{args.finetune_epochs}_{key}"
    return Job(float_file=f"{stem}.pt", result=f"{stem}.json", **settings)


def _recipe_job(text: str, seed: int, float_job: Job, args: argparse.Namespace) -> Job:
    words = shlex.split(text)
    own = dict(word.split("=", 1) for word in words if word.split("=")[0] in OWN_WORDS)
    job = replace(
        float_job,
        recipe=tuple(words),
        seed=seed,
        epochs=int(own["epochs"]) if "epochs" in own else args.epochs,
        lr=float(own["lr"]) if "lr" in own else args.lr,
        batch=int(own.get("batch", args.batch)),
        average=float(own["average"]) if "average" in own else None,
        precision=args.precision,
    )
    key = _key({**asdict(job), "device": None, "threads": None, "data": None, "result": None})
    file = args.runs / f"{float_job.network}_{words[0]}_{seed}_{key}.json"
    return replace(job, result=str(file))


def _key(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]


_running: set[subprocess.Popen[bytes]] = set()


def _run_process(job: Job, limit: float, args: argparse.Namespace) -> dict[str, Any]:
    """Runs a job in a process of its own, and returns its result."""
    file = Path(job.result)
    if file.is_file() and (job.recipe or Path(job.float_file).is_file()):
        return json.loads(file.read_text())
    if limit <= 0:
        return {"failed": "not begun: the time for all jobs is over"}
    command = [sys.executable, str(Path(__file__).resolve()), "--job", json.dumps(asdict(job))]
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    log = file.with_suffix(".log")
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment
        )
        _running.add(process)
        try:
            code = process.wait(None if math.isinf(limit) else limit)
        except subprocess.TimeoutExpired:
            return {"failed": f"took longer than {limit:.0f} s"}
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
            _running.discard(process)
    if code == 0 and file.is_file():
        return json.loads(file.read_text())
    lines = log.read_text().strip().splitlines() or ["nothing was printed"]
    return {"failed": f"exit status {code}: {lines[-1][:300]}"}


def _end(*_: object) -> None:
    """Ends the jobs with this process."""
    for process in list(_running):
        process.kill()
    os._exit(143)


def _be_a_job(text: str) -> None:
    settings = json.loads(text)
    job = Job(**{**settings, "recipe": tuple(settings["recipe"])})
    # The words of a job's own settings are no overrides.
    words = [w for w in job.recipe if w.split("=")[0] not in OWN_WORDS]
    try:
        result = run_job(replace(job, recipe=tuple(words)))
    except Exception as error:
        traceback.print_exc()
        # One line at the end of the log, which the table shows.
        print(f"{type(error).__name__}: {' '.join(str(error).split())}", flush=True)
        sys.exit(1)
    draft = Path(job.result).with_suffix(".draft.json")
    draft.write_text(json.dumps(result))
    draft.replace(job.result)


class _Table:
    """The Markdown file: a row for each job, and means over seeds; written anew with each row."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.rows: list[tuple[Job, dict[str, Any]]] = []
        self.notes: list[str] = []

    def add(self, job: Job, result: dict[str, Any]) -> None:
        """Takes in a job's result, or why there is none."""
        if "failed" in result:
            self.notes.append(
                f"- {job.network}, `{job.title}`, seed {job.seed}: {result['failed']}"
            )
            print(self.notes[-1], flush=True)
        elif not job.recipe:
            self.notes.append(
                f"- {job.network} in float: {100 * result['before']:.2f} as given, "
                f"{100 * result['float']:.2f} after {job.epochs} epochs, {result['seconds']:.0f} s"
            )
            print(self.notes[-1], flush=True)
        else:
            self.rows.append((job, result))
            print(_row(job, result), flush=True)
        if self.args.out:
            self.args.out.write_text(self._text() + "\n", encoding="utf-8")

    def _text(self) -> str:
        shown = ["finetune_epochs", "finetune_lr", "epochs", "lr", "batch", "precision"]
        shown += ["limit", "test_images"]
        options = [
            f"--{name.replace('_', '-')} {value}"
            for name in shown
            if (value := getattr(self.args, name)) is not None
        ]
        rows = sorted(self.rows, key=lambda row: (row[0].network, row[0].title, row[0].seed))
        return "\n".join(
            [
                "# Recipes that train, on CIFAR-10, judged on ONNX Runtime",
                "",
                f"`python benchmarks/accuracy/qat.py {' '.join(options)}`, device "
                f"{self.args.device}, {self.args.workers} jobs at once.",
                "",
                *self.notes,
                "",
                table_row(*MEANS),
                f"|{'---|' * len(MEANS)}",
                *_means(rows),
                "",
                table_row(*COLUMNS),
                f"|{'---|' * len(COLUMNS)}",
                *(_row(job, result) for job, result in rows),
            ]
        )


def _row(job: Job, result: dict[str, Any]) -> str:
    low, high = 100 * result["change_low"], 100 * result["change_high"]
    return table_row(
        job.network,
        f"`{job.title}`",
        job.seed,
        f"{100 * result['float']:.2f}",
        f"{100 * result['quantized']:.2f}",
        f"{100 * result['change']:+.2f} ({low:+.2f} to {high:+.2f})",
        f"{result['agreement']:.4f}",
        f"{result['zeros']:.2f}",
        f"{result['epoch_seconds']:.1f}",
        f"{result['seconds'] / 60:.1f}",
    )


def _means(rows: Sequence[tuple[Job, dict[str, Any]]]) -> list[str]:
    """A row for each network and job: its seeds' mean."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for job, result in rows:
        groups.setdefault((job.network, job.title), []).append(result)
    lines = []
    for (network, title), results in groups.items():
        changes = [100 * result["change"] for result in results]
        agreement = statistics.mean(result["agreement"] for result in results)
        lines.append(
            table_row(
                network,
                f"`{title}`",
                len(results),
                f"{statistics.mean(changes):+.2f}",
                f"{min(changes):+.2f}",
                f"{max(changes):+.2f}",
                f"{agreement:.4f}",
            )
        )
    return lines


if __name__ == "__main__":
    main()
