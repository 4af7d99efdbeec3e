"""Peak memory of a process that does nothing but run one ONNX file."""

import json
import subprocess
import sys
from os import PathLike
from pathlib import Path

from qat_tricks.deploy.runtimes.network import Shapes, batch_shapes
from qat_tricks.deploy.runtimes.session import input_specs, open_session, session_config
from qat_tricks.errors import QatTricksError

_PROBE = Path(__file__).with_name("memory_probe.py")
_TIMEOUT_SECONDS = 300


def peak_memory_mib(
    path: str | PathLike[str],
    *,
    image_shape: Shapes,
    batch_size: int = 1,
    threads: int,
    runs: int = 3,
) -> float:
    """Measures the peak resident memory of a fresh interpreter that opens and runs a network.

    The figure includes the interpreter, numpy and ONNX Runtime themselves, some 50 MiB.

    Args:
        path: the ONNX file.
        image_shape: (channels, height, width); of a network with several inputs one shape for each.
        batch_size: images in a run.
        threads: threads within an operator.
        runs: the number of times that the network runs.

    Returns:
        Peak memory in MiB.

    Raises:
        QatTricksError: the file does not open, the images do not fit, or the process fails.
    """
    # a file or shape that does not fit is refused here, with an error of ours
    specs = input_specs(open_session(path, threads=threads))
    shapes = batch_shapes(specs, image_shape, batch_size)
    job = {
        "path": str(path),
        "inputs": {
            spec.name: [shape, spec.dtype.name] for spec, shape in zip(specs, shapes, strict=True)
        },
        "threads": threads,
        "config": session_config(),
        "runs": runs,
    }
    # -P keeps this folder off the probe's import path, where its files would shadow packages
    command = [sys.executable, "-P", str(_PROBE), json.dumps(job)]
    try:
        # A process of its own: a peak is of a process, and this one has loaded torch.
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=True
        )
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or [f"exit status {error.returncode}"])[-1]
        raise QatTricksError(
            f'the memory of "{path}" could not be measured, its process failed: {last}'
        ) from error
    except subprocess.TimeoutExpired as error:
        raise QatTricksError(
            f'the memory of "{path}" could not be measured in {_TIMEOUT_SECONDS} s: try a smaller '
            "batch"
        ) from error
    return int(done.stdout) / 2**20
