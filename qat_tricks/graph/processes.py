"""What has to be the same in every process that trains a network."""

from typing import TypeVar

from torch import distributed

T = TypeVar("T")


def from_rank_zero(value: T) -> T:
    """The value that rank zero has, on every rank; it can be pickled.

    What is measured on each rank differs in its last bits, and a choice by it may so differ too.
    """
    if not has_others():
        return value
    told = [value]
    distributed.broadcast_object_list(told)
    return told[0]


def has_others() -> bool:
    """Whether this process is one of several that train together."""
    is_started = distributed.is_available() and distributed.is_initialized()
    return is_started and distributed.get_world_size() > 1
