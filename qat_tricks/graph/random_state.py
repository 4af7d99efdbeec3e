"""The random generators' states as plain data, which ``weights_only=True`` can load."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """The states of the generators of Python, NumPy and torch (CPU, and the GPU in use)."""
    # NumPy gives its keys as an array, which ``weights_only`` would refuse.
    kind, keys, *rest = np.random.get_state()
    # Asking for the state would start a GPU that nothing uses.
    on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
    return {
        "python": random.getstate(),
        "numpy": (kind, [int(key) for key in keys], *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if on_gpu else None,
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Puts every generator into the state that ``random_state`` returned."""
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    # The run may go on without the GPU that it began on.
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@contextmanager
def kept_random_state() -> Iterator[None]:
    """Puts every generator back, after the block, into the state from before it."""
    state = random_state()
    try:
        yield
    finally:
        restore_random_state(state)


def has_moved(state: dict[str, Any]) -> bool:
    """Whether anything drew random numbers on the CPU since ``random_state`` returned ``state``."""
    now = random_state()
    same = now["python"] == state["python"] and now["numpy"] == state["numpy"]
    return not (same and torch.equal(now["torch"], state["torch"]))


def seed_all(seed: int) -> None:
    """Puts every generator into the state that ``seed`` stands for."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
