"""Range estimators: they choose the range ``[low, high]`` of a tensor that the integers cover.

Each observes batches one after the other and is asked once for the range. ``minmax`` and
``moving_average`` (Jacob et al. 2018, arXiv 1712.05877) keep extremes; ``percentile``, ``mse`` and
``kl`` (Migacz, "8-bit inference with TensorRT", GTC 2017) clip, judged on a histogram of a bounded
sample, so that their cost does not grow with the images.
"""

import copy
import math
from typing import Protocol, Self

import torch
from torch import Tensor

from qat_tricks.errors import QatTricksError, did_you_mean
from qat_tricks.numerics.scheme import Scheme

# The first reach of a histogram of zeros; bins of float32 must be normal numbers.
SMALLEST_REACH = 1e-30


class RangeEstimator(Protocol):
    """Sees batches through ``observe`` and answers with ``range``."""

    def observe(self, x: Tensor) -> None:
        """Takes in one batch of values, of any shape."""

    def merge(self, other: Self) -> None:
        """Takes in the observations of ``other``, an estimator of the same kind."""

    def range(self, scheme: Scheme) -> tuple[float, float]:
        """Returns ``(low, high)``; raises QatTricksError if nothing was observed."""


class MinMax:
    """The smallest and the largest value of all."""

    def __init__(self) -> None:
        self.low, self.high = float("inf"), float("-inf")

    def observe(self, x: Tensor) -> None:
        """Takes in one batch of values."""
        # One pass over the values gives both.
        low, high = (v.item() for v in torch.aminmax(x))
        if not (abs(low) < float("inf") and abs(high) < float("inf")):
            raise QatTricksError(
                "values to calibrate on contain NaN or infinity: check the images and the float "
                "network"
            )
        self._extend(low, high)

    def _extend(self, low: float, high: float) -> None:
        self.low, self.high = min(self.low, low), max(self.high, high)

    # By minimum and maximum, also for the moving average: a range that every rank agrees on.
    def merge(self, other: Self) -> None:
        """Takes in the extremes of ``other``."""
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)

    def range(self, scheme: Scheme) -> tuple[float, float]:
        """Returns the smallest and the largest value."""
        if self.low > self.high:
            raise QatTricksError("nothing was observed: calibrate on at least one batch first")
        return self.low, self.high


class MovingAverage(MinMax):
    """An exponential average of each batch's smallest and largest value."""

    def __init__(self, momentum: float = 0.9) -> None:
        super().__init__()
        self.momentum = momentum

    def _extend(self, low: float, high: float) -> None:
        if self.low > self.high:
            self.low, self.high = low, high
        else:
            self.low += (1 - self.momentum) * (low - self.low)
            self.high += (1 - self.momentum) * (high - self.high)


