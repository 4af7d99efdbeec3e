"""Handles a network's inputs: one tensor for each argument of ``forward`` without a default.

A batch is these inputs, or begins with them, as ``(inputs, labels)`` does. Several inputs are a
tuple of tensors in the order of the arguments; each has one entry for each image. That tuple may
also lie flat in the batch, ``(first, second, labels)``, or be a mapping with the arguments' names.
Arguments with a default keep it.

Of a network with one input, images may be integers, such as uint8 pixels, where nothing else can be
meant. In a mapping, images are the value with the argument's name, else with a name that is usual
for images, else the one float tensor of the most dimensions.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from qat_tricks.errors import QatTricksError, one_line

Inputs = Tensor | tuple[Tensor, ...]
"""The inputs of a network for one batch: a tensor if it takes one, else a tuple."""


IMAGE_NAMES = ("image", "images", "pixel_values", "x", "input", "inputs", "img", "data")
"""Names that images usually have in a mapping, the first found counts."""


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
        batch: the inputs themselves, or a sequence or mapping that holds them.
        names: those of the network's arguments, see ``input_names``.

    Raises:
        QatTricksError: the batch lacks inputs, or does not tell which they are, or they have
            different numbers of images.
    """
    if len(names) < 2:
        return _images_of(batch, names)
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


def _images_of(batch: Any, names: Sequence[str]) -> Tensor:
    """The images in a batch of a network with one input."""
    if isinstance(batch, Mapping):
        return _images_in_mapping(batch, names)
    if isinstance(batch, (list, tuple)) and batch and isinstance(batch[0], Mapping):
        return _images_in_mapping(batch[0], names)  # ({"image": images}, labels)
    parts = list(batch) if isinstance(batch, (list, tuple)) else [batch]
    first = parts[0] if parts else None
    if isinstance(first, Tensor):
        # Labels may be integers too, and have fewer dimensions than the images before them.
        others = [part for part in parts[1:2] if isinstance(part, Tensor)]
        if first.is_floating_point() or (
            _may_be_pixels(first) and all(part.dim() < first.dim() for part in others)
        ):
            return first
        raise QatTricksError(
            f"a batch begins with {first.dtype} of shape {tuple(first.shape)}, which may be "
            "labels: yield (images, labels), images as floats, or as integers of more dimensions "
            "than the labels"
        )
    raise _no_images(batch)


def _images_in_mapping(batch: Mapping[Any, Any], names: Sequence[str]) -> Tensor:
    tensors = {key: value for key, value in batch.items() if isinstance(value, Tensor)}
    for name in (*names, *IMAGE_NAMES):
        if name in tensors and _may_be_pixels(tensors[name]):
            return tensors[name]
    # Labels, weights of images and the like have fewer dimensions.
    for candidates in (
        {key: value for key, value in tensors.items() if value.is_floating_point()},
        {key: value for key, value in tensors.items() if _may_be_pixels(value)},
    ):
        most = max((value.dim() for value in candidates.values()), default=0)
        largest = [key for key, value in candidates.items() if value.dim() == most]
        if len(largest) == 1:
            return candidates[largest[0]]
        if len(largest) > 1:
            wanted = names[0] if names else IMAGE_NAMES[0]
            raise QatTricksError(
                f"a batch does not tell which of {', '.join(map(str, largest))} are the images: "
                f'name them "{wanted}", or yield (images, labels)'
            )
    raise _no_images(batch)


def _may_be_pixels(values: Tensor) -> bool:
    """Whether a tensor is large enough for images; a vector of integers is labels."""
    return values.dim() > 1 and not values.is_complex()


def _no_images(batch: Any) -> QatTricksError:
    return QatTricksError(
        f"a batch of type {type(batch).__name__} holds no images: yield a tensor, a tuple that "
        "begins with one, or a mapping that holds one"
    )


def as_tensors(inputs: Inputs) -> tuple[Tensor, ...]:
    """The inputs as a tuple, also where there is only one."""
    return (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)


def call_network(network: Callable[..., Any], inputs: Inputs) -> Any:
    """The output of ``network`` for ``inputs``.

    Raises:
        QatTricksError: the images are integers, and the network takes floats.
    """
    if not isinstance(inputs, Tensor) or inputs.is_floating_point():
        tensors = as_tensors(inputs)
        named = _keyword_only(network)[: len(tensors)]
        positional = tensors[: len(tensors) - len(named)]
        return network(*positional, **dict(zip(named, tensors[len(positional) :], strict=True)))
    try:
        return network(inputs)
    except RuntimeError as error:
        raise QatTricksError(
            f"the network does not take images of {inputs.dtype} ({one_line(error)}): give it what "
            "it was trained on, such as images.float() / 255"
        ) from error


