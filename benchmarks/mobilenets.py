# python benchmarks/mobilenets.py --calibration PATH/imagenet_calib1000 --val PATH/imagenette160/val
# --weights PATH/weights \
#     --out docs/results/ptq_mobilenet.md
"""What ``int8_ptq`` without training reaches on two MobileNets, judged on ONNX Runtime's output.

The folders hold one folder of images a class, named by its WordNet id; the sorted names in
``--calibration`` are the classes.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import onnxruntime
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import transforms
from torchvision.datasets import ImageFolder

import qat_tricks
from qat_tricks.deploy.runtimes.session import open_session, run_batch

TRANSFORM = transforms.Compose(
    [
        transforms.Resize((224, 224)),
        transforms.ToTensor(),
        transforms.Normalize([0.5] * 3, [0.5] * 3),
    ]
)


class MobileNetV1(nn.Module):
    """MobileNetV1 at width 0.25 as trained in TensorFlow: convs of stride 2 pad right and bottom
    only.
    """

    def __init__(self) -> None:
        super().__init__()
        widths = [8, 16, 32, 32, 64, 64, 128, 128, 128, 128, 128, 128, 256, 256]
        strides = [1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1]
        features = _conv(3, 8, 3, 2, 1)
        for before, after, stride in zip(widths, widths[1:], strides, strict=False):
            features += _conv(before, before, 3, stride, before) + _conv(before, after, 1, 1, 1)
        self.features = nn.Sequential(*features)
        self.fc = nn.Linear(256, 1000)

    def forward(self, x: Tensor) -> Tensor:
        for module in self.features:
            if isinstance(module, nn.Conv2d) and module.stride == (2, 2):
                x = F.pad(x, (0, 1, 0, 1))
            x = module(x)
        return self.fc(x.mean((2, 3)))


def _conv(before: int, after: int, size: int, stride: int, groups: int) -> list[nn.Module]:
    padding = size // 2 if stride == 1 else 0
    conv = nn.Conv2d(before, after, size, stride, padding, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(after, eps=1e-3), nn.ReLU6()]


# Weights' file, network, and what it is to reach: agreement with the float network, points lost at
# most.
NETWORKS = {
    "MobileNetV2": ("imagenet_mobilenet_v2.pt", torchvision.models.mobilenet_v2, 0.975, None),
    "MobileNetV1-0.25": ("imagenet_mobilenet_v1_025.pt", MobileNetV1, 0.93, 0.7),
}


def batches(folder: Path, indices: list[int] | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Images ``[50, 3, 224, 224]`` and the numbers of their classes in ``folder``."""
    images = ImageFolder(str(folder), TRANSFORM)
    chosen = torch.utils.data.Subset(
        images, indices if indices is not None else list(range(len(images)))
    )
    return iter(torch.utils.data.DataLoader(chosen, batch_size=50))


def measure(name: str, args: argparse.Namespace) -> str:
    """Quantizes, exports and runs one network, and returns its row of the table."""
    file, build, least_agreement, most_lost = NETWORKS[name]
    net = build()
    net.load_state_dict(torch.load(args.weights / file, weights_only=True))
    net.eval()
    order = torch.randperm(
        len(ImageFolder(str(args.calibration))), generator=torch.Generator().manual_seed(args.seed)
    )
    calibration = [images for images, _ in batches(args.calibration, order[: args.images].tolist())]
    started = time.perf_counter()
    quantized = qat_tricks.quantize(net, calibration, "int8_ptq", args.override)
    seconds = time.perf_counter() - started
    started = time.perf_counter()
    with torch.no_grad():
        for images in calibration:
            net(images)
    passes = seconds / (time.perf_counter() - started)

    classes = {
        wordnet_id: i for i, wordnet_id in enumerate(ImageFolder(str(args.calibration)).classes)
    }
    label = torch.tensor([classes[wordnet_id] for wordnet_id in ImageFolder(str(args.val)).classes])
    counts = torch.zeros(4, dtype=torch.long)  # float right, int8 right, agreeing, all
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = Path(folder) / "model.onnx"
        parity = qat_tricks.export_onnx(quantized, path, calibration[0], images=calibration[:1])
        session = open_session(path, threads=args.threads)
        for images, numbers in batches(args.val):
            expected, got = (
                net(images).argmax(1),
                torch.from_numpy(run_batch(session, images.numpy())).argmax(1),
            )
            right = [(answer == label[numbers]).sum() for answer in (expected, got)]
            counts += torch.stack([*right, (expected == got).sum(), torch.tensor(len(images))])
    plain, int8, agreement, _ = (counts / counts[3]).tolist()
    met = agreement >= least_agreement and (most_lost is None or 100 * (plain - int8) <= most_lost)
    bar = f"{least_agreement}" + (f", {most_lost} points" if most_lost is not None else "")
    bar += ": met" if met else ": **not met**"
    return (
        f"| {name} | {counts[3]} | {100 * plain:.2f} | {100 * int8:.2f} | {agreement:.4f} | {bar} "
        f"| {parity.sqnr_db:.0f} dB | {seconds:.0f} s, {passes:.1f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for folder in ("calibration", "val", "weights"):
        parser.add_argument(f"--{folder}", type=Path, required=True)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--images", type=int, default=512, help="of the calibration set")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of these images")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--override", nargs="*", default=[], help="of the recipe, as on Hydra's command line"
    )
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    lines = [
        "# int8_ptq without training, judged on ONNX Runtime",
        "",
        f"`python benchmarks/mobilenets.py --images {args.images} --seed {args.seed} --threads "
        f"{args.threads}`, torch {torch.__version__}, ONNX Runtime {onnxruntime.__version__}.",
        f"{args.images} calibration images of 1,000 ImageNet classes, 224 px, the default "
        "`int8_ptq`; imagenette val, top-1 over 1,000 outputs.",
        "",
        "| network | images | float | int8 | agreement with float | bar | parity with the "
        "simulation | time; in float passes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in args.networks:
        lines.append(measure(name, args))
        print(lines[-1], flush=True)
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
