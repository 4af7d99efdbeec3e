"""Measures the costs of a float and an int8 file on this machine.

The costs are size, latency, memory, and the share of work done in integers.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qat_tricks.deploy.cost.coverage import integer_coverage
from qat_tricks.deploy.cost.latency import measure_latency, measure_load
from qat_tricks.deploy.cost.memory import peak_memory_mib
from qat_tricks.deploy.cost.profile import profile_file
from qat_tricks.deploy.cost.weights import (
    compressed_bytes,
    file_bytes,
    weight_size,
    weight_sparsity,
)
from qat_tricks.deploy.runtimes.network import Shapes
from qat_tricks.deploy.runtimes.registry import REFERENCE, open_network, runtime_version

NAMES = ("fp32", "int8")
"""The two files of a report; the first may be missing, and its figures are then None."""


def measure_device(
    paths: Mapping[str, Path],
    image_shape: Shapes,
    *,
    batch_size: int,
    threads: int,
    runs: int,
    max_seconds: float,
    profile: bool = False,
) -> dict[str, Any]:
    """Measures ``{"fp32": path, "int8": path}`` side by side in ONNX Runtime.

    Args:
        paths: ONNX files, by ``NAMES``.
        image_shape: channels, height, width; of networks with several inputs one shape for each.
        batch_size: images in a run, for latency and memory.
        threads: threads within an operator, for latency and memory.
        runs: most timed runs of a file.
        max_seconds: most seconds of timing, for all files together.
        profile: whether to name the operators that take longest.

    Returns:
        The keys of a report that are about costs.
    """
    # The same batch for latency and memory, so that the figures belong together.
    batch = {"image_shape": image_shape, "batch_size": batch_size, "threads": threads}
    profiles = {name: profile_file(path, **batch) for name, path in paths.items()}  # type: ignore[arg-type]
    dearest = _by_name({name: found.dearest() for name, found in profiles.items()})
    return {
        "conversions": _by_name({name: found.conversions() for name, found in profiles.items()}),
        **({"profile": dearest} if profile else {}),
        "size_bytes": _by_name({name: file_bytes(path) for name, path in paths.items()}),
        "compressed_bytes": _by_name(
            {name: compressed_bytes(path) for name, path in paths.items()}
        ),
        # Weights of fewer bits are stored in int8: this is their size if they were packed.
        "packed_bytes": weight_size(paths["int8"]).packed,
        **_times(paths, image_shape, batch_size, threads, runs, max_seconds, REFERENCE),
        "memory_mib": _by_name(
            {name: peak_memory_mib(path, **batch) for name, path in paths.items()}  # type: ignore[arg-type]
        ),
        "sparsity": weight_sparsity(paths["int8"]),
        "int8_coverage": integer_coverage(paths["int8"], image_shape).coverage,
        "batch_size": batch_size,
        "threads": threads,
    }


def measure_runtime(
    runtime: str,
    paths: Mapping[str, Path],
    image_shape: Shapes,
    *,
    batch_size: int,
    threads: int,
    runs: int,
    max_seconds: float,
) -> dict[str, Any]:
    """Measures ``{"fp32": path, "int8": path}`` side by side in one runtime.

    Args:
        runtime: its name.
        paths, image_shape, batch_size, threads, runs, max_seconds: as of ``measure_device``.

    Returns:
        ``version``, ``latency_ms``, ``load_ms`` and ``int8_layers``: the share of convs and linears
        that it runs in integers, or None if the runtime does not tell.
    """
    return {
        "version": runtime_version(runtime),
        **_times(paths, image_shape, batch_size, threads, runs, max_seconds, runtime),
        "int8_layers": open_network(paths["int8"], threads=1, runtime=runtime).integer_layers,
    }


def _times(
    paths: Mapping[str, Path],
    image_shape: Shapes,
    batch_size: int,
    threads: int,
    runs: int,
    max_seconds: float,
    runtime: str,
) -> dict[str, Any]:
    """``latency_ms`` and ``load_ms`` of the files, in milliseconds."""
    latency = measure_latency(
        paths,
        image_shape=image_shape,
        batch_size=batch_size,
        threads=threads,
        runtime=runtime,
        runs=runs,
        max_seconds=max_seconds,
    )
    # Apart from latency: an application opens a file once, and runs it often.
    load = measure_load(paths, threads=threads, runtime=runtime)
    return {"latency_ms": _by_name(latency), "load_ms": _by_name(load)}


def _by_name(figures: Mapping[str, Any]) -> dict[str, Any]:
    """The figures under both names, None where a file is missing."""
    return {name: figures.get(name) for name in NAMES}
