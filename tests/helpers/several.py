"""Networks that take several inputs, what they take, and a LightningModule with one."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from tests.helpers.lightning import pl


def conv(into: int, out: int, **settings: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(into, out, 3, padding=1, bias=False, **settings), nn.BatchNorm2d(out), nn.ReLU()
    )


class TwoImages(nn.Module):
    """Two images through two stems, concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = conv(3, 8, stride=2), conv(1, 8)
        self.last, self.fc = conv(16, 16), nn.Linear(16, 4)

    def forward(self, crop: Tensor, whole: Tensor) -> Tensor:
        return self.fc(self.last(torch.cat([self.left(crop), self.right(whole)], 1)).mean([2, 3]))


class Gated(nn.Module):
    """An image, and a vector that through an MLP says which channels count."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.last, self.fc = conv(3, 8, stride=2), conv(8, 16), nn.Linear(16, 4)
        self.gate = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU6())

    def forward(self, image: Tensor, metadata: Tensor, factor: float = 1.0) -> Tensor:
        gate = self.gate(metadata)[:, :, None, None]
        return self.fc(self.last(self.stem(image) * gate).mean([2, 3])) * factor


class Tokens(nn.Module):
    """Token ids, of which a mask of integers says which count, and an image."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.mix = nn.Embedding(11, 8), nn.Linear(8, 8)
        self.stem, self.fc = conv(3, 8, stride=2), nn.Linear(16, 4)

    def forward(self, ids: Tensor, mask: Tensor, image: Tensor) -> Tensor:
        words = (F.relu(self.mix(self.table(ids))) * mask.unsqueeze(-1)).mean(1)
        return self.fc(torch.cat([words, self.stem(image).mean([2, 3])], 1))


class Siamese(nn.Module):
    """Two images through one stem, compared."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc = nn.Sequential(conv(3, 8, stride=2), conv(8, 16)), nn.Linear(32, 4)

    def forward(self, input: Tensor, other: Tensor) -> Tensor:
        a, b = self.stem(input).mean([2, 3]), self.stem(other).mean([2, 3])
        return self.fc(torch.cat([(a - b).abs(), a * b], 1))


KINDS = [TwoImages, Gated, Tokens, Siamese]


def inputs(kind: type[nn.Module], count: int, seed: int = 0) -> tuple[Tensor, ...]:
    """What a network of this kind takes for ``count`` images."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(count, 3, 16, 16, generator=generator)
    if kind is TwoImages:
        return image, torch.randn(count, 1, 8, 8, generator=generator)
    if kind is Gated:
        return image, torch.randn(count, 6, generator=generator)
    if kind is Siamese:
        return image, torch.randn(count, 3, 16, 16, generator=generator)
    ids, mask = (torch.randint(most, (count, 5), generator=generator) for most in (11, 2))
    return ids, mask, image


def network(kind: type[nn.Module], seed: int = 0) -> nn.Module:
    """A network in evaluation mode whose BatchNorms have seen images."""
    torch.manual_seed(seed)
    net = kind()
    for step in range(3):
        net(*inputs(kind, 64, step))
    return net.eval()


class Nested(Dataset):
    """Pairs ``(inputs, label)``; the label is the image's brighter half and whether the second
    input's mean is positive.
    """

    def __init__(self, kind: type[nn.Module] = TwoImages, count: int = 64) -> None:
        self.inputs = inputs(kind, count, 3)
        self.labels = torch.arange(count) % 4
        self.inputs[0][:, :, :8] += (self.labels // 2 * 2).view(-1, 1, 1, 1)
        self.inputs[1][:] += (self.labels % 2).view(-1, *[1] * (self.inputs[1].dim() - 1))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[tuple[Tensor, ...], Tensor]:
        return tuple(values[index] for values in self.inputs), self.labels[index]


def loader(flat: bool = False, kind: type[nn.Module] = TwoImages) -> DataLoader:
    """Batches ``((first, second), labels)``, or ``flat``, as ``TensorDataset`` has them, ``(first,
    second, labels)``.
    """
    nested = Nested(kind)
    return DataLoader(
        TensorDataset(*nested.inputs, nested.labels) if flat else nested, batch_size=16
    )


class Lit(pl.LightningModule):
    """Takes the inputs as a tuple, and scales the first of them before the network sees it."""

    def __init__(self, gain: float = 0.5, seed: int = 0) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.backbone = network(TwoImages, seed)

    def forward(self, both):
        crop, whole = both
        return self.backbone(crop * self.hparams.gain, whole=whole)

    def training_step(self, batch, _):
        both, labels = batch
        return F.cross_entropy(self(both), labels)

    def validation_step(self, batch, _):
        both, labels = batch
        self.log("val_acc", (self(both).argmax(1) == labels).float().mean())

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class FlatLit(Lit):
    """Takes the inputs one by one, and batches in which they lie flat."""

    def forward(self, crop, whole):
        return self.backbone(crop * self.hparams.gain, whole)

    def training_step(self, batch, _):
        crop, whole, labels = batch
        return F.cross_entropy(self(crop, whole), labels)

    validation_step = test_step = None
