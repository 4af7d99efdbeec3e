"""Measures the time that ONNX files take to run and to open on this machine, side by side."""

import time
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import numpy as np

from qat_tricks.deploy.runtimes.network import Network, Shapes, random_batch
from qat_tricks.deploy.runtimes.registry import REFERENCE, open_network
from qat_tricks.errors import QatTricksError

MIN_RUNS = 5
"""Timed runs that each network gets even when time is up; of fewer, a 95th percentile says nothing.
"""

QUANTILES, QUANTILE_COUNT = "quantiles", 21

Paths = Mapping[str, str | PathLike[str]]


def measure_latency(
    paths: Paths,
    *,
    image_shape: Shapes,
    batch_size: int = 1,
    threads: int,
    runtime: str = REFERENCE,
    warmup: int = 10,
    runs: int = 200,
    max_seconds: float = 20.0,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Times the networks run by run in turn, so that a slow moment of the machine slows them all.

    Args:
        paths: the ONNX files, by the name to report.
        image_shape: (channels, height, width); of networks with several inputs one shape for each.
        batch_size: images in a run.
        threads: threads within an operator.
        runtime: name of the runtime that runs them.
        warmup: runs of each network that are not timed.
        runs: timed runs of each network.
        max_seconds: the timing ends after this time, spent on all networks together, warm-up
            included.
        seed: of the random inputs.

    Returns:
        For each name its ``p50``, ``p95`` and ``p99`` in milliseconds a batch, and ``QUANTILES``:
        21 of them, from the shortest run to the longest.

    Raises:
        QatTricksError: no paths, fewer runs than ``MIN_RUNS``, a file that does not open, or images
            that do not fit.
    """
    if runs < MIN_RUNS:
        raise QatTricksError(f"runs is {runs}, allowed: {MIN_RUNS} or more")
    networks = _open(paths, threads, runtime)
    times = time_in_turn(networks, image_shape, batch_size, warmup, runs, max_seconds, seed)
    return {
        name: {
            **{f"p{percent}": float(np.percentile(spent, percent)) for percent in (50, 95, 99)},
            QUANTILES: np.percentile(spent, np.linspace(0, 100, QUANTILE_COUNT)).tolist(),
        }
        for name, spent in times.items()
    }


def measure_throughput(
    paths: Paths,
    *,
    image_shape: Shapes,
    batch_sizes: Sequence[int],
    thread_counts: Sequence[int],
    runtime: str = REFERENCE,
    warmup: int = 2,
    seconds: float = 0.3,
    seed: int = 0,
) -> list[dict[str, float]]:
    """Measures the images a second of the networks, at each number of threads and batch size.

    Args:
        paths, image_shape, runtime, warmup, seed: as of ``measure_latency``.
        batch_sizes, thread_counts: the values to combine.
        seconds: for each combination, spent on all networks together; each network gets
            ``MIN_RUNS`` in any case.

    Returns:
        A row for each combination: ``batch_size``, ``threads``, and images a second by the
        networks' names.

    Raises:
        QatTricksError: as ``measure_latency``.
    """
    rows: list[dict[str, float]] = []
    for threads in thread_counts:
        networks = _open(paths, threads, runtime)
        for batch_size in batch_sizes:
            # The time is the limit here, and not the number of runs.
            times = time_in_turn(networks, image_shape, batch_size, warmup, 10**6, seconds, seed)
            rates = {
                name: 1e3 * batch_size * len(spent) / sum(spent) for name, spent in times.items()
            }
            rows.append({"batch_size": batch_size, "threads": threads, **rates})
    return rows


def measure_load(
    paths: Paths, *, threads: int, runtime: str = REFERENCE, runs: int = 5
) -> dict[str, float]:
    """Measures the time that networks take to open, optimization of the graph included.

    Args:
        paths, threads, runtime: as of ``measure_latency``.
        runs: times that each network is opened.

    Returns:
        For each name the median time in milliseconds; the file is in the system's cache.

    Raises:
        QatTricksError: no paths, or a file that does not open.
    """
    _open(paths, threads, runtime)  # reads the files into the system's cache
    milliseconds: dict[str, list[float]] = {name: [] for name in paths}
    for _ in range(runs):
        for name, path in paths.items():
            begin = time.perf_counter()
            open_network(path, threads=threads, runtime=runtime)
            milliseconds[name].append((time.perf_counter() - begin) * 1e3)
    return {name: float(np.median(times)) for name, times in milliseconds.items()}


def _open(paths: Paths, threads: int, runtime: str) -> dict[str, Network]:
    if not paths:
        raise QatTricksError("no ONNX file given to time: name at least one")
    return {
        name: open_network(path, threads=threads, runtime=runtime) for name, path in paths.items()
    }


def time_in_turn(
    networks: Mapping[str, Network],
    image_shape: Shapes,
    batch_size: int,
    warmup: int,
    runs: int,
    max_seconds: float,
    seed: int,
) -> dict[str, list[float]]:
    """Milliseconds of each timed run, by the networks' names."""
    # Inputs are made beforehand, so that only runs are timed.
    calls = {
        name: network.prepare(*random_batch(network.specs, image_shape, batch_size, seed))
        for name, network in networks.items()
    }
    milliseconds: dict[str, list[float]] = {name: [] for name in networks}
    start = time.perf_counter()
    for index in range(-warmup, runs):  # negative ones warm up
        # On a slow machine, warm-up may take the whole time: then only the fewest runs are left.
        late = time.perf_counter() - start > max_seconds
        if late and index < 0:
            continue
        if late and index >= MIN_RUNS:
            break
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            if index >= 0:
                milliseconds[name].append((time.perf_counter() - begin) * 1e3)
    return milliseconds
