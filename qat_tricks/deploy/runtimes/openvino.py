"""OpenVINO on the CPU, running the same file as ONNX Runtime.

It fuses QuantizeLinear and DequantizeLinear into integer kernels of its own, and rounds a few
values to the neighbouring step. Everything else is set to stay float32: by default OpenVINO takes
bfloat16 where the processor has it, and then runs another network than the one that was measured.
"""

from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from qat_tricks.deploy.runtimes.network import InputSpec, Network, feed
from qat_tricks.errors import QatTricksError, one_line

_LAYERS = ("Convolution", "Deconvolution", "FullyConnected", "MatMul")
_INTEGERS = ("u8", "i8")


class OpenvinoNetwork(Network):
    """An ONNX file compiled for the CPU; ``integer_layers`` is read from the compiled graph.

    Args:
        path: of the file.
        threads: of one run.
        settings: properties of OpenVINO's CPU plugin, beside those that are set here.
    """

    def __init__(
        self,
        path: str | PathLike[str],
        *,
        threads: int,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        if not Path(path).is_file():
            raise QatTricksError(
                f'no ONNX file at "{path}": give the path of a model.onnx that an export wrote'
            )
        # For one run at a time; layers that are not quantized stay float32.
        properties = {
            **(settings or {}),
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "LATENCY",
        }
        import openvino  # an optional dependency

        try:
            compiled = openvino.Core().compile_model(str(path), "CPU", properties)
        except Exception as error:  # OpenVINO's exceptions share no narrower base class
            raise QatTricksError(
                f'OpenVINO cannot open "{path}" ({one_line(error)}): give a file that an export '
                "wrote"
            ) from error
        self.specs = tuple(map(_input_spec, compiled.inputs))
        self.integer_layers = _integer_layers(compiled)
        self._request = compiled.create_infer_request()
        self._lent: list[np.ndarray] = []

    def prepare(self, *inputs: np.ndarray) -> Callable[[], np.ndarray]:
        """Returns a function that runs the batch."""
        batch = list(feed(self.specs, inputs).values())

        def run() -> np.ndarray:
            logits = self._request.infer(batch, share_inputs=True)[0]
            self._lent = batch  # the request goes on pointing at them, and does not own them
            return logits

        return run


def _input_spec(port: Any) -> InputSpec:
    shape = tuple(None if size.is_dynamic else size.get_length() for size in port.partial_shape)
    return InputSpec(name=port.any_name, shape=shape, dtype=np.dtype(port.element_type.to_dtype()))


def _integer_layers(compiled: Any) -> float | None:
    """The share of convs and linears that run in integers; None where there are none."""
    # The compiled graph tells the precision in which each of its kernels runs.
    facts = [node.get_rt_info() for node in compiled.get_runtime_model().get_ops()]
    precisions = [
        str(fact["runtimePrecision"].value)
        for fact in facts
        if str(fact["layerType"].value) in _LAYERS
    ]
    return (
        sum(precision in _INTEGERS for precision in precisions) / len(precisions)
        if precisions
        else None
    )
