"""Quantizers as modules: the scale is a parameter from the first moment and is never resized."""

from typing import Any

import torch
from torch import Tensor, nn

from qat_tricks.errors import QatTricksError
from qat_tricks.numerics.fake_quantize import (
    fake_quantize,
    fake_quantize_between,
    fake_quantize_from,
    max_abs_scale,
    quantize_weight,
    zero_point_from,
)
from qat_tricks.numerics.range_estimators import RangeEstimator
from qat_tricks.numerics.scheme import SMALLEST_SCALE, Scheme


class ActivationQuantizer(nn.Module):
    """Fake-quantizes one tensor of the network, and stands in for the ReLU or ReLU6 before it.

    Clamping to ``steps`` *is* the ReLU. An affine grid has ``zero_point == qmin`` behind a ReLU: it
    begins at 0.0, and an integer kernel clamps to it in any case. A symmetric grid reaches below
    0.0, and only its upper half is used. The cap of a ReLU6 holds because the range never exceeds
    it.

    Attributes:
        scale: parameter of shape ``[]``, float32; trained only after ``learn_scales``.
        zero_point: buffer of shape ``[]``, int32; fixed by calibration, or following ``low``.
        low: None; or, once it is learned too, the smallest value: a parameter of shape ``[]``.
        enabled: when False, only the activation function is computed.
        observer: while it is set, it sees every value that passes while ``enabled`` is False.
    """

    def __init__(self, scheme: Scheme, *, activation: str | None = None) -> None:
        super().__init__()
        self.scheme = scheme
        self.activation = activation
        self.enabled = True
        self.observer: RangeEstimator | None = None
        # NaN until a range is set: a checkpoint so tells that it was saved before calibration.
        self.scale = nn.Parameter(torch.tensor(float("nan")), requires_grad=False)
        self.register_buffer("zero_point", torch.tensor(0, dtype=torch.int32))
        self.zero_point: Tensor
        self.register_parameter("low", None)
        self.low: nn.Parameter | None
        # the buffer's value on the host, so that a step never waits for the device
        self._zero_point: int | None = None

    def extra_repr(self) -> str:
        """Bits and activation, for ``print``."""
        return f"bits={self.scheme.bits}, activation={self.activation}"

    @property
    def cap(self) -> float:
        """The largest value the activation function before this quantizer lets through."""
        return 6.0 if self.activation == "relu6" else float("inf")

    @property
    def is_calibrated(self) -> bool:
        """Whether a range was set or loaded."""
        return self._zero_point is not None

    @property
    def is_on(self) -> bool:
        """Whether values are put on the grid."""
        return self.enabled and self.is_calibrated

    @property
    def offset(self) -> int:
        """The zero point as a number.

        Reading the buffer instead would wait for the device, and break a compiled graph. Only one
        that is learned is read there.
        """
        assert self._zero_point is not None
        if self.low is not None and not torch.compiler.is_compiling():
            self._zero_point = int(self.current_zero_point())
        return self._zero_point

    @property
    def integers(self) -> tuple[int, int]:
        """The smallest and the largest integer in use: behind a ReLU, none below the zero point."""
        return self.scheme.qmin if self.activation is None else self.offset, self.scheme.qmax

    @property
    def steps(self) -> tuple[int, int]:
        """The smallest and the largest value, in units of the scale."""
        low, high = self.integers
        return low - self.offset, high - self.offset

    @property
    def range(self) -> tuple[float, float]:
        """The smallest and the largest value."""
        scale, (low, high) = float(self.current_scale().detach()), self.steps
        return scale * low, scale * high

    def set_range(self, low: float, high: float) -> None:
        """Sets scale and zero point so that the integers cover ``[low, high]``."""
        if self.activation is not None:
            # Behind a ReLU there are no values below 0.
            low, high = 0.0, min(high, self.cap)
        scale, zero_point = self.scheme.qparams(low, high)
        with torch.no_grad():
            self.scale.fill_(scale)
            self.zero_point.fill_(zero_point)
            if self.low is not None:
                self.low.fill_(scale * (self.scheme.qmin - zero_point))
        self._zero_point = zero_point

    def current_zero_point(self) -> Tensor:
        """The zero point in use, int32 of shape ``[]``, which may follow ``low``."""
        self._follow_low()
        return self.zero_point

    @torch.no_grad()
    def move_scale(self, scale: Tensor) -> None:
        """Sets the scale and leaves the zero point as it is."""
        self.scale.copy_(scale)
        if self.low is not None:
            self.low.copy_(scale * (self.scheme.qmin - self.zero_point))

    def own_low(self) -> nn.Parameter:
        """Makes the smallest value a parameter, begun at the one in use, and returns it."""
        if self.low is None:
            low = self.current_scale().detach() * (self.scheme.qmin - self.zero_point)
            self.low = nn.Parameter(low, requires_grad=False)
        return self.low

    def current_scale(self) -> Tensor:
        """The scale in use: positive, and within the cap. Shape ``[]``."""
        if self.cap == float("inf"):
            return self.scale.clamp_min(SMALLEST_SCALE)
        # A learned scale may grow past the cap: there the range would no longer be ReLU6's.
        largest, _ = self.scheme.qparams(0.0, self.cap)
        return self.scale.clamp(SMALLEST_SCALE, largest)

    def forward(self, x: Tensor) -> Tensor:
        """Returns ``x`` on the grid, or its float activation while disabled."""
        if not self.enabled:
            # The ReLU has left the graph, so the quantizer computes it also when it is off.
            x = self._activate(x)
            if self.observer is not None:
                self.observer.observe(x)
            return x
        if self._zero_point is None:
            raise QatTricksError(
                "a quantizer has no range yet: calibrate the network before it is run quantized"
            )
        return self.on_grid(x)

    def on_grid(self, x: Tensor) -> Tensor:
        """Returns ``x`` on the grid, whether or not the quantizer is enabled; it has a range."""
        if self.low is None:
            return fake_quantize_between(x, self.current_scale(), *self.steps)
        zero_point = self.current_zero_point()
        return fake_quantize_from(x, self.current_scale(), self.low, zero_point, self.scheme)

    def train(self, mode: bool = True) -> "ActivationQuantizer":
        """Sets the mode; the last step of a training has moved ``low``, and the zero point follows.

        So what is exported or saved after it is what the next forward computes.
        """
        if not mode and self.low is not None and self.is_calibrated:
            self.refresh()
        return super().train(mode)

    @torch.no_grad()
    def _follow_low(self) -> None:
        if self.low is not None and not self.low.is_meta:
            self.zero_point.copy_(zero_point_from(self.low, self.current_scale(), self.scheme))

    @torch.no_grad()
    def preimage(self, exact: Tensor, simulated: Tensor) -> Tensor:
        """Values that this quantizer puts on ``exact``: those of ``simulated`` wherever it does so.

        So a computation in floats keeps its gradient, which ends where values are clamped, and has
        the values of one in integers.

        Args:
            exact: values on the grid.
            simulated: the same before they were rounded, up to what arithmetic in floats loses.

        Returns:
            float32 of the shape of ``exact``.
        """
        simulated = simulated.float()
        return torch.where(self(simulated) == exact, simulated, exact)

    def _activate(self, x: Tensor) -> Tensor:
        if self.activation is None:
            return x
        return nn.functional.relu(x) if self.activation == "relu" else nn.functional.relu6(x)

    def refresh(self) -> None:
        """Reads ``zero_point`` again after a checkpoint or a broadcast wrote the buffers."""
        if bool(torch.isnan(self.scale)):
            self._zero_point = None
            return
        self._zero_point = int(self.current_zero_point())

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        # On the meta device there are no values to read yet.
        if not self.scale.is_meta:
            self.refresh()


