"""ONNX Runtime sessions on the CPU, opened in one way everywhere.

On x86 CPUs without VNNI, ONNX Runtime multiplies unsigned activations by signed weights with
``vpmaddubsw``, which adds two products into 16 bits and saturates: with weights of 127 and
activations of 255, about half of a convolution's value is lost. ``session.x64quantprecision`` makes
it store the weights as unsigned there, which is exact. It changes nothing on CPUs with VNNI and on
others than x86.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from qat_tricks.errors import QatTricksError

SESSION_CONFIG: Mapping[str, str] = {"session.x64quantprecision": "1"}
"""Entries that every session of this package sets, and that whoever deploys the model should set
too.
"""

_IMAGE_TYPES: Mapping[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(uint8)": np.uint8,  # pixels, where the network normalizes them itself
}
_TYPES: Mapping[str, type[np.generic]] = {
    **_IMAGE_TYPES,
    **{
        f"tensor({name})": np.dtype(name).type
        for name in ("int8", "int16", "uint16", "int32", "uint32", "int64", "uint64")
    },
    "tensor(bool)": np.bool_,
}

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


def open_session(
    path: str | PathLike[str],
    *,
    threads: int | None = None,
    optimize: bool = True,
    profile_prefix: str | None = None,
    optimized_path: str | PathLike[str] | None = None,
    disabled_optimizers: Sequence[str] = (),
) -> ort.InferenceSession:
    """Opens an ONNX file on the CPU.

    Args:
        path: the ONNX file.
        threads: threads within an operator; None leaves the number to ONNX Runtime.
        optimize: False runs the graph as written, without any fusion.
        profile_prefix: where to write ONNX Runtime's profile, when given.
        optimized_path: where to save the graph that really runs, when given.
        disabled_optimizers: names of ONNX Runtime's graph transformers to leave out.

    Raises:
        QatTricksError: the file is missing, truncated, or no ONNX graph that ONNX Runtime can run.
    """
    path = Path(path)
    if not path.is_file():
        raise QatTricksError(
            f'no ONNX file at "{path}": give the path of a model.onnx that an export wrote'
        )
    if threads is not None and threads < 1:
        raise QatTricksError(f"threads is {threads}, allowed: 1 or more")
    options = ort.SessionOptions()
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
    options.intra_op_num_threads = threads or 0
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors only; saving an optimized graph warns otherwise
    for key, value in SESSION_CONFIG.items():
        options.add_session_config_entry(key, value)
    if profile_prefix is not None:
        options.enable_profiling = True
        options.profile_file_prefix = profile_prefix
    if optimized_path is not None:
        options.optimized_model_filepath = str(optimized_path)
    try:
        return ort.InferenceSession(
            str(path),
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=list(disabled_optimizers) or None,
        )
    except Exception as error:  # ONNX Runtime's exceptions share no narrower base class
        raise QatTricksError(
            f'ONNX Runtime cannot open "{path}" ({one_line(error)}): the file is truncated or not '
            "an ONNX network; export it again"
        ) from error


def input_specs(session: ort.InferenceSession) -> tuple[InputSpec, ...]:
    """Returns name, shape and dtype of each of the network's inputs.

    Raises:
        QatTricksError: an input is no tensor of numbers, or there is none.
    """
    inputs = session.get_inputs()
    if not inputs or any(given.type not in _TYPES for given in inputs):
        raise QatTricksError(
            f"the ONNX network's inputs are ({_listed(inputs)}), allowed: tensors of numbers"
        )
    return tuple(
        InputSpec(
            name=given.name,
            shape=tuple(size if isinstance(size, int) else None for size in given.shape),
            dtype=np.dtype(_TYPES[given.type]),
        )
        for given in inputs
    )


def input_spec(session: ort.InferenceSession) -> InputSpec:
    """Returns name, shape and dtype of the network's only input.

    Raises:
        QatTricksError: the network has not exactly one input of a float type or of pixels.
    """
    inputs = session.get_inputs()
    if len(inputs) != 1 or inputs[0].type not in _IMAGE_TYPES:
        raise QatTricksError(
            f"the ONNX network's inputs are ({_listed(inputs)}), allowed: one float or uint8 "
            "tensor of images"
        )
    return input_specs(session)[0]


def _listed(inputs: Sequence[Any]) -> str:
    return ", ".join(f"{given.name}: {given.type}" for given in inputs) or "none"


def run_batch(session: ort.InferenceSession, *inputs: np.ndarray) -> np.ndarray:
    """Runs one batch.

    Args:
        inputs: images [batch, channels, height, width], or whatever the network's inputs are, cast
            to their dtypes.

    Returns:
        The first output, logits of shape [batch, classes].

    Raises:
        QatTricksError: there are not so many inputs as the network takes, or of other shapes.
    """
    return session.run(None, feed(input_specs(session), inputs))[0]


def feed(specs: Sequence[InputSpec], inputs: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the inputs by name, cast to the network's dtypes; raises QatTricksError where number
    or shapes do not fit.
    """
    _check_number(specs, len(inputs))
    for spec, values in zip(specs, inputs, strict=True):
        check_shape(spec, values.shape)
    return {
        spec.name: np.ascontiguousarray(values, dtype=spec.dtype)
        for spec, values in zip(specs, inputs, strict=True)
    }


