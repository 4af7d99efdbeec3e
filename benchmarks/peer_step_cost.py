# PATH/environments/nncf/bin/python benchmarks/peer_step_cost.py --peer nncf --models resnet18
"""A peer's QAT step against the float step, interleaved; ``step_cost.py --environments`` runs it.

Each peer as its own documentation sets up QAT: PT2E with the quantizer of its tutorial
(``X86InductorQuantizer`` refuses a network that calls one ReLU twice, as ResNet-18 does), Brevitas
with its graph quantization, NNCF by ``nncf.quantize`` and training on. It needs torch, torchvision
and the peer, not qat_tricks.
"""

import argparse
import copy
import json
from collections.abc import Callable
from dataclasses import asdict

import torch
import torchvision
from torch import Tensor, nn
from training_steps import Contender, measure, random_batch


def pt2e(net: nn.Module, images: Tensor) -> nn.Module:
    from torchao.quantization.pt2e import move_exported_model_to_train
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
    from torchao.testing.pt2e._xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )

    config = get_symmetric_quantization_config(is_per_channel=True, is_qat=True)
    captured = torch.export.export(net.train(), (images,)).module()
    prepared = prepare_qat_pt2e(captured, XNNPACKQuantizer().set_global(config))
    move_exported_model_to_train(prepared)
    return prepared


def brevitas(net: nn.Module, images: Tensor) -> nn.Module:
    from brevitas.graph.quantize import preprocess_for_quantize, quantize

    return quantize(preprocess_for_quantize(net.eval())).train()


def nncf(net: nn.Module, images: Tensor) -> nn.Module:
    import nncf

    data = nncf.Dataset(list(images.split(1)))
    mixed = nncf.QuantizationPreset.MIXED
    return nncf.quantize(net.eval(), data, preset=mixed, subset_size=len(images)).train()


PEERS: dict[str, Callable[[nn.Module, Tensor], nn.Module]] = {
    "PT2E": pt2e,
    "Brevitas": brevitas,
    "NNCF": nncf,
}
ENVIRONMENTS = {"PT2E": "torchao", "Brevitas": "brevitas", "NNCF": "nncf"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer", choices=list(PEERS), required=True)
    parser.add_argument("--model", default="resnet18")
    for name, default in (("batch", 32), ("size", 64), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--warmup", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    images, labels = random_batch(args.batch, args.size)
    plain = getattr(torchvision.models, args.model)().train()
    quantized = PEERS[args.peer](copy.deepcopy(plain), images)
    costs = measure(
        [Contender(plain), Contender(quantized)], images, labels, args.warmup, args.steps
    )
    # The last line, after whatever the library prints.
    print(json.dumps([asdict(cost) for cost in costs]))


if __name__ == "__main__":
    main()
