"""The LightningModule of benchmarks whose networks need not learn."""

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.nn import functional as F


class Module(pl.LightningModule):
    """A classifier as users write it."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-5, momentum=0.9)
