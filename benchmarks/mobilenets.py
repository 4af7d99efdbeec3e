# python benchmarks/mobilenets.py --calibration PATH/imagenet_calib1000 \
#     --val PATH/imagenette160/val --weights PATH/weights --out docs/results/ptq_mobilenet.md
"""Accuracy of ``int8_ptq`` without training on two MobileNets, judged on ONNX Runtime's output.

The folders hold one folder of images a class, named by its WordNet id; the sorted names in
``--calibration`` are the classes.
"""

import argparse
import tempfile
import time
from pathlib import Path

import onnxruntime
import torch
from accuracy.networks import NETWORKS
from common import Report, argument_parser, command, table_row
from images import batches, image_folder

import qat_tricks
from qat_tricks.deploy.runtimes.session import open_session, run_batch

BATCH = 50

# A network's bars: agreement with the float network, points lost at most.
BARS = {"MobileNetV2": (0.975, None), "MobileNetV1-0.25": (0.93, 0.7)}


def measure(name: str, args: argparse.Namespace) -> str:
    """Quantizes, exports and runs one network, and returns its row of the table."""
    least_agreement, most_lost = BARS[name]
    net = NETWORKS[name].load(args.weights)
    calibration_set, test_set = image_folder(args.calibration), image_folder(args.val)
    generator = torch.Generator().manual_seed(args.seed)
    order = torch.randperm(len(calibration_set), generator=generator)[: args.images].tolist()
    calibration = [images for images, _ in batches(calibration_set, BATCH, order)]
    started = time.perf_counter()
    quantized = qat_tricks.quantize(net, calibration, "int8_ptq", args.override)
    seconds = time.perf_counter() - started
    started = time.perf_counter()
    with torch.no_grad():
        for images in calibration:
            net(images)
    passes = seconds / (time.perf_counter() - started)

    # the numbers of the test set's classes among those that the network knows
    classes = {wordnet_id: i for i, wordnet_id in enumerate(calibration_set.classes)}
    label = torch.tensor([classes[wordnet_id] for wordnet_id in test_set.classes])
    counts = torch.zeros(4, dtype=torch.long)  # float right, int8 right, agreeing, all
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = Path(folder) / "model.onnx"
        parity = qat_tricks.export_onnx(quantized, path, calibration[0], images=calibration[:1])
        session = open_session(path, threads=args.threads)
        for images, numbers in batches(test_set, BATCH):
            expected = net(images).argmax(1)
            got = torch.from_numpy(run_batch(session, images.numpy())).argmax(1)
            right = [(answer == label[numbers]).sum() for answer in (expected, got)]
            counts += torch.stack([*right, (expected == got).sum(), torch.tensor(len(images))])
    plain, int8, agreement, _ = (counts / counts[3]).tolist()
    met = agreement >= least_agreement and (most_lost is None or 100 * (plain - int8) <= most_lost)
    bar = f"{least_agreement}" + (f", {most_lost} points" if most_lost is not None else "")
    bar += ": met" if met else ": **not met**"
    return table_row(
        name,
        int(counts[3]),
        f"{100 * plain:.2f}",
        f"{100 * int8:.2f}",
        f"{agreement:.4f}",
        bar,
        f"{parity.sqnr_db:.0f} dB",
        f"{seconds:.0f} s, {passes:.1f}",
    )


def main() -> None:
    parser = argument_parser(__doc__, threads=2)
    for folder in ("calibration", "val", "weights"):
        parser.add_argument(f"--{folder}", type=Path, required=True)
    parser.add_argument("--networks", nargs="+", choices=BARS, default=list(BARS))
    parser.add_argument("--images", type=int, default=512, help="of the calibration set")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of these images")
    parser.add_argument(
        "--override", nargs="*", default=[], help="of the recipe, as on Hydra's command line"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    report = Report(
        "int8_ptq without training, judged on ONNX Runtime",
        [
            f"{command(args, 'images', 'seed', 'threads')}, torch {torch.__version__}, ONNX "
            f"Runtime {onnxruntime.__version__}.",
            f"{args.images} calibration images of 1,000 ImageNet classes, 224 px, the default "
            "`int8_ptq`; imagenette val, top-1 over 1,000 outputs.",
        ],
        (
            "network",
            "images",
            "float",
            "int8",
            "agreement with float",
            "bar",
            "parity with the simulation",
            "time; in float passes",
        ),
        args.out,
    )
    for name in args.networks:
        report.add_lines(measure(name, args))


if __name__ == "__main__":
    main()
