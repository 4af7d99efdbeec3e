"""DESIGN's second law: quantizing needs PyTorch, and neither Lightning nor Hydra nor W&B."""

import subprocess
import sys

from tests.helpers import ROOT

PROGRAM = """
import sys
for name in ("pytorch_lightning", "lightning", "lightning_fabric", "hydra", "wandb"):
    sys.modules[name] = None  # whoever imports it gets an ImportError

import copy
import torch
import qat_tricks
from qat_tricks import tricks
from qat_tricks.graph import layers, trace
from tests.helpers.nets import images, small_net

torch.set_num_threads(1)
done = []

def run(function, *args, **kwargs):
    result = function(*args, **kwargs)
    done.append(function.__name__)
    return result

net, batches = small_net(), [images()]
quantized = run(qat_tricks.quantize, net, batches)
report = run(qat_tricks.export_onnx, quantized, sys.argv[1], images(2))
assert report.top1_agreement == 1.0

low = run(qat_tricks.quantize, net, [images()], recipe="int8_ptq")
traced = trace(copy.deepcopy(net))
unfolded = copy.deepcopy(traced)
run(tricks.fold_batchnorm, traced)
run(tricks.equalize, traced, batches)
reference = copy.deepcopy(traced)
run(tricks.quantize, traced)
run(tricks.calibrate, traced, batches)
run(tricks.tune_ranges, traced, batches)
assert run(tricks.mixed_precision, traced, batches, share=0.75)["reached"] <= 0.75
run(tricks.correct_weights, traced)
run(tricks.gptq, traced, reference, batches)
run(tricks.learned_rounding, traced, reference, batches, iterations=2)
run(tricks.correct_bias, traced, reference, batches)
assert run(tricks.restore_batchnorm, traced, batches)
run(tricks.learn_scales, traced)
run(tricks.dampen_oscillations, layers(traced).values(), 0.1)
assert run(tricks.prune, traced, 0.5) >= 0.5
run(tricks.distill, torch.randn(4, 10), torch.randn(4, 10))
assert run(tricks.freeze_batchnorm, unfolded) > 0
run(tricks.reestimate_batchnorm, unfolded, batches)
narrowed = run(tricks.prune_channels, unfolded, batches, share=0.6)
assert narrowed["macs"][1] <= 0.6 * narrowed["macs"][0]
print(*sorted(set(done)))
"""


def test_every_function_runs_where_nothing_else_can_be_imported(tmp_path):
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "model.onnx")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    tricks = {path.stem for path in (ROOT / "conf" / "trick").glob("*.yaml")}
    assert set(done.stdout.split()) == tricks | {"quantize", "export_onnx"}


def test_quantize_loads_no_framework_where_it_could():
    program = """
import sys
import torch
import qat_tricks
from tests.helpers.nets import images, small_net
qat_tricks.quantize(small_net(), [images()])
unasked = {"pytorch_lightning", "lightning", "hydra", "wandb", "torchvision"}
print(*sorted(unasked & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert (done.stdout, done.returncode) == ("\n", 0), done.stderr[-2000:]
