"""The script that a memory measurement runs."""

import json
import subprocess
import sys

import numpy as np

from qat_tricks.deploy.cost import memory_probe
from tests.helpers.handmade import float_conv

# as the script runs, but where it cannot import torch or this package
ALONE = """
import runpy, sys
sys.modules.update(torch=None, qat_tricks=None)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_it_measures_without_loading_torch_or_this_package(tmp_path):
    path = float_conv(tmp_path / "m.onnx", np.ones((4, 3, 3, 3)))
    inputs = {"x": [[2, 3, 8, 8], "float32"]}
    job = {"path": str(path), "inputs": inputs, "threads": 1, "config": {}, "runs": 1}
    command = [sys.executable, "-P", "-c", ALONE, memory_probe.__file__, json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert 15 * 2**20 < int(done.stdout) < 2**30  # in bytes
