# python benchmarks/coverage.py --calibration PATH/imagenet_calib1000 \
#     --val PATH/imagenette160/val --out docs/results/coverage.md
"""``int8_ptq`` on the classifiers people bring: layers folded and equalized, and whether ONNX
Runtime runs them as simulated.

Pretrained weights need a download, so each network gets weights under which a comparison means
something: layers scaled one after the other until their outputs have unit variance (Mishkin and
Matas 2016, "All you need is a good init", LSUV), BatchNorms with statistics of real images and
random affine parameters, and a last layer fitted to labels by ridge regression on 320 images.
"""

import argparse
import copy
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import onnxruntime
import torch
from common import Report, argument_parser, command, table_row
from images import IMAGENET_MEAN, IMAGENET_STD, batches, image_folder
from torch import Tensor, nn

import qat_tricks
from qat_tricks.deploy.cost.coverage import integer_coverage
from qat_tricks.deploy.cost.forecast import forecast_network
from qat_tricks.errors import QatTricksError
from qat_tricks.graph.fold import fold_batchnorm
from qat_tricks.graph.layers import BATCHNORMS
from qat_tricks.graph.spec import spec_of
from qat_tricks.graph.trace import trace
from qat_tricks.models.build import build_model
from qat_tricks.tricks.equalize import find_pairs

TORCHVISION = " ".join(
    (
        "alexnet vgg11_bn googlenet inception_v3 resnet18 resnet50 resnext50_32x4d "
        "wide_resnet50_2 squeezenet1_1 densenet121",
        "mnasnet1_0 mobilenet_v2 mobilenet_v3_small mobilenet_v3_large efficientnet_b0 "
        "efficientnet_v2_s regnet_x_400mf",
        "regnet_y_400mf shufflenet_v2_x1_0 convnext_tiny swin_t vit_b_16 maxvit_t",
    )
).split()
TIMM = " ".join(
    (
        "resnet18 efficientnet_lite0 mobilenetv3_small_100 mobilenetv4_conv_small convnext_atto "
        "ghostnet_100 repvgg_a0 fbnetc_100",
        "hardcorenas_a tinynet_e mobileone_s0 fastvit_t8 edgenext_xx_small hrnet_w18_small dla34 "
        "nfnet_l0 regnetz_c16 resnetv2_50",
        "skresnet18 selecsls42b res2net50_26w_4s starnet_s1 rexnet_100 mixnet_s cspresnet50 "
        "darknet53 vovnet39a ese_vovnet19b_dw",
        "levit_128s efficientvit_b0 tf_efficientnet_lite0 tf_mobilenetv3_small_075 tf_mixnet_s",
    )
).split()
NAMES = [*TORCHVISION, *(f"timm/{name}" for name in TIMM)]
LAYERS = (nn.Conv2d, nn.Linear)
SIZES = {"inception_v3": 299}  # else 224


@torch.no_grad()
def give_weights(
    net: nn.Module, unlabelled: list[Tensor], labelled: list[tuple[Tensor, Tensor]]
) -> nn.Module:
    """Gives ``net``, in place, weights made of real images, ``unlabelled`` and ``labelled``."""
    for name, parameter in net.named_parameters():
        if (
            name.rpartition(".")[2] in ("gamma", "layer_scale", "skipinit_gain")
            and float(parameter.abs().max()) < 0.1
        ):
            parameter.fill_(0.5)  # residual branches that begin switched off
    net.eval()
    for norm in (module for module in net.modules() if isinstance(module, BATCHNORMS)):
        if norm.weight is not None:
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_(0, 0.2)
        norm.momentum = None  # running statistics are then means over all batches
        norm.reset_running_stats()
        norm.train()
    scaled: set[nn.Module] = set()

    def scale(layer: nn.Module, _: object, output: Tensor) -> Tensor | None:
        if layer in scaled:
            return None
        scaled.add(layer)
        factor = 1 / output.std().clamp_min(1e-6)
        layer.weight.mul_(factor)  # type: ignore[operator]
        if layer.bias is not None:
            layer.bias.mul_(factor)  # type: ignore[operator]
        return output * factor

    hooks = [
        module.register_forward_hook(scale)
        for module in net.modules()
        if isinstance(module, LAYERS)
    ]
    for batch in unlabelled:
        net(batch)
    for hook in hooks:
        hook.remove()
    net.eval()
    _fit_last_layer(net, labelled)
    return net


def _fit_last_layer(net: nn.Module, labelled: list[tuple[Tensor, Tensor]]) -> None:
    last = [m for m in net.modules() if isinstance(m, LAYERS) and len(m.weight) == 10][-1]
    seen: list[Tensor] = []
    hook = last.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for batch, _ in labelled:
        net(batch)
    hook.remove()
    inputs = torch.cat([x.reshape(*x.shape[:2], -1).mean(2) for x in seen]).double()
    targets = (
        torch.nn.functional.one_hot(torch.cat([labels for _, labels in labelled]), 10).double()
        - 0.1
    )
    mean = inputs.mean(0)
    gram = (inputs - mean).T @ (inputs - mean)
    ridge = 0.1 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    weight = torch.linalg.solve(gram + ridge, (inputs - mean).T @ targets).T
    last.weight.copy_(weight.view(last.weight.shape))  # type: ignore[operator]
    if last.bias is not None:
        last.bias.copy_(-(weight @ mean))  # type: ignore[operator]


