"""The runtimes that can run an ONNX file on this machine's CPU, all of them called in one way.

ONNX Runtime is the reference: where parity is proved. Others are optional, and are measured beside
it.
"""

from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from os import PathLike
from typing import Protocol

import numpy as np

from qat_tricks.deploy.runtimes.session import InputSpec, feed, input_specs, open_session
from qat_tricks.errors import QatTricksError, did_you_mean

REFERENCE = "onnxruntime"
RUNTIMES = (REFERENCE, "openvino")
"""Names of the runtimes, each that of its package."""


class Network(Protocol):
    """An ONNX file opened in a runtime."""

    specs: tuple[InputSpec, ...]  # of its inputs
    # share, 0..1, of convs and linears that run in integers; None: the runtime does not say
    integer_layers: float | None

    @property
    def spec(self) -> InputSpec:
        """The only input; raises QatTricksError if there are several."""
        if len(self.specs) > 1:
            names = ", ".join(spec.name for spec in self.specs)
            raise QatTricksError(
                f"the ONNX network's inputs are ({names}), allowed: one tensor of images"
            )
        return self.specs[0]

    def prepare(self, *inputs: np.ndarray) -> Callable[[], np.ndarray]:
        """Takes images ``[batch, channels, height, width]``, or whatever the network's inputs are,
        and returns what runs them to logits ``[batch, classes]``.

        Raises:
            QatTricksError: there are not so many inputs as the network takes, or of other shapes.
        """


class OnnxRuntimeNetwork(Network):
    """A session of ONNX Runtime."""

    integer_layers: float | None = None

    def __init__(self, path: str | PathLike[str], *, threads: int) -> None:
        self._session = open_session(path, threads=threads)
        self.specs = input_specs(self._session)

    def prepare(self, *inputs: np.ndarray) -> Callable[[], np.ndarray]:
        given = feed(self.specs, inputs)
        return lambda: self._session.run(None, given)[0]


def open_network(path: str | PathLike[str], *, threads: int, runtime: str = REFERENCE) -> Network:
    """Opens an ONNX file in ``runtime``, with so many threads within an operator.

    Raises:
        QatTricksError: a runtime that is unknown or not installed, or a file that it cannot run.
    """
    check_runtimes([runtime])
    if runtime == REFERENCE:
        return OnnxRuntimeNetwork(path, threads=threads)
    from qat_tricks.deploy.runtimes.openvino import OpenvinoNetwork

    return OpenvinoNetwork(path, threads=threads)


def installed_runtimes() -> list[str]:
    """The runtimes that can be had here, the reference first."""
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
    """The version of an installed runtime, whichever distribution (``onnxruntime``,
    ``onnxruntime-gpu``) it came from.
    """
    return str(import_module(name).__version__).partition("-")[0]
