"""What two ONNX files cost on this machine: size, latency, memory, and how much of the work is done
in integers.
"""

from pathlib import Path
from typing import Any

from qat_tricks.deploy.cost.coverage import integer_coverage
from qat_tricks.deploy.cost.latency import measure_latency, measure_load
from qat_tricks.deploy.cost.memory import peak_memory_mib
from qat_tricks.deploy.cost.weights import file_bytes, weight_size, weight_sparsity
from qat_tricks.deploy.runtimes.session import Shapes


def measure_device(
    paths: dict[str, Path],
    image_shape: Shapes,
    *,
    batch_size: int,
    threads: int,
    runs: int,
    max_seconds: float,
) -> dict[str, Any]:
    """Measures ``{"fp32": path, "int8": path}`` side by side and returns the keys of a report that
    are about costs.

    Args:
        paths: ONNX files; ``fp32`` may be missing, its figures are then None.
        image_shape: channels, height, width; of networks with several inputs one shape for each.
        batch_size, threads: of latency and memory.
        runs, max_seconds: at most so many timed runs, or so many seconds, a file.
    """
    settings: dict[str, Any] = {
        "image_shape": image_shape,
        "batch_size": batch_size,
        "threads": threads,
    }
    latency = measure_latency(paths, **settings, runs=runs, max_seconds=max_seconds)
    load = measure_load(paths, threads=threads)
    both = ("fp32", "int8")
    return {
        "size_bytes": {name: file_bytes(paths[name]) if name in paths else None for name in both},
        "packed_bytes": weight_size(paths["int8"]).packed,
        "latency_ms": {name: latency.get(name) for name in both},
        "load_ms": {name: load.get(name) for name in both},
        "memory_mib": {
            name: peak_memory_mib(paths[name], **settings) if name in paths else None
            for name in both
        },
        "sparsity": weight_sparsity(paths["int8"]),
        "int8_coverage": integer_coverage(paths["int8"], image_shape).coverage,
        "batch_size": batch_size,
        "threads": threads,
    }