def load(folder: Path, count: int, size: int, skip: int = 0) -> list[tuple[Tensor, Tensor]]:
    """``count`` images of ``folder`` in a random order in batches ``[16, 3, size, size]``, with
    labels, after ``skip`` others.
    """
    data = image_folder(folder, size, IMAGENET_MEAN, IMAGENET_STD)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).tolist()
    return list(batches(data, 16, order[skip : skip + count]))


def measure(name: str, args: argparse.Namespace) -> str:
    """Quantizes, exports and runs one network, and returns its row of the table."""
    started = time.perf_counter()
    size = SIZES.get(name, 224)
    calibration = [batch for batch, _ in load(args.calibration, args.images, size)]
    test = [batch for batch, _ in load(args.val, args.test_images, size)]
    labelled = load(args.val, 320, size, skip=args.test_images)
    torch.manual_seed(args.seed)
    net = give_weights(build_model(name, num_classes=10), calibration[:4], labelled)
    work = trace(copy.deepcopy(net))
    batchnorms = sum(isinstance(module, BATCHNORMS) for module in work.modules())
    fold_batchnorm(work)
    pairs = len(find_pairs(work))
    foreseen = forecast_network(net, calibration[0][:1]).coverage
    seconds = time.perf_counter()
    quantized = qat_tricks.quantize(net, calibration)
    seconds = time.perf_counter() - seconds
    folded = len({batchnorm for _, batchnorm in spec_of(quantized).get("folded", [])})
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = Path(folder) / "model.onnx"
        report = qat_tricks.export_onnx(
            quantized, path, calibration[0], images=test, min_top1_agreement=0.0, min_sqnr_db=-200
        )
        coverage = integer_coverage(path, tuple(test[0].shape[1:]))
    for operator in coverage.operators:
        if not operator.integer:
            print(
                f"{name}: in float: {operator.op_type} {operator.name}, {operator.macs} MACs",
                file=sys.stderr,
            )
    differing = [tensor for tensor in report.layers if tensor.differing]
    begins = min(differing, key=lambda tensor: tensor.place, default=None)
    gap = "" if begins is None else f"{begins.name}, {begins.differing:.0e}"
    return table_row(
        name,
        size,
        f"{folded} of {batchnorms}",
        pairs,
        f"{coverage.coverage:.4f}",
        f"{foreseen:.4f}",
        f"{report.sqnr_db:.0f}",
        gap,
        f"{report.top1_agreement:.4f}",
        f"{seconds:.0f}",
        f"{time.perf_counter() - started:.0f}",
    )


def _rows(path: Path) -> dict[str, str]:
    """The rows of a table that an earlier run began, by network; its failures are tried again."""
    rows = [
        line
        for line in path.read_text().splitlines()
        if line.startswith("| ") and "| failed |" not in line
    ]
    return {row.split("|")[1].strip(): row for row in rows[1:]}


def main() -> None:
    parser = argument_parser(__doc__, threads=2)
    for folder in ("calibration", "val"):
        parser.add_argument(f"--{folder}", type=Path, required=True)
    parser.add_argument("--networks", nargs="+", default=NAMES)
    parser.add_argument("--images", type=int, default=64, help="of the calibration set")
    parser.add_argument("--test-images", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    parser.add_argument(
        "--one",
        action="store_true",
        help="print the row of the one network named, and nothing else",
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.one:
        try:
            print(measure(args.networks[0], args))
        except QatTricksError as error:
            print(f"| {args.networks[0]} | refused: {error} |")
        return
    done_before = _rows(args.out) if args.out and args.out.is_file() else {}
    report = Report(
        "Networks that int8_ptq takes",
        [
            f"{command(args, 'images', 'test_images', 'seed', 'threads')}, torch "
            f"{torch.__version__}, ONNX Runtime {onnxruntime.__version__}."
        ],
        (
            "network",
            "px",
            "BatchNorms folded",
            "pairs equalized",
            "int8 coverage (MACs)",
            "foreseen",
            "parity SQNR, dB",
            "gap begins at, share of its integers",
            "top-1 agreement with the simulation",
            "PTQ, s",
            "all, s",
        ),
        args.out,
    )
    for name in args.networks:
        report.add_lines(done_before.get(name) or _row_of_process(name, args))


def _row_of_process(name: str, args: argparse.Namespace) -> str:
    """The row of one network, from a process of its own: the memory that one network leaves does
    not weigh on the next.
    """
    run = [sys.executable, os.path.abspath(__file__), "--one", "--networks", name]
    for option in ("calibration", "val", "images", "test_images", "seed", "threads"):
        run += [f"--{option.replace('_', '-')}", str(getattr(args, option))]
    done = subprocess.run(run, stdout=subprocess.PIPE, text=True, check=False)
    row = done.stdout.strip() if done.returncode == 0 else ""
    return row.splitlines()[-1] if row else f"| {name} | failed |"


if __name__ == "__main__":
    main()
