"""Handles a network's inputs: one tensor for each argument of ``forward`` without a default.

A batch is these inputs, or begins with them, as ``(inputs, labels)`` does. Several inputs are a
tuple of tensors in the order of the arguments; each has one entry for each image. That tuple may
also lie flat in the batch, ``(first, second, labels)``, or be a mapping with the arguments' names.
Arguments with a default keep it.
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
    # ``*args`` and ``**kwargs`` have no default either, and name no input.
    return [p.name for p in parameters if p.default is p.empty and p.kind not in variable]


def inputs_of(batch: Any, names: Sequence[str]) -> Inputs:
    """The inputs in a batch.

    Args:
        batch: the inputs themselves, or a sequence or mapping that holds them. Of a network with
            one input, the first tensor counts.
        names: those of the network's arguments, see ``input_names``.

    Raises:
        QatTricksError: the batch lacks inputs, or they have different numbers of images.
    """
    if len(names) < 2:
        return _images_of(batch)
    takes = f"the network takes {len(names)} inputs ({', '.join(names)})"
    # ``(inputs, labels)``: the inputs are a tuple or mapping of their own.
    values: Any = batch[0] if is_nested(batch) else batch
    if isinstance(values, Mapping):
        values = [values[name] for name in names if name in values]
    elif not isinstance(values, (list, tuple)):
        values = [values]
    elif not is_nested(batch):
        values = values[: len(names)]  # labels may follow
    tensors = [value for value in values if isinstance(value, Tensor)]
    if len(tensors) != len(names):
        raise QatTricksError(
            f"{takes}, and a batch holds {len(tensors)}: yield (inputs, labels), inputs being a "
            f"tuple of {len(names)} tensors"
        )
    if any(tensor.dim() == 0 for tensor in tensors) or len({len(x) for x in tensors}) > 1:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
        raise QatTricksError(
            f"{takes}, and a batch holds tensors of shapes {shapes}: give each of them one entry "
            "an image"
        )
    return tuple(tensors)


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
        # Labels are integers; images are not.
        if isinstance(candidate, Tensor) and candidate.is_floating_point():
            return candidate
    raise QatTricksError(
        f"a batch of type {type(batch).__name__} holds no images: yield a float tensor, a tuple "
        "that begins with one, or a mapping that holds one"
    )


def as_tensors(inputs: Inputs) -> tuple[Tensor, ...]:
    """The inputs as a tuple, also where there is only one."""
    return (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)


def call_network(network: Callable[..., Any], inputs: Inputs) -> Any:
    """The output of ``network`` for ``inputs``."""
    return network(*as_tensors(inputs))


def batch_size(inputs: Inputs) -> int:
    """The number of images."""
    return len(as_tensors(inputs)[0])


def map_tensors(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    """The inputs, each of them changed."""
    return (
        change(inputs) if isinstance(inputs, Tensor) else tuple(change(values) for values in inputs)
    )


def on_cpu(inputs: Inputs) -> Inputs:
    """The inputs as an exported file takes them: on the CPU, and floats in float32."""
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
