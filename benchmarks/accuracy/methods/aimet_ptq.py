"""AIMET (``aimet-torch``): cross-layer equalization, SQNR ranges and, where asked for, AdaRound.

Weights per channel, the configuration ``default_config_per_channel.json``, the scheme
``tf_enhanced``, as its documentation advises. AdaRound's iterations are fewer than its default of
10,000 (15,000 below 8 bits), so that a network takes minutes on a CPU.
"""

import math
from pathlib import Path

import aimet_torch
import torch
from aimet_torch import onnx as aimet_onnx
from aimet_torch.adaround.adaround_weight import Adaround, AdaroundParameters
from aimet_torch.common.defs import QuantScheme
from aimet_torch.cross_layer_equalization import equalize_model
from aimet_torch.model_preparer import prepare_model
from aimet_torch.quantsim import QuantizationSimModel
from networks import edge_layers
from torch import Tensor, nn

from methods import Bits

CONFIG = (
    Path(aimet_torch.__file__).parent / "common/quantsim_config/default_config_per_channel.json"
)
SCHEME = QuantScheme.post_training_tf_enhanced


def quantize(
    net: nn.Module,
    batches: list[Tensor],
    bits: Bits,
    folder: Path,
    adaround: bool = False,
    iterations: int = 1000,
) -> Path:
    """Quantizes; ``iterations`` are AdaRound's for each layer."""
    example = batches[0][:2]
    net = prepare_model(net)
    equalize_model(net, dummy_input=example)  # folds the BatchNorms first
    edges = edge_layers(net)
    if adaround:
        net = Adaround.apply_adaround(
            net,
            example,
            AdaroundParameters(
                batches, min(len(batches), math.ceil(2000 / len(batches[0]))), iterations
            ),
            path=str(folder),
            filename_prefix="adaround",
            default_param_bw=bits.weights,
            param_bw_override_list=[(net.get_submodule(name), 8) for name in edges],
            default_quant_scheme=SCHEME,
            default_config_file=str(CONFIG),
        )
    sim = QuantizationSimModel(
        net,
        dummy_input=example,
        quant_scheme=SCHEME,
        default_param_bw=bits.weights,
        default_output_bw=bits.activations,
        config_file=str(CONFIG),
    )
    _edges_at_8_bits(sim, edges)
    if adaround:
        sim.set_and_freeze_param_encodings(str(folder / "adaround.encodings"))
    with torch.no_grad():
        sim.compute_encodings(lambda model: [model(batch) for batch in batches])
    path = folder / "model.onnx"
    aimet_onnx.export(
        sim,
        (example,),
        str(path),
        input_names=["images"],
        output_names=["logits"],
        dynamic_axes={"images": {0: "batch"}},
        opset_version=13 if bits == (8, 8) else 21,
        dynamo=False,
    )
    return path


def _edges_at_8_bits(sim: QuantizationSimModel, edges: tuple[str, str]) -> None:
    """The weights of the first and the last layer, and what they take in."""
    for name in edges:
        sim.model.get_submodule(name).param_quantizers["weight"].bitwidth = 8
    sim.model.get_submodule(edges[0]).input_quantizers[0].bitwidth = 8
    node = next(node for node in sim.model.graph.nodes if node.target == edges[1])
    quantizers: list = []
    # back to the quantizer whose values the last layer takes in
    while not any(quantizers):
        node = node.all_input_nodes[0]
        if node.op == "call_module":
            quantizers = list(sim.model.get_submodule(node.target).output_quantizers)
    quantizers[0].bitwidth = 8
