"""Latency of ONNX files on this machine, measured side by side."""

import time
from collections.abc import Mapping, Sequence
from os import PathLike

import numpy as np

from qat_tricks.deploy.session import input_spec, open_session, random_images
from qat_tricks.errors import QatTricksError

MIN_RUNS = 5
"""Timed runs that each network gets even when time is up; fewer say nothing about a 95th percentile."""


def measure_latency(
    paths: Mapping[str, str | PathLike[str]],
    *,
    image_shape: Sequence[int],
    batch_size: int = 1,
    threads: int,
    warmup: int = 10,
    runs: int = 200,
    max_seconds: float = 20.0,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Times the networks run by run in turn, so that a slow moment of the machine slows all of them alike.

    Args:
        paths: the ONNX files, by the name to report.
        image_shape: (channels, height, width).
        batch_size: images in a run.
        threads: threads within an operator.
        warmup: runs of each network that are not timed.
        runs: timed runs of each network.
        max_seconds: stops sooner after this time, spent on all networks together, warm-up included.
        seed: of the random images.

    Returns:
        For each name its ``p50`` and ``p95`` in milliseconds a batch.

    Raises:
        QatTricksError: no paths, fewer runs than ``MIN_RUNS``, a file that does not open, or images that do
            not fit.
    """
    if not paths:
        raise QatTricksError("no ONNX file given to time: name at least one")
    if runs < MIN_RUNS:
        raise QatTricksError(f"runs is {runs}, allowed: {MIN_RUNS} or more")
    calls = {}
    for name, path in paths.items():
        session = open_session(path, threads=threads)
        images = random_images(session, image_shape, batch_size, seed)
        calls[name] = (session, {input_spec(session).name: images})
    milliseconds: dict[str, list[float]] = {name: [] for name in paths}
    start = time.perf_counter()
    for index in range(-warmup, runs):
        late = time.perf_counter() - start > max_seconds
        if late and index < 0:
            continue
        if late and index >= MIN_RUNS:
            break
        for name, (session, feed) in calls.items():
            begin = time.perf_counter()
            session.run(None, feed)
            if index >= 0:
                milliseconds[name].append((time.perf_counter() - begin) * 1e3)
    return {
        name: {"p50": float(np.percentile(times, 50)), "p95": float(np.percentile(times, 95))}
        for name, times in milliseconds.items()
    }
