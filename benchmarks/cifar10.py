# python benchmarks/cifar10.py --root PATH/cifar10_jpeg --weights PATH/cifar10_resnet20.pt \
#     --runs outputs/cifar10 --out docs/results/cifar10.md
"""ResNet-20 on CIFAR-10 through ``train.py``: fine-tuned in float first, then by recipe, judged on
ONNX Runtime's output.

Each job is one run of ``train.py`` into a folder under ``--runs``; one that has its report already
is not run again.
"""

import shlex
import subprocess
import sys
from pathlib import Path

from common import Report, argument_parser, command

from qat_tricks.evidence.report import read_report

TRAIN = Path(__file__).resolve().parents[1] / "train.py"
JOBS = {
    "int8_ptq": ["recipe=int8_ptq"],
    "int8_prune50": ["recipe=int8_prune50"],
    "w4a4_ptq": ["recipe=w4a4_qat", "stage.epochs=0"],
    "w4a4_qat": ["recipe=w4a4_qat", "stage.epochs=4"],
}
BARS = {"int8_ptq": 0.2, "int8_prune50": 0.5}  # points that may be lost


def main() -> None:
    parser = argument_parser(__doc__, threads=2)
    parser.add_argument("--root", required=True)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    args = parser.parse_args()
    shared = [
        "baseline.finetune=true",
        "baseline.epochs=3",
        "baseline.lr=0.02",
        "logger=csv",
        f"measure.threads={args.threads}",
    ]
    report = Report(
        "ResNet-20 on CIFAR-10 (stored as JPEG), judged on ONNX Runtime",
        [
            f"{command(args, 'threads')}: each row is `train.py data=cifar10 {' '.join(shared)}` "
            "and",
            "what its line names; 10,000 test images.",
        ],
        (
            "job",
            "float",
            "int8",
            "points lost",
            "bar",
            "agreement with float",
            "zeros",
            "parity",
            "minutes",
        ),
        args.out,
    )
    for job in args.jobs:
        folder = args.runs / job
        if not (folder / "report.json").is_file():
            data = ["data=cifar10", f"data.root={args.root}", f"model.weights={args.weights}"]
            run = [sys.executable, str(TRAIN), *JOBS[job], *data, *shared]
            run.append(f"hydra.run.dir={folder}")
            print(shlex.join(run), flush=True)
            subprocess.run(run, check=True)
        measured = read_report(folder)
        plain, onnx = (100 * measured["stages"][i]["accuracy"] for i in (0, -1))
        minutes = sum(stage["seconds"] for stage in measured["stages"][1:]) / 60
        report.add(
            f"`{' '.join(JOBS[job])}`",
            f"{plain:.2f}",
            f"{onnx:.2f}",
            f"{plain - onnx:.2f}",
            BARS.get(job, ""),
            f"{measured['agreement']:.4f}",
            f"{measured['sparsity']:.2f}",
            f"{measured['parity']['sqnr_db']:.0f} dB",
            f"{minutes:.0f}",
        )


if __name__ == "__main__":
    main()
