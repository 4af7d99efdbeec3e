# python benchmarks/layer_choices.py --root PATH/cifar10_jpeg --weights PATH/cifar10_resnet20.pt \
#     --out docs/results/layer_choices.md
"""What each layer gets, without training: zeros by several criteria and scopes, and bits under a
budget against the same bits everywhere. Judged by agreement with the float network.
"""

import copy
import time
from collections.abc import Iterator

import torch
from common import Report, argument_parser, command
from torch import Tensor, nn

import qat_tricks
from qat_tricks.data import build_data
from qat_tricks.graph import layers, spec_of, trace
from qat_tricks.graph.output_error import output_error
from qat_tricks.graph.pruning_by_images import prune_and_refit
from qat_tricks.models.cifar_resnet import CIFAR_RESNETS, CifarResNet
from qat_tricks.tricks import fold_batchnorm, prune

BATCH = 64
SPARSITIES = (0.5, 0.7, 0.9)
SCOPES = ("layer", "global", "sensitivity")
REFIT = "obs, refit"  # what ``Prune`` does by obs where no training follows
CRITERIA = ("magnitude", "obs", REFIT)
BITS = (4, 3)  # on average


def pruned(
    net: nn.Module, calibration: list[Tensor], sparsity: float, criterion: str, scope: str
) -> nn.Module:
    """A copy of ``net``, pruned without training."""
    traced = trace(copy.deepcopy(net))
    fold_batchnorm(traced)
    if criterion == REFIT:
        prune_and_refit(traced, sparsity, calibration, scope=scope)
    else:
        prune(traced, sparsity, criterion=criterion, scope=scope, batches=calibration)
    return traced.eval()


def networks(
    net: nn.Module, calibration: list[Tensor]
) -> Iterator[tuple[str, str, str, nn.Module, float]]:
    """What was done, its choices, the budget, the network, and the seconds that it took."""
    for sparsity in SPARSITIES:
        for criterion in CRITERIA:
            for scope in SCOPES:
                started = time.perf_counter()
                network = pruned(net, calibration, sparsity, criterion, scope)
                seconds = time.perf_counter() - started
                yield "pruned", f"{criterion}; {scope}", f"{sparsity:.0%} zeros", network, seconds
    ptq = "stages.ptq.tricks"
    for bits in BITS:
        uniform = [f"{ptq}.quantize.weight_bits={bits}", "~stages.qat"]
        mixed = [f"{ptq}.mixed_precision.share={bits / 8}"]
        for recipe, settings in (("w4a8_qat", uniform), ("mixed_ptq", mixed)):
            started = time.perf_counter()
            network = qat_tricks.quantize(net, calibration, recipe, settings)
            seconds = time.perf_counter() - started
            chosen = spec_of(network).get("mixed_precision")
            how = "bits a layer" if chosen else "one number of bits, 8 in the first and last layer"
            yield "quantized", how, f"{average_bits(network):.2f} bits a weight", network, seconds


def average_bits(network: nn.Module) -> float:
    """The bits of a weight, on average."""
    found = list(layers(network).values())
    bits = sum(layer.weight.numel() * layer.weight_quantizer.scheme.bits for layer in found)
    return bits / sum(layer.weight.numel() for layer in found)


def main() -> None:
    parser = argument_parser(__doc__, threads=1)
    parser.add_argument("--root", required=True)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--network", choices=CIFAR_RESNETS, default="resnet20")
    parser.add_argument("--images", type=int, default=128, help="for calibration")
    parser.add_argument("--test-images", type=int, default=1000)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    data = build_data("cifar10", root=args.root, batch_size=BATCH)
    data.setup()
    net = CifarResNet(CIFAR_RESNETS[args.network], 10)
    net.load_state_dict(torch.load(args.weights, weights_only=True))
    net.eval()
    calibration = [images for images, _ in data.calibration_loader(args.images)]
    test = data.splits.test
    chosen = range(0, len(test), len(test) // args.test_images)
    images, labels = (torch.stack(part) for part in zip(*(test[i] for i in chosen), strict=True))
    with torch.no_grad():
        expected = net(images)
    accuracy = float((expected.argmax(1) == labels).double().mean())
    report = Report(
        f"Zeros and bits a layer, without training: {args.network}",
        [
            f"{command(args, 'network', 'images', 'test_images', 'threads')}, torch "
            f"{torch.__version__}. The float network: {accuracy:.1%} of {len(images)} test images.",
        ],
        ("", "by", "budget", "agreement with float:", "KL (nats):", "top-1:", "seconds:"),
        args.out,
    )
    for what, how, budget, network, seconds in networks(net, calibration):
        with torch.no_grad():
            logits = network(images)
        error = output_error(expected, logits)
        top1 = float((logits.argmax(1) == labels).double().mean())
        report.add(
            what,
            how,
            budget,
            f"{error.agreement:.3f}",
            f"{error.kl:.4f}",
            f"{top1:.1%}",
            f"{seconds:.0f}",
        )


if __name__ == "__main__":
    main()
