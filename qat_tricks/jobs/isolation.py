"""Keeps one job's settings of the process away from the next one's."""

import gc
import os
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def isolated() -> Iterator[None]:
    """Restores, after the block, the settings of the process that a job may have changed.

    They are torch's threads, default type, determinism, matmul precision and gradient mode, the
    random states and the environment variables. Open matplotlib figures are closed.
    """
    environment = dict(os.environ)
    threads, dtype, grad = (
        torch.get_num_threads(),
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
    )
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    precision = torch.get_float32_matmul_precision()
    cudnn = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        # in place: os.environ passes each change on to the process
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(grad)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = cudnn
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if "matplotlib.pyplot" in sys.modules:  # slow to load: only where a job did
            sys.modules["matplotlib.pyplot"].close("all")


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Lets torch compute with so many threads in the block, and after it with as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def free_memory() -> None:
    """Frees the memory of a job that has ended, reference cycles among it."""
    # A trainer and its callbacks refer to each other.
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