def batch_shapes(
    specs: Sequence[InputSpec], image_shape: Shapes, batch_size: int
) -> list[tuple[int, ...]]:
    """Returns the shape of each input for ``batch_size`` images.

    Raises:
        QatTricksError: the network does not take these shapes, or not so many.
    """
    one = len(image_shape) == 0 or isinstance(image_shape[0], int)
    shapes = [(batch_size, *shape) for shape in ([image_shape] if one else image_shape)]  # type: ignore[misc]
    _check_number(specs, len(shapes))
    for spec, shape in zip(specs, shapes, strict=True):
        if min(shape) < 1:
            raise QatTricksError(
                f"batch size and image shape are {shape}, allowed: sizes of 1 or more"
            )
        check_shape(spec, shape)
    return shapes


def random_batch(
    specs: Sequence[InputSpec], image_shape: Shapes, batch_size: int, seed: int = 0
) -> list[np.ndarray]:
    """Returns what ``random_inputs`` does for each input; raises QatTricksError as ``batch_shapes``
    does.
    """
    shapes = batch_shapes(specs, image_shape, batch_size)
    return [
        random_inputs(specs[i], shape[1:], batch_size, seed + i) for i, shape in enumerate(shapes)
    ]


def random_inputs(
    spec: InputSpec, image_shape: Sequence[int], batch_size: int, seed: int = 0
) -> np.ndarray:
    """Returns random images [batch_size, *image_shape] in the network's own dtype: normally
    distributed, or uint8 pixels.

    Of other integers and of truth values it returns zeros, the one index that every table has.

    Raises:
        QatTricksError: the network does not take this shape.
    """
    (shape,) = batch_shapes([spec], image_shape, batch_size)
    random = np.random.default_rng(seed)
    if spec.dtype == np.uint8:
        return random.integers(0, 256, shape, dtype=np.uint8)
    if spec.dtype.kind != "f":
        return np.zeros(shape, spec.dtype)
    return random.standard_normal(shape).astype(spec.dtype)


def _check_number(specs: Sequence[InputSpec], given: int) -> None:
    if given != len(specs):
        names = ", ".join(spec.name for spec in specs)
        raise QatTricksError(f"{given} inputs given, the ONNX network takes {len(specs)} ({names})")


def check_shape(spec: InputSpec, shape: Sequence[int]) -> None:
    """Refuses an input of another shape than the network takes, dynamic dimensions aside
    (QatTricksError).
    """
    fits = len(shape) == len(spec.shape) and all(
        want is None or want == got for want, got in zip(spec.shape, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in spec.shape)
        raise QatTricksError(
            f"images of shape {tuple(shape)} given, the ONNX network takes ({wanted}) as "
            f"{spec.name}"
        )


def one_line(error: BaseException) -> str:
    """Returns the error's text on a single line of at most 200 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."
