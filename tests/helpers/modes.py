"""Networks that compute one thing in evaluation and another in training."""

import torch
from torch import nn
from torch.nn import functional as F


class Base(nn.Module):
    """A conv, a BatchNorm and two linears, for networks that differ in their ``forward``."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.fc, self.other = nn.Linear(8, 5), nn.Linear(8, 5)

    def maps(self, x):
        return F.relu(self.bn(self.conv(x)))

    def features(self, x):
        return self.maps(x).mean((2, 3))

    def forward(self, x):
        return self.fc(self.features(x))


class SoftmaxInEvaluation(Base):
    def forward(self, x):
        y = self.fc(self.features(x))
        return y if self.training else y.softmax(1)


class AuxiliaryHead(Base):
    def forward(self, x):
        features = self.features(x)
        if self.training:
            return self.fc(features), self.other(F.dropout(features, 0.3, self.training))
        return self.fc(features)


def drop_path(x, p, training):
    if not training:
        return x
    shape = (x.shape[0],) + (1,) * (x.ndim - 1)  # what a tracer cannot follow
    return x / (1 - p) * x.new_empty(shape).bernoulli_(1 - p)


class DropPathBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))

    def forward(self, x):
        x = x + drop_path(F.relu(self.conv1(x)), 0.5, self.training)
        return x + drop_path(F.relu(self.conv2(x)), 0.5, self.training)


class StochasticDepth(Base):
    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(DropPathBlock(), DropPathBlock())

    def forward(self, x):
        return self.fc(self.blocks(self.maps(x)).mean((2, 3)))


class InlineNoise(Base):
    def forward(self, x):
        maps = self.maps(x)
        if self.training:
            maps = maps * (torch.rand(x.shape[0], 1, 1, 1) > 0.5) * (torch.rand(1) + 1)
        return self.fc(maps.mean((2, 3)))


class EveryDropout(Base):
    def forward(self, x):
        maps = F.feature_alpha_dropout(self.maps(x), 0.2, self.training)
        maps = F.dropout3d(F.dropout2d(maps, 0.2, self.training).unsqueeze(2), 0.2, self.training)
        features = F.alpha_dropout(maps.mean((2, 3, 4)), 0.2, training=self.training)
        features = F.dropout1d(features.unsqueeze(1), 0.2, training=self.training).squeeze(1)
        features = F.rrelu(F.dropout(features, training=self.training), training=self.training)
        return self.fc(features)


class NoGrad(Base):
    def forward(self, x):
        with torch.no_grad():
            features = self.features(x)
        return self.fc(features)


class OptionalArguments(Base):
    def forward(self, x, features=None, *, scale=1.0, mask=None):
        maps = self.maps(x)
        if mask is not None:
            maps = maps * mask
        if features is not None:
            return maps
        return self.fc(maps.mean((2, 3))) * scale


class BatchwiseDepth(Base):
    def forward(self, x):
        features = self.features(x)
        if self.training and torch.rand(1) < 0.5:
            return self.fc(features)
        return self.fc(features) + self.other(features)


class MovingMean(Base):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x):
        features = self.features(x)
        if self.training:
            with torch.no_grad():
                self.mean.copy_(torch.lerp(self.mean, features.mean(0), 0.1))
        return self.fc(features)


MODAL = (SoftmaxInEvaluation, AuxiliaryHead, StochasticDepth, InlineNoise, EveryDropout, NoGrad)
