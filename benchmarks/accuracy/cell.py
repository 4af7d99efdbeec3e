# python benchmarks/accuracy/cell.py FOLDER, which harness.py prepares
"""Quantizes one network by one method, in that method's environment, and writes its logits.

The folder has ``cell.json`` and gets ``logits.pt`` and ``result.json``. It needs torch, the
method's library and, for methods that export, ONNX Runtime.
"""

import importlib
import json
import random
import sys
import time
import traceback
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from methods import Bits, CannotError
from networks import NETWORKS
from torch import Tensor

CALIBRATION_BATCH, TEST_BATCH = 32, 50


def run(folder: Path, cell: dict[str, Any]) -> dict[str, Any]:
    """Writes ``logits.pt`` and returns what the method took and who judged it."""
    torch.set_num_threads(cell["threads"])
    random.seed(cell["seed"])
    torch.manual_seed(cell["seed"])
    network = NETWORKS[cell["network"]]
    data = torch.load(cell["data"], weights_only=True, mmap=True)
    # the seed decides which images calibrate
    generator = torch.Generator().manual_seed(cell["seed"])
    order = torch.randperm(len(data["calibration"]), generator=generator)[: cell["images"]]
    calibration = network.normalize(data["calibration"][order]).split(CALIBRATION_BATCH)
    net = network.load(Path(cell["weights"]))
    method = importlib.import_module(f"methods.{cell['module']}")
    started = time.perf_counter()
    made = method.quantize(net, list(calibration), Bits.of(cell["bits"]), folder, **cell["options"])
    seconds = time.perf_counter() - started
    logits_of = _onnx(made, cell["threads"]) if isinstance(made, Path) else made
    test = data["test"][: cell["test"]]
    with torch.no_grad():
        parts = [logits_of(network.normalize(part)).float() for part in test.split(TEST_BATCH)]
    torch.save(torch.cat(parts), folder / "logits.pt")
    judge = "ONNX Runtime" if isinstance(made, Path) else "its own simulation"
    return {"seconds": round(seconds, 1), "judge": judge}


def _onnx(path: Path, threads: int) -> Callable[[Tensor], Tensor]:
    import onnxruntime  # a method that only simulates needs none

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0])


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None  # a checkout that is not installed


def main() -> None:
    folder = Path(sys.argv[1])
    cell = json.loads((folder / "cell.json").read_text(encoding="utf-8"))
    try:
        result = run(folder, cell)
    except CannotError as error:
        result = {"cannot": str(error)}
    # a peer's failure is a result of the comparison, and it is written with its reason
    except Exception as error:
        traceback.print_exc()
        text = " ".join(f"{type(error).__name__}: {error}".split())
        result = {"failed": text[:300]}
    result["versions"] = {name: _version(name) for name in ("torch", cell["package"])}
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
