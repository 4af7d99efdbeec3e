# python benchmarks/accuracy/train_networks.py --data cifar10.pt --weights PATH/weights \
#     --out PATH/weights_jpeg --device cuda
"""Trains the CIFAR-10 networks of the accuracy harness on the JPEG copy of the images.

``relu_then_batchnorm`` is trained from nothing. ResNet-20 and ResNet-56, whose weights were trained
on the lossless images, are fine-tuned; ResNet-20 also with SiLU or Hardswish for each ReLU. Each
network has a process of its own. It needs torch only.
"""

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from cifar import load_cifar10
from networks import NETWORKS
from torch import Tensor, multiprocessing, nn
from torch.nn import functional as F

PADDING = 4  # pixels on each side, of the random crop


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a network is trained."""

    start: str | None  # file of weights to start from
    epochs: int
    lr: float  # peak of the one-cycle schedule
    batch: int = 256
    weight_decay: float = 5e-4


TRAININGS = {
    "relu_then_batchnorm": Training(start=None, epochs=30, lr=0.1),
    "ResNet-20-jpeg": Training(start="cifar10_resnet20.pt", epochs=15, lr=0.02),
    # from the weights beside ReLUs
    "ResNet-20-silu": Training(start="cifar10_resnet20.pt", epochs=15, lr=0.02),
    "ResNet-20-hardswish": Training(start="cifar10_resnet20.pt", epochs=15, lr=0.02),
    "ResNet-56-jpeg": Training(start="cifar10_resnet56.pt", epochs=12, lr=0.02),
}


def augment(padded: Tensor, numbers: Tensor) -> Tensor:
    """Random crops, half of them mirrored, of the padded images with these numbers.

    Args:
        padded: uint8 ``[N, 3, H + 2 * PADDING, W + 2 * PADDING]``.
        numbers: of the images, ``[B]``.

    Returns:
        uint8 ``[B, 3, H, W]``.
    """
    count, device = len(numbers), padded.device
    height, width = (side - 2 * PADDING for side in padded.shape[-2:])
    top, left = torch.randint(0, 2 * PADDING + 1, (2, count, 1), device=device)
    rows = top + torch.arange(height, device=device)
    columns = torch.arange(width, device=device).expand(count, -1)
    mirrored = torch.rand(count, 1, device=device) < 0.5
    columns = left + torch.where(mirrored, columns.flip(1), columns)
    channels = torch.arange(padded.shape[1], device=device)
    return padded[
        numbers.view(-1, 1, 1, 1),
        channels.view(1, -1, 1, 1),
        rows.view(count, 1, -1, 1),
        columns.view(count, 1, 1, -1),
    ]


def train(name: str, args: argparse.Namespace) -> None:
    """Trains one network and writes its weights and what it reached."""
    torch.set_num_threads(args.threads)
    # plain float32: nobody's quantization is compared with a float network of fewer bits
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    torch.manual_seed(args.seed)
    plan, network = TRAININGS[name], NETWORKS[name]
    data = {key: value.to(args.device) for key, value in load_cifar10(args.data).items()}
    if args.limit:
        # the classes lie one after the other, so that the first images are all of one
        part = torch.randperm(len(data["train_x"]))[: args.limit].to(args.device)
        data["train_x"], data["train_y"] = data["train_x"][part], data["train_y"][part]
    net = network.build()
    if plan.start:
        net.load_state_dict(torch.load(args.weights / plan.start, weights_only=True))
    net.to(args.device)
    before = accuracy(name, net, data)
    started = time.perf_counter()
    padded = F.pad(data["train_x"], (PADDING,) * 4)
    epochs = args.epochs or plan.epochs
    steps = len(padded) // plan.batch  # the last images of an epoch that fill no batch are left
    optimizer = torch.optim.SGD(
        net.parameters(), plan.lr, momentum=0.9, nesterov=True, weight_decay=plan.weight_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, plan.lr, total_steps=epochs * steps, pct_start=0.3
    )
    for epoch in range(epochs):
        net.train()
        total = torch.zeros((), device=args.device)
        order = torch.randperm(len(padded), device=args.device)
        for step in range(steps):
            numbers = order[step * plan.batch : (step + 1) * plan.batch]
            logits = net(network.normalize(augment(padded, numbers)))
            loss = F.cross_entropy(logits, data["train_y"][numbers])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.detach()
        seconds = time.perf_counter() - started
        print(
            f"{name}: epoch {epoch + 1} of {epochs}, loss {total.item() / steps:.4f}, "
            f"{seconds:.0f} s",
            flush=True,
        )
    result = {
        "network": name,
        "test_accuracy_before": before,
        "test_accuracy": accuracy(name, net, data),
        "weights": sum(parameter.numel() for parameter in net.parameters()),
        "epochs": epochs,
        "seconds": time.perf_counter() - started,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    torch.save({k: v.cpu() for k, v in net.state_dict().items()}, args.out / network.weights)
    (args.out / f"{name}.json").write_text(json.dumps(result) + "\n", encoding="utf-8")
    print(json.dumps(result), flush=True)


@torch.no_grad()
def accuracy(name: str, net: nn.Module, data: dict[str, Tensor]) -> float:
    """Top-1 on the test images, 0..1."""
    net.eval()
    right = 0
    for images, labels in zip(data["test_x"].split(500), data["test_y"].split(500), strict=True):
        right += (net(NETWORKS[name].normalize(images)).argmax(1) == labels).sum().item()
    return right / len(data["test_y"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="cifar10.pt, or the folder of train and test"
    )
    parser.add_argument("--weights", type=Path, required=True, help="folder of those to start from")
    parser.add_argument("--out", type=Path, required=True, help="folder that gets the new weights")
    parser.add_argument("--networks", nargs="+", choices=TRAININGS, default=list(TRAININGS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--epochs", type=int, help="instead of each network's own")
    parser.add_argument("--limit", type=int, help="train images, for a trial")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="of each process")
    args = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
    processes = [spawn.Process(target=train, args=(name, args)) for name in args.networks]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    failed = [name for name, p in zip(args.networks, processes, strict=True) if p.exitcode != 0]
    if failed:
        raise SystemExit(f"not trained: {', '.join(failed)}")


if __name__ == "__main__":
    main()
