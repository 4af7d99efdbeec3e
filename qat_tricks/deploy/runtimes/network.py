"""The interface of an ONNX file opened in a runtime, and the inputs of the file."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from qat_tricks.errors import QatTricksError

Shapes = Sequence[int] | Sequence[Sequence[int]]
"""The shape of an image, (channels, height, width), or of a network with several inputs one shape
for each.
"""


@dataclass(frozen=True, kw_only=True)
class InputSpec:
    """An input of a network."""

    name: str
    shape: tuple[int | None, ...]  # None where the dimension is dynamic, as the batch is
    dtype: np.dtype


class Network(Protocol):
    """An ONNX file opened in a runtime."""

    specs: tuple[InputSpec, ...]  # of its inputs
    # share, 0..1, of convs and linears that run in integers; None: the runtime does not say
    integer_layers: float | None

    @property
    def spec(self) -> InputSpec:
        """The only input.

        Raises:
            QatTricksError: there are several.
        """
        if len(self.specs) > 1:
            names = ", ".join(spec.name for spec in self.specs)
            raise QatTricksError(
                f"the ONNX network's inputs are ({names}), allowed: one tensor of images"
            )
        return self.specs[0]

    def prepare(self, *inputs: np.ndarray) -> Callable[[], np.ndarray]:
        """Checks and casts a batch, so that only the run itself is left to be timed.

        Args:
            inputs: images ``[batch, channels, height, width]``, or one array for each input of the
                network.

        Returns:
            A function that runs this batch and returns logits ``[batch, classes]``.

        Raises:
            QatTricksError: the number of inputs, or a shape, is not the network's, or an input of
                integers or truth values would be changed by the cast.
        """


def feed(specs: Sequence[InputSpec], inputs: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the inputs by name, cast to the network's dtypes.

    Raises:
        QatTricksError: the number of inputs, or a shape, is not the network's, or an input of
            integers or truth values would be changed by the cast.
    """
    _check_number(specs, len(inputs))
    for spec, values in zip(specs, inputs, strict=True):
        _check_shape(spec, values.shape)
    return {spec.name: _cast(spec, values) for spec, values in zip(specs, inputs, strict=True)}


def _cast(spec: InputSpec, values: np.ndarray) -> np.ndarray:
    """Returns the values in the network's dtype."""
    with np.errstate(invalid="ignore"):  # a NaN in place of an integer is refused below
        # Runtimes read memory directly, so a view of other strides is copied first.
        cast = np.ascontiguousarray(values, dtype=spec.dtype)
    # Floats may be rounded; most batches need no look at their values.
    keeps = spec.dtype.kind == "f" or np.can_cast(values.dtype, spec.dtype)
    if not keeps and not np.array_equal(cast, values):
        remedy = (
            "give the pixels as uint8, 0 to 255, or a file exported without normalization"
            if spec.dtype == np.uint8
            else f"give values that {spec.dtype} can hold"
        )
        raise QatTricksError(
            f"{values.dtype} given, whose values are not all {spec.dtype}, which the ONNX network "
            f"takes as {spec.name}: {remedy}"
        )
    return cast


def batch_shapes(
    specs: Sequence[InputSpec], image_shape: Shapes, batch_size: int
) -> list[tuple[int, ...]]:
    """Returns the shape of each input for ``batch_size`` images.

    Raises:
        QatTricksError: the number of shapes, or a shape, is not the network's.
    """
    # One shape is a list of numbers; several are a list of shapes.
    is_single = len(image_shape) == 0 or isinstance(image_shape[0], int)
    image_shapes = [image_shape] if is_single else image_shape
    shapes = [(batch_size, *shape) for shape in image_shapes]  # type: ignore[misc]
    _check_number(specs, len(shapes))
    for spec, shape in zip(specs, shapes, strict=True):
        if min(shape) < 1:
            raise QatTricksError(
                f"batch size and image shape are {shape}, allowed: sizes of 1 or more"
            )
        _check_shape(spec, shape)
    return shapes


def random_batch(
    specs: Sequence[InputSpec], image_shape: Shapes, batch_size: int, seed: int = 0
) -> list[np.ndarray]:
    """Returns random values for each input, in the network's own dtypes.

    Floats are normally distributed, uint8 pixels uniformly. Other integers and truth values are
    zeros: zero is an index that every table has.

    Args:
        specs: of the network's inputs.
        image_shape: (channels, height, width), or one shape for each input.
        batch_size: number of images.
        seed: of the first input; each further input takes the next.

    Raises:
        QatTricksError: the number of shapes, or a shape, is not the network's.
    """
    shapes = batch_shapes(specs, image_shape, batch_size)
    return [
        _random_values(shape, spec.dtype, seed + index)
        for index, (spec, shape) in enumerate(zip(specs, shapes, strict=True))
    ]


def _random_values(shape: tuple[int, ...], dtype: np.dtype, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    if dtype == np.uint8:
        return random.integers(0, 256, shape, dtype=np.uint8)
    if dtype.kind != "f":
        return np.zeros(shape, dtype)
    return random.standard_normal(shape).astype(dtype)


def _check_number(specs: Sequence[InputSpec], count: int) -> None:
    if count != len(specs):
        names = ", ".join(spec.name for spec in specs)
        raise QatTricksError(f"{count} inputs given, the ONNX network takes {len(specs)} ({names})")


def _check_shape(spec: InputSpec, shape: Sequence[int]) -> None:
    """Refuses a shape that differs from the network's in a dimension that is not dynamic."""
    fits = len(shape) == len(spec.shape) and all(
        want is None or want == got for want, got in zip(spec.shape, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in spec.shape)
        raise QatTricksError(
            f"images of shape {tuple(shape)} given, the ONNX network takes ({wanted}) as "
            f"{spec.name}"
        )