class WeightQuantizer(nn.Module):
    """Fake-quantizes a weight with one scale for each output channel.

    Attributes:
        scale: None while the scale follows the weight (``max|w| / qmax``: nothing clips, and the
            gradient passes at no cost). Once the scale is its own, a parameter with one entry for
            each channel and as many dimensions as the weight.
        enabled: whether the layer that holds this quantizer uses it.
    """

    def __init__(self, scheme: Scheme, *, channel_axis: int = 0) -> None:
        super().__init__()
        self.scheme = scheme
        self.channel_axis = channel_axis
        self.enabled = True
        self.register_parameter("scale", None)
        self.scale: nn.Parameter | None

    def extra_repr(self) -> str:
        """Bits and the origin of the scale, for ``print``."""
        origin = "follows the weight" if self.scale is None else "own"
        return f"bits={self.scheme.bits}, scale={origin}"

    def current_scale(self, weight: Tensor) -> Tensor:
        """The scale in use, shape ``[1, .., C, .., 1]``, positive."""
        if self.scale is None:
            return max_abs_scale(weight, self.scheme, self.channel_axis)
        # A learned scale may step past 0, and weights are divided by it.
        return self.scale.clamp_min(torch.finfo(torch.float32).tiny)

    def own_scale(self, weight: Tensor) -> nn.Parameter:
        """Gives the quantizer a scale of its own, begun at the one in use, and returns it."""
        if self.scale is None:
            self.scale = nn.Parameter(self.current_scale(weight).clone(), requires_grad=False)
        return self.scale

    def fit_mse(self, weight: Tensor, candidates: int = 80) -> None:
        """Gives each channel the scale with the smallest squared error of rounding and clipping.

        Args:
            weight: the weight to fit, masked if it is pruned.
            candidates: shares of the largest value that are tried, from 0.3 to 1.
        """
        largest = max_abs_scale(weight, self.scheme, self.channel_axis)
        dims = [d for d in range(weight.dim()) if largest.shape[d] == 1]
        best, best_error = largest.clone(), torch.full_like(largest, float("inf"))
        # A grid search, for the error has many local minima.
        for shrink in torch.linspace(0.3, 1.0, candidates).tolist():
            scale = largest * shrink
            error = (
                (fake_quantize(weight.detach(), scale, 0, self.scheme) - weight)
                .square()
                .sum(dims, keepdim=True)
            )
            better = error < best_error
            best, best_error = (
                torch.where(better, scale, best),
                torch.where(better, error, best_error),
            )
        with torch.no_grad():
            self.own_scale(weight).copy_(best)

    def forward(self, weight: Tensor, scale: Tensor | None = None) -> Tensor:
        """Returns ``weight`` on the grid of ``scale``.

        By default that is the quantizer's own scale, or else the one of the weight's maximum.
        """
        if scale is None and self.scale is not None:
            scale = self.current_scale(weight)
        return quantize_weight(weight, scale, self.scheme, self.channel_axis)