def _keyword_only(network: Callable[..., Any]) -> list[str]:
    """The inputs that a network takes by their names only, which come last."""
    if not isinstance(network, nn.Module):
        return []
    parameters = inspect.signature(network.forward).parameters.values()
    return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]


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


def split(inputs: Inputs, size: int) -> list[Inputs]:
    """Batches of ``size`` images; a rest of fewer is left out."""
    starts = range(0, batch_size(inputs) - size + 1, size)
    return [
        map_tensors(inputs, lambda values, start=start: values[start : start + size])  # type: ignore[misc]
        for start in starts
    ]


def first_of_all(batches: Sequence[Inputs], count: int) -> list[Inputs]:
    """Batches with the first ``count`` images of all."""
    first = []
    for batch in batches:
        if count <= 0:
            break
        first.append(first_images(batch, count))
        count -= batch_size(batch)
    return first


def without_first(batches: Sequence[Inputs], count: int) -> list[Inputs]:
    """The batches without the first ``count`` images of all."""
    left = []
    for batch in batches:
        dropped = min(count, batch_size(batch))
        count -= dropped
        if dropped < batch_size(batch):
            left.append(map_tensors(batch, lambda values, first=dropped: values[first:]))  # type: ignore[misc]
    return left


def are_constant(batches: Sequence[Inputs]) -> bool:
    """Whether all values of the floating inputs in ``batches`` are the same."""
    floats = [
        values
        for batch in batches
        for values in as_tensors(batch)
        if values.is_floating_point() and values.numel() > 0
    ]
    return len(floats) > 0 and all(
        bool((values == floats[0].flatten()[0]).all()) for values in floats
    )


def are_finite(inputs: Inputs) -> bool:
    """Whether no value is NaN or infinite."""
    return all(bool(torch.isfinite(values).all()) for values in as_tensors(inputs))


def check_batches(batches: Sequence[Inputs], purpose: str) -> None:
    """Raises QatTricksError if there is no batch for a purpose, such as "to calibrate on"."""
    if not batches:
        raise QatTricksError(
            f"there are no images {purpose}: give a loader that yields at least one batch"
        )


class Replayed:
    """Batches that can be gone through again and again, also where their source cannot.

    What a one-shot iterator has yielded is kept, and it is asked for no more than is needed. Other
    loaders are asked anew each time, so that one that shuffles goes on shuffling.

    Args:
        loader: yields batches: a ``DataLoader``, a list, a generator, or any other iterable.

    Raises:
        QatTricksError: it is something else.
    """

    def __init__(self, loader: Iterable[Any]) -> None:
        check_loader(loader)
        self._loader = loader
        self._rest = loader if isinstance(loader, Iterator) else None
        self._seen: list[Any] = []
        self._has_yielded = False

    def __iter__(self) -> Iterator[Any]:
        """Begins with the first batch; raises QatTricksError if a loader is used up."""
        yield from self._again() if self._rest is None else self._remembered(self._rest)

    def _remembered(self, rest: Iterator[Any]) -> Iterator[Any]:
        place = 0
        while True:
            # Another pass may have gone further meanwhile.
            if place == len(self._seen):
                try:
                    self._seen.append(next(rest))
                except StopIteration:
                    return
            yield self._seen[place]
            place += 1

    def _again(self) -> Iterator[Any]:
        is_empty = True
        for batch in self._loader:
            is_empty, self._has_yielded = False, True
            yield batch
        # Its dataset goes through a generator, for example.
        if is_empty and self._has_yielded:
            raise QatTricksError(
                "the loader yields its batches only once, and a recipe goes through them several "
                "times: give a list of them, list(loader)"
            )


def is_loader(value: Any) -> bool:
    """Whether an element of a list is a loader; else it is a batch."""
    return not isinstance(value, (list, tuple, Mapping, Tensor))


def check_loader(loader: Any) -> None:
    """Raises QatTricksError for what yields no batches."""
    if isinstance(loader, Tensor):
        raise QatTricksError(
            f"the loader is a tensor of shape {tuple(loader.shape)}, whose images would count as "
            "batches: give a list of batches, [images]"
        )
    if isinstance(loader, Dataset) and not isinstance(loader, IterableDataset):
        raise QatTricksError(
            f"the loader is a data set, {type(loader).__name__}, whose items would count as "
            "batches: give DataLoader(dataset, batch_size=32), or batch_size=None where its items "
            "are batches"
        )
    # What has ``__getitem__`` alone can be gone through as well.
    if isinstance(loader, Iterable) or hasattr(type(loader), "__getitem__"):
        return
    if callable(loader):
        name = getattr(loader, "__name__", type(loader).__name__)
        raise QatTricksError(
            f"the loader is a function: give what it returns, {name}(), or a list of batches"
        )
    raise QatTricksError(
        f"the loader is a {type(loader).__name__}, which yields no batches: give a DataLoader, a "
        "list of batches, or an iterator of them"
    )
