# python benchmarks/accuracy/make_environments.py --environments PATH/environments
"""Makes the peers' environments for ``harness.py``, one a library: some GB each.

An environment that is there stays as it is.
"""

import argparse
import subprocess
import venv
from pathlib import Path

from methods import ENVIRONMENTS

SHARED = ("torch", "torchvision", "onnx", "onnxscript", "onnxruntime")


def make(folder: Path, packages: tuple[str, ...]) -> None:
    """Makes one environment with these packages and the shared ones."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    subprocess.run([str(python), "-m", "pip", "install", *SHARED, *packages], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--environments", type=Path, required=True, help="folder that gets them")
    parser.add_argument("names", nargs="*", help="of the environments; none: all")
    args = parser.parse_args()
    unknown = set(args.names) - set(ENVIRONMENTS)
    if unknown:
        raise SystemExit(f"unknown: {', '.join(unknown)}; there are {', '.join(ENVIRONMENTS)}")
    for name in args.names or ENVIRONMENTS:
        if not (args.environments / name).exists():
            make(args.environments / name, ENVIRONMENTS[name])


if __name__ == "__main__":
    main()