class Histogram(MinMax):
    """Extremes of all values, and a histogram of a strided sample over ``[-reach, reach]``."""

    bins = 4096
    sample = 65536  # values a batch at most; the extremes are always those of every value

    def __init__(self) -> None:
        super().__init__()
        self.reach = 0.0
        self.counts = torch.zeros(self.bins, dtype=torch.float64)

    def observe(self, x: Tensor) -> None:
        """Takes in one batch of values."""
        super().observe(x)
        largest = max(-self.low, self.high, SMALLEST_REACH)
        if self.reach == 0.0:
            # of a power of two, so that histograms can be merged
            self.reach = 2.0 ** math.ceil(math.log2(largest))
        self._widen(largest)
        # An odd stride visits every channel, also where the channel count is a power of two.
        flat = x.detach().flatten()
        flat = flat[:: max(1, flat.numel() // self.sample) | 1].float()
        self.counts += torch.histc(flat, self.bins, -self.reach, self.reach).double().cpu()

    def _widen(self, reach: float) -> None:
        # doubling the reach merges bins two by two: no count is ever misplaced
        while self.reach < reach:
            merged = self.counts.view(-1, 2).sum(1)
            self.counts.zero_()
            # The old range is the middle half of the new one.
            self.counts[self.bins // 4 : 3 * self.bins // 4] = merged
            self.reach *= 2

    def merge(self, other: Self) -> None:
        """Takes in the extremes and the counts of ``other``."""
        super().merge(other)
        if self.reach == 0.0:
            self.reach = other.reach
        self._widen(other.reach)
        # Widening moves counts, and ``other`` must stay as it is.
        widened = copy.deepcopy(other)
        if widened.reach > 0:
            widened._widen(self.reach)
        self.counts += widened.counts

    @property
    def centers(self) -> Tensor:
        """The middle of each bin, shape ``[bins]``."""
        width = 2 * self.reach / self.bins
        return -self.reach + width * (torch.arange(self.bins, dtype=torch.float64) + 0.5)


class Percentile(Histogram):
    """Leaves out the rarest values, ``100 - percentile`` percent of the sample at each end.

    An end without values, such as the lower one behind a ReLU, loses none.
    """

    def __init__(self, percentile: float = 99.99) -> None:
        super().__init__()
        if not 50 < percentile <= 100:
            raise QatTricksError(
                f"percentile={percentile} is not allowed: give a number above 50, up to 100"
            )
        self.percentile = percentile

    def range(self, scheme: Scheme) -> tuple[float, float]:
        """Returns the range without the rarest values."""
        low, high = super().range(scheme)
        share = self.counts.cumsum(0) / self.counts.sum()  # of the sample up to each bin's end
        tail = 1 - self.percentile / 100
        first = int((share > tail).nonzero()[0])
        last = int((share >= 1 - tail).nonzero()[0])
        half = self.reach / self.bins
        centers = self.centers
        return max(low, float(centers[first]) - half), min(high, float(centers[last]) + half)


class MSE(Histogram):
    """The range with the smallest mean squared error between values and quantized values."""

    candidates = 80

    def range(self, scheme: Scheme) -> tuple[float, float]:
        """Returns the range of least squared error."""
        low, high = super().range(scheme)
        # Squares of small values would underflow; dividing by a power of two loses nothing.
        unit = self.reach if self.reach < 1e-6 else 1.0
        low, high = low / unit, high / unit
        best_low, best_high = self._search(low, high, unit, scheme)
        return best_low * unit, best_high * unit

    def _search(self, low: float, high: float, unit: float, scheme: Scheme) -> tuple[float, float]:
        """The best range within ``[low, high]``, in units of ``unit``."""
        # Most bins are empty, and the search visits each bin for every candidate.
        filled = self.counts > 0
        centers, counts = (self.centers[filled] / unit).float(), self.counts[filled].float()
        shrink = torch.linspace(1.0 / self.candidates, 1.0, self.candidates)
        if scheme.symmetric:
            errors = _squared_errors(centers, counts, low * shrink, high * shrink, scheme)
            factor = float(shrink[int(errors.argmin())])
            return low * factor, high * factor
        # One end at a time, twice: the ends interact only through the step between them.
        best_low, best_high = low, high
        for _ in range(2 if low < 0 < high else 1):
            if high > 0:
                highs = high * shrink
                best_high = float(
                    highs[int(_squared_errors(centers, counts, best_low, highs, scheme).argmin())]
                )
            if low < 0:
                lows = low * shrink
                best_low = float(
                    lows[int(_squared_errors(centers, counts, lows, best_high, scheme).argmin())]
                )
        return best_low, best_high


class KL(Histogram):
    """The range whose quantized distribution diverges least from that of the values.

    The divergence is Kullback's and Leibler's.
    """

    candidates = 80

    def range(self, scheme: Scheme) -> tuple[float, float]:
        """Returns the range of least divergence."""
        low, high = super().range(scheme)
        shrink = torch.linspace(0.2, 1.0, self.candidates).tolist()
        divergence = [self._divergence(low * f, high * f, scheme) for f in shrink]
        factor = shrink[min(range(len(shrink)), key=divergence.__getitem__)]
        return low * factor, high * factor

    def _divergence(self, low: float, high: float, scheme: Scheme) -> float:
        scale, zero_point = scheme.qparams(low, high)
        levels = (torch.round(self.centers / scale) + zero_point).clamp_(
            scheme.qmin, scheme.qmax
        ).long() - scheme.qmin
        # In scales: half a step beyond the outermost levels, values still round to them.
        first, last = scheme.qmin - zero_point - 0.5, scheme.qmax - zero_point + 0.5
        inside = (self.centers >= first * scale) & (self.centers <= last * scale)
        size = scheme.qmax - scheme.qmin + 1
        # The reference distribution: clipped values pile up in the outermost bin inside.
        reference = torch.where(inside, self.counts, 0.0)
        bins_inside = inside.nonzero().flatten()
        reference[bins_inside[0]] += self.counts[: int(bins_inside[0])].sum()
        reference[bins_inside[-1]] += self.counts[int(bins_inside[-1]) + 1 :].sum()
        # The quantized one knows only the values inside: each level's mass spread evenly over its
        # filled bins.
        filled = inside & (self.counts > 0)
        mass = torch.zeros(size, dtype=torch.float64).index_add_(
            0, levels[filled], self.counts[filled]
        )
        bins = torch.zeros(size, dtype=torch.float64).index_add_(
            0, levels[filled], torch.ones_like(self.counts[filled])
        )
        candidate = torch.where(filled, (mass / bins.clamp_min(1))[levels], 0.0)
        p, q = reference / reference.sum(), candidate / candidate.sum().clamp_min(1e-12)
        support = p > 0
        return float((p[support] * (p[support] / q[support].clamp_min(1e-12)).log()).sum())


def _squared_errors(
    values: Tensor, counts: Tensor, lows: Tensor | float, highs: Tensor | float, scheme: Scheme
) -> Tensor:
    """The squared error of quantizing ``values`` for each candidate range.

    Args:
        values: centers of bins, ``[bins]``.
        counts: the weight of each, ``[bins]``.
        lows: the ranges' lower ends, ``[candidates]``, or one for all.
        highs: their upper ends, in the same way.
        scheme: gives the integers.

    Returns:
        ``[candidates]``.
    """
    ranges = torch.stack(
        torch.broadcast_tensors(torch.as_tensor(lows), torch.as_tensor(highs)), dim=1
    )
    qparams = [scheme.qparams(low, high) for low, high in ranges.tolist()]
    scales = torch.tensor([scale for scale, _ in qparams])[:, None]
    zero_points = torch.tensor([float(zero_point) for _, zero_point in qparams])[:, None]
    steps = torch.round(values / scales).clamp_(
        scheme.qmin - zero_points, scheme.qmax - zero_points
    )
    return ((steps * scales - values).square_() * counts).sum(1)


ESTIMATORS: dict[str, type[MinMax]] = {
    "minmax": MinMax,
    "moving_average": MovingAverage,
    "percentile": Percentile,
    "mse": MSE,
    "kl": KL,
}


def make_estimator(name: str, **settings: float) -> RangeEstimator:
    """Returns a new estimator by name; raises QatTricksError for an unknown one."""
    if name not in ESTIMATORS:
        raise QatTricksError(f'unknown range estimator "{name}": {did_you_mean(name, ESTIMATORS)}')
    return ESTIMATORS[name](**settings)
