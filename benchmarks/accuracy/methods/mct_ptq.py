"""Sony's Model Compression Toolkit: post-training quantization, and its gradient-based GPTQ.

The target is its default, IMX500 (weights symmetric per channel, 8-bit activations with
power-of-two thresholds), with other bits of the weights. It is judged by its own simulated network.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import model_compression_toolkit as mct
from model_compression_toolkit.core.common.network_editors import NodeNameFilter
from model_compression_toolkit.target_platform_capabilities.constants import (
    KERNEL_ATTR,
    WEIGHTS_N_BITS,
)
from model_compression_toolkit.target_platform_capabilities.tpc_models.imx500_tpc.v1_0 import tpc
from networks import edge_layers
from torch import Tensor, nn

from methods import Bits, CannotError


def quantize(
    net: nn.Module,
    batches: list[Tensor],
    bits: Bits,
    folder: Path,
    gradient: bool = False,
    epochs: int = 5,
) -> Callable[[Tensor], Tensor]:
    """Quantizes; with ``gradient`` its GPTQ trains the rounding for ``epochs``."""

    def images() -> Iterator[list]:
        for batch in batches:
            yield [batch.numpy()]

    if bits.activations != 8:
        raise CannotError("Model Compression Toolkit's targets have no 4-bit activations")
    core = mct.core.CoreConfig()
    if bits.weights != 8:
        for name in edge_layers(net):
            plain = name.replace(".", "_")
            # its name once a BatchNorm has been folded into it
            node = NodeNameFilter(plain) | NodeNameFilter(f"{plain}_bn")
            core.bit_width_config.set_manual_weights_bit_width(node, 8, "weight")
    arguments = {"core_config": core, "target_platform_capabilities": _target(bits)}
    if gradient:
        quantized, _ = mct.gptq.pytorch_gradient_post_training_quantization(
            net, images, gptq_config=mct.gptq.get_pytorch_gptq_config(epochs), **arguments
        )
    else:
        quantized, _ = mct.ptq.pytorch_post_training_quantization(net, images, **arguments)
    return quantized.eval()


def _target(bits: Bits) -> tpc.TargetPlatformCapabilities:
    linear, _, other = tpc.get_op_quantization_configs()
    low = linear.clone_and_edit(attr_to_edit={KERNEL_ATTR: {WEIGHTS_N_BITS: bits.weights}})
    return tpc.generate_tpc(
        default_config=other,
        base_config=low,
        mixed_precision_cfg_list=[low] if bits.weights == 8 else [linear, low],
        name="harness",
    )
