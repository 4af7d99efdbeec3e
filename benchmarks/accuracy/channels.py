# python benchmarks/accuracy/channels.py --data FILE --networks NAME=WEIGHTS --peer PYTHON
"""Channels removed until a share of MACs is left: ours and torch-pruning, with the same images, the
same fine-tuning and the same widths allowed; float accuracy before and after it, and int8.

Fine-tuning is a plain loop that knows neither: SGD with Nesterov momentum, a one-cycle schedule,
and half of the loss from the whole float network's logits.
"""

import copy
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from qat import Images, normalized, paired_change, read_data
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import Report, argument_parser, command

import qat_tricks
from qat_tricks.graph import trace
from qat_tricks.graph.channel_removal import resize
from qat_tricks.graph.macs import macs_of_calls
from qat_tricks.models.build import build_model
from qat_tricks.tricks import prune_channels
from qat_tricks.tricks.distill import distill

MULTIPLE = 8  # of channels
OURS = ("taylor", "output_error", "magnitude")
PEERS = ("taylor", "magnitude")


def ours(network: nn.Module, images: Tensor, share: float, **settings: object) -> nn.Module:
    """The traced network with a share of its MACs."""
    traced = trace(copy.deepcopy(network))
    prune_channels(traced, list(images.split(64)), share=share, multiple=MULTIPLE, **settings)
    return traced


def peer(
    network: nn.Module,
    name: str,
    images: Tensor,
    labels: Tensor,
    share: float,
    importance: str,
    python: Path,
) -> nn.Module:
    """The network that torch-pruning leaves."""
    with tempfile.TemporaryDirectory() as folder:
        weights, data, out = (Path(folder) / name for name in ("weights", "images", "out"))
        torch.save(network.state_dict(), weights)
        torch.save({"images": images, "labels": labels}, data)
        script = Path(__file__).parent / "torch_pruning_channels.py"
        arguments = [name, weights, data, share, importance, out]
        subprocess.run([str(python), str(script), *map(str, arguments)], check=True)
        state = torch.load(out, weights_only=True)
    traced = trace(copy.deepcopy(network))
    resize(traced, {key: list(value.shape) for key, value in state.items() if value.dim() > 0})
    traced.load_state_dict(state)
    return traced


def fine_tune(
    network: nn.Module, teacher: nn.Module, data: Images, epochs: int, lr: float, precision: str
) -> None:
    """Trains ``network`` in place."""
    network.train()
    steps = epochs * len(data)
    optimizer = torch.optim.SGD(
        network.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=max(6, steps), pct_start=0.2, cycle_momentum=False
    )
    for _ in range(epochs):
        for images, labels in data:
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                with torch.no_grad():
                    expected = teacher(images)
                logits = network(images)
                loss = F.cross_entropy(logits, labels) + distill(logits, expected)
            optimizer.zero_grad()
            (loss / 2).backward()
            optimizer.step()
            schedule.step()
    network.eval()


@torch.no_grad()
def classes(network: nn.Module, images: Tensor) -> Tensor:
    """The likeliest class of each uint8 image."""
    network.eval()
    return torch.cat([network(normalized(part)).argmax(1) for part in images.split(250)])


def contenders(python: Path | None) -> Iterator[tuple[str, str]]:
    """Whose network, and its criterion."""
    yield from (("ours", criterion) for criterion in OURS)
    if python is not None:
        yield from (("torch-pruning", importance) for importance in PEERS)


def main() -> None:
    parser = argument_parser(__doc__, threads=1)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--networks", nargs="+", required=True, metavar="NAME=WEIGHTS")
    parser.add_argument("--peer", type=Path, help="Python of torch-pruning's environment")
    parser.add_argument("--share", type=float, default=0.5, help="of the MACs that stays")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--limit", type=int, default=12800, help="train images")
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--precision", default="bf16", choices=("32", "bf16"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    content = read_data(args.data)
    order = torch.randperm(
        len(content["train_x"]), generator=torch.Generator().manual_seed(args.seed)
    )[: args.limit]
    train_x, train_y = content["train_x"][order], content["train_y"][order]
    test_x, test_y = content["test_x"], content["test_y"]
    report = Report(
        "Channels removed, against torch-pruning",
        [command(args, "share", "epochs", "limit", "lr", "precision", "seed", "threads")],
        (
            "network",
            "whose",
            "criterion",
            "MACs left:",
            "float:",
            "removed:",
            "fine-tuned:",
            "int8:",
            "int8 - float (95 %):",
            "s to remove:",
        ),
        args.out,
    )
    for text in args.networks:
        name, _, weights = text.partition("=")
        network = build_model(name, num_classes=10)
        network.load_state_dict(torch.load(weights, weights_only=True), strict=False)
        network.eval()
        plain = classes(network, test_x) == test_y
        calibration = normalized(train_x[:256])
        whole = sum(call.macs for call in macs_of_calls(trace(copy.deepcopy(network)), calibration))
        for whose, criterion in contenders(args.peer):
            torch.manual_seed(args.seed)
            start = time.perf_counter()
            if whose == "ours":
                narrow = ours(network, calibration, args.share, criterion=criterion)
            else:
                narrow = peer(
                    network, name, calibration, train_y[:256], args.share, criterion, args.peer
                )
            seconds = time.perf_counter() - start
            macs = sum(call.macs for call in macs_of_calls(narrow, calibration))
            before = classes(narrow, test_x) == test_y
            images = Images(train_x, train_y, 128, args.seed)
            fine_tune(narrow, network, images, args.epochs, args.lr, args.precision)
            after = classes(narrow, test_x) == test_y
            quantized = qat_tricks.quantize(narrow, list(calibration.split(64)))
            int8 = classes(quantized, test_x) == test_y
            low, change, high = (100 * value for value in paired_change(plain, int8))
            report.add(
                name,
                whose,
                criterion,
                f"{macs / whole:.3f}",
                *(f"{100 * each.double().mean():.2f}" for each in (plain, before, after, int8)),
                f"{change:+.2f} ({low:+.2f} to {high:+.2f})",
                f"{seconds:.0f}",
            )


if __name__ == "__main__":
    main()
