"""Brevitas's flow for ImageNet classifiers, as its own example runs it.

Graph equalization, quantizers by ``fx``, percentile ranges, GPTQ or learned rounding, bias
correction; the settings are the example's defaults but for weights per channel with ranges of least
squared error and asymmetric activations, with which its own tables are best, and with GPTQ and
learned rounding also ranges of least squared error of 4-bit activations. Learned rounding needs
``accelerate``, the export ``onnxoptimizer``. ONNX Runtime runs what it exports: 4-bit integers are
8-bit ones there that a ``Clip`` keeps within 4.
"""

from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from brevitas.core.bit_width import BitWidthConst
from brevitas.export import export_onnx_qcdq
from brevitas.graph.quantize import preprocess_for_quantize
from brevitas.graph.quantize import quantize as place_quantizers
from brevitas.inject import value
from brevitas.nn.quant_layer import QuantNonLinearActLayer as QuantNLAL
from brevitas.nn.quant_layer import QuantWeightBiasInputOutputLayer as QuantWBIOL
from brevitas_examples.common.learned_round.learned_round_trainer import (
    LearnedRoundTrainer,
    get_blocks,
)
from brevitas_examples.imagenet_classification.ptq.learned_round_utils import (
    CacheVision,
    is_layer,
    parse_args_to_dataclass,
    vision_block_forward,
    vision_forward,
)
from brevitas_examples.imagenet_classification.ptq.ptq_common import (
    apply_bias_correction,
    apply_gptq,
    calibrate,
    create_quant_maps,
)
from torch import Tensor, fx, nn

from methods import Bits

LAYERS = (nn.Conv2d, nn.Linear)
LEARNED_ROUND = Namespace(
    learned_round="hard_sigmoid",
    learned_round_loss="regularised_mse",
    learned_round_mode="layerwise",
    learned_round_iters=1000,
    learned_round_lr=1e-3,
    learned_round_lr_scheduler=None,
    learned_round_batch_size=8,
)


def quantize(
    net: nn.Module,
    batches: list[Tensor],
    bits: Bits,
    folder: Path,
    rounding: str | None = None,
) -> Path:
    """Quantizes; ``rounding`` is None, ``gptq`` or ``learned``."""
    loader = [(batch, None) for batch in batches]
    graph = preprocess_for_quantize(net, equalize_iters=20, equalize_merge_bias=True)
    quantized = _place(
        graph,
        bits,
        ranges="mse" if rounding and bits.activations < 8 else "stats",
    )
    with torch.no_grad():
        quantized(batches[0])  # some scales are made in the first pass
    calibrate(loader, quantized)
    if rounding == "gptq":
        apply_gptq(loader, quantized, act_order=True, create_weight_orig=True)
    elif rounding == "learned":
        _learn_rounding(quantized, loader)
    apply_bias_correction(loader, quantized)
    quantized.eval()
    path = folder / "model.onnx"
    export_onnx_qcdq(
        quantized,
        batches[0][:2],
        str(path),
        input_names=["images"],
        output_names=["logits"],
        dynamic_axes={"images": {0: "batch"}},
        dynamo=False,
    )
    return path


def _learn_rounding(quantized: fx.GraphModule, loader: list[tuple[Tensor, None]]) -> None:
    config = parse_args_to_dataclass(LEARNED_ROUND)
    config.training_args.use_amp = False  # half precision takes some 20 times as long on a CPU
    LearnedRoundTrainer(config=config).train(
        model=quantized,
        model_forward=vision_forward,
        block_forward=vision_block_forward,
        data_loader=loader,
        cache=CacheVision(),
        get_blocks_fn=partial(get_blocks, block_check_fn=is_layer),
        keep_gpu=True,
    )


def _place(graph: fx.GraphModule, bits: Bits, ranges: str) -> fx.GraphModule:
    """Puts Brevitas's quantizers into the graph; the first and the last layer get 8 bits.

    Args:
        graph: of the float network.
        bits: of the layers between.
        ranges: how the activations' are found: ``mse``, or ``stats``, a percentile.
    """
    layers = [m for m in graph.modules() if isinstance(m, LAYERS)]
    first_shape, last_shape = (layer.weight.shape for layer in (layers[0], layers[-1]))

    # Brevitas builds each quantizer by asking for its bits with the new layer in hand
    @value
    def weight_bits(module: nn.Module) -> int:
        return 8 if module.weight.shape in (first_shape, last_shape) else bits.weights

    settings: dict[str, Any] = {
        "dtype": torch.float32,
        "bias_bit_width": None,  # a quantized bias takes its scale from a QuantTensor
        "weight_bit_width": weight_bits,
        "weight_param_method": "mse",
        "weight_scale_type": "float_scale",
        "weight_quant_type": "sym",
        "weight_quant_granularity": "per_channel",
        "weight_narrow_range": False,
        "weight_quant_format": "int",
        "act_quant_format": "int",
        "act_scale_type": "float_scale",
        "act_scale_computation_type": "static",
        "act_param_method": ranges,
        "act_quant_type": "asym",
        "act_quant_granularity": "per_tensor",
        "act_quant_percentile": 99.999,
    }
    layer_map, _, act_map, identity_map = create_quant_maps(
        act_bit_width=bits.activations, **settings
    )
    # plain tensors between the layers: the CIFAR ResNets' shortcut cannot slice a QuantTensor
    for _, settings_of_activation in (*act_map.values(), *identity_map.values()):
        settings_of_activation["return_quant_tensor"] = False
    quantized = place_quantizers(
        graph,
        compute_layer_map=layer_map,
        quant_act_map=act_map,
        quant_identity_map=identity_map,
    )
    if bits.activations != 8:
        for node in _edge_activations(quantized):
            impl = quantized.get_submodule(node).act_quant.fused_activation_quant_proxy
            impl.tensor_quant.msb_clamp_bit_width_impl = BitWidthConst(8)
    return quantized


def _edge_activations(graph: fx.GraphModule) -> set[str]:
    """Names of the quantizers of the first and the last layer's inputs."""
    modules = dict(graph.named_modules())
    layers = [n for n in graph.graph.nodes if isinstance(modules.get(n.target), QuantWBIOL)]
    found = set()
    for node in (layers[0], layers[-1]):
        while not isinstance(modules.get(node.target), QuantNLAL):
            node = node.all_input_nodes[0]
        found.add(node.target)
    return found
