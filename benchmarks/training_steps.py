"""Training steps of several networks, interleaved: for ``step_cost.py`` and for its peers, which
run in environments without qat_tricks."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PRECISIONS = {"32-true": None, "16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Of logits, images and labels."""


def _cross_entropy(logits: Tensor, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels)


@dataclass(frozen=True)
class StepCost:
    """What a network's training steps cost."""

    seconds: float  # of a step, the median
    ratio: float  # to the first network's step in the same round, the median
    spread: float  # the width of the ratios' middle half
    kept: float  # MiB that autograd keeps

    def cells(self, first: "StepCost") -> tuple[str, ...]:
        """For a table, with the bytes beside those of ``first``."""
        return (
            f"{self.seconds * 1e3:.1f}",
            f"**{self.ratio:.2f}**",
            f"{self.spread:.2f} wide",
            f"{self.kept:.0f}",
            f"{self.kept / first.kept:.2f}",
        )


class Contender:
    """A network, its optimizer, and the seconds of its training steps.

    Args:
        net: in training mode.
        precision: one of ``PRECISIONS``.
        compiled: whether ``torch.compile`` gets it.
        loss: cross entropy by default.
    """

    def __init__(
        self,
        net: nn.Module,
        precision: str = "32-true",
        compiled: bool = False,
        loss: Loss = _cross_entropy,
    ) -> None:
        self.own = {t.untyped_storage().data_ptr() for t in [*net.parameters(), *net.buffers()]}
        self.optimizer = torch.optim.SGD(net.parameters(), lr=1e-4, momentum=0.9)
        self.net = torch.compile(net) if compiled else net
        self.precision, self.loss = precision, loss
        self.scaler = torch.amp.GradScaler(enabled=precision == "16-mixed")
        self.seconds: list[float] = []

    def step(self, images: Tensor, labels: Tensor) -> None:
        """Runs one training step, as Lightning does in this precision."""
        device = images.device.type
        _wait(device)
        started = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(
            device, PRECISIONS[self.precision], enabled=self.precision != "32-true"
        ):
            loss = self.loss(self.net(images), images, labels)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        _wait(device)
        self.seconds.append(time.perf_counter() - started)

    def kept_bytes(self, images: Tensor, labels: Tensor) -> int:
        """The bytes that autograd keeps for the backward, without parameters and buffers."""
        kept: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self.own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = self.loss(self.net(images), images, labels)
        loss.backward()
        return sum(kept.values())


def random_batch(batch: int, size: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Images ``[batch, 3, size, size]`` and labels of 1,000 classes."""
    torch.manual_seed(0)
    images = torch.randn(batch, 3, size, size, device=device)
    return images, torch.randint(0, 1000, (batch,), device=device)


def measure(
    contenders: Sequence[Contender], images: Tensor, labels: Tensor, warmup: int, steps: int
) -> list[StepCost]:
    """Runs the contenders step by step in turn; the first is what the others are compared to."""
    for _ in range(warmup + steps):
        for contender in contenders:
            contender.step(images, labels)
    seconds = [contender.seconds[warmup:] for contender in contenders]
    costs = []
    for own, contender in zip(seconds, contenders, strict=True):
        ratios = sorted(b / a for a, b in zip(seconds[0], own, strict=True))
        quarter = len(ratios) // 4
        spread = ratios[-1 - quarter] - ratios[quarter]
        kept = contender.kept_bytes(images, labels) / 2**20
        costs.append(StepCost(statistics.median(own), statistics.median(ratios), spread, kept))
    return costs


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
