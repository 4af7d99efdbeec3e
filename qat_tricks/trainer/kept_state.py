"""Puts back what a user's code has changed in a module: tensors and plain attributes."""

import copy
import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_CONTAINERS = (list, dict, set, deque, defaultdict, OrderedDict, Counter)
# Attributes of a module that are not its state: torch's own, and those that are kept elsewhere.
_NO_STATE = {"_parameters", "_buffers", "_modules", "training"}


@contextmanager
def kept_state(pl_module: nn.Module, idle: nn.Module | None) -> Iterator[None]:
    """Restores the state of every module of ``pl_module`` outside of ``idle``.

    That is parameters, buffers and attributes, so also the counts of metrics.
    """
    inside: set[nn.Module] = set() if idle is None else set(idle.modules())
    restores = [_restore_of(m) for m in pl_module.modules() if m not in inside]
    try:
        yield
    finally:
        for restore in restores:
            restore()


def _restore_of(module: nn.Module) -> Callable[[], None]:
    """Remembers the state of one module, and returns what restores it."""
    attributes = {key: value for key, value in vars(module).items() if key not in _NO_STATE}
    tables = {key: dict(vars(module)[key]) for key in ("_parameters", "_buffers")}
    contents = [
        _restore_of_value(value)
        for values in (attributes, *tables.values())
        for value in values.values()
    ]

    def restore() -> None:
        for key in vars(module).keys() - attributes.keys() - _NO_STATE:
            del vars(module)[key]
        vars(module).update(attributes)
        for key, table in tables.items():
            vars(module)[key].clear()
            vars(module)[key].update(table)
        for put_back in contents:
            put_back()

    return restore


def _restore_of_value(value: Any, depth: int = 3) -> Callable[[], None]:
    """Remembers what is in a tensor or plain container, and returns what puts it back in place.

    In place, for others may hold the same object.
    """
    if isinstance(value, Tensor):
        # A tensor of inference mode cannot be changed here, by anyone.
        unknown = nn.parameter.is_lazy(value) or value.is_meta
        if unknown or value.is_inference() or value.layout is not torch.strided:
            return _do_nothing
        kept = value.detach().clone()

        def put_back() -> None:
            if not torch.equal(value, kept):
                value.data.copy_(kept)  # autograd is not to take it for a change

        return put_back
    if isinstance(value, np.ndarray):
        numbers = value.copy()
        return partial(np.copyto, value, numbers) if value.flags.writeable else _do_nothing
    if isinstance(value, torch.Generator):
        generator_state: Any = partial(value.set_state, value.get_state())
        return generator_state
    if isinstance(value, random.Random):
        return partial(value.setstate, value.getstate())
    if isinstance(value, np.random.Generator):
        return partial(setattr, value.bit_generator, "state", value.bit_generator.state)
    if type(value) in _CONTAINERS and depth > 0:
        return _refill(value, depth)
    return _do_nothing


def _refill(value: Any, depth: int) -> Callable[[], None]:
    content = copy.copy(value)
    inner = [
        _restore_of_value(held, depth - 1)
        for held in (value.values() if isinstance(value, dict) else value)
    ]

    def refill() -> None:
        value.clear()
        value.extend(content) if isinstance(value, (list, deque)) else value.update(content)
        for put_back in inner:
            put_back()

    return refill


def _do_nothing() -> None:
    """Puts nothing back."""
