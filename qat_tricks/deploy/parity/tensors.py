"""Parity tensor by tensor: shows where the running network begins to differ from the simulated."""

from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, numpy_helper
from torch import Tensor, fx

from qat_tricks.deploy.onnx_graph import load_model
from qat_tricks.deploy.passes import QUANTIZED
from qat_tricks.deploy.runtimes.network import feed
from qat_tricks.deploy.runtimes.session import input_specs, open_session, run_session
from qat_tricks.errors import QatTricksError
from qat_tricks.graph.inputs import Inputs, as_tensors
from qat_tricks.graph.submodules import module_of
from qat_tricks.graph.two_modes import EvaluationInterpreter
from qat_tricks.numerics import ActivationQuantizer
from qat_tricks.numerics.decibels import decibels


@dataclass(frozen=True, kw_only=True)
class TensorParity:
    """A quantized tensor of ONNX Runtime against the simulated one."""

    name: str  # of the node in the traced network that computes it
    place: int  # among the quantized tensors, in the order in which they are computed
    sqnr_db: float  # power of the simulated values over that of the difference, in dB, at most 200
    differing: float  # share of its integers that differ, 0..1

    def as_dict(self) -> dict[str, Any]:
        """The row as ``report.json`` holds it."""
        return asdict(self)


@torch.no_grad()
def measure_tensor_parity(
    path: str | PathLike[str], network: fx.GraphModule, inputs: Inputs
) -> list[TensorParity]:
    """Compares every quantized tensor of the ONNX file with the simulation.

    ONNX Runtime runs the graph that it optimizes, its integer kernels included. A gap begins at the
    tensor with the smallest ``place`` among those that differ; the tensors after it carry it on.

    Args:
        path: the file that ``export_onnx`` wrote of ``network``.
        network: the quantized network, on the CPU and in evaluation mode.
        inputs: of the network: images ``[N, C, H, W]``, or a tuple with a tensor for each input.

    Returns:
        A row for each tensor, the worst first, equal ones in the order in which they are computed.

    Raises:
        QatTricksError: the file has none of the network's quantized tensors.
    """
    simulated = _Recorder(network)
    simulated.run(*as_tensors(inputs))
    grids, run = _run(path, inputs)
    rows = []
    for place, (name, (values, quantizer)) in enumerate(simulated.quantized.items()):
        if name + QUANTIZED not in run:
            continue  # merged with another tensor on the same grid
        scale, zero_point = grids[name + QUANTIZED]
        # In float32, because unsigned integers minus a zero point would wrap.
        integers = torch.from_numpy(run[name + QUANTIZED].astype(np.float32)) - zero_point
        expected = torch.round(values / quantizer.current_scale())
        difference = (integers * scale - values).double()
        rows.append(
            TensorParity(
                name=name,
                place=place,
                sqnr_db=decibels(
                    float(values.double().square().sum()), float(difference.square().sum())
                ),
                differing=float((integers != expected).double().mean()),
            )
        )
    if not rows:
        raise QatTricksError(
            f'"{path}" has no quantized tensor of this network: give the file that was exported of '
            "it"
        )
    return sorted(rows, key=lambda row: (row.sqnr_db, row.place))


class _Recorder(EvaluationInterpreter):
    """Records the values of each call of a quantizer, by the name of the quantized node."""

    def __init__(self, network: fx.GraphModule) -> None:
        super().__init__(network)
        self.quantized: dict[str, tuple[Tensor, ActivationQuantizer]] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        module = module_of(n, self.module)  # type: ignore[arg-type]
        if isinstance(module, ActivationQuantizer) and module.enabled:
            # the next operation may work in place
            self.quantized[n.all_input_nodes[0].name] = (result.clone(), module)
        return result


def _run(
    path: str | PathLike[str], inputs: Inputs
) -> tuple[dict[str, tuple[float, int]], dict[str, np.ndarray]]:
    """Runs the file with its quantized tensors as outputs.

    Returns:
        Scale and zero point, and the integers, of each tensor that bears the name of a node of the
        simulated network.
    """
    model = load_model(path)
    values = {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in model.graph.initializer
        if tensor.dims in ([], [1])
    }
    # A Clip either bounds a tensor of fewer bits or, with a name of its own, is a hardsigmoid.
    clipped, read = {}, {}
    for node in model.graph.node:
        if node.op_type == "Clip" and not node.output[0].endswith(QUANTIZED):
            clipped[node.input[0]] = node.output[0]
        if node.op_type == "DequantizeLinear":
            read[node.input[0]] = node.input[1:3]
    grids, shown = {}, []
    for node in model.graph.node:
        name = node.output[0]
        if node.op_type in ("QuantizeLinear", "Clip") and name.endswith(QUANTIZED):
            # the simulated integers are clamped
            shown.append(clipped.get(name, name))
            # A hardsigmoid of fewer bits is read behind the Clip that bounds it.
            grid = node.input[1:3] if node.op_type == "QuantizeLinear" else read[shown[-1]]
            scale, zero_point = (values[value] for value in grid)
            grids[name] = (float(scale), int(zero_point))
            kind = TensorProto.INT8 if zero_point.dtype == np.int8 else TensorProto.UINT8
            model.graph.output.append(onnx.helper.make_tensor_value_info(shown[-1], kind, None))
    with TemporaryDirectory() as folder:
        probe = Path(folder) / "probe.onnx"
        onnx.save(model, str(probe))
        session = open_session(probe, threads=torch.get_num_threads())
        batch = feed(input_specs(session), [values.numpy() for values in as_tensors(inputs)])
        run = run_session(session, shown, batch) if grids else []
    return grids, dict(zip(grids, run, strict=True))
