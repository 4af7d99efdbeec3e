"""What a network takes: one tensor, or several, one for each argument of its ``forward`` that has
no default.

A batch is these inputs, or begins with them, as ``(inputs, labels)`` does. Several inputs are a
tuple of tensors in the order of the arguments, each with one entry an image. That tuple may also
lie flat in the batch, ``(first, second, labels)``, or be a mapping with the arguments' names. All
else that a network takes keeps its default.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qat_tricks.errors import QatTricksError

Inputs = Tensor | tuple[Tensor, ...]
"""The inputs of a network for one batch: a tensor if it takes one, else a tuple."""


def input_names(function: nn.Module | Callable[..., Any]) -> list[str]:
    """The names of the arguments without default that a network, or a function, takes."""
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    call = function.forward if isinstance(function, nn.Module) else function
    parameters = inspect.signature(call).parameters.values()
    return [p.name for p in parameters if p.default is p.empty and p.kind not in variable]


def inputs_of(batch: Any, names: Sequence[str]) -> Inputs:
    """The inputs that a batch holds, or is, of a network whose arguments are called ``names``.

    For one input they are the batch itself, its first element, or the first tensor of a mapping.

    Raises:
        QatTricksError: they are not there, or have different numbers of images.
    """
    if len(names) < 2:
        return _images_of(batch)
    told = f"the network takes {len(names)} inputs ({', '.join(names)})"
    found: Any = batch[0] if is_nested(batch) else batch
    if isinstance(found, Mapping):
        found = [found[name] for name in names if name in found]
    elif isinstance(found, (list, tuple)):
        found = found if is_nested(batch) else found[: len(names)]  # behind which labels may follow
    else:
        found = [found]
    given = [value for value in found if isinstance(value, Tensor)]
    if len(given) != len(names):
        raise QatTricksError(
            f"{told}, and a batch holds {len(given)}: yield (inputs, labels), inputs being a tuple "
            f"of {len(names)} tensors"
        )
    if any(value.dim() == 0 for value in given) or len({len(value) for value in given}) > 1:
        shapes = ", ".join(str(tuple(value.shape)) for value in given)
        raise QatTricksError(
            f"{told}, and a batch holds tensors of shapes {shapes}: give each of them one entry an "
            "image"
        )
    return tuple(given)


def is_nested(batch: Any) -> bool:
    """Whether the first element of a batch holds several inputs."""
    return (
        isinstance(batch, (list, tuple))
        and len(batch) > 0
        and isinstance(batch[0], (list, tuple, Mapping))
    )


def _images_of(batch: Any) -> Tensor:
    if isinstance(batch, Mapping):
        candidates = list(batch.values())
    elif isinstance(batch, (list, tuple)):
        candidates = list(batch[:1])
    else:
        candidates = [batch]
    for candidate in candidates:
        if isinstance(candidate, Tensor) and candidate.is_floating_point():
            return candidate
    raise QatTricksError(
        f"a batch of type {type(batch).__name__} holds no images: yield a float tensor, a tuple "
        "that begins with one, or a mapping that holds one"
    )


def as_tensors(inputs: Inputs) -> tuple[Tensor, ...]:
    """The inputs as a tuple, also where there is one alone."""
    return (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)


def call_network(network: Callable[..., Any], inputs: Inputs) -> Any:
    """What ``network`` yields for ``inputs``."""
    return network(*as_tensors(inputs))


def batch_size(inputs: Inputs) -> int:
    """How many images the inputs are of."""
    return len(as_tensors(inputs)[0])


def map_tensors(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    """The inputs, each of them changed."""
    return (
        change(inputs) if isinstance(inputs, Tensor) else tuple(change(values) for values in inputs)
    )


def on_cpu(inputs: Inputs) -> Inputs:
    """The inputs as an exported file takes them: on the CPU, in float32 unless they are integers or
    truth values.
    """
    return map_tensors(
        inputs,
        lambda values: (values.float() if values.is_floating_point() else values).detach().cpu(),
    )


def first_images(inputs: Inputs, count: int) -> Inputs:
    """The inputs of the first ``count`` images."""
    return map_tensors(inputs, lambda values: values[:count])


def are_finite(inputs: Inputs) -> bool:
    """Whether no value is NaN or infinite."""
    return all(bool(torch.isfinite(values).all()) for values in as_tensors(inputs))


def check_batches(batches: Sequence[Inputs], purpose: str) -> None:
    """Raises QatTricksError if there is no batch for a purpose, such as "to calibrate on"."""
    if not batches:
        raise QatTricksError(
            f"there are no images {purpose}: give a loader that yields at least one batch"
        )
