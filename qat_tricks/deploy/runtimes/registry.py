"""The runtimes that can run an ONNX file on this machine's CPU, all called in one way.

ONNX Runtime is the reference, in which parity is proved. Others are optional; they are measured
beside it.
"""

from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from os import PathLike

import numpy as np

from qat_tricks.deploy.runtimes.network import Network, feed
from qat_tricks.deploy.runtimes.openvino import OpenvinoNetwork
from qat_tricks.deploy.runtimes.session import input_specs, open_session, run_session
from qat_tricks.errors import QatTricksError, did_you_mean

REFERENCE = "onnxruntime"
RUNTIMES = (REFERENCE, "openvino")
"""Names of the runtimes, each that of its package."""


class OnnxRuntimeNetwork(Network):
    """A session of ONNX Runtime."""

    integer_layers: float | None = None  # a session does not say

    def __init__(self, path: str | PathLike[str], *, threads: int) -> None:
        self._session = open_session(path, threads=threads)
        self.specs = input_specs(self._session)

    def prepare(self, *inputs: np.ndarray) -> Callable[[], np.ndarray]:
        """Returns a function that runs the batch."""
        batch = feed(self.specs, inputs)
        return lambda: run_session(self._session, None, batch)[0]


def open_network(path: str | PathLike[str], *, threads: int, runtime: str = REFERENCE) -> Network:
    """Opens an ONNX file in a runtime.

    Args:
        path: the ONNX file.
        threads: threads within an operator.
        runtime: one of ``RUNTIMES``.

    Raises:
        QatTricksError: a runtime that is unknown or not installed, or a file that it cannot run.
    """
    check_runtimes([runtime])
    if runtime == REFERENCE:
        return OnnxRuntimeNetwork(path, threads=threads)
    return OpenvinoNetwork(path, threads=threads)


def installed_runtimes() -> list[str]:
    """The runtimes that are installed, the reference first."""
    return [name for name in RUNTIMES if find_spec(name) is not None]


def check_runtimes(names: Sequence[str]) -> None:
    """Refuses names of runtimes that are unknown or not installed (QatTricksError)."""
    for name in names:
        if name not in RUNTIMES:
            raise QatTricksError(f'unknown runtime "{name}": {did_you_mean(name, RUNTIMES)}')
        if find_spec(name) is None:
            raise QatTricksError(
                f'the runtime "{name}" is not installed: pip install "qat_tricks[{name}]"'
            )


def runtime_version(name: str) -> str:
    """The version of an installed runtime.

    It is read from the package: distributions differ (``onnxruntime``, ``onnxruntime-gpu``).
    """
    # OpenVINO appends the build behind a hyphen.
    return str(import_module(name).__version__).partition("-")[0]
