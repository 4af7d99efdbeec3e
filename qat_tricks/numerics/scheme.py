"""A quantization scheme: the integers, and whether each channel has a scale of its own."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from qat_tricks.errors import QatTricksError, did_you_mean

MIN_BITS, MAX_BITS = 2, 8


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """Maps real values to integers: ``q = clamp(round(x / scale) + zero_point, qmin, qmax)``.

    Raises:
        QatTricksError: bits outside 2..8, or an affine scheme with a narrow range.
    """

    bits: int = 8
    # zero_point is 0 for signed integers, the middle of the range for unsigned ones
    symmetric: bool = False
    signed: bool = False
    # one scale for each output channel (weights) instead of one for the tensor
    per_channel: bool = False
    # drop the most negative integer, so that the grid is its own mirror image
    narrow_range: bool = False

    def __post_init__(self) -> None:
        if not is_bits(self.bits):
            raise QatTricksError(
                f"bits={self.bits!r} is not supported: give a whole number from {MIN_BITS} to "
                f"{MAX_BITS}"
            )
        if self.narrow_range and not (self.symmetric and self.signed):
            raise QatTricksError(
                "narrow_range=True needs symmetric=True and signed=True; set both or drop "
                "narrow_range"
            )

    @property
    def qmin(self) -> int:
        """The smallest integer."""
        return -(2 ** (self.bits - 1)) + self.narrow_range if self.signed else 0

    @property
    def qmax(self) -> int:
        """The largest integer."""
        return 2 ** (self.bits - 1) - 1 if self.signed else 2**self.bits - 1

    def qparams(self, low: float, high: float) -> tuple[float, int]:
        """Returns ``(scale, zero_point)`` for values in ``[low, high]``.

        0.0 is always on the grid, so that padding and ReLU's zeros are exact.
        """
        low, high = min(low, 0.0), max(high, 0.0)
        if self.symmetric:
            zero_point = 0 if self.signed else (self.qmax + 1) // 2
            scale = max(-low / (zero_point - self.qmin), high / (self.qmax - zero_point))
            return _usable(scale), zero_point
        scale = _usable((high - low) / (self.qmax - self.qmin))
        zero_point = round(self.qmin - low / scale)
        return scale, min(max(zero_point, self.qmin), self.qmax)

    def as_dict(self) -> dict[str, int | bool]:
        """The scheme as plain data; ``Scheme(**scheme.as_dict())`` is the way back."""
        return asdict(self)


def is_bits(bits: object) -> bool:
    """Whether ``bits`` is a number of bits that integers here may have."""
    if isinstance(bits, bool) or not isinstance(bits, int):
        return False
    return MIN_BITS <= bits <= MAX_BITS


# A tensor that is always zero still needs a scale to divide by.
SCALE_OF_ZEROS = 1e-8
# Kernels multiply two scales in float32: the product must be a normal number, 2**-126 or more.
SMALLEST_SCALE = 2.0**-60


def _usable(scale: float) -> float:
    return max(scale, SMALLEST_SCALE) if scale > 0 else SCALE_OF_ZEROS


def weight_scheme(bits: int) -> Scheme:
    """The scheme of weights: symmetric, narrow range, one scale for each output channel."""
    return Scheme(bits=bits, symmetric=True, signed=True, per_channel=True, narrow_range=True)


# Kinds of integers for activations. ONNX Runtime's kernels on x86 are fast only on the first;
# TensorRT takes only the last.
ACTIVATIONS: Mapping[str, Mapping[str, bool]] = {
    "unsigned_affine": {},
    "signed_affine": {"signed": True},
    "signed_symmetric": {"signed": True, "symmetric": True},
}
DEFAULT_ACTIVATIONS = "unsigned_affine"


def activation_scheme(bits: int, activations: str | None = None) -> Scheme:
    """The scheme of activations, with one scale for a tensor.

    Args:
        bits: 2 to 8.
        activations: one of ``ACTIVATIONS``; None: unsigned and affine.

    Raises:
        QatTricksError: bits outside 2..8, or unknown ``activations``.
    """
    kind = activations or DEFAULT_ACTIVATIONS
    if kind not in ACTIVATIONS:
        raise QatTricksError(
            f'activations="{kind}" is not supported: {did_you_mean(str(kind), ACTIVATIONS)}'
        )
    return Scheme(bits=bits, **ACTIVATIONS[kind])
